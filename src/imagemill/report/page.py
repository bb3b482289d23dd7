"""report.html: one page without network, to look at and to show around."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from imagemill.report import figures
from imagemill.report.gallery import Gallery
from imagemill.report.lanes import Lane
from imagemill.report.markdown import last_tuning, products, status, tuned
from imagemill.report.runs import Run

TEMPLATE = "report.html.j2"
ROWS = 200
"""Failures, skipped rows and groups that the page shows; report.json has more."""

TIMELINES = 4
"""The latest runs in which a worker did something get a timeline."""

LISTED_RUNS = 20
LANE = 16
"""Height of a worker's strip, in the same units as `lanes.WIDTH`; the page stretches it."""

STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400)
"""Seconds between the marks of a timeline."""

LAYERS = (("load", "loading"), ("done", ""), ("failed", "failed tries"), ("lost", "worker lost"))
"""Kinds of blocks in the order they are painted, and what the legend calls them; what is done by what was made."""


def page(title: str, summary: Mapping[str, Any], runs: Sequence[Run], gallery: Gallery) -> str:
    """The page as text, below 10 MB whatever the ledger holds."""
    environment = Environment(
        loader=PackageLoader("imagemill", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("duration", "rate", "number", "clock", "cut"):
        environment.filters[name] = getattr(figures, name)
    environment.filters["status"] = status
    environment.filters["plain"] = _plain
    made = products(summary)
    active = [run for run in runs if any(lane.strips for lane in run.lanes.values())]
    return environment.get_template(TEMPLATE).render(
        title=title,
        summary=summary,
        gallery=gallery,
        made=made,
        tiles=_tiles(summary, runs, made),
        facts=_facts(summary, active, made),
        runs=[run.as_json() for run in runs[: -LISTED_RUNS - 1 : -1]],
        changes=[(run.number, note) for run in reversed(runs) for note in run.notes],
        tuning=[(name, tuned(how)) for name, how in last_tuning(summary["runs"]).items()],
        timelines=[_timeline(run) for run in active[: -TIMELINES - 1 : -1]],
        layers=[(name, label or made) for name, label in LAYERS],
        lane_height=LANE,
        rows=ROWS,
        one_model=len(summary["models"]) == 1,
    )


def _tiles(summary: Mapping[str, Any], runs: Sequence[Run], made: str) -> list[tuple[str, str, str]]:
    """(label, figure, class) of the header."""
    tasks = summary["tasks"]
    steady = [run.steady for run in runs if run.pictures and run.steady]
    tiles = [(name, figures.number(tasks[name]), name) for name in ("done", "failed", "pending")]
    tiles.append(("skipped", figures.number(summary["skipped"]["total"]), "skipped"))
    tiles.append((f"{made} / s", figures.rate(summary["pictures_per_second"]), ""))
    if steady:
        tiles.append(("while at work", figures.rate(steady[-1]), ""))
    tiles.append(("wall time", figures.duration(summary["wall_seconds"]), ""))
    return tiles


def _facts(summary: Mapping[str, Any], active: Sequence[Run], made: str) -> list[tuple[str, str]]:
    """Short facts under the tiles; what is not known is left out."""
    names = [group["name"] for group in summary["models"]]
    found = [("Model" if len(names) == 1 else "Models", ", ".join(names[:3]) + (" …" if len(names) > 3 else ""))]
    if active:
        last = active[-1]
        labels = [lane.label for _, lane in sorted(last.lanes.items())]
        found.append(("Policy", last.policy))
        shown = ", ".join(labels) if len(labels) <= 4 else f"{labels[0]} to {labels[-1]}"
        found.append(("Workers", f"{len(labels)} ({shown})"))
        first = last.stats.get("first_picture_s")
        found.append((f"First {made[:-1]} after", figures.duration(first) if first is not None else ""))
    if len(summary["runs"]) > 1:
        found.append(("Runs", figures.number(len(summary["runs"]))))
    if summary["retried"]:
        found.append(("Done after another try", figures.number(summary["retried"])))
    return [(name, text) for name, text in found if text]


def _timeline(run: Run) -> dict[str, Any]:
    lanes = [lane for _, lane in sorted(run.lanes.items())]
    return {
        "run": run.as_json(),
        "ticks": _ticks(run.seconds),
        "kinds": [name for name, _ in LAYERS if any(name in lane.strips for lane in lanes)],
        "lanes": [
            {"facts": lane.as_json(), "share": min(1.0, lane.busy / lane.seconds), "paths": _paths(lane)}
            for lane in lanes
        ],
    }


def _ticks(seconds: float) -> list[tuple[float, str]]:
    """(place in percent, label) of round times, at most six of them."""
    step = next((step for step in STEPS if seconds / step <= 5), seconds / 5)
    count = int(seconds / step) if step else 0
    return [
        (round(100 * i * step / seconds, 2), figures.duration(i * step) if i else "0")
        for i in range(count + 1)
        if seconds
    ]


def _paths(lane: Lane) -> list[tuple[str, str]]:
    return [(name, lane.strips[name].path(LANE)) for name, _ in LAYERS if name in lane.strips]


def _plain(value: Any) -> str:
    """A setting as short text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return figures.cut(text, 300)
