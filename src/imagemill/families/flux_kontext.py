"""FLUX.1 Kontext [dev], in stages: edits one picture by text.

Guidance is distilled into the model; true CFG takes `true_cfg_scale` > 1 and a negative prompt. The pipeline would bring
every picture to one of its own sizes near a megapixel; here picture and result have the size that the task asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagemill.families import OnStep, Pictures, Size
from imagemill.families.generic import TextToImage, packed_noise, reference_sizes, refuse_size, step_callback
from imagemill.plan import Defaults
from imagemill.records import Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Arguments of the pipeline's call: the text's embeddings, and `image`, the encoded pictures (batch, channels,
    height/s, width/s)."""

    arguments: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class FluxKontext(TextToImage):
    """The family of `FluxKontextPipeline`. 16 is twice the down-sampling of its VAE."""

    def reference_sizes(self, task: Task, sizes: Sequence[Size]) -> tuple[Size, ...]:
        """The shape of the picture that is made, at most 1024x1024 pixels."""
        return reference_sizes(task, sizes, self.multiple)

    def encode(self, pipe: Any, tasks: Sequence[Task], pictures: Sequence[Pictures]) -> Conditioning:
        """Prompts to embeddings, and each task's picture to latents."""
        import torch

        embeds, pooled, _ = pipe.encode_prompt(prompt=[task.prompt for task in tasks], prompt_2=None)
        arguments = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if doubled(tasks[0]):
            negative, pooled, _ = pipe.encode_prompt(
                prompt=[task.negative_prompt or "" for task in tasks], prompt_2=None
            )
            arguments |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": pooled}
        encoded = [encode_picture(pipe, own[0], embeds.dtype) for own in pictures]
        return Conditioning(arguments | {"image": torch.cat(encoded)})

    def denoise(self, pipe: Any, tasks: Sequence[Task], conditioning: Conditioning, on_step: OnStep) -> torch.Tensor:
        """Latents (batch, tokens, channels), packed as the pipeline has them."""
        first = tasks[0]
        assert first.width and first.height and first.steps, "a planned task has its size and steps"
        refuse_size(pipe, first)
        (latents,) = pipe(
            **conditioning.arguments,
            latents=packed_noise(pipe, tasks, conditioning.arguments["prompt_embeds"].dtype),
            height=first.height,
            width=first.width,
            max_area=first.height * first.width,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance_scale,
            true_cfg_scale=first.true_cfg_scale,
            output_type="latent",
            return_dict=False,
            callback_on_step_end=step_callback(first.steps, on_step),
            _auto_resize=False,
        )
        result: torch.Tensor = latents
        return result

    def decode(self, pipe: Any, tasks: Sequence[Task], latents: torch.Tensor) -> torch.Tensor:
        """One picture at a time: a batch multiplies the peak of memory."""
        import torch

        config, pictures = pipe.vae.config, []
        unpacked = pipe._unpack_latents(latents, tasks[0].height, tasks[0].width, pipe.vae_scale_factor)
        for latent in unpacked.split(1):
            scaled = latent / config.scaling_factor + config.shift_factor
            decoded = pipe.vae.decode(scaled.to(pipe.vae.dtype), return_dict=False)[0]
            pictures.append(pipe.image_processor.postprocess(decoded, output_type="pt"))
        return torch.cat(pictures)


def doubled(task: Task) -> bool:
    """Whether each step has a second pass, for true CFG."""
    return (task.true_cfg_scale or 0) > 1 and task.negative_prompt is not None


def encode_picture(pipe: Any, picture: Any, dtype: torch.dtype) -> torch.Tensor:
    """The picture's latents (1, channels, height/s, width/s), the mode of the VAE's distribution: no noise."""
    pixels = pipe.image_processor.preprocess(picture, picture.height, picture.width)
    encoded: torch.Tensor = pipe._encode_vae_image(pixels.to(pipe._execution_device, dtype), generator=None)
    return encoded


FAMILY = FluxKontext(
    name="flux_kontext",
    pipelines=("FluxKontextPipeline",),
    fields=frozenset({"negative_prompt", "guidance_scale", "true_cfg_scale", "images", "loras"}),
    multiple=16,
    max_batch=4,
    max_images=1,
    max_edit_batch=4,
    defaults=Defaults(width=1024, height=1024, steps=28, guidance_scale=2.5, true_cfg_scale=1.0),
    forward=0.2,
    doubled_by="true_cfg_scale",
    needs_negative=True,
)
