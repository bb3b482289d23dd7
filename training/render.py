"""Scenes to pixels, a batch at a time, on whatever device the sprites lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edits import BRIGHTER, DARKER, Stage
from scenes import Scene

LOOKS = ("3d", "flat", "pixel-art", "line-icon")
MAX_THINGS = 3
CANVAS = 128 / 112
"""A sprite's canvas over the sprite's longer side."""
PIXEL = 4
"""Side in pixels of one dot of pixel art; the autoencoder's down-sampling too, so dots stay crisp."""
LEVELS = 5
"""Values a channel of pixel art can take."""
INK = (24, 24, 30)
CHALK = (252, 252, 250)
LUMA = (0.299, 0.587, 0.114)


class Atlas:
    """All sprites and photos on one device. `sprites`: (looks, nouns, 4, 128, 128) premultiplied RGBA in 0 to 1."""

    def __init__(self, sprites: Path, photos: Path | None = None, device: str | torch.device = "cpu") -> None:
        kind = torch.float32
        with np.load(sprites) as data:
            self.nouns = [str(noun) for noun in data["nouns"]]
            coloured = torch.from_numpy(np.stack([data["three_d"], data["flat"]])).permute(0, 1, 4, 2, 3)
            icon = torch.from_numpy(data["icon"])
        self.sprites = coloured.to(device, kind) / 255
        self.icons = icon.to(device, kind) / 255
        self.photos = torch.zeros(1, 3, 256, 256, device=device, dtype=kind)
        self.photo_names: list[str] = []
        if photos is not None:
            with np.load(photos) as data:
                self.photo_names = [str(name) for name in data["names"]]
                self.photos = torch.from_numpy(data["photos"]).permute(0, 3, 1, 2).to(device, kind) / 255
        self.device = torch.device(device)

    def scenes(self, numbers: dict[str, Tensor], width: int, height: int, look: str = "3d") -> Tensor:
        """Pictures (batch, 3, height, width) in 0 to 1 of scenes as `numbers_of` packs them."""
        scale = 1 if look == "pixel-art" else 2
        if look == "pixel-art":  # a run of colours would end in stripes
            middle = (numbers["top"] + numbers["bottom"]) / 2
            numbers = numbers | {"top": middle, "bottom": middle}
        picture = self.ground(numbers, width * scale, height * scale)
        for slot in range(MAX_THINGS):
            rows = self.rows(numbers["there"][:, slot])
            if len(rows):
                layer = self.thing(numbers, slot, rows, width * scale, height * scale, look)
                over = layer[:, :3] + picture[rows] * (1 - layer[:, 3:])
                picture = over if len(rows) == len(picture) else picture.index_copy(0, rows, over)
        if scale > 1:
            picture = F.avg_pool2d(picture, scale)
        if look == "pixel-art":
            picture = pixelate(picture)
        picture = torch.where(numbers["mirrored"].bool()[:, None, None, None], picture.flip(3), picture)
        return toned(picture.float(), numbers["tone"])

    def ground(self, numbers: dict[str, Tensor], width: int, height: int) -> Tensor:
        """The background: a vertical run of colours, or a square of a photo."""
        kind = self.sprites.dtype
        ramp = torch.linspace(0, 1, height, device=self.device, dtype=kind)[None, None, :, None]
        top, bottom = (numbers[name].to(kind)[:, :, None, None] for name in ("top", "bottom"))
        colours = (top + (bottom - top) * ramp).expand(-1, 3, height, width)
        if not bool(numbers["on_photo"].any()):
            return colours
        photo = numbers["photo"]
        x, y, side, flip = numbers["crop"].to(kind).unbind(1)
        rows, columns = axes(width, height, self.device, kind)
        # axes are in units of the frame's shorter side; the photo's own frame runs from -1 to 1
        u = (columns[None, None, :] * side[:, None, None] * (1 - 2 * flip)[:, None, None] + x[:, None, None]) * 2
        v = (rows[None, :, None] * side[:, None, None] + y[:, None, None]) * 2
        grid = torch.stack(torch.broadcast_tensors(u, v), -1)
        pixels = F.grid_sample(self.photos[photo.clamp(min=0)], grid, padding_mode="reflection", align_corners=False)
        return torch.where((photo >= 0)[:, None, None, None], pixels, colours)

    def rows(self, which: Tensor) -> Tensor:
        """Where a mask in host memory is true, on the device; nothing waits for the device."""
        return which.nonzero()[:, 0].to(self.device, non_blocking=True)

    def thing(self, numbers: dict[str, Tensor], slot: int, rows: Tensor, width: int, height: int, look: str) -> Tensor:
        """One thing of each of these scenes as premultiplied RGBA (rows, 4, height, width)."""
        kind = self.sprites.dtype
        picked = numbers["noun"][rows, slot]
        x, y, size, angle = (numbers[name][rows, slot].to(kind)[:, None, None] for name in ("x", "y", "size", "angle"))
        down, across = axes(width, height, self.device, kind)
        across, down = across[None, None, :] - x, down[None, :, None] - y
        turn = angle * (np.pi / 180)
        half = size.clamp(min=0.01) * CANVAS / 2
        u = (across * turn.cos() + down * turn.sin()) / half
        v = (down * turn.cos() - across * turn.sin()) / half
        grid = torch.stack((u, v), -1)
        if look == "line-icon":
            ink = F.grid_sample(self.icons[picked][:, None], grid, align_corners=False)
            dark = luma(numbers["top"][rows]) < 0.45
            colour = torch.where(dark[:, None], rgb_of(CHALK, self.device), rgb_of(INK, self.device)).to(kind)
            return torch.cat([ink * colour[:, :, None, None], ink], 1)
        layer = F.grid_sample(self.sprites[1 if look == "flat" else 0, picked], grid, align_corners=False)
        tinted = self.rows(numbers["tinted"][numbers["there"][:, slot], slot])
        if len(tinted):
            painted = tint(layer[tinted], numbers["tint"][rows[tinted], slot].to(kind))
            layer = layer.index_copy(0, tinted, painted)
        return hard(layer) if look == "pixel-art" else layer


def numbers_of(stages: Sequence[Scene | Stage]) -> dict[str, np.ndarray[Any, Any]]:
    """Scenes as arrays: `noun` (batch, 3) with -1 for none, `x y size angle` alike, `tint` (batch, 3, 3) with -1 for
    none, `top bottom` (batch, 3), `photo` (batch), `crop` (batch, 4), `mirrored` and `tone` (batch). Booleans say what
    there is to draw: `there` and `tinted` (batch, 3), `on_photo` (batch)."""
    count = len(stages)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "noun": np.full((count, MAX_THINGS), -1, np.int64),
        "tint": np.full((count, MAX_THINGS, 3), -1.0, np.float32),
        "top": np.array([stage.top for stage in stages], np.float32),
        "bottom": np.array([stage.bottom for stage in stages], np.float32),
        "photo": np.full(count, -1, np.int64),
        "crop": np.zeros((count, 4), np.float32),
        "mirrored": np.zeros(count, np.int64),
        "tone": np.zeros(count, np.int64),
    }
    arrays |= {name: np.zeros((count, MAX_THINGS), np.float32) for name in ("x", "y", "size", "angle")}
    for row, stage in enumerate(stages):
        for column, thing in enumerate(stage.things):
            arrays["noun"][row, column] = thing.noun
            for name in ("x", "y", "size", "angle"):
                arrays[name][row, column] = getattr(thing, name)
            if thing.tint is not None:
                arrays["tint"][row, column] = thing.tint
        if isinstance(stage, Stage):
            if stage.photo is not None:
                arrays["photo"][row] = stage.photo.number
                arrays["crop"][row] = (stage.photo.x, stage.photo.y, stage.photo.side, stage.photo.flip)
            arrays["mirrored"][row] = stage.mirrored
            arrays["tone"][row] = ("", "grayscale", "darker", "brighter").index(stage.tone)
    there, tinted = arrays["noun"] >= 0, arrays["tint"][:, :, 0] >= 0
    return arrays | {"there": there, "tinted": there & tinted, "on_photo": arrays["photo"] >= 0}


def on(device: torch.device, arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """The arrays as tensors on a device; booleans, by which the host decides what to launch, stay in its memory."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {
        name: tensor if tensor.dtype == torch.bool else tensor.to(device, non_blocking=True)
        for name, tensor in tensors.items()
    }


def axes(width: int, height: int, device: torch.device, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Centres of the pixels' rows and columns, in units of the shorter side, from the frame's centre."""
    short = min(width, height)
    rows = (torch.arange(height, device=device) + 0.5 - height / 2) / short
    columns = (torch.arange(width, device=device) + 0.5 - width / 2) / short
    return rows.to(kind), columns.to(kind)


def tint(layer: Tensor, colours: Tensor) -> Tensor:
    """Premultiplied RGBA in other colours (batch, 3; negative for none): light and shade stay, the hue goes."""
    alpha = layer[:, 3:]
    light = luma(layer[:, :3]).unsqueeze(1) / alpha.clamp(min=1e-3)
    colour = colours.clamp(min=0)[:, :, None, None]
    dark = colour * (light / 0.6).clamp(max=1)
    bright = colour + (1 - colour) * ((light - 0.6) / 0.4).clamp(min=0) * 0.75
    painted = torch.where(light < 0.6, dark, bright) * alpha
    asked = (colours[:, :1] >= 0)[:, :, None, None]
    return torch.where(asked, torch.cat([painted, alpha], 1), layer)


def hard(layer: Tensor) -> Tensor:
    """Premultiplied RGBA on a coarse grid of dots, each wholly there or not at all."""
    small = F.avg_pool2d(layer, PIXEL)
    alpha = small[:, 3:]
    there = (alpha > 0.5).to(layer.dtype)
    full = torch.cat([small[:, :3] / alpha.clamp(min=1e-3), torch.ones_like(alpha)], 1) * there
    return F.interpolate(full, scale_factor=PIXEL, mode="nearest")


def pixelate(picture: Tensor) -> Tensor:
    """Dots of `PIXEL` pixels in few colours, a little stronger than the real ones."""
    small = F.avg_pool2d(picture, PIXEL)
    strong = ((small - 0.5) * 1.12 + 0.5).clamp(0, 1)
    coarse = (strong * (LEVELS - 1)).round() / (LEVELS - 1)
    return F.interpolate(coarse, scale_factor=PIXEL, mode="nearest")


def toned(picture: Tensor, tone: Tensor) -> Tensor:
    """Pictures as they are (0), grey (1), darker (2) or brighter (3)."""
    tone = tone[:, None, None, None]
    grey = luma(picture).unsqueeze(1).expand_as(picture)
    picture = torch.where(tone == 1, grey, picture)
    picture = torch.where(tone == 2, picture * DARKER, picture)
    return torch.where(tone == 3, 1 - (1 - picture) * BRIGHTER, picture).clamp(0, 1)


def luma(picture: Tensor) -> Tensor:
    """Brightness of RGB in dimension 1 (ITU-R BT.601)."""
    weights = torch.tensor(LUMA, device=picture.device, dtype=picture.dtype)
    return (picture * weights.view(1, 3, *[1] * (picture.ndim - 2))).sum(1)


def rgb_of(colour: tuple[int, int, int], device: torch.device) -> Tensor:
    return torch.tensor(colour, device=device).float()[None] / 255
