"""One adapter file: read, verified against its digest, and refused when it would do nothing or do harm.

diffusers loads files with NaN, with factors missing or with all-zero factors without a word, so all is checked here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadTask, Transient
from imagemill.records import Lora

if TYPE_CHECKING:
    from torch import Tensor

PAIRS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
"""How the two factors of one module are called."""

LAST_FACTORS = (*(last for _, last in PAIRS), "lokr_w2")
"""The factors that are zero in an untrained adapter, so that it changes nothing."""

MAX_PATTERN = 500
"""Characters of a pattern of module names, and of the names it is tried on."""

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps rank and alpha of each module in a file's header."""


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A parsed file: tensors by key, on the CPU. `name` is what the adapter is called inside the pipeline."""

    path: str
    digest: str
    tensors: Mapping[str, Tensor]
    bytes: int

    @property
    def name(self) -> str:
        """A name that follows from the content, so that one file is one adapter whatever its path."""
        return adapter_name(self.digest)


def adapter_name(digest: str) -> str:
    """The adapter's name inside a pipeline: letters and digits only, all of one length."""
    return f"lora{digest[:24]}"


def read(lora: Lora) -> LoraFile:
    """Read and check the file. What was hashed is what is parsed, even if the file changes meanwhile.

    Raises `BadTask` when it is gone, has changed since planning, is no safetensors file, or is refused by `check`;
    `Transient` when the disk fails.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        content = Path(lora.path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadTask(f"the LoRA file {lora.path} is not there any more") from error
    except OSError as error:
        raise Transient(f"the LoRA file {lora.path} cannot be read: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if lora.digest and digest != lora.digest:
        raise BadTask(f"the LoRA file {lora.path} has changed since the run was planned; run the command again")
    try:
        tensors = {key: computable(tensor) for key, tensor in sorted(safetensors.torch.load(content).items())}
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadTask(f"{lora.path} is no readable safetensors file: {error}") from error
    check(lora.path, tensors)
    try:
        tensors = with_alpha(lora.path, tensors, header_metadata(content))
    except (ValueError, TypeError, AttributeError, RecursionError, ArithmeticError, re.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadTask(f"the LoRA file {lora.path} has adapter settings that do not read: {reason}") from error
    return LoraFile(lora.path, digest, tensors, sum(tensor.nbytes for tensor in tensors.values()))


def computable(tensor: Tensor) -> Tensor:
    """The tensor, if torch computes in its type: those of 8 bits become bfloat16, which holds all their values."""
    return tensor.bfloat16() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def check(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises `BadTask` for an empty file, NaN or infinity, a factor without its partner, and a file of zeros.

    Also for a DoRA in kohya's names: diffusers drops its magnitudes with only a warning.
    """
    if not tensors:
        raise BadTask(f"the LoRA file {path} is empty; it changes nothing")
    if any("dora_scale" in key for key in tensors):
        raise BadTask(f"the LoRA file {path} is a DoRA, which is not served")
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadTask(f"the LoRA file {path} contains NaN or infinity in {key!r}")
        if partner(key) not in (None, *tensors):
            raise BadTask(f"the LoRA file {path} has {key!r} but not {partner(key)!r}")
    last = [key for key in tensors if any(name in key for name in LAST_FACTORS)]
    if last and not any(tensors[key].any() for key in last):
        raise BadTask(f"the LoRA file {path} changes nothing: all of its weights such as {last[0]!r} are zero")


def partner(key: str) -> str | None:
    """The key of the other factor of the same module; `None` for keys that need none."""
    if not key.endswith(".weight"):
        return None
    for first, last in PAIRS:
        for here, there in ((first, last), (last, first)):
            if here in key:
                return key.replace(here, there)
    return None


def header_metadata(content: bytes) -> dict[str, Any]:
    """diffusers' adapter settings in the header of a safetensors file; empty where there are none."""
    length = int.from_bytes(content[:8], "little")
    texts = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    settings = json.loads(texts.get(METADATA_KEY) or "{}")
    return settings if isinstance(settings, dict) else {}


def with_alpha(path: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors with the header's alpha / rank multiplied into the second factor.

    diffusers reads these settings only from a path, not from tensors in memory, and would drop the scale in silence.
    The factor is alpha / r, or alpha / sqrt(r) for rank-stabilised adapters (Hu et al. 2021; Kalajdzievski 2023).
    """
    result = dict(tensors)
    if not settings:
        return result
    if any(key.endswith("use_dora") and value for key, value in settings.items()):
        raise BadTask(f"the LoRA file {path} is a DoRA, which is not served")
    for key, tensor in tensors.items():
        component, _, module = key.partition(".")
        alpha = alpha_of(module.split(".lora_B")[0], component, settings)
        if ".lora_B" not in key or tensor.ndim < 2 or alpha is None:
            continue
        rank = tensor.shape[1]
        scale = alpha / (math.sqrt(rank) if settings.get(f"{component}.use_rslora") else rank)
        if scale != 1:
            result[key] = tensor.float() * scale
    return result


def alpha_of(module: str, component: str, settings: Mapping[str, Any]) -> float | None:
    """The alpha of one module: of the pattern that its name ends with, else the component's. Raises `ValueError` for one
    that is no finite number, and for a pattern that could take for ever."""
    for pattern, alpha in (settings.get(f"{component}.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({harmless(pattern, module)})$", module):
            return finite(alpha)
    alpha = settings.get(f"{component}.lora_alpha")
    return None if alpha is None else finite(alpha)


def harmless(pattern: str, module: str) -> str:
    """The pattern, if matching it takes a time that does not explode: short, no group repeated, at most two repetitions.

    The file is a stranger's, and `(a+)+b` takes years on thirty letters. Names, which is what trainers write, have none.
    """
    repeated = len(re.findall(r"(?<!\\)[*+?{]", pattern))
    if max(len(pattern), len(module)) > MAX_PATTERN or repeated > 2 or re.search(r"\)[*+?{]|\(\?|\\[1-9]", pattern):
        raise ValueError(f"the pattern {pattern[:80]!r} of module names is too long or repeats too much")
    return pattern


def finite(alpha: Any) -> float:
    """The alpha as a number. Raises `ValueError`."""
    number = float(alpha)
    if not math.isfinite(number):
        raise ValueError(f"the alpha {number} is not finite")
    return number
