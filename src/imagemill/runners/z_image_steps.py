"""The denoising steps of Z-Image, with the arithmetic of diffusers and nothing that waits for the device.

The pipeline's own loop builds positions, rotary frequencies and masks anew at every step, refines the captions anew, and
asks the device for values. Here `prepare` makes whatever does not depend on the step, or needs the host, ahead of time;
`denoise` only launches. Each tensor has the shape and the order of tokens that it has in diffusers, so not one bit differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagemill.runners.streams import sent

if TYPE_CHECKING:
    import torch

PATCH = 2
"""Latents along each side of an image token."""

KIND = "2-1"
"""The name of the embedder and the final layer for tokens of `PATCH` by `PATCH` latents and one frame."""


@dataclass(frozen=True, slots=True)
class Places:
    """Rotary frequencies (rows, tokens, half a head) of the tokens of each row, complex or, with a last side of 2, real;
    and which of the tokens are there (rows, tokens), None where all are."""

    freqs: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that the steps of a batch read, on the device.

    The rows of a forward pass are the pictures of the batch; under guidance first all with their prompt, then all with
    their negative prompt. `latents` (pictures, channels, height, width) are the noise in float32, `times` (steps) what the
    transformer is told, `deltas` (steps) by how much each step changes sigma, `dtype` that of the transformer. `captions`
    (tokens of all rows, width) have `lengths` tokens a row. `caption_pads` and `picture_pads` (tokens of all rows, 1) say
    which tokens only fill up a row to a multiple of 32.
    """

    latents: torch.Tensor
    times: torch.Tensor
    deltas: torch.Tensor
    guidance: float
    dtype: torch.dtype
    captions: torch.Tensor
    lengths: tuple[int, ...]
    caption_pads: torch.Tensor
    picture_pads: torch.Tensor
    caption: Places
    picture: Places
    joint: Places


def known(pipe: Any) -> bool:
    """Whether the pipeline's steps are those of this file: its classes are exactly those of diffusers, its solver is the
    deterministic Euler, and nobody has hooked or replaced the transformer's call, as offloading does."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer, scheduler = pipe.transformer, pipe.scheduler
    if type(pipe) is not ZImagePipeline or type(transformer) is not ZImageTransformer2DModel:
        return False
    if type(scheduler) is not FlowMatchEulerDiscreteScheduler:
        return False
    if scheduler.config.stochastic_sampling or scheduler.config.invert_sigmas:
        return False
    hooked = transformer._forward_hooks or transformer._forward_pre_hooks or transformer._compiled_call_impl
    return KIND in transformer.all_x_embedder and not hooked and "forward" not in vars(transformer)


# --- ahead of the steps -----------------------------------------------------------------------------------------------


def prepare(
    pipe: Any,
    latents: torch.Tensor,
    positive: Sequence[torch.Tensor],
    negative: Sequence[torch.Tensor],
    steps: int,
    guidance: float,
) -> Prepared:
    """What `denoise` needs, from the noise (pictures, channels, height, width) and the embeddings (tokens, width) of each
    picture's prompts, all on the device; `negative` is empty where no guidance runs."""
    import torch

    transformer, dtype = pipe.transformer, pipe.transformer.dtype
    rows = list(latents.to(dtype).unsqueeze(2)) * (2 if negative else 1)
    _, captions, _, picture_ids, caption_ids, picture_pads, caption_pads = transformer.patchify_and_embed(
        rows, [*positive, *negative], PATCH, 1
    )
    # diffusers counts a caption's padding twice in its positions, and cuts them
    caption = places(transformer, [ids[: len(own)] for ids, own in zip(caption_ids, captions, strict=True)])
    picture = places(transformer, picture_ids)
    times, deltas = schedule(pipe, latents, steps)
    return Prepared(
        latents=latents,
        times=times,
        deltas=deltas,
        guidance=guidance if negative else 0.0,
        dtype=dtype,
        captions=torch.cat(captions),
        lengths=tuple(len(own) for own in captions),
        caption_pads=torch.cat(caption_pads).unsqueeze(-1),
        picture_pads=torch.cat(picture_pads).unsqueeze(-1),
        caption=for_blocks(transformer, caption),
        picture=for_blocks(transformer, picture),
        joint=for_blocks(transformer, joined(picture, caption)),
    )


def schedule(pipe: Any, latents: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`times` and `deltas` of `Prepared`: the scheduler's own, shifted for the number of image tokens as the pipeline does.

    The host makes them from a few numbers, and they travel once. What follows is rounded as the device rounds, since its
    division by a number is not that of every CPU. Timesteps are never negative, so that the truncation of guidance, which
    the pipeline has at 1 unless asked, never sets in.
    """
    import torch
    from diffusers.pipelines.z_image.pipeline_z_image import (
        calculate_shift,
        get_default_z_image_sigmas,
        retrieve_timesteps,
    )

    scheduler = pipe.scheduler
    tokens = (latents.shape[2] // PATCH) * (latents.shape[3] // PATCH)
    shift = calculate_shift(
        tokens,
        scheduler.config.get("base_image_seq_len", 256),
        scheduler.config.get("max_image_seq_len", 4096),
        scheduler.config.get("base_shift", 0.5),
        scheduler.config.get("max_shift", 1.15),
    )
    timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=get_default_z_image_sigmas(steps), mu=shift)
    deltas = scheduler.sigmas[1:] - scheduler.sigmas[:-1]
    timesteps, deltas = sent(torch.stack([timesteps, deltas]), latents.device)
    return (1000 - timesteps) / 1000 * pipe.transformer.t_scale, deltas


def places(transformer: Any, ids: Sequence[torch.Tensor]) -> Places:
    """Complex frequencies of rows with these positions (tokens, 3); shorter rows are filled up with zeros, and masked."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    lengths = [len(own) for own in ids]
    freqs = pad_sequence(list(transformer.rope_embedder(torch.cat(list(ids))).split(lengths)), batch_first=True)
    if min(lengths) == max(lengths):
        return Places(freqs, None)
    mask = torch.zeros(freqs.shape[:2], dtype=torch.bool, device=freqs.device)
    for row, length in enumerate(lengths):
        mask[row, :length].fill_(True)
    return Places(freqs, mask)


def joined(picture: Places, caption: Places) -> Places:
    """Rows of image tokens with the caption's behind them. Pictures of a batch are alike, so only captions are masked."""
    import torch

    freqs = torch.cat([picture.freqs, caption.freqs], dim=1)
    if caption.mask is None:
        return Places(freqs, None)
    return Places(freqs, torch.cat([caption.mask.new_ones(picture.freqs.shape[:2]), caption.mask], dim=1))


def for_blocks(transformer: Any, found: Places) -> Places:
    """With the frequencies as pairs of real numbers where the attention processors of all blocks have `real_rotary`."""
    import torch

    blocks = [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]
    if all(getattr(type(block.attention.processor), "real_rotary", False) for block in blocks):
        return Places(torch.view_as_real(found.freqs), found.mask)
    return found


# --- the steps --------------------------------------------------------------------------------------------------------


def denoise(transformer: Any, prepared: Prepared, on_step: Callable[[int, int], None]) -> torch.Tensor:
    """Latents (pictures, channels, height, width) in float32 after all steps; `on_step(step, steps)` after each is launched.

    Never waits for the device and brings nothing to it.
    """
    import torch

    latents, steps = prepared.latents, len(prepared.deltas)
    with torch.no_grad():
        captions = refine(transformer, prepared)
        for step in range(steps):
            predicted = forward(transformer, prepared, captions, latents, prepared.times[step]).float()
            if prepared.guidance:
                positive, negative = predicted.chunk(2)
                predicted = positive + prepared.guidance * (positive - negative)
            latents = latents + prepared.deltas[step] * -predicted
            on_step(step + 1, steps)
    return latents


def refine(transformer: Any, prepared: Prepared) -> torch.Tensor:
    """Captions (rows, tokens of the longest, width) as the joined layers take them, the same at every step; zero where
    there is none."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    own = prepared.caption
    captions = transformer.cap_embedder(prepared.captions)
    captions = torch.where(prepared.caption_pads, transformer.cap_pad_token, captions)
    captions = pad_sequence(list(captions.split(prepared.lengths)), batch_first=True)
    for layer in transformer.context_refiner:
        captions = layer(captions, own.mask, own.freqs)
    if own.mask is not None:
        captions = captions.masked_fill(~own.mask.unsqueeze(-1), 0.0)
    return captions


def forward(
    transformer: Any, prepared: Prepared, captions: torch.Tensor, latents: torch.Tensor, time: torch.Tensor
) -> torch.Tensor:
    """One pass of the transformer over all rows at one time: what it predicts (rows, channels, height, width), in its
    dtype."""
    import torch

    count = len(prepared.lengths)
    rows = latents.to(prepared.dtype).repeat(count // len(latents), 1, 1, 1)
    modulation = transformer.t_embedder(time.expand(count)).to(prepared.dtype)
    tokens = transformer.all_x_embedder[KIND](patches(rows, prepared.picture.freqs.shape[1]))
    tokens = torch.where(prepared.picture_pads, transformer.x_pad_token, tokens).unflatten(0, (count, -1))
    for layer in transformer.noise_refiner:
        tokens = layer(tokens, prepared.picture.mask, prepared.picture.freqs, modulation)
    tokens = torch.cat([tokens, captions], dim=1)
    for layer in transformer.layers:
        tokens = layer(tokens, prepared.joint.mask, prepared.joint.freqs, modulation)
    return unpatched(transformer.all_final_layer[KIND](tokens, c=modulation), rows)


def patches(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Latents (rows, channels, height, width) as tokens (rows x length, 4 x channels), filled up with the last of each row."""
    import torch

    split = rows.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    tokens = split.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    missing = length - tokens.shape[1]
    if missing:
        tokens = torch.cat([tokens, tokens[:, -1:].expand(-1, missing, -1)], dim=1)
    return tokens.flatten(0, 1)


def unpatched(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `patches` for tokens (rows, at least those of a picture, 4 x channels): in the shape of `like`."""
    _, channels, height, width = like.shape
    size = (height // PATCH, width // PATCH)
    split = tokens[:, : size[0] * size[1]].unflatten(2, (PATCH, PATCH, channels)).unflatten(1, size)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(like.shape)
