"""What a vision-language model is given: made for each task alone, on any thread, and put together on the device.

To a GPU pictures travel as bytes, in patches, and become the processor's own values there by a table of 256 levels a
channel that was taken from the processor itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    Tensors: TypeAlias = dict[str, torch.Tensor]

LEVELS = 256
CHANNELS = 3

PIXELS = "pixel_values"
GRID = "image_grid_thw"
WORDS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""One row a task, padded on the left."""

IN_LINE = (PIXELS, GRID)
"""One row a patch, or a picture: those of all tasks in a line."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Makes inputs by one processor. `apart` says that those of a batch are made task by task and joined; `values` are the
    numbers that the processor makes of bytes (channel, level), None where it is not known to make them one by one."""

    processor: Any
    apart: bool = False
    values: torch.Tensor | None = None

    def own(self, text: str, pictures: Sequence[Image], dtype: torch.dtype) -> Tensors:
        """The inputs of one task, in host memory; pictures as bytes, or as numbers of that type."""
        import torch

        raw = {} if self.values is None or not pictures else {"do_rescale": False, "do_normalize": False}
        made = dict(self._made([text], [list(pictures)] if pictures else None, **raw))
        if PIXELS in made:
            made[PIXELS] = made[PIXELS].to(torch.uint8 if raw else dtype)
        return made

    def join(self, parts: Sequence[Tensors], device: torch.device, dtype: torch.dtype) -> Tensors:
        """The inputs of a batch on the device, equal to those of `whole`. Copies from pinned memory do not wait."""
        import torch

        whole: Tensors = {}
        for name in parts[0]:
            if name in IN_LINE:
                there = [part[name].to(device, non_blocking=True) for part in parts]
                if name == PIXELS and self.values is not None:
                    values = self.values.to(device, dtype)
                    there = [valued(patches, values) for patches in there]
                whole[name] = torch.cat(there)
            else:
                whole[name] = self._padded(name, [part[name] for part in parts]).to(device)
        return whole

    def whole(
        self, texts: Sequence[str], pictures: Sequence[Sequence[Image]], device: torch.device, dtype: torch.dtype
    ) -> Any:
        """The inputs of a batch by one call of the processor."""
        shown = [list(own) for own in pictures] if pictures[0] else None
        return self._made(list(texts), shown, padding=True, padding_side="left").to(device, dtype=dtype)

    def _made(self, texts: list[str], pictures: list[list[Image]] | None, **how: Any) -> Any:
        starts = self.processor.tokenizer.bos_token
        return self.processor(
            text=texts,
            images=pictures,
            return_tensors="pt",
            # A template may have written the token for the start already.
            add_special_tokens=not (starts and texts[0].startswith(starts)),
            **how,
        )

    def _padded(self, name: str, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        longest = max(row.shape[1] for row in rows)
        fill = self.processor.tokenizer.pad_token_id if name == "input_ids" else 0
        return torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=fill) for row in rows])


def inputs_by(processor: Any, *, as_bytes: bool) -> Inputs:
    """How inputs are made by this processor: apart where it has patches and grids as Qwen's, and nothing else.

    `as_bytes` has pictures turned into numbers on the device, where that is known to give the same.
    """
    import torch

    pictures = processor.image_processor
    if not all(isinstance(getattr(pictures, name, None), int) for name in ("patch_size", "merge_size")):
        return Inputs(processor)
    side = 4 * pictures.patch_size * pictures.merge_size
    mark = getattr(processor, "image_token", None)
    if not isinstance(mark, str):
        return Inputs(processor)
    one = Inputs(processor, apart=True).own(mark, [ramp(side)], torch.float32)
    two = Inputs(processor).whole([mark] * 2, [[ramp(side)]] * 2, torch.device("cpu"), torch.float32)
    known = {PIXELS, GRID, "input_ids", "attention_mask"} <= one.keys() <= {*WORDS, *IN_LINE}
    if not known or one.keys() != two.keys() or len(two[PIXELS]) != 2 * len(one[PIXELS]):
        return Inputs(processor)
    return Inputs(processor, apart=True, values=values_of(pictures, side) if as_bytes else None)


def values_of(pictures: Any, side: int) -> torch.Tensor | None:
    """What an image processor makes of each level of each channel, in the order (channel, level); None when that hangs on
    more than the level."""
    import torch

    def patches(**how: Any) -> torch.Tensor:
        made: torch.Tensor = pictures(images=[ramp(side)], do_resize=False, return_tensors="pt", **how)[PIXELS]
        return made.view(len(made), CHANNELS, -1)

    try:
        levels, found = patches(do_rescale=False, do_normalize=False), patches()
    except Exception:  # another library's code: whatever it has against this picture, the numbers come from itself then
        return None
    places = levels.long()
    if levels.shape != found.shape or not torch.equal(places.to(levels.dtype), levels):
        return None
    values = torch.full((CHANNELS, LEVELS), float("nan"))
    for channel in range(CHANNELS):
        values[channel, places[:, channel].flatten()] = found[:, channel].flatten().float()
    again = valued(places.flatten(1).to(torch.uint8), values)
    return values if torch.equal(again, found.flatten(1).float()) else None


def valued(patches: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Patches of bytes (patch, channel and place) as the numbers of the table (channel, level)."""
    import torch

    rows = torch.arange(CHANNELS, device=patches.device, dtype=torch.int32).view(1, CHANNELS, 1) * LEVELS
    places = patches.view(len(patches), CHANNELS, -1).int() + rows
    return values.flatten().index_select(0, places.flatten()).view(patches.shape)


def pinned(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors in page-locked memory, from which a GPU copies while the host goes on."""
    return {name: tensor.pin_memory() for name, tensor in tensors.items()}


def ramp(side: int) -> Image:
    """A picture with every level of every channel."""
    import numpy as np
    from PIL import Image

    count = np.arange(side * side * CHANNELS)
    return Image.fromarray((count * 7 % LEVELS).astype(np.uint8).reshape(side, side, CHANNELS))
