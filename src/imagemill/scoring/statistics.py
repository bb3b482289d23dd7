"""What many judgments say together: means over those that have a score, how many have none, and what that may hide. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from statistics import median, stdev
from typing import Any

from imagemill.scoring.bootstrap import DRAWS, SEED, interval, mean_of
from imagemill.scoring.judgment import STATUSES, Judgment
from imagemill.scoring.scale import Scale

DIGITS = 6
"""Decimals of figures in JSON."""


@dataclass(frozen=True, slots=True)
class Group:
    """The figures of one category, or of all judgments. None where there is nothing to say, never NaN.

    `coverage` is ok / count. `mean`, `std` (of a sample, so of two at least), `median`, `minimum`, `maximum` are over the
    ok ones, and so is `interval`, the 95 % bootstrap interval of the mean. `bounds` are the mean with every judgment that
    has no score at the low end of the scale, and at the high end. `sub_scores` are means over the ok ones, of the parts
    that all of them have.
    """

    name: str
    count: int
    ok: int
    statuses: Mapping[str, int]
    mean: float | None = None
    std: float | None = None
    median: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    bounds: tuple[float, float] | None = None
    interval: tuple[float, float] | None = None
    sub_scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def coverage(self) -> float | None:
        """The share of judgments with a score, 0 to 1; None without judgments."""
        return self.ok / self.count if self.count else None

    def as_json(self) -> dict[str, Any]:
        """For the report: figures to six decimals."""
        return {
            "name": self.name,
            "count": self.count,
            "ok": self.ok,
            "coverage": _rounded(self.coverage),
            "mean": _rounded(self.mean),
            "std": _rounded(self.std),
            "median": _rounded(self.median),
            "min": _rounded(self.minimum),
            "max": _rounded(self.maximum),
            "bounds": _both(self.bounds),
            "interval": _both(self.interval),
            "sub_scores": {name: _rounded(value) for name, value in self.sub_scores.items()},
            "statuses": dict(self.statuses),
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a run. The micro mean weighs every item alike, the macro mean every category.

    `macro_mean` is None where a category has no score: leaving it out would flatter the rest.
    """

    overall: Group
    categories: tuple[Group, ...]
    macro_mean: float | None

    @property
    def micro_mean(self) -> float | None:
        """The mean over all items with a score."""
        return self.overall.mean

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "overall": self.overall.as_json(),
            "categories": [group.as_json() for group in self.categories],
            "micro_mean": _rounded(self.micro_mean),
            "macro_mean": _rounded(self.macro_mean),
        }


def summarise(
    judgments: Sequence[Judgment],
    scale: Scale | None,
    sources: Mapping[str, str],
    *,
    categories: Sequence[str] = (),
    seed: int = SEED,
    draws: int = DRAWS,
) -> Summary:
    """The figures of judgments in any order, one of each item.

    `sources` names the source picture of each item: the clusters of the bootstrap. `scale` of None means that scores have
    no ends (decibels), and gives no bounds. `categories` come first, in their order, with or without judgments; others
    follow by name. Every group's interval is drawn from the same seed, so no category changes that of another.
    Raises ValueError for an item judged twice, one without a source, and a score out of the scale.
    """
    _check(judgments, scale, sources)
    order = list(dict.fromkeys([*categories, *sorted({one.category for one in judgments})]))
    members: dict[str, list[Judgment]] = {name: [] for name in order}
    for one in judgments:
        members[one.category].append(one)
    groups = tuple(_group(name, members[name], scale, sources, seed, draws) for name in order)
    means = [group.mean for group in groups if group.mean is not None]
    macro = mean_of(means) if len(means) == len(groups) else None
    return Summary(_group("overall", judgments, scale, sources, seed, draws), groups, macro)


def _check(judgments: Sequence[Judgment], scale: Scale | None, sources: Mapping[str, str]) -> None:
    seen = set[str]()
    for one in judgments:
        if one.item in seen:
            raise ValueError(f"{one.item}: judged twice")
        if one.item not in sources:
            raise ValueError(f"{one.item}: its source picture is not named")
        if scale and one.score is not None and one.score not in scale:
            raise ValueError(f"{one.item}: {one.score:g} is out of the scale, {scale}")
        seen.add(one.item)


def _group(
    name: str, judgments: Sequence[Judgment], scale: Scale | None, sources: Mapping[str, str], seed: int, draws: int
) -> Group:
    ok = [one for one in judgments if one.score is not None]
    scores = [one.score for one in ok if one.score is not None]
    counted = Counter(one.status for one in judgments)
    pairs = [(sources[one.item], score) for one, score in zip(ok, scores, strict=True)]
    parts = sorted(set(ok[0].scores).intersection(*(one.scores for one in ok))) if ok else []
    means = {part: mean_of(one.scores[part] for one in ok) for part in parts}
    return Group(
        name,
        len(judgments),
        len(ok),
        {status: counted[status] for status in STATUSES if counted[status]},
        mean_of(scores),
        stdev(scores) if len(scores) > 1 else None,
        median(scores) if scores else None,
        min(scores, default=None),
        max(scores, default=None),
        _bounds(scores, len(judgments), scale),
        interval(pairs, draws, seed),
        {part: mean for part, mean in means.items() if mean is not None},
    )


def _bounds(scores: Sequence[float], count: int, scale: Scale | None) -> tuple[float, float] | None:
    if scale is None or not count:
        return None
    missing, mean = count - len(scores), mean_of(scores)
    if mean is not None and not missing:
        return mean, mean
    low, high = ((fsum(scores) + missing * end) / count for end in (scale.low, scale.high))
    return (min(low, mean), max(high, mean)) if mean is not None else (scale.low, scale.high)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def _both(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else [round(end, DIGITS) for end in pair]
