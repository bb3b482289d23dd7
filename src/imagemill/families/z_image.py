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
from imagemill.runners import z_image_steps
from imagemill.runners.streams import sent
from imagemill.runners.text_cache import embedded
from imagemill.runners.z_image_steps import Prepared

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
class WholeCall:
    """For a pipeline whose steps are not those of `z_image_steps`: what its own call takes. Text embeddings, one tensor
    (tokens, width) a task, `negative` empty where no guidance runs; the noise (batch, channels, height/s, width/s)."""

    positive: list[torch.Tensor]
    negative: list[torch.Tensor]
    latents: torch.Tensor


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

    def encode(self, pipe: Any, tasks: Sequence[Task], pictures: Sequence[Pictures]) -> Prepared | WholeCall:
        """Prompts to embeddings, and whatever else the steps need from the host: noise, timesteps, positions, masks.

        May wait for the device. Raises `BadTask` for a size that the model cannot make.
        """
        import torch

        first = tasks[0]
        assert first.width and first.height and first.steps, "a planned task has its size and steps"
        refuse_size(pipe, first)
        device, guidance = pipe._execution_device, first.guidance_scale or 0.0
        with torch.no_grad():
            positive = embed(pipe, [task.prompt for task in tasks], device)
            negative = embed(pipe, [task.negative_prompt or "" for task in tasks], device) if guidance > 0 else []
            latents = sent(noise(pipe, tasks), device)
            if z_image_steps.known(pipe):
                return z_image_steps.prepare(pipe, latents, positive, negative, first.steps, guidance)
        return WholeCall(positive, negative, latents)

    def denoise(
        self, pipe: Any, tasks: Sequence[Task], conditioning: Prepared | WholeCall, on_step: OnStep
    ) -> torch.Tensor:
        """Latents (batch, channels, height/s, width/s) in float32, s being the VAE's down-sampling.

        Only launches work and never waits for the device, unless the pipeline's own call has to do it.
        """
        if isinstance(conditioning, WholeCall):
            return whole_call(pipe, tasks[0], conditioning, on_step)
        return z_image_steps.denoise(pipe.transformer, conditioning, on_step)

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


def embed(pipe: Any, prompts: list[str], device: torch.device) -> list[torch.Tensor]:
    """One tensor (tokens, width) a prompt, without padding. Those that were encoded before are not encoded again."""
    return embedded(pipe, prompts, device, lambda missing: encode_prompts(pipe, missing, device))


def encode_prompts(pipe: Any, prompts: list[str], device: torch.device) -> list[torch.Tensor]:
    """The pipeline's own text encoding, all prompts at once, padded to the longest in steps of `BUCKET`, not to 512 tokens.

    The encoder is causal and the pad stands to the right: no token of a prompt attends to it, and its own embeddings are
    cut off. So neither the shorter pad nor longer prompts beside it change what a prompt means to the transformer. One of
    over 512 tokens is cut, with a warning.
    """
    lengths = [token_count(pipe.tokenizer, prompt) for prompt in prompts]
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > MAX_TOKENS:
            log.warning("a prompt has %d tokens, only the first %d are read: %.60r", length, MAX_TOKENS, prompt)
    padded = min(MAX_TOKENS, -(-max(lengths) // BUCKET) * BUCKET)
    # encode_prompt writes over the list it is given
    positive, _ = pipe.encode_prompt(
        list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=padded
    )
    return list(positive)


def token_count(tokenizer: Any, prompt: str) -> int:
    """Tokens of the prompt inside the chat template that the pipeline puts around it."""
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return len(tokenizer(text, verbose=False).input_ids)


def noise(pipe: Any, tasks: Sequence[Task]) -> torch.Tensor:
    """The starting latents in host memory: float32, each task's drawn alone from its own seed."""
    import torch

    unit = pipe.vae_scale_factor
    shapes = [
        (1, pipe.transformer.in_channels, (task.height or 0) // unit, (task.width or 0) // unit) for task in tasks
    ]
    return torch.cat(
        [
            torch.randn(shape, generator=generator(task), dtype=torch.float32)
            for shape, task in zip(shapes, tasks, strict=True)
        ]
    )


def whole_call(pipe: Any, task: Task, given: WholeCall, on_step: OnStep) -> torch.Tensor:
    """The steps by the pipeline's own call; `task` is any of the batch."""
    (latents,) = pipe(
        prompt=None,
        prompt_embeds=list(given.positive),
        negative_prompt_embeds=list(given.negative),
        latents=given.latents,
        height=task.height,
        width=task.width,
        num_inference_steps=task.steps,
        guidance_scale=task.guidance_scale or 0.0,
        output_type="latent",
        return_dict=False,
        callback_on_step_end=step_callback(task.steps or 0, on_step),
    )
    result: torch.Tensor = latents
    return result


FAMILY = ZImage()
