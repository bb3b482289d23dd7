"""One run: feed the scheduler, perform its commands, keep the ledger. The loop of the driver.

Every turn of the loop reads as: feed, hear, decide and perform, commit, hand out.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from imagemill.crashpoints import crash_point
from imagemill.errors import ImagemillError, OutputError
from imagemill.executors import Executor
from imagemill.intake import Models
from imagemill.ledger import Attempt, Ledger
from imagemill.logfiles import DRIVER
from imagemill.progress import Progress
from imagemill.publish import OutputFolder
from imagemill.records import (
    Batch,
    BatchEnded,
    Cancel,
    Command,
    Dispatch,
    Drain,
    Event,
    Failure,
    Halt,
    Kill,
    Load,
    Lora,
    Outcome,
    PlannedTask,
    Settle,
    SinkSpec,
    SourceEnded,
    Spawn,
    TasksArrived,
    Tick,
    WorkerLost,
    WorkerReady,
    WorkerSpec,
    WorkOrder,
)
from imagemill.schedule import Scheduler
from imagemill.sinks.files import temporary_path
from imagemill.trace import TraceFile

log = logging.getLogger(DRIVER)

COMMIT_INTERVAL = 0.05
"""Seconds that ended tasks may wait to be committed together; one fsync of the ledger then serves them all."""

COMMIT_SIZE = 256
AHEAD_OF_READER = 3
"""How many times `read_ahead` tasks may be taken in that were not handed out yet."""

REFRESH = 0.5
"""Seconds between two looks of the progress display at most."""

READ_AHEAD_ADAPTERS = 3
"""How many adapter files a worker is told to read before it needs them; of those most likely to come."""

DEATH_TIMEOUT = 15.0
"""Seconds to wait for killed workers at the end of a stopped run."""


class Run:
    """Takes the work of a feed through the workers. Iterate over `outcomes`; `drain` and `cancel` end it early.

    `feed` yields each task with its outcome if an earlier run settled it. Outcomes come out in the feed's order, each
    after it was committed.
    """

    def __init__(
        self,
        *,
        feed: Iterator[tuple[PlannedTask, Outcome | None]],
        scheduler: Scheduler,
        executor: Executor,
        specs: Mapping[int, WorkerSpec],
        models: Models,
        sink: SinkSpec,
        ledger: Ledger,
        folder: OutputFolder,
        progress: Progress,
        started: float,
        trace: TraceFile | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.halt: Halt | None = None
        self.error: ImagemillError | None = None
        self._feed_rows = feed
        self._executor = executor
        self._specs = specs
        self._models = models
        self._sink = sink
        self._ledger = ledger
        self._folder = folder
        self._progress = progress
        self._trace = trace
        self._wall = started - time.monotonic()
        self._started = time.monotonic()
        self._more_at_hand = False
        self._tasks: dict[int, PlannedTask] = {}
        self._order: deque[int] = deque()
        self._ended: dict[int, Outcome] = {}
        self._uncommitted: list[tuple[str, Settle]] = []
        self._outcomes: list[Outcome] = []
        self._attempts: list[Attempt] = []
        self._committed = self._started
        self._at_work: dict[int, dict[int, tuple[Batch, float]]] = {}
        self._last_ended: dict[int, float] = {}
        self._loading: dict[int, float] = {}
        self._requests: deque[Event] = deque()
        self._switches: list[int] = []
        self._first_picture: float | None = None

    # --- from outside -----------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """End what is in flight and stop. Safe from any thread and from signal handlers."""
        self._requests.append(Drain())
        self._executor.wake()

    def cancel(self) -> None:
        """Stop at once. Safe from any thread and from signal handlers."""
        self._requests.append(Cancel())
        self._executor.wake()

    def stats(self) -> dict[str, Any]:
        """What the policy cost and what the workers did, for the report."""
        workers = self.scheduler.board.workers
        return {
            "workers": {
                str(number): {"label": self._specs[number].label, "idle": worker.idle, "held": worker.held}
                for number, worker in workers.items()
            },
            "switches": dict(zip(("model", "adapters", "shape"), self._switches, strict=False)),
            "rounds": self.scheduler.rounds_done,
            "first_picture_s": self._first_picture,
        }

    # --- the loop ---------------------------------------------------------------------------------------------------

    def outcomes(self) -> Iterator[Outcome]:
        """Run to the end. A consumer that stops early, or any error, stops the workers; what is done stays done."""
        try:
            while self.halt is None:
                self._feed()
                for event in [*self._asked(), *self._executor.events(self._timeout()), Tick()]:
                    self._take(event)
                self._commit(force=self.halt is not None)
                self._progress.refresh(self.scheduler)
                yield from self._in_order()
        finally:
            if self.halt is None:
                self._take(Cancel())
            if self.halt is not None and self.halt.reason == "cancelled":
                self._bury()
            self._commit(force=True)

    def _feed(self) -> None:
        ahead, waiting = self.scheduler.ahead, len(self.scheduler.board.backlog)
        room = AHEAD_OF_READER * ahead - len(self._order)
        wanted = min(self.scheduler.wanted(), room)
        self._more_at_hand = False
        if wanted <= 0 or (waiting and wanted < ahead // 4):
            return
        arrived, ended = [], True
        for planned, outcome in islice(self._feed_rows, room):
            seq = planned.ticket.seq
            self._order.append(seq)
            room -= 1
            if outcome is not None:
                self._ended[seq] = outcome
                self._progress.settled(outcome)
            else:
                self._tasks[seq] = planned
                arrived.append(planned.ticket)
            if len(arrived) >= wanted or not room:
                ended = False
                break
        self._more_at_hand = not ended and not arrived
        if arrived:
            self._take(TasksArrived(tuple(arrived)))
        if ended:
            self._take(SourceEnded())

    def _asked(self) -> Iterator[Event]:
        while self._requests:
            yield self._requests.popleft()

    def _timeout(self) -> float:
        if self._requests or self.halt or self._more_at_hand:
            return 0.0
        now = time.monotonic()
        moments = [now + REFRESH, self.scheduler.wake_at() or now + REFRESH]
        if self._uncommitted:
            moments.append(self._committed + COMMIT_INTERVAL)
        return max(0.0, min(moments) - now)

    def _take(self, event: Event) -> None:
        """Hear a fact and do what is decided. After the end the scheduler still notes how the workers are."""
        now = time.monotonic()
        self._note(event, now)
        for command in self.scheduler.on(event, now):
            self._perform(command, now)
        if isinstance(event, BatchEnded):
            for receipt in event.receipts:
                # What was published has its own name by now; the rest came too late to count.
                self._folder.discard(receipt.temporary)

    def _note(self, event: Event, now: float) -> None:
        """Keep what the ledger tells of attempts and loading, and show it."""
        if isinstance(event, WorkerLost):
            event = self.scheduler.explained(event)
        self._progress.event(event)
        match event:
            case WorkerReady(worker, _, seconds):
                log.info("worker %d is ready after %.1f s", worker, seconds)
                self._span(worker, "load", now)
                self._tell(event, now)
            case BatchEnded(worker):
                self._end_attempts(worker, event, now)
                self._tell(event, now)
            case WorkerLost(worker, kind, message):
                log.warning("worker %d is lost (%s): %s", worker, kind, message)
                self._span(worker, "lost", now, message)
                self._end_attempts(worker, event, now)
            case Drain():
                log.info("asked to end: what is in flight is finished")

    def _tell(self, event: WorkerReady | BatchEnded, now: float) -> None:
        """Keep what the worker says of its stages and of what it changed."""
        for note in event.notes:
            log.info("worker %d: %s", event.worker, note)
            self._ledger.span(event.worker, "note", self._wall + now, self._wall + now, note)
        if self._trace is not None and event.spans:
            self._trace.add(event.worker, event.spans)

    def _span(self, worker: int, what: str, now: float, note: str = "") -> None:
        self._ledger.span(worker, what, self._wall + self._loading.pop(worker, now), self._wall + now, note)

    def _end_attempts(self, worker: int, event: BatchEnded | WorkerLost, now: float) -> None:
        """Write down how the attempts of the ended batch went, or of all that a lost worker had.

        A batch that was sent ahead began when the one before it ended: so the seconds of all add up to the run's.
        """
        sent = self._at_work.get(worker, {})
        ended = isinstance(event, BatchEnded)
        if ended and not self.scheduler.board.workers[worker].live:
            return  # it is being killed: what it says now comes too late to count, and its loss ends the attempt
        for number in [event.batch] if isinstance(event, BatchEnded) else list(sent):
            if number in sent:
                batch, started = sent.pop(number)
                self._end_attempt(worker, batch, max(started, self._last_ended.get(worker, started)), event, now)
        if ended:
            self._last_ended[worker] = now

    def _end_attempt(self, worker: int, batch: Batch, began: float, event: BatchEnded | WorkerLost, now: float) -> None:
        faults = {failure.seq: failure for failure in event.failures} if isinstance(event, BatchEnded) else {}
        made = {(one.seq, one.attempt) for one in event.receipts} if isinstance(event, BatchEnded) else set()
        for ticket, attempt in zip(batch.tickets, batch.attempts, strict=True):
            planned = self._tasks.get(ticket.seq)
            if planned is None:
                continue
            fault: Failure | WorkerLost | None = faults.get(ticket.seq)
            if fault is None and isinstance(event, BatchEnded) and (ticket.seq, attempt) not in made:
                fault = Failure(ticket.seq, attempt, "transient", "the worker gave no result")
            if isinstance(event, WorkerLost):
                fault = event
                self._folder.discard(temporary_path(planned, attempt))
            kind, message = (fault.kind, fault.message) if fault else (None, "")
            row = (planned.task.id, attempt, worker, self._wall + began, self._wall + now, kind, message)
            self._attempts.append(Attempt(*row, len(batch.tickets)))
        if any(fault.ends_run for fault in faults.values()):
            self._stop_for(OutputError(next(fault.message for fault in faults.values() if fault.ends_run)))

    # --- commands ---------------------------------------------------------------------------------------------------

    def _perform(self, command: Command, now: float) -> None:
        match command:
            case Spawn(worker):
                crash_point("before-spawn")
                self._executor.start([self._specs[worker]])
                crash_point("after-spawn")
            case Load(worker):
                self._loading[worker] = now
                crash_point("before-load")
                self._executor.load(worker, self._specs[worker].model)
                crash_point("after-load")
            case Dispatch(worker, batch):
                self._dispatch(worker, batch, now)
            case Kill(worker, reason):
                log.warning("worker %d is ended: %s", worker, reason)
                self._executor.kill(worker)
            case Settle():
                self._settle(command)
            case Halt():
                self.halt = command

    def _dispatch(self, worker: int, batch: Batch, now: float) -> None:
        match_ = self.scheduler.board.workers[worker].match(batch.needs)
        self._switches = self._switches or [0] * len(match_)
        for place, held in enumerate(match_):
            self._switches[place] += not held
        self._at_work.setdefault(worker, {})[batch.id] = (batch, now)
        tasks = tuple(self._tasks[ticket.seq] for ticket in batch.tickets)
        model = self._models.get(tasks[0].task.model).spec
        coming = self._coming(tasks[0].task.loras)
        crash_point("before-dispatch")
        self._executor.send(worker, WorkOrder(batch.id, model, self._sink, tasks, batch.attempts, coming))
        crash_point("after-dispatch")
        self._progress.dispatched(worker, tasks)

    def _coming(self, now: Sequence[Lora]) -> tuple[Lora, ...]:
        """Adapters that waiting tasks need and this batch has not: one of the next sets will be some worker's next."""
        found: dict[str, Lora] = {}
        for _, entry in self.scheduler.board.backlog.heads():
            for lora in self._tasks[entry.ticket.seq].task.loras:
                if lora.strength and lora not in now:
                    found.setdefault(lora.digest, lora)
            if len(found) >= READ_AHEAD_ADAPTERS:
                break
        return tuple(found.values())

    def _settle(self, settle: Settle) -> None:
        planned = self._tasks.pop(settle.seq)
        path, receipt = "", settle.receipt
        if receipt is not None:
            try:
                path = self._folder.publish(receipt)
            except (IsADirectoryError, NotADirectoryError) as error:
                # That is this task's own trouble: another thing has its place.
                self._folder.discard(receipt.temporary)
                message = f"{receipt.path} cannot be put in its place: {error.strerror}"
                settle = replace(
                    settle, receipt=None, failure=Failure(settle.seq, settle.attempts, "bad_task", message)
                )
            except OSError as error:
                self._stop_for(OutputError(f"the output folder refuses {receipt.path}: {error}"))
                return
            if settle.receipt is not None and self._first_picture is None:
                self._first_picture = time.monotonic() - self._started
        failure = settle.failure
        if failure is not None:
            log.warning("task %s failed (%s): %s", planned.task.id, failure.kind, failure.message)
        self._uncommitted.append((planned.task.id, settle))
        self._outcomes.append(
            Outcome(
                task=planned.task,
                seq=settle.seq,
                state="failed" if failure else "done",
                path=path,
                kind=failure.kind if failure else None,
                message=failure.message if failure else "",
                attempts=settle.attempts,
                worker=settle.worker,
                elapsed=sum(settle.receipt.seconds.values()) if settle.receipt else 0.0,
                receipt=settle.receipt,
            )
        )

    def _stop_for(self, error: ImagemillError) -> None:
        """End the run without settling what is open: the same command goes on once the cause is mended."""
        if self.error is None:
            log.error("the run ends: %s", error)
            self.error = error
            self._requests.append(Drain())

    # --- what is over -----------------------------------------------------------------------------------------------

    def _commit(self, *, force: bool) -> None:
        now = time.monotonic()
        if not (self._uncommitted or (force and self._attempts)):
            return
        if not force and now < self._committed + COMMIT_INTERVAL and len(self._uncommitted) < COMMIT_SIZE:
            return
        try:
            self._folder.sync()
            crash_point("before-commit")
            self._ledger.settle(self._uncommitted, self._attempts, self._wall + now)
            crash_point("after-commit")
        except OSError as error:
            raise OutputError(f"the output folder cannot be written: {error}") from error
        for outcome in self._outcomes:
            self._ended[outcome.seq] = outcome
            self._progress.settled(outcome)
        self._uncommitted, self._attempts, self._outcomes = [], [], []
        self._committed = time.monotonic()

    def _in_order(self) -> Iterator[Outcome]:
        while self._order and self._order[0] in self._ended:
            yield self._ended.pop(self._order.popleft())

    def _bury(self) -> None:
        """After a stop: wait until the killed workers are gone, then remove what they left half-written."""
        deadline = time.monotonic() + DEATH_TIMEOUT
        crew = self.scheduler.board.workers
        leaving = {number for number, worker in crew.items() if worker.state not in ("absent", "quarantined")}
        while leaving and time.monotonic() < deadline:
            for event in self._executor.events(max(0.0, deadline - time.monotonic())):
                if isinstance(event, WorkerLost):
                    leaving.discard(event.worker)
        batches = [batch for worker in self._at_work.keys() - leaving for batch, _ in self._at_work[worker].values()]
        for batch in batches:
            for ticket, attempt in zip(batch.tickets, batch.attempts, strict=True):
                if ticket.seq in self._tasks:
                    self._folder.discard(temporary_path(self._tasks[ticket.seq], attempt))
        for number, known in crew.items():
            if number not in leaving:
                known.is_gone()
