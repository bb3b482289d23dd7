"""The family of the `fake` runner: takes every field, any size, and costs what the task's script says.

It has no pipeline. Its three stages are never called; the runner draws the picture itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from imagemill.errors import BadModel
from imagemill.families import OnStep, Pictures, Size
from imagemill.plan import OPTIONAL_FIELDS, Defaults
from imagemill.records import Task

if TYPE_CHECKING:
    import torch

SECONDS = 0.001
"""What a task without a scripted delay is said to cost."""


@dataclass(frozen=True, slots=True)
class Fake:
    """A family for tests of the machinery. `metadata["fake"]["delay"]` (seconds) is the cost of a task."""

    name: str = "fake"
    pipelines: tuple[str, ...] = ()
    fields: frozenset[str] = frozenset({*OPTIONAL_FIELDS, "prompt_only"})
    multiple: int = 1
    max_batch: int = 64
    max_images: int = 64
    max_edit_batch: int = 64
    defaults: Defaults = Defaults(width=16, height=16, steps=1)

    def group(self, task: Task) -> str:
        """Size and steps."""
        return f"{task.width}x{task.height}/{task.steps}"

    def cost(self, task: Task) -> float:
        """The scripted delay, or a millisecond."""
        script = task.metadata.get("fake")
        delay = script.get("delay") if isinstance(script, dict) else None
        return SECONDS + (float(delay) if isinstance(delay, int | float) else 0.0)

    def reference_sizes(self, task: Task, sizes: Sequence[Size]) -> tuple[Size, ...]:
        """As they are."""
        return tuple(sizes)

    def encode(self, pipe: Any, tasks: Sequence[Task], pictures: Sequence[Pictures]) -> NoReturn:
        """There is no pipeline to encode for."""
        raise BadModel("the fake family has no pipeline; use the runner 'fake'")

    def denoise(self, pipe: Any, tasks: Sequence[Task], conditioning: Any, on_step: OnStep) -> NoReturn:
        """There is no pipeline to denoise with."""
        raise BadModel("the fake family has no pipeline; use the runner 'fake'")

    def decode(self, pipe: Any, tasks: Sequence[Task], latents: Any) -> torch.Tensor:
        """There is no pipeline to decode with."""
        raise BadModel("the fake family has no pipeline; use the runner 'fake'")


FAMILY = Fake()
