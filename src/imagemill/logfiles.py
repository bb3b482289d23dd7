"""The log files of a run: one for the driver, one for a worker inside the process. Worker processes have their own."""

from __future__ import annotations

import logging
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from imagemill.errors import OutputError

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
DRIVER, WORKERS = "imagemill.driver", ("imagemill.worker", "imagemill.runners")

LONGEST = 16 * 2**20
"""Bytes of a worker's log above which its middle goes."""

KEPT = 2**20
"""Bytes kept of such a log's beginning, and as many of its end."""

GAP = re.compile(rb"\[imagemill: at least (\d+) bytes left out here\]\n")


class LogFile(logging.FileHandler):
    """A log that a full disk leaves with gaps: neither the run nor its standard error hears of it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line if the disk takes it."""
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's own name)
        """A defect in a log call is shown, as everywhere; what the disk refuses is not."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file; what it still held back may be lost."""
        with suppress(OSError):
            super().close()


class LogFiles:
    """While the block lasts the package's loggers write to files in the folder, and nowhere else."""

    def __init__(self, folder: Path, level: str) -> None:
        self.folder = folder
        self.level = level.upper()
        self._handlers: list[tuple[logging.Logger, logging.Handler]] = []

    def __enter__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot take the logs: {error.strerror}") from error
        self._open("driver.log", DRIVER)
        self._open("worker-0.log", *WORKERS)

    def _open(self, name: str, *loggers: str) -> None:
        handler = LogFile(self.folder / name, encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter(FORMAT))
        for logger in map(logging.getLogger, loggers):
            logger.addHandler(handler)
            logger.setLevel(self.level)
            logger.propagate = False
            self._handlers.append((logger, handler))

    def __exit__(self, *_: object) -> None:
        for logger, handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
            logger.propagate = True


def trim(path: str, longest: int = LONGEST, kept: int = KEPT) -> int:
    """Take the middle out of a log that is over `longest` bytes; returns the bytes taken, 0 when it was left alone.

    The beginning and the end stay, in whole lines where they have any; a line between says how much is gone, over all
    calls. The file may have a writer in append mode: it is never held up, but what it writes during this call may be
    lost with the middle. A log that cannot be trimmed now is left as it is.
    """
    with suppress(OSError):
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(handle).st_size
            if size > longest:
                return _shorten(handle, size, kept)
        finally:
            os.close(handle)
    return 0


def _shorten(handle: int, size: int, kept: int) -> int:
    start = os.pread(handle, kept + 100, 0)
    gap = GAP.search(start)
    head = start[: gap.start()] if gap else start[: start.rfind(b"\n", 0, kept) + 1] or start[:kept]
    gone, after = (int(gap[1]), gap.end()) if gap else (0, len(head))
    tail = os.pread(handle, kept, max(after, size - kept))
    tail = tail[tail.find(b"\n") + 1 :] or tail
    taken = os.fstat(handle).st_size - after - len(tail)
    line = b"[imagemill: at least %d bytes left out here]\n" % (gone + taken)
    # Not in append mode: what is written meanwhile must not come between the beginning and the line.
    os.ftruncate(handle, len(head))
    os.pwrite(handle, (b"" if head.endswith(b"\n") else b"\n") + line + tail, len(head))
    return taken
