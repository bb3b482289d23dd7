"""Runners: what turns a work order into pictures or answers inside a worker. Each is one file, found by its name.

A runner never writes a file and never decides about retries: it yields one `Result` a task, with the picture, the answer
or the error of that task alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Protocol

from imagemill.errors import BadModel, TaskError
from imagemill.records import Answer, Lora, ModelSpec, Span, WorkOrder

if TYPE_CHECKING:
    from PIL.Image import Image

Beat = Callable[[str, int, int, int], None]
"""`beat(stage, seq, step, steps)`: says that the worker is alive and how far it is. Raises `Cancelled` to stop."""


class Cancelled(BaseException):
    """Raised out of `beat` when the run was stopped at once: unwinds the runner, is no task's failure."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one task: exactly one of `image`, `answer`, `error` and `arrive` is there.

    `seconds` maps stages to seconds. `arrive` is a picture, or an answer, that is still on its way from the device: call
    it, once and on any thread, for the result itself. `spans` are the stages of the whole batch, with one of its results.
    `peak_memory` is in bytes on the device, where it was reached after the batch had been handed over.
    """

    seq: int
    image: Image | None = None
    answer: Answer | None = None
    error: TaskError | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 1
    arrive: Callable[[], Result] | None = None
    marks: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    peak_memory: int = 0

    def landed(self) -> Result:
        """The result itself; waits for a picture that is on its way."""
        return self.arrive() if self.arrive is not None else self


class Runner(Protocol):
    """Hosts one model on one device. Built by `create(device, threads)`; used by one thread."""

    def prepare(self, spec: ModelSpec) -> None:
        """Import what loading the model will need and open the device. Raises `BadModel` as `load` does."""

    def load(self, spec: ModelSpec, beat: Beat) -> None:
        """Load the model. Raises `BadModel` when the folder can never load, other errors otherwise."""

    def run(self, order: WorkOrder, beat: Beat) -> Iterator[Result]:
        """Run the tasks of one group; yields each result as it is ready, one for every task.

        An error that concerns the whole batch (out of memory, a poisoned context) is raised instead.
        """

    def expect(self, loras: Sequence[Lora]) -> None:
        """Adapters of tasks that may come next; they can be read meanwhile."""

    @property
    def wants_next(self) -> bool:
        """Whether it can begin with the next order now, while one still runs; asked at each beat."""

    def follow(self, order: WorkOrder) -> None:
        """The order that comes next, told from a beat at which the runner wants it; it may be told several times."""

    def unload(self) -> None:
        """Free everything on the device."""

    @property
    def resident(self) -> frozenset[str]:
        """The needs that are satisfied now without any further work."""

    def memory(self) -> tuple[int, int]:
        """Bytes in use on the device now, and at the peak since the last call."""

    def spans(self) -> tuple[Span, ...]:
        """The parts of loading, for the trace."""

    def notes(self) -> tuple[str, ...]:
        """Lines for the log and the report that came up since the last call: what the runner chose or had to change."""


class Untold:
    """For runners that do nothing ahead and have nothing to say of their loading or of what they had to change."""

    def expect(self, loras: Sequence[Lora]) -> None:
        """Nothing is read ahead."""

    wants_next = False

    def follow(self, order: WorkOrder) -> None:
        """Nothing is done ahead."""

    def spans(self) -> tuple[Span, ...]:
        """None."""
        return ()

    def notes(self) -> tuple[str, ...]:
        """None."""
        return ()


def create(name: str, device: str, threads: int) -> Runner:
    """The runner of that name (a file of this folder), for the device as the worker sees it."""
    names = [module.name for module in iter_modules(__path__)]
    module = import_module(f"imagemill.runners.{name}") if name in names else None
    if not hasattr(module, "create"):
        raise BadModel(f"there is no runner {name!r}")
    runner: Runner = module.create(device, threads)  # type: ignore[union-attr]
    return runner
