"""The out-of-memory ladder: what a worker gives up, step by step, when a batch of one finds no room on its device.

    level 1   the VAE decodes in tiles
    level 2   the text encoder waits in main memory while the device does not encode
    level 3   text encoder, transformer and VAE take turns on the device

A step is taken after a stage ran out of memory, and only if it helps that stage: an encoder that finds no room gains
nothing from tiles. Steps last as long as the model stays loaded. Up to level 1 nothing waits for the device; from level 2
on each stage begins with moves that do.

Levels 2 and 3 change no pixel. Tiles do: the VAE normalises and attends within a tile, not over the whole picture, and
neighbours are blended over a quarter of their side, so tone and texture shift a little from tile to tile. With the
embedded model at 768x768 and tiles of 512 pixels the mean difference is 0.5 of 255 levels and the largest 7. The size of
the tiles depends on the picture's alone, so a picture that is made in tiles is the same every time; only those at least as
large as one that found no room are. `Ladder.marks` are the words for its metadata and for the report.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from imagemill import host_memory
from imagemill.families import Size
from imagemill.records import LABEL_VARIABLE
from imagemill.runners.tiles import tile_side, tiled, tiling

if TYPE_CHECKING:
    import torch

Stage: TypeAlias = Literal["encode", "denoise", "decode"]
Step: TypeAlias = Literal["tiles", "text", "turns"]
Role: TypeAlias = Literal["text", "denoiser", "vae"]
Move: TypeAlias = Callable[[Any, str], None]
"""Brings a module to the device of that name, wherever its tensors are."""

STEPS: tuple[Step, ...] = ("tiles", "text", "turns")
"""In the order of the levels, from 1."""

HELPS: Mapping[Stage, tuple[Step, ...]] = {"encode": ("turns",), "denoise": ("text", "turns"), "decode": STEPS}

HELPS_WHOLE: tuple[Step, ...] = ("tiles", "turns")
"""For a pipeline that encodes and decodes within its call: its text encoder cannot wait for the call to end."""

NEEDED: Mapping[Stage, frozenset[Role]] = {
    "encode": frozenset({"text", "vae"}),  # the VAE encodes the pictures to edit
    "denoise": frozenset({"denoiser"}),
    "decode": frozenset({"vae"}),
}

WORDS: Mapping[Step, str] = {
    "tiles": "the VAE now decodes in tiles",
    "text": "the text encoder now waits in main memory",
    "turns": "text encoder, transformer and VAE now take turns on the device",
}


class Ladder:
    """What one loaded pipeline has given up for want of memory. Used by one thread.

    `label` is the device for people; `staged` is False for a pipeline that does everything within `denoising`.
    """

    def __init__(
        self, pipe: Any, device: str, label: str = "", *, staged: bool = True, move: Move | None = None
    ) -> None:
        self.pipe = pipe
        self.device = device
        self.label = label or os.environ.get(LABEL_VARIABLE) or device
        self.staged = staged
        self._move = move or Mover(device)
        self._taken: set[Step] = set()
        self._tiled_from: int | None = None
        self._stage: Stage = "denoise"

    @property
    def level(self) -> int:
        """The deepest level that was reached: 0 for none, 3 for the last."""
        return max((STEPS.index(step) + 1 for step in self._taken), default=0)

    def marks(self, size: Size) -> tuple[str, ...]:
        """What is to be said of a picture of that size because its pixels are not those of level 0."""
        return (f"decoded in tiles of {tile_side(size)} pixels",) if self._tiles(size) else ()

    def encoding(self, size: Size) -> AbstractContextManager[None]:
        """Wraps a family's `encode` of pictures of that size."""
        return self._within("encode", size)

    def denoising(self, size: Size) -> AbstractContextManager[None]:
        """Wraps a family's `denoise`, and the change of adapters, which wants the transformer on the device."""
        return self._within("denoise", size)

    def decoding(self, size: Size) -> AbstractContextManager[None]:
        """Wraps a family's `decode`."""
        return self._within("decode", size)

    def step_down(self, error: BaseException, size: Size) -> str | None:
        """Take the next step that helps the stage which ran out of memory, and free what the failed batch held.

        The result is a line for the log and the report; None when nothing is left to give up. The frames of `error` are
        emptied, since their variables hold the batch's tensors.
        """
        release(error, self.device)
        step = next((step for step in self._helpful() if self._possible(step, size)), None)
        if step is None:
            return None
        self._taken.add(step)
        if step == "tiles":
            self._tiled_from = size[0] * size[1]
        elif step == "turns" and not self.staged:
            self.pipe.enable_model_cpu_offload(device=self.device)
        return f"{self.label}: out of memory at {size[0]}x{size[1]}; {WORDS[step]}"

    def _helpful(self) -> tuple[Step, ...]:
        return HELPS[self._stage] if self.staged else HELPS_WHOLE

    def _possible(self, step: Step, size: Size) -> bool:
        if step == "tiles":
            has_tiles = tiling(getattr(self.pipe, "vae", None)) is not None
            return has_tiles and max(size) > tile_side(size) and not self._tiles(size)
        if step in self._taken or not self.device.startswith("cuda"):
            return False
        if not self.staged:
            return bool(self.pipe.model_cpu_offload_seq) and fit_in_main_memory(self._parts())
        leaving = [
            part for part in self._parts() if not is_fixed(part) and (step == "turns" or role_of(part) == "text")
        ]
        return bool(leaving) and fit_in_main_memory(leaving)

    def _tiles(self, size: Size) -> bool:
        return self._tiled_from is not None and size[0] * size[1] >= self._tiled_from and max(size) > tile_side(size)

    def _parts(self) -> list[Any]:
        from torch.nn import Module

        return [part for part in self.pipe.components.values() if isinstance(part, Module)]

    @contextmanager
    def _within(self, stage: Stage, size: Size) -> Iterator[None]:
        self._stage = stage
        if self.staged:
            self._settle(stage)
        decodes = stage == "decode" or (stage == "denoise" and not self.staged)
        with tiled(self.pipe.vae, tile_side(size)) if decodes and self._tiles(size) else nullcontext():
            yield

    def _settle(self, stage: Stage) -> None:
        """Bring the parts of a stage to the device, after those that must leave it."""
        if not self._taken & {"text", "turns"}:
            return
        parts = [part for part in self._parts() if not is_fixed(part)]
        stay = [self._stays(role_of(part), stage) for part in parts]
        for part in (part for part, stays in zip(parts, stay, strict=True) if not stays):
            self._move(part, "cpu")
        for part in (part for part, stays in zip(parts, stay, strict=True) if stays):
            self._move(part, self.device)

    def _stays(self, role: Role, stage: Stage) -> bool:
        return role in NEEDED[stage] or (role != "text" and "turns" not in self._taken)


def role_of(part: Any) -> Role:
    """What a component of a pipeline does; whatever comes from transformers reads texts or pictures."""
    if type(part).__module__.startswith("transformers."):
        return "text"
    return "vae" if "autoencoder" in type(part).__name__.lower() else "denoiser"


def is_fixed(part: Any) -> bool:
    """Whether the module never leaves the device: torch cannot move quantised weights that compiled code refers to."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return any(is_traceable_wrapper_subclass(parameter) for parameter in part.parameters())


def fit_in_main_memory(parts: Iterable[Any]) -> bool:
    """Whether main memory takes what of the modules is on the device."""
    return sum(device_bytes(part) for part in parts) <= host_memory.free()


def device_bytes(part: Any) -> int:
    """The bytes of a module's tensors that are not in main memory."""
    return sum(tensor.nbytes for tensor in tensors(part) if tensor.device.type != "cpu")


def tensors(part: Any) -> Iterator[torch.Tensor]:
    """The parameters and buffers of a module, each once."""
    yield from part.parameters()
    yield from part.buffers()


def release(error: BaseException, device: str) -> None:
    """Give the device's memory back that the batch which ended with this error held."""
    import torch

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        traceback.clear_frames(cause.__traceback__)
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    finish(device)
    gc.unfreeze()  # while a model loads the collector spares what was there before
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def finish(device: str) -> None:
    """Wait for what a GPU was told to do. Without its name torch would wait for, and first open, the machine's first."""
    import torch

    if device.startswith("cuda") and torch.cuda.is_initialized():
        torch.cuda.synchronize(device)


# --- moves ------------------------------------------------------------------------------------------------------------


class Mover:
    """Moves modules between main memory and one device, and remembers which of them have page-locked memory to come back
    to: torch keeps it for them."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._pinned: dict[int, bool] = {}

    def __call__(self, part: Any, device: str) -> None:
        """Bring all tensors of the module to the device; those that are there stay as they are.

        Everything the device was told to do ends first, and each copy ends before the next, whatever the streams:
        nothing may still read what leaves. The room is given back, so that other streams can use it.
        """
        import torch

        if all(lies_on(tensor, device) for tensor in tensors(part)):
            return
        finish(self._device)
        pinned = device == "cpu" and self._page_locked(part)
        # A tensor made in inference mode could not be put into a parameter.
        with torch.inference_mode(False), torch.no_grad():
            part._apply(lambda tensor: moved(tensor, device, pinned))
        if device == "cpu" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _page_locked(self, part: Any) -> bool:
        """Whether the module waits in page-locked memory: torch rounds sizes up to powers of two, so it may take twice."""
        import torch

        if id(part) not in self._pinned:
            self._pinned[id(part)] = torch.cuda.is_initialized() and 2 * device_bytes(part) <= host_memory.free()
        return self._pinned[id(part)]


def moved(tensor: torch.Tensor, device: str, pinned: bool = False) -> torch.Tensor:
    """The tensor on the device; in page-locked memory, which a GPU copies to and from several times faster, if so asked."""
    import torch

    if lies_on(tensor, device) or not pinned:
        return tensor.to(device)
    return torch.empty_like(tensor, device=device, pin_memory=True).copy_(tensor)


def lies_on(tensor: torch.Tensor, device: str) -> bool:
    """Whether the tensor is on the device; `cuda` means any."""
    return tensor.device.type == device if ":" not in device else str(tensor.device) == device
