"""The scheduler under virtual time: what a policy would do with these tasks on so many workers.

It runs the real `Scheduler`; only the workers are made up. Nothing fails here and nothing waits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

from imagemill.records import (
    BatchEnded,
    Command,
    Dispatch,
    Event,
    Halt,
    Load,
    Receipt,
    SourceEnded,
    Spawn,
    TasksArrived,
    Ticket,
    WorkerReady,
)
from imagemill.schedule import Limits, Scheduler


def ticket_cost(ticket: Ticket, worker: int) -> float:
    """The ticket's own cost as seconds, the same on every worker."""
    return ticket.cost


@dataclass(frozen=True, slots=True)
class World:
    """How long things take, in seconds.

    `seconds` tells what a ticket takes on a worker; a batch takes the sum of its tickets. `switch_seconds[i]` is added
    when need number i of a batch is not resident. After loading a worker holds `resident`, after a batch its needs.
    """

    seconds: Callable[[Ticket, int], float] = ticket_cost
    load_seconds: float = 0.0
    switch_seconds: Sequence[float] = ()
    resident: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Simulation:
    """What came of it. Times are virtual seconds from the start of the run, loading included.

    `idle` and `held` are the scheduler's own account for each worker, `switches[i]` how many batches found need i not
    resident, `dispatched` the tasks of each worker, `rounds` those of lockstep. `largest_lead` is by how many finished
    tasks one worker was ever ahead of another, where a late one starts level with the slowest. `first_start` is 0 when
    there was no task.
    """

    makespan: float
    first_start: float
    idle: tuple[float, ...]
    held: tuple[float, ...]
    switches: tuple[int, ...]
    largest_lead: int
    rounds: int
    dispatched: tuple[int, ...]


def simulate(
    tickets: Iterable[Ticket],
    workers: int,
    policy: str = "dynamic",
    lead: int = 1,
    limits: Limits | None = None,
    world: World | None = None,
) -> Simulation:
    """Run the tickets on `workers` workers numbered from 0. The same arguments give the same result.

    Raises `RuntimeError` when the scheduler stops short: nothing is under way, and it neither decides nor halts.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least one is needed")
    clock = _Clock(tickets, workers, Scheduler(_names(workers), policy, lead, limits or Limits()), world or World())
    return clock.run()


def _names(workers: int) -> dict[int, str]:
    return {number: f"worker {number}" for number in range(workers)}


@dataclass(slots=True)
class _Clock:
    """The event loop: events by their time, then by the order in which they were set."""

    tickets: Iterable[Ticket]
    workers: int
    scheduler: Scheduler
    world: World
    now: float = 0.0
    first_start: float | None = None
    lead: int = 0
    switches: list[int] = field(default_factory=list)
    _agenda: list[tuple[float, int, Event]] = field(default_factory=list)
    _number: count[int] = field(default_factory=count)
    _resident: list[frozenset[str]] = field(default_factory=list)
    _dispatched: list[int] = field(default_factory=list)
    _finished: dict[int, int] = field(default_factory=dict)
    _halt: Halt | None = None

    def run(self) -> Simulation:
        self._resident = [self.world.resident] * self.workers
        self._dispatched = [0] * self.workers
        source = iter(self.tickets)
        self._feed(source)
        while self._halt is None:
            if not self._agenda:
                raise RuntimeError(f"the scheduler stopped short at {self.now:g} s: {self._state()}")
            self.now, _, event = heapq.heappop(self._agenda)
            self._count(event)
            self._obey(self.scheduler.on(event, self.now))
            self._feed(source)
        if self._halt.reason != "done":
            raise RuntimeError(f"the scheduler gave up at {self.now:g} s ({self._halt.reason}): {self._state()}")
        return self._result()

    def _count(self, event: Event) -> None:
        """Keep the largest lead. A worker that comes late starts level with the slowest, as its policy sees it."""
        if isinstance(event, WorkerReady):
            self._finished[event.worker] = min(self._finished.values(), default=0)
        elif isinstance(event, BatchEnded):
            self._finished[event.worker] += len(event.receipts)
            self.lead = max(self.lead, self._finished[event.worker] - min(self._finished.values()))

    def _feed(self, source: Iterable[Ticket]) -> None:
        """Read as far ahead as the scheduler wants, until it wants no more."""
        while wanted := self.scheduler.wanted():
            tickets = tuple(islice(source, wanted))
            if tickets:
                self._obey(self.scheduler.on(TasksArrived(tickets), self.now))
            if len(tickets) < wanted:
                self._obey(self.scheduler.on(SourceEnded(), self.now))

    def _obey(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case Load(worker):
                    self._at(self.world.load_seconds, WorkerReady(worker, self.world.resident))
                case Dispatch():
                    self._work(command)
                case Halt():
                    self._halt = command
                case Spawn():
                    continue  # it takes no time here
                case _:
                    continue  # Settle needs nothing done, and Kill never comes where nothing fails

    def _work(self, command: Dispatch) -> None:
        worker, batch = command.worker, command.batch
        self.first_start = self.now if self.first_start is None else self.first_start
        seconds = sum(self.world.seconds(ticket, worker) for ticket in batch.tickets)
        for place, need in enumerate(batch.needs):
            if place == len(self.switches):
                self.switches.append(0)
            if need not in self._resident[worker]:
                self.switches[place] += 1
                seconds += self.world.switch_seconds[place] if place < len(self.world.switch_seconds) else 0.0
        resident = self._resident[worker] = frozenset(batch.needs)
        self._dispatched[worker] += len(batch.tickets)
        receipts = tuple(
            Receipt(ticket.seq, attempt, 1, 1, batch_size=len(batch.tickets))
            for ticket, attempt in zip(batch.tickets, batch.attempts, strict=True)
        )
        self._at(seconds, BatchEnded(worker, batch.id, receipts, (), resident, seconds))

    def _at(self, seconds: float, event: Event) -> None:
        heapq.heappush(self._agenda, (self.now + seconds, next(self._number), event))

    def _state(self) -> str:
        board = self.scheduler.board
        states = ", ".join(f"{number} {worker.state}" for number, worker in board.workers.items())
        return f"{len(board.backlog)} tasks wait, source {'ended' if board.source_ended else 'open'}, workers: {states}"

    def _result(self) -> Simulation:
        board = self.scheduler.board
        return Simulation(
            makespan=self.now,
            first_start=self.first_start or 0.0,
            idle=tuple(worker.idle for worker in board.workers.values()),
            held=tuple(worker.held for worker in board.workers.values()),
            switches=tuple(self.switches),
            largest_lead=self.lead,
            rounds=self.scheduler.rounds_done,
            dispatched=tuple(self._dispatched),
        )
