"""Any text-to-image pipeline with the usual call, and the base of the families that need no stages of their own.

The usual call: `pipe(prompt=[...], height=, width=, num_inference_steps=, generator=[...], output_type="pt")`, and
`negative_prompt`, `guidance_scale`, `true_cfg_scale`, `callback_on_step_end` where the pipeline has them. Such a
pipeline encodes, denoises and decodes in one go, so the stage `denoise` holds it all.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadTask
from imagemill.families import OnStep
from imagemill.plan import Defaults
from imagemill.records import Task

if TYPE_CHECKING:
    import torch

PASSED = ("negative_prompt", "guidance_scale", "true_cfg_scale")
"""Optional fields that reach the pipeline's call under their own name."""


@dataclass(frozen=True, slots=True)
class TextToImage:
    """A family whose pipelines are called as a whole.

    `forward` is the estimated seconds of one forward pass of the denoiser for one picture of 1024x1024 on one H100, in
    eager bfloat16. `doubled_by` is the field that, above 1, makes every step two passes (classifier-free guidance);
    `needs_negative` says that this takes a negative prompt too.
    """

    name: str
    pipelines: tuple[str, ...] = ()
    fields: frozenset[str] = frozenset({*PASSED, "loras"})
    multiple: int = 8
    max_batch: int = 4
    defaults: Defaults = Defaults(steps=50)
    forward: float = 0.1
    doubled_by: str = "guidance_scale"
    needs_negative: bool = False

    def group(self, task: Task) -> str:
        """Size, steps and guidance, and whether there is a negative prompt: what one call has once for its batch."""
        negative = "-" if task.negative_prompt is None else "negative"
        return f"{task.width}x{task.height}/{task.steps}/{task.guidance_scale}/{task.true_cfg_scale}/{negative}"

    def cost(self, task: Task) -> float:
        """Seconds on one H100: `forward` times megapixels, steps, and 2 under classifier-free guidance."""
        megapixels = (task.width or 1024) * (task.height or 1024) / 2**20
        doubled = (getattr(task, self.doubled_by) or 0) > 1 and (
            not self.needs_negative or task.negative_prompt is not None
        )
        return self.forward * megapixels * (task.steps or self.defaults.steps or 50) * (2 if doubled else 1)

    def encode(self, pipe: Any, tasks: Sequence[Task]) -> dict[str, Any]:
        """The text arguments of the call; the pipeline encodes them itself.

        Raises `BadTask` for a field that this pipeline's call does not take: it would be ignored or crash.
        """
        parameters = call_parameters(pipe)
        for task in tasks:
            for field in PASSED:
                if getattr(task, field) is not None and field not in parameters:
                    raise BadTask(f"{type(pipe).__name__} does not take {field}; remove it")
        texts: dict[str, Any] = {"prompt": [task.prompt for task in tasks]}
        if tasks[0].negative_prompt is not None:
            texts["negative_prompt"] = [task.negative_prompt or "" for task in tasks]
        return texts

    def denoise(
        self, pipe: Any, tasks: Sequence[Task], conditioning: Mapping[str, Any], on_step: OnStep
    ) -> torch.Tensor:
        """The whole call. Noise comes from one CPU generator a task, so it does not depend on device or batch.

        Raises `BadTask` for what the pipeline's own check of its arguments refuses (a `ValueError`).
        """
        first = tasks[0]
        arguments: dict[str, Any] = {
            **conditioning,
            "height": first.height,
            "width": first.width,
            "num_inference_steps": first.steps,
            "generator": [generator(task) for task in tasks],
            "output_type": "pt",
        }
        for field in ("guidance_scale", "true_cfg_scale"):
            if getattr(first, field) is not None:
                arguments[field] = getattr(first, field)
        if "callback_on_step_end" in call_parameters(pipe):
            arguments["callback_on_step_end"] = step_callback(first.steps or 0, on_step)
        try:
            pictures: torch.Tensor = pipe(**arguments).images
        except ValueError as error:
            raise BadTask(f"{type(pipe).__name__} refuses the task: {' '.join(str(error).split())[:300]}") from error
        return pictures

    def decode(self, pipe: Any, tasks: Sequence[Task], latents: torch.Tensor) -> torch.Tensor:
        """The pictures as they are: the call has decoded them."""
        return latents


def generator(task: Task) -> torch.Generator:
    """The task's own source of noise, on the CPU: the same numbers on every device."""
    import torch

    return torch.Generator("cpu").manual_seed(task.seed or 0)


def step_callback(steps: int, on_step: OnStep) -> Any:
    """diffusers' `callback_on_step_end` that reports each step; solvers of higher order count at most up to `steps`."""

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(min(index + 1, steps), steps)
        return tensors

    return callback


def call_parameters(pipe: Any) -> frozenset[str]:
    """The names of the arguments that the pipeline's call takes."""
    return frozenset(inspect.signature(type(pipe).__call__).parameters)


FAMILY = TextToImage(name="generic")
