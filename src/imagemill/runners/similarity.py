"""How alike two pictures are, in figures: PSNR, SSIM and L1, whole or by a mask. NumPy and Pillow, no torch.

Levels run from 0 to 255; all three channels count alike.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Levels: TypeAlias = NDArray[np.float64]

PEAK = 255.0
MAX_PSNR = 100.0
"""Decibels that equal pictures are given: theirs is infinite, which JSON cannot hold and no mean survives."""

SIGMA = 1.5
RADIUS = 5
"""The window of SSIM: a Gaussian of 11x11 (Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment: from error
visibility to structural similarity", IEEE Transactions on Image Processing 13(4), section III B)."""

C1 = (0.01 * PEAK) ** 2
C2 = (0.03 * PEAK) ** 2


def levels(picture: Image) -> Levels:
    """An RGB picture as (height, width, 3)."""
    return np.asarray(picture, dtype=np.float64)


def psnr(one: Levels, other: Levels, where: NDArray[np.bool_] | None = None) -> float:
    """10 log10(255² / mean squared error) in decibels, at most `MAX_PSNR`; over the pixels `where` says, if it does."""
    error = _mean((one - other) ** 2, where)
    return MAX_PSNR if error == 0 else min(MAX_PSNR, 10 * math.log10(PEAK**2 / error))


def l1(one: Levels, other: Levels, where: NDArray[np.bool_] | None = None) -> float:
    """The mean absolute difference, from 0 (equal) to 1."""
    return _mean(np.abs(one - other), where) / PEAK


def ssim(one: Levels, other: Levels, where: NDArray[np.bool_] | None = None) -> float:
    """The mean of the structural similarity index over pixels and channels; 1 for equal pictures, never below -1.

    Windows at the border see the picture mirrored, so that every pixel has a value and a mask can choose among all.
    """
    return _mean(ssim_map(one, other), where)


def ssim_map(one: Levels, other: Levels) -> Levels:
    """The index at each pixel and channel (Wang et al. 2004, equation 13)."""
    mean_one, mean_other = _blurred(one), _blurred(other)
    spread_one = _blurred(one * one) - mean_one**2
    spread_other = _blurred(other * other) - mean_other**2
    shared = _blurred(one * other) - mean_one * mean_other
    above = (2 * mean_one * mean_other + C1) * (2 * shared + C2)
    index: Levels = above / ((mean_one**2 + mean_other**2 + C1) * (spread_one + spread_other + C2))
    return index


def _blurred(values: Levels) -> Levels:
    """Each channel under the Gaussian window, rows and columns in turn."""
    places = np.arange(-RADIUS, RADIUS + 1)
    window = np.exp(-(places**2) / (2 * SIGMA**2))
    window /= window.sum()
    for axis in (0, 1):
        length = values.shape[axis]
        edges = [(RADIUS, RADIUS) if axis == side else (0, 0) for side in range(3)]
        padded = np.pad(values, edges, mode="symmetric")
        parts = (
            weight * np.take(padded, range(start, start + length), axis=axis) for start, weight in enumerate(window)
        )
        values = sum(parts, np.zeros_like(values))
    return values


def _mean(values: Levels, where: NDArray[np.bool_] | None) -> float:
    return float(values.mean() if where is None else values[where].mean())
