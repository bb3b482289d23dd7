"""Intervals of means by the bootstrap, clustered by source picture. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from math import fsum
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DRAWS = 10_000
LEVEL = 0.95
SEED = 0

FEW = 10
"""Clusters; the percentile interval of fewer covers the mean less often than `LEVEL` says: of normal values, simulated, 51 % of
the time with 2, 83 with 5, 88 with 8, 91 with 10, 93 with 40."""

_AT_ONCE = 1_000_000
"""Numbers drawn in one piece at most, so that memory stays bounded."""


def mean_of(values: Iterable[float]) -> float | None:
    """The mean, within the least and the largest value whatever rounding does; None of nothing."""
    listed = list(values)
    return min(max(fmean(listed), min(listed)), max(listed)) if listed else None


def interval(
    pairs: Iterable[tuple[Hashable, float]], draws: int = DRAWS, seed: int = SEED, level: float = LEVEL
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of the mean of values, given as (cluster, value) in any order.

    Edits of one source picture are no independent draws, so whole clusters are drawn, with replacement, as many as there
    are; the mean is over the values of the drawn ones (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapters 8 and 13). None for fewer than two clusters, of which no spread can be said.
    """
    import numpy as np

    listed = list(pairs)
    means = resampled_means(listed, draws, seed)
    if means is None:
        return None
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    least, most = min(value for _, value in listed), max(value for _, value in listed)
    return min(max(float(low), least), most), min(max(float(high), least), most)


def resampled_means(
    pairs: Iterable[tuple[Hashable, float]], draws: int = DRAWS, seed: int = SEED
) -> NDArray[np.float64] | None:
    """The means of `draws` resamples of the clusters, in the order drawn; None for fewer than two clusters.

    The same values give the same means in any order, whatever the clusters are called.
    """
    import numpy as np

    clusters: dict[Hashable, list[float]] = {}
    for cluster, value in pairs:
        clusters.setdefault(cluster, []).append(value)
    if len(clusters) < 2:
        return None
    mean = fmean(value for values in clusters.values() for value in values)
    # Sums of distances from the mean: equal values give exactly the mean, and no interval of rounding errors.
    sums = sorted((fsum(value - mean for value in values), len(values)) for values in clusters.values())
    totals, counts = np.array([total for total, _ in sums]), np.array([count for _, count in sums])
    # The stream of RandomState is frozen (NEP 19): the same interval under every version of numpy.
    chance = np.random.RandomState(seed)
    step = max(1, _AT_ONCE // len(sums))
    pieces: list[Any] = []
    for done in range(0, draws, step):
        drawn = chance.randint(0, len(sums), size=(min(step, draws - done), len(sums)), dtype=np.int64)
        pieces.append(mean + totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(pieces)
