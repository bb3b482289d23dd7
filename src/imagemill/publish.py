"""The driver's hand on the output folder: its lock, the rename that makes a picture count, and the look at what is there."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

from imagemill.errors import FolderInUseError, InputError
from imagemill.inputs import digest_file
from imagemill.records import Receipt
from imagemill.sinks.files import TEMPORARY

LOCK_NAME = ".imagemill.lock"
PAGE = 1024
"""Pictures that are looked at together."""


class OutputFolder:
    """An output folder that this driver holds. Raises `FolderInUseError` when another one does.

    The lock is the kernel's (flock): it ends with the process, however that ends. Without `exclusive` none is taken;
    without `create` a folder that is not there stays away, which is enough to look.
    """

    def __init__(self, path: Path, *, exclusive: bool = True, create: bool = True) -> None:
        self.path = path
        self._lock = -1
        self._unsynced: set[Path] = set()
        self._rooted: set[Path] = set()
        self._inside: dict[Path, bool] = {}
        try:
            if create:
                path.mkdir(parents=True, exist_ok=True)
            self._root = path.resolve()
            if exclusive:
                self._take_lock()
        except OSError as error:
            raise InputError(
                f"{path}: cannot be used as output folder: {error.strerror}; give another --out"
            ) from error

    def _take_lock(self) -> None:
        lock = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 20).decode(errors="replace").strip()
            os.close(lock)
            raise FolderInUseError(
                f"{self.path}: another run works in this folder (pid {holder or 'unknown'}); wait for it or give another --out"
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        self._lock = lock

    def close(self) -> None:
        """Let the folder go."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def holds(self, relative: str) -> bool:
        """Whether the path stays inside the folder once links are followed; a link that leads round in a circle does not."""
        parent = (self._root / relative).parent
        if parent not in self._inside:
            try:
                self._inside[parent] = parent.resolve().is_relative_to(self._root)
            except (OSError, RuntimeError):
                self._inside[parent] = False
        return self._inside[parent]

    def occupied(self, relative: str) -> bool:
        """Whether something stands at the path."""
        return os.path.lexists(self._root / relative)

    def publish(self, receipt: Receipt) -> str:
        """Give a checked picture its name and return its absolute path. It is durable after `sync`."""
        if not receipt.path:
            return ""
        final = self._root / receipt.path
        os.replace(self._root / receipt.temporary, final)
        self._unsynced.add(final.parent)
        self._root_down(final.parent)
        return str(final)

    def _root_down(self, folder: Path) -> None:
        """A folder may have been made for its first picture: its own name is durable once the one above it is synced."""
        while folder != self._root and folder not in self._rooted:
            self._rooted.add(folder)
            folder = folder.parent
            self._unsynced.add(folder)

    def sync(self) -> None:
        """Make the renames since the last call survive a power cut."""
        for folder in self._unsynced:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self._unsynced.clear()

    def discard(self, relative: str) -> None:
        """Remove a temporary file that no receipt counts for, if it is there."""
        if not relative:
            return
        with suppress(FileNotFoundError):
            (self._root / relative).unlink()

    def damaged(self, pictures: Iterable[tuple[str, str, str]]) -> Iterator[str]:
        """The ids of pictures (id, path, sha256) that are gone, are no plain file, or have other content."""
        waiting = iter(pictures)
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            # By pages: the pool would take in a million pictures at once.
            while page := list(islice(waiting, PAGE)):
                for name, whole in pool.map(self._is_whole, page):
                    if not whole:
                        yield name

    def _is_whole(self, picture: tuple[str, str, str]) -> tuple[str, bool]:
        name, path, sha256 = picture
        if not sha256:
            return name, True
        place = self._root / path
        try:
            return name, stat.S_ISREG(place.lstat().st_mode) and digest_file(place) == sha256
        except (OSError, InputError):
            return name, False

    def sweep(self, folders: Iterable[str]) -> int:
        """Remove temporary files that a dead run left in these folders; returns how many."""
        removed = 0
        for folder in folders:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self._root / folder) as entries:
                for entry in entries:
                    ours = entry.name.startswith(TEMPORARY) and entry.name.endswith(".part")
                    if ours and not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.path)
                        removed += 1
        return removed
