"""Runners: what turns a work order into pictures or answers inside a worker. Each is one file, found by its name.

A runner never writes a file and never decides about retries: it yields one `Result` a task, with the picture, the answer
or the error of that task alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Protocol

from imagemill.errors import BadModel, TaskError
from imagemill.records import Answer, ModelSpec, WorkOrder

if TYPE_CHECKING:
    from PIL.Image import Image

Beat = Callable[[str, int, int, int], None]
"""`beat(stage, seq, step, steps)`: says that the worker is alive and how far it is. Raises `Cancelled` to stop."""


class Cancelled(BaseException):
    """Raised out of `beat` when the run was stopped at once: unwinds the runner, is no task's failure."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one task: exactly one of `image`, `answer` and `error` is there. `seconds` maps stages to seconds."""

    seq: int
    image: Image | None = None
    answer: Answer | None = None
    error: TaskError | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 1


class Runner(Protocol):
    """Hosts one model on one device. Built by `create(device, threads)`; used by one thread."""

    def prepare(self, spec: ModelSpec) -> None:
        """Import what loading the model will need; touches no device. Raises `BadModel` as `load` does."""

    def load(self, spec: ModelSpec, beat: Beat) -> None:
        """Load the model. Raises `BadModel` when the folder can never load, other errors otherwise."""

    def run(self, order: WorkOrder, beat: Beat) -> Iterator[Result]:
        """Run the tasks of one group; yields each result as it is ready, one for every task.

        An error that concerns the whole batch (out of memory, a poisoned context) is raised instead.
        """

    def unload(self) -> None:
        """Free everything on the device."""

    @property
    def resident(self) -> frozenset[str]:
        """The needs that are satisfied now without any further work."""

    def memory(self) -> tuple[int, int]:
        """Bytes in use on the device now, and at the peak since the last call."""


def create(name: str, device: str, threads: int) -> Runner:
    """The runner of that name (a file of this folder), for the device as the worker sees it."""
    names = [module.name for module in iter_modules(__path__)]
    module = import_module(f"imagemill.runners.{name}") if name in names else None
    if not hasattr(module, "create"):
        raise BadModel(f"there is no runner {name!r}")
    runner: Runner = module.create(device, threads)  # type: ignore[union-attr]
    return runner
