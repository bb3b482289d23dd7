"""The ledger: one SQLite file in the output folder that knows every task, attempt and receipt.

The driver alone writes it. Resume and reports read nothing else. Times in it are seconds since the epoch, made from
one reading of the wall clock a run plus the monotonic clock, so that a clock that jumps makes no negative duration.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagemill import wire
from imagemill.errors import LedgerError
from imagemill.plan import Problem, differences
from imagemill.records import Outcome, PlannedTask, Receipt, Settle, Ticket

FILE_NAME = "ledger.sqlite"
VERSION = "1"
SHOWN = 20
"""How many rows of a long list an error shows in full."""

TASK_COLUMNS = "position, id, fingerprint, task, needs, batch_group, cost, path, path_key"
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (
    run INTEGER PRIMARY KEY, started REAL NOT NULL, ended REAL, status TEXT NOT NULL DEFAULT 'running',
    settings TEXT NOT NULL, machine TEXT NOT NULL, stats TEXT NOT NULL DEFAULT '{}');
CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY, run INTEGER NOT NULL, position INTEGER NOT NULL,
    fingerprint TEXT NOT NULL, task TEXT NOT NULL, needs TEXT NOT NULL, batch_group TEXT NOT NULL, cost REAL NOT NULL,
    path TEXT NOT NULL, path_key TEXT NOT NULL UNIQUE, state TEXT NOT NULL DEFAULT 'pending',
    kind TEXT, message TEXT, attempts INTEGER NOT NULL DEFAULT 0, worker INTEGER, elapsed REAL, settled REAL,
    receipt TEXT) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tasks_in_order ON tasks (run, position);
CREATE INDEX IF NOT EXISTS tasks_by_state ON tasks (state);
CREATE TABLE IF NOT EXISTS attempts (
    id TEXT NOT NULL, run INTEGER NOT NULL, attempt INTEGER NOT NULL, worker INTEGER, started REAL, ended REAL,
    kind TEXT, message TEXT, batch_size INTEGER NOT NULL, PRIMARY KEY (id, run, attempt)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spans (
    run INTEGER NOT NULL, worker INTEGER NOT NULL, what TEXT NOT NULL, started REAL NOT NULL, ended REAL NOT NULL,
    note TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS skipped (run INTEGER NOT NULL, place TEXT NOT NULL, reason TEXT NOT NULL);
"""
STAGING = """
DROP TABLE IF EXISTS temp.incoming;
CREATE TEMP TABLE incoming (
    position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, fingerprint TEXT NOT NULL, task TEXT NOT NULL,
    needs TEXT NOT NULL, batch_group TEXT NOT NULL, cost REAL NOT NULL, path TEXT NOT NULL,
    path_key TEXT NOT NULL UNIQUE, place TEXT NOT NULL);
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
class Attempt:
    """One attempt as the engine saw it; times are seconds since the epoch."""

    id: str
    attempt: int
    worker: int | None
    started: float
    ended: float
    kind: str | None
    message: str
    batch_size: int


class Ledger:
    """The open ledger of one folder. Not shared between threads.

    Raises `LedgerError` when the file is damaged, of another version, or no ledger at all.
    """

    def __init__(self, path: Path, *, folder: Path | None = None, read_only: bool = False) -> None:
        self.path = path
        self.folder = folder or path.parent
        self.run = 0
        try:
            name = f"{path.absolute().as_uri()}?mode=ro" if read_only else path
            self._db = sqlite3.connect(name, uri=read_only, isolation_level=None)
            try:
                self._prepare(read_only)
            except BaseException:
                self._db.close()
                raise
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"{path}: the ledger does not read ({error}); move the file away to start over: every picture is then made again"
            ) from error
        self._db.execute("PRAGMA temp_store = FILE")

    def _prepare(self, read_only: bool) -> None:
        """Refuse what is not ours before anything of it is changed; a new file becomes a ledger in one step."""
        new = not read_only and self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is None
        if not new:
            self._check()
        if not read_only:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
        if new:
            self._db.executescript(f"BEGIN; {SCHEMA} INSERT INTO meta VALUES ('version', '{VERSION}'); COMMIT;")

    def _check(self) -> None:
        row = self._db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        if row is None or row[0] != VERSION:
            found = row[0] if row else "none"
            raise LedgerError(
                f"{self.path}: written by another version (ledger format {found}, this one reads {VERSION})"
            )
        # About 2 microseconds a task, and better now than in the middle of a run.
        verdict = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            verdict = " ".join(verdict.split())
            raise LedgerError(f"{self.path}: the ledger is damaged ({verdict}); move it away to start over")

    def close(self) -> None:
        """Close the file; everything committed is on disk."""
        self._db.close()

    # --- taking tasks in -------------------------------------------------------------------------------------------

    def begin_staging(self) -> None:
        """Forget what was staged and take new rows; nothing of the folder changes until `apply`."""
        self._db.executescript(STAGING)
        self._db.execute("BEGIN")

    def stage(self, planned: PlannedTask, place: str) -> Problem | None:
        """Take one task in. Returns what is wrong when its id or path is taken by an earlier row, and leaves it out."""
        task, ticket = planned.task, planned.ticket
        path = task.output_path or ""
        values = (ticket.seq, task.id, planned.fingerprint, wire.to_json(task).decode(), json.dumps(ticket.needs))
        values += (ticket.group, ticket.cost, path, path.casefold(), place)  # type: ignore[assignment]
        cursor = self._db.execute("INSERT OR IGNORE INTO incoming VALUES (?,?,?,?,?,?,?,?,?,?)", values)
        if cursor.rowcount == 1:
            return None
        other = self._db.execute("SELECT place FROM incoming WHERE id = ?", (task.id,)).fetchone()
        if other:
            return Problem("id", f"{task.id!r} is already that of {other[0]}; give each row its own")
        row = self._db.execute("SELECT place, path FROM incoming WHERE path_key = ?", (path.casefold(),)).fetchone()
        same = "" if row[1] == path else f" (up to case: {row[1]!r})"
        return Problem("output_path", f"{path!r} is already that of {row[0]}{same}; give each row its own")

    def unstage(self, position: int) -> None:
        """Take back what was staged from this position on."""
        self._db.execute("DELETE FROM incoming WHERE position >= ?", (position,))

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
                parts = differences(json.loads(old), json.loads(new)) or ["the model, or a file it reads, has changed"]
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

    def conflicts(self) -> list[str]:
        """Staged rows whose path belongs to a task of an earlier source, or whose id this run has had already."""
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
            (self.run or -1,),
        )
        return found + [
            f"{place}: id {name!r} came before in this run; give each task its own" for place, name in again
        ]

    def staged_done(self) -> Iterator[tuple[str, str, str]]:
        """(id, path, sha256) of every staged task that the folder holds as done."""
        rows = self._db.execute(
            "SELECT t.id, t.path, json_extract(t.receipt, '$.sha256') FROM incoming i JOIN tasks t USING (id) "
            "WHERE t.state = 'done' AND i.fingerprint = t.fingerprint AND i.path = t.path"
        )
        yield from rows

    def staged_unkept(self) -> Iterator[str]:
        """The id of every staged task that a run with the sink `none` has done: its picture was not kept."""
        rows = self._db.execute(
            "SELECT t.id FROM incoming i JOIN tasks t USING (id) "
            "WHERE t.state = 'done' AND i.fingerprint = t.fingerprint AND i.path = t.path "
            "AND json_extract(t.receipt, '$.sha256') = ''"
        )
        for (name,) in rows:
            yield name

    def staged_new(self) -> Iterator[tuple[str, str]]:
        """(place, path) of every staged task whose path is that of no task the folder knows."""
        yield from self._db.execute(
            "SELECT place, path FROM incoming i "
            "WHERE NOT EXISTS (SELECT 1 FROM tasks t WHERE t.path_key = i.path_key) ORDER BY position"
        )

    def staged_paths(self) -> Iterator[str]:
        """The path of every staged task."""
        for (path,) in self._db.execute("SELECT path FROM incoming"):
            yield path

    def staged(self) -> Iterator[tuple[PlannedTask, str, str]]:
        """(task, state, kind of failure) of every staged task in order; the state is `new`, `changed` or what is known."""
        rows = self._db.execute(
            "SELECT i.position, i.fingerprint, i.task, i.needs, i.batch_group, i.cost, CASE WHEN t.id IS NULL THEN 'new' "
            "WHEN i.fingerprint != t.fingerprint OR i.path != t.path THEN 'changed' ELSE t.state END, ifnull(t.kind, '') "
            "FROM incoming i LEFT JOIN tasks t USING (id) ORDER BY i.position"
        )
        for position, print_, task, needs, group, cost, state, kind in rows:
            ticket = Ticket(position, tuple(json.loads(needs)), group, cost)
            yield PlannedTask(wire.task_from_json(task), print_, ticket), state, kind

    def apply(self, *, retry: Sequence[str] = (), again: Iterable[str] = ()) -> None:
        """Make the staged rows the work of the current run: new and changed ones, and what is to be done again.

        `retry` are kinds of failures to try again, `again` ids whose pictures are gone or altered.
        """
        db, run = self._db, self.run
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

    # --- the run ---------------------------------------------------------------------------------------------------

    def begin_run(self, started: float, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> int:
        """A new run; its number is also kept in `run`."""
        self._db.execute("UPDATE runs SET status = 'died' WHERE status = 'running'")
        values = (started, json.dumps(settings, ensure_ascii=False), json.dumps(machine, ensure_ascii=False))
        cursor = self._db.execute("INSERT INTO runs (started, settings, machine) VALUES (?,?,?)", values)
        self.run = int(cursor.lastrowid or 0)
        return self.run

    def end_run(self, ended: float, status: str, stats: Mapping[str, Any]) -> None:
        """Write how the run ended: done, failed, drained, cancelled, no_workers, bad_model or output_error."""
        self._db.execute(
            "UPDATE runs SET ended = ?, status = ?, stats = ? WHERE run = ?",
            (ended, status, json.dumps(stats), self.run),
        )

    def note_stats(self, stats: Mapping[str, Any]) -> None:
        """What is known of the run while it goes on, for a report made before its end."""
        self._db.execute("UPDATE runs SET stats = ? WHERE run = ?", (json.dumps(stats), self.run))

    def skip(self, place: str, reason: str) -> None:
        """Remember a row of the source that made no task."""
        self._db.execute("INSERT INTO skipped VALUES (?,?,?)", (self.run, place, reason))

    def counts(self) -> dict[str, int]:
        """Tasks of the current run by state."""
        return dict(self._db.execute("SELECT state, count(*) FROM tasks WHERE run = ? GROUP BY state", (self.run,)))

    def resumed(self) -> int:
        """Tasks of the current run that an earlier run had done."""
        begun = "(SELECT started FROM runs WHERE run = ?)"
        query = f"SELECT count(*) FROM tasks WHERE run = ? AND state = 'done' AND settled < {begun}"
        return int(self._db.execute(query, (self.run, self.run)).fetchone()[0])

    def work(self, first: int = 0, page: int = 512) -> Iterator[tuple[PlannedTask, Outcome | None]]:
        """The tasks of the current run in order, page by page; with its outcome where one is settled already."""
        position = first
        while True:
            rows = self._db.execute(
                "SELECT position, fingerprint, task, needs, batch_group, cost, state, kind, message, attempts, worker, "
                "elapsed, receipt FROM tasks WHERE run = ? AND position >= ? ORDER BY position LIMIT ?",
                (self.run, position, page),
            ).fetchall()
            for row in rows:
                yield self._row(row)
            if len(rows) < page:
                return
            position = rows[-1][0] + 1

    def _row(self, row: Sequence[Any]) -> tuple[PlannedTask, Outcome | None]:
        position, print_, text, needs, group, cost, state, kind, message, attempts, worker, elapsed, receipt = row
        task = wire.task_from_json(text)
        planned = PlannedTask(task, print_, Ticket(position, tuple(json.loads(needs)), group, cost))
        if state == "pending":
            return planned, None
        outcome = Outcome(
            task=task,
            seq=position,
            state=state,
            path=str(self.folder / (task.output_path or "")) if state == "done" else "",
            kind=kind,
            message=message or "",
            attempts=attempts,
            worker=worker,
            elapsed=elapsed or 0.0,
            receipt=wire.adapter(Receipt).validate_json(receipt) if receipt else None,
            resumed=True,
        )
        return planned, outcome

    def settle(self, settled: Iterable[tuple[str, Settle]], attempts: Iterable[Attempt], now: float) -> None:
        """Commit outcomes and attempts, all or none; when this returns they are on disk."""
        self._db.execute("BEGIN")
        try:
            self._db.executemany(
                "INSERT OR REPLACE INTO attempts VALUES (?,?,?,?,?,?,?,?,?)",
                (
                    (a.id, self.run, a.attempt, a.worker, a.started, a.ended, a.kind, a.message, a.batch_size)
                    for a in attempts
                ),
            )
            self._db.executemany(
                "UPDATE tasks SET state = ?, kind = ?, message = ?, attempts = ?, worker = ?, elapsed = ?, settled = ?, "
                "receipt = ? WHERE id = ?",
                (_settled_row(name, settle, now) for name, settle in settled),
            )
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def span(self, worker: int, what: str, started: float, ended: float, note: str = "") -> None:
        """Remember what a worker did outside batches: `load`, or `lost` with the reason."""
        self._db.execute("INSERT INTO spans VALUES (?,?,?,?,?,?)", (self.run, worker, what, started, ended, note))

    # --- reading for reports ---------------------------------------------------------------------------------------

    def rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[dict[str, Any]]:
        """The rows of a SELECT as dictionaries, one at a time."""
        try:
            cursor = self._db.execute(query, values)
            names = [column[0] for column in cursor.description]
            for row in cursor:
                yield dict(zip(names, row, strict=True))
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{self.path}: the ledger does not read ({error})") from error


def _settled_row(name: str, settle: Settle, now: float) -> tuple[Any, ...]:
    receipt, failure = settle.receipt, settle.failure
    if receipt is not None:
        elapsed = sum(receipt.seconds.values())
        text = wire.to_json(receipt).decode()
        return ("done", None, None, settle.attempts, settle.worker, elapsed, now, text, name)
    kind, message = (failure.kind, failure.message) if failure else ("transient", "")
    return ("failed", kind, message, settle.attempts, settle.worker, None, now, None, name)
