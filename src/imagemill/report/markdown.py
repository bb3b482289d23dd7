"""report.md: the summary for people who read it in an editor, a terminal or a code review."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from imagemill.judges import product
from imagemill.report.figures import clock, cut, duration, number, rate

LISTED = 50
"""Rows of a long list that the text shows; report.json has more, results.jsonl every task."""


STATUS = {
    "done": "ended",
    "failed": "ended, some failed",
    "running": "not ended (going on, or killed)",
    "died": "died",
    "drained": "stopped early",
    "cancelled": "stopped at once",
    "no_workers": "no workers left",
    "bad_model": "model did not load",
    "output_error": "folder could not be written",
}


def markdown(title: str, summary: Mapping[str, Any]) -> str:
    """The report as Markdown (tables as in CommonMark with GitHub's extension)."""
    made = products(summary)
    parts = [f"# {one_line(title)}", *_head(summary, made), *_runs(summary["runs"], made), *_changes(summary["runs"])]
    for name in ("models", "adapters", "shapes"):
        parts += _groups(name, summary[name], made)
    parts += _failures(summary) + _skipped(summary["skipped"]) + _flags(summary["flags"])
    return "\n\n".join(parts) + "\n"


def products(summary: Mapping[str, Any]) -> str:
    """What the tasks of a folder give, in the plural: `pictures`, `judgments`, or `results` where it holds both."""
    return product((group["name"] for group in summary["models"]), "result") + "s"


def _head(summary: Mapping[str, Any], made: str) -> list[str]:
    tasks = summary["tasks"]
    lines = [
        f"**{number(tasks['done'])} of {number(tasks['total'])} done**, {number(tasks['failed'])} failed, "
        f"{number(tasks['pending'])} pending, {number(summary['skipped']['total'])} rows skipped."
    ]
    speed = f"{rate(summary['pictures_per_second'])} {made} a second, wall time {duration(summary['wall_seconds'])}"
    lines.append(speed + (f", {number(summary['retried'])} done after another try." if summary["retried"] else "."))
    shown = "the timeline is" if made == "judgments" else "the gallery and the timeline are"
    lines.append(f"Every task is in results.jsonl; {shown} in report.html.")
    return lines


def _runs(runs: Sequence[Mapping[str, Any]], made: str) -> list[str]:
    heads = ("run", "started", "status", "wall time", made, "a second", "steady", "policy")
    rows = (
        (
            *(str(run["run"]), clock(run["started"]), status(run["status"]), duration(run["seconds"])),
            *(number(run["pictures"]), rate(run["pictures_per_second"]), rate(run["steady_pictures_per_second"])),
            run["policy"] or "–",
        )
        for run in runs
    )
    parts = ["## Runs", table(heads, rows, len(runs))]
    for run in reversed(runs):
        if run["workers"]:
            return [*parts, f"## Workers of run {run['run']}", _workers(run["workers"], made)]
    return parts


def _workers(workers: Sequence[Mapping[str, Any]], made: str) -> str:
    heads = ("worker", made, "failed tries", "busy", "loading", "idle", "of which held by the policy")
    rows = (
        (
            *(lane["label"], number(lane["pictures"]), number(lane["failed_attempts"])),
            *(duration(lane[name]) for name in ("busy_seconds", "load_seconds", "idle_seconds", "held_seconds")),
        )
        for lane in workers
    )
    return table(heads, rows, len(workers))


def _changes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [(run["run"], note) for run in reversed(runs) for note in run["notes"]]
    lines = [one_line(f"{name}: {tuned(tuning)}") for name, tuning in last_tuning(runs).items()]
    if not notes and not lines:
        return []
    rows = ((str(number), note["label"], duration(note["after_seconds"]), note["note"]) for number, note in notes)
    found = [table(("run", "worker", "after", "what"), rows, len(notes))] if notes else []
    return ["## What the workers changed", *lines, *found]


def last_tuning(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """How the models of the latest run that tells it were made fast."""
    found: Mapping[str, Any] = next((run["tuning"] for run in reversed(runs) if run["tuning"]), {})
    return found


def tuned(tuning: Mapping[str, Any]) -> str:
    """The tuning of a model in one line."""
    how = "compiled" if tuning["compiled"] else "not compiled"
    sizes = f" for {', '.join(tuning['sizes'])}" if tuning["compiled"] and tuning["sizes"] else ""
    batch = f", batches of up to {tuning['batch_size']}" if tuning["batch_size"] > 1 else ", batches of one"
    return f"{how}{sizes} ({tuning['why']}), precision {tuning['precision']}, attention {tuning['attention']}{batch}"


def _groups(name: str, groups: Sequence[Mapping[str, Any]], made: str) -> list[str]:
    if not groups:
        return []
    heads = (name[:-1], "tasks", "done", "failed", "pending", f"mean seconds a {made[:-1]}")
    rows = (
        (group["name"], *(number(group[key]) for key in heads[1:5]), duration(group["mean_seconds"]))
        for group in groups
    )
    return [f"## {name.capitalize()}", table(heads, rows, len(groups))]


def _failures(summary: Mapping[str, Any]) -> list[str]:
    total, failures = summary["failures"]["total"], summary["failures"]["rows"]
    if not total:
        return []
    kinds = ", ".join(f"{number(count)} {kind}" for kind, count in summary["failed_by_kind"].items())
    rows = ((row["id"], row["kind"] or "", row["message"] or "", number(row["attempts"])) for row in failures)
    return ["## Failures", f"{kinds}.", table(("task", "kind", "reason", "tries"), rows, total)]


def _skipped(skipped: Mapping[str, Any]) -> list[str]:
    if not skipped["total"]:
        return []
    rows = ((row["place"], row["reason"]) for row in skipped["rows"])
    return ["## Skipped rows", table(("row", "reason"), rows, skipped["total"])]


def _flags(flags: Mapping[str, Any]) -> list[str]:
    if not flags["total"]:
        return []
    rows = ((row["id"], ", ".join(row["flags"]), row["path"] or "–") for row in flags["rows"])
    return ["## Flagged pictures", table(("task", "flags", "path"), rows, flags["total"])]


def status(word: str) -> str:
    """A run's status in the ledger, as people understand it."""
    return STATUS.get(word, word.replace("_", " "))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], total: int) -> str:
    """A table of the first `LISTED` of `total` rows."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for shown, row in enumerate(rows):
        if shown == LISTED:
            lines.append(f"\n… and {number(total - LISTED)} more.")
            break
        lines.append(f"| {' | '.join(one_line(cut(cell, 500)) for cell in row)} |")
    return "\n".join(lines)


def one_line(text: str) -> str:
    """Any text as one line that Markdown shows as it stands."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))
