"""The one call of the library: a source in, pictures and a report out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from imagemill.engine import Engine
from imagemill.records import Task
from imagemill.report import write_reports
from imagemill.sitting import RunOptions, RunReport


def run(
    source: str | os.PathLike[str] | Iterable[Task | Mapping[str, Any] | str],
    out: str | os.PathLike[str] | None = None,
    *,
    options: RunOptions | None = None,
    **settings: Any,
) -> RunReport:
    """Run a source to its end and write the report; the call behind `imagemill run`.

    `settings` are those of `Engine`. Returns what became of the tasks; failures of tasks are counted, not raised.
    """
    with Engine(keep=False, **settings) as engine:
        folder = Path(out) if out is not None else engine.default_folder(source)
        for _ in engine.run(source, folder, options):
            pass
        report = engine.report
    write_reports(folder)
    if report is None:
        raise RuntimeError("the run ended without a report")
    return report
