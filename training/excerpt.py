"""Writes the part of the atlas that the tests draw with: `python training/excerpt.py --sprites FILE --out FILE`.

The nouns of `measure.WHOLE` in every look, at half the side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

from measure import WHOLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with np.load(options.sprites) as data:
        nouns = [str(noun) for noun in data["nouns"]]
        chosen = [nouns.index(noun) for noun in WHOLE]
        looks = {look: halved(data[look][chosen]) for look in ("three_d", "flat", "icon")}
    np.savez_compressed(
        options.out, nouns=np.array(WHOLE), three_d=looks["three_d"], flat=looks["flat"], icon=looks["icon"]
    )


def halved(sprites: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 (count, 128, 128, ...) to (count, 64, 64, ...): the mean of four neighbours."""
    count, side, _, *rest = sprites.shape
    blocks = sprites.reshape(count, side // 2, 2, side // 2, 2, *rest).astype(np.float32)
    mean: npt.NDArray[np.uint8] = blocks.mean((2, 4)).round().astype(np.uint8)
    return mean


if __name__ == "__main__":
    main()
