"""The scheduler: facts in, decisions out. It owns order, retry, deadlines, quarantine and how far a source is read ahead.

It has no clock, thread or file: time is an argument, and the same events give the same commands. That is what lets
tests, `imagemill plan` and the benchmarks run it under virtual time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from imagemill.backlog import Backlog, Bucket, Entry
from imagemill.policies import Board, Lockstep, Policy, create
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
    Try,
    WorkerBeat,
    WorkerLost,
    WorkerReady,
)
from imagemill.retry import LOSS, backoff, blames_device, decide
from imagemill.worker_state import Worker, fresh

LOSSES_AT_MOST = 20
"""A worker that was lost this often in a row without one finished task is not started again. What a task costs that has
cost a worker before does not count: it is the task."""
LOADS_AT_MOST = 3
"""A device on which loading failed this often in a row is quarantined."""
READ_AHEADS = 4
"""How many times `read_ahead` a task may be passed over, and settled tasks may wait for an earlier one.

At once, not four times, nearly every choice of a long mixed run would go to the oldest task, against all affinity.
"""
BLAME_AT_MOST = 3
"""A device is quarantined when this many tasks in a row failed on it and succeeded elsewhere."""


def alone(needs: Sequence[str]) -> int:
    """Every task is a batch of its own."""
    return 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds the scheduler keeps. Times are seconds.

    `task_timeout` is how long a worker may be silent in a batch (it beats at each denoising step), `load_timeout` the
    same while loading. `batch` says from the needs of a task how many alike may share its batch.
    """

    load_timeout: float = 1800.0
    task_timeout: float = 600.0
    max_attempts: int = 3
    parallel_loads: int = 1
    read_ahead: int = 1024
    batch: Callable[[Sequence[str]], int] = alone


class Scheduler:
    """Decides for one run. `workers` maps numbers to the names of their devices.

    `crew` are workers of an earlier run that go on as they are. `on(event, now)` takes a fact and returns what to do. A
    task is settled exactly once; after `Halt` nothing follows. A worker has one batch on its device, and up to
    `SAVING_AT_MOST` whose pictures it is still saving.
    """

    def __init__(
        self,
        workers: Mapping[int, str],
        policy: str = "dynamic",
        lead: int = 1,
        limits: Limits | None = None,
        crew: Mapping[int, Worker] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.policy: Policy = create(policy, lead, list(workers))
        self.board = Board(
            workers={number: fresh(number, device, (crew or {}).get(number)) for number, device in workers.items()},
            backlog=Backlog(),
            batch_limit=self._batch_limit,
            patience=READ_AHEADS * self.limits.read_ahead,
        )
        self._arrived = 0
        self._unsettled: OrderedDict[int, Entry] = OrderedDict()
        self._oom_limits: dict[Bucket, int] = {}
        self._batches = 0
        self._end: Halt | None = None
        self._started = False
        self._halted = False
        self._last_loss = ""
        self._clock: float | None = None

    # --- what others ask --------------------------------------------------------------------------------------------

    @property
    def halted(self) -> bool:
        """Whether `Halt` was given."""
        return self._halted

    @property
    def rounds_done(self) -> int:
        """Rounds of lockstep that have ended."""
        if not isinstance(self.policy, Lockstep):
            return 0
        return self.policy.rounds - bool(self.board.in_flight or self.board.backlog.retry_times())

    def wanted(self) -> int:
        """How many more tasks to read from the source now.

        The waiting ones are bounded by `read_ahead`; what is settled but held back because an earlier task is not,
        by four times that.
        """
        if self._halted or self._end or self.board.source_ended:
            return 0
        oldest = next(iter(self._unsettled.values()), None)
        held_back = self._arrived - oldest.ordinal if oldest else 0
        return max(0, min(self.ahead - len(self.board.backlog), READ_AHEADS * self.ahead - held_back))

    @property
    def ahead(self) -> int:
        """How many tasks may wait. Lockstep waits for a full round: fewer would never fill one."""
        return max(self.limits.read_ahead, 2 * len(self.board.workers))

    def wake_at(self) -> float | None:
        """When a `Tick` will change something; None if only an event can. Never before the last event."""
        clock, workers = self._clock or 0.0, self.board.workers.values()
        moments = [max(clock, worker.deadline) for worker in workers if worker.watched]
        starts = [worker.not_before for worker in workers if worker.state == "absent"]
        moments += [moment for moment in (*starts, *self.board.backlog.retry_times()) if moment > clock]
        return min((moment for moment in moments if moment < float("inf")), default=None)

    def explained(self, event: WorkerLost) -> WorkerLost:
        """The event, not yet taken, with the reason for which its worker was ended, where it was."""
        reason = self.board.workers[event.worker].ending
        kind: Kind = "timeout" if reason.startswith("silent") else event.kind
        return replace(event, kind=kind, message=reason or event.message)

    # --- events -----------------------------------------------------------------------------------------------------

    def on(self, event: Event, now: float) -> list[Command]:
        """Take a fact, return decisions. `now` is monotonic seconds and never goes back."""
        if self._halted:
            self._take_note(event)
            return []
        self._account(now)
        commands: list[Command] = []
        match event:
            case TasksArrived(tickets):
                entries = [Entry(ticket, self._arrived + place) for place, ticket in enumerate(tickets)]
                self._arrived += len(entries)
                for entry in entries:
                    self._unsettled[entry.ticket.seq] = entry
                    self.board.backlog.add(entry)
                self.policy.arrived(entries)
            case SourceEnded():
                self.board.source_ended = True
            case WorkerReady():
                self._on_ready(event)
            case WorkerBeat(number):
                self._extend(self.board.workers[number], now)
            case BatchMade(number):
                if self.board.workers[number].has_made(event):
                    self._extend(self.board.workers[number], now)
            case BatchEnded():
                commands += self._on_batch_ended(event, now)
            case WorkerLost():
                commands += self._on_lost(event, now)
            case Tick():
                commands += self._overdue(now)
            case Drain():
                self._end = self._end or Halt("drained")
            case Cancel():
                return [*commands, *self._cancel()]
        return [*commands, *self._advance(now)]

    def _take_note(self, event: Event) -> None:
        """After the end: no decisions, but the workers' state goes on to the next run."""
        match event:
            case WorkerReady():
                self._on_ready(event)
            case BatchMade(number):
                self.board.workers[number].has_made(event)
            case BatchEnded(number):
                self.board.workers[number].gives_back(event)
            case WorkerLost(number):
                self.board.workers[number].is_gone()

    def _on_ready(self, event: WorkerReady) -> None:
        workers = self.board.workers
        live = (other.completed for other in workers.values() if other.live)
        workers[event.worker].is_ready(event.resident, min(live, default=0))

    def _extend(self, worker: Worker, now: float) -> None:
        if worker.state == "loading" and not worker.ending:
            worker.deadline = now + self.limits.load_timeout
        elif worker.live and worker.batches:
            worker.deadline = now + self.limits.task_timeout

    def _on_batch_ended(self, event: BatchEnded, now: float) -> list[Command]:
        worker = self.board.workers[event.worker]
        batch = worker.gives_back(event)
        if batch is None:
            return []
        self._extend(worker, now)
        worker.completed += len(batch.tickets)
        receipts = {receipt.seq: receipt for receipt in event.receipts}
        failures = {failure.seq: failure for failure in event.failures}
        commands: list[Command] = []
        poisons = any(failure.kind == "worker_lost" for failure in failures.values())
        worker.explained = worker.explained or (poisons and self._killers([batch]))
        for ticket, attempt in zip(batch.tickets, batch.attempts, strict=True):
            entry = self.board.in_flight.pop(ticket.seq)
            receipt = receipts.get(ticket.seq)
            if receipt is not None and receipt.attempt == attempt:
                commands += self._done(worker, entry, receipt)
                continue
            failure = failures.get(ticket.seq) or Failure(ticket.seq, attempt, "transient", "the worker gave no result")
            commands += self._failed(worker, entry, failure, len(batch.tickets), now)
        if poisons:
            worker.spoilt = True
            commands.append(self._kill(worker, "its device context is poisoned"))
        return commands

    def _done(self, worker: Worker, entry: Entry, receipt: Receipt) -> list[Command]:
        worker.losses = worker.unexplained = worker.blame = 0
        commands: list[Command] = []
        for number in {one.worker for one in entry.tries if blames_device(one)} - {worker.id}:
            other = self.board.workers[number]
            other.blame += 1
            if other.blame >= BLAME_AT_MOST and other.usable:
                commands += self._quarantine(other, f"{other.blame} tasks in a row failed here and succeeded elsewhere")
        del self._unsettled[entry.ticket.seq]
        return [
            *commands,
            Settle(entry.ticket.seq, entry.attempt, worker.id, receipt=receipt, tries=tuple(entry.tries)),
        ]

    def _failed(
        self,
        worker: Worker,
        entry: Entry,
        failure: Failure,
        size: int,
        now: float,
        *,
        shared: bool = False,
        bystander: bool = False,
    ) -> list[Command]:
        attempt = Try(entry.attempt, worker.id, failure.kind, failure.message, size, shared, bystander)
        entry.tries.append(attempt)
        decision = decide(entry.tries, self.limits.max_attempts)
        if decision.action == "give_up":
            del self._unsettled[entry.ticket.seq]
            return [Settle(entry.ticket.seq, len(entry.tries), worker.id, failure=failure, tries=tuple(entry.tries))]
        if decision.action == "split":
            self._oom_limits[entry.bucket] = min(self._batch_limit(entry), max(1, size // 2))
        else:
            entry.alone = True
            entry.not_before = now + decision.delay if decision.delay else 0.0
        self.board.backlog.add(entry)
        if not entry.alone:
            self.policy.arrived([entry])
        return []

    def _on_lost(self, event: WorkerLost, now: float) -> list[Command]:
        worker = self.board.workers[event.worker]
        batches, waiting = worker.batches, worker.batch if worker.calling is not None else None
        if not worker.present and not batches:
            return []
        loading = worker.state in ("waiting", "loading")
        event = self.explained(event)
        message = f"worker {worker.id} ({worker.device}): {event.message or 'it died'}"
        self._last_loss = message
        # a device that is put out is ended for what it did to others
        spoilt, explained = worker.spoilt or worker.state == "quarantined", worker.explained
        worker.is_gone()
        worker.losses += 1
        worker.unexplained += not (explained or self._killers(batches))
        worker.failed_loads += loading
        if worker.usable:
            worker.not_before = now + backoff(worker.losses, first=0.5 if worker.losses == 1 else 1.0)
        commands: list[Command] = []
        for batch in batches:
            company = {"shared": spoilt or len(batches) > 1, "bystander": spoilt or batch is waiting}
            for ticket, attempt in zip(batch.tickets, batch.attempts, strict=True):
                entry = self.board.in_flight.pop(ticket.seq)
                failure = Failure(ticket.seq, attempt, event.kind, message)
                commands += self._failed(worker, entry, failure, len(batch.tickets), now, **company)
        if loading and event.kind == "bad_model":
            self._end = self._end or Halt("bad_model", event.message)
        if worker.unexplained >= LOSSES_AT_MOST or worker.failed_loads >= LOADS_AT_MOST:
            commands += self._quarantine(worker, message)
        return commands

    def _killers(self, batches: Sequence[Batch]) -> bool:
        """Whether one of the tasks has cost a worker before."""
        entries = (self.board.in_flight[ticket.seq] for batch in batches for ticket in batch.tickets)
        return any(one.kind in LOSS for entry in entries for one in entry.tries)

    def _overdue(self, now: float) -> list[Command]:
        late = [worker for worker in self.board.workers.values() if worker.watched and now >= worker.deadline]
        return [
            self._kill(
                worker,
                f"silent for {self.limits.load_timeout if worker.state == 'loading' else self.limits.task_timeout:g} s",
            )
            for worker in late
        ]

    def _kill(self, worker: Worker, reason: str) -> Kill:
        worker.is_killed(reason)
        return Kill(worker.id, reason)

    def _quarantine(self, worker: Worker, reason: str) -> list[Command]:
        if not any(other.usable for other in self.board.workers.values() if other is not worker) and worker.live:
            return []
        process = worker.present
        worker.state, worker.ending = "quarantined", reason
        self._last_loss = f"worker {worker.id} ({worker.device}) is out: {reason}"
        return [Kill(worker.id, reason)] if process else []

    def _cancel(self) -> list[Command]:
        present = [worker.id for worker in self.board.workers.values() if worker.present]
        return [*(Kill(number, "the run was stopped") for number in present), *self._halt(Halt("cancelled"))]

    def _halt(self, halt: Halt) -> list[Command]:
        self._halted = True
        return [halt]

    # --- decisions --------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> list[Command]:
        if self._halted:
            return []
        board = self.board
        if board.source_ended and not self._unsettled:
            return self._halt(Halt("done"))
        if self._end:
            return [] if board.in_flight else self._halt(self._end)
        if not any(worker.usable for worker in board.workers.values()):
            return [] if board.in_flight else self._halt(Halt("no_workers", self._last_loss))
        return [*self._staff(now), *self._assign(now)]

    def _staff(self, now: float) -> list[Command]:
        """Start the processes that are missing, `parallel_loads` of them load at a time."""
        commands: list[Command] = []
        workers = self.board.workers.values()
        if len(self.board.backlog):
            for worker in self._crew(now):
                if worker.state == "absent" and worker.not_before <= now:
                    worker.state, worker.ending = "waiting", ""
                    commands.append(Spawn(worker.id))
        loading = sum(worker.state == "loading" for worker in workers)
        for worker in workers:
            if worker.state == "waiting" and loading < self.limits.parallel_loads:
                loading += 1
                worker.state, worker.deadline = "loading", now + self.limits.load_timeout
                commands.append(Load(worker.id))
        return commands

    def _crew(self, now: float) -> list[Worker]:
        """The workers that shall run: as many as tasks have come, and one more for a task that failed on all of them."""
        usable = [worker for worker in self.board.workers.values() if worker.usable]
        crew, reserve = usable[: self._arrived], usable[self._arrived :]
        for entry in self.board.backlog.retries(now) if reserve else ():
            if all(entry.doubt(worker.id) for worker in crew):
                crew += [worker for worker in reserve if not entry.doubt(worker.id) and worker not in crew][:1]
        return crew

    def _assign(self, now: float) -> list[Command]:
        if not len(self.board.backlog) or not self._ready_to_start():
            return []
        commands: list[Command] = []
        for worker in self.board.idle():
            if not len(self.board.backlog):
                break
            if not self.policy.may(worker, self.board):
                continue
            retry = next((e for e in self.board.backlog.retries(now) if self._takes(worker, e, now)), None)
            if (retry or worker.doubted) and worker.saving:
                continue  # what was under way when a worker died shall not share the next one's fate
            alone = (self.policy.probe(worker, self.board) if worker.doubted else None) or retry
            entries = [alone] if alone else self.policy.choose(worker, self.board)
            if entries:
                commands.append(self._dispatch(worker, entries, now))
        return commands

    def _ready_to_start(self) -> bool:
        if self._started or not self.policy.common_start:
            return True
        pending = any(w.state in ("waiting", "loading") and w.losses == 0 for w in self.board.workers.values())
        self._started = not pending
        return self._started

    def _takes(self, worker: Worker, entry: Entry, now: float) -> bool:
        """A worker that a task has failed on gets it again only if no other could against which less speaks."""
        doubt = entry.doubt(worker.id)
        if not doubt:
            return True
        crew = self._crew(now)
        return not any(
            other.state in ("waiting", "loading", "busy", "ending")
            or (other.state == "absent" and other in crew)
            or (other.state == "idle" and (bool(other.saving) or self.policy.may(other, self.board)))
            for other in self.board.workers.values()
            if entry.doubt(other.id) < doubt
        )

    def _dispatch(self, worker: Worker, entries: Sequence[Entry], now: float) -> Dispatch:
        for entry in entries:
            self.board.backlog.take(entry)
            self.board.in_flight[entry.ticket.seq] = entry
        self._batches += 1
        batch = Batch(
            self._batches, tuple(entry.ticket for entry in entries), tuple(entry.attempt for entry in entries)
        )
        worker.state, worker.batch, worker.deadline = "busy", batch, now + self.limits.task_timeout
        worker.secluded = any(entry.alone for entry in entries)
        return Dispatch(worker.id, batch)

    def _batch_limit(self, entry: Entry) -> int:
        asked = self.limits.batch(entry.ticket.needs)
        return min(asked, self._oom_limits.get(entry.bucket, asked))

    def _account(self, now: float) -> None:
        """Add the time since the last event to the idle seconds of the workers that waited through it.

        It was `held` when there was work that the policy kept from them.
        """
        passed, self._clock = now - (self._clock if self._clock is not None else now), now
        if passed <= 0:
            return
        held = self.board.backlog.waiting() > 0 or (isinstance(self.policy, Lockstep) and bool(self.board.in_flight))
        for worker in self.board.workers.values():
            if worker.state == "idle" and not worker.saving:
                worker.idle += passed
                worker.held += passed if held else 0.0
