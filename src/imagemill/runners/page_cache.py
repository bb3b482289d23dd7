"""The files of a model, brought into the page cache before a worker reads them: the disk works while others load."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from imagemill import host_memory

CHUNK = 64 * 2**20
"""Bytes that the kernel is told of at a time."""

MAX_SHARE = 0.5
"""The share of the free memory that files are read ahead into: those that do not stay would be read twice."""


def read_ahead(paths: Sequence[Path]) -> threading.Thread:
    """Ask the kernel for the files, from the first on as many as memory keeps, on a thread of its own.

    Every worker may ask: what is in the cache, or on its way, is not read again. A file that cannot be read is left to
    the loader, which says what is wrong with it.
    """
    kept = what_fits(paths, host_memory.free())
    thread = threading.Thread(target=_advise, args=(kept,), name="read-ahead", daemon=True)
    thread.start()
    return thread


def what_fits(paths: Sequence[Path], free: int) -> tuple[Path, ...]:
    """The first of the files, as many as `MAX_SHARE` of so many bytes of free memory holds."""
    kept, room = [], MAX_SHARE * free
    for path in paths:
        with suppress(OSError):
            room -= path.stat().st_size
        if room < 0:
            break
        kept.append(path)
    return tuple(kept)


def _advise(paths: Sequence[Path]) -> None:
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for path in paths:
        with suppress(OSError):
            _advise_file(path)


def _advise_file(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start in range(0, os.fstat(file).st_size, CHUNK):
            os.posix_fadvise(file, start, CHUNK, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(file)
