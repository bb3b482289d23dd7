"""Scores and intervals as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from imagemill.scoring.bootstrap import FEW

UNITS = {"psnr": " dB"}
"""Of sub-scores, by the word before the first underscore: what stands behind the figure."""

STATUS = {
    "ok": "scored",
    "parse_failed": "answer not one clear score",
    "refused": "judge declined",
    "error": "judge gave no answer",
    "missing_image": "a picture is missing or does not read",
    "edit_failed": "no edit",
}
CONTROL = {"source": "unedited source", "shuffled": "another item's edit"}


def score(value: float | None, scale: Sequence[float]) -> str:
    """Three decimals on a scale as short as 0 to 1, else two."""
    return "–" if value is None else f"{value:.{3 if scale[1] - scale[0] <= 2 else 2}f}"


def span(pair: Sequence[float] | None, scale: Sequence[float]) -> str:
    """`0.81 to 0.86`, or a dash."""
    return "–" if pair is None else f"{score(pair[0], scale)} to {score(pair[1], scale)}"


def few_sources(summary: Mapping[str, Any]) -> str:
    """What is to be said of an interval over few source pictures; empty where there is none, or they are enough."""
    count = summary["manifest"]["benchmark"]["sources"]
    if summary["overall"]["interval"] is None or count >= FEW:
        return ""
    return f"All items come from {count} source pictures; the interval over so few is narrower than it should be."


def figure(name: str, value: float | None) -> str:
    """A sub-score with its unit."""
    if value is None:
        return "–"
    digits = 1 if name.startswith("psnr") else 3 if abs(value) <= 1 else 2
    return f"{value:.{digits}f}{UNITS.get(name.partition('_')[0], '')}"


def share(value: float | None) -> str:
    """A share as a percentage; never 100 % for less than all."""
    if value is None:
        return "–"
    text = f"{100 * value:.1f}".removesuffix(".0")
    return f"{'99.9' if text == '100' and value < 1 else text} %"
