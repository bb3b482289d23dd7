"""What the scheduler knows of a worker, and what events make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from imagemill.records import Batch, BatchEnded, BatchMade

SAVING_AT_MOST = 2
"""Batches whose pictures a worker may still be saving when it takes the next: bounds what waits in its memory."""

PROBE_AFTER = 3
"""A worker that was lost this often in a row without a finished task takes tasks out of turn until one is done: it may have
met bad ones that stand beside each other."""

State: TypeAlias = Literal["absent", "waiting", "loading", "idle", "busy", "ending", "quarantined"]
"""A worker: no process; a process that waits to load; loading; ready; at work; being killed; never used again."""


@dataclass(slots=True)
class Worker:
    """What the scheduler knows of one worker. Times are monotonic seconds.

    `batch` is on its device, `saving` are those that left it, or are about to, and whose pictures are being saved.
    `secluded` says that the task it has is under suspicion and gets no company. `calling` is the one of `saving` whose last
    steps are still to come, so that `batch` has not begun; `spoilt` says that a batch which has ended poisoned the device's
    context for the others, `explained` that it had cost a worker before. `losses` are those in a row without a
    finished task; of them, `unexplained` are those with a task that had cost no worker before, or with none.
    """

    id: int
    device: str = ""
    state: State = "absent"
    resident: frozenset[str] = frozenset()
    batch: Batch | None = None
    saving: dict[int, Batch] = field(default_factory=dict)
    secluded: bool = False
    calling: int | None = None
    spoilt: bool = False
    explained: bool = False
    deadline: float = 0.0
    not_before: float = 0.0
    ending: str = ""
    completed: int = 0
    losses: int = 0
    unexplained: int = 0
    failed_loads: int = 0
    blame: int = 0
    idle: float = 0.0
    held: float = 0.0

    @property
    def live(self) -> bool:
        """Ready for work or at work."""
        return self.state in ("idle", "busy")

    @property
    def doubted(self) -> bool:
        """Lost so often that others than the next tasks must show whether it is whole."""
        return self.losses >= PROBE_AFTER

    @property
    def usable(self) -> bool:
        """Can still come to work."""
        return self.state != "quarantined"

    @property
    def has_room(self) -> bool:
        """Could take a batch now."""
        room = len(self.saving) < SAVING_AT_MOST and not (self.secluded and self.saving)
        return self.state == "idle" and room

    @property
    def batches(self) -> list[Batch]:
        """All it has, in the order it got them."""
        return [*self.saving.values(), *([self.batch] if self.batch else [])]

    @property
    def holds(self) -> frozenset[str]:
        """What it has resident, or will have once its batch has ended."""
        return frozenset(self.batch.needs) if self.batch else self.resident

    @property
    def present(self) -> bool:
        """Whether it has a process, or is about to have one."""
        return self.state not in ("absent", "quarantined")

    @property
    def watched(self) -> bool:
        """Whether it must give a sign of life before its deadline."""
        return self.state in ("loading", "busy") or bool(self.saving)

    # --- what happens to it -------------------------------------------------------------------------------------------

    def is_ready(self, resident: frozenset[str], completed: int) -> None:
        """It has loaded; `completed` is how many tasks it counts as having done, so that it need not catch up."""
        if self.state == "loading" and not self.ending:
            self.state, self.resident, self.failed_loads, self.completed = "idle", resident, 0, completed

    def has_made(self, event: BatchMade) -> bool:
        """Its batch is off the device, or its last steps are over. Returns whether that is news."""
        batch = self.batch
        if batch is not None and batch.id == event.batch and self.state == "busy":
            self.batch, self.state, self.resident = None, "idle", event.resident
            self.saving[batch.id] = batch
            self.calling = None if event.made else batch.id
            return True
        if event.made and event.batch == self.calling:
            self.calling = None
            return True
        return False

    def gives_back(self, event: BatchEnded) -> Batch | None:
        """The ended batch, which it has no more; None when that is no news."""
        if not self.live:
            return None
        if event.batch == self.calling:
            self.calling = None
        if event.batch in self.saving:
            return self.saving.pop(event.batch)
        batch = self.batch
        if batch is None or batch.id != event.batch:
            return None
        self.batch, self.state, self.resident = None, "idle", event.resident
        return batch

    def is_killed(self, reason: str) -> None:
        """Its end was asked for. One that is lost while loading counts as a failed load, so it keeps that state until its
        end is known."""
        self.ending, self.deadline = reason, float("inf")
        self.state = "loading" if self.state == "loading" else "ending"

    def is_gone(self) -> None:
        """Its process has ended; one that is out for good stays so."""
        self.batch, self.resident, self.ending = None, frozenset(), ""
        self.saving, self.secluded, self.calling = {}, False, None
        self.spoilt = self.explained = False
        if self.state != "quarantined":
            self.state = "absent"

    def match(self, needs: Sequence[str]) -> tuple[bool, ...]:
        """Which needs it satisfies, dearest first; tuples compare so that a dearer need always decides."""
        return tuple(need in self.resident for need in needs)


def fresh(number: int, device: str, known: Worker | None) -> Worker:
    """A worker at the start of a run: its state goes on, its counters begin anew."""
    if known is None:
        return Worker(number, device)
    return replace(
        known,
        completed=0,
        idle=0.0,
        held=0.0,
        batch=None,
        saving={},
        secluded=False,
        calling=None,
        spoilt=False,
        explained=False,
    )
