"""The lock of an output folder: one run at a time, and no trace of a run that left nothing in a folder of its own making."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from imagemill.crashpoints import crash_point
from imagemill.errors import FolderInUseError

LOCK_NAME = ".imagemill.lock"
LOCK_PATIENCE = 0.5
"""Seconds: a child that a killed driver has only forked holds its lock until it is a program of its own."""

TRIES = 10
"""How often a folder may go while it is being locked: another run that was refused has removed it again."""


class FolderLock:
    """A folder that this process alone works in, made where `create` says so. Raises `FolderInUseError` when another one has
    it, `OSError` when it cannot be had.

    The lock is the kernel's (flock): it ends with the process, however that ends. The folder itself is locked beside the lock
    file, so that removing the file lets nobody in.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        self._create = create
        self._locks: list[int] = []
        self._made: list[Path] = []
        self._held = False
        try:
            self._take()
        except BaseException:
            self._release()
            raise
        self._held = True
        # The kernel keeps the lock; the pid is for people, and a full disk may refuse it.
        with suppress(OSError):
            os.ftruncate(self._locks[0], 0)
            os.write(self._locks[0], str(os.getpid()).encode())
        crash_point("after-lock")

    def _take(self) -> None:
        """Lock the folder as it is there now, and again where it went meanwhile."""
        for number in range(TRIES):
            if self._create:
                self._made += self._make(last=number == TRIES - 1)
            crash_point("before-lock")
            try:
                self._lock_file()
                self._lock_folder()
                return
            except FileNotFoundError:
                self._release()
                if not self._create:
                    raise
        raise self._in_use()

    def _make(self, *, last: bool) -> list[Path]:
        try:
            return make(self.path)
        except FileNotFoundError:
            if last:
                raise
            return []  # the one above went meanwhile: the lock's file cannot be made either

    def _lock_file(self) -> None:
        place = self.path / LOCK_NAME
        # Through a link it would empty what the link leads to.
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._locks.append(lock)
        try:
            _lock(lock)
        except BlockingIOError:
            raise self._in_use() from None
        _refuse_gone(lock, place)

    def _lock_folder(self) -> None:
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._locks.append(folder)
        try:
            _lock(folder)
        except BlockingIOError:
            raise self._in_use() from None
        except OSError:
            # Some network file systems lock files only.
            os.close(self._locks.pop())
        else:
            _refuse_gone(folder, self.path)

    def _in_use(self) -> FolderInUseError:
        holder = os.read(self._locks[0], 20).decode(errors="replace").strip() if self._locks else ""
        return FolderInUseError(
            f"{self.path}: another run works in this folder (pid {holder or 'unknown'}); wait for it or give another --out"
        )

    def close(self) -> None:
        """Let the folder go. One that was made for this lock, and holds nothing else, is removed, and so are those above it."""
        if self._held and self._made:
            self._remove()
        self._held = False
        self._release()

    def _remove(self) -> None:
        """Still under the lock: whoever waits for it finds that its file is gone, and makes the folder anew."""
        with suppress(OSError):
            if os.listdir(self.path) == [LOCK_NAME]:
                (self.path / LOCK_NAME).unlink()
                for folder in reversed(self._made):
                    folder.rmdir()

    def _release(self) -> None:
        while self._locks:
            os.close(self._locks.pop())


def _lock(handle: int) -> None:
    """Lock the open file. Raises `BlockingIOError` when another process keeps it."""
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.02)


def _refuse_gone(handle: int, place: Path) -> None:
    """Raises `FileNotFoundError` when what was opened there is there no more."""
    if not os.path.samestat(os.fstat(handle), os.stat(place)):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place))


def make(path: Path) -> list[Path]:
    """Make the folder and all above it; their names survive a power cut. Returns those that were made, the highest first.

    Raises `FileNotFoundError` when one of them goes meanwhile.
    """
    made = []
    for folder in reversed((path, *path.parents)):
        if folder.is_dir():
            continue
        try:
            folder.mkdir()
        except FileExistsError:
            if not stat.S_ISDIR(folder.stat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
            continue
        made.append(folder)
        # Above may be a folder in which we may write and not look.
        with suppress(PermissionError):
            sync(folder.parent)
    return made


def sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
