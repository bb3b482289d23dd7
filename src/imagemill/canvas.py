"""The size of a picture that is made from another: its aspect, at a number of pixels. Pure."""

from __future__ import annotations

import math

MAX_ASPECT = 8
"""The most that one side of a picture may be of the other where its size follows that of a picture to edit."""

EDIT_PIXELS = 1024 * 1024
"""Pixels of an edited picture whose model states no size of its own, at most; and of a picture that a transformer sees
beside the one it makes."""


def edited_size(
    width: int | None,
    height: int | None,
    source: tuple[int, int] | None,
    own: tuple[int | None, int | None],
    multiple: int,
) -> tuple[int, int]:
    """Width and height of an edit: what is asked for, else by the aspect of the source.

    One side alone that is asked for gives the other; with neither, the number of pixels is that of the model's `own`
    size, or the source's where the model has none. `source` is None for a picture whose header does not read.
    """
    pixels = own[0] * own[1] if own[0] and own[1] else EDIT_PIXELS
    wide, high = source or (own[0] or 1, own[1] or 1)
    if source and not (own[0] and own[1]):
        pixels = min(wide * high, EDIT_PIXELS)
    if width is None and height is None:
        return output_size(wide, high, pixels, multiple)
    aspect = _aspect(wide, high)
    return (
        to_multiple((height or 0) * aspect, multiple) if width is None else width,
        to_multiple((width or 0) / aspect, multiple) if height is None else height,
    )


def output_size(width: int, height: int, pixels: int, multiple: int) -> tuple[int, int]:
    """The size with the aspect of `width` and `height` (at most 8 to 1) and about that number of pixels.

    Both sides are multiples of `multiple`, each rounded to the nearest.
    """
    aspect = _aspect(width, height)
    return to_multiple(math.sqrt(pixels * aspect), multiple), to_multiple(math.sqrt(pixels / aspect), multiple)


def _aspect(width: int, height: int) -> float:
    return min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)


def to_multiple(side: float, multiple: int) -> int:
    """The multiple nearest to the side, at least one."""
    return max(multiple, math.floor(side / multiple + 0.5) * multiple)
