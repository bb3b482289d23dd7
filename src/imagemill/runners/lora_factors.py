"""The two factors of each module of an adapter, ready to be merged into the model's weights.

Only plain LoRA on linear and convolution layers of the denoising model can be merged by a sum of products. All else (DoRA,
LoKr, LoHa, biases, alphas that diffusers keeps apart, keys of a text encoder, shapes that do not fit) is left to PEFT,
which either serves it or says why not.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from imagemill.errors import OutOfMemory, WorkerGone, classify
from imagemill.runners.adapters import check_landed
from imagemill.runners.lora_file import LoraFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
"""The keys of plain LoRA in PEFT's names."""

ALIGNMENT = 256
"""Bytes; each tensor of an upload begins at a multiple of it."""


class NotMergeable(Exception):
    """The adapter is more than a sum of products on weights that can be written. The message says what, for the log."""


@dataclass(frozen=True, slots=True)
class Part:
    """What an adapter adds to the weight of one module: `up` (outputs, rank) times `down` (rank, inputs).

    The inputs of a convolution are channels times kernel. Alpha over rank is in the factors already.
    """

    module: str
    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """All parts of an adapter, on the device once `arrived` (an event; `None` where nothing was copied) has happened.

    `reason` says why it cannot be merged; then there are no parts. `buffer` is the memory that the parts lie in.
    """

    parts: Sequence[Part] = ()
    bytes: int = 0
    reason: str = ""
    arrived: Any = field(default=None, compare=False)
    buffer: Tensor | None = field(default=None, compare=False)

    def expect(self) -> None:
        """The current stream waits, on the device, until the parts are there; the host does not."""
        if self.arrived is not None and self.buffer is not None:
            import torch

            stream = torch.cuda.current_stream(self.buffer.device)
            stream.wait_event(self.arrived)
            self.buffer.record_stream(stream)


def component_name(pipe: Any) -> str:
    """Which of the pipeline's models denoises: `transformer`, or `unet` in older ones; also the prefix of its keys."""
    return "unet" if getattr(pipe, "transformer", None) is None else "transformer"


def mergeable_shapes(model: Module | None) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights that an adapter can be merged into, by the names of their modules."""
    from torch.nn import Conv2d, Linear

    return {
        name: tuple(module.weight.shape)
        for name, module in (model.named_modules() if model is not None else ())
        if isinstance(module, Linear | Conv2d)
        and module.weight.is_floating_point()
        and not module.weight.is_meta
        and getattr(module, "groups", 1) == 1
    }


def factors(file: LoraFile, pipeline: type, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Factors:
    """The parts of the file for a model with weights of these shapes, on the CPU.

    Modules that the model lacks are left out with a warning. Raises `BadTask` when it has none of them.
    """
    try:
        pairs = paired(converted(file.tensors, pipeline, prefix))
        found = [part for name in sorted(pairs) if name in shapes for part in [fitted(name, pairs[name], shapes[name])]]
    except NotMergeable as error:
        return Factors(reason=str(error))
    except Exception as error:
        known = classify(error)
        if isinstance(known, OutOfMemory | WorkerGone):
            raise
        return Factors(reason=str(known))
    check_landed(file, len(found), len(pairs))
    return Factors(found, sum(part.down.nbytes + part.up.nbytes for part in found))


def converted(tensors: Mapping[str, Tensor], pipeline: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors under PEFT's names without the prefix, as diffusers' `load_lora_adapter` makes them of any known format.

    Raises `NotMergeable` for keys of other models and for alphas that diffusers did not multiply in.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    apart = "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters
    given = pipeline.lora_state_dict(dict(tensors), **({"return_alphas": True} if apart else {}))
    state, *alphas = given if isinstance(given, tuple) else (given,)
    if any(alphas):
        raise NotMergeable("its alphas are apart from its weights")
    if any("dora" in key for key in tensors):
        raise NotMergeable("it is a DoRA")
    for key in state:
        if not key.startswith(f"{prefix}."):
            raise NotMergeable(f"{key!r} is not of the {prefix}")
    bare = {key.removeprefix(f"{prefix}."): tensor for key, tensor in state.items()}
    if bare and "lora_A" not in next(iter(bare)):
        bare = convert_unet_state_dict_to_peft(bare)
    return bare


def paired(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The factors `A` and `B` by module. Raises `NotMergeable` for any key that is none, and for one without the other."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = FACTOR.fullmatch(key)
        if match is None:
            raise NotMergeable(f"{key!r} is no plain LoRA")
        pairs.setdefault(match["module"], {})[match["factor"]] = tensor
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise NotMergeable(f"{module!r} has one factor only")
    return pairs


def fitted(module: str, pair: Mapping[str, Tensor], shape: tuple[int, ...]) -> Part:
    """The factors as matrices whose product has as many numbers as the weight. Raises `NotMergeable` when it has not."""
    down, up = pair["A"], pair["B"]
    same_kernel = down.shape[1:] == shape[1:] and prod(up.shape[2:]) == 1
    if down.ndim != len(shape) or up.ndim != len(shape) or not same_kernel:
        raise NotMergeable(f"the shapes of {module!r} do not fit")
    if up.shape[:2] != (shape[0], down.shape[0]) or not (down.is_floating_point() and up.is_floating_point()):
        raise NotMergeable(f"the shapes of {module!r} do not fit")
    return Part(module, down.flatten(1).contiguous(), up.flatten(1).contiguous())


def uploaded(made: Factors, stream: torch.cuda.Stream) -> Factors:
    """The same factors in one buffer on the stream's device, copied from pinned memory on that stream.

    Any thread may call it. Users call `expect` on their own stream first.
    """
    import torch

    host = packed(made.parts, pinned=True)
    with torch.cuda.stream(stream):
        buffer = host.to(stream.device, non_blocking=True)
        arrived = stream.record_event()
    return Factors(unpacked(buffer, made.parts), buffer.nbytes, arrived=arrived, buffer=buffer)


def packed(parts: Sequence[Part], pinned: bool) -> Tensor:
    """All factors in one buffer of bytes in host memory, so that one copy takes them to the device."""
    import torch

    places = layout(parts)
    buffer = torch.empty(sum(size for _, _, size in places), dtype=torch.uint8, pin_memory=pinned)
    for tensor, start, _ in places:
        view(buffer, start, tensor).copy_(tensor)
    return buffer


def unpacked(buffer: Tensor, parts: Sequence[Part]) -> list[Part]:
    """The parts as views of a buffer that `packed` has laid out for the same parts, wherever it is now."""
    there = iter([view(buffer, start, tensor) for tensor, start, _ in layout(parts)])
    return [Part(part.module, next(there), next(there)) for part in parts]


def layout(parts: Sequence[Part]) -> list[tuple[Tensor, int, int]]:
    """Each factor with its start in a buffer and the bytes that it takes there."""
    places, start = [], 0
    for tensor in (tensor for part in parts for tensor in (part.down, part.up)):
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        places.append((tensor, start, size))
        start += size
    return places


def view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The part of a buffer of bytes that begins at `start`, with the type and shape of a contiguous tensor."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
