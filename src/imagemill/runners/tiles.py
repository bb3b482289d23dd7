"""Pictures decoded in overlapping tiles: a fraction of the memory, and pixels that differ a little (`ladder.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from imagemill.families import Size

TILE = 512
SMALL_TILE = 256
"""Pixels of a tile's side; the small one is for pictures that are no larger than the other."""

STRIDE = 0.75
"""From one tile to the next, in sides of a tile: what diffusers' VAEs take."""


def tile_side(size: Size) -> int:
    """Pixels of the side of the tiles that a picture of that size is decoded in, if it is larger than one."""
    return TILE if max(size) > TILE else SMALL_TILE


def tiling(vae: Any, side: int = TILE) -> dict[str, int] | None:
    """diffusers' attributes for tiles of that side; None for a VAE that knows no tiles."""
    if not hasattr(vae, "use_tiling"):
        return None
    levels = getattr(vae.config, "block_out_channels", None)
    if hasattr(vae, "tile_latent_min_size"):  # each level but the last halves the picture
        latent = side // 2 ** (len(levels) - 1) if levels else 0
        return {"tile_sample_min_size": side, "tile_latent_min_size": latent} if latent else None
    names = [f"tile_sample_{what}_{axis}" for what in ("min", "stride") for axis in ("height", "width")]
    if not all(hasattr(vae, name) for name in names) or hasattr(vae, "tile_latent_min_height"):
        return None
    return {name: int(side * STRIDE) if "stride" in name else side for name in names}


@contextmanager
def tiled(vae: Any, side: int) -> Iterator[None]:
    """Inside the block the VAE works in tiles, one picture at a time, and what was compiled of it runs as it was written:
    the shapes at the edges are many, and each would be compiled anew."""
    import torch

    wanted = {**(tiling(vae, side) or {}), "use_tiling": True, "use_slicing": True}
    before = {name: getattr(vae, name) for name in wanted if hasattr(vae, name)}
    try:
        for name in before:
            setattr(vae, name, wanted[name])
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
