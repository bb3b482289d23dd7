"""Two runs on the same items: the difference of their scores, pair by pair. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imagemill.scoring.bootstrap import DRAWS, SEED, interval, mean_of
from imagemill.scoring.judgment import Judgment

LEFT_OUT = (
    "only_in_first",
    "only_in_second",
    "without_score_in_first",
    "without_score_in_second",
    "without_score_in_both",
)
"""Why an item is in no pair."""

DIGITS = 6
"""Decimals of figures in JSON."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The second run against the first, over the items that have a score in both: `mean` is second less first.

    `interval` is its 95 % bootstrap interval, clustered by source picture. `higher`, `equal` and `lower` count the items by
    how the second scored. `left_out` counts the items of no pair by reason (the words of `LEFT_OUT`). None where there is
    nothing to say, never NaN.
    """

    name: str
    pairs: int
    left_out: Mapping[str, int]
    first_mean: float | None = None
    second_mean: float | None = None
    mean: float | None = None
    interval: tuple[float, float] | None = None
    higher: int = 0
    equal: int = 0
    lower: int = 0

    def as_json(self) -> dict[str, Any]:
        """For the comparison's report: figures to six decimals."""
        rounded = {
            name: None if (value := getattr(self, name)) is None else round(value, DIGITS)
            for name in ("first_mean", "second_mean", "mean")
        }
        ends = None if self.interval is None else [round(end, DIGITS) for end in self.interval]
        counts = {"higher": self.higher, "equal": self.equal, "lower": self.lower}
        found: dict[str, Any] = {"name": self.name, "pairs": self.pairs}
        return found | rounded | {"interval": ends} | counts | {"left_out": dict(self.left_out)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The differences over all items and by category (by name)."""

    overall: Difference
    categories: tuple[Difference, ...]

    def as_json(self) -> dict[str, Any]:
        """For the comparison's report."""
        return {"overall": self.overall.as_json(), "categories": [one.as_json() for one in self.categories]}


def compare(
    first: Sequence[Judgment],
    second: Sequence[Judgment],
    sources: Mapping[str, str],
    *,
    seed: int = SEED,
    draws: int = DRAWS,
) -> Comparison:
    """The paired difference of two runs, whose judgments are in any order.

    `sources` names the source picture of each item. Raises ValueError for an item judged twice in one run, one without
    a source, and one whose category is not the same in both.
    """
    ones, others = _by_item(first), _by_item(second)
    categories: dict[str, str] = {}
    for item, one in [*ones.items(), *others.items()]:
        if categories.setdefault(item, one.category) != one.category:
            raise ValueError(f"{item}: {categories[item]} in the first run, {one.category} in the second")
        if item not in sources:
            raise ValueError(f"{item}: its source picture is not named")
    groups = [
        _difference(name, [item for item in categories if categories[item] == name], ones, others, sources, seed, draws)
        for name in sorted(set(categories.values()))
    ]
    return Comparison(_difference("overall", list(categories), ones, others, sources, seed, draws), tuple(groups))


def _by_item(judgments: Sequence[Judgment]) -> dict[str, Judgment]:
    found: dict[str, Judgment] = {}
    for one in judgments:
        if one.item in found:
            raise ValueError(f"{one.item}: judged twice")
        found[one.item] = one
    return found


def _difference(
    name: str,
    items: Sequence[str],
    ones: Mapping[str, Judgment],
    others: Mapping[str, Judgment],
    sources: Mapping[str, str],
    seed: int,
    draws: int,
) -> Difference:
    left_out = Counter[str]()
    pairs: list[tuple[str, float, float]] = []
    for item in items:
        one, other = ones.get(item), others.get(item)
        if one and other and one.score is not None and other.score is not None:
            pairs.append((sources[item], one.score, other.score))
        else:
            left_out[_why_left_out(one, other)] += 1
    steps = [after - before for _, before, after in pairs]
    return Difference(
        name,
        len(pairs),
        {why: left_out[why] for why in LEFT_OUT if left_out[why]},
        mean_of(before for _, before, _ in pairs),
        mean_of(after for _, _, after in pairs),
        mean_of(steps),
        interval(((pair[0], step) for pair, step in zip(pairs, steps, strict=True)), draws, seed),
        sum(step > 0 for step in steps),
        sum(step == 0 for step in steps),
        sum(step < 0 for step in steps),
    )


def _why_left_out(one: Judgment | None, other: Judgment | None) -> str:
    if one is None or other is None:
        return "only_in_first" if one else "only_in_second"
    if one.score is None:
        return "without_score_in_both" if other.score is None else "without_score_in_first"
    return "without_score_in_second"
