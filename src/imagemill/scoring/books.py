"""What the ledgers of the two stages tell: answers of earlier runs, and the times, loads and idle seconds of the workers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagemill.ledger import FILE_NAME, Ledger
from imagemill.records import Answer, Outcome, Receipt, Task
from imagemill.report.runs import Run, read_runs

SETTLED = "SELECT id, state, kind, message, receipt FROM tasks WHERE state != 'pending'"
LOADS = "SELECT count(*) AS loads FROM spans WHERE what = 'load'"
OF_A_RUN = ("run", "status", "started", "ended", "seconds", "policy", "workers", "lost")


def earlier(folder: Path) -> dict[str, Outcome]:
    """What the judge's ledger holds as settled, by task: state, kind and answer alone."""
    if not (folder / FILE_NAME).is_file():
        return {}
    ledger = Ledger(folder / FILE_NAME, read_only=True)
    try:
        return {row["id"]: _outcome(row) for row in ledger.rows(SETTLED)}
    finally:
        ledger.close()


def _outcome(row: dict[str, Any]) -> Outcome:
    receipt = None
    if row["state"] == "done":
        answer = json.loads(row["receipt"]).get("answer")
        receipt = Receipt(0, 0, 0, 0, answer=Answer(**answer) if answer else None)
    task = Task(id=row["id"], prompt="")
    return Outcome(task, 0, row["state"], kind=row["kind"], message=row["message"] or "", receipt=receipt)


def stage_times(folder: Path) -> dict[str, Any]:
    """Of a stage: how often a worker loaded the model, the seconds, and of every run the policy and what it left idle."""
    if not (folder / FILE_NAME).is_file():
        return {"loads": 0, "seconds": 0.0, "idle_seconds": 0.0, "runs": []}
    ledger = Ledger(folder / FILE_NAME, read_only=True)
    try:
        runs = read_runs(ledger)
        loads = int(next(iter(ledger.rows(LOADS)))["loads"])
    finally:
        ledger.close()
    return {
        "loads": loads,
        "seconds": round(sum(run.seconds for run in runs), 3),
        "idle_seconds": round(sum(lane.idle for run in runs for lane in run.lanes.values()), 3),
        "runs": _rows(runs),
    }


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [{name: value for name, value in run.as_json().items() if name in OF_A_RUN} for run in runs]
