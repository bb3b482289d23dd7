"""Families: what one kind of diffusers pipeline needs. Each is one file, found by its name or by the pipeline's class.

A family file exposes `FAMILY`, an object of the `Family` protocol. Its first half (fields, multiple, group, cost)
costs no torch and is used for planning; the second half runs inside a worker and imports torch inside its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from imagemill.errors import BadModel
from imagemill.plan import Defaults
from imagemill.records import Task

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""

Pictures: TypeAlias = Sequence["Image"]
"""What one task edits: RGB, upright, of its `reference_sizes`. Empty for a task from text alone."""

OnStep = Callable[[int, int], None]
"""`on_step(step, steps)`: one denoising step of the batch is done."""


class Family(Protocol):
    """One kind of pipeline.

    `pipelines` are the `_class_name`s it serves, `fields` the optional task fields it takes (`plan.OPTIONAL_FIELDS`; and
    `prompt_only` when a family that takes `images` also does without), `multiple` what width and height must be
    multiples of, `max_batch` how many tasks of one group it can run at once, `max_images` how many pictures a task may
    name, `max_edit_batch` how many tasks with pictures it can run at once.
    """

    name: str
    pipelines: tuple[str, ...]
    fields: frozenset[str]
    multiple: int
    max_batch: int
    max_images: int
    max_edit_batch: int
    defaults: Defaults

    def group(self, task: Task) -> str:
        """What may share a batch: tasks of one group differ only in what the pipeline takes per picture."""

    def cost(self, task: Task) -> float:
        """Estimated seconds on one H100; only ratios matter to the scheduler."""

    def reference_sizes(self, task: Task, sizes: Sequence[Size]) -> tuple[Size, ...]:
        """Width and height that each of the task's pictures to edit is brought to before `encode`, from those it has.

        Only tasks for which these are equal share a batch.
        """

    def encode(self, pipe: Any, tasks: Sequence[Task], pictures: Sequence[Pictures]) -> Any:
        """Text and each task's pictures to conditioning, for `denoise` of the same tasks in the same order."""

    def denoise(self, pipe: Any, tasks: Sequence[Task], conditioning: Any, on_step: OnStep) -> Any:
        """Noise, drawn per task from its own seed on the CPU, to latents (or to pictures where a pipeline has no seam)."""

    def decode(self, pipe: Any, tasks: Sequence[Task], latents: Any) -> torch.Tensor:
        """Latents to pictures: float tensor (batch, 3, height, width) in [0, 1]; NaN is left in for the runner to see."""


@cache
def families() -> dict[str, Family]:
    """Every family by its name, without importing torch."""
    import imagemill.families as package

    names = [module.name for module in iter_modules(package.__path__)]
    return {name: import_module(f"imagemill.families.{name}").FAMILY for name in sorted(names)}


def family(name: str) -> Family:
    """The family of that name. Raises `BadModel` for a name that is none."""
    try:
        return families()[name]
    except KeyError:
        raise BadModel(f"there is no family {name!r}; known: {', '.join(families())}") from None


def family_for(class_name: str) -> Family:
    """The family that serves the pipeline class of a `model_index.json`; `generic` for any other."""
    for candidate in families().values():
        if class_name in candidate.pipelines:
            return candidate
    return family("generic")
