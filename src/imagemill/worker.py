"""The worker: builds runner and sink from its spec, takes work orders, gives back receipts.

`Worker` is the work itself, the same inside the driver's process (executors/inline.py) and in a process of its own,
which this file is when it is run as `python -m imagemill.worker`.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from imagemill import picture, runners, sinks, wire
from imagemill.errors import BadOutput, StoreFailed, classify
from imagemill.records import (
    SEMANTICS_VERSION,
    Answer,
    BatchEnded,
    Event,
    Failure,
    ModelSpec,
    PlannedTask,
    Receipt,
    SinkSpec,
    WorkerBeat,
    WorkerLost,
    WorkerReady,
    WorkerSpec,
    WorkOrder,
)
from imagemill.runners import Beat, Result, Runner
from imagemill.version import __version__

BEAT_INTERVAL = 0.05
"""Seconds between two beats at least: a fast model must not flood the driver."""

PARENT_CHECK = 2.0
"""Seconds between two looks at the parent's pid."""

MAX_ANSWER = 200_000
"""Characters of a judge's answer; 64 of them fit into one frame."""

log = logging.getLogger("imagemill.worker")


class Worker:
    """One worker's work. Used by one thread. `emit` takes its events; `check` is called at each beat and may raise."""

    def __init__(self, spec: WorkerSpec, emit: Callable[[Event], None], check: Callable[[], None]) -> None:
        self.spec = spec
        self._emit = emit
        self._check = check
        self._runner: Runner | None = None
        self._loaded: ModelSpec | None = None
        self._last_beat = 0.0
        self._peak = 0
        self._sinks: dict[SinkSpec, sinks.Sink] = {}

    def prepare(self) -> bool:
        """Import what the model needs; all workers do this at once, loading comes later and one after another.

        A failure, here and in `load`, is told as `WorkerLost`; False means that this worker is over.
        """
        try:
            runners.create(self.spec.model.runner, self.spec.device, self.spec.threads).prepare(self.spec.model)
        except Exception as error:
            return self._give_up(error)
        return True

    def load(self) -> bool:
        """Load the first model and say so."""
        started = time.monotonic()
        try:
            runner = self._host(self.spec.model)
        except Exception as error:
            return self._give_up(error)
        seconds = time.monotonic() - started
        log.info("loaded %s in %.1f s", self.spec.model.name, seconds)
        self._emit(WorkerReady(self.spec.worker, runner.resident, seconds, runner.memory()[0]))
        return True

    def _give_up(self, error: Exception) -> bool:
        log.error("loading failed", exc_info=error)
        fault = classify(error)
        self._emit(WorkerLost(self.spec.worker, fault.kind, str(fault)))
        return False

    def work(self, order: WorkOrder) -> None:
        """Run a batch; every task of it comes back as a receipt or a failure in one `BatchEnded`."""
        started, self._peak = time.monotonic(), 0
        attempts = {planned.ticket.seq: attempt for planned, attempt in zip(order.tasks, order.attempts, strict=True)}
        waiting = {planned.ticket.seq: planned for planned in order.tasks}
        receipts: list[Receipt] = []
        failures: list[Failure] = []
        try:
            runner = self._host(order.model)
            sink = self._sink(order.sink)
            for result in runner.run(order, self._beat(runner)):
                planned = waiting.pop(result.seq)
                try:
                    receipts.append(self._keep(result, planned, attempts[result.seq], runner, sink))
                except Exception as error:
                    failures.append(_failure(error, result.seq, attempts[result.seq]))
        except Exception as error:
            failures += [_failure(error, seq, attempts[seq]) for seq in waiting]
        resident = self._runner.resident if self._runner else frozenset()
        seconds = time.monotonic() - started
        self._emit(BatchEnded(self.spec.worker, order.batch, tuple(receipts), tuple(failures), resident, seconds))

    def close(self) -> None:
        """Free what the model holds."""
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
        self.close()
        runner = runners.create(model.runner, self.spec.device, self.spec.threads)
        try:
            runner.load(model, self._beat(runner))
        except BaseException:
            runner.unload()
            raise
        self._runner, self._loaded = runner, model
        return runner

    def _beat(self, runner: Runner) -> Beat:
        def beat(stage: str, seq: int, step: int, steps: int) -> None:
            self._check()
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

    def _keep(self, result: Result, planned: PlannedTask, attempt: int, runner: Runner, sink: sinks.Sink) -> Receipt:
        if result.error is not None:
            raise result.error
        image, task = result.image, planned.task
        if task.width is None:
            return self._answered(result, attempt, runner)
        if image is None:
            raise BadOutput("the runner gave neither picture nor error")
        if image.size != (task.width, task.height):
            raise BadOutput(f"the picture has {image.size[0]}x{image.size[1]} pixels, not {task.width}x{task.height}")
        started = time.monotonic()
        self._memory(runner)
        facts = {"batch_size": result.batch_size, "imagemill": __version__, "semantics": SEMANTICS_VERSION}
        try:
            stored = sink.store(image, planned, attempt, facts)
        except OSError as error:
            raise StoreFailed(f"the output folder refuses {task.output_path}: {error}") from error
        return Receipt(
            seq=result.seq,
            attempt=attempt,
            width=image.width,
            height=image.height,
            bytes=stored.bytes,
            sha256=stored.sha256,
            temporary=stored.temporary,
            path=stored.path,
            batch_size=result.batch_size,
            seconds={**result.seconds, "save": time.monotonic() - started},
            flags=picture.flags(image),
            peak_memory=self._peak,
        )

    def _answered(self, result: Result, attempt: int, runner: Runner) -> Receipt:
        """The receipt of a judge's answer: it travels whole, and nothing is stored."""
        if result.answer is None or result.image is not None:
            raise BadOutput("the runner gave no answer to a task that asks for one")
        self._memory(runner)
        made = Receipt(result.seq, attempt, 0, 0, batch_size=result.batch_size, seconds=result.seconds)
        return replace(made, peak_memory=self._peak, answer=_plain(result.answer))


def _plain(answer: Answer) -> Answer:
    """The answer as any file can hold it. Raises `BadOutput` when it is longer than the ledger takes."""
    if len(answer.text) > MAX_ANSWER:
        raise BadOutput(f"the answer has {len(answer.text):,} characters; at most {MAX_ANSWER:,} are taken")
    return replace(answer, text=answer.text.encode("utf-8", "replace").decode())


def _failure(error: Exception, seq: int, attempt: int) -> Failure:
    fault = classify(error)
    log.warning("task %d, attempt %d: %s\n%s", seq, attempt, fault, "".join(traceback.format_exception(error)))
    return Failure(seq, attempt, fault.kind, str(fault), ends_run=isinstance(fault, StoreFailed))


# --- the process ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    """Serve the driver over the socket `--fd` until it says leave, goes away, or kills us."""
    parser = argparse.ArgumentParser(prog="imagemill.worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(argv)
    die_with_parent(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = socket.socket(fileno=options.fd)
    pipe.set_inheritable(False)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, inbox), name="pipe", daemon=True).start()
    threading.Thread(target=_watch_parent, args=(options.parent,), name="parent", daemon=True).start()
    spec = inbox.get()
    logging.basicConfig(
        level=spec.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    serve(spec, inbox, lambda event: pipe.sendall(wire.frame(event)))


def serve(spec: WorkerSpec, inbox: queue.SimpleQueue[Any], emit: Callable[[Event], None]) -> None:
    """Take messages until `Leave`."""
    log.info("worker %d on %s (%s), pid %d", spec.worker, spec.label, spec.device, os.getpid())
    worker = Worker(spec, emit, lambda: None)
    if not worker.prepare():
        return
    while True:
        match inbox.get():
            case wire.LoadModel():
                if not worker.load():
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
