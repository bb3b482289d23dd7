"""Two evaluations of the same items: their paired difference, read from their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from imagemill.errors import InputError
from imagemill.listing import columns
from imagemill.scoring.difference import Comparison, Difference, compare
from imagemill.scoring.judgment import Judgment
from imagemill.scoring.report import DATA, JUDGMENTS
from imagemill.scoring.report.words import score, span

DIFFERS = {
    "judge.model": "the judges differ",
    "judge.revision": "the judges' revisions differ",
    "judge.rubric_revisions": "the rubrics differ",
    "judge.sees_source": "one judge saw the sources, the other did not",
    "benchmark.items_sha256": "the items differ, or what they say or show",
}
"""Entries of the manifests, and what it means when they are not equal: the difference is then not of the edits alone."""

METRICS = frozenset({"judge:reference", "judge:preservation"})
"""Judges whose scores have one name and tell of different things: likeness to the target, and to the source."""


@dataclass(frozen=True, slots=True)
class Run:
    """One evaluation as its folder tells it."""

    folder: Path
    summary: Mapping[str, Any]
    judgments: tuple[Judgment, ...]
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Two runs and their differences, the second less the first; `warnings` say what else differs."""

    first: Run
    second: Run
    found: Comparison
    warnings: tuple[str, ...]


def compare_runs(first: Path, second: Path) -> Comparisons:
    """Raises `InputError` for a folder without an evaluation, scores on unlike scales, and runs without a common item."""
    one, other = _read(first), _read(second)
    for name in ("headline", "scale"):
        if one.summary[name] != other.summary[name]:
            raise InputError(
                f"{first} and {second}: the scores are not of one kind ({name} {one.summary[name]} and "
                f"{other.summary[name]}); compare runs of one judge"
            )
    judges = [_entry(run.summary["manifest"], "judge.model") for run in (one, other)]
    if judges[0] != judges[1] and set(judges) <= METRICS:
        raise InputError(
            f"{first} and {second}: the scores are not of one kind ({judges[0]} and {judges[1]}); compare runs of one judge"
        )
    try:
        found = compare(one.judgments, other.judgments, {**other.sources, **one.sources})
    except ValueError as error:
        raise InputError(f"{first} and {second}: {error}; compare runs of one benchmark") from error
    if not set(one.sources) & set(other.sources):
        raise InputError(f"{first} and {second} have no item in common; compare runs of one benchmark")
    return Comparisons(one, other, found, tuple(_warnings(one, other)))


def _warnings(one: Run, other: Run) -> Sequence[str]:
    values = [
        (text, *(_entry(run.summary["manifest"], name) for run in (one, other))) for name, text in DIFFERS.items()
    ]
    return [text for text, mine, yours in values if _unlike(mine, yours)]


def _unlike(mine: Any, yours: Any) -> bool:
    """Whether two entries differ. Of those by category, categories that one run alone has pair nothing and do not count."""
    if isinstance(mine, Mapping) and isinstance(yours, Mapping) and mine and yours:
        return any(mine[name] != yours[name] for name in mine.keys() & yours.keys())
    return bool(mine != yours)


def _entry(manifest: Mapping[str, Any], name: str) -> Any:
    section, _, key = name.partition(".")
    return manifest[section].get(key)


def _read(folder: Path) -> Run:
    if not (folder / JUDGMENTS).is_file() or not (folder / DATA).is_file():
        raise InputError(f"{folder}: holds no finished evaluation; give the --out folder of `imagemill eval`")
    names = [field.name for field in fields(Judgment)]
    try:
        summary = json.loads((folder / DATA).read_text("utf-8"))
        if absent := [name for name in ("title", "headline", "scale", "manifest") if name not in summary]:
            raise ValueError(f"{DATA} is no evaluation's: it has no {absent[0]}")
        rows = [json.loads(line) for line in (folder / JUDGMENTS).read_text("utf-8").split("\n") if line]
        judgments = tuple(Judgment(**{name: row[name] for name in names}) for row in rows)
        return Run(folder, summary, judgments, {row["item"]: row["source"] for row in rows})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: does not read as an evaluation ({error}); run `imagemill eval` again") from error


# --- what is printed --------------------------------------------------------------------------------------------------


def comparison_json(runs: Comparisons) -> str:
    """All figures, six decimals."""
    head = {
        "first": {"folder": str(runs.first.folder), "title": runs.first.summary["title"]},
        "second": {"folder": str(runs.second.folder), "title": runs.second.summary["title"]},
        "headline": runs.first.summary["headline"],
        "scale": runs.first.summary["scale"],
        "warnings": list(runs.warnings),
    }
    return json.dumps({**head, **runs.found.as_json()}, ensure_ascii=False, indent=2)


def comparison_text(runs: Comparisons) -> str:
    """A table by category and overall, and what to keep in mind."""
    scale = runs.first.summary["scale"]
    heads = ("", "PAIRS", "A", "B", "B - A", "95 % INTERVAL", "HIGHER", "EQUAL", "LOWER", "LEFT OUT")
    rows = [_row(one, scale) for one in (*runs.found.categories, runs.found.overall)]
    lines = [
        f"A: {runs.first.folder} ({runs.first.summary['title']})",
        f"B: {runs.second.folder} ({runs.second.summary['title']})",
    ]
    lines += [
        f"mean {runs.first.summary['headline']}, scale {scale[0]:g} to {scale[1]:g}; pairs have a score in both",
        "",
    ]
    lines += [columns(rows, heads), "", _verdict(runs.found.overall)]
    return "\n".join(
        [*lines, *(f"warning: {text}: the difference is not that of the edits alone" for text in runs.warnings)]
    )


def _row(one: Difference, scale: Sequence[float]) -> tuple[str, ...]:
    mean = "–" if one.mean is None else f"{one.mean:+.{3 if scale[1] - scale[0] <= 2 else 2}f}"
    return (
        *(one.name, str(one.pairs), score(one.first_mean, scale), score(one.second_mean, scale), mean),
        *(span(one.interval, scale), str(one.higher), str(one.equal), str(one.lower), str(sum(one.left_out.values()))),
    )


def _verdict(overall: Difference) -> str:
    if overall.interval is None:
        return "There are too few source pictures for an interval."
    low, high = overall.interval
    if low > 0 or high < 0:
        return f"B scores {'higher' if low > 0 else 'lower'}: the interval does not hold 0."
    return "The interval holds 0: the runs cannot be told apart."
