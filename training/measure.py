"""What pictures show, measured: background colour, noun, number, place, look.

All functions take pictures as uint8 arrays (height, width, 3). The tests use them on a few prompts, `measure.py` itself
on many: it prints the tables of the model cards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from classifier import Classifier
from nouns import article, load_nouns, plural
from render import LUMA, PIXEL, Atlas, numbers_of, on
from scenes import COLOURS, PLACES, Scene, Thing

Picture = npt.NDArray[np.uint8]

RIM = 5
APART = 42.0
"""Distance in RGB (0 to 441) from the background at which a pixel belongs to a thing."""
PART = 0.2
"""A part counts when it is at least so large beside the largest."""
OFF_CENTRE = 0.08


def background(picture: Picture) -> npt.NDArray[np.float64]:
    """The colour of the picture's rim: the median of each channel."""
    rim = np.concatenate([
        picture[:RIM].reshape(-1, 3), picture[-RIM:].reshape(-1, 3),
        picture[:, :RIM].reshape(-1, 3), picture[:, -RIM:].reshape(-1, 3),
    ])  # fmt: skip
    middle: npt.NDArray[np.float64] = np.median(rim, axis=0)
    return middle


def background_colour(picture: Picture) -> str:
    """The nearest of the twelve colours, in RGB."""
    seen = background(picture)
    return min(COLOURS, key=lambda name: float(np.linalg.norm(np.array(COLOURS[name]) - seen)))


def nouns_seen(classifier: Classifier, pictures: list[Picture]) -> list[int]:
    """The number of the noun that the classifier sees in each picture."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return [int(number) for number in classifier(batch).argmax(1)]


def things(picture: Picture) -> npt.NDArray[np.bool_]:
    """Where a picture differs from its background, small gaps closed."""
    ground = ground_of(picture)
    mask = np.linalg.norm(picture.astype(np.float64) - ground, axis=2) > APART
    return shrunk(grown(mask, 2), 2)


def ground_of(picture: Picture) -> npt.NDArray[np.float64]:
    """The background of every row: its rim's median, as backgrounds run from a colour at the top to one below."""
    rows = np.concatenate([picture[:, :RIM], picture[:, -RIM:]], axis=1)
    left = np.median(rows.astype(np.float64), axis=1)
    smooth = np.stack([np.convolve(np.pad(left[:, c], 8, mode="edge"), np.ones(17) / 17, "valid") for c in range(3)], 1)
    whole = background(picture)
    near = np.linalg.norm(smooth - whole, axis=1, keepdims=True) < APART
    return np.where(near, smooth, whole)[:, None, :]


def parts(picture: Picture) -> int:
    """The number of connected things."""
    sizes = part_sizes(things(picture))
    return sum(size >= PART * max(sizes) for size in sizes) if sizes else 0


def part_sizes(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Pixels of each connected part (neighbours share a side or a corner)."""
    left = mask.copy()
    sizes = []
    while left.any():
        seed = np.zeros_like(left)
        seed[tuple(np.argwhere(left)[0])] = True
        while True:
            wider = grown(seed, 1) & left
            if (wider == seed).all():
                break
            seed = wider
        sizes.append(int(seed.sum()))
        left &= ~seed
    return sizes


def centre(picture: Picture) -> tuple[float, float]:
    """Centre of mass of the things, from the picture's centre, in units of the shorter side (x right, y down)."""
    mask = things(picture)
    if not mask.any():
        return 0.0, 0.0
    rows, columns = np.nonzero(mask)
    short = min(mask.shape)
    return (columns.mean() + 0.5 - mask.shape[1] / 2) / short, (rows.mean() + 0.5 - mask.shape[0] / 2) / short


def stands_at(picture: Picture, place: str) -> bool:
    """Whether the centre of mass lies to the named sides, and near the middle on the others."""
    return all(
        value * side > OFF_CENTRE if side else abs(value) < 0.16
        for value, side in zip(centre(picture), PLACES[place], strict=True)
    )


def grown(mask: npt.NDArray[np.bool_], reach: int) -> npt.NDArray[np.bool_]:
    """Every pixel within `reach` (in rows and columns) of the mask."""
    padded = np.pad(mask, reach)
    height, width = mask.shape
    out = np.zeros_like(mask)
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            out |= padded[down : down + height, right : right + width]
    return out


def shrunk(mask: npt.NDArray[np.bool_], reach: int) -> npt.NDArray[np.bool_]:
    """The mask without its outer `reach` pixels: the opposite of `grown`."""
    return ~grown(~mask, reach)


def psnr(picture: Picture, target: Picture) -> float:
    """Peak signal-to-noise ratio in decibels; infinite for equal pictures."""
    error = np.square(picture.astype(np.float64) - target).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def to_arrays(pictures: list[Any]) -> list[Picture]:
    """PIL pictures as arrays."""
    return [np.asarray(picture.convert("RGB")) for picture in pictures]


# --- what is asked ----------------------------------------------------------------------------------------------------

WHOLE = (
    "apple", "cat", "car", "banana", "lemon", "house", "rocket", "tree", "dog", "fish", "owl", "bus", "chair", "key",
    "bell", "rabbit", "carrot", "mushroom", "pear", "robot", "guitar", "frog", "balloon", "cactus",
)  # fmt: skip
"""Nouns whose pictures are one connected part, for counting."""


def background_prompts(nouns: list[str]) -> list[tuple[str, str]]:
    """`a cat on a blue background` for every colour and noun, with the colour."""
    return [(f"{a(noun)} on {a(colour)} background", colour) for noun in nouns for colour in COLOURS]


def noun_prompts(nouns: list[str]) -> list[tuple[str, str]]:
    """`a cat`, with the noun."""
    return [(a(noun), noun) for noun in nouns]


def count_prompts(nouns: list[str]) -> list[tuple[str, int]]:
    """`two cats on a white background`, with the number; colours take turns."""
    grounds = ("white", "blue", "yellow", "green", "pink", "gray")
    words = {2: "two", 3: "three"}
    return [
        (f"{words[count]} {plural(noun)} on {a(grounds[number % len(grounds)])} background", count)
        for number, noun in enumerate(nouns)
        for count in words
    ]


def place_prompts(nouns: list[str]) -> list[tuple[str, str]]:
    """`a cat on a white background, top left`, with the place."""
    grounds = ("white", "turquoise", "purple", "yellow")
    return [
        (f"{a(noun)} on {a(grounds[number % len(grounds)])} background, {place}", place)
        for number, noun in enumerate(nouns)
        for place in PLACES
    ]


def add_instructions(nouns: list[str], folder: Path) -> list[tuple[dict[str, str], str]]:
    """Tasks such as `add a cat in the middle` to a plain picture, with the noun; colours take turns, their pictures are
    written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [folder / f"{colour}.png" for colour in COLOURS]
    for path, rgb in zip(plain, COLOURS.values(), strict=True):
        Image.new("RGB", (128, 128), rgb).save(path)
    return [
        ({"prompt": f"add {a(noun)} in the middle", "image": str(plain[number % len(plain)])}, noun)
        for number, noun in enumerate(nouns)
    ]


def a(words: str) -> str:
    """The words with `a` or `an`, or with none where the noun takes none."""
    noun = next((noun for noun in load_nouns() if noun.name == words), None)
    before = noun.article if noun else article(words)
    return f"{before} {words}".strip()


# --- looks ------------------------------------------------------------------------------------------------------------


def nearer(picture: Picture, noun: str, atlas: Atlas, look: str) -> bool:
    """Whether the picture is nearer to the noun's sprite in that look than to the one in 3D by what marks the look: for
    pixel art how much of its edges stands on the borders of the dots, for line icons its brightness and saturation."""
    marks = dots if look == "pixel-art" else inks
    drawn = {name: marks(sprite) for name, sprite in redrawn(picture, noun, atlas, look).items()}
    apart = {name: float(np.abs(value - marks(picture)).sum()) for name, value in drawn.items()}
    return bool(apart) and apart[look] < apart["3d"]


def nearer_by_pixels(picture: Picture, noun: str, atlas: Atlas, look: str) -> bool:
    """The same by the mean absolute difference of the pixels, which asks for the sprite's own shape, too."""
    drawn = redrawn(picture, noun, atlas, look)
    apart = {name: float(np.abs(sprite - picture.astype(np.float64)).mean()) for name, sprite in drawn.items()}
    return bool(apart) and apart[look] < apart["3d"]


def dots(picture: Picture) -> npt.NDArray[np.float64]:
    """The share of the squared steps between neighbours that stands on the borders of dots: down, across."""
    colours = picture.astype(np.float64)
    near = grown(things(picture), 3)
    down = np.square(np.diff(colours, axis=0)).sum(2) * near[1:]
    across = np.square(np.diff(colours, axis=1)).sum(2) * near[:, 1:]
    shares = (
        down[PIXEL - 1 :: PIXEL].sum() / max(1.0, down.sum()),
        across[:, PIXEL - 1 :: PIXEL].sum() / max(1.0, across.sum()),
    )
    return np.array(shares)


def inks(picture: Picture) -> npt.NDArray[np.float64]:
    """How the thing's pixels spread over eight steps of brightness and eight of saturation."""
    mask = things(picture)
    pixels = (picture[mask] if mask.any() else picture.reshape(-1, 3)).astype(np.float64) / 255
    values = (pixels @ np.array(LUMA), np.ptp(pixels, axis=1))
    return np.concatenate([np.histogram(value, 8, (0, 1))[0] / len(pixels) for value in values])


def redrawn(picture: Picture, noun: str, atlas: Atlas, look: str) -> dict[str, Picture]:
    """The noun's sprites in 3D and in the look where the picture's thing stands, on its background; none without a thing."""
    mask = things(picture)
    if not mask.any():
        return {}
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    short = min(height, width)
    ground = background(picture) / 255
    colour = (float(ground[0]), float(ground[1]), float(ground[2]))
    thing = Thing(
        noun=atlas.nouns.index(noun),
        x=float((columns.min() + columns.max() + 1) / 2 - width / 2) / short,
        y=float((rows.min() + rows.max() + 1) / 2 - height / 2) / short,
        size=float(max(np.ptp(rows), np.ptp(columns)) + 1) / short,
    )
    numbers = on(atlas.device, numbers_of([Scene("", (thing,), colour, colour)]))
    sprites = {name: atlas.scenes(numbers, width, height, name)[0] for name in ("3d", look)}
    return {name: (255 * sprite).round().byte().permute(1, 2, 0).cpu().numpy() for name, sprite in sprites.items()}
