"""The reports of a folder, rebuilt from its ledger alone: results.jsonl, report.json, report.md and report.html.

The picture files are opened for thumbnails only. Nothing depends on the clock, so the same ledger and the same pictures
give the same bytes. Rows are streamed: memory does not grow with the number of tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagemill.crashpoints import crash_point
from imagemill.errors import InputError
from imagemill.ledger import FILE_NAME, Ledger
from imagemill.report.drafts import Drafts
from imagemill.report.gallery import Gallery
from imagemill.report.markdown import markdown
from imagemill.report.page import page
from imagemill.report.results import results, snapshot
from imagemill.report.runs import read_runs
from imagemill.report.tally import Tally, read_skipped, summarise

RESULTS, DATA, MARKDOWN, PAGE = "results.jsonl", "report.json", "report.md", "report.html"


@dataclass(frozen=True, slots=True)
class Reports:
    """Where the reports of a folder are. `summary` is the content of report.json."""

    results: Path
    data: Path
    markdown: Path
    page: Path
    summary: Mapping[str, Any]


def write_reports(folder: Path) -> Reports:
    """Write the four reports of an output folder anew, each under its own name only when all are whole.

    Works while a run is going on (the reports show one moment of it) and after a run that died. Raises `InputError`
    when the folder or its ledger is not there, `LedgerError` when the ledger does not read, and `OutputError` when the
    folder cannot be written.
    """
    crash_point("before-report")
    ledger = _open(folder)
    try:
        with snapshot(ledger), Drafts(folder) as drafts:
            tally, gallery = Tally(), Gallery(ledger, folder)
            with drafts.open(RESULTS) as out:
                for result in results(ledger):
                    out.write(json.dumps(result, ensure_ascii=False, separators=(",", ":")) + "\n")
                    tally.add(result)
                    gallery.add(result)
            runs = read_runs(ledger)
            summary = summarise(tally, runs, read_skipped(ledger))
            drafts.write(DATA, json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
            drafts.write(MARKDOWN, markdown(folder.resolve().name, summary))
            drafts.write(PAGE, page(folder.resolve().name, summary, runs, gallery))
    finally:
        ledger.close()
    crash_point("after-report")
    return Reports(folder / RESULTS, folder / DATA, folder / MARKDOWN, folder / PAGE, summary)


def _open(folder: Path) -> Ledger:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give the --out folder of a run")
    if not (folder / FILE_NAME).is_file():
        raise InputError(f"{folder} holds no {FILE_NAME}; give the --out folder of a run")
    return Ledger(folder / FILE_NAME, read_only=True)
