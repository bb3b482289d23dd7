"""Photos for the editor: the sample pictures of scikit-image and scikit-learn, and any folder of your own.

    python training/photos.py --wheels DIR --photos DIR --out photos.npz

`--wheels` holds the unpacked (or installed) packages, found by `skimage/data` and `sklearn/datasets/images` below it.
Each photo becomes its centre square at 256x256. Photos in `HELD_OUT` are left out of training: the benchmark uses them.
Licences: see MODEL_CARD.md of `tiny-edit`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SIDE = 256
SKIMAGE = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SKLEARN = ("china.jpg", "flower.jpg")
HELD_OUT = ("chelsea", "coffee", "rocket")
"""Not trained on: the benchmark stands on them. CC0 and public domain, so that it may be passed on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders of more photos (jpg, png)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    paths = [find(options.wheels, f"skimage/data/{name}") for name in SKIMAGE]
    paths += [find(options.wheels, f"sklearn/datasets/images/{name}") for name in SKLEARN]
    for folder in options.photos:
        paths += sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
    names = [path.stem for path in paths]
    pictures = np.stack([square(path) for path in paths])
    np.savez_compressed(options.out, names=np.array(names), photos=pictures)
    print(f"{options.out}: {len(names)} photos, {options.out.stat().st_size:,} bytes")


def find(root: Path, name: str) -> Path:
    """The file of that name anywhere below the folder."""
    path = next(iter(sorted(root.rglob(name))), None)
    if path is None:
        sys.exit(f"{root} holds no {name}; unpack the wheels of scikit-image 0.26 and scikit-learn 1.9 there")
    return path


def square(path: Path) -> np.ndarray:
    """The photo's centre square as uint8 (256, 256, 3)."""
    with Image.open(path) as photo:
        upright = ImageOps.exif_transpose(photo).convert("RGB")
    return np.asarray(ImageOps.fit(upright, (SIDE, SIDE), Image.Resampling.LANCZOS))


if __name__ == "__main__":
    main()
