"""The real command in a process of its own: how it is started, who belongs to it and how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

COMMAND = (sys.executable, "-m", "imagemill.cli")
MARK = "IMAGEMILL_TEST_MARK"
WORKERS = ("--workers", "2")
PATIENCE = 60.0
"""Seconds until a test gives up waiting for something that should come: far more than it takes."""

GONE_WITHIN = 5.0
"""Seconds after the driver's death in which its workers must be gone: part of the promise."""

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = PATIENCE) -> T:
    """The first true value of the condition. Fails the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"nothing within {seconds:g} s")
        time.sleep(0.02)
    return value


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


class Started:
    """A command that runs in a session of its own, as under a terminal. All its descendants carry its mark."""

    def __init__(self, arguments: Sequence[object], folder: Path, environment: dict[str, str]) -> None:
        self.mark = uuid.uuid4().hex
        self._out, self._err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*COMMAND, *map(str, arguments)],
                cwd=folder,
                env={**environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def err(self) -> str:
        return self._err.read_text("utf-8")

    def family(self) -> list[int]:
        """Every living process that carries the mark, the command itself included, whoever is its parent by now."""
        needle, found = f"{MARK}={self.mark}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if needle in (entry / "environ").read_bytes().split(b"\0") and _alive(int(entry.name)):
                        found.append(int(entry.name))
        return sorted(found)

    def children(self) -> list[int]:
        """The living processes that the command has started, and theirs; not the keeper, which does no work.

        One that has only been forked still has the command's own words: it may become the keeper, and is not counted.
        """
        forked = (b"", _words(self.pid))
        return [pid for pid in self.family() if pid != self.pid and _words(pid) not in forked and not _is_keeper(pid)]

    def signal(self, number: int) -> None:
        """To the whole process group, as a terminal does."""
        os.killpg(self.pid, number)

    def wait(self) -> Ended:
        code = self.process.wait(PATIENCE)
        return Ended(code, self._out.read_text("utf-8"), self.err)

    def end(self) -> None:
        for pid in self.family():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """A signal to one process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_the_driver(running: Started) -> None:
    """SIGKILL to the driver alone; its workers must then end by themselves."""
    kill(running.pid)
    running.wait()
    until(lambda: not running.family(), GONE_WITHIN)


def descendants() -> set[int]:
    """Living processes that this process has started, and theirs; not the keeper, which does no work."""
    tree, found, open_ = _parents(), set(), [os.getpid()]
    while open_:
        now = open_.pop()
        children = {child for child, parent in tree.items() if parent == now}
        found |= children
        open_ += children
    return {one for one in found if not _is_keeper(one)}


def _alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


def _words(pid: int) -> bytes:
    """The command line of a process, its words ended by NUL; empty for one that is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _is_keeper(pid: int) -> bool:
    """Whether the process is the one that ends the workers of a killed driver."""
    return b"/keeper.py\0" in _words(pid)


def _parents() -> dict[int, int]:
    """The parent of every living process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if state not in ("Z", "X"):
                    found[int(entry.name)] = int(parent)
    return found
