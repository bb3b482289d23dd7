"""From a runner's results to receipts; ahead of the driver, on threads of their own, while the device takes the next batch."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from imagemill import picture
from imagemill.crashpoints import crash_point
from imagemill.errors import BadOutput, StoreFailed, classify
from imagemill.records import (
    SEMANTICS_VERSION,
    Answer,
    BatchEnded,
    BatchMade,
    Event,
    Failure,
    PlannedTask,
    Receipt,
    Span,
    WorkOrder,
)
from imagemill.runners import Result
from imagemill.sinks import Sink
from imagemill.version import __version__

SAVERS = 2
"""Threads that encode and write: zlib and fsync let go of the interpreter, so two keep up with any one device."""

MAX_ANSWER = 200_000
"""Characters of a judge's answer; 64 of them fit into one frame."""

MAX_MESSAGE = 10_000
"""Characters of what is told of a failure; the log has it whole."""

log = logging.getLogger("imagemill.worker")


class Saver:
    """Saves the pictures of one worker. With `ahead` on threads: `emit`, which takes its events and may be called by any of
    them, is then told when a batch has left the device. Without, each picture is saved before the next is asked for."""

    def __init__(self, worker: int, emit: Callable[[Event], None], *, ahead: bool) -> None:
        self.worker = worker
        self.emit = emit
        self._threads = ThreadPoolExecutor(SAVERS, thread_name_prefix="imagemill-save") if ahead else None

    def batch(self, order: WorkOrder) -> SavedBatch:
        """The book of a batch that begins now."""
        return SavedBatch(self, self._threads, order)

    def close(self) -> None:
        """Wait for what is being saved."""
        if self._threads is not None:
            self._threads.shutdown(wait=True)


class SavedBatch:
    """What became of the tasks of one batch so far; says `BatchEnded` when the last of them is through."""

    def __init__(self, saver: Saver, threads: ThreadPoolExecutor | None, order: WorkOrder) -> None:
        self._saver = saver
        self._threads = threads
        self._order = order
        self._started = time.monotonic()
        self._attempts = {
            planned.ticket.seq: attempt for planned, attempt in zip(order.tasks, order.attempts, strict=True)
        }
        self._waiting = {planned.ticket.seq: planned for planned in order.tasks}
        self._receipts: list[Receipt] = []
        self._failures: list[Failure] = []
        self._spans: list[Span] = []
        self._lock = threading.Lock()
        self._open = 1
        self._called = False
        self._ending: Callable[[], BatchEnded] | None = None

    def take(self, result: Result, sink: Sink) -> None:
        """Save a result, or have it saved."""
        planned = self._waiting.pop(result.seq)
        with self._lock:
            self._open += 1
        if self._threads is None:
            self._save(result, planned, sink)
        else:
            self._threads.submit(self._save, result, planned, sink)

    def fail(self, error: Exception) -> None:
        """The tasks without a result failed of this."""
        with self._lock:
            self._failures += [self._failure(error, seq) for seq in self._waiting]
        self._waiting.clear()

    def call_next(self, resident: frozenset[str]) -> None:
        """Ask for the next batch, once, though this one is not made yet. Only where pictures are saved on threads."""
        if self._threads is not None and not self._called:
            self._called = True
            self._saver.emit(BatchMade(self._saver.worker, self._order.batch, resident, made=False))

    def made(self, resident: frozenset[str], peak: int, notes: tuple[str, ...]) -> None:
        """No more results will come: the device is free for the next batch. `peak` is its memory in bytes."""
        order, worker = self._order, self._saver.worker

        def ending() -> BatchEnded:
            receipts = tuple(replace(one, peak_memory=max(peak, one.peak_memory)) for one in self._receipts)
            seconds = time.monotonic() - self._started
            failures, spans = tuple(self._failures), tuple(self._spans)
            return BatchEnded(worker, order.batch, receipts, failures, resident, seconds, spans, notes)

        with self._lock:
            self._ending = ending
            saving = self._open > 1
        if saving:
            self._saver.emit(BatchMade(worker, order.batch, resident))
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            self._open -= 1
            ended = self._open == 0
        if ended and self._ending is not None:
            crash_point("before-receipt")
            self._saver.emit(self._ending())
            crash_point("after-receipt")

    def _save(self, result: Result, planned: PlannedTask, sink: Sink) -> None:
        try:
            result = result.landed()
            receipt, spans = keep(result, planned, self._attempts[result.seq], sink)
            with self._lock:
                self._receipts.append(receipt)
                self._spans += [*result.spans, *spans]
        except Exception as error:
            failure = self._failure(error, planned.ticket.seq)
            with self._lock:
                self._failures.append(failure)
        finally:
            self._let_go()

    def _failure(self, error: Exception, seq: int) -> Failure:
        fault, attempt = classify(error), self._attempts[seq]
        log.warning("task %d, attempt %d: %s\n%s", seq, attempt, fault, "".join(traceback.format_exception(error)))
        return Failure(seq, attempt, fault.kind, told(fault), ends_run=isinstance(fault, StoreFailed))


def keep(result: Result, planned: PlannedTask, attempt: int, sink: Sink) -> tuple[Receipt, tuple[Span, ...]]:
    """Store a picture that has arrived, or take an answer down. Raises what the result or the sink holds against it."""
    if result.error is not None:
        raise result.error
    image, task = result.image, planned.task
    if task.width is None:
        return answered(result, attempt), ()
    if image is None:
        raise BadOutput("the runner gave neither picture nor error")
    if image.size != (task.width, task.height):
        raise BadOutput(f"the picture has {image.size[0]}x{image.size[1]} pixels, not {task.width}x{task.height}")
    started = time.monotonic()
    facts: dict[str, Any] = {"batch_size": result.batch_size, "imagemill": __version__, "semantics": SEMANTICS_VERSION}
    if result.marks:
        facts["marks"] = list(result.marks)
    try:
        stored = sink.store(image, planned, attempt, facts)
    except OSError as error:
        raise StoreFailed(f"the output folder refuses {task.output_path}: {error}") from error
    seconds = time.monotonic() - started
    receipt = Receipt(
        seq=result.seq,
        attempt=attempt,
        width=image.width,
        height=image.height,
        bytes=stored.bytes,
        sha256=stored.sha256,
        temporary=stored.temporary,
        path=stored.path,
        batch_size=result.batch_size,
        seconds={**result.seconds, "save": seconds},
        flags=(*picture.flags(image), *result.marks),
    )
    return receipt, (Span("save", started, seconds, on_device=False, seq=result.seq),)


def answered(result: Result, attempt: int) -> Receipt:
    """The receipt of a judge's answer: it travels whole, and nothing is stored."""
    if result.answer is None or result.image is not None:
        raise BadOutput("the runner gave no answer to a task that asks for one")
    made = Receipt(result.seq, attempt, 0, 0, batch_size=result.batch_size, seconds=result.seconds)
    return replace(made, answer=plain(result.answer), peak_memory=result.peak_memory)


def told(error: Exception) -> str:
    """What an error says, as a frame and any file can hold it: no lone surrogates (of a file's name, say), and not endless."""
    return str(error)[:MAX_MESSAGE].encode("utf-8", "replace").decode()


def plain(answer: Answer) -> Answer:
    """The answer as any file can hold it. Raises `BadOutput` when it is longer than the ledger takes."""
    if len(answer.text) > MAX_ANSWER:
        raise BadOutput(f"the answer has {len(answer.text):,} characters; at most {MAX_ANSWER:,} are taken")
    return replace(answer, text=answer.text.encode("utf-8", "replace").decode())
