"""What tasks were before they changed: kept beside them in the ledger, so that a change that is broken off takes nothing away.

A row of `former` says what was booked for a task while it had another content, or its picture another name, or before it was
asked for once more: done, with the picture's receipt, or failed. It goes once a picture is booked that replaces its own. Until
then the same content finds it again, if its picture is still what the receipt says: a crash may have put the next one there.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS former (
    id TEXT NOT NULL, fingerprint TEXT NOT NULL, path TEXT NOT NULL, path_key TEXT NOT NULL, state TEXT NOT NULL,
    kind TEXT, message TEXT, attempts INTEGER NOT NULL, worker INTEGER, elapsed REAL, settled REAL, receipt TEXT,
    PRIMARY KEY (id, fingerprint, path)) WITHOUT ROWID;
"""

BOOKED = ("state", "kind", "message", "attempts", "worker", "elapsed", "settled", "receipt")
COLUMNS = ", ".join(("id", "fingerprint", "path", "path_key", *BOOKED))
DIFFERS = "(i.fingerprint != t.fingerprint OR i.path != t.path)"
"""Of a staged row and the task that the ledger has under its id: other content, or another name."""

AT_PLACE = "f.id = i.id AND f.path = i.path"
"""Of a staged row: the task's picture had this name before."""

IS_FORMER = f"{AT_PLACE} AND f.fingerprint = i.fingerprint"
"""Of a staged row: it is what the task was."""

FILE = "ifnull(json_extract(f.receipt, '$.sha256'), '')"
"""The digest of the kept file; empty where there was none."""

NAMED = 3
"""How many older pictures a line names."""

MARKS = "was INTEGER NOT NULL DEFAULT 0, own INTEGER NOT NULL DEFAULT 0"
"""Columns of staged rows. `was`: the row goes back to what its task was. `own`: to a name under which the task's own older
picture stands."""


def prepare(db: sqlite3.Connection, *, read_only: bool) -> None:
    """Add the table to a ledger that is older than it; to one that is only read, for this connection alone."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'former'").fetchone() is None:
        db.execute(SCHEMA.replace("CREATE TABLE", "CREATE TEMP TABLE") if read_only else SCHEMA)


def mark(db: sqlite3.Connection, *, files: bool) -> None:
    """Mark the staged rows that go back. Where `files` are wanted, a picture that was not kept does not count."""
    if db.execute("SELECT 1 FROM former LIMIT 1").fetchone() is None:
        return
    known = "FROM former f JOIN tasks t ON t.id = f.id"
    answered = "json_extract(f.receipt, '$.answer') IS NOT NULL"
    db.execute(
        f"UPDATE incoming AS i SET was = 1 {known} WHERE {IS_FORMER} AND ({DIFFERS} OR t.state != 'done') "
        f"AND (f.state = 'failed' OR {FILE} != '' OR {answered} OR NOT ?)",
        (files,),
    )
    db.execute(f"UPDATE incoming AS i SET own = 1 {known} WHERE {AT_PLACE} AND i.path != t.path AND {FILE} != ''")


def pictures(db: sqlite3.Connection) -> Iterator[tuple[str, str, str]]:
    """(id, path, sha256) of every picture that the marks count on; one path never has two."""
    yield from db.execute(
        f"SELECT f.id, f.path, {FILE} FROM incoming i JOIN former f ON {AT_PLACE} "
        f"WHERE {FILE} != '' AND (i.own OR (i.was AND {IS_FORMER}))"
    )


def unmark(db: sqlite3.Connection, names: Iterable[str]) -> None:
    """Take from these ids the marks that count on their pictures, which are gone, or are others."""
    failed = f"SELECT 1 FROM former f WHERE {IS_FORMER} AND {FILE} = ''"
    db.executemany(
        f"UPDATE incoming AS i SET own = 0, was = was AND EXISTS ({failed}) WHERE id = ?", ((name,) for name in names)
    )


def keep(db: sqlite3.Connection) -> None:
    """Remember what is booked for the tasks that the staged rows change."""
    db.execute(
        f"INSERT OR REPLACE INTO former ({COLUMNS}) SELECT {', '.join(f't.{name}' for name in COLUMNS.split(', '))} "
        f"FROM incoming i JOIN tasks t ON t.id = i.id WHERE t.state != 'pending' AND {DIFFERS}"
    )


def keep_done(db: sqlite3.Connection, names: Iterable[str]) -> None:
    """Remember what is done of these tasks, which are to be done once more."""
    db.executemany(
        f"INSERT OR REPLACE INTO former ({COLUMNS}) SELECT {COLUMNS} FROM tasks WHERE id = ? AND state = 'done'",
        ((name,) for name in names),
    )


def bring_back(db: sqlite3.Connection) -> None:
    """Book for the tasks of marked rows, which have their content by now, what was booked for it then."""
    db.execute(
        f"UPDATE tasks SET {', '.join(f'{name} = f.{name}' for name in BOOKED)} "
        f"FROM incoming i JOIN former f ON {IS_FORMER} WHERE i.was AND tasks.id = i.id"
    )
    db.execute(f"DELETE FROM former AS f WHERE EXISTS (SELECT 1 FROM incoming i WHERE i.was AND {IS_FORMER})")


def forget(db: sqlite3.Connection, done: Iterable[tuple[str, str]]) -> None:
    """(id, path) of pictures that are booked now, with an empty path where no file was kept. What they replace is forgotten:
    a file under the same name, and what had no file; a file under another name stays."""
    db.executemany(f"DELETE FROM former AS f WHERE id = ? AND (path = ? OR {FILE} = '')", done)


def remaining(db: sqlite3.Connection, run: int) -> Iterator[str]:
    """The paths of pictures that tasks of the run had before and that no booked picture has replaced; the files may be gone."""
    rows = db.execute(
        f"SELECT f.path FROM former f JOIN tasks t ON t.id = f.id WHERE t.run = ? AND {FILE} != '' "
        "AND (f.fingerprint != t.fingerprint OR f.path != t.path) AND NOT EXISTS "
        "(SELECT 1 FROM tasks o WHERE o.path_key = f.path_key AND json_extract(o.receipt, '$.path') != '') "
        "GROUP BY f.path ORDER BY min(t.position), f.path",
        (run,),
    )
    for (path,) in rows:
        yield path


def line(folder: Path, paths: Iterable[str]) -> str:
    """What to say of older pictures that still stand in the folder; empty where there are none."""
    standing = iter(paths)
    named = list(islice(standing, NAMED))
    more = sum(1 for _ in standing)
    if not named:
        return ""
    count = len(named) + more
    what, them = ("picture of these tasks stays", "it") if count == 1 else ("pictures of these tasks stay", "them")
    names = ", ".join(named) + (f" and {more} more" if more else "")
    return f"{count} older {what} in {folder}: {names}; going back to what made {them} finds {them} again"
