"""report.html of an evaluation: one page without network, in the look of a run's report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from imagemill.report import figures
from imagemill.scoring.report import chart, words
from imagemill.scoring.report.data import sub_scores
from imagemill.scoring.report.sheets import Sheet
from imagemill.scoring.report.text import flat

TEMPLATE = "eval.html.j2"
ROWS = 200
"""Items without a score that the page lists; report.json has more."""


def page(title: str, summary: Mapping[str, Any], sheets: Sequence[Sheet]) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("imagemill", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("duration", "number", "cut"):
        environment.filters[name] = getattr(figures, name)
    environment.filters["score"] = partial(words.score, scale=summary["scale"])
    environment.filters["span"] = partial(words.span, scale=summary["scale"])
    environment.filters["share"] = words.share
    environment.filters["plain"] = _plain
    return environment.get_template(TEMPLATE).render(
        title=title,
        summary=summary,
        sheets=sheets,
        tiles=_tiles(summary),
        chart=chart.rows(summary),
        ticks=chart.ticks(summary["scale"]),
        sub_scores=sub_scores(summary),
        figure=words.figure,
        few_sources=words.few_sources(summary),
        statuses=words.STATUS,
        control_names=words.CONTROL,
        manifest=flat(summary["manifest"]),
        rows=ROWS,
    )


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, figure, class) of the header."""
    scale, overall = summary["scale"], summary["overall"]
    tiles = [
        (f"mean {summary['headline']}", words.score(overall["mean"], scale), "done"),
        ("95 % interval", words.span(overall["interval"], scale), ""),
        ("macro mean", words.score(summary["macro_mean"], scale), ""),
        ("items", figures.number(summary["items"]), ""),
        ("coverage", words.share(summary["coverage"]), "" if summary["covered"] else "failed"),
    ]
    return tiles + ([("no edit", figures.number(failed), "failed")] if (failed := summary["edits"]["failed"]) else [])


def _plain(value: Any) -> str:
    """A setting as text."""
    return figures.cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 400)
