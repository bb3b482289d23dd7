"""FLUX.2 [dev] and FLUX.2 [klein], in stages: pictures from text alone, or by one or several pictures to edit.

diffusers shares the pictures of a call among all its prompts. Here each task's are encoded for it alone and stand behind
its own latents. The pixels of a single task are those of one whole call with the same noise and pictures.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadModel
from imagemill.families import OnStep, Pictures, Size
from imagemill.families.generic import (
    TextToImage,
    call_parameters,
    generator,
    reference_sizes,
    refuse_size,
    step_callback,
)
from imagemill.plan import Defaults
from imagemill.records import Task
from imagemill.runners.reference_tokens import attached
from imagemill.runners.streams import sent

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MAX_TOKENS = 512
"""What the pipelines read of a prompt, its chat template included."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Text embeddings (batch, tokens, width), `negative` only where guidance runs; `references` (batch, n, channels) and
    their places (batch, n, 4) only where there are pictures."""

    positive: torch.Tensor
    negative: torch.Tensor | None
    references: torch.Tensor | None
    places: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Flux2(TextToImage):
    """The family of `Flux2Pipeline` and `Flux2KleinPipeline`. 16 is twice the down-sampling of their VAE."""

    def reference_sizes(self, task: Task, sizes: Sequence[Size]) -> tuple[Size, ...]:
        """The first in the shape of the picture that is made, the others in their own, none over 1024x1024 pixels."""
        return reference_sizes(task, sizes, self.multiple)

    def encode(self, pipe: Any, tasks: Sequence[Task], pictures: Sequence[Pictures]) -> Conditioning:
        """Prompts to embeddings, and each task's pictures to reference tokens."""
        import torch

        texts = text_settings(pipe)
        warn_of_long(pipe, tasks, texts["max_sequence_length"])
        positive, _ = pipe.encode_prompt(prompt=[task.prompt for task in tasks], **texts)
        negative = None
        if guided(pipe, tasks[0]):
            negative, _ = pipe.encode_prompt(prompt=[""] * len(tasks), **texts)
        if not pictures[0]:
            return Conditioning(positive, negative, None, None)
        encoded = [encode_pictures(pipe, own) for own in pictures]
        return Conditioning(
            positive,
            negative,
            torch.cat([tokens for tokens, _ in encoded]),
            torch.cat([places for _, places in encoded]),
        )

    def denoise(self, pipe: Any, tasks: Sequence[Task], conditioning: Conditioning, on_step: OnStep) -> torch.Tensor:
        """Latents (batch, channels, height/s, width/s) as the VAE decodes them, s being its down-sampling."""
        import torch

        first = tasks[0]
        assert first.width and first.height and first.steps, "a planned task has its size and steps"
        refuse_size(pipe, first)
        negative = {} if conditioning.negative is None else {"negative_prompt_embeds": conditioning.negative}

        def extend(call: dict[str, Any]) -> dict[str, Any]:
            return {**call, "img_ids": torch.cat([call["img_ids"], conditioning.places], dim=1)}

        with attached(pipe.transformer, conditioning.references, extend):
            (latents,) = pipe(
                prompt=None,
                prompt_embeds=conditioning.positive,
                **negative,
                latents=noise(pipe, tasks, conditioning.positive.dtype),
                height=first.height,
                width=first.width,
                num_inference_steps=first.steps,
                guidance_scale=first.guidance_scale,
                output_type="latent",
                return_dict=False,
                callback_on_step_end=step_callback(first.steps, on_step),
            )
        return latents if latents.ndim == 4 else from_tokens(pipe, first, latents)

    def decode(self, pipe: Any, tasks: Sequence[Task], latents: torch.Tensor) -> torch.Tensor:
        """One picture at a time: a batch multiplies the peak of memory."""
        import torch

        pictures = []
        for latent in latents.to(pipe.vae.dtype).split(1):
            decoded = pipe.vae.decode(latent, return_dict=False)[0]
            pictures.append(pipe.image_processor.postprocess(decoded, output_type="pt"))
        return torch.cat(pictures)


def guided(pipe: Any, task: Task) -> bool:
    """Whether each step has a second pass: [klein] above guidance 1, unless it is distilled. [dev] has it built in."""
    has_negative = "negative_prompt_embeds" in call_parameters(pipe)
    return has_negative and (task.guidance_scale or 0) > 1 and not pipe.config.is_distilled


def text_settings(pipe: Any) -> dict[str, Any]:
    """How this pipeline's prompts are encoded: how many tokens, and which layers' outputs stand side by side.

    The layers are the pipeline's own where its text encoder is that deep, else as many as the transformer's width asks
    for, evenly spread up to the last. Raises `BadModel` when no number of layers gives that width.
    """
    config = pipe.text_encoder.config
    config = getattr(config, "text_config", config)
    layers = tuple(inspect.signature(pipe.encode_prompt).parameters["text_encoder_out_layers"].default)
    depth, width, wanted = config.num_hidden_layers, config.hidden_size, pipe.transformer.config.joint_attention_dim
    if max(layers) > depth or len(layers) * width != wanted:
        count, rest = divmod(wanted, width)
        if rest or not count:
            raise BadModel(f"the transformer takes text of width {wanted}; the encoder's layers give {width} each")
        layers = tuple(max(1, round(depth * (number + 1) / count)) for number in range(count))
    tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
    return {
        "text_encoder_out_layers": layers,
        "max_sequence_length": min(MAX_TOKENS, pipe.tokenizer_max_length, tokenizer.model_max_length),
    }


def warn_of_long(pipe: Any, tasks: Sequence[Task], most: int) -> None:
    """Log each prompt that is cut; the chat template's own tokens are not counted."""
    tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
    for task in tasks:
        count = len(tokenizer(task.prompt, verbose=False).input_ids)
        if count > most:
            log.warning("a prompt has %d tokens, only the first %d are read: %.60r", count, most, task.prompt)


def encode_pictures(pipe: Any, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """One task's reference tokens (1, n, channels) and their places (1, n, 4)."""
    tensors = [
        pipe.image_processor.preprocess(picture, height=picture.height, width=picture.width) for picture in pictures
    ]
    tokens, places = pipe.prepare_image_latents(
        images=tensors, batch_size=1, generator=None, device=pipe._execution_device, dtype=pipe.vae.dtype
    )
    return tokens, places


def from_tokens(pipe: Any, task: Task, tokens: torch.Tensor) -> torch.Tensor:
    """Latents (batch, channels, height/s, width/s) as the VAE decodes them, from tokens (batch, n, channels) row by row.

    `Flux2Pipeline` leaves this to whoever asks for latents, `Flux2KleinPipeline` does it.
    """
    import torch

    unit, norm = pipe.vae_scale_factor * 2, pipe.vae.bn
    size = ((task.height or 0) // unit, (task.width or 0) // unit)
    latents = tokens.transpose(1, 2).unflatten(2, size)
    mean, variance = (values.view(1, -1, 1, 1).to(latents) for values in (norm.running_mean, norm.running_var))
    result: torch.Tensor = pipe._unpatchify_latents(
        latents * torch.sqrt(variance + pipe.vae.config.batch_norm_eps) + mean
    )
    return result


def noise(pipe: Any, tasks: Sequence[Task], dtype: torch.dtype) -> torch.Tensor:
    """The starting latents, each task's drawn alone from its own seed on the CPU, in the embeddings' dtype."""
    import torch

    unit, channels = pipe.vae_scale_factor * 2, pipe.transformer.config.in_channels
    drawn = [
        torch.randn(
            (1, channels, (task.height or 0) // unit, (task.width or 0) // unit), generator=generator(task), dtype=dtype
        )
        for task in tasks
    ]
    latents: torch.Tensor = sent(torch.cat(drawn), pipe._execution_device)
    return latents


FAMILY = Flux2(
    name="flux2",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    fields=frozenset({"guidance_scale", "images", "prompt_only", "loras"}),
    multiple=16,
    max_batch=4,
    max_images=10,
    max_edit_batch=4,
    defaults=Defaults(width=1024, height=1024, steps=50, guidance_scale=4.0),
    forward=0.3,
)
