"""The training material: Microsoft's Fluent Emoji as arrays, one sprite a noun and style.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/fluent-emoji-flat@1.2.6 \\
             @iconify-json/fluent-emoji-high-contrast@1.2.6      # then unpack each, or `npm install` them
    python training/material.py --npm DIR --out sprites.npz

The pictures are Fluent Emoji, (c) Microsoft Corporation, MIT licence, as three npm packages carry them:
`@lobehub/fluent-emoji-3d` 1.1.0 (WebP of 256 px), `@iconify-json/fluent-emoji-flat` 1.2.6 and
`@iconify-json/fluent-emoji-high-contrast` 1.2.6 (SVG). The SVG needs `resvg_py` (0.5.0). Which nouns: `nouns.yaml`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nouns import FILE, article, plural

THREE_D = "@lobehub/fluent-emoji-3d"
FLAT = "@iconify-json/fluent-emoji-flat"
HIGH_CONTRAST = "@iconify-json/fluent-emoji-high-contrast"

RASTER = 256
"""Pixels: the side at which an SVG is drawn; the 3D files have the same."""

SIDE, EXTENT = 128, 112
"""Pixels: the side of a sprite, and the longer side of what it shows."""

SEEN = 8
"""A pixel belongs to the picture where its alpha is above this, of 255."""

Pixels = npt.NDArray[np.uint8]


class MaterialError(Exception):
    """What a person has to mend, in one line: a package, picture or entry that is missing or wrong."""


class Entry(BaseModel):
    """One entry of `nouns.yaml`; the heading of that file tells what each field means."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    noun: str = Field(pattern=r"^[a-z0-9]+([ -][a-z0-9]+)*$")
    code: str = Field(pattern=r"^[0-9a-f]+(-[0-9a-f]+)*$")
    icon: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    also: tuple[str, ...] = Field(default=(), strict=False)
    plural_given: str | None = Field(default=None, alias="plural")
    article_given: str | None = Field(default=None, alias="article", pattern=r"^(a|an|)$")
    countable: bool = True

    @cached_property
    def plural(self) -> str:
        """As in "two mice"; the noun itself where it is not countable."""
        return self.plural_given if self.plural_given is not None else plural(self.noun)

    @cached_property
    def article(self) -> str:
        """`a`, `an`, or nothing for what has none."""
        return self.article_given if self.article_given is not None else article(self.noun)


class Package(NamedTuple):
    """An unpacked npm package: its name and its folder."""

    name: str
    folder: Path


def load_entries(path: Path = FILE) -> tuple[Entry, ...]:
    """The nouns of a YAML file, in its order.

    Raises `MaterialError` for an entry that does not hold, and for a word or picture that two entries claim.
    """
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise MaterialError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(rows, list) or not rows:
        raise MaterialError(f"{path}: expected a list of nouns")
    nouns = tuple(_entry(path, number, row) for number, row in enumerate(rows, start=1))
    owners: dict[str, str] = {}
    for noun in nouns:
        for claim in _claims(noun):
            owner = owners.setdefault(claim, noun.noun)
            if owner != noun.noun:
                raise MaterialError(f"{path}: {claim!r} belongs to both {owner!r} and {noun.noun!r}")
        if len({noun.noun, *noun.also}) <= len(noun.also):
            raise MaterialError(f"{path}: {noun.noun!r} lists a word twice")
    if len({noun.noun for noun in nouns}) < len(nouns):
        raise MaterialError(f"{path}: a noun stands twice")
    return nouns


def _entry(path: Path, number: int, row: object) -> Entry:
    try:
        noun = Entry.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "entry"
        name = row.get("noun", "") if isinstance(row, Mapping) else ""
        raise MaterialError(f"{path}: entry {number} {name!r}: {field}: {first['msg']}") from error
    if noun.countable is (noun.article == "") or not (noun.countable or noun.plural == noun.noun):
        raise MaterialError(
            f'{path}: entry {number} {noun.noun!r}: article: "", countable: false and the noun as its own plural go together'
        )
    return noun


def _claims(noun: Entry) -> Iterator[str]:
    """Every word and picture that no other noun may have."""
    yield from {noun.noun, noun.plural, *noun.also}
    if noun.countable:
        yield from (plural(word) for word in noun.also)
    yield f"code {noun.code}"
    yield f"icon {noun.icon}"


def find_package(root: Path, name: str) -> Package:
    """The package of that name anywhere under `root`: the layout of `npm pack` and of node_modules both do.

    Raises `MaterialError` if there is none, or more than one.
    """
    found = [path.parent for path in sorted(root.rglob("package.json")) if _package_name(path) == name]
    if len(found) != 1:
        trouble = "more than one copy of" if found else "no"
        raise MaterialError(f"{root}: {trouble} package {name}; unpack it there once (npm pack {name}, then tar)")
    return Package(name, found[0])


def _package_name(path: Path) -> str | None:
    try:
        heading = json.loads(path.read_bytes())
    except ValueError:  # packages bring broken ones along, as test data
        return None
    return heading.get("name") if isinstance(heading, dict) else None


def three_d_picture(package: Package, noun: Entry) -> Pixels:
    """The 3D picture of a noun: (256, 256, 4), RGBA, not premultiplied."""
    path = package.folder / "assets" / f"{noun.code}.webp"
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGBA"))
    except OSError as error:
        raise MaterialError(f"{package.name}: no picture assets/{noun.code}.webp for {noun.noun!r}") from error


def load_icons(package: Package) -> Mapping[str, Any]:
    """The IconifyJSON of a package: `icons`, by name, with the `width` and `height` that they have by default."""
    try:
        icons: Mapping[str, Any] = json.loads((package.folder / "icons.json").read_bytes())
    except (OSError, ValueError) as error:
        raise MaterialError(f"{package.name}: icons.json cannot be read: {error}") from error
    return icons


def svg_picture(package: Package, icons: Mapping[str, Any], noun: Entry) -> Pixels:
    """The icon of a noun, drawn in black where it says `currentColor`: (256, 256, 4), RGBA, not premultiplied."""
    try:
        import resvg_py
    except ImportError as error:
        raise MaterialError("drawing SVG needs resvg_py: pip install resvg_py") from error

    icon = icons["icons"].get(noun.icon)
    if icon is None:
        raise MaterialError(f"{package.name}: no icon {noun.icon!r} for {noun.noun!r}")
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"].replace("currentColor", "#000")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RASTER, height=RASTER, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGBA"))


def sprite(picture: Pixels) -> Pixels:
    """What a picture shows, centred: (128, 128, 4), RGBA with premultiplied colour, its longer side 112 px.

    `picture` is (height, width, 4), RGBA, not premultiplied, and shows at least one pixel of alpha above 8.
    """
    rows, columns = np.nonzero(picture[..., 3] > SEEN)
    seen = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(np.float32)
    alpha = seen[..., 3:] / 255
    layers = np.concatenate([seen[..., :3] * alpha, seen[..., 3:]], axis=-1)
    height, width = layers.shape[:2]
    scale = EXTENT / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # One layer at a time in float: Pillow would round an RGBA picture, and unmultiply its colour, before it scales.
    scaled = [
        Image.fromarray(np.ascontiguousarray(layers[..., layer])).resize(size, Image.Resampling.LANCZOS)
        for layer in range(4)
    ]
    result = np.zeros((SIDE, SIDE, 4), np.uint8)
    x, y = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    small = np.clip(np.stack([np.asarray(layer) for layer in scaled], axis=-1), 0, 255)
    small[..., :3] = np.minimum(small[..., :3], small[..., 3:])  # LANCZOS overshoots at edges
    result[y : y + size[1], x : x + size[0]] = np.rint(small)
    return result


def sprites(root: Path, nouns: tuple[Entry, ...]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a material file, one row a noun.

    - `three_d`, `flat`: uint8 (N, 128, 128, 4), RGBA with premultiplied colour;
    - `icon`: uint8 (N, 128, 128), how much of a pixel the high-contrast glyph covers, of 255;
    - `nouns`: unicode (N,).

    `root` holds the unpacked packages. Raises `MaterialError` where a package, a picture or an icon is missing.
    """
    three_d, flat, contrast = (find_package(root, name) for name in (THREE_D, FLAT, HIGH_CONTRAST))
    flat_icons, contrast_icons = load_icons(flat), load_icons(contrast)
    return {
        "three_d": np.stack([sprite(three_d_picture(three_d, noun)) for noun in nouns]),
        "flat": np.stack([sprite(svg_picture(flat, flat_icons, noun)) for noun in nouns]),
        "icon": np.stack([sprite(svg_picture(contrast, contrast_icons, noun))[..., 3] for noun in nouns]),
        "nouns": np.array([noun.noun for noun in nouns]),
    }


def main() -> int:
    """The command: exit code 0, or 2 with one line about what to mend."""
    parser = argparse.ArgumentParser(description="Turn the npm packages of Fluent Emoji into one file of sprites.")
    parser.add_argument("--npm", type=Path, required=True, metavar="DIR", help="holds the unpacked packages")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .npz file to write")
    parser.add_argument("--nouns", type=Path, default=FILE, metavar="FILE", help="default: nouns.yaml beside this file")
    options = parser.parse_args()
    try:
        arrays = sprites(options.npm, load_entries(options.nouns))
    except MaterialError as error:
        print(f"material: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("wb") as file:  # numpy adds a suffix to a name that lacks one
        np.savez_compressed(
            file, three_d=arrays["three_d"], flat=arrays["flat"], icon=arrays["icon"], nouns=arrays["nouns"]
        )
    print(f"{options.out}: {len(arrays['nouns'])} nouns, {options.out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
