"""Named moments at which a test may kill this process, to prove that nothing is lost there.

    IMAGEMILL_CRASH_AT=before-rename imagemill run tasks.jsonl      dies by SIGKILL before the first picture gets its name
    IMAGEMILL_CRASH_AT=before-rename:3 imagemill run tasks.jsonl    ... before the third

Worker processes inherit the variable, and each counts for itself. Where it is not set, a crash point costs one look into
an empty dictionary.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

VARIABLE = "IMAGEMILL_CRASH_AT"

DRIVER = (
    *("before-lock", "after-lock", "before-sweep", "before-begin-run", "after-begin-run"),
    *("before-accept", "after-accept"),
    *("before-spawn", "after-spawn", "before-load", "after-load", "before-dispatch", "after-dispatch"),
    *("before-rename", "after-rename", "before-discard", "before-folder-sync", "after-folder-sync"),
    *("before-commit", "in-commit", "after-commit"),
    *("before-end-run", "after-end-run", "before-ledger-close", "after-ledger-close", "after-unlock"),
    *("before-report", "in-report", "after-report"),
)
"""Moments of the driver, about in their order. `in-commit` is before the transaction's own end, `in-report` when the
first of the report's files has its name and the next have not."""

WORKER = (
    *("before-loading", "after-loading", "order-taken", "temporary-opened", "temporary-written", "temporary-synced"),
    *("temporary-checked", "before-receipt", "after-receipt"),
)
"""Moments of a worker, in their order; inside the driver's process where the only worker is there too."""

POINTS = DRIVER + WORKER


def asked(environment: Mapping[str, str]) -> dict[str, int]:
    """The point at which the process is to die, with how many times it comes by until then. Raises `ValueError`."""
    text = environment.get(VARIABLE, "")
    if not text:
        return {}
    name, _, count = text.partition(":")
    if name not in POINTS:
        raise ValueError(f"{VARIABLE}: there is no crash point {name!r}; there are {', '.join(POINTS)}")
    return {name: int(count or 1)}


_left = asked(os.environ)


def crash_point(name: str) -> None:
    """Die here by SIGKILL, if that was asked for and it is the time."""
    if name not in _left:
        return
    _left[name] -= 1
    if _left[name] <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
