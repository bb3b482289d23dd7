"""The ledger: one SQLite file in the output folder that knows every task, attempt and receipt.

The driver alone writes it. Resume and reports read nothing else. Times in it are seconds since the epoch, made from
one reading of the wall clock a run plus the monotonic clock, so that a clock that jumps makes no negative duration.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from imagemill import former, wire
from imagemill.crashpoints import crash_point
from imagemill.errors import ImagemillError, LedgerError, OutputError
from imagemill.records import Outcome, PlannedTask, Receipt, Settle
from imagemill.staging import Staging, from_row, writing

FILE_NAME = "ledger.sqlite"
VERSION = "1"

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


TABLES = frozenset(re.findall(r"CREATE TABLE IF NOT EXISTS (\w+)", SCHEMA))
STATES = frozenset(("pending", "done", "failed"))
SIDE_FILES = ("-wal", "-shm", "-journal")
"""What SQLite puts beside the file, by the ends of their names."""

UNWRITABLE = frozenset(
    (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
)
"""What SQLite says of a disk that is full, or fails, or may not be written: the ledger on it may well be whole."""


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


REPAIR = "; `imagemill repair"
"""How the mend of a damaged ledger begins, for callers that have another."""


class Ledger:
    """The open ledger of one folder. Not shared between threads.

    Raises `LedgerError` when the file is damaged, of another version, or no ledger at all, and `OutputError` when the disk
    refuses it.
    """

    def __init__(self, path: Path, *, folder: Path | None = None, read_only: bool = False) -> None:
        self.path = path
        self.folder = folder or path.parent
        self.run = 0
        self._fresh = False
        self._read_only = read_only
        self._refuse_links()
        try:
            name = f"{path.absolute().as_uri()}?mode=ro" if read_only else path
            self._db = sqlite3.connect(name, uri=read_only, isolation_level=None)
            try:
                self._db.execute("PRAGMA temp_store = FILE")  # first: it drops what is temporary
                self._prepare(read_only)
            except BaseException:
                self._db.close()
                raise
        except sqlite3.DatabaseError as error:
            raise self._refusal(error) from error
        self.staging = Staging(self._db)

    def _refuse_links(self) -> None:
        """SQLite would follow a link and write where it leads."""
        for end in ("", *SIDE_FILES):
            place = self.path.with_name(self.path.name + end)
            if place.is_symlink():
                raise LedgerError(f"{place}: is a link, which a ledger never is; put the file itself there")

    def _refusal(self, error: sqlite3.DatabaseError) -> ImagemillError:
        """What to say of a file that SQLite does not open: a full disk is no damage."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extension of some codes
        if code in UNWRITABLE and self.path.is_file():
            if self._read_only:
                return LedgerError(
                    f"{self.path}: the ledger cannot be read now ({error}); see to the disk, then try again"
                )
            return OutputError(f"{self.path}: the ledger cannot be written ({error})")
        return self._damaged(str(error))

    def _damaged(self, what: str) -> LedgerError:
        """What is wrong, and what to do, in one line."""
        return LedgerError(
            f"{self.path}: the ledger does not read ({' '.join(what.split())}){REPAIR} {self.path.parent}` "
            "rebuilds it from the pictures; or move the folder away or give another --out, every picture is then made again"
        )

    def _prepare(self, read_only: bool) -> None:
        """Refuse what is not ours before anything of it is changed; a new file becomes a ledger in one step."""
        new = not read_only and self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is None
        if not new:
            self._check()
        if not read_only:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
        self._fresh = new
        if not new:
            former.prepare(self._db, read_only=read_only)
        else:
            self._db.executescript(
                f"BEGIN; {SCHEMA} {former.SCHEMA} INSERT INTO meta VALUES ('version', '{VERSION}'); COMMIT;"
            )

    def _check(self) -> None:
        row = self._db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        if row is None or row[0] != VERSION:
            found = row[0] if row else "none"
            raise LedgerError(
                f"{self.path}: written by another version (ledger format {found}, this one reads {VERSION}); go on with "
                f"that version, or give another --out, or have `imagemill repair {self.path.parent}` rebuild it"
            )
        # Better now than in the middle of a run. A million tasks take 8 seconds, 4 with the quick check, which does not
        # look whether an index agrees with its table: a run that went by it would leave tasks out and call itself done.
        check = "quick_check" if self._read_only else "integrity_check"
        verdict = self._db.execute(f"PRAGMA {check}(1)").fetchone()[0]
        if verdict != "ok":
            raise self._damaged(verdict)
        if self._is_cut():
            raise self._damaged("it ends in the middle of a page")
        found = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not found >= TABLES:
            raise self._damaged(f"it lacks the table {min(TABLES - found)}")
        strange = {state for (state,) in self._db.execute("SELECT DISTINCT state FROM tasks")} - STATES
        if strange:
            raise self._damaged(f"a task is in the state {min(map(str, strange))!r}")

    def _is_cut(self) -> bool:
        """SQLite takes the missing end of a last page for zeros. While there is a log, that holds what the file lacks."""
        for end in SIDE_FILES:
            beside = self.path.with_name(self.path.name + end)
            if end != "-shm" and beside.exists() and beside.stat().st_size:
                return False
        size = self._db.execute("PRAGMA page_size").fetchone()[0]
        return bool(self.path.stat().st_size % size)

    def close(self) -> None:
        """Close the file; everything committed is on disk. A new file that no run was begun in is removed."""
        if not self._read_only:
            # Out of WAL the ledger is one file, which a reader of a read-only folder can open. A reader that is at
            # work forbids the change; the next run makes it.
            with suppress(sqlite3.OperationalError):
                self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()
        if self._fresh and not self.run:
            for end in ("", *SIDE_FILES):
                with suppress(OSError):
                    self.path.with_name(self.path.name + end).unlink(missing_ok=True)

    @property
    def is_new(self) -> bool:
        """Whether there was no ledger before this one."""
        return self._fresh

    # --- the run ---------------------------------------------------------------------------------------------------

    @writing()
    def begin_run(self, started: float, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> int:
        """A new run; its number is also kept in `run`."""
        self._db.execute("UPDATE runs SET status = 'died' WHERE status = 'running'")
        values = (started, json.dumps(settings, ensure_ascii=False), json.dumps(machine, ensure_ascii=False))
        cursor = self._db.execute("INSERT INTO runs (started, settings, machine) VALUES (?,?,?)", values)
        self.run = int(cursor.lastrowid or 0)
        return self.run

    def died(self) -> bool:
        """Whether the run before this one came to no end of its own: its process was killed, or crashed. To be asked before
        `begin_run`."""
        row = self._db.execute("SELECT status FROM runs ORDER BY run DESC LIMIT 1").fetchone()
        return row is not None and row[0] in ("running", "died")

    @writing()
    def end_run(self, ended: float, status: str, stats: Mapping[str, Any]) -> None:
        """Write how the run ended: done, failed, drained, cancelled, no_workers, bad_model or output_error."""
        self._db.execute(
            "UPDATE runs SET ended = ?, status = ?, stats = ? WHERE run = ?",
            (ended, status, json.dumps(stats), self.run),
        )

    @writing()
    def note_stats(self, stats: Mapping[str, Any]) -> None:
        """What is known of the run while it goes on, for a report made before its end."""
        self._db.execute("UPDATE runs SET stats = ? WHERE run = ?", (json.dumps(stats), self.run))

    @writing()
    def skip(self, place: str, reason: str) -> None:
        """Remember a row of the source that made no task."""
        self._db.execute("INSERT INTO skipped VALUES (?,?,?)", (self.run, place, reason))

    def counts(self) -> dict[str, int]:
        """Tasks of the current run by state."""
        return dict(self._db.execute("SELECT state, count(*) FROM tasks WHERE run = ? GROUP BY state", (self.run,)))

    def usual_failure(self) -> tuple[str, int]:
        """The kind and message that most failed tasks of the current run have, and how many; nothing and 0 without any."""
        row = self._db.execute(
            "SELECT kind || ': ' || message, count(*) FROM tasks WHERE run = ? AND state = 'failed' "
            "GROUP BY kind, message ORDER BY count(*) DESC, min(position) LIMIT 1",
            (self.run,),
        ).fetchone()
        return row or ("", 0)

    def open_folders(self) -> set[str]:
        """The folders of tasks that are not settled, in which a run that died may have left temporary files."""
        return {
            str(PurePosixPath(path).parent)
            for (path,) in self._db.execute("SELECT path FROM tasks WHERE state = 'pending'")
        }

    def resumed(self) -> int:
        """Tasks of the current run that an earlier run had done: told by the attempts, as clocks may be set between runs."""
        own = "SELECT 1 FROM attempts WHERE id = tasks.id AND run = tasks.run AND kind IS NULL"
        query = f"SELECT count(*) FROM tasks WHERE run = ? AND state = 'done' AND NOT EXISTS ({own})"
        return int(self._db.execute(query, (self.run,)).fetchone()[0])

    def older(self) -> Iterator[str]:
        """Paths of pictures that tasks of the current run had before they changed, and that nothing has replaced."""
        return former.remaining(self._db, self.run)

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
        planned = from_row(position, print_, text, needs, group, cost)
        if state == "pending":
            return planned, None
        made = wire.adapter(Receipt).validate_json(receipt) if receipt else None
        kept = made is not None and made.path
        outcome = Outcome(
            task=planned.task,
            seq=position,
            state=state,
            path=str(self.folder / (planned.task.output_path or "")) if state == "done" and kept else "",
            kind=kind,
            message=message or "",
            attempts=attempts,
            worker=worker,
            elapsed=elapsed or 0.0,
            receipt=made,
            resumed=True,
        )
        return planned, outcome

    @writing()
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
            taken = list(settled)
            made = ((name, settle.receipt.path) for name, settle in taken if settle.receipt is not None)
            former.forget(self._db, made)
            self._db.executemany(
                "UPDATE tasks SET state = ?, kind = ?, message = ?, attempts = ?, worker = ?, elapsed = ?, settled = ?, "
                "receipt = ? WHERE id = ?",
                (_settled_row(name, settle, now) for name, settle in taken),
            )
            crash_point("in-commit")
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @writing()
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
            raise self._damaged(str(error)) from error


def _settled_row(name: str, settle: Settle, now: float) -> tuple[Any, ...]:
    receipt, failure = settle.receipt, settle.failure
    if receipt is not None:
        elapsed = sum(receipt.seconds.values())
        text = wire.to_json(receipt).decode()
        return ("done", None, None, settle.attempts, settle.worker, elapsed, now, text, name)
    kind, message = (failure.kind, failure.message) if failure else ("transient", "")
    return ("failed", kind, message, settle.attempts, settle.worker, None, now, None, name)
