"""Scheduler, retry, ledger and the driver's loop together, through any order of events, crashes and resumes.

The parts are the real ones, on real files; workers and time are played (`tests/support/world.py` holds the workers to what
a process can do). Beside them runs a model of the promises, small enough to be read: what ends a task, what puts a device
out, who must have been killed by now, what may stand in the ledger.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from imagemill import progress
from imagemill.intake import Models
from imagemill.ledger import FILE_NAME, Ledger
from imagemill.logfiles import DRIVER
from imagemill.loop import Run
from imagemill.models import Model
from imagemill.plan import PlannedModel
from imagemill.publish import OutputFolder
from imagemill.records import (
    BatchEnded,
    BatchMade,
    Command,
    Dispatch,
    Event,
    Failure,
    Kill,
    Kind,
    Load,
    ModelSpec,
    Outcome,
    PlannedTask,
    Receipt,
    Settle,
    SinkSpec,
    Spawn,
    Task,
    Tick,
    Ticket,
    WorkerBeat,
    WorkerLost,
    WorkerReady,
    WorkerSpec,
)
from imagemill.schedule import BLAME_AT_MOST, LOADS_AT_MOST, LOSSES_AT_MOST, Limits, Scheduler
from imagemill.sinks.files import temporary_path
from world import Process, World, most_attempts

POLICIES = ("dynamic", "static", "lockstep", "window")
LOAD_TIMEOUT, TASK_TIMEOUT = 20.0, 10.0
SPEC = ModelSpec("fake", "fake", "fake", "fake")
MEMORY = Path("/dev/shm")
"""Where files cost no disk; every commit is an fsync."""

LAST_TASKS = 12
"""New tasks of the last run of a folder: enough for a bad device to be found out."""

MOST_TURNS = 3000
"""A calm run that takes longer runs in a circle."""

ENDS = st.sampled_from(
    ["done"] * 6 + ["transient", "transient", "oom", "bad_output", "worker_lost", "bad_task", "nothing"]
)
PICK = st.integers(0, 11)
CHANGES = st.sampled_from([None, None, 0, 1])
"""What tasks are from now on; None: what they were."""


def planned(seq: int, adapters: int, changed: int = 0) -> PlannedTask:
    """Task number `seq` of the source."""
    name = f"t{seq}"
    task = Task(name, f"prompt {seq}", width=16, height=16, seed=changed, output_path=f"{name}.png")
    print_ = sha256(f"{name} {changed}".encode()).hexdigest()
    return PlannedTask(task, print_, Ticket(seq, ("model:fake", f"adapters:{seq % adapters}"), "", 1.0 + seq % 3))


def content(task: PlannedTask) -> bytes:
    """What stands for its picture: it hangs on the task alone."""
    return task.fingerprint.encode()


# --- the model of the promises ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blow:
    """A failed attempt: its kind, how many tasks shared the batch, on which worker, and whether that had other batches."""

    kind: str
    size: int
    worker: int
    company: bool = False
    bystander: bool = False  # another batch did it: it poisoned the context, or this one had not begun

    @property
    def of_others(self) -> bool:
        """Whether another task may have done it."""
        return self.kind in ("worker_lost", "timeout") and (self.size > 1 or self.company or self.bystander)


def ends(history: Sequence[Blow], max_attempts: int) -> bool:
    """Whether a task that met all this is given up: the table of docs/reliability.md. Failures in company do not count."""
    last = history[-1]
    alone = [blow.kind for blow in history if blow.size == 1 and not blow.bystander]
    if last.kind in ("bad_task", "bad_model"):
        return True
    if last.kind in ("worker_lost", "timeout"):
        return sum(kind in ("worker_lost", "timeout") for kind in alone) >= 2
    if last.kind == "oom" and last.size > 1:
        return False
    return alone.count(last.kind) >= (2 if last.kind in ("oom", "bad_output") else max_attempts)


@dataclass
class Device:
    """What a worker went through, and what it has now."""

    held: dict[int, tuple[Ticket, ...]] = field(default_factory=dict)
    attempts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    loading: bool = False
    unready: bool = False  # a process that was never ready
    calling: int | None = None  # the batch whose last steps are still to come, though it has the next
    poisoned: bool = False  # by a batch that has ended
    explained: bool = False  # one with a task that had cost a worker before
    killed: str = ""
    left: set[int] = field(default_factory=set)  # batches that called for the next one
    sign: float = 0.0  # of life, the last one
    unexplained: int = 0  # losses in a row, but for those with a task that had cost a worker before
    failed_loads: int = 0
    blame: int = 0
    out: bool = False

    @property
    def silent_for_at_most(self) -> float:
        """Seconds that it may be silent now."""
        if self.killed or not (self.loading or self.held):
            return math.inf
        return LOAD_TIMEOUT if self.loading else TASK_TIMEOUT


class Promises:
    """Follows one run. `saw` takes what happened and what was decided, and fails where that breaks a promise."""

    def __init__(self, limits: Limits, workers: int, policy: str) -> None:
        self.limits = limits
        self.policy = policy
        self.devices = {number: Device() for number in range(workers)}
        self.history: dict[int, list[Blow]] = {}
        self.settled: dict[int, str] = {}

    def saw(self, event: Event, commands: Sequence[Command], now: float) -> None:
        """Compare the decisions with those that follow from the facts."""
        due = self._hear(event, now)
        settles = {one.seq: one.failure.kind if one.failure else "done" for one in commands if isinstance(one, Settle)}
        assert settles == due, "a task was settled that should go on, or goes on though it should be settled"
        self.settled |= settles
        for command in commands:
            self._follow(command, now)
        if isinstance(event, BatchEnded) and any(one.kind == "worker_lost" for one in event.failures):
            device = self.devices[event.worker]
            assert device.killed or event.batch in device.attempts, "a poisoned context is used on"
        if isinstance(event, Tick):
            late = [number for number, one in self.devices.items() if now - one.sign >= one.silent_for_at_most]
            assert not late, "a silent worker lives on after its deadline"

    def _hear(self, event: Event, now: float) -> dict[int, str]:
        """What must be settled now."""
        match event:
            case WorkerReady(worker) if self.devices[worker].loading and not self.devices[worker].killed:
                device = self.devices[worker]
                device.loading = device.unready = False
                device.failed_loads = 0
            case WorkerBeat(worker):
                self.devices[worker].sign = now
            case BatchMade(worker, batch) if batch in self.devices[worker].held and not self.devices[worker].killed:
                device = self.devices[worker]
                news = batch == max(device.held) and batch not in device.left
                if news or (event.made and batch == device.calling):
                    device.sign = now
                    device.calling = None if event.made else batch
                    device.left.add(batch)
            case BatchEnded(worker, batch) if batch in self.devices[worker].held and not self.devices[worker].killed:
                self.devices[worker].sign = now
                return self._ended(event)
            case WorkerLost(worker):
                return self._lost(event)
        return {}

    def _ended(self, event: BatchEnded) -> dict[int, str]:
        device, due = self.devices[event.worker], {}
        tickets, made = device.held.pop(event.batch), {receipt.seq for receipt in event.receipts}
        kinds = {failure.seq: failure.kind for failure in event.failures}
        if "worker_lost" in kinds.values():
            device.poisoned = True
            device.explained |= self._killers(tickets)
        device.calling = None if device.calling == event.batch else device.calling
        for ticket in tickets:
            if ticket.seq in made:
                due[ticket.seq] = "done"
                device.unexplained = device.blame = 0
                self._blame(ticket.seq, event.worker)
            else:
                due |= self._failed(ticket.seq, Blow(kinds.get(ticket.seq, "transient"), len(tickets), event.worker))
        return due

    def _blame(self, seq: int, doer: int) -> None:
        """A task that failed elsewhere was done here: that speaks against those devices."""
        blows = [blow for blow in self.history.get(seq, ()) if blow.worker != doer]
        shared = ("oom", "worker_lost", "timeout")
        alone = {blow.worker for blow in blows if blow.kind not in shared or (blow.size == 1 and not blow.company)}
        for number in alone:
            self.devices[number].blame += 1
            self.devices[number].out |= self.devices[number].blame >= BLAME_AT_MOST

    def _failed(self, seq: int, blow: Blow) -> dict[int, str]:
        history = self.history.setdefault(seq, [])
        history.append(blow)
        return {seq: blow.kind} if ends(history, self.limits.max_attempts) else {}

    def _lost(self, event: WorkerLost) -> dict[int, str]:
        device, due = self.devices[event.worker], dict[int, str]()
        kind = "timeout" if device.killed.startswith("silent") else event.kind
        explained = device.explained or any(self._killers(held) for held in device.held.values())
        device.unexplained += not explained
        not_theirs = device.poisoned or "tasks in a row failed here" in device.killed
        company = len(device.held) > 1 or not_theirs
        for batch, tickets in device.held.items():
            waits = device.calling is not None and batch not in device.left
            for ticket in tickets:
                blow = Blow(kind, len(tickets), event.worker, company, not_theirs or waits)
                due |= self._failed(ticket.seq, blow)
        device.failed_loads += device.unready
        device.out |= device.unexplained >= LOSSES_AT_MOST or device.failed_loads >= LOADS_AT_MOST
        device.held, device.loading, device.unready, device.killed = {}, False, False, ""
        device.calling, device.poisoned, device.explained, device.left = None, False, False, set()
        return due

    def _killers(self, tickets: Sequence[Ticket]) -> bool:
        blows = [blow for ticket in tickets for blow in self.history.get(ticket.seq, ())]
        return any(blow.kind in ("worker_lost", "timeout") for blow in blows)

    def _follow(self, command: Command, now: float) -> None:
        match command:
            case Spawn(worker):
                assert not self.devices[worker].out, "a quarantined device is used again"
                self.devices[worker].unready = True
            case Load(worker):
                self.devices[worker].loading, self.devices[worker].sign = True, now
            case Dispatch(worker, batch):
                device = self.devices[worker]
                self._check_elsewhere(worker, [ticket.seq for ticket in batch.tickets])
                device.held[batch.id], device.sign = batch.tickets, now
                device.attempts[batch.id] = batch.attempts
            case Kill(worker, reason):
                device = self.devices[worker]
                if reason.startswith("silent"):
                    assert now - device.sign >= device.silent_for_at_most, "killed, though it gave signs of life"
                device.killed = reason

    def _check_elsewhere(self, worker: int, seqs: Sequence[int]) -> None:
        """What failed on a device comes back to it only where no other device is left (a leash may keep others back)."""
        if self.policy == "window" or len(seqs) > 1:
            return
        blows = self.history.get(seqs[0], ())
        met = {blow.worker for blow in blows if blow.kind != "transient" and not (blow.kind == "oom" and blow.size > 1)}
        own = {blow.worker for blow in blows if blow.worker in met and not blow.of_others}
        for against in (met, met & own):
            if worker in against:
                others = [number for number, device in self.devices.items() if number not in against and not device.out]
                assert not others, "a task came back to a device that it failed on, though a better one is left"


# --- the workers, and the driver around them ----------------------------------------------------------------------------


class Watched(Scheduler):
    """The real scheduler; each call is shown to whoever watches."""

    watch: Callable[[Event, Sequence[Command], float], None]

    def on(self, event: Event, now: float) -> list[Command]:
        halted = self.halted
        commands = super().on(event, now)
        if not halted:
            self.watch(event, commands, now)
        return commands


class Workers(World):
    """Processes that do what the test says, and nothing by themselves. Also the executor of the run."""

    tell: Callable[[Event], None]

    def _come_to_life(self, process: Process) -> None: ...

    def _die(self, process: Process) -> None: ...

    def _work(self, process: Process, batch: Any) -> None: ...

    def _tell(self, event: Event) -> None:
        self.tell(event)

    def watch(self, commands: Sequence[Command]) -> None:
        for command in commands:
            assert self.halt is None, "something follows Halt"
            self._perform(command)

    def happen(self, process: Process, event: Event) -> None:
        self._happen(process, event)

    @property
    def processes(self) -> list[Process]:
        return [self._processes[number] for number in sorted(self._processes)]

    def start(self, specs: object) -> None: ...

    def load(self, worker: int, model: object = None) -> None: ...

    def send(self, worker: int, order: Any) -> None:
        sent = {(to, batch.id): batch for _, to, batch in self.dispatches}[worker, order.batch]
        assert [one.ticket for one in order.tasks] == list(sent.tickets), "another batch was sent"

    def kill(self, worker: int) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def events(self, timeout: float | None) -> list[Event]:
        """Only asked after a stop: the killed workers are gone."""
        gone = [process for process in self.processes if process.killed]
        for process in gone:
            process.gone = True
            del self._processes[process.worker]
        return [WorkerLost(process.worker, message="killed") for process in gone]


class Clock:
    """Stands in for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Driver(Run):
    """The real run; one turn at a time."""

    def turn(self, *events: Event) -> list[Outcome]:
        """What the loop does between two looks at the workers, who said this."""
        self._feed()
        for event in [*self._asked(), *events, Tick()]:
            if self.halt is None:
                self._take(event)
        if self.halt is not None and self.halt.reason == "cancelled":
            self._bury()
        self._commit(force=self.halt is not None)
        return list(self._in_order())

    def hear(self, event: Event) -> None:
        self._take(event)

    @property
    def more_to_feed(self) -> bool:
        return not self.scheduler.board.source_ended


def model_of(name: str) -> Model:
    return Model(SPEC, PlannedModel.__new__(PlannedModel), None)


class Mill(RuleBasedStateMachine):
    """One folder, driven through runs that end in every way."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        workers=st.integers(1, 4),
        batch=st.sampled_from([1, 1, 2, 4]),
        attempts=st.integers(1, 3),
        read_ahead=st.sampled_from([1, 3, 1024]),
        loads=st.integers(1, 2),
        tasks=st.integers(0, 10),
        poison=st.frozensets(st.integers(0, 12), max_size=2),
        bad=st.sampled_from(["", "nan", "crash", "load"]),
    )
    def open(
        self,
        policy: str,
        workers: int,
        batch: int,
        attempts: int,
        read_ahead: int,
        loads: int,
        tasks: int,
        poison: frozenset[int],
        bad: str,
    ) -> None:
        self.policy, self.workers, self.poison = policy, workers, poison
        self.limits = Limits(LOAD_TIMEOUT, TASK_TIMEOUT, attempts, loads, read_ahead, lambda _: batch)
        self.bad = {workers - 1: bad} if bad and workers > 1 else {}
        self.tasks = [planned(seq, 3) for seq in range(tasks)]
        self.scratch = TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.lives = 0
        self.place = Path(self.scratch.name) / "0"
        self.known: dict[str, str] = {}  # what the ledger must hold: id → done, or a kind of failure
        self.changed = 0  # what the tasks are now
        self.former: dict[
            tuple[str, int], str
        ] = {}  # what it must hold of what they were, until there is a new picture
        self.clock = Clock()
        self.patch = patch("imagemill.loop.time", self.clock)
        self.patch.start()
        self.begin(())

    def teardown(self) -> None:
        if not hasattr(self, "patch"):
            return
        try:
            self.come_to_an_end()
        finally:
            self.patch.stop()
            self.ledger.staging.abandon()
            self.ledger.close()
            self.folder.close()
            self.scratch.cleanup()

    # --- a run begins and ends ------------------------------------------------------------------------------------------

    def begin(self, retry: Sequence[str], changed: int | None = None) -> None:
        """As the engine does: stage, compare, sweep, begin, apply."""
        self.folder = OutputFolder(self.place)
        self.ledger = Ledger(self.place / FILE_NAME)
        wanted = self.changed if changed is None else changed
        staging = self.ledger.staging
        staging.begin()
        for seq in range(len(self.tasks)):
            assert staging.add(planned(seq, 3, wanted), f"t{seq}") is None
        staging.recall(self.folder.damaged, files=True)
        self.check_ledger()
        if wanted != self.changed:
            self.change(wanted)
        again = list(self.folder.damaged(staging.done()))
        self.folder.sweep(self.ledger.open_folders())
        self.ledger.begin_run(self.clock.now, {}, {})
        staging.apply(self.ledger.run, retry=retry, again=again)
        self.known = {name: state for name, state in self.known.items() if name not in again and state not in retry}
        self.check_ledger()
        self.handed: list[int] = []
        self.start_run()

    def change(self, changed: int) -> None:
        """Other content under the old ids: known is what was booked for it, if the picture of that is still there."""
        self.former |= {(name, self.changed): state for name, state in self.known.items()}
        self.changed = changed
        self.tasks = [planned(seq, 3, changed) for seq in range(len(self.tasks))]
        self.known = {
            one.task.id: state
            for one in self.tasks
            if (state := self.former.get((one.task.id, changed), "")) and (state != "done" or self.is_there(one))
        }
        self.former = {
            key: state for key, state in self.former.items() if key[1] != changed or key[0] not in self.known
        }

    def is_there(self, one: PlannedTask) -> bool:
        place = self.place / (one.task.output_path or "")
        return place.is_file() and place.read_bytes() == content(one)

    def book(self, known: dict[str, str]) -> None:
        """This is what the ledger holds now; a new picture is in the place of all that the task's were."""
        made = {name for name, state in known.items() if state == "done" and self.known.get(name) != "done"}
        self.former = {key: state for key, state in self.former.items() if key[0] not in made}
        self.known = known

    def start_run(self) -> None:
        scheduler = Watched({n: f"GPU {n}" for n in range(self.workers)}, self.policy, 2, self.limits)
        self.world = Workers(scheduler, [one.ticket for one in self.tasks], Random(0))
        self.world.now = self.clock.now
        self.promises = Promises(self.limits, self.workers, self.policy)
        show = progress.create(quiet=True)
        show.begin(len(self.tasks), {n: f"GPU {n}" for n in range(self.workers)})
        self.run = Driver(
            feed=self.ledger.work(page=3),
            scheduler=scheduler,
            executor=self.world,
            specs={n: WorkerSpec(n, "cpu", f"GPU {n}", SPEC) for n in range(self.workers)},
            models=Models(model_of, "fake"),
            sink=SinkSpec("files", str(self.place)),
            ledger=self.ledger,
            folder=self.folder,
            progress=show,
            started=self.clock.now,
        )
        scheduler.watch, self.world.tell = self.saw, self.run.hear
        self.turn()

    def saw(self, event: Event, commands: Sequence[Command], now: float) -> None:
        self.world.now = now
        self.promises.saw(event, commands, now)
        self.world.watch(commands)

    def turn(self, process: Process | None = None, event: Event | None = None) -> None:
        """Something happens to a worker, or nothing; the driver does what it does then."""
        if process is not None and event is not None:
            self.world.happen(process, event)
        self.deliver(self.run.turn())
        self.check_devices()
        most = most_attempts(self.limits.max_attempts, self.limits.batch(("model:fake",)))
        assert max(self.world.attempts.values(), default=0) <= most

    def check_devices(self) -> None:
        """The bad ones are out, and no others."""
        if self.going:
            states = {number: worker.state for number, worker in self.run.scheduler.board.workers.items()}
            out = {number for number, state in states.items() if state == "quarantined"}
            assert out == {number for number, device in self.promises.devices.items() if device.out}

    def deliver(self, outcomes: Sequence[Outcome]) -> None:
        rows = self.rows()
        for outcome in outcomes:
            assert rows[outcome.task.id] == (outcome.kind or "done"), "handed out before it was on disk"
            self.handed.append(outcome.seq)
        assert self.handed == list(range(len(self.handed))), "outcomes out of order"

    def rows(self) -> dict[str, str]:
        found = self.ledger.rows("SELECT id, ifnull(kind, state) AS state FROM tasks")
        return {row["id"]: row["state"] for row in found if row["state"] != "pending"}

    def expected(self) -> dict[str, str]:
        return self.known | {f"t{seq}": state for seq, state in self.promises.settled.items()}

    def check_ledger(self) -> None:
        assert self.rows() == self.known, "the ledger forgot something, or made something up"

    def close_run(self) -> None:
        """The run is over: what was settled is all on disk, and no half file is left."""
        assert self.run.halt is not None
        self.book(self.expected())
        self.check_ledger()
        done = "SELECT path, json_extract(receipt, '$.sha256') AS sha256 FROM tasks WHERE state = 'done'"
        for row in self.ledger.rows(done):
            data = (self.place / row["path"]).read_bytes()
            assert sha256(data).hexdigest() == row["sha256"], "done, but the file is another"
        if self.run.halt.reason == "done":
            assert self.handed == list(range(len(self.tasks))), "not every task was handed back"
        assert not list(self.place.rglob("*.part")), "temporary files after a clean end"
        self.ledger.end_run(self.clock.now, self.run.halt.reason, {})

    # --- who could do something -----------------------------------------------------------------------------------------

    @property
    def going(self) -> bool:
        return self.run.halt is None

    def some(self, fits: Callable[[Process], bool], pick: int) -> Process | None:
        found = [process for process in self.world.processes if fits(process)]
        return found[pick % len(found)] if found else None

    def ended(self, process: Process, number: int, how: Sequence[str]) -> BatchEnded:
        """The worker's last word of a batch; for what it made there is a file."""
        batch = next(one for one in process.batches if one.id == number)
        receipts, failures = list[Receipt](), list[Failure]()
        for place, (ticket, attempt) in enumerate(zip(batch.tickets, batch.attempts, strict=True)):
            kind = how[place % len(how)]
            if kind == "done":
                receipts.append(self.receipt(self.tasks[ticket.seq], attempt, len(batch.tickets)))
                continue
            # What it had begun to write it removes.
            (self.place / temporary_path(self.tasks[ticket.seq], attempt)).unlink(missing_ok=True)
            if kind != "nothing":
                failures.append(Failure(ticket.seq, attempt, kind, f"{kind} it was"))  # type: ignore[arg-type]
        return BatchEnded(process.worker, number, tuple(receipts), tuple(failures), frozenset(batch.needs))

    def receipt(self, one: PlannedTask, attempt: int, size: int) -> Receipt:
        temporary, data = temporary_path(one, attempt), content(one)
        (self.place / temporary).write_bytes(data)
        digest, path = sha256(data).hexdigest(), one.task.output_path or ""
        return Receipt(one.ticket.seq, attempt, 16, 16, len(data), digest, temporary, path, size)

    def half_written(self) -> None:
        """Whoever has a batch has begun to write."""
        for process in self.world.processes:
            for batch in process.batches:
                for ticket, attempt in zip(batch.tickets, batch.attempts, strict=True):
                    (self.place / temporary_path(self.tasks[ticket.seq], attempt)).write_bytes(b"half")

    # --- rules ----------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.going)
    @rule(pick=PICK)
    def a_worker_is_ready(self, pick: int) -> None:
        process = self.some(lambda one: one.state == "loading", pick)
        if process:
            self.turn(process, WorkerReady(process.worker, frozenset({"model:fake"})))

    @precondition(lambda self: self.going)
    @rule(steps=st.lists(st.tuples(PICK, st.booleans(), ENDS), min_size=3, max_size=20))
    def work_goes_on(self, steps: list[tuple[int, bool, str]]) -> None:
        """One worker after another does what comes next; some of it fails."""
        for pick, ahead, how in steps:
            process = self.some(lambda one: one.killed or one.state == "loading" or bool(one.batches), pick)
            if not self.going or process is None:
                return
            if ahead and process.batch and not process.killed:
                needs = frozenset(process.batch.needs)
                self.turn(process, BatchMade(process.worker, process.batch.id, needs, made=pick % 2 == 0))
            else:
                self.turn(process, self.next_event(process, how))

    @precondition(lambda self: self.going)
    @rule(pick=PICK)
    def a_worker_beats(self, pick: int) -> None:
        process = self.some(lambda one: one.state == "loading" or bool(one.batches), pick)
        if process:
            self.turn(process, WorkerBeat(process.worker))

    @precondition(lambda self: self.going)
    @rule(pick=PICK, made=st.booleans())
    def a_batch_leaves_the_device(self, pick: int, made: bool) -> None:
        process = self.some(lambda one: one.batch is not None, pick)
        if process and process.batch:
            self.turn(process, BatchMade(process.worker, process.batch.id, frozenset(process.batch.needs), made))

    @precondition(lambda self: self.going)
    @rule(pick=PICK)
    def the_last_steps_of_a_batch_that_called_early_are_over(self, pick: int) -> None:
        process = self.some(lambda one: bool(one.saving), pick)
        if process:
            batch = list(process.saving.values())[-1]
            self.turn(process, BatchMade(process.worker, batch.id, frozenset(batch.needs)))

    @precondition(lambda self: self.going)
    @rule(pick=PICK, which=PICK, how=st.lists(ENDS, min_size=1, max_size=4), twice=st.booleans())
    def a_batch_ends(self, pick: int, which: int, how: list[str], twice: bool) -> None:
        process = self.some(lambda one: bool(one.batches), pick)
        if process:
            batch = process.batches[which % len(process.batches)]
            event = self.ended(process, batch.id, how)
            self.turn(process, event)
            if twice and self.going and not process.gone:
                self.turn(process, event)

    @precondition(lambda self: self.going)
    @rule(pick=PICK, kind=st.sampled_from(["worker_lost", "worker_lost", "oom", "transient"]))
    def a_worker_dies(self, pick: int, kind: Kind) -> None:
        process = self.some(lambda one: True, pick)
        if process:
            self.half_written()
            loading = process.state in ("waiting", "loading")
            self.turn(process, WorkerLost(process.worker, kind if loading else "worker_lost", "died"))

    @precondition(lambda self: self.going)
    @rule(pick=PICK)
    def a_killed_worker_is_gone(self, pick: int) -> None:
        process = self.some(lambda one: one.killed, pick)
        if process:
            self.turn(process, WorkerLost(process.worker, message="killed"))

    @precondition(lambda self: self.going)
    @rule(seconds=st.sampled_from([0.5, 4.0, 9.5, 20.0, 90000.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.turn()

    @precondition(lambda self: self.going)
    @rule()
    def no_picture_comes_back_from_saving(self) -> None:
        """Every device is free again, every disk hangs."""
        while process := self.some(lambda one: one.batch is not None and not one.killed, 0):
            batch = process.batch
            assert batch is not None
            self.turn(process, BatchMade(process.worker, batch.id, frozenset(batch.needs)))
        self.clock.now += TASK_TIMEOUT
        self.turn()

    @precondition(lambda self: self.going)
    @rule(pick=PICK)
    def a_batch_ends_just_as_its_worker_is_killed(self, pick: int) -> None:
        """The picture comes too late to count: another attempt makes the task's own."""
        process = self.some(lambda one: bool(one.batches), pick)
        if process:
            self.clock.now += TASK_TIMEOUT
            self.turn()
            if self.going and process.killed:
                self.turn(process, self.ended(process, process.batches[0].id, ["done"]))
                self.turn(process, WorkerLost(process.worker, message="killed"))

    @precondition(lambda self: self.going)
    @rule()
    def the_driver_sleeps_until_something_is_due(self) -> None:
        wake = self.run.scheduler.wake_at()
        if wake is not None:
            self.clock.now = wake
            self.turn()

    @precondition(lambda self: self.going)
    @rule(hard=st.booleans())
    def a_signal_comes(self, hard: bool) -> None:
        self.half_written()
        (self.run.cancel if hard else self.run.drain)()
        before = len(self.world.dispatches)
        self.turn()
        assert len(self.world.dispatches) == before, "something starts after the signal"

    @rule(garbage=st.binary(max_size=64), halfway=st.booleans(), retry=st.booleans(), changed=CHANGES)
    def the_driver_dies(self, garbage: bytes, halfway: bool, retry: bool, changed: int | None) -> None:
        """What the kernel holds of the files is all that is left: pictures may be ahead of the ledger."""
        self.half_written()
        if halfway:
            self.ledger.staging.begin()
        self.lives += 1
        image = Path(self.scratch.name) / str(self.lives)
        shutil.copytree(self.place, image)
        if (wal := image / f"{FILE_NAME}-wal").exists():
            # A write that was under way is torn.
            wal.write_bytes(wal.read_bytes() + garbage)
        if halfway:
            self.ledger.staging.abandon()
        handed = {f"t{seq}" for seq in self.handed}
        self.folder.close()
        self.ledger.close()
        shutil.rmtree(self.place)
        self.place = image
        left = Ledger(image / FILE_NAME)
        rows = {row["id"]: row["state"] for row in left.rows("SELECT id, ifnull(kind, state) AS state FROM tasks")}
        left.close()
        survived = {name: state for name, state in rows.items() if state != "pending"}
        may = self.expected()
        assert survived.items() <= may.items(), "the ledger holds what never was"
        assert self.known.items() <= survived.items(), "what was done before is forgotten"
        assert handed <= survived.keys(), "what was handed out is forgotten"
        self.book(survived)
        self.begin(("oom", "transient") if retry else (), changed)

    @precondition(lambda self: not self.going)
    @rule(
        gone=st.frozensets(PICK, max_size=3),
        more=st.integers(0, 3),
        retry=st.sampled_from([(), ("oom", "worker_lost")]),
        changed=CHANGES,
    )
    def the_same_command_again(
        self, gone: frozenset[int], more: int, retry: tuple[str, ...], changed: int | None
    ) -> None:
        """Pictures were deleted or altered meanwhile, the source has more rows, or others under the same ids."""
        self.close_run()
        self.ledger.close()
        self.folder.close()
        for seq in gone:
            path = self.place / f"t{seq}.png"
            if path.exists():
                path.unlink() if seq % 2 else path.write_bytes(b"altered")
        self.tasks += [planned(seq, 3, self.changed) for seq in range(len(self.tasks), min(len(self.tasks) + more, 14))]
        self.begin(retry, changed)

    @precondition(lambda self: not self.going)
    @rule(replaced=st.frozensets(PICK, max_size=3), other=st.integers(1, 2))
    def other_settings_are_tried_and_taken_back(self, replaced: frozenset[int], other: int) -> None:
        """The run between them dies before it books anything; by then some of its pictures have their names."""
        self.close_run()
        before = self.changed
        for changed, names in (((before + other) % 3, replaced), (before, frozenset[int]())):
            self.ledger.close()
            self.folder.close()
            self.begin((), changed)
            for one in self.tasks:
                if one.ticket.seq in names and one.task.id not in self.known:
                    (self.place / f"{one.task.id}.png").write_bytes(content(one))

    # --- always ---------------------------------------------------------------------------------------------------------

    @invariant()
    def something_is_due(self) -> None:
        """No deadlock: a worker has something to do, or the driver will wake, or tasks are still to be read."""
        if not hasattr(self, "run") or not self.going:
            return
        busy = any(one.killed or one.state == "loading" or one.batches for one in self.world.processes)
        wake = self.run.scheduler.wake_at()
        assert wake is None or wake >= self.clock.now, "it wants to be woken in the past"
        assert busy or wake is not None or self.run.more_to_feed, "nothing will ever happen again"

    # --- the end --------------------------------------------------------------------------------------------------------

    def come_to_an_end(self) -> None:
        """Nothing goes wrong any more but for what is bad for good: the run ends; a new one does the rest."""
        self.go_on_calmly()
        self.close_run()
        self.ledger.close()
        self.folder.close()
        before = dict(self.known)
        self.tasks += [planned(seq, 3, self.changed) for seq in range(len(self.tasks), len(self.tasks) + LAST_TASKS)]
        self.begin(())
        self.go_on_calmly()
        self.close_run()
        assert self.run.halt is not None
        assert self.run.halt.reason == "done", self.run.halt
        names = {one.task.id for one in self.tasks}
        assert self.known.keys() == names, "a task without an end"
        lost = {name for name, state in self.known.items() if state != "done"} - before.keys()
        assert lost <= {f"t{seq}" for seq in self.poison}, "a task paid for another, or for a bad device"
        for seq in self.poison & set(range(len(self.tasks))):
            if f"t{seq}" not in before:
                assert self.known[f"t{seq}"] == "worker_lost", "poison was not given up"
        self.check_pictures()

    def check_pictures(self) -> None:
        """Those of an unbroken run, and no others."""
        made = {path.name: path.read_bytes() for path in self.place.glob("*.png")}
        golden = {one.task.output_path: content(one) for one in self.tasks if self.known[one.task.id] == "done"}
        assert {name: made.get(name or "") for name in golden} == golden
        twice = "SELECT id FROM attempts WHERE kind IS NULL GROUP BY id, run HAVING count(*) > 1"
        assert list(self.ledger.rows(twice)) == [], "made twice in one run"

    def go_on_calmly(self) -> None:
        turns = 0
        while self.going:
            turns += 1
            assert turns < MOST_TURNS, "the driver runs in a circle"
            due = self.world.processes
            for process in due[turns % max(1, len(due)) :] + due[: turns % max(1, len(due))]:
                if event := self.next_event(process):
                    self.clock.now += 1.0
                    self.turn(process, event)
                    break
            else:
                wake = self.run.scheduler.wake_at()
                assert wake is not None or self.run.more_to_feed, "nothing will ever happen again"
                self.clock.now = max(self.clock.now + 0.25, wake if wake is not None else 0.0)
                self.turn()

    def next_event(self, one: Process, how: str = "done") -> Event | None:
        """What a worker does next, by its nature; a batch ends like this if nothing speaks against it."""
        bad = self.bad.get(one.worker, "")
        crash = bad == "crash" or any(ticket.seq in self.poison for batch in one.batches for ticket in batch.tickets)
        if one.killed or (one.state == "loading" and bad == "load") or (one.batches and crash):
            return WorkerLost(one.worker, message="died")
        if one.state == "loading":
            return WorkerReady(one.worker, frozenset({"model:fake"}))
        if one.batches:
            return self.ended(one, one.batches[0].id, ["bad_output" if bad == "nan" else how, how, "done"])
        return None


def test_no_order_of_events_and_crashes_breaks_a_promise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, DRIVER)
    run_state_machine_as_test(
        Mill,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
