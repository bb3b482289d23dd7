"""What to do with a task whose attempt failed: again, split, elsewhere or give up.

Pure functions of the failures so far. The rules:

| kind | what happens |
|---|---|
| bad_task, bad_model | given up at once: it would fail everywhere |
| oom | in a batch: the batch is split; alone: tried once more on the same terms, then given up |
| transient | again after a growing delay, `max_attempts` in all |
| bad_output | once elsewhere (a broken GPU makes NaN), then given up |
| worker_lost, timeout | elsewhere, alone; given up once it has cost workers on two devices, or two workers of the only device |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from imagemill.records import Try

Action: TypeAlias = Literal["again", "split", "elsewhere", "give_up"]

POISON_LOSSES = 2
"""A task that has cost this many workers is not given another."""

LOSS = ("worker_lost", "timeout")
"""Kinds of failures that cost the worker."""

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and after how many seconds at the earliest."""

    action: Action
    delay: float = 0.0


def decide(tries: Sequence[Try], max_attempts: int) -> Decision:
    """The decision after the last of `tries`; there is at least one."""
    last = tries[-1]
    if last.kind in ("bad_task", "bad_model"):
        return Decision("give_up")
    if last.kind == "oom" and last.batch_size > 1:
        return Decision("split")
    if last.kind in LOSS:
        # In a batch nobody knows who did it: the members are tried alone, and only that counts against one.
        alone = [one for one in tries if one.kind in LOSS and one.batch_size == 1 and not one.bystander]
        return Decision("give_up" if len(alone) >= POISON_LOSSES else "elsewhere")
    alike = sum(one.kind == last.kind and one.batch_size == 1 for one in tries)
    if last.kind in ("oom", "bad_output"):
        return Decision("give_up") if alike >= 2 else Decision("elsewhere")
    if alike >= max_attempts:
        return Decision("give_up")
    return Decision("again", backoff(alike))


def doubt(one: Try) -> int:
    """How much a failure speaks against trying the task on that device again: 2 when it was the task's own there, 1 when another
    in the same worker may have caused it, 0 when it may pass or its batch was too large."""
    if one.kind == "transient" or (one.kind == "oom" and one.batch_size > 1):
        return 0
    return 1 if one.kind in LOSS and (one.batch_size > 1 or one.shared or one.bystander) else 2


def blames_device(one: Try) -> bool:
    """Whether the failure speaks against the device if another device then does the task.

    Not where several failed together: there the cause was their number or any of them.
    """
    return (one.batch_size == 1 and not one.shared) or one.kind not in ("oom", *LOSS)


def backoff(failures: int, first: float = FIRST_DELAY, longest: float = LONGEST_DELAY) -> float:
    """Seconds to wait after the n-th failure in a row: doubling from `first`, never over `longest`."""
    return min(longest, first * 2 ** min(failures - 1, 30)) if failures > 0 else 0.0
