"""Where compiled code is kept on disk, for all workers and all later runs.

Three caches of torch and triton lie in one folder: graphs with their kernels, the steps before them (AOT autograd), and
triton's binaries. Each entry is written under another name and then renamed, and its key holds the versions, the device
and the code, so workers share the folder freely and an upgrade of torch only leaves dead files. What does not read is
compiled anew. `torch.compiler.save_cache_artifacts` would bundle these same entries into one file; they are on the disk
already, so nothing is won by it.

Entries are code that torch runs: the folder is its owner's alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

log = logging.getLogger(__name__)

GRAPHS = "TORCHINDUCTOR_CACHE_DIR"
KERNELS = "TRITON_CACHE_DIR"
SWITCHES = ("TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_AUTOGRAD_CACHE")

LOOK_AGAIN = 1.0
"""Seconds between two looks at whether another worker has compiled; each look is a sign of life too."""


def folder() -> Path:
    """The user's own `TORCHINDUCTOR_CACHE_DIR`, else `imagemill/compile` in the user's cache folder."""
    if chosen := os.environ.get(GRAPHS):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "imagemill" / "compile"


def environment() -> dict[str, str]:
    """What a worker process gets before torch is imported; variables that the user has set keep their values.

    Makes the folder. Where that fails, empty: torch then keeps its caches in the system's temporary folder.
    """
    place = folder()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled code is kept for this run only: %s", error)
        return {}
    wanted = {GRAPHS: str(place), KERNELS: str(place / "triton"), **dict.fromkeys(SWITCHES, "1")}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


@contextmanager
def turn(work: str, waiting: Callable[[], None]) -> Iterator[bool]:
    """Of the workers that meet here with the same work, one goes first, while the others wait to read what it compiled.

    Gives True to the first; the others enter together once it has left or died, and nobody waits again for work that was
    once done: the file of the lock remembers it. `waiting` is called while they wait and may raise. Without a lock (a
    folder that cannot be written, a file system that knows none) nobody waits.
    """
    place = folder() / f"{sha256(work.encode()).hexdigest()[:16]}.lock"
    try:
        lock = place.open("ab")
    except OSError:
        yield True
        return
    with lock:
        if _done(lock.fileno()):
            yield False
            return
        first = _take(lock.fileno(), fcntl.LOCK_EX) and not _done(lock.fileno())
        while not first and not _take(lock.fileno(), fcntl.LOCK_SH):
            waiting()
            time.sleep(LOOK_AGAIN)
        if not first:
            fcntl.flock(lock, fcntl.LOCK_UN)
        yield first
        if first:
            with suppress(OSError):  # a full disk: the next run waits once more
                os.write(lock.fileno(), b"done")


def _done(descriptor: int) -> bool:
    return os.fstat(descriptor).st_size > 0


def _take(descriptor: int, how: int) -> bool:
    """Whether the lock was got; True as well where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("no locks in the compile cache: %s", error)
    return True
