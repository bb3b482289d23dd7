"""Qwen-Image-Edit, and its Plus pipeline (2509, 2511) which takes several pictures, in stages.

True CFG runs only with a negative prompt; a single space is the one its authors use for none. diffusers gives the aspect
of the first picture to a whole batch of the one and refuses batches of the other, and brings pictures to a megapixel
whatever the size asked for. So text and pictures are encoded task by task, and the steps are those of the text-to-image
pipeline of the same parts, whose transformer sees each task's pictures behind its latents.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagemill import source_image
from imagemill.errors import BadTask
from imagemill.families import OnStep, Pictures, Size
from imagemill.families.generic import TextToImage, packed_noise, reference_sizes, refuse_size, step_callback
from imagemill.plan import Defaults
from imagemill.records import Task
from imagemill.runners.early import whole
from imagemill.runners.reference_tokens import attached
from imagemill.runners.seen_once import SeenOnce
from imagemill.runners.streams import sent

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

LOOK = 384
"""The Plus pipeline's text encoder looks at pictures of LOOK x LOOK pixels in their own aspect."""

LOOK_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class Text:
    """Embeddings (batch, tokens, width) and which of them are text (batch, tokens); the pipeline drops a mask that is
    full, and warns of one that is missing."""

    embeds: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Seen:
    """What the text encoder looks at for one task, and what it has made of it."""

    pictures: list[Image]
    once: SeenOnce


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The text with the pictures it speaks of; `references` (batch, n, channels), the pictures as tokens, and `shapes`
    (frames, rows, columns) of each of them, which are the same for all tasks."""

    positive: Text
    negative: Text | None
    references: torch.Tensor
    shapes: list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class QwenEdit(TextToImage):
    """The family of `QwenImageEditPipeline` and `QwenImageEditPlusPipeline`."""

    def reference_sizes(self, task: Task, sizes: Sequence[Size]) -> tuple[Size, ...]:
        """The first in the shape of the picture that is made, the others in their own, none over 1024x1024 pixels."""
        return reference_sizes(task, sizes, self.multiple)

    def encode(self, pipe: Any, tasks: Sequence[Task], pictures: Sequence[Pictures]) -> Conditioning:
        """Each task's text together with its pictures, and its pictures to reference tokens."""
        return whole(self.encoding(pipe, tasks, pictures))

    def encoding(
        self, pipe: Any, tasks: Sequence[Task], pictures: Sequence[Pictures]
    ) -> Generator[None, None, Conditioning]:
        """`encode` in pieces: the prompts, the negative ones, the reference tokens."""
        import torch

        if len(pictures[0]) > 1 and not is_plus(pipe):
            raise BadTask(f"{type(pipe).__name__} takes one picture; the task names {len(pictures[0])}")
        seen = [Seen(look(pipe, own), SeenOnce(pipe)) for own in pictures]
        positive = embed(pipe, [task.prompt for task in tasks], seen)
        negative = None
        if (tasks[0].true_cfg_scale or 0) > 1 and tasks[0].negative_prompt is not None:
            yield
            negative = embed(pipe, [task.negative_prompt or "" for task in tasks], seen)
        yield
        dtype, unit = positive.embeds.dtype, pipe.vae_scale_factor * 2
        tokens = [torch.cat([encode_picture(pipe, picture, dtype) for picture in own], dim=1) for own in pictures]
        shapes = [(1, picture.height // unit, picture.width // unit) for picture in pictures[0]]
        return Conditioning(positive, negative, torch.cat(tokens), shapes)

    def denoise(self, pipe: Any, tasks: Sequence[Task], conditioning: Conditioning, on_step: OnStep) -> torch.Tensor:
        """Latents (batch, tokens, channels), packed as the pipeline has them."""
        first, positive, negative = tasks[0], conditioning.positive, conditioning.negative
        assert first.width and first.height and first.steps, "a planned task has its size and steps"
        refuse_size(pipe, first)
        text = {"prompt_embeds": positive.embeds, "prompt_embeds_mask": positive.mask}
        if negative:
            text |= {"negative_prompt_embeds": negative.embeds, "negative_prompt_embeds_mask": negative.mask}

        def extend(call: dict[str, Any]) -> dict[str, Any]:
            return {**call, "img_shapes": [[*own, *conditioning.shapes] for own in call["img_shapes"]]}

        with attached(pipe.transformer, conditioning.references, extend):
            (latents,) = from_text(pipe)(
                **text,
                latents=packed_noise(pipe, tasks, positive.embeds.dtype, frames=(1,)),
                height=first.height,
                width=first.width,
                num_inference_steps=first.steps,
                true_cfg_scale=first.true_cfg_scale,
                max_sequence_length=None,  # it cuts at 512, and the instruction stands behind the pictures' tokens
                output_type="latent",
                return_dict=False,
                callback_on_step_end=step_callback(first.steps, on_step),
            )
        result: torch.Tensor = latents
        return result

    def decode(self, pipe: Any, tasks: Sequence[Task], latents: torch.Tensor) -> torch.Tensor:
        """One picture at a time: a batch multiplies the peak of memory."""
        import torch

        mean, spread = (sent(statistic, latents.device).to(latents.dtype) for statistic in statistics(pipe))
        unpacked = pipe._unpack_latents(latents, tasks[0].height, tasks[0].width, pipe.vae_scale_factor)
        pictures = []
        for latent in unpacked.split(1):
            decoded = pipe.vae.decode((latent * spread + mean).to(pipe.vae.dtype), return_dict=False)[0][:, :, 0]
            pictures.append(pipe.image_processor.postprocess(decoded, output_type="pt"))
        return torch.cat(pictures)


def is_plus(pipe: Any) -> bool:
    """Whether the pipeline takes several pictures."""
    return "Plus" in type(pipe).__name__


def from_text(pipe: Any) -> Any:
    """The text-to-image pipeline of the same parts: its loop over the steps is that of both edit pipelines."""
    from diffusers import QwenImagePipeline

    names = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    made = QwenImagePipeline(**{name: getattr(pipe, name) for name in names})
    made.set_progress_bar_config(disable=True)
    return made


def look(pipe: Any, pictures: Pictures) -> list[Image]:
    """What the text encoder sees of a task's pictures."""
    if not is_plus(pipe):
        return list(pictures)
    seen = []
    for picture in pictures:
        aspect = picture.width / picture.height
        width, height = (
            max(1, round(side / LOOK_MULTIPLE)) * LOOK_MULTIPLE
            for side in (LOOK * math.sqrt(aspect), LOOK / math.sqrt(aspect))
        )
        seen.append(source_image.fit(picture, width, height, LOOK_MULTIPLE))
    return seen


def embed(pipe: Any, prompts: Sequence[str], seen: Sequence[Seen]) -> Text:
    """The pipeline's own encoding, one task at a time so that none is padded there, then padded to the longest."""
    import torch

    parts = []
    for prompt, own in zip(prompts, seen, strict=True):
        with own.once.looking():
            shown = own.pictures if is_plus(pipe) else own.pictures[0]
            parts.append(pipe.encode_prompt(prompt=[prompt], image=shown)[0][0])
    longest = max(len(part) for part in parts)
    embeds = torch.stack([torch.cat([part, part.new_zeros(longest - len(part), part.shape[1])]) for part in parts])
    places = torch.arange(longest, device=embeds.device)
    return Text(embeds, torch.stack([(places < len(part)).long() for part in parts]))


def statistics(pipe: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the VAE's latents, for tensors (batch, channels, 1, height, width)."""
    import torch

    config = pipe.vae.config
    mean, spread = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return mean, spread


def encode_picture(pipe: Any, picture: Image, dtype: torch.dtype) -> torch.Tensor:
    """A picture as tokens (1, n, channels): the mode of the VAE's distribution, no noise."""
    pixels = pipe.image_processor.preprocess(picture, picture.height, picture.width).unsqueeze(2)
    latents = pipe._encode_vae_image(image=pixels.to(pipe._execution_device, dtype), generator=None)
    channels, height, width = latents.shape[1], latents.shape[3], latents.shape[4]
    tokens: torch.Tensor = pipe._pack_latents(latents, 1, channels, height, width)
    return tokens


FAMILY = QwenEdit(
    name="qwen_edit",
    pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    fields=frozenset({"negative_prompt", "true_cfg_scale", "images", "loras"}),
    multiple=16,
    max_batch=4,
    max_images=10,
    max_edit_batch=4,
    defaults=Defaults(width=1024, height=1024, steps=50, true_cfg_scale=4.0, negative_prompt=" "),
    forward=0.2145,  # half of the measured 0.429 s with 4096 target and 4096 source tokens
    doubled_by="true_cfg_scale",
    needs_negative=True,
)
