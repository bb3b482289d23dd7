"""Z-Image and Z-Image-Turbo, in stages. The pixels are those of one whole call with the same noise.

In diffusers 0.42 `num_inference_steps` n gives n forward passes (older releases spent the last of n on an empty step).
Guidance runs whenever `guidance_scale` is above 0, even at 1; Turbo wants 0.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagemill.families import OnStep, Pictures, Size
from imagemill.families.generic import generator, refuse_size, step_callback
from imagemill.plan import Defaults
from imagemill.records import Task

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MAX_TOKENS = 512
"""What the pipeline reads of a prompt, its chat template included."""

BUCKET = 32
"""The transformer pads captions to multiples of this; padding the text encoder's input alike keeps its shapes few."""

# Measured on one H100 in eager bfloat16 at 1024x1024.
ENCODE_SECONDS = 0.056
FORWARD_SECONDS = 0.157
DECODE_SECONDS = 0.091
ADAPTER_SLOWDOWN = 180 / 153


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Text embeddings, one tensor (tokens, width) a task; `negative` is empty where no guidance runs."""

    positive: list[torch.Tensor]
    negative: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class ZImage:
    """The family of `ZImagePipeline`. 16 is twice the down-sampling of its VAE, which the pipeline asks for."""

    name: str = "z_image"
    pipelines: tuple[str, ...] = ("ZImagePipeline",)
    fields: frozenset[str] = frozenset({"negative_prompt", "guidance_scale", "loras"})
    multiple: int = 16
    max_batch: int = 8
    max_images: int = 0
    max_edit_batch: int = 1
    defaults: Defaults = Defaults(width=1024, height=1024, steps=8, guidance_scale=0.0)

    def group(self, task: Task) -> str:
        """Size, steps and guidance, and whether there is a negative prompt."""
        negative = "-" if task.negative_prompt is None else "negative"
        return f"{task.width}x{task.height}/{task.steps}/{task.guidance_scale}/{negative}"

    def cost(self, task: Task) -> float:
        """Seconds on one H100: encode, one or (with guidance) two passes a step, decode."""
        pixels = (task.width or 1024) * (task.height or 1024)
        passes = 2 if task.guidance_scale else 1
        forward = FORWARD_SECONDS * forward_teraflop(pixels) / forward_teraflop(2**20)
        if any(lora.strength for lora in task.loras):
            forward *= ADAPTER_SLOWDOWN
        return passes * (ENCODE_SECONDS + (task.steps or 8) * forward) + DECODE_SECONDS * pixels / 2**20

    def reference_sizes(self, task: Task, sizes: Sequence[Size]) -> tuple[Size, ...]:
        """It edits no pictures."""
        return ()

    def encode(self, pipe: Any, tasks: Sequence[Task], pictures: Sequence[Pictures]) -> Conditioning:
        """Prompts to embeddings, padded to the longest of the batch in steps of `BUCKET` instead of to 512 tokens.

        The encoder is causal and the pad stands to the right, so the shorter pad changes no embedding.
        """
        prompts = [task.prompt for task in tasks]
        positive = embed(pipe, prompts)
        negative = embed(pipe, [task.negative_prompt or "" for task in tasks]) if tasks[0].guidance_scale else []
        return Conditioning(positive, negative)

    def denoise(self, pipe: Any, tasks: Sequence[Task], conditioning: Conditioning, on_step: OnStep) -> torch.Tensor:
        """Latents (batch, channels, height/s, width/s) in float32, s being the VAE's down-sampling."""
        first = tasks[0]
        assert first.width and first.height and first.steps, "a planned task has its size and steps"
        refuse_size(pipe, first)
        (latents,) = pipe(
            prompt=None,
            prompt_embeds=list(conditioning.positive),
            negative_prompt_embeds=list(conditioning.negative),
            latents=noise(pipe, tasks),
            height=first.height,
            width=first.width,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance_scale or 0.0,
            output_type="latent",
            return_dict=False,
            callback_on_step_end=step_callback(first.steps, on_step),
        )
        result: torch.Tensor = latents
        return result

    def decode(self, pipe: Any, tasks: Sequence[Task], latents: torch.Tensor) -> torch.Tensor:
        """One picture at a time: a batch gains no speed here and multiplies the peak of memory."""
        import torch

        config = pipe.vae.config
        pictures = []
        for latent in latents.to(pipe.vae.dtype).split(1):
            decoded = pipe.vae.decode(latent / config.scaling_factor + config.shift_factor, return_dict=False)[0]
            pictures.append(pipe.image_processor.postprocess(decoded, output_type="pt"))
        return torch.cat(pictures)


def forward_teraflop(pixels: int) -> float:
    """TFLOP of one forward pass for one picture: linear and quadratic in its image tokens (16x16 pixels each).

    The two factors fit the measured 13.7 TFLOP at 512x512 and 56.6 at 1024x1024, captions included.
    """
    tokens = pixels / 256
    return 0.01323 * tokens + 1.43e-7 * tokens**2


def embed(pipe: Any, prompts: list[str]) -> list[torch.Tensor]:
    """The pipeline's own text encoding, with a shorter pad; a prompt over 512 tokens is cut, with a warning."""
    lengths = [token_count(pipe.tokenizer, prompt) for prompt in prompts]
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > MAX_TOKENS:
            log.warning("a prompt has %d tokens, only the first %d are read: %.60r", length, MAX_TOKENS, prompt)
    padded = min(MAX_TOKENS, -(-max(lengths) // BUCKET) * BUCKET)
    # encode_prompt writes over the list it is given
    positive, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=padded)
    return list(positive)


def token_count(tokenizer: Any, prompt: str) -> int:
    """Tokens of the prompt inside the chat template that the pipeline puts around it."""
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return len(tokenizer(text).input_ids)


def noise(pipe: Any, tasks: Sequence[Task]) -> torch.Tensor:
    """The starting latents: float32, each task's drawn alone from its own seed on the CPU."""
    import torch

    unit = pipe.vae_scale_factor
    shapes = [
        (1, pipe.transformer.in_channels, (task.height or 0) // unit, (task.width or 0) // unit) for task in tasks
    ]
    drawn = [
        torch.randn(shape, generator=generator(task), dtype=torch.float32)
        for shape, task in zip(shapes, tasks, strict=True)
    ]
    latents: torch.Tensor = torch.cat(drawn).to(pipe._execution_device)
    return latents


FAMILY = ZImage()
