"""Classifier-free guidance as planning and warming up see it: which tasks have it.

Families differ in when it runs: `guidance_scale` above 0 or above 1, or `true_cfg_scale` above 1 with a negative prompt. Each
tells by its cost, since guidance takes a second pass.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple, Protocol

from imagemill.records import Task


class Costs(Protocol):
    """What is asked of a family."""

    def cost(self, task: Task) -> float:
        """Estimated seconds."""


class Guidance(NamedTuple):
    """What of a task decides on guidance, with scales rounded up to 0, 1 or 2, so that there are few among millions of
    tasks: no family asks for more than whether a scale is above 0 or 1."""

    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative: bool = False

    def runs(self, family: Costs) -> bool:
        """Whether guidance runs in such a task of the family."""
        negative = " " if self.negative else None
        task, off = (
            Task("", "", negative_prompt=negative, guidance_scale=scale, true_cfg_scale=true_cfg)
            for scale, true_cfg in ((self.guidance_scale, self.true_cfg_scale), (0.0, 0.0))
        )
        return family.cost(task) > family.cost(off)


def guidance(guidance_scale: float | None, true_cfg_scale: float | None, negative_prompt: str | None) -> Guidance:
    """That of a task with these fields."""
    return Guidance(_level(guidance_scale), _level(true_cfg_scale), negative_prompt is not None)


def _level(scale: float | None) -> float | None:
    return None if scale is None else float(ceil(min(scale, 2.0)))
