"""The reports of an evaluation: judgments.jsonl, report.json, report.md and report.html, written together or not at all.

Everything in them hangs on the benchmark, the models and the settings alone, so a resumed evaluation gives the same bytes
as an unbroken one. What hangs on the clock, or on how often it was interrupted, stands apart: `timing` in report.json, the
last section of report.md and report.html, and every `seconds` in judgments.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imagemill.report.drafts import Drafts
from imagemill.scoring.report.data import Facts, title, write_up
from imagemill.scoring.report.page import page
from imagemill.scoring.report.sheets import sheets, without_links
from imagemill.scoring.report.text import markdown
from imagemill.scoring.settlement import Settled

__all__ = ["DATA", "JUDGMENTS", "MARKDOWN", "PAGE", "Facts", "Reports", "write_eval_reports"]

JUDGMENTS, DATA, MARKDOWN, PAGE = "judgments.jsonl", "report.json", "report.md", "report.html"


@dataclass(frozen=True, slots=True)
class Reports:
    """Where the reports of an evaluation are. `summary` is the content of report.json."""

    judgments: Path
    data: Path
    markdown: Path
    page: Path
    summary: Mapping[str, Any]


def write_eval_reports(folder: Path, settled: Sequence[Settled], facts: Facts) -> Reports:
    """Write the four reports of an evaluation anew. Edits that are not kept have their small picture in the page, and no path.

    Raises `OutputError` when the folder cannot be written.
    """
    summary, name = write_up(settled, facts), title(facts)
    cards = sheets(folder, settled, facts.examiner)
    if not facts.settings.save_images:
        settled = [replace(one, edit="") for one in settled]
        cards = [without_links(sheet) for sheet in cards]
    with Drafts(folder) as drafts:
        with drafts.open(JUDGMENTS) as out:
            for one in settled:
                out.write(json.dumps(one.as_json(), ensure_ascii=False, separators=(",", ":")) + "\n")
        drafts.write(DATA, json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
        drafts.write(MARKDOWN, markdown(name, summary))
        drafts.write(PAGE, page(name, summary, cards))
    return Reports(folder / JUDGMENTS, folder / DATA, folder / MARKDOWN, folder / PAGE, summary)
