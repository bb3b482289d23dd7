"""One result a task: the lines of results.jsonl, read from the ledger one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from imagemill.ledger import Ledger

TASK_FIELDS = (
    *("prompt", "negative_prompt", "images", "model", "width", "height", "steps", "guidance_scale", "true_cfg_scale"),
    *("seed", "loras"),
)

QUERY = (
    "SELECT id, fingerprint, task, state, kind, message, attempts, worker, elapsed, receipt "
    "FROM tasks ORDER BY run, position, id"
)


@contextmanager
def snapshot(ledger: Ledger) -> Iterator[None]:
    """All reads inside see the ledger as it was at the start, though a run goes on writing.

    An unfinished SELECT keeps SQLite's read transaction open, and all statements of a connection share it
    (https://www.sqlite.org/isolation.html). Python may read one row ahead, hence three rows where one is taken.
    """
    held = ledger.rows("SELECT value FROM meta, (SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3) WHERE key = 'version'")
    next(held)
    try:
        yield
    finally:
        held.close()  # type: ignore[attr-defined]


def results(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Every task of the folder in the order of its source, those of an older source first.

    `path` is where the picture of a done task is, relative to the folder; None for any other, and where no file was kept.
    """
    for row in ledger.rows(QUERY):
        yield _result(row)


def _result(row: dict[str, Any]) -> dict[str, Any]:
    task = json.loads(row["task"])
    settled = row["state"] != "pending"  # a task that is to be done again still carries its last outcome
    receipt = json.loads(row["receipt"]) if row["state"] == "done" and row["receipt"] else {}
    return {
        "id": row["id"],
        "state": row["state"],
        "path": receipt.get("path") or None,
        **{name: task.get(name) for name in TASK_FIELDS},
        "attempts": row["attempts"],
        "worker": row["worker"] if settled else None,
        "kind": row["kind"] if settled else None,
        "message": row["message"] if settled else None,
        "elapsed": row["elapsed"] if settled else None,
        "sha256": receipt.get("sha256") or None,
        "bytes": receipt.get("bytes") or None,
        "batch_size": receipt.get("batch_size"),
        "seconds": receipt.get("seconds") or {},
        "flags": receipt.get("flags") or [],
        "metadata": task.get("metadata") or {},
        "fingerprint": row["fingerprint"],
        **({"system_prompt": task["system_prompt"]} if task.get("system_prompt") is not None else {}),
        **({"answer": receipt["answer"]} if receipt.get("answer") else {}),
    }
