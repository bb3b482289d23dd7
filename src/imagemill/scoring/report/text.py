"""report.md of an evaluation: the figures for people who read them in an editor, a terminal or a code review."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from imagemill.report.figures import cut, duration, number
from imagemill.report.markdown import one_line, table
from imagemill.scoring.report.data import sub_scores
from imagemill.scoring.report.words import CONTROL, STATUS, few_sources, figure, score, share, span

TIMING = "## Timing"
"""The heading of the last section; only what stands below it differs between an unbroken and a resumed evaluation."""


def markdown(title: str, summary: Mapping[str, Any]) -> str:
    """The report as Markdown (tables as in CommonMark with GitHub's extension)."""
    parts = [f"# {one_line(title)}", *_head(summary), "## Scores", _scores(summary)]
    parts += _sub_scores(summary) + _controls(summary) + _statuses(summary) + _unscored(summary["unscored"])
    parts += ["## Manifest", _manifest(summary["manifest"]), TIMING, _timing(summary["timing"])]
    return "\n\n".join(parts) + "\n"


def _head(summary: Mapping[str, Any]) -> list[str]:
    scale, overall = summary["scale"], summary["overall"]
    low = "" if summary["covered"] else f", below the {share(summary['min_coverage'])} asked for"
    return [
        f"**{summary['headline']} {score(overall['mean'], scale)}** (95 % interval {span(overall['interval'], scale)}; "
        f"scale {scale[0]:g} to {scale[1]:g}), macro mean {score(summary['macro_mean'], scale)}.",
        f"{number(summary['scored'])} of {number(summary['items'])} items have a score: coverage "
        f"{share(summary['coverage'])}{low}. Means are over those; with all others at the scale's ends the mean would lie "
        f"between the bounds {span(overall['bounds'], scale)}.",
        *filter(None, [few_sources(summary)]),
    ]


def _scores(summary: Mapping[str, Any]) -> str:
    scale, groups = summary["scale"], [*summary["categories"], summary["overall"]]
    heads = (
        "category",
        "count",
        "scored",
        "coverage",
        "mean",
        "95 % interval",
        "std",
        "median",
        "min",
        "max",
        "bounds",
    )
    rows = (
        (
            *(group["name"], number(group["count"]), number(group["ok"]), share(group["coverage"])),
            *(score(group["mean"], scale), span(group["interval"], scale)),
            *(score(group[name], scale) for name in ("std", "median", "min", "max")),
            span(group["bounds"], scale),
        )
        for group in groups
    )
    return table(heads, rows, len(groups))


def _sub_scores(summary: Mapping[str, Any]) -> list[str]:
    names, groups = sub_scores(summary), [*summary["categories"], summary["overall"]]
    if not names:
        return []
    rows = ((group["name"], *(figure(name, group["sub_scores"].get(name)) for name in names)) for group in groups)
    heads = ("category", *(name.replace("_", " ") for name in names))
    return ["## Sub-scores", "Means over the scored items.", table(heads, rows, len(groups))]


def _controls(summary: Mapping[str, Any]) -> list[str]:
    if not summary["controls"]:
        return []
    scale = summary["scale"]
    sets = {"edits": summary, **{CONTROL[name]: figures for name, figures in summary["controls"].items()}}
    names = [group["name"] for group in [*summary["categories"], summary["overall"]]]
    rows = []
    for place, name in enumerate(names):
        groups = [[*figures["categories"], figures["overall"]][place] for figures in sets.values()]
        rows.append((name, *(f"{score(one['mean'], scale)} ({number(one['ok'])})" for one in groups)))
    note = "The same judge on what cannot be a good edit: mean, and in brackets how many have a score."
    return ["## Controls", note, table(("category", *sets), rows, len(rows))]


def _statuses(summary: Mapping[str, Any]) -> list[str]:
    counts = summary["overall"]["statuses"]
    rows = ((name, number(count), STATUS[name]) for name, count in counts.items())
    return ["## Statuses", table(("status", "items", "meaning"), rows, len(counts))]


def _unscored(unscored: Mapping[str, Any]) -> list[str]:
    if not unscored["total"]:
        return []
    rows = (
        (row["item"], row["category"], row["status"], row["message"], cut(row["text"], 200)) for row in unscored["rows"]
    )
    heads = ("item", "category", "status", "why", "answer")
    return ["## Without a score", table(heads, rows, unscored["total"])]


def _manifest(manifest: Mapping[str, Any]) -> str:
    rows = [(name, json.dumps(value, ensure_ascii=False)) for name, value in flat(manifest)]
    return table(("setting", "value"), rows, len(rows))


def flat(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The entries of a manifest with dotted names; what is not set is left out."""
    found = []
    for section, values in manifest.items():
        for name, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            if value not in (None, [], {}, ()):
                found.append((f"{section}.{name}" if name else section, value))
    return found


def _timing(timing: Mapping[str, Any]) -> str:
    heads = ("stage", "run", "status", "policy", "wall time", "workers", "idle seconds", "held by the policy")
    rows: list[Sequence[str]] = []
    for stage in ("edits", "judgments"):
        for run in timing[stage]["runs"]:
            lanes = run["workers"]
            held = [lane["held_seconds"] for lane in lanes if lane["held_seconds"] is not None]
            idle = ", ".join(f"{lane['label']} {lane['idle_seconds']:.1f}" for lane in lanes)
            rows.append(
                (
                    *(stage, str(run["run"]), run["status"], run["policy"] or "–", duration(run["seconds"])),
                    *(number(len(lanes)), idle, f"{sum(held):.1f}" if held else "–"),
                )
            )
    loads = ", ".join(f"{timing[stage]['loads']} for the {stage}" for stage in ("edits", "judgments"))
    lead = f"Models were loaded {timing['loads']} times ({loads}). Wall time {duration(timing['seconds'])}."
    return f"{lead}\n\n{table(heads, rows, len(rows))}"
