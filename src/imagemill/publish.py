"""The driver's hand on the output folder: its lock, the rename that makes a picture count, and the look at what is there."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

from imagemill.crashpoints import crash_point
from imagemill.errors import InputError, OutputError
from imagemill.inputs import digest_file
from imagemill.lock import FolderLock, make, sync
from imagemill.records import Receipt
from imagemill.sinks.files import TEMPORARY

PAGE = 1024
"""Pictures that are looked at together."""

DRAFT = re.compile(re.escape(TEMPORARY) + r"(\d{1,9})-(?:results\.jsonl|report\.\w+)")
"""Names of half-written reports (report/drafts.py): the process that writes one is in its name."""


class OutputFolder:
    """An output folder that this driver holds. Raises `FolderInUseError` when another one does.

    Without `exclusive` no lock is taken; without `create` a folder that is not there stays away, which is enough to look.
    """

    def __init__(self, path: Path, *, exclusive: bool = True, create: bool = True) -> None:
        self.path = path
        self._lock: FolderLock | None = None
        self._unsynced: set[Path] = set()
        self._rooted: set[Path] = set()
        self._inside: dict[Path, bool] = {}
        try:
            if exclusive:
                self._lock = FolderLock(path, create=create)
            elif create:
                make(path)
            self._root = path.resolve()
        except OSError as error:
            self.close()
            raise InputError(
                f"{path}: cannot be used as output folder: {error.strerror}; give another --out"
            ) from error

    def close(self) -> None:
        """Let the folder go. Where it was made for this driver, and holds nothing, it is removed."""
        if self._lock is not None:
            self._lock.close()

    def holds(self, relative: str) -> bool:
        """Whether the path stays inside the folder once links are followed; a link that leads round in a circle does not."""
        parent = (self._root / relative).parent
        if parent not in self._inside:
            try:
                self._inside[parent] = parent.resolve().is_relative_to(self._root)
            except (OSError, RuntimeError):
                self._inside[parent] = False
        return self._inside[parent]

    def refuse_links(self, names: Iterable[str]) -> None:
        """Refuse links out of the folder at these places, and right below them: what a run writes there would land outside.

        Raises `InputError`.
        """
        for name in names:
            place = self.path / name
            below = () if place.is_symlink() or not place.is_dir() else place.iterdir()
            for one in (place, *below):
                if one.is_symlink() and not self._leads_inside(one):
                    raise InputError(f"{one}: is a link that leads out of the output folder; remove it")

    def _leads_inside(self, link: Path) -> bool:
        try:
            return link.resolve().is_relative_to(self._root)
        except (OSError, RuntimeError):
            return False

    def occupied(self, relative: str) -> bool:
        """Whether something stands at the path."""
        return os.path.lexists(self._root / relative)

    def publish(self, receipt: Receipt) -> str:
        """Give a checked picture its name and return its absolute path. It is durable after `sync`."""
        if not receipt.path:
            return ""
        final = self._root / receipt.path
        crash_point("before-rename")
        os.replace(self._root / receipt.temporary, final)
        crash_point("after-rename")
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
        crash_point("before-folder-sync")
        for folder in self._unsynced:
            sync(folder)
        self._unsynced.clear()
        crash_point("after-folder-sync")

    def discard(self, relative: str) -> None:
        """Remove a temporary file that no receipt counts for, if it is there."""
        if not relative:
            return
        crash_point("before-discard")
        # On a disk that has become read-only it stays; the next run sweeps it.
        with suppress(OSError):
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
        """Remove temporary files that a dead run left in these folders; returns how many. A folder that has become a link to
        elsewhere is left alone."""
        removed = 0
        for folder in folders:
            if not self.holds(f"{folder}/{TEMPORARY}"):
                continue
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self._root / folder) as entries:
                for entry in entries:
                    ours = entry.name.startswith(TEMPORARY) and entry.name.endswith(".part")
                    if ours and not entry.is_dir(follow_symlinks=False):
                        removed += self._remove(entry.path)
        return removed

    def sweep_reports(self) -> None:
        """Remove half-written reports of processes that are gone."""
        with os.scandir(self._root) as entries:
            found = [(entry.path, draft) for entry in entries if (draft := DRAFT.fullmatch(entry.name))]
        for path, draft in found:
            if not _alive(int(draft[1])):
                self._remove(path)

    def _remove(self, path: str) -> int:
        try:
            os.unlink(path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be removed: {error.strerror}") from error
        return 1


def _alive(pid: int) -> bool:
    """Whether there is a process of that number, ours or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
