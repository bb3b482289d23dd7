"""Which model a name means: a known name, a folder in diffusers format, or a repository of the Hugging Face hub.

Looks on the disk first and downloads only what a pipeline reads. Imports no torch; `huggingface_hub` is imported only
when a repository is asked for.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from imagemill import hub, judges, revision
from imagemill.config.settings import JudgeSettings
from imagemill.devices import GIB
from imagemill.errors import InputError
from imagemill.families import Family, family, family_for
from imagemill.plan import Defaults, PlannedModel
from imagemill.records import ModelSpec, Tuning

ASSETS = Path(__file__).parent / "assets"
INDEX = "model_index.json"

SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Suffixes of what a pipeline reads from the folders of its components: configurations, weights, tokenizers."""

FLUX = "black-forest-labs/FLUX.1"
FLUX2 = "black-forest-labs/FLUX.2"
QWEN_EDIT = "Qwen/Qwen-Image-Edit"
STABILITY = "stabilityai/stable-diffusion"
GATED = "its licence must be accepted on the hub"
SEVERAL = "edits one or several pictures; two passes a step"
VARIANTS = ("fp16", "fp32", "bf16", "fp8", "ema", "non_ema")
"""Words in the names of weights that a pipeline reads only when asked for them."""

_REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_VARIANT = re.compile(rf"\.(?:{'|'.join(VARIANTS)})(?=[.-])")


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model with a name of its own.

    `repo` is its repository on the hub, empty for what is embedded. `parameters` are billions, text encoders and VAE
    included. `memory` is the need in bytes on the device at 1024x1024, one picture at a time. `defaults` go before
    those of the family. `sizes` are the only widths and heights that it was trained at; empty where any will do. `only_edits`
    says that it makes no picture from text, though others of its family do.
    """

    name: str
    repo: str
    family: str
    runner: str
    parameters: float
    memory: int
    note: str = ""
    defaults: Defaults | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    only_edits: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """What a name was found to mean: `spec` for the workers, `planned` for planning, `known` if it has a known name."""

    spec: ModelSpec
    planned: PlannedModel
    known: KnownModel | None


def _diffusion(
    name: str,
    repo: str,
    family: str,
    parameters: float,
    allowance: float,
    note: str = "",
    own: Defaults | None = None,
    sizes: tuple[tuple[int, int], ...] = (),
) -> KnownModel:
    """`parameters` are billions, at two bytes each in bfloat16; `allowance` is GiB on top of them."""
    memory = int(parameters * 2e9 + allowance * GIB)
    return KnownModel(name, repo, family, "diffusion", parameters, memory, note, own, sizes)


# Memory is the weights of all components in bfloat16 plus an allowance for activations, the VAE's decode and the CUDA
# context (about 0.5 GiB). The weights of Z-Image are counted (6.15 B transformer, 4.02 text encoder, 0.084 VAE); the
# others are what their authors state: Qwen-Image 20.4 + 8.3 text encoder + 0.1 VAE, FLUX 11.9 + 4.8 T5 + 0.2, SDXL
# 2.6 + 0.9, SD 3.5 8.1 or 2.5 + 4.8 T5 + 0.9, FLUX.2 [dev] 32 + 24 Mistral + 0.1, [klein] 3.9 + 4.0 Qwen3 + 0.1. The
# allowances are estimates with room to spare: 3 GiB, for SDXL 5 (its VAE decodes in float32), for Qwen-Image 6 (the widest
# model), for tiny the context and its libraries; a model that edits gets 2 more, since it sees the source's tokens beside
# its own.
_CATALOGUE = (
    _diffusion(
        "tiny",
        "",
        "z_image",
        0.01,
        1,
        "embedded: everyday things on plain backgrounds",
        Defaults(128, 128, 8, 0.0),
        ((128, 128), (160, 96), (96, 160)),
    ),
    replace(
        _diffusion("tiny-edit", "", "flux2", 0.01, 1, "embedded: edits small pictures"),
        defaults=Defaults(128, 128, 4, 1.0),
        sizes=((128, 128),),
        only_edits=True,
    ),
    KnownModel("fake", "", "fake", "fake", 0.0, 0, "no model: test pictures, with scripted delays and failures"),
    _diffusion("z-image-turbo", "Tongyi-MAI/Z-Image-Turbo", "z_image", 10.3, 3),
    _diffusion("qwen-image", "Qwen/Qwen-Image", "qwen_image", 28.8, 6, "two passes a step"),
    _diffusion("flux.1-dev", f"{FLUX}-dev", "flux", 16.9, 3, GATED),
    _diffusion("flux.1-schnell", f"{FLUX}-schnell", "flux", 16.9, 3, GATED, Defaults(steps=4, guidance_scale=0.0)),
    _diffusion("sdxl", f"{STABILITY}-xl-base-1.0", "sdxl", 3.5, 5, "two passes a step"),
    _diffusion("sd3.5-large", f"{STABILITY}-3.5-large", "sd3", 13.8, 3, GATED, Defaults(steps=28, guidance_scale=3.5)),
    _diffusion("sd3.5-medium", f"{STABILITY}-3.5-medium", "sd3", 8.2, 3, GATED, Defaults(steps=40, guidance_scale=4.5)),
    _diffusion("qwen-image-edit", QWEN_EDIT, "qwen_edit", 28.8, 8, "edits one picture; two passes a step"),
    _diffusion("qwen-image-edit-2509", f"{QWEN_EDIT}-2509", "qwen_edit", 28.8, 8, SEVERAL, Defaults(steps=40)),
    _diffusion("qwen-image-edit-2511", f"{QWEN_EDIT}-2511", "qwen_edit", 28.8, 8, SEVERAL, Defaults(steps=40)),
    _diffusion("flux.1-kontext-dev", f"{FLUX}-Kontext-dev", "flux_kontext", 16.9, 5, f"edits one picture; {GATED}"),
    _diffusion("flux.2-dev", f"{FLUX2}-dev", "flux2", 56.1, 5, f"from text, or edits pictures; {GATED}"),
    _diffusion(
        "flux.2-klein-4b",
        f"{FLUX2}-klein-4B",
        "flux2",
        8.0,
        5,
        "from text, or edits pictures; distilled",
        Defaults(steps=4, guidance_scale=1.0),
    ),
)

KNOWN: dict[str, KnownModel] = {model.name: model for model in _CATALOGUE}
"""Every known model by its name, in the order in which they are listed."""


def resolve(
    name: str,
    *,
    dtype: str = "auto",
    precision: str = "bf16",
    attention: str = "auto",
    download: bool = True,
    judge: JudgeSettings | None = None,
) -> Model:
    """The model that a name, a folder or a repository (`org/name`) means, complete on the disk; or the judge, asked as
    `judge` says. `precision` is part of a diffusion model's revision, `attention` is not.

    A known name wins over a folder of the same name (write `./NAME` for that), a folder over a repository. Downloads if
    need be, unless `download` is False or `HF_HUB_OFFLINE` is set. Raises `InputError` when there is no such model, it
    cannot be had, or its folder lacks files.
    """
    if judges.is_judge(name):
        spec = judges.resolve(name, judge or JudgeSettings(), dtype=dtype, download=download)
        return _model(spec, family(spec.family), None)
    known = KNOWN.get(name)
    if known and known.runner == "fake":
        spec = ModelSpec(name, "", known.runner, known.family, f"fake/{dtype}", dtype, known.memory)
        return _model(spec, family(known.family), known)
    if known and not known.repo:
        folder = ASSETS / known.name
    elif known:
        folder = _from_hub(known.repo, download)
    else:
        folder, known = _locate(name, download)
    index = _read_index(folder)
    if gap := _gap(folder, index):
        raise InputError(f"model {name!r}: {folder} is incomplete, it lacks {gap}; copy or download it again")
    chosen = family_for(index["_class_name"])
    content = f"{folder_revision(folder)}/{dtype}" + (f"/{precision}" if precision != "bf16" else "")
    memory = known.memory if known else _memory(folder, index)
    tuning = Tuning(precision=precision, attention=attention)
    spec = ModelSpec(name, str(folder.absolute()), "diffusion", chosen.name, content, dtype, memory, tuning=tuning)
    return _model(spec, chosen, known)


def _model(spec: ModelSpec, chosen: Family, known: KnownModel | None) -> Model:
    own = known.defaults if known and known.defaults else Defaults()
    given = {field.name: value for field in fields(Defaults) if (value := getattr(own, field.name)) not in (None, ())}
    return Model(spec, PlannedModel(spec.name, spec.revision, chosen, replace(chosen.defaults, **given)), known)


def check_name(name: str) -> None:
    """Raises `InputError` for a name that means no model, as far as that is known without a look at the hub or at weights."""
    if name not in KNOWN and not judges.is_judge(name):
        place = _place(name)
        if isinstance(place, Path):
            _read_index(place)


def _locate(name: str, download: bool) -> tuple[Path, KnownModel | None]:
    place = _place(name)
    if isinstance(place, Path):
        return place, None
    known = next((model for model in KNOWN.values() if model.repo.lower() == place.lower()), None)
    return _from_hub(known.repo if known else place, download), known


def _place(name: str) -> Path | str:
    """The folder that a name means which is not known, or the repository. Raises `InputError` when it is neither."""
    folder = Path(os.path.expanduser(name))
    # os.path: a name that no folder can have (too long, say) is that of none.
    if name and os.path.isdir(folder):
        return folder
    if name and os.path.exists(folder):
        raise InputError(f"model {name!r} is a file; give the folder of a pipeline in diffusers format (with {INDEX})")
    if _REPO.fullmatch(name):
        return name
    if "/" in name or name.startswith((".", "~")):
        raise InputError(f"model {name!r}: there is no such folder; give one, a repository (org/name) or a known name")
    near = difflib.get_close_matches(name.lower(), KNOWN, n=3, cutoff=0.4) or list(KNOWN)
    raise InputError(
        f"model {name!r} is not known; did you mean {' or '.join(near[:3])}? "
        "`imagemill models` lists the names; a folder or a repository (org/name) will do too"
    )


# --- the hub ----------------------------------------------------------------------------------------------------------


def _from_hub(repo: str, download: bool) -> Path:
    """The folder of the repository's snapshot: the cached one if it is complete, else a downloaded one."""
    return hub.folder(repo, download, _snapshot, lambda folder: _gap(folder, _read_index(folder)))


def _snapshot(repo: str, offline: bool) -> Path:
    """The snapshot with what the pipeline's index names: not every format and precision that a repository holds."""
    from huggingface_hub import hf_hub_download, snapshot_download

    index = _read_index(Path(hf_hub_download(repo, INDEX, local_files_only=offline)).parent)
    wanted = [INDEX, *(f"{name}/*{suffix}" for name in _components(index) for suffix in SUFFIXES)]
    unwanted = [f"*.{variant}{end}" for variant in VARIANTS for end in (".*", "-*")]
    return Path(snapshot_download(repo, local_files_only=offline, allow_patterns=wanted, ignore_patterns=unwanted))


# --- folders ----------------------------------------------------------------------------------------------------------


def _read_index(folder: Path) -> dict[str, Any]:
    place = folder / INDEX
    try:
        index = json.loads(place.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"model folder {folder} has no {INDEX}; give the folder of a pipeline in diffusers format"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{place} does not read ({hub.line(error)}); copy or download the model again") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise InputError(f"{place} names no pipeline class of diffusers; pipelines with code of their own are not run")
    return index


def _components(index: dict[str, Any]) -> list[str]:
    """Names of the components that have a folder: entries with a library and a class."""
    return sorted(
        name
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and None not in entry
    )


def _files(folder: Path, index: dict[str, Any]) -> Iterator[Path]:
    """The files that loading reads, in order of their names: no other precisions, pictures or texts."""
    yield folder / INDEX
    for name in _components(index):
        for path in sorted((folder / name).iterdir()):
            hidden = path.name.startswith(".") or _VARIANT.search(path.name)
            if path.suffix in SUFFIXES and not hidden and path.is_file():
                yield path


def _gap(folder: Path, index: dict[str, Any]) -> str:
    """The first thing the folder lacks of what its indexes name; empty when it lacks nothing."""
    for name in _components(index):
        if not (folder / name).is_dir():
            return f"{name}/"
    for path in _files(folder, index):
        if path.name.endswith(".safetensors.index.json"):
            shards = json.loads(path.read_text("utf-8")).get("weight_map", {}).values()
            for shard in sorted(set(shards)):
                if not (path.parent / shard).is_file():
                    return f"{path.parent.name}/{shard}"
    return ""


def _memory(folder: Path, index: dict[str, Any]) -> int:
    """Bytes of all weights, a fifth more for activations, and 2 GiB for the VAE's decode and the CUDA context."""
    weights = sum(path.stat().st_size for path in _files(folder, index) if path.suffix == ".safetensors")
    return int(weights * 1.2) + 2 * GIB


def folder_revision(folder: Path) -> str:
    """A sha256 in hex over what loading reads of a pipeline folder: the same wherever a copy of it lies."""
    return revision.of_files(folder, _files(folder, _read_index(folder)))
