"""Makes the embedded edit benchmark: `python training/bench.py --sprites FILE --photos FILE --out examples/bench_tiny`.

Fifty pairs, ten in each of five categories, drawn with seeds that training never uses and on photos it never saw. Each
has a source, an instruction, the exact target and a mask of what changes; 128x128 PNG.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from edits import KINDS, Edit, Editor
from nouns import load_nouns
from render import Atlas, numbers_of, on

A_CATEGORY = 10
SEED = 20_260_000
ON_PHOTOS = {"background": 0, "color": 3, "object": 4, "geometry": 3, "tone": 6}
"""How many of a category's ten stand on a photo."""
CHANGED = 6
"""Difference in a channel, of 255, at which a pixel counts as changed."""
MIT = "MIT (Microsoft Fluent Emoji)"
LICENCES = {
    "chelsea": "CC0 (Chelsea the cat, Stefan van der Walt, of scikit-image)",
    "coffee": "CC0 (Rachel Michetti, courtesy of Pikolo Espresso Bar, of scikit-image)",
    "rocket": "public domain (SpaceX, of scikit-image)",
}
"""The held-out photos, which may all be passed on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    atlas = Atlas(options.sprites, options.photos)
    photos = [atlas.photo_names.index(name) for name in LICENCES]
    editor = Editor(load_nouns(), photos, random.Random(SEED))
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for category, edits in KINDS.items():
        for number in range(A_CATEGORY):
            edit = editor.edit(edits[number % len(edits)], number < ON_PHOTOS[category])
            rows.append(write(atlas, edit, category, f"{category}_{number + 1:02d}", options.out))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (options.out / "bench.jsonl").write_text(lines, "utf-8")
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {len(rows)} pairs, {size:,} bytes")


def write(atlas: Atlas, edit: Edit, category: str, name: str, out: Path) -> dict[str, object]:
    """The pair's three pictures, and its row."""
    pictures = atlas.scenes(on(atlas.device, numbers_of([edit.source, edit.target])), 128, 128)
    source, target = (np.asarray((picture * 255).round().byte().permute(1, 2, 0)) for picture in pictures)
    mask = (np.abs(source.astype(int) - target).max(2) > CHANGED) * np.uint8(255)
    files = {"image": f"{name}_source.png", "target": f"{name}_target.png", "mask": f"{name}_mask.png"}
    for file, pixels in zip(files.values(), (source, target, mask), strict=True):
        Image.fromarray(pixels).save(out / file, optimize=True)
    photo = edit.source.photo
    licence = MIT if photo is None else LICENCES[atlas.photo_names[photo.number]]
    if photo is not None and (edit.source.things or edit.target.things):
        licence += f"; {MIT}"
    return {
        "id": name,
        "category": category,
        "edit": edit.edit,
        "instruction": edit.instruction,
        **files,
        "license": licence,
    }


if __name__ == "__main__":
    main()
