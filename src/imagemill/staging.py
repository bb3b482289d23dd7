"""Tasks on their way into a ledger: staged beside it, compared with what it holds, then applied all at once.

Staging lies in SQLite's temporary storage, so that a million rows need no memory and a plan changes nothing on disk.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from imagemill import former, wire
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
FORGET = "DROP VIEW IF EXISTS temp.standing; DROP TABLE IF EXISTS temp.incoming;"
STAGING = f"""
{FORGET}
CREATE TEMP TABLE incoming (
    position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, fingerprint TEXT NOT NULL, task TEXT NOT NULL,
    needs TEXT NOT NULL, batch_group TEXT NOT NULL, cost REAL NOT NULL, path TEXT NOT NULL,
    path_key TEXT NOT NULL UNIQUE, place TEXT NOT NULL, guidance TEXT NOT NULL, {former.MARKS});
CREATE TEMP VIEW standing AS
    SELECT i.*, t.task AS known,
        CASE WHEN t.id IS NULL THEN 'new' WHEN i.was THEN f.state WHEN {former.DIFFERS} THEN 'changed' ELSE t.state
        END AS state,
        CASE WHEN i.was THEN f.kind ELSE t.kind END AS kind,
        CASE WHEN i.was THEN f.receipt ELSE t.receipt END AS receipt
    FROM incoming i LEFT JOIN tasks t ON t.id = i.id LEFT JOIN former f ON i.was AND {former.IS_FORMER};
"""
"""`incoming` are the staged rows, with the marks of those that go back (former.py). `standing` is each of them with what it is
to the folder: `new`, `changed`, or the state, the kind of failure and the receipt that are booked for it."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a source holds against what the folder already knows. `changed` are tasks with other content under old ids; `moved`
    of them get another name, so that their old pictures stay beside the new ones."""

    total: int
    new: int
    pending: int
    done: int
    failed: Mapping[str, int]
    changed: int
    differences: tuple[str, ...]
    moved: int = 0

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
        cursor = self._db.execute("INSERT OR IGNORE INTO incoming VALUES (?,?,?,?,?,?,?,?,?,?,?,0,0)", values)
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
    def recall(self, damaged: Callable[[Iterable[tuple[str, str, str]]], Iterable[str]], *, files: bool) -> None:
        """Take each row that goes back to what its task was as what it was then, unless its picture has been replaced.

        `damaged` tells the ids of pictures (id, path, sha256) that are no longer whole: those stay changed, and so do, where
        `files` are wanted, tasks whose pictures were not kept.
        """
        former.mark(self._db, files=files)
        former.unmark(self._db, list(damaged(former.pictures(self._db))))

    @staged()
    def compare(self) -> Comparison:
        """What the staged rows mean for this folder. Reads only."""
        db = self._db
        states = dict(db.execute("SELECT state, count(*) FROM standing GROUP BY state"))
        failed = dict(db.execute("SELECT kind, count(*) FROM standing WHERE state = 'failed' GROUP BY kind"))
        moved = "state = 'changed' AND json_extract(receipt, '$.path') NOT IN ('', path)"
        changed = "SELECT place, id, known, task FROM standing WHERE state = 'changed' ORDER BY position LIMIT ?"
        shown: list[str] = []
        for place, name, old, new in db.execute(changed, (SHOWN,)):
            parts = differences(json.loads(old), json.loads(new)) or [_unseen(json.loads(new))]
            shown.append(f"{place} (id {name!r}): {'; '.join(parts)}")
        return Comparison(
            total=sum(states.values()),
            new=states.get("new", 0),
            pending=states.get("pending", 0),
            done=states.get("done", 0),
            failed=failed,
            changed=states.get("changed", 0),
            differences=tuple(shown),
            moved=db.execute(f"SELECT count(*) FROM standing WHERE {moved}").fetchone()[0],
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
        """(id, path, sha256) of every staged task that the folder holds as done; not of those that `recall` has looked at."""
        with staged():
            yield from self._db.execute(
                "SELECT id, path, json_extract(receipt, '$.sha256') FROM standing WHERE state = 'done' AND NOT was"
            )

    def settled(self) -> Iterator[tuple[str, str]]:
        """(id, kind of failure) of every staged task that the folder holds as done, with an empty kind, or as failed."""
        with staged():
            yield from self._db.execute("SELECT id, ifnull(kind, '') FROM standing WHERE state IN ('done', 'failed')")

    def unkept(self) -> Iterator[str]:
        """The id of every staged task that a run with the sink `none` has done: its picture was not kept."""
        with staged():
            rows = self._db.execute(
                "SELECT id FROM standing WHERE state = 'done' "
                "AND json_extract(receipt, '$.sha256') = '' AND json_extract(receipt, '$.answer') IS NULL"
            )
            for (name,) in rows:
                yield name

    def new(self) -> Iterator[tuple[str, str]]:
        """(place, path) of every staged task whose path is that of no task the folder knows, nor holds its own older picture."""
        with staged():
            yield from self._db.execute(
                "SELECT place, path FROM incoming i WHERE NOT own "
                "AND NOT EXISTS (SELECT 1 FROM tasks t WHERE t.path_key = i.path_key) ORDER BY position"
            )

    def tasks(self) -> Iterator[tuple[PlannedTask, str, str]]:
        """(task, state, kind of failure) of every staged task in order; the state is `new`, `changed` or what is known."""
        with staged():
            rows = self._db.execute(
                "SELECT position, fingerprint, task, needs, batch_group, cost, state, ifnull(kind, '') "
                "FROM standing ORDER BY position"
            )
            for position, print_, task, needs, group, cost, state, kind in rows:
                yield from_row(position, print_, task, needs, group, cost), state, kind

    @writing()
    def apply(self, run: int, *, retry: Sequence[str] = (), again: Iterable[str] = ()) -> None:
        """Make the staged rows the work of the run: new and changed ones, and what is to be done again.

        `retry` are kinds of failures to try again, `again` ids that are to be done once more: what is booked for them is found
        again, if its picture is whole, until another is booked.
        """
        db = self._db
        former.keep(db)
        # A changed task may take the path of another changed one: free all their paths before any is set.
        db.execute(
            "UPDATE tasks SET path_key = char(0) || tasks.id FROM incoming i WHERE i.id = tasks.id AND i.path != tasks.path"
        )
        db.execute(
            "UPDATE tasks AS t SET state = 'pending', fingerprint = i.fingerprint, task = i.task, path = i.path, "
            "path_key = i.path_key, attempts = 0, receipt = NULL, kind = NULL, message = NULL "
            f"FROM incoming i WHERE i.id = t.id AND {former.DIFFERS}"
        )
        former.bring_back(db)
        again = tuple(again)
        former.keep_done(db, again)
        reopen = "UPDATE tasks SET state = 'pending', kind = NULL, message = NULL, receipt = NULL, elapsed = NULL"
        db.executemany(f"{reopen} WHERE id = ?", ((name,) for name in again))
        db.executemany(
            f"{reopen} WHERE state = 'failed' AND kind = ? AND id IN (SELECT id FROM incoming)",
            ((kind,) for kind in retry),
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
        db.executescript(FORGET)

    def abandon(self) -> None:
        """Forget what was staged."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
