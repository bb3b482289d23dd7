"""The chart: of each group a dot for the mean, a bar for its interval, a hair for its bounds, and marks for the controls.

Places are percentages of the width, so that the page can stretch the chart without stretching its dots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TICKS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the chart; None for what the group does not have. `controls` are (name, place)."""

    name: str
    group: Mapping[str, Any]
    mean: float | None
    interval: tuple[float, float] | None
    bounds: tuple[float, float] | None
    controls: tuple[tuple[str, float], ...]


def rows(summary: Mapping[str, Any]) -> list[Row]:
    """The categories in their order, then all together."""
    scale = summary["scale"]
    found = []
    for place, group in enumerate([*summary["categories"], summary["overall"]]):
        marks = []
        for name, figures in summary["controls"].items():
            mean = [*figures["categories"], figures["overall"]][place]["mean"]
            if mean is not None:
                marks.append((name, _at(mean, scale)))
        found.append(
            Row(
                name=group["name"],
                group=group,
                mean=None if group["mean"] is None else _at(group["mean"], scale),
                interval=_both(group["interval"], scale),
                bounds=_both(group["bounds"], scale),
                controls=tuple(marks),
            )
        )
    return found


def ticks(scale: Sequence[float]) -> list[tuple[float, str]]:
    """(place, label) of the axis."""
    step = (scale[1] - scale[0]) / TICKS
    return [(round(100 * number / TICKS, 3), f"{scale[0] + number * step:g}") for number in range(TICKS + 1)]


def _at(value: float, scale: Sequence[float]) -> float:
    return round(100 * (value - scale[0]) / (scale[1] - scale[0]), 3)


def _both(pair: Sequence[float] | None, scale: Sequence[float]) -> tuple[float, float] | None:
    return None if pair is None else (_at(pair[0], scale), _at(pair[1], scale))
