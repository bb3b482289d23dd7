"""The two kinds of output folders, of runs and of evaluations: both keep reports under the same names, so neither works in
the other's."""

from __future__ import annotations

from pathlib import Path

from imagemill.errors import InputError
from imagemill.ledger import FILE_NAME

EDITS, JUDGMENTS = "edits", "judgments"
"""Folders inside that of an evaluation: its two runs."""


def refuse_evaluation(folder: Path) -> None:
    """Raises `InputError` where an evaluation has judged: a run would write its reports over those."""
    if (folder / JUDGMENTS / FILE_NAME).is_file():
        raise InputError(f"{folder}: holds an evaluation, whose report a run would replace; give the run another --out")


def refuse_run(folder: Path) -> None:
    """Raises `InputError` where a run keeps its books: an evaluation would write its reports over those."""
    if (folder / FILE_NAME).is_file():
        raise InputError(
            f"{folder}: holds a run, whose report an evaluation would replace; give the evaluation another --out"
        )
