"""Executors: they carry batches to workers and events back, and decide nothing. Each is one file, found by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from imagemill.records import Event, ModelSpec, WorkerSpec, WorkOrder


class Executor(Protocol):
    """Workers, wherever they run. All calls come from one thread, but for `wake`."""

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Start these workers; they wait for `load`. A worker of the same number must be gone before."""

    def load(self, worker: int, model: ModelSpec | None = None) -> None:
        """Tell the worker to load the model of its spec, or this one; `WorkerReady` or `WorkerLost` follows."""

    def send(self, worker: int, order: WorkOrder) -> None:
        """Hand over a batch; `BatchEnded` or `WorkerLost` follows."""

    def events(self, timeout: float | None) -> list[Event]:
        """What has happened since the last call; waits up to `timeout` seconds (None: for ever) for the first."""

    def kill(self, worker: int) -> None:
        """End the worker at once; `WorkerLost` follows."""

    def wake(self) -> None:
        """Make a waiting `events` return. Safe from any thread and from a signal handler."""

    def close(self) -> None:
        """End every worker and free what they held. Afterwards no process and no device memory is left."""
