"""Workers in processes of their own: one socket each, no queue, lock or semaphore shared between processes."""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from imagemill import logfiles, wire
from imagemill.keeper import Keeper
from imagemill.records import (
    BatchEnded,
    BatchMade,
    Event,
    Failure,
    Kind,
    ModelSpec,
    WorkerBeat,
    WorkerLost,
    WorkerReady,
    WorkerSpec,
    WorkOrder,
)

LEAVE_TIMEOUT = 10.0
"""Seconds a worker gets to free its device before it is killed."""

DEATH_TIMEOUT = 5.0
"""Seconds between the end of a worker's pipe and the end of its process; one that takes longer is killed."""

CHUNK = 1 << 18

LOG_CHECK = 0.25
"""Seconds between two looks at how long the workers' logs are."""

FROM_WORKERS = (WorkerReady, WorkerBeat, BatchMade, BatchEnded, WorkerLost)


class Link:
    """One worker process and its socket."""

    def __init__(self, spec: WorkerSpec, keeper: Keeper) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with contextlib.ExitStack() as stack:
            stack.callback(theirs.close)
            output: int = subprocess.DEVNULL
            if spec.log:
                Path(spec.log).parent.mkdir(parents=True, exist_ok=True)
                output = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
                stack.callback(os.close, output)
            fd = theirs.fileno()
            # -P: a file of the user's folder must not shadow a module that the worker imports.
            command = [sys.executable, "-P", "-m", "imagemill.worker", "--fd", str(fd), "--parent", str(os.getpid())]
            self.process = subprocess.Popen(
                command,
                env=_environment(spec),
                pass_fds=(fd,),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if spec.log else subprocess.DEVNULL,
                start_new_session=True,
            )
        keeper.watch(self.process.pid)
        self.keeper = keeper
        self.worker = spec.worker
        self.log = spec.log
        self.socket = ours
        self.reader = wire.FrameReader()
        self.outgoing = bytearray()
        self.last_words: WorkerLost | None = None
        self.pidfd = os.pidfd_open(self.process.pid) if hasattr(os, "pidfd_open") else -1
        self.post(wire.frame(spec))

    def post(self, data: bytes) -> None:
        """Send what the socket takes now, keep the rest: a stopped worker must never block the driver."""
        self.outgoing += data
        try:
            while self.outgoing:
                del self.outgoing[: self.socket.send(self.outgoing)]
        except BlockingIOError:
            pass
        except OSError:
            # The worker is gone; its end is told by the other side of the pipe.
            self.outgoing.clear()

    def kill(self) -> None:
        """SIGKILL to the worker's process group: to what it has started too, and also when it is dead but not reaped."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def dies(self, timeout: float) -> bool:
        """Whether the process ends in time. It is not reaped where that can be told without: until then its number,
        which is that of its group too, is given to no other process."""
        if self.pidfd >= 0:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            return bool(poll.poll(1000 * timeout))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        return self.process.returncode is not None

    def close(self) -> None:
        """End what is left of its group, reap the process and close what we hold of it."""
        self.kill()
        self.keeper.forget(self.process.pid)
        self.process.wait()
        self.trim_log()
        self.socket.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def trim_log(self) -> None:
        """Keep the beginning and the end of a log that has grown too long."""
        if self.log:
            logfiles.trim(self.log)


def _environment(spec: WorkerSpec) -> dict[str, str]:
    package = str(Path(__file__).resolve().parents[2])
    path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(spec.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **own, **spec.environment}


class ProcessExecutor:
    """Starts, feeds, hears and ends worker processes."""

    def __init__(self) -> None:
        self._links: dict[int, Link] = {}
        self._keeper: Keeper | None = None
        self._missed: list[Event] = []
        self._told: set[int] = set()
        self._logs_seen = 0.0
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)

    @property
    def pids(self) -> dict[int, int]:
        """The process id of every worker that runs."""
        return {number: link.process.pid for number, link in self._links.items()}

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Start a process for each spec. One that the system refuses (no memory, no handles, no log) is a lost worker."""
        for spec in specs:
            # What was still to be told of an earlier life would be taken for this one's end.
            self._missed = [event for event in self._missed if _speaker(event) != spec.worker]
            try:
                self._keeper = self._keeper or Keeper()
                link = self._links[spec.worker] = Link(spec, self._keeper)
            except OSError as error:
                self._missed.append(WorkerLost(spec.worker, message=f"it cannot be started: {error}"))
                continue
            self._selector.register(link.socket, selectors.EVENT_READ, link)
            if link.pidfd >= 0:
                self._selector.register(link.pidfd, selectors.EVENT_READ, link)

    def load(self, worker: int, model: ModelSpec | None = None) -> None:
        """Tell a worker to load."""
        self._post(worker, wire.frame(wire.LoadModel(model)))

    def send(self, worker: int, order: WorkOrder) -> None:
        """Hand a batch over. One that fits into no frame has failed: as too large, or for good where it is one task."""
        try:
            data = wire.frame(order)
        except wire.FrameError as error:
            kind: Kind = "oom" if len(order.tasks) > 1 else "bad_task"
            failures = tuple(
                Failure(planned.ticket.seq, attempt, kind, f"the order cannot be sent: {error}")
                for planned, attempt in zip(order.tasks, order.attempts, strict=True)
            )
            self._missed.append(BatchEnded(worker, order.batch, (), failures, frozenset(), 0.0))
        else:
            self._post(worker, data)

    def _post(self, worker: int, data: bytes) -> None:
        if link := self._links.get(worker):
            link.post(data)
            self._watch(link)
        else:
            self._miss(worker)

    def _miss(self, worker: int) -> None:
        """Tell that a worker is gone, unless the events that the caller has just taken say so."""
        if worker not in self._told:
            self._missed.append(WorkerLost(worker, message="its process is gone"))

    def _watch(self, link: Link) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.outgoing else 0)
        if self._selector.get_key(link.socket).events != wanted:
            self._selector.modify(link.socket, wanted, link)

    def events(self, timeout: float | None) -> list[Event]:
        """Wait for frames and for deaths together."""
        self._trim_logs()
        found, self._missed = self._missed, []
        self._told = {event.worker for event in found if isinstance(event, WorkerLost)}
        gone: list[Link] = []
        for key, mask in self._selector.select(0 if found else timeout):
            link: Link | None = key.data
            if link is None:
                self._empty_wake()
            elif key.fileobj == link.pidfd:
                gone.append(link)
            else:
                if mask & selectors.EVENT_WRITE:
                    link.post(b"")
                    self._watch(link)
                if mask & selectors.EVENT_READ and not self._receive(link, found):
                    gone.append(link)
        for link in dict.fromkeys(gone):
            found.append(self._bury(link, found))
        return found

    def _trim_logs(self) -> None:
        if time.monotonic() - self._logs_seen >= LOG_CHECK:
            for link in self._links.values():
                link.trim_log()
            self._logs_seen = time.monotonic()

    def _receive(self, link: Link, found: list[Event]) -> bool:
        """Read what is there; False when the worker has closed its end or sent garbage."""
        try:
            data = link.socket.recv(CHUNK)
            if not data:
                return False
            for event in link.reader.feed(data):
                if not isinstance(event, FROM_WORKERS) or event.worker != link.worker:
                    raise wire.FrameError(f"a {type(event).__name__} that is not its own to say")
                if isinstance(event, WorkerLost):
                    # It gave up loading and says why; it is lost once its process is gone.
                    link.last_words = event
                else:
                    found.append(event)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        except wire.FrameError as error:
            link.last_words = WorkerLost(link.worker, message=f"it sent garbage: {error}")
            # It would not end by itself, and the driver would wait for its end.
            link.kill()
            return False
        return True

    def _bury(self, link: Link, found: list[Event]) -> WorkerLost:
        """Take the last words of a dead worker, reap it, and say how it ended."""
        while link.last_words is None and self._more(link, found):
            pass
        self._selector.unregister(link.socket)
        if link.pidfd >= 0:
            self._selector.unregister(link.pidfd)
        # The pipe ends a moment before the process does.
        alive = not link.dies(DEATH_TIMEOUT)
        link.close()
        del self._links[link.worker]
        self._told.add(link.worker)
        message = "it closed its pipe" if alive else ending(link.process.returncode)
        return link.last_words or WorkerLost(link.worker, message=message)

    def _more(self, link: Link, found: list[Event]) -> bool:
        before = len(found)
        return self._receive(link, found) and len(found) > before

    def kill(self, worker: int) -> None:
        """SIGKILL; the death is told by `events`."""
        if link := self._links.get(worker):
            link.kill()
        else:
            self._miss(worker)

    def wake(self) -> None:
        """Make `events` return; one byte on a socket, safe in a signal handler."""
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_in.send(b"\0")

    def _empty_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_out.recv(64):
                pass

    def close(self) -> None:
        """Ask every worker to leave, kill those that do not, reap all."""
        links = list(self._links.values())
        for link in links:
            link.post(wire.frame(wire.Leave()))
        deadline = time.monotonic() + LEAVE_TIMEOUT
        for link in links:
            link.dies(max(0.0, deadline - time.monotonic()))
        for link in links:
            link.close()
        self._links.clear()
        if self._keeper is not None:
            self._keeper.close()
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()


def _speaker(event: Event) -> int:
    return event.worker if isinstance(event, FROM_WORKERS) else -1


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"it exited with code {code}"


def create() -> ProcessExecutor:
    """The executor that the engine uses for more than one worker."""
    return ProcessExecutor()
