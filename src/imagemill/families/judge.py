"""The family of judges: pictures and a question in, an answer in text out; no size, no steps, no seed.

It has no pipeline. Its three stages are never called; each judge is a runner of its own (`runners/judge_*.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from imagemill.errors import BadModel
from imagemill.families import OnStep, Pictures, Size
from imagemill.plan import Defaults
from imagemill.records import Task

if TYPE_CHECKING:
    import torch

ANSWER_SECONDS = 1.0
"""What generating an answer is said to take, whatever it is about."""

PICTURE_SECONDS = 0.25
CHARACTER_SECONDS = 1e-4


@dataclass(frozen=True, slots=True)
class Judge:
    """The planning half of every judge. Costs are guesses of a batched 7 B model on one H100: only ratios matter."""

    name: str = "judge"
    pipelines: tuple[str, ...] = ()
    fields: frozenset[str] = frozenset({"images", "system_prompt", "prompt_only", "answer"})
    multiple: int = 1
    max_batch: int = 64
    max_images: int = 16
    max_edit_batch: int = 64
    defaults: Defaults = Defaults()

    def group(self, task: Task) -> str:
        """All may share a batch: a judge brings what differs together itself."""
        return "judge"

    def cost(self, task: Task) -> float:
        """By the number of pictures and the length of the text."""
        text = len(task.prompt) + len(task.system_prompt or "")
        return ANSWER_SECONDS + PICTURE_SECONDS * len(task.images) + CHARACTER_SECONDS * text

    def reference_sizes(self, task: Task, sizes: Sequence[Size]) -> tuple[Size, ...]:
        """As they are: the judge itself keeps to its pixel budget."""
        return tuple(sizes)

    def encode(self, pipe: Any, tasks: Sequence[Task], pictures: Sequence[Pictures]) -> NoReturn:
        """There is no pipeline to encode for."""
        raise BadModel("the judge family has no pipeline; use a judge's runner")

    def denoise(self, pipe: Any, tasks: Sequence[Task], conditioning: Any, on_step: OnStep) -> NoReturn:
        """There is no pipeline to denoise with."""
        raise BadModel("the judge family has no pipeline; use a judge's runner")

    def decode(self, pipe: Any, tasks: Sequence[Task], latents: Any) -> torch.Tensor:
        """There is no pipeline to decode with."""
        raise BadModel("the judge family has no pipeline; use a judge's runner")


FAMILY = Judge()
