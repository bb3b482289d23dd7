"""The keeper: a small process that ends the workers of a driver that was killed, with all that they have started.

Workers die with their driver by themselves (worker.py). But one that was stopped before its first line of code cannot, and
what a library has started in a worker hears nothing of it. The keeper is told the numbers of the workers' process groups
through a pipe, and kills those groups when the driver is gone. It runs as a file of its own: nothing of the package and no
site packages are imported, so it is there at once and takes 11 MB.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

CHECK = 1.0
"""Seconds between two looks at the parent: a process that the driver has forked may hold the pipe open."""

LEAVE_TIMEOUT = 5.0
"""Seconds in which the keeper ends once the driver lets it go."""


class Keeper:
    """The driver's hand on its keeper. Without one (the system refuses a process) or with a dead one, all goes on."""

    def __init__(self) -> None:
        self._pipe = -1
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):
            # No worker inherits the write end: the pipe ends with the driver.
            read, self._pipe = os.pipe()
            try:
                os.set_blocking(self._pipe, False)
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", __file__, str(os.getpid())],
                    stdin=read,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,
                )
            finally:
                os.close(read)
        if self._process is None:
            self._drop()

    def watch(self, group: int) -> None:
        """This process group ends with the driver."""
        self._tell(group)

    def forget(self, group: int) -> None:
        """This process group is about to end; its number may then be another's."""
        self._tell(-group)

    def _tell(self, number: int) -> None:
        if self._pipe < 0 or self._process is None:
            return
        try:
            os.write(self._pipe, b"%d\n" % number)
        except OSError:
            # It is dead, or stopped and takes no more; one that knows only half would kill what it must not.
            self._process.kill()
            self.close()

    def close(self) -> None:
        """Let the keeper go, kill it if it stays; can be called again."""
        self._drop()
        if self._process is None:
            return
        try:
            self._process.wait(LEAVE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _drop(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1


def main(parent: int) -> None:
    """Keep the groups that are told on standard input until it ends or the parent is gone; then kill them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    rest = b""
    while True:
        if select.select([0], [], [], CHECK)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for told in map(int, lines):
                (groups.add if told > 0 else groups.discard)(abs(told))
        elif os.getppid() != parent:
            break
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
