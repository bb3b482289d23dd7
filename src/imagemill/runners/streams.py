"""The order of work on a device: what may run ahead, when stages began and ended, how pictures leave.

On a GPU the CPU only launches: text is encoded on a side stream while the steps of the batch before still run, pictures
are copied to pinned memory on another, and the time of every stage is read from events once all is over. On the CPU
each stage ends before the next begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

REANCHOR = 0.05
"""Seconds by which the device's clock and the host's may differ before they are set against each other anew."""

LAGS = 16
"""Batches whose end was read too late, all of them, before the clocks are to blame and not the savers who read it."""


@dataclass(slots=True)
class Stages:
    """Marks around the stages of one batch, in order: name, begin, end."""

    marks: list[tuple[str, Any, Any]] = field(default_factory=list)


class Lane(Protocol):
    """One device as the runner drives it; used by one thread, but for `arrived` and `times`."""

    def stage(self, stages: Stages, name: str) -> Any:
        """A context whose work is the stage of that name."""

    @property
    def overlaps(self) -> bool:
        """Whether anything is gained by launching work before its turn."""

    def beside(self) -> Any:
        """A context whose work need not wait for what was launched before; nothing waits for it until `join`."""

    def join(self) -> None:
        """What is launched after waits for the work that was launched `beside`."""

    def ahead(self) -> Any:
        """`beside`, joined at its end."""

    def leave(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in host memory, once `arrived` was waited for."""

    def depart(self) -> Any:
        """A token for all that was launched and left so far."""

    def arrived(self, token: Any) -> None:
        """Wait for the token, from any thread. Raises what went wrong on the device."""

    def times(self, stages: Stages, token: Any) -> list[tuple[str, float, float]]:
        """Name, start on the monotonic clock, and seconds of each stage; after `arrived`."""


class HostLane:
    """The CPU: everything is over when the call returns."""

    @contextmanager
    def stage(self, stages: Stages, name: str) -> Iterator[None]:
        """Reads the clock around the block."""
        started = time.monotonic()
        yield
        stages.marks.append((name, started, time.monotonic()))

    overlaps = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Its turn is now."""
        yield

    def join(self) -> None:
        """Nothing to wait for."""

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Nothing runs ahead."""
        yield

    def leave(self, tensor: torch.Tensor) -> torch.Tensor:
        """It is there already."""
        return tensor

    def depart(self) -> None:
        """Nothing is under way."""

    def arrived(self, token: Any) -> None:
        """Nothing to wait for."""

    def times(self, stages: Stages, token: Any) -> list[tuple[str, float, float]]:
        """As they were read."""
        return [(name, begin, end - begin) for name, begin, end in stages.marks]


class CudaLane:
    """A GPU: a stream for the steps and the decoder, one for text and source pictures, one for pictures that leave.

    Text and pictures to edit go first: they are launched `beside`, between the last steps of the batch before, and the next
    steps wait for them.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._main = torch.cuda.current_stream(self._device)
        self._ahead = torch.cuda.Stream(self._device, priority=-1)
        self._leaving = torch.cuda.Stream(self._device)
        self._lock = threading.Lock()
        self._anchor = self._event(self._main)
        self._anchor.synchronize()
        self._anchored = time.monotonic()
        self._drift = Drift()

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    @contextmanager
    def stage(self, stages: Stages, name: str) -> Iterator[None]:
        """Records an event on the current stream before and after the block's work."""
        begin = self._event(self._torch.cuda.current_stream(self._device))
        yield
        stages.marks.append((name, begin, self._event(self._torch.cuda.current_stream(self._device))))

    overlaps = True

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work on the side stream."""
        with self._torch.cuda.stream(self._ahead):
            yield

    def join(self) -> None:
        """The main stream waits for the side stream."""
        self._main.wait_stream(self._ahead)

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Work on the side stream; the main stream waits for it afterwards."""
        with self.beside():
            yield
        self.join()

    def leave(self, tensor: torch.Tensor) -> torch.Tensor:
        """Into pinned memory, on a stream that nothing waits for."""
        host = self._torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._leaving.wait_stream(self._main)
        with self._torch.cuda.stream(self._leaving):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._leaving)
        return host

    def depart(self) -> torch.cuda.Event:
        """An event behind everything."""
        self._leaving.wait_stream(self._main)
        return self._event(self._leaving)

    def arrived(self, token: Any) -> None:
        """Wait for the event; the interpreter is free meanwhile."""
        token.synchronize()

    def times(self, stages: Stages, token: Any) -> list[tuple[str, float, float]]:
        """Events against an anchor whose time on the host is known; the anchor moves along, since events lose precision
        over hours."""
        now = time.monotonic()
        with self._lock:
            anchor, anchored = self._anchor, self._anchored
            anchored += self._drift.by(now - (anchored + anchor.elapsed_time(token) / 1000))
            found = [
                (name, anchored + anchor.elapsed_time(begin) / 1000, begin.elapsed_time(end) / 1000)
                for name, begin, end in stages.marks
            ]
            self._anchor, self._anchored = token, anchored + anchor.elapsed_time(token) / 1000
        return found


class Drift:
    """Tells the drift of two clocks from readings that come late: nothing is read before it happened, and of `LAGS`
    readings one should have been read at once."""

    def __init__(self) -> None:
        self._lags: list[float] = []

    def by(self, lag: float) -> float:
        """How far to move the device's clock, after another reading came so many seconds after the moment it tells of."""
        if lag < 0:
            self._lags.clear()
            return lag
        self._lags.append(lag)
        if len(self._lags) < LAGS:
            return 0.0
        least = min(self._lags)
        self._lags.clear()
        return least if least > REANCHOR else 0.0


def lane(device: str) -> Lane:
    """The lane of a torch device."""
    return CudaLane(device) if device.startswith("cuda") else HostLane()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. A GPU copies it out of pinned memory, in the order of the current stream, and the CPU does
    not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
