"""Any pipeline with the usual call, and the base of the families that need no stages of their own.

The usual call: `pipe(prompt=[...], height=, width=, num_inference_steps=, generator=[...], output_type="pt")`, and
`image`, `negative_prompt`, `guidance_scale`, `true_cfg_scale`, `callback_on_step_end` where the pipeline has them. Such
a pipeline encodes, denoises and decodes in one go, so the stage `denoise` holds it all. One that takes an `image` may do
without height and width: what it makes is then as large as the picture.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagemill.canvas import EDIT_PIXELS, output_size
from imagemill.errors import BadTask
from imagemill.families import OnStep, Pictures, Size
from imagemill.plan import Defaults
from imagemill.records import Task
from imagemill.runners.streams import sent

if TYPE_CHECKING:
    import torch

PASSED = ("negative_prompt", "guidance_scale", "true_cfg_scale")
"""Optional fields that reach the pipeline's call under their own name."""

PICTURE_NEEDED = ("Img2Img", "Edit", "Pix2Pix")
"""Words in the names of pipelines that cannot do without a picture."""


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
    max_images: int = 0
    max_edit_batch: int = 1
    defaults: Defaults = Defaults(steps=50)
    forward: float = 0.1
    doubled_by: str = "guidance_scale"
    needs_negative: bool = False

    def group(self, task: Task) -> str:
        """Size, steps, guidance, number of pictures, and whether there is a negative prompt: what one call has once."""
        negative = "-" if task.negative_prompt is None else "negative"
        edits = f"/{len(task.images)} to edit" if task.images else ""
        return f"{task.width}x{task.height}/{task.steps}/{task.guidance_scale}/{task.true_cfg_scale}/{negative}{edits}"

    def cost(self, task: Task) -> float:
        """Seconds on one H100: `forward` times megapixels, those of pictures to edit too, steps, and 2 under
        classifier-free guidance."""
        megapixels = (task.width or 1024) * (task.height or 1024) / 2**20
        doubled = (getattr(task, self.doubled_by) or 0) > 1 and (
            not self.needs_negative or task.negative_prompt is not None
        )
        megapixels *= 1 + len(task.images)
        return self.forward * megapixels * (task.steps or self.defaults.steps or 50) * (2 if doubled else 1)

    def reference_sizes(self, task: Task, sizes: Sequence[Size]) -> tuple[Size, ...]:
        """The size of the picture that is made."""
        return tuple((task.width or 0, task.height or 0) for _ in sizes)

    def encode(self, pipe: Any, tasks: Sequence[Task], pictures: Sequence[Pictures]) -> Any:
        """The text and the picture of the call; the pipeline encodes them itself.

        Raises `BadTask` for a field that this pipeline's call does not take: it would be ignored or crash.
        """
        parameters = call_parameters(pipe)
        if pictures[0] and "image" not in parameters:
            raise BadTask(f"{type(pipe).__name__} edits no pictures; remove images")
        if not pictures[0] and any(word in type(pipe).__name__ for word in PICTURE_NEEDED):
            raise BadTask(f"{type(pipe).__name__} edits pictures; name one")
        for task in tasks:
            for field in PASSED:
                if getattr(task, field) is not None and field not in parameters:
                    raise BadTask(f"{type(pipe).__name__} does not take {field}; remove it")
        texts: dict[str, Any] = {"prompt": [task.prompt for task in tasks]}
        if tasks[0].negative_prompt is not None:
            texts["negative_prompt"] = [task.negative_prompt or "" for task in tasks]
        if pictures[0]:
            texts["image"] = [own[0] for own in pictures]
        return texts

    def denoise(self, pipe: Any, tasks: Sequence[Task], conditioning: Any, on_step: OnStep) -> torch.Tensor:
        """The whole call. Noise comes from one CPU generator a task, so it does not depend on device or batch.

        Raises `BadTask` for what the pipeline's own check of its arguments refuses (a `ValueError`).
        """
        first, parameters = tasks[0], call_parameters(pipe)
        arguments: dict[str, Any] = {
            **conditioning,
            "num_inference_steps": first.steps,
            "generator": [generator(task) for task in tasks],
            "output_type": "pt",
        }
        arguments |= {name: getattr(first, name) for name in ("height", "width") if name in parameters}
        for field in ("guidance_scale", "true_cfg_scale"):
            if getattr(first, field) is not None:
                arguments[field] = getattr(first, field)
        if "callback_on_step_end" in parameters:
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


def packed_noise(pipe: Any, tasks: Sequence[Task], dtype: torch.dtype, frames: tuple[int, ...] = ()) -> torch.Tensor:
    """Starting latents (batch, tokens, channels) in 2x2 patches, each task's drawn alone from its own seed on the CPU in
    this dtype. `frames` stands before the channels in the shape that is drawn."""
    import torch

    channels, unit, drawn = pipe.transformer.config.in_channels // 4, pipe.vae_scale_factor * 2, []
    for task in tasks:
        height, width = (2 * ((side or 0) // unit) for side in (task.height, task.width))
        latent = torch.randn((1, *frames, channels, height, width), generator=generator(task), dtype=dtype)
        drawn.append(pipe._pack_latents(latent, 1, channels, height, width))
    return sent(torch.cat(drawn), pipe._execution_device)


def refuse_size(pipe: Any, task: Task) -> None:
    """Raises `BadTask` unless both sides are multiples of twice the down-sampling of the pipeline's VAE."""
    unit = pipe.vae_scale_factor * 2
    if (task.width or 0) % unit or (task.height or 0) % unit:
        raise BadTask(f"{task.width}x{task.height} is no size for this model: both must be multiples of {unit}")


def step_callback(steps: int, on_step: OnStep) -> Any:
    """diffusers' `callback_on_step_end` that reports each step; solvers of higher order count at most up to `steps`."""

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(min(index + 1, steps), steps)
        return tensors

    return callback


def call_parameters(pipe: Any) -> frozenset[str]:
    """The names of the arguments that the pipeline's call takes."""
    return frozenset(inspect.signature(type(pipe).__call__).parameters)


def reference_sizes(task: Task, sizes: Sequence[Size], multiple: int) -> tuple[Size, ...]:
    """The sizes of pictures that a transformer sees beside the one it makes: the first has that one's shape, the others
    keep their own aspect; each has as many pixels as the one that is made, but no more than 1024x1024."""
    width, height = task.width or multiple, task.height or multiple
    pixels = min(width * height, EDIT_PIXELS)
    first = (width, height) if pixels == width * height else output_size(width, height, pixels, multiple)
    return (first, *(output_size(*size, pixels, multiple) for size in sizes[1:]))[: len(sizes)]


FAMILY = TextToImage(name="generic", fields=frozenset({*PASSED, "loras", "images", "prompt_only"}), max_images=1)
