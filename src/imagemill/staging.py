"""Tasks on their way into a ledger: staged beside it, compared with what it holds, then applied all at once.

Staging lies in SQLite's temporary storage, so that a million rows need no memory and a plan changes nothing on disk.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from imagemill import wire
from imagemill.changes import differences
from imagemill.errors import LedgerError, OutputError
from imagemill.guidance import Guidance, guidance
from imagemill.plan import Problem, adapters_need, length
from imagemill.records import PlannedTask, Ticket

MAX_TASK = 512 * 1024
"""Bytes of a task as JSON: it travels to a worker, and 64 of them must fit into one frame."""

SHOWN = 20
"""How many rows of a long list an error shows in full."""

TASK_COLUMNS = "position, id, fingerprint, task, needs, batch_group, cost, path, path_key"
STAGING = """
DROP TABLE IF EXISTS temp.incoming;
CREATE TEMP TABLE incoming (
    position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, fingerprint TEXT NOT NULL, task TEXT NOT NULL,
    needs TEXT NOT NULL, batch_group TEXT NOT NULL, cost REAL NOT NULL, path TEXT NOT NULL,
    path_key TEXT NOT NULL UNIQUE, place TEXT NOT NULL, guidance TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a source holds against what the folder already knows. `changed` are tasks with other content under old ids."""

    total: int
    new: int
    pending: int
    done: int
    failed: Mapping[str, int]
    changed: int
    differences: tuple[str, ...]

    def to_do(self, retry: Sequence[str] = ()) -> int:
        """How many pictures a run makes that tries these kinds of failures again; damaged ones come on top."""
        return self.new + self.pending + self.changed + sum(self.failed.get(kind, 0) for kind in retry)


@dataclass(frozen=True, slots=True)
class Shape:
    """Staged tasks of one model and one shape (the first and the last of their needs); `cost` is that of all together.

    `guidance` are the kinds there are among them, `adapters` says whether any has one.
    """

    model: str
    shape: str
    tasks: int
    cost: float
    guidance: tuple[Guidance, ...] = ()
    adapters: bool = False


@contextmanager
def writing() -> Iterator[None]:
    """What SQLite says when the ledger cannot be written ends the run as `OutputError`."""
    try:
        yield
    except sqlite3.Error as error:
        raise OutputError(f"the ledger cannot be written: {error}") from error


@contextmanager
def staged() -> Iterator[None]:
    """What SQLite says of staged rows: their temporary file cannot be written, or the ledger beside them does not read."""
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise OutputError(
                f"the tasks cannot be staged in SQLite's temporary files: {error}; make room there, or name another folder "
                "in SQLITE_TMPDIR"
            ) from error
        raise LedgerError(
            f"the ledger does not read ({error}); `imagemill repair` rebuilds it from the pictures"
        ) from error


def _unseen(task: Mapping[str, Any]) -> str:
    """What has changed of a task whose fields are the same."""
    return f"the model, or {'a picture it edits' if task.get('images') else 'a file it reads'}, has changed"


def from_row(position: int, fingerprint: str, text: str, needs: str, group: str, cost: float) -> PlannedTask:
    """The planned task of a row; `text` is the task as JSON, `needs` is a JSON list."""
    task = wire.task_from_json(text)
    return PlannedTask(task, fingerprint, Ticket(position, tuple(json.loads(needs)), group, cost, length(task)))


class Staging:
    """The staged rows of an open ledger; `begin` opens a transaction that `apply` commits and `abandon` rolls back."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    @staged()
    def begin(self) -> None:
        """Forget what was staged and take new rows; nothing of the folder changes until `apply`."""
        self._db.executescript(STAGING)
        self._db.execute("BEGIN")

    @staged()
    def add(self, planned: PlannedTask, place: str) -> Problem | None:
        """Take one task in. Returns what is wrong when its id or path is taken by an earlier row, and leaves it out."""
        task, ticket = planned.task, planned.ticket
        path = task.output_path or ""
        text = wire.to_json(task)
        if len(text) > MAX_TASK:
            return Problem(
                "metadata", f"the row has {len(text):,} bytes; at most {MAX_TASK:,} are taken, leave columns out"
            )
        kind = json.dumps(guidance(task.guidance_scale, task.true_cfg_scale, task.negative_prompt))
        values = (ticket.seq, task.id, planned.fingerprint, text.decode(), json.dumps(ticket.needs))
        values += (ticket.group, ticket.cost, path, path.casefold(), place, kind)  # type: ignore[assignment]
        cursor = self._db.execute("INSERT OR IGNORE INTO incoming VALUES (?,?,?,?,?,?,?,?,?,?,?)", values)
        if cursor.rowcount == 1:
            return None
        other = self._db.execute("SELECT place FROM incoming WHERE id = ?", (task.id,)).fetchone()
        if other:
            return Problem("id", f"{task.id!r} is already that of {other[0]}; give each row its own")
        row = self._db.execute("SELECT place, path FROM incoming WHERE path_key = ?", (path.casefold(),)).fetchone()
        same = "" if row[1] == path else f" (up to case: {row[1]!r})"
        return Problem("output_path", f"{path!r} is already that of {row[0]}{same}; give each row its own")

    @staged()
    def take_back(self, position: int) -> None:
        """Take back what was staged from this position on."""
        self._db.execute("DELETE FROM incoming WHERE position >= ?", (position,))

    @staged()
    def compare(self) -> Comparison:
        """What the staged rows mean for this folder. Reads only."""
        db = self._db
        total = db.execute("SELECT count(*) FROM incoming").fetchone()[0]
        joined = "FROM incoming i JOIN tasks t USING (id)"
        same = "i.fingerprint = t.fingerprint AND i.path = t.path"
        states = dict(db.execute(f"SELECT t.state, count(*) {joined} WHERE {same} GROUP BY t.state"))
        failed = dict(
            db.execute(f"SELECT t.kind, count(*) {joined} WHERE {same} AND t.state = 'failed' GROUP BY t.kind")
        )
        rows = db.execute(f"SELECT i.place, i.id, t.task, i.task {joined} WHERE NOT ({same}) ORDER BY i.position")
        shown: list[str] = []
        changed = 0
        for place, name, old, new in rows:
            changed += 1
            if len(shown) < SHOWN:
                parts = differences(json.loads(old), json.loads(new)) or [_unseen(json.loads(new))]
                shown.append(f"{place} (id {name!r}): {'; '.join(parts)}")
        known = sum(states.values())
        return Comparison(
            total=total,
            new=total - known - changed,
            pending=states.get("pending", 0),
            done=states.get("done", 0),
            failed=failed,
            changed=changed,
            differences=tuple(shown),
        )

    def shapes(self) -> Iterator[Shape]:
        """What is staged, counted by model and shape: all of it, done or not."""
        with staged():
            rows = self._db.execute(
                "SELECT json_extract(needs, '$[0]') AS model, json_extract(needs, '$[2]') AS shape, count(*), sum(cost), "
                "group_concat(DISTINCT guidance), max(ifnull(json_extract(needs, '$[1]') != ?, 1)) "
                "FROM incoming GROUP BY model, shape ORDER BY model, count(*) DESC, shape",
                (adapters_need(()),),
            )
            for model, shape, tasks, cost, kinds, adapters in rows:
                found = tuple(Guidance(*kind) for kind in json.loads(f"[{kinds}]"))
                yield Shape(model, shape, tasks, cost, found, bool(adapters))

    @staged()
    def conflicts(self, run: int) -> list[str]:
        """Staged rows whose path belongs to a task of an earlier source, or whose id the run has had already."""
        rows = self._db.execute(
            "SELECT i.place, i.path, t.id FROM incoming i JOIN tasks t USING (path_key) WHERE t.id != i.id "
            "AND t.id NOT IN (SELECT id FROM incoming) ORDER BY i.position"
        )
        found = [
            f"{place}: output_path {path!r} holds the picture of task {name!r} of an earlier run"
            for place, path, name in rows
        ]
        again = self._db.execute(
            "SELECT i.place, i.id FROM incoming i JOIN tasks t USING (id) WHERE t.run = ? ORDER BY i.position",
            (run or -1,),
        )
        return found + [
            f"{place}: id {name!r} came before in this run; give each task its own" for place, name in again
        ]

    def done(self) -> Iterator[tuple[str, str, str]]:
        """(id, path, sha256) of every staged task that the folder holds as done."""
        with staged():
            rows = self._db.execute(
                "SELECT t.id, t.path, json_extract(t.receipt, '$.sha256') FROM incoming i JOIN tasks t USING (id) "
                "WHERE t.state = 'done' AND i.fingerprint = t.fingerprint AND i.path = t.path"
            )
            yield from rows

    def settled(self) -> Iterator[tuple[str, str]]:
        """(id, kind of failure) of every staged task that the folder holds as done, with an empty kind, or as failed."""
        with staged():
            yield from self._db.execute(
                "SELECT t.id, ifnull(t.kind, '') FROM incoming i JOIN tasks t USING (id) "
                "WHERE t.state != 'pending' AND i.fingerprint = t.fingerprint AND i.path = t.path"
            )

    def unkept(self) -> Iterator[str]:
        """The id of every staged task that a run with the sink `none` has done: its picture was not kept."""
        with staged():
            rows = self._db.execute(
                "SELECT t.id FROM incoming i JOIN tasks t USING (id) "
                "WHERE t.state = 'done' AND i.fingerprint = t.fingerprint AND i.path = t.path "
                "AND json_extract(t.receipt, '$.sha256') = '' AND json_extract(t.receipt, '$.answer') IS NULL"
            )
            for (name,) in rows:
                yield name

    def new(self) -> Iterator[tuple[str, str]]:
        """(place, path) of every staged task whose path is that of no task the folder knows."""
        with staged():
            yield from self._db.execute(
                "SELECT place, path FROM incoming i "
                "WHERE NOT EXISTS (SELECT 1 FROM tasks t WHERE t.path_key = i.path_key) ORDER BY position"
            )

    def tasks(self) -> Iterator[tuple[PlannedTask, str, str]]:
        """(task, state, kind of failure) of every staged task in order; the state is `new`, `changed` or what is known."""
        with staged():
            rows = self._db.execute(
                "SELECT i.position, i.fingerprint, i.task, i.needs, i.batch_group, i.cost, CASE WHEN t.id IS NULL THEN 'new' "
                "WHEN i.fingerprint != t.fingerprint OR i.path != t.path THEN 'changed' ELSE t.state END, ifnull(t.kind, '') "
                "FROM incoming i LEFT JOIN tasks t USING (id) ORDER BY i.position"
            )
            for position, print_, task, needs, group, cost, state, kind in rows:
                yield from_row(position, print_, task, needs, group, cost), state, kind

    @writing()
    def apply(self, run: int, *, retry: Sequence[str] = (), again: Iterable[str] = ()) -> None:
        """Make the staged rows the work of the run: new and changed ones, and what is to be done again.

        `retry` are kinds of failures to try again, `again` ids whose pictures are gone or altered.
        """
        db = self._db
        reopen = "UPDATE tasks SET state = 'pending', kind = NULL, message = NULL, receipt = NULL, elapsed = NULL"
        db.executemany(f"{reopen} WHERE id = ?", ((name,) for name in again))
        db.executemany(
            f"{reopen} WHERE state = 'failed' AND kind = ? AND id IN (SELECT id FROM incoming)",
            ((kind,) for kind in retry),
        )
        # A changed task may take the path of another changed one: free all their paths before any is set.
        differs = "(i.fingerprint != tasks.fingerprint OR i.path != tasks.path)"
        db.execute(
            "UPDATE tasks SET path_key = char(0) || tasks.id FROM incoming i WHERE i.id = tasks.id AND i.path != tasks.path"
        )
        db.execute(
            "UPDATE tasks SET state = 'pending', fingerprint = i.fingerprint, task = i.task, path = i.path, "
            f"path_key = i.path_key, attempts = 0, receipt = NULL, kind = NULL, message = NULL "
            f"FROM incoming i WHERE i.id = tasks.id AND {differs}"
        )
        db.execute(
            "UPDATE tasks SET run = ?, position = i.position, task = i.task, needs = i.needs, "
            "batch_group = i.batch_group, cost = i.cost FROM incoming i WHERE i.id = tasks.id",
            (run,),
        )
        db.execute(
            f"INSERT INTO tasks (run, {TASK_COLUMNS}) SELECT ?, {TASK_COLUMNS} FROM incoming i "
            "WHERE NOT EXISTS (SELECT 1 FROM tasks t WHERE t.id = i.id)",
            (run,),
        )
        db.execute("COMMIT")
        db.execute("DROP TABLE temp.incoming")

    def abandon(self) -> None:
        """Forget what was staged."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
