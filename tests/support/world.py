"""A world under virtual time: workers that take time, fail, crash, hang and die, around a real scheduler.

It plays the engine's loop (feed, hear, Tick, perform) over a heap of what will happen, checks at every command that
the scheduler may give it, and keeps a script of all it saw. Nothing here sleeps; every draw is from one seeded `Random`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from imagemill.records import (
    Batch,
    BatchEnded,
    BatchMade,
    Cancel,
    Command,
    Dispatch,
    Drain,
    Event,
    Failure,
    Halt,
    Kill,
    Kind,
    Load,
    Receipt,
    Settle,
    SourceEnded,
    Spawn,
    TasksArrived,
    Tick,
    Ticket,
    WorkerBeat,
    WorkerLost,
    WorkerReady,
)
from imagemill.schedule import Limits, Scheduler
from imagemill.worker_state import SAVING_AT_MOST

MOST_TURNS = 20_000
"""A world that takes longer than this runs in a circle."""


@dataclass(frozen=True)
class Faults:
    """How likely what goes wrong is; each a probability, or a set of task numbers or workers that always do."""

    task: float = 0.0  # one task of a batch fails, with a kind of its own
    whole: float = 0.0  # all of a batch fail
    crash: float = 0.0  # the worker dies in a batch
    hang: float = 0.0  # the worker falls silent in a batch
    load: float = 0.0  # loading fails, or hangs
    sudden: float = 0.0  # the process dies at any moment of its life, idle ones too
    echo: float = 0.0  # an event comes twice, the second time late
    poison: frozenset[int] = frozenset()  # tasks that kill every worker
    broken: frozenset[int] = frozenset()  # workers whose pictures are all bad
    unloadable: frozenset[int] = frozenset()  # workers that never load
    capacity: int = 1000  # batches over this size run out of memory


@dataclass
class Process:
    """A worker's process: one life. What a dead life had still to say is lost, its `WorkerLost` comes last."""

    worker: int
    state: str = "waiting"
    killed: bool = False
    gone: bool = False
    batch: Batch | None = None
    resident: frozenset[str] = frozenset()
    saving: dict[int, Batch] = field(default_factory=dict)

    @property
    def batches(self) -> list[Batch]:
        """Those whose pictures it saves, and the one on its device."""
        return [*self.saving.values(), *([self.batch] if self.batch else [])]


@dataclass
class World:
    """Run with `run()`; then `settled`, `halt`, `script`, `dispatches` and the rest tell what happened."""

    scheduler: Scheduler
    tickets: Sequence[Ticket]
    rng: Random
    faults: Faults = field(default_factory=Faults)
    chunk: int = 1000
    pause: float = 0.0  # the longest wait between two chunks of the source
    load_seconds: Callable[[Random], float] = lambda rng: 0.0
    seconds: Callable[[Ticket, Random], float] = lambda ticket, rng: ticket.cost
    ahead: float = 0.5  # how likely a batch leaves the device before it has ended
    stop_at: float | None = None
    stop_with: Event = field(default_factory=Drain)

    def __post_init__(self) -> None:
        self.limits: Limits = self.scheduler.limits
        self.now = 0.0
        self.script: list[tuple[Event, float, tuple[Command, ...]]] = []
        self.settled: dict[int, Settle] = {}
        self.attempts: dict[int, int] = {}
        self.dispatches: list[tuple[float, int, Batch]] = []
        self.turns: list[list[Dispatch]] = []  # the dispatches of each call that gave any
        self.halt: Halt | None = None
        self.spawned: set[int] = set()
        self.switches = 0
        self.completed: dict[int, int] = {}
        self.suspects: set[int] = set()  # tasks that were with a worker when it died
        self.lead = 0  # the most tasks that a ready worker was ahead of another
        self.quarantined: set[int] = set()
        self.dispatched_after_stop = 0
        self._heap: list[tuple[float, int, Process | None, Event]] = []
        self._count = 0
        self._processes: dict[int, Process] = {}
        self._next = 0
        self._feeding = False
        self._ended = False
        self._stopped = False

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> World:
        """Until `Halt`. Fails when nothing is going to happen any more, or things happen without end."""
        if self.stop_at is not None:
            self._later(self.stop_at, None, self.stop_with)
        turns = 0
        while self.halt is None:
            turns += 1
            assert turns < MOST_TURNS, "the scheduler runs in a circle"
            self._feed()
            if self.halt is None:
                self._step()
        assert self.scheduler.on(Tick(), self.now) == [], "something follows Halt"
        assert self.scheduler.wanted() == 0
        if self.halt.reason != "cancelled":
            assert not self.in_flight(), "Halt while something is in flight"
        return self

    def in_flight(self) -> set[int]:
        """Tasks that a worker has been given and that have not come back."""
        batches = [batch for process in self._processes.values() for batch in process.batches]
        return {ticket.seq for batch in batches for ticket in batch.tickets}

    def _step(self) -> None:
        wake = self.scheduler.wake_at()
        assert wake is None or wake >= self.now, "it wants to be woken in the past"
        if self._heap and (wake is None or self._heap[0][0] <= wake):
            moment, _, process, event = heapq.heappop(self._heap)
            self.now = max(self.now, moment)
            if process is None or not process.gone:
                self._happen(process, event)
        else:
            assert wake is not None, f"deadlock: {len(self.settled)} of {len(self.tickets)} tasks settled"
            self.now = wake
        self._tell(Tick())

    def _happen(self, process: Process | None, event: Event) -> None:
        match event:
            case WorkerReady(worker, resident) if process and process.state == "loading":
                process.state, process.resident = "ready", resident
                others = [self.completed[other.worker] for other in self._ready() if other is not process]
                self.completed[worker] = min(others, default=0)
            case BatchMade(worker, batch, resident) if process and process.batch and process.batch.id == batch:
                process.saving[batch] = process.batch
                process.batch, process.resident = None, resident
            case BatchEnded(worker, batch, resident=resident) if process and batch in process.saving:
                self._count_ended(worker, process.saving.pop(batch))
            case BatchEnded(worker, batch, resident=resident) if (
                process and process.batch and process.batch.id == batch
            ):
                ended, process.batch, process.resident = process.batch, None, resident
                self._count_ended(worker, ended)
            case WorkerLost(worker) if process:
                self.suspects |= {ticket.seq for one in process.batches for ticket in one.tickets}
                process.gone, process.batch, process.saving = True, None, {}
                del self._processes[process.worker]
            case Drain() | Cancel():
                self._stopped = True
            case TasksArrived():
                self._feeding = False
        self._tell(event)

    def _count_ended(self, worker: int, batch: Batch) -> None:
        self.completed[worker] += len(batch.tickets)
        counts = [self.completed[one.worker] for one in self._ready()]
        self.lead = max(self.lead, max(counts, default=0) - min(counts, default=0))

    def _ready(self) -> list[Process]:
        return [process for process in self._processes.values() if process.state == "ready" and not process.killed]

    def _feed(self) -> None:
        if self._feeding or self._ended:
            return
        wanted = min(self.scheduler.wanted(), self.chunk)
        if self._next >= len(self.tickets):
            self._ended = True
            self._tell(SourceEnded())
        elif wanted:
            part = tuple(self.tickets[self._next : self._next + wanted])
            self._next += len(part)
            self._feeding = True
            self._later(self.rng.uniform(0, self.pause) if self.pause else 0.0, None, TasksArrived(part))

    def _later(self, delay: float, process: Process | None, event: Event) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, process, event))

    def _tell(self, event: Event) -> None:
        if self.halt is not None:
            return
        commands = self.scheduler.on(event, self.now)
        self.script.append((event, self.now, tuple(commands)))
        given = [command for command in commands if isinstance(command, Dispatch)]
        if given:
            self.turns.append(given)
        for command in commands:
            assert self.halt is None, "something follows Halt"
            self._perform(command)

    # --- commands ---------------------------------------------------------------------------------------------------

    def _perform(self, command: Command) -> None:
        match command:
            case Spawn(worker):
                assert worker not in self._processes, "a second process for one worker"
                self.spawned.add(worker)
                process = self._processes[worker] = Process(worker)
                if self._luck(self.faults.sudden):
                    self._later(self.rng.uniform(0, 20), process, WorkerLost(worker, message="sudden"))
            case Load(worker):
                self._load(self._processes[worker])
            case Dispatch(worker, batch):
                self._dispatch(worker, batch)
            case Kill(worker):
                self._kill(worker)
            case Settle():
                self._settle(command)
            case Halt():
                self.halt = command

    def _kill(self, worker: int) -> None:
        process = self._processes.get(worker)
        if process and not process.killed:
            process.killed = True
            self._die(process)

    def _die(self, process: Process) -> None:
        """It was killed: what it was about to say may still come before the news of its end."""
        self._later(self.rng.uniform(0, 0.5), process, WorkerLost(process.worker, message="killed"))

    def _settle(self, settle: Settle) -> None:
        assert settle.seq not in self.settled, "settled twice"
        assert settle.seq not in self.in_flight(), "settled while a worker has it"
        assert (settle.receipt is None) != (settle.failure is None)
        assert settle.attempts == self.attempts[settle.seq]
        assert [one.attempt for one in settle.tries] == list(
            range(1, settle.attempts + (settle.failure is not None))
        ), "a try is missing from the history"
        if settle.receipt is not None:
            assert settle.receipt.attempt == settle.attempts
        self.settled[settle.seq] = settle

    def _luck(self, chance: float) -> bool:
        return chance > 0 and self.rng.random() < chance

    def _echo(self, delay: float, process: Process, event: Event) -> None:
        self._later(delay, process, event)
        if self._luck(self.faults.echo):
            self._later(delay + self.rng.uniform(0, 5), process, event)

    def _load(self, process: Process) -> None:
        assert process.state == "waiting"
        process.state = "loading"
        loading = sum(one.state == "loading" and not one.killed for one in self._processes.values())
        assert loading <= self.limits.parallel_loads, "too many load at once"
        self._come_to_life(process)

    def _come_to_life(self, process: Process) -> None:
        """How its loading goes."""
        worker, delay = process.worker, self.load_seconds(self.rng)
        if worker in self.faults.unloadable:
            self._later(delay, process, WorkerLost(worker, message="no driver"))
        elif self._luck(self.faults.load):
            if self.rng.random() < 0.5:
                kind: Kind = self.rng.choice(["worker_lost", "oom", "transient"])
                self._later(delay, process, WorkerLost(worker, kind, "it did not load"))
            elif self.rng.random() < 0.5:
                # Comes to life about when its deadline kills it: the race between `WorkerReady` and `Kill`.
                late = self.limits.load_timeout + self.rng.uniform(-0.1, 0.4)
                self._later(late, process, WorkerReady(worker, frozenset()))
        else:
            self._beats(process, delay, self.limits.load_timeout)
            self._echo(delay, process, WorkerReady(worker, frozenset()))

    def _beats(self, process: Process, until: float, timeout: float) -> None:
        """A worker that takes longer than its deadline, and beats often enough."""
        moment = 0.0
        while moment + timeout <= until:
            moment += timeout * self.rng.uniform(0.5, 0.9)
            self._later(moment, process, WorkerBeat(process.worker))

    def _dispatch(self, worker: int, batch: Batch) -> None:
        process = self._processes.get(worker)
        assert process, "a batch for a worker that is dead"
        assert not process.killed, "a batch for a worker that was killed"
        assert process.state == "ready", "a batch for a worker that is not ready"
        assert process.batch is None, "a second batch on the device"
        assert len(process.saving) < SAVING_AT_MOST, "more pictures than a worker may hold"
        in_company = [ticket.seq for one in (*process.saving.values(), batch) for ticket in one.tickets]
        assert len(in_company) == 1 or not self.suspects & set(in_company), "company for a task under suspicion"
        assert batch.tickets
        assert len({ticket.needs for ticket in batch.tickets}) == 1, "a batch of unlike tasks"
        assert len(batch.tickets) <= self.limits.batch(batch.needs)
        taken = self.in_flight()
        for ticket, attempt in zip(batch.tickets, batch.attempts, strict=True):
            assert ticket.seq not in taken, "a task that another worker has"
            assert ticket.seq not in self.settled, "a task that has ended"
            self.attempts[ticket.seq] = self.attempts.get(ticket.seq, 0) + 1
            assert attempt == self.attempts[ticket.seq]
        self.dispatched_after_stop += self._stopped
        self.switches += batch.needs[:2] != () and not set(batch.needs[:2]) <= process.resident
        self.dispatches.append((self.now, worker, batch))
        process.batch = batch
        self._work(process, batch)

    def _work(self, process: Process, batch: Batch) -> None:
        """How its batch goes."""
        worker, faults = process.worker, self.faults
        delay = sum(self.seconds(ticket, self.rng) for ticket in batch.tickets)
        if faults.poison & {ticket.seq for ticket in batch.tickets} or self._luck(faults.crash):
            self._later(self.rng.uniform(0, delay), process, WorkerLost(worker, message="crashed"))
            return
        if self._luck(faults.hang):
            if self.rng.random() < 0.5:
                late = self.limits.task_timeout + self.rng.uniform(-0.1, 0.4)
                self._later(late, process, self._ended_batch(process, batch))
            return
        self._beats(process, delay, self.limits.task_timeout)
        ended = self._ended_batch(process, batch)
        if self.rng.random() < self.ahead:
            self._echo(delay * self.rng.uniform(0.1, 1), process, BatchMade(worker, batch.id, ended.resident))
        self._echo(delay, process, ended)

    def _ended_batch(self, process: Process, batch: Batch) -> BatchEnded:
        faults, rng = self.faults, self.rng
        all_fail: Kind | None = None
        if len(batch.tickets) > faults.capacity:
            all_fail = "oom"
        elif process.worker in faults.broken:
            all_fail = "bad_output"
        elif self._luck(faults.whole):
            all_fail = rng.choice(["oom", "transient", "worker_lost"])
        receipts: list[Receipt] = []
        failures: list[Failure] = []
        for ticket, attempt in zip(batch.tickets, batch.attempts, strict=True):
            kind: Kind | None = all_fail
            if kind is None and self._luck(faults.task):
                kind = rng.choice(["bad_task", "bad_model", "oom", "transient", "bad_output"])
            if kind is None:
                receipts.append(Receipt(ticket.seq, attempt, 1, 1))
            elif rng.random() < 0.9 or all_fail:
                failures.append(Failure(ticket.seq, attempt, kind, kind))
        resident = frozenset(batch.needs)
        return BatchEnded(process.worker, batch.id, tuple(receipts), tuple(failures), resident)


def most_attempts(max_attempts: int, batch: int) -> int:
    """The most attempts that a task can have, by the table of `retry.py`.

    In company: each running out of memory halves the batch, and any other failure ends the company. Alone: one
    `bad_output`, one `oom`, one lost worker and `max_attempts - 1` passing failures leave it alive; the next ends it.
    """
    return math.floor(math.log2(max(1, batch))) + 1 + 3 + max_attempts
