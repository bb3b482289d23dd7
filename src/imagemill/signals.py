"""What ctrl-C and its kin do: the first ends what is in flight, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType
from typing import Protocol

import typer

from imagemill.progress import Progress

AT_ONCE = 5.0
"""Seconds after the second signal at which the command ends, however its worker behaves."""

SAYING = 1.0
"""Seconds that a note may take to be shown: whoever reads it may have stopped reading."""


class Stoppable(Protocol):
    """What can be ended early: an engine, an evaluation. Both answer False when nothing is under way."""

    def drain(self) -> bool:
        """End what is in flight and stop."""

    def cancel(self) -> bool:
        """Stop at once."""


@contextmanager
def stop_signals(work: Stoppable, show: Progress) -> Iterator[list[int]]:
    """The first SIGINT, SIGTERM or SIGHUP ends what is in flight, a second SIGINT or SIGTERM stops at once.

    A terminal that is closed sends SIGHUP, more than once and beside other signals: it never counts as the second. Where
    it is ignored, as `nohup` has it, it stays so. Yields the exit code to use, 128 and the first signal's number.
    """
    code: list[int] = []
    terminals = [handle for handle in (0, 1, 2) if os.isatty(handle)]

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave(terminals)
            if code:
                return
        code.append(128 + number)
        if len(code) == 1:
            if not work.drain():
                raise KeyboardInterrupt
            say("stopping: what is in flight is finished, a model that loads too; again to stop at once")
            return
        # What has ended by then is being closed: torn out of that, the command would leave no report.
        work.cancel()
        if len(code) == 2:
            # A worker inside this process that hangs cannot be ended; whatever it does, we go.
            last_resort = threading.Timer(AT_ONCE, os._exit, [code[0]])
            last_resort.daemon = True
            last_resort.start()

    caught = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    with _saying(show) as say:
        before = {number: signal.signal(number, stop) for number in caught}
        try:
            yield code
        except KeyboardInterrupt:
            raise typer.Exit(code[0] if code else 130) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _saying(show: Progress) -> Iterator[Callable[[str], None]]:
    """Shows notes on a thread: a signal may come in the middle of a write, and that must not be begun a second time."""
    notes: SimpleQueue[str | None] = SimpleQueue()  # its `put` may be called by a signal handler

    def speak() -> None:
        while (note := notes.get()) is not None:
            show.note(note)

    speaker = threading.Thread(target=speak, name="signals", daemon=True)
    speaker.start()
    try:
        yield notes.put
    finally:
        notes.put(None)
        speaker.join(SAYING)


def _leave(terminals: Sequence[int]) -> None:
    """What goes to a terminal that is gone goes nowhere from now on: every write to it would fail."""
    gone = [handle for handle in terminals if not os.isatty(handle)]
    if gone:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for handle in gone:
            os.dup2(nowhere, handle)
        os.close(nowhere)
