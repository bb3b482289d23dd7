"""Trains `tiny-edit`: `python training/image_edit.py --vae build/vae.safetensors --out build/tiny-edit`.

A Flux2Klein pipeline: the noisy picture's tokens, the source's tokens at time 10, the instruction's. Flow matching as
Flux: x = (1 - sigma) * target + sigma * noise, time input sigma, target noise - picture.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from architecture import EDIT_TOKENS, autoencoder, flux2, scheduler, text_encoder, tokenizer
from course import Batch, Course, feed, parser
from denoise import load_autoencoder, load_parts, noise_levels, write_folder
from edits import WEIGHTS, Editor
from nouns import load_nouns
from photos import HELD_OUT
from render import Atlas, numbers_of, on

LAYERS = (1, 2, 3)
"""Hidden states of the text encoder that the transformer reads, side by side."""
EPS = 1e-4


class EditDenoiser(nn.Module):
    """Text encoder and transformer, with the latents' statistics as the pipeline keeps them."""

    def __init__(self, tokens: Any) -> None:
        super().__init__()
        self.text = text_encoder(tokens)
        self.transformer = flux2()

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The three layers side by side: (batch, tokens, 3 * width)."""
        states = self.text(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        return torch.cat([states[layer] for layer in LAYERS], -1)

    def forward(self, mixed: Tensor, source: Tensor, text: Tensor, ids: tuple[Tensor, Tensor], sigma: Tensor) -> Tensor:
        """Velocity (batch, tokens, 32) of the noisy picture."""
        out: Tensor = self.transformer(
            hidden_states=torch.cat([mixed, source], 1),
            timestep=sigma,
            guidance=None,
            encoder_hidden_states=text,
            img_ids=ids[0],
            txt_ids=ids[1],
            return_dict=False,
        )[0]
        return out[:, : mixed.shape[1]]


def positions(width: int, height: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions (time, row, column, word) of picture and source tokens, and of the text's."""
    rows, columns = torch.arange(height // 8), torch.arange(width // 8)
    picture = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), rows, columns, torch.zeros(1, dtype=torch.long))
    source = picture.clone()
    source[:, 0] = 10
    text = torch.zeros(EDIT_TOKENS, 4, dtype=torch.long)
    text[:, 3] = torch.arange(EDIT_TOKENS)
    return torch.cat([picture, source]).to(device), text.to(device)


def pack(latent: Tensor) -> Tensor:
    """(batch, channels, height, width) to (batch, tokens, 4 * channels), as Flux 2 patches its latents."""
    batch, channels, height, width = latent.shape
    patches = latent.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, 4 * channels, height * width // 4).transpose(1, 2)


class EditDrawer:
    """Draws batches of edits; made once, then copied into the feeder processes."""

    def __init__(self, tokens: Any, batch: int, photos: list[int], weights: Mapping[str, float] = WEIGHTS) -> None:
        self.nouns = load_nouns()
        self.tokens = tokens
        self.batch = batch
        self.photos = photos
        self.weights = weights

    def __call__(self, seed: int, turn: int) -> Batch:
        editor = Editor(self.nouns, self.photos, random.Random(seed), self.weights)
        edits = [editor.edit() for _ in range(self.batch)]
        texts = self.tokens([edit.instruction + "<|im_end|>" for edit in edits]).input_ids
        ids = np.full((self.batch, EDIT_TOKENS), self.tokens.pad_token_id, np.int64)
        for row, text in enumerate(texts):
            ids[row, : min(len(text), EDIT_TOKENS)] = text[:EDIT_TOKENS]
        sources = numbers_of([edit.source for edit in edits])
        targets = {f"target_{name}": array for name, array in numbers_of([edit.target for edit in edits]).items()}
        return sources | targets | {"ids": ids}


class EditLesson:
    """One batch to one loss."""

    def __init__(self, model: EditDenoiser, atlas: Atlas, vae: Path, compiled: bool) -> None:
        self.model = model
        self.atlas = atlas
        self.vae, _, _ = load_autoencoder(vae, atlas.device)
        self.encode = torch.compile(self.vae.encoder, dynamic=False) if compiled else self.vae.encoder
        self.forward = torch.compile(model, dynamic=False) if compiled else model
        self.ids = positions(128, 128, atlas.device)
        self.mean = torch.zeros(32, device=atlas.device)
        self.variance = torch.ones(32, device=atlas.device)

    @torch.no_grad()
    def latents(self, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Source and target as tokens, not yet scaled."""
        target = {name.removeprefix("target_"): array for name, array in numbers.items() if name.startswith("target_")}
        both = {name: torch.cat([numbers[name], target[name]]) for name in target}
        picture = self.atlas.scenes(both, 128, 128) * 2 - 1
        with self.precise():
            moments = self.encode(picture.contiguous(memory_format=torch.channels_last))
        source, aim = pack(moments.float().chunk(2, 1)[0]).chunk(2)
        return source, aim

    def precise(self) -> torch.autocast:
        kind = self.atlas.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")

    def measure(self, batches: list[Batch]) -> None:
        """Mean and variance of each of the 32 channels: what the pipeline's `bn` holds."""
        packed = torch.cat([torch.cat(self.latents(on(self.atlas.device, dict(batch)))) for batch in batches])
        self.mean, self.variance = packed.mean((0, 1)), packed.var((0, 1))

    def scaled(self, packed: Tensor) -> Tensor:
        return (packed - self.mean) / torch.sqrt(self.variance + EPS)

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        numbers = on(self.atlas.device, batch)
        ids = numbers.pop("ids")
        source, target = (self.scaled(packed) for packed in self.latents(numbers))
        sigma = noise_levels(len(target), self.atlas.device)
        noise = torch.randn_like(target)
        mixed = (1 - sigma)[:, None, None] * target + sigma[:, None, None] * noise
        pad = self.model.text.config.pad_token_id
        with self.precise():
            text = self.model.embed(ids, (ids != pad).long())
            velocity = self.forward(mixed, source, text, self.ids, sigma)
        return (velocity.float() - (noise - target)).square().mean(), len(target)


def pipeline(model: EditDenoiser, lesson: EditLesson, vae: Path, tokens: Any) -> Any:
    """A Flux2KleinPipeline of copies of the parts, on the CPU in float32."""
    from diffusers import Flux2KleinPipeline

    coder = autoencoder(flux2=True)
    plain, _, _ = load_autoencoder(vae, torch.device("cpu"))
    coder.load_state_dict(plain.state_dict(), strict=False)
    coder.bn.running_mean.copy_(lesson.mean.cpu())
    coder.bn.running_var.copy_(lesson.variance.cpu())
    copy = EditDenoiser(tokens)
    copy.load_state_dict({name: weight.float().cpu() for name, weight in model.state_dict().items()})
    return Flux2KleinPipeline(
        scheduler=scheduler(),
        vae=coder,
        text_encoder=copy.text,
        tokenizer=tokens,
        transformer=copy.transformer,
        is_distilled=True,
    )


def weights_of(text: str) -> dict[str, float]:
    """How often edits come: `add=0.86,bigger=0.3`."""
    found = {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    if unknown := sorted(set(found) - set(WEIGHTS)):
        raise argparse.ArgumentTypeError(f"no edit is called {unknown[0]}; known: {', '.join(WEIGHTS)}")
    if not all(0 <= weight < math.inf for weight in found.values()):
        raise argparse.ArgumentTypeError("weights are numbers from 0 on")
    return found


def listed(weights: Mapping[str, float]) -> str:
    return ",".join(f"{name}={weight}" for name, weight in weights.items())


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--vae", type=Path, required=True)
    command.add_argument(
        "--weights", type=weights_of, default={}, metavar="EDIT=WEIGHT,...", help=f"instead of {listed(WEIGHTS)}"
    )
    options = command.parse_args()
    torch.manual_seed(options.seed)
    tokens = tokenizer(load_nouns(), EDIT_TOKENS)
    model = EditDenoiser(tokens)
    if options.begin_with:
        load_parts(options.begin_with, {"text_encoder": model.text, "transformer": model.transformer})
    course = Course(model, options, rate=8e-4)
    torch.manual_seed(options.seed + 1000 * course.rank + course.step)
    atlas = Atlas(options.sprites, options.photos, course.device)
    photos = [number for number, name in enumerate(atlas.photo_names) if name not in HELD_OUT]
    lesson = EditLesson(model, atlas, options.vae, not options.no_compile)
    usual = EditDrawer(tokens, options.batch, photos)
    lesson.measure([usual(77 + number, number) for number in range(2)])
    drawer = EditDrawer(tokens, options.batch, photos, options.weights)
    seed = options.seed + course.rank + 100 * course.step
    batches = feed(drawer, seed, options.feeders)
    course.run(lambda step: lesson.loss(next(batches)))
    course.use_mean()
    if course.rank == 0:
        size = write_folder(pipeline(model, lesson, options.vae, tokens), options.out)
        course.say({"folder": str(options.out), "bytes": size})


if __name__ == "__main__":
    main()
