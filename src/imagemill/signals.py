"""What ctrl-C does: the first ends what is in flight, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import typer

from imagemill.progress import Progress

AT_ONCE = 5.0
"""Seconds after the second signal at which the command ends, however its worker behaves."""


class Stoppable(Protocol):
    """What can be ended early: an engine, an evaluation. Both answer False when nothing is under way."""

    def drain(self) -> bool:
        """End what is in flight and stop."""

    def cancel(self) -> bool:
        """Stop at once."""


@contextmanager
def stop_signals(work: Stoppable, show: Progress) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM ends what is in flight, the second stops at once. Yields the exit code to use."""
    code: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        code.append(128 + number)
        under_way = work.drain() if len(code) == 1 else work.cancel()
        if len(code) == 2:
            # A worker inside this process that hangs cannot be ended; whatever it does, we go.
            last_resort = threading.Timer(AT_ONCE, os._exit, [code[0]])
            last_resort.daemon = True
            last_resort.start()
        if not under_way:
            raise KeyboardInterrupt
        if len(code) == 1:
            show.note("stopping: what is in flight is finished; again to stop at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield code
    except KeyboardInterrupt:
        raise typer.Exit(code[0] if code else 130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
