"""The worker: builds runner and sink from its spec, takes work orders, gives back receipts.

`Worker` is the work itself, the same inside the driver's process (executors/inline.py) and in a process of its own,
which this file is when it is run as `python -m imagemill.worker`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from imagemill import runners, sinks, wire
from imagemill.crashpoints import crash_point
from imagemill.errors import classify
from imagemill.records import (
    Event,
    ModelSpec,
    SinkSpec,
    Span,
    WorkerBeat,
    WorkerLost,
    WorkerReady,
    WorkerSpec,
    WorkOrder,
)
from imagemill.runners import Beat, Runner, importing
from imagemill.saving import SavedBatch, Saver, told

BEAT_INTERVAL = 0.05
"""Seconds between two beats at least: a fast model must not flood the driver."""

PARENT_CHECK = 2.0
"""Seconds between two looks at the parent's pid."""

log = logging.getLogger("imagemill.worker")


class Inbox:
    """Messages in their order, for the one thread that takes them."""

    def __init__(self, messages: queue.SimpleQueue[Any]) -> None:
        self._messages = messages
        self._seen: Any = None

    def take(self) -> Any:
        """The next message; waits for it."""
        message, self._seen = self._seen, None
        return self._messages.get() if message is None else message

    def next_order(self) -> WorkOrder | None:
        """The next message without taking it, where one is there and is an order."""
        if self._seen is None:
            with contextlib.suppress(queue.Empty):
                self._seen = self._messages.get_nowait()
        return self._seen if isinstance(self._seen, WorkOrder) else None


class Worker:
    """One worker's work. Used by one thread. `emit` takes its events, from any thread; `check` is called at each beat and
    may raise; `next_order` is asked for the order that waits."""

    def __init__(
        self,
        spec: WorkerSpec,
        emit: Callable[[Event], None],
        check: Callable[[], None],
        next_order: Callable[[], WorkOrder | None] = lambda: None,
    ) -> None:
        self.spec = spec
        self._emit = emit
        self._check = check
        self._next_order = next_order
        self._saver = Saver(spec.worker, emit, ahead=spec.ahead)
        self._runner: Runner | None = None
        self._loaded: ModelSpec | None = None
        self._last_beat = 0.0
        self._peak = 0
        self._prepared: Runner | None = None
        self._imported: tuple[Span, ...] = ()
        self._sinks: dict[SinkSpec, sinks.Sink] = {}

    def prepare(self) -> bool:
        """Import what the model needs; all workers do this at once, loading comes later and one after another.

        A failure, here and in `load`, is told as `WorkerLost`; False means that this worker is over.
        """
        started, model = time.monotonic(), self.spec.model
        try:
            runner = runners.create(model.runner, self.spec.device, self.spec.threads)
            runner.prepare(model)
        except Exception as error:
            return self._give_up(error)
        self._prepared = runner
        self._imported = (Span("import", started, time.monotonic() - started, on_device=False),)
        return True

    def load(self, model: ModelSpec | None = None) -> bool:
        """Load the model, None for that of the spec, and say so."""
        model, started = model or self.spec.model, time.monotonic()
        crash_point("before-loading")
        try:
            runner = self._host(model)
        except Exception as error:
            return self._give_up(error)
        crash_point("after-loading")
        seconds = time.monotonic() - started
        log.info("loaded %s in %.1f s", model.name, seconds)
        memory = runner.memory()[0]
        spans = (*self._imported, *runner.spans())
        self._emit(WorkerReady(self.spec.worker, runner.resident, seconds, memory, spans, runner.notes()))
        return True

    def _give_up(self, error: Exception) -> bool:
        log.error("loading failed", exc_info=error)
        fault = classify(error)
        self._emit(WorkerLost(self.spec.worker, fault.kind, told(fault)))
        return False

    def work(self, order: WorkOrder) -> None:
        """Run a batch. Returns when the device has it all; `BatchEnded` follows, with a receipt or a failure for every
        task, when the pictures are saved."""
        crash_point("order-taken")
        self._peak = 0
        batch = self._saver.batch(order)
        try:
            runner = self._host(order.model)
            sink = self._sink(order.sink)
            runner.expect(order.coming)
            for result in runner.run(order, self._beat(runner, batch)):
                batch.take(result, sink)
            self._memory(runner)
        except Exception as error:
            batch.fail(error)
        resident = self._runner.resident if self._runner else frozenset()
        batch.made(resident, self._peak, self._runner.notes() if self._runner else ())

    def close(self) -> None:
        """Wait for what is being saved and free what the model holds."""
        self._saver.close()
        self._drop()

    def _drop(self) -> None:
        if self._runner is not None:
            self._runner.unload()
            self._runner, self._loaded = None, None

    def _sink(self, spec: SinkSpec) -> sinks.Sink:
        if spec not in self._sinks:
            self._sinks[spec] = sinks.create(spec)
        return self._sinks[spec]

    def _host(self, model: ModelSpec) -> Runner:
        """The runner that holds the model; another model leaves the device first."""
        if self._runner is not None and self._loaded == model:
            return self._runner
        self._drop()
        runner, self._prepared = (self._prepared if model == self.spec.model else None), None
        if runner is None:
            runner = runners.create(model.runner, self.spec.device, self.spec.threads)
        try:
            with importing.collector_spared():
                runner.load(model, self._beat(runner))
        except BaseException:
            runner.unload()
            raise
        self._runner, self._loaded = runner, model
        return runner

    def _beat(self, runner: Runner, batch: SavedBatch | None = None) -> Beat:
        def beat(stage: str, seq: int, step: int, steps: int) -> None:
            self._check()
            if batch is not None and runner.wants_next:
                batch.call_next(runner.resident)
                following = self._next_order()
                if following is not None and following.model == self._loaded:
                    runner.follow(following)
            now = time.monotonic()
            if now - self._last_beat >= BEAT_INTERVAL:
                self._last_beat = now
                known = seq if seq >= 0 else None
                self._emit(WorkerBeat(self.spec.worker, known, step, steps, stage, self._memory(runner)))

        return beat

    def _memory(self, runner: Runner) -> int:
        """Bytes in use now; keeps the peak of the batch, which every reading resets on the device."""
        now, peak = runner.memory()
        self._peak = max(self._peak, peak)
        return now


# --- the process ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    """Serve the driver over the socket `--fd` until it says leave, goes away, or kills us."""
    parser = argparse.ArgumentParser(prog="imagemill.worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(argv)
    die_with_parent(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # One who ends a service tells all its processes: it is the driver that says when. No SIG_IGN, which would be handed
        # on to whatever a library starts.
        signal.signal(number, lambda *_: None)
    pipe = socket.socket(fileno=options.fd)
    pipe.set_inheritable(False)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, inbox), name="pipe", daemon=True).start()
    threading.Thread(target=_watch_parent, args=(options.parent,), name="parent", daemon=True).start()
    spec = inbox.get()
    logging.basicConfig(
        level=spec.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    speaking = threading.Lock()

    def emit(event: Event) -> None:
        try:
            data = wire.frame(event)
            with speaking:
                pipe.sendall(data)
        except Exception:
            # On a saving thread nobody would hear of it, and the driver would wait for its deadline.
            log.exception("%s cannot be sent", type(event).__name__)
            os._exit(1)

    serve(spec, inbox, emit)
    leave()


def leave() -> NoReturn:
    """End the process as the interpreter does, but for taking apart every module: with torch that takes more than a second, and
    memory goes back with the process anyway."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def serve(spec: WorkerSpec, inbox: queue.SimpleQueue[Any], emit: Callable[[Event], None]) -> None:
    """Take messages until `Leave`."""
    log.info("worker %d on %s (%s), pid %d", spec.worker, spec.label, spec.device, os.getpid())
    messages = Inbox(inbox)
    worker = Worker(spec, emit, lambda: None, messages.next_order)
    if not worker.prepare():
        worker.close()
        return
    while True:
        match messages.take():
            case wire.LoadModel(model):
                if not worker.load(model):
                    worker.close()
                    return
            case WorkOrder() as order:
                worker.work(order)
            case wire.Leave():
                worker.close()
                log.info("left as told")
                return


def _read(pipe: socket.socket, inbox: queue.SimpleQueue[Any]) -> None:
    """Take frames off the pipe; its end means that the driver is gone, whatever the main thread does."""
    reader = wire.FrameReader()
    try:
        while data := pipe.recv(1 << 16):
            for message in reader.feed(data):
                inbox.put(message)
    except ConnectionResetError:
        log.info("the driver is gone; it had not read all events")
    except Exception:
        # Without its orders this process would wait for ever, and the driver for it.
        log.exception("the orders cannot be read")
        os._exit(1)
    os._exit(0)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK)
    os._exit(0)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill us when the driver dies; leave at once if that has happened already. Linux only."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        set_parent_death_signal = 1
        if libc.prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
