"""Rebuild a folder's ledger from what its pictures say of themselves: each holds its task and its fingerprint.

Nothing but the ledger is written, no picture is moved or removed, and no link is followed. What a picture cannot tell is
not in the new ledger: failed tasks, attempts, times, and the answers of judges.
"""

from __future__ import annotations

import io
import json
import os
import re
import sqlite3
import stat
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from imagemill import picture, plan, wire
from imagemill.errors import BadOutput, InputError, LedgerError, OutputError
from imagemill.ledger import FILE_NAME, SIDE_FILES, Ledger
from imagemill.publish import OutputFolder
from imagemill.records import PlannedTask, Receipt, Settle, Task, Ticket
from imagemill.version import __version__, machine

DRAFT = ".imagemill-repair.part"
SUFFIXES = tuple(suffix for suffixes in plan.FORMATS.values() for suffix in suffixes)
PAGE = 256
"""Pictures that are read, and committed, together."""

SHOWN = 20
"""Files of a kind that are named one by one."""

SMALLEST_PAGE = 512
"""Bytes (https://www.sqlite.org/fileformat.html)."""

FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Found:
    """What one file is: `task` is the one that it says it holds, `receipt` is there when the file is whole too; `reason`
    tells why it does not count. `foreign` is what no run put there: no task inside, a link, a copy in another place."""

    path: str
    task: Task | None = None
    fingerprint: str = ""
    receipt: Receipt | None = None
    reason: str = ""
    foreign: bool = False


@dataclass(slots=True)
class Repair:
    """What a repair has found and done. `kept` is where the damaged ledger lies now; None when there was none.

    `needed` is False where the ledger reads; then nothing was changed. `unreadable` pictures are made again by the next
    run, but for those `in_the_way`, which do not even tell their task: a run does not write over them.
    """

    folder: Path
    needed: bool = True
    rebuilt: int = 0
    unreadable: int = 0
    in_the_way: int = 0
    foreign: int = 0
    kept: Path | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 when every picture that was looked at counts again or is none of the runs', 1 when some did not read."""
        return 1 if self.unreadable else 0

    def note(self, found: Found) -> None:
        """Count a file that is not rebuilt, and name it if it is among the first."""
        kind = "foreign" if found.foreign else "unreadable"
        number = self.foreign if found.foreign else self.unreadable
        if number < SHOWN:
            self.lines.append(f"{kind}: {found.path}: {found.reason}")
        self.foreign += found.foreign
        self.unreadable += not found.foreign
        self.in_the_way += not found.foreign and found.task is None


def repair(folder: Path) -> Repair:
    """Rebuild the ledger of an output folder when it is damaged, of another version, empty or gone.

    The damaged one stays beside it under another name. Raises `InputError` when there is no such folder, when a run works
    in it, or when no picture holds its task (they were made with --no-metadata); nothing is changed then. Raises
    `OutputError` when the disk refuses.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give the --out folder of a run")
    done = Repair(folder)
    with ExitStack() as stack:
        stack.callback(OutputFolder(folder, create=False).close)
        if reads(folder / FILE_NAME):
            done.needed = False
            return done
        draft = folder / DRAFT
        remove(draft)
        stack.callback(remove, draft)
        _build(draft, done)
        if not done.rebuilt:
            raise InputError(_hopeless(done))
        done.kept = _swap(folder, draft)
    return done


def summary(done: Repair) -> str:
    """What a repair says at its end."""
    if not done.needed:
        return f"{done.folder / FILE_NAME} reads well: nothing was changed"
    lines = [*done.lines, f"{done.rebuilt} rebuilt, {done.unreadable} unreadable, {done.foreign} foreign"]
    if done.kept is not None:
        lines.append(f"the damaged ledger: {done.kept}")
    if done.in_the_way:
        lines.append(
            f"{done.in_the_way} of the unreadable do not tell their task: move them away, no run writes over them"
        )
    lines.append("the same `imagemill run` command now does what is left")
    return "\n".join(lines)


def reads(path: Path) -> bool:
    """Whether the ledger is whole and knows any task. Opened as a reader does, which changes nothing, but checked as for a
    run. A file too short for one page is not opened at all: SQLite would remove the log beside it."""
    if not path.is_file() or path.stat().st_size < SMALLEST_PAGE:
        return False
    try:
        ledger = Ledger(path, read_only=True)
    except LedgerError:
        return False
    try:
        verdict = next(ledger.rows("PRAGMA integrity_check(1)"))["integrity_check"]
        return verdict == "ok" and any(ledger.rows("SELECT 1 FROM tasks LIMIT 1"))
    except LedgerError:
        return False
    finally:
        ledger.close()


def _hopeless(done: Repair) -> str:
    return (
        f"{done.folder}: no picture here holds its task ({done.foreign} without one, {done.unreadable} unreadable), as after "
        "--no-metadata: the ledger cannot be rebuilt, and nothing was changed; move the folder away or give another --out, "
        "every picture is then made again"
    )


# --- the new ledger ---------------------------------------------------------------------------------------------------


def _build(draft: Path, done: Repair) -> None:
    """Write the new ledger as a run that has ended. Its tasks get their order from the source, by the next run."""
    ledger = Ledger(draft, folder=done.folder.resolve())
    try:
        wall = time.time() - time.monotonic()
        ledger.begin_run(wall + time.monotonic(), {"imagemill": __version__, "repaired": True}, machine())
        first = 0
        for page in _pages(done.folder):
            for part in _once_each(page):
                first += _book(ledger, part, first, done, wall + time.monotonic())
        done.rebuilt = ledger.counts().get("done", 0)
        ledger.end_run(wall + time.monotonic(), "done", {})
    except sqlite3.Error as error:
        raise OutputError(f"{draft}: the new ledger cannot be written ({error})") from error
    finally:
        ledger.close()


def _once_each(page: Iterable[Found]) -> list[list[Found]]:
    """The page in parts: no task has two whole pictures in one, the older come first. What the first part books is then kept
    for those who go back to it."""
    parts: list[list[Found]] = [[]]
    whole: Counter[str] = Counter()
    for found in page:
        name = found.task.id if found.task is not None else ""
        if whole[name] == len(parts):
            parts.append([])
        parts[whole[name]].append(found)
        whole[name] += found.receipt is not None
    return parts


def _book(ledger: Ledger, page: Iterable[Found], first: int, done: Repair, now: float) -> int:
    """Take a page of findings in; returns how many tasks it had."""
    chosen: dict[str, Found] = {}
    owners: dict[str, str] = {}
    for found in page:
        if found.task is None:
            done.note(found)
            continue
        name, key = found.task.id, found.path.casefold()
        if (owners.get(key) or _known(ledger, "id", "path_key", key) or name) != name:
            done.note(replace(found, foreign=True, reason="another task has this path, up to case"))
            continue
        older = chosen[name].path if name in chosen else _known(ledger, "path", "id", name)
        if older:
            reason = f"its task {name!r} has a newer picture, {found.path}"
            done.note(Found(older, reason=reason, foreign=True))
        chosen[name], owners[key] = found, name
    ledger.staging.begin()
    settled = []
    for seq, found in enumerate(chosen.values(), first):
        assert found.task is not None, "those without one were noted above"
        planned = PlannedTask(found.task, found.fingerprint, Ticket(seq, plan.needs(found.task)))
        problem = ledger.staging.add(planned, found.path)
        if problem is not None:
            done.note(replace(found, foreign=True, reason=problem.message))
        elif found.receipt is None:
            done.note(found)
        else:
            settled.append((found.task.id, Settle(seq, 1, None, receipt=replace(found.receipt, seq=seq))))
    ledger.staging.apply(ledger.run)
    ledger.settle(settled, (), now)
    return len(chosen)


def _known(ledger: Ledger, wanted: str, column: str, value: str) -> str:
    """One column of the task whose other column has this value; empty where there is none."""
    return next(
        (str(row[wanted]) for row in ledger.rows(f"SELECT {wanted} FROM tasks WHERE {column} = ?", (value,))), ""
    )


def _swap(folder: Path, draft: Path) -> Path | None:
    """Give the draft the ledger's name, and what had it before another one."""
    path, kept = folder / FILE_NAME, None
    try:
        _sync(draft)
        if any(os.path.lexists(_beside(path, end)) for end in ("", *SIDE_FILES)):
            kept = _free_name(path)
            for end in ("", *SIDE_FILES):
                with suppress(FileNotFoundError):
                    _beside(path, end).rename(_beside(kept, end))
        draft.rename(path)
        _sync(folder)
    except OSError as error:
        raise OutputError(f"{path}: the new ledger cannot be put in its place: {error.strerror}") from error
    return kept


def _free_name(path: Path) -> Path:
    numbers = iter(range(1, 10**6))
    names = (path.with_name(f"{path.stem}.damaged-{number}{path.suffix}") for number in numbers)
    return next(name for name in names if not any(os.path.lexists(_beside(name, end)) for end in ("", *SIDE_FILES)))


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(draft: Path) -> None:
    """Remove a ledger that is not to be, with what SQLite put beside it."""
    for end in ("", *SIDE_FILES):
        with suppress(OSError):
            _beside(draft, end).unlink(missing_ok=True)


# --- the pictures -----------------------------------------------------------------------------------------------------


def _pages(folder: Path) -> Iterator[list[Found]]:
    """Every file below the folder that has a picture's name, the oldest first, looked at by several threads."""
    paths = iter(_pictures(folder))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large pictures: what is too large is refused
        while page := list(islice(paths, PAGE)):
            yield list(pool.map(lambda path: look(folder, path), page))


def _pictures(folder: Path) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder):
        here = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not name.startswith(".imagemill")]
        for name in files:
            if PurePosixPath(name).suffix.lower() in SUFFIXES and not name.startswith(".imagemill"):
                with suppress(FileNotFoundError):
                    modified = os.lstat(os.path.join(parent, name)).st_mtime_ns
                    found.append((modified, (here / name).as_posix()))
    return [path for _, path in sorted(found)]


def look(folder: Path, path: str) -> Found:
    """What the file is, by its own words and by decoding it wholly."""
    place = folder / path
    try:
        if not stat.S_ISREG(place.lstat().st_mode):
            return Found(path, reason="a link or no plain file; it is not followed", foreign=True)
        data = place.read_bytes()
    except OSError as error:
        return Found(path, reason=f"cannot be read: {error.strerror}")
    try:
        text, size = _header(data)
    except BadOutput as error:
        return Found(path, reason=str(error))
    try:
        content = json.loads(text)
        task = wire.task_from_json(json.dumps(content["task"]))
        fingerprint = content["fingerprint"]
    except (ValueError, TypeError, KeyError, RecursionError, ValidationError):
        return Found(path, reason="holds no task" if not text else "holds no task that reads", foreign=True)
    if not FINGERPRINT.fullmatch(str(fingerprint)) or not plain(task):
        return Found(path, reason="holds no task that a run can have made", foreign=True)
    if task.output_path != path:
        return Found(path, reason=f"is the picture of {task.output_path!r}, in another place", foreign=True)
    return _whole(Found(path, task, fingerprint), data, content, size)


def plain(task: Task) -> bool:
    """Whether it is one picture's task as a run ends with: every field known."""
    return bool(task.id and task.output_path and task.width and task.height and task.steps and task.num_images == 1)


def _whole(found: Found, data: bytes, content: dict[str, Any], size: tuple[int, int]) -> Found:
    """The finding with its receipt, or with the reason why the picture does not count."""
    task = found.task
    assert task is not None, "only pictures with a task are decoded"
    width, height = task.width or 0, task.height or 0
    if size != (width, height):
        return replace(found, reason=f"the file holds {size[0]}x{size[1]} pixels; its task asked for {width}x{height}")
    try:
        picture.check(data, width, height)
    except BadOutput as error:
        return replace(found, reason=str(error))
    marks = content.get("marks")
    batch = content.get("batch_size")
    receipt = Receipt(
        seq=0,
        attempt=1,
        width=width,
        height=height,
        bytes=len(data),
        sha256=sha256(data).hexdigest(),
        path=found.path,
        batch_size=batch if isinstance(batch, int) else 1,
        flags=(*_flags(data), *(str(mark) for mark in (marks if isinstance(marks, list) else ()))),
    )
    return replace(found, receipt=receipt)


def _flags(data: bytes) -> tuple[str, ...]:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return picture.flags(image)


def _header(data: bytes) -> tuple[str, tuple[int, int]]:
    """The text that `picture.encode` put in, empty where there is none, and the size in pixels; nothing is decoded.

    Raises `BadOutput` for what is no picture.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            text = (
                image.info.get("imagemill") if image.format == "PNG" else image.getexif().get(picture.IMAGE_DESCRIPTION)
            )
            return str(text or ""), image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadOutput(f"the file is no picture: {error}".replace("\n", " ")) from error
