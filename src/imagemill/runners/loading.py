"""From a model folder to a pipeline that is complete: safetensors only, no network, no code from the folder.

diffusers and transformers only warn about weights that a folder lacks, and then run with what was never filled. So each
component is loaded alone, with the loader's own account of what was missing, and a gap refuses the model.

Weights go from the page cache straight to the device, tensor by tensor; no copy of the model is made in main memory. A
component's files are read ahead while the one before it loads.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadModel, Transient, classify
from imagemill.families import Family, family, family_for
from imagemill.records import ModelSpec, Span
from imagemill.runners import Beat, upload
from imagemill.runners.page_cache import read_ahead

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
USUAL_CALL = ("prompt", "num_inference_steps", "generator", "output_type")
SIZE = ("height", "width")
"""Arguments that a call which takes an `image` may do without."""
OTHER_TASKS = ("Inpaint", "Control", "Fill", "Video", "Upscale", "Layered", "Redux")
"""Words in the names of pipelines that want more than text and a picture, or make something else."""
OTHER_INPUTS = frozenset({"mask_image", "mask", "control_image", "num_frames", "video"})
"""Arguments that tell such a pipeline whatever its name."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline on its device, in eval mode, its family, and how long each part of loading took."""

    pipe: Any
    family: Family
    spans: tuple[Span, ...]


def load(spec: ModelSpec, device: str, beat: Beat) -> Loaded:
    """Load the pipeline of the spec's folder onto the device; beats once a component.

    Raises `BadModel` when the folder can never load; whatever the device raises when it has no room.
    """
    folder = Path(spec.folder)
    index = read_index(folder)
    chosen = choose_family(spec, index["_class_name"])
    dtype = choose_dtype(spec.dtype, device)
    names = components(index)
    parts: dict[str, Any] = {}
    spans: list[Span] = []
    for step, name in enumerate(names):
        beat("load", -1, step, len(names))
        if kind := weights_class(index[name]):
            read_ahead([*weight_files(folder / name), *next_weights(folder, names[step + 1 :])])
            with timed(f"load {name}", device, spans):
                parts[name] = free_to_move(load_complete(folder / name, kind, dtype, device_map={"": device}))
    with timed("load pipeline", device, spans):
        pipe = assemble(folder, parts, dtype).to(device)
    for name, part in pipe.components.items():
        refuse_gaps(name, part)
    pipe.set_progress_bar_config(disable=True)
    beat("load", -1, len(names), len(names))
    return Loaded(pipe, chosen, tuple(spans))


@contextmanager
def timed(stage: str, device: str, spans: list[Span]) -> Iterator[None]:
    """Adds the block's span under this name, what it left to the GPU included. The device computes nothing in it."""
    start = time.monotonic()
    yield
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    spans.append(Span(stage, start, time.monotonic() - start, on_device=False))


def components(index: Mapping[str, Any]) -> list[str]:
    """The names of the components in a model index, in its order."""
    return [name for name, entry in index.items() if is_component(name, entry)]


def weight_files(folder: Path) -> Sequence[Path]:
    """The weights of a component in the order of their names; no other precisions, such as `model.fp16.safetensors`."""
    return [path for path in sorted(folder.glob("*.safetensors")) if "." not in path.stem]


def next_weights(folder: Path, names: Sequence[str]) -> Sequence[Path]:
    """The weights of the first of these components that has any."""
    return next((files for name in names if (files := weight_files(folder / name))), ())


def read_index(folder: Path) -> dict[str, Any]:
    """The folder's `model_index.json`. Raises `BadModel` when it is not there or names no class."""
    place = folder / "model_index.json"
    if not folder.is_dir():
        raise BadModel(f"the model folder {folder} does not exist")
    try:
        index = json.loads(place.read_text("utf-8"))
    except FileNotFoundError as error:
        raise BadModel(f"{folder} is no pipeline folder: it has no model_index.json") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadModel(f"{place} does not read: {error}") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise BadModel(f"{place} names no pipeline class; pipelines with code of their own are not run")
    return index


def choose_family(spec: ModelSpec, class_name: str) -> Family:
    """The family that serves the class. Raises `BadModel` for a class unknown to diffusers, or that asks for more than text
    and a picture."""
    import diffusers

    kind = getattr(diffusers, class_name, None)
    if kind is None:
        raise BadModel(f"diffusers {diffusers.__version__} has no pipeline class {class_name}")
    chosen = family(spec.family) if spec.family else family_for(class_name)
    if chosen.pipelines:
        if class_name not in chosen.pipelines:
            raise BadModel(f"the family {chosen.name} serves {', '.join(chosen.pipelines)}, not {class_name}")
        return chosen
    parameters = inspect.signature(kind.__call__).parameters
    wanted = USUAL_CALL if "image" in parameters else (*USUAL_CALL, *SIZE)
    missing = [name for name in wanted if name not in parameters]
    other = any(word in class_name for word in OTHER_TASKS) or OTHER_INPUTS & set(parameters)
    if missing or other or chosen.name != "generic":
        lack = f": its call lacks {', '.join(missing)}" if missing else ""
        raise BadModel(
            f"{class_name} is not served; pipelines that make a picture from text, or edit one by text, are{lack}"
        )
    return chosen


def choose_dtype(name: str, device: str) -> torch.dtype:
    """The torch dtype of that name; `auto` is bfloat16 on a GPU and float32 on the CPU."""
    import torch

    if name == "auto":
        return torch.float32 if device.startswith("cpu") else torch.bfloat16
    if name not in DTYPES:
        raise BadModel(f"dtype {name!r} is not known; use auto or one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def is_component(name: str, entry: Any) -> bool:
    """True for the entries of a model index that name a library and a class."""
    return not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and None not in entry


def weights_class(entry: list[str]) -> Any:
    """The class of a component that has weights, else `None`: the pipeline loads the others."""
    from torch.nn import Module

    kind = component_class(*entry)
    return kind if isinstance(kind, type) and issubclass(kind, Module) else None


def load_complete(folder: Path, loader: Any, dtype: torch.dtype, **how: Any) -> Any:
    """What `loader.from_pretrained` makes of the folder, in eval mode; `how` is handed on. With a `device_map` the weights
    go straight to the device, swiftly if it names one device.

    Raises `BadModel` for pickled, missing, torn or incomplete weights.
    """
    if not any(folder.glob("*.safetensors")):
        if any(path for pattern in PICKLES for path in folder.glob(pattern)):
            raise BadModel(f"{folder} has only pickled weights, which can run code; convert them to safetensors")
        raise BadModel(f"{folder} has no safetensors weights")
    where = how.get("device_map")
    try:
        with upload.swift(where[""] if isinstance(where, dict) else "cpu"):
            part, account = loader.from_pretrained(
                str(folder), dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **how
            )
    except Exception as error:
        if isinstance(error, NotImplementedError) and how.pop("device_map", None):
            # diffusers moves what was never filled before it gives its account: without a move the account comes.
            load_complete(folder, loader, dtype, **how)
        raise refusal(folder, error) from error
    if missing := sorted(account["missing_keys"]):
        raise BadModel(f"{folder} is incomplete; weights missing: {len(missing)}, such as {missing[0]!r}")
    return part.eval()


def free_to_move(part: Any) -> Any:
    """The part as if its device had been chosen later: a map of one device adds no hooks that slow calls or forbid moves,
    but leaves a note that PEFT believes even after a move."""
    if "hf_device_map" in vars(part):
        del part.hf_device_map
    return part


def component_class(library: str, class_name: str) -> Any:
    """The class of a component, from diffusers, transformers or a package inside `diffusers.pipelines`."""
    for place in (library, f"diffusers.pipelines.{library}"):
        if place.split(".")[0] in ("diffusers", "transformers"):
            try:
                return getattr(import_module(place), class_name, None)
            except ModuleNotFoundError:
                continue
    return None


def assemble(folder: Path, parts: dict[str, Any], dtype: torch.dtype) -> Any:
    """The pipeline around the loaded parts; tokenizers, schedulers and the like come from the folder."""
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False, **parts
        )
    except Exception as error:
        raise refusal(folder, error) from error


def refusal(folder: Path, error: Exception) -> Exception:
    """What an error of a loader means: `BadModel`, unless memory, the device or the disk is to blame."""
    known = classify(error)
    disk = isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError)
    return known if disk or not isinstance(known, Transient) else BadModel(f"{folder} does not load: {known}")


def refuse_gaps(name: str, part: Any) -> None:
    """Raises `BadModel` when a parameter or buffer was left on `meta`, which means that nothing filled it."""
    from torch.nn import Module

    if isinstance(part, Module):
        for kind in (part.named_parameters(), part.named_buffers()):
            for key, tensor in kind:
                if tensor.is_meta:
                    raise BadModel(f"the weight {key!r} of {name} was never filled; the folder is incomplete")
