"""One worker inside the driver's process: a thread, so that signals and progress are served while it computes."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from imagemill import wire
from imagemill.errors import NoWorkersError
from imagemill.records import WORKER_THREAD, Event, ModelSpec, WorkerLost, WorkerSpec, WorkOrder
from imagemill.runners import Cancelled
from imagemill.worker import Inbox, Worker

GRACE = 20.0
"""Seconds a killed thread gets to reach its next denoising step; a thread cannot be ended from outside."""

log = logging.getLogger("imagemill.worker")


class InlineExecutor:
    """Runs one worker in a thread of this process."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._killed_at = 0.0
        self._live = False

    @property
    def pids(self) -> dict[int, int]:
        """No process is started."""
        return {}

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Start the thread; there is only one worker inside a process."""
        if len(specs) != 1:
            raise ValueError("one worker runs inside a process")
        if self._thread is not None:
            self._thread.join(GRACE)
        self._stop, self._inbox, self._killed_at = threading.Event(), queue.SimpleQueue(), 0.0
        self._live = True
        self._thread = threading.Thread(
            target=self._serve, args=(specs[0], self._inbox, self._stop), name=WORKER_THREAD, daemon=True
        )
        self._thread.start()

    def _serve(self, spec: WorkerSpec, inbox: queue.SimpleQueue[Any], stop: threading.Event) -> None:
        def check() -> None:
            if stop.is_set():
                raise Cancelled

        told, reason = False, "stopped"
        try:
            messages = Inbox(inbox)
            worker = Worker(spec, self._outbox.put, check, messages.next_order)
            log.info("worker %d on %s (%s), inside this process", spec.worker, spec.label, spec.device)
            try:
                told = not _take_orders(worker, messages, stop)
            finally:
                worker.close()
        except Cancelled:
            reason = "stopped at a step"
        except Exception as error:
            # A thread that ends in silence would be waited for until its deadline.
            log.exception("the worker broke")
            reason = f"it broke: {type(error).__name__}: {error}"
        if not told:
            self._outbox.put(WorkerLost(spec.worker, message=reason))

    def load(self, worker: int, model: ModelSpec | None = None) -> None:
        """Tell the worker to load."""
        self._inbox.put(wire.LoadModel(model))

    def send(self, worker: int, order: WorkOrder) -> None:
        """Hand a batch over."""
        self._inbox.put(order)

    def events(self, timeout: float | None) -> list[Event]:
        """Wait for the thread's events. Raises `NoWorkersError` when a killed thread does not end."""
        if self._killed_at:
            left = self._killed_at + GRACE - time.monotonic()
            timeout = max(0.0, left if timeout is None else min(timeout, left))
        found: list[Event] = []
        try:
            first = self._outbox.get(timeout=timeout)
            found += [] if first is None else [first]
            while True:
                more = self._outbox.get_nowait()
                found += [] if more is None else [more]
        except queue.Empty:
            pass
        if any(isinstance(event, WorkerLost) for event in found):
            self._killed_at, self._live = 0.0, False
        elif self._killed_at and time.monotonic() >= self._killed_at + GRACE:
            raise NoWorkersError("the worker inside this process hangs and cannot be ended; run again with --isolate")
        return found

    def kill(self, worker: int) -> None:
        """Make the thread stop at its next beat; one that was lost before is left alone."""
        if not self._live:
            return
        self._stop.set()
        self._killed_at = time.monotonic()
        self._inbox.put(wire.Leave())

    def wake(self) -> None:
        """Make `events` return; SimpleQueue.put is reentrant and so safe in a signal handler."""
        self._outbox.put(None)

    def close(self) -> None:
        """Stop the thread at its next beat and free its device."""
        self._stop.set()
        self._inbox.put(wire.Leave())
        if self._thread is not None:
            self._thread.join(GRACE)
            self._thread = None


def _take_orders(worker: Worker, messages: Inbox, stop: threading.Event) -> bool:
    """Take messages until told to stop; False when the model does not load, which the worker has told itself."""
    if not worker.prepare():
        return False
    while not stop.is_set():
        match messages.take():
            case wire.LoadModel(model):
                if not worker.load(model):
                    return False
            case WorkOrder() as order:
                worker.work(order)
            case _:
                break
    return True


def create() -> InlineExecutor:
    """The executor that the engine uses for a single worker."""
    return InlineExecutor()
