"""Trains `tiny`: `python training/text_to_image.py --vae build/vae.safetensors --out build/tiny`.

Flow matching: x = (1 - sigma) * picture + sigma * noise, time input 1 - sigma, target picture - noise (the pipeline
negates it). Text encoder and transformer learn together. One batch in ten has longer captions, and so runs uncompiled;
one in nine has a wide or a tall frame, whose tokens number the same once padded.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from architecture import scheduler, text_encoder, tokenizer, z_image
from course import Batch, Course, feed, parser
from denoise import RealRotary, load_autoencoder, load_parts, noise_levels, write_folder
from nouns import load_nouns
from render import Atlas, numbers_of, on
from scenes import Captioner

FRAMES = ((128, 128),) * 16 + ((160, 96), (96, 160))
TOKENS = 256
"""Image tokens of every frame, padded as the transformer pads them (to a multiple of 32)."""
SHORT = 32
LONG = (64, 96, 160)


class Denoiser(nn.Module):
    """Text encoder and transformer, for whole batches of one layout: the pipeline's arithmetic without its lists."""

    def __init__(self, tokens: Any) -> None:
        super().__init__()
        self.text = text_encoder(tokens)
        self.transformer = z_image()
        self.faster: dict[nn.Module, Any] = {}
        """Compiled blocks, used for captions of `SHORT` tokens."""

    def real_rotary(self) -> None:
        """Attention that compiles, for training; `angles` then gives cosines and sines."""
        for block in self.blocks():
            block.attention.processor = RealRotary()

    def blocks(self) -> list[Any]:
        """The transformer's blocks, refiners last."""
        return [*self.transformer.layers, *self.transformer.noise_refiner, *self.transformer.context_refiner]

    def compile_blocks(self) -> None:
        """Compile each block alone: slower than the whole at once."""
        self.faster = {block: torch.compile(block, dynamic=False) for block in self.blocks()}

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The layer before the last, as the pipeline reads it: (batch, tokens, width)."""
        hidden = self.text.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        embedded: Tensor = hidden.hidden_states[-2]
        return embedded

    def forward(
        self,
        patches: Tensor,
        empty: Tensor,
        angles: Tensor,
        text: Tensor,
        pad: Tensor,
        text_angles: Tensor,
        time: Tensor,
    ) -> Tensor:
        """Velocity of each patch. `patches` (batch, 256, 32), `empty` (256) marks padding, `text` (batch, tokens,
        width), `pad` (batch, tokens) marks padding, `time` (batch) is 1 - sigma."""
        net, faster = self.transformer, self.faster if text.shape[1] == SHORT else {}
        time = net.t_embedder(time * net.t_scale)
        image = torch.where(empty[None, :, None], net.x_pad_token.to(patches), net.all_x_embedder["2-1"](patches))
        for block in net.noise_refiner:
            image = faster.get(block, block)(image, None, angles, time)
        words = net.cap_embedder(text)
        words = torch.where(pad[:, :, None], net.cap_pad_token.to(words), words)
        for block in net.context_refiner:
            words = faster.get(block, block)(words, None, text_angles)
        both = torch.cat([image, words], 1)
        turns = torch.cat([angles, text_angles], 1)
        for block in net.layers:
            both = faster.get(block, block)(both, None, turns, time)
        velocity: Tensor = net.all_final_layer["2-1"](both, c=time)[:, : patches.shape[1]]
        return velocity


def layout(net: Any, width: int, height: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For a frame in pixels and a padded caption: which image tokens are padding, the angles of the image tokens
    (1, 256, width/2, 2), and those of the caption's (1, tokens, width/2, 2)."""
    rows, columns = height // 8, width // 8
    ids = torch.zeros(TOKENS, 3, dtype=torch.long)
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
    ids[: rows * columns, 0] = tokens + 1
    ids[: rows * columns, 1:] = grid
    empty = torch.arange(TOKENS) >= rows * columns
    words = torch.zeros(tokens, 3, dtype=torch.long)
    words[:, 0] = torch.arange(tokens) + 1
    angles = torch.view_as_real(net.rope_embedder(ids)).to(device)[None]
    return empty.to(device), angles, torch.view_as_real(net.rope_embedder(words)).to(device)[None]


def patchify(latent: Tensor) -> Tensor:
    """(batch, channels, height, width) to (batch, 256, 4 * channels), zeros where a frame has fewer patches."""
    batch, channels, height, width = latent.shape
    patches = latent.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(batch, height * width // 4, 4 * channels)
    return nn.functional.pad(patches, (0, 0, 0, TOKENS - patches.shape[1]))


class Drawer:
    """Draws batches of captions and scenes; made once, then copied into the feeder processes."""

    def __init__(self, tokens: Any, batch: int, loose: float) -> None:
        self.nouns = load_nouns()
        self.tokens = tokens
        self.batch = batch
        self.loose = loose

    def __call__(self, seed: int, turn: int) -> Batch:
        dice = random.Random(seed)
        long = turn % 10 == 9
        width, height = (128, 128) if long else dice.choice(FRAMES)
        count = self.batch // 2 if long else self.batch
        length = dice.choice(LONG) if long else SHORT
        captioner = Captioner(self.nouns, dice, self.loose)
        short_side = min(width, height)
        scenes = [captioner.scene(width / short_side, height / short_side, long) for _ in range(count)]
        texts = self.tokens([scene.caption + "<|im_end|>" for scene in scenes]).input_ids
        texts = [text if len(text) <= length else [*text[: length - 1], text[-1]] for text in texts]
        ids = np.full((count, length), self.tokens.pad_token_id, np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
        lengths = np.array([len(text) for text in texts])
        return numbers_of(scenes) | {"ids": ids, "lengths": lengths, "frame": np.array([width, height])}


class Lesson:
    """One batch to one loss, whatever look the pictures have."""

    def __init__(self, model: Denoiser, atlas: Atlas, vae: Path, compiled: str, look: str = "3d") -> None:
        self.model = model
        self.atlas = atlas
        self.look = look
        self.vae, self.shift, self.scale = load_autoencoder(vae, atlas.device)
        self.encode = torch.compile(self.vae.encoder, dynamic=False) if compiled != "none" else self.vae.encoder
        self.forward = torch.compile(model, dynamic=False) if compiled == "whole" else model
        if compiled == "blocks":
            model.compile_blocks()
        self.layouts: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        device = self.atlas.device
        width, height = (int(side) for side in batch.pop("frame"))
        numbers = on(device, batch)
        ids = numbers.pop("ids")
        lengths = numbers.pop("lengths")
        tokens = ids.shape[1]
        precise = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        picture = self.atlas.scenes(numbers, width, height, self.look) * 2 - 1
        with torch.no_grad(), precise:
            usual = width == height and tokens == SHORT
            encode = self.encode if usual else self.vae.encoder
            moments = encode(picture.contiguous(memory_format=torch.channels_last))
            latent = patchify((moments.float().chunk(2, 1)[0] - self.shift) * self.scale)
        sigma = noise_levels(len(latent), device)
        noise = torch.randn_like(latent)
        mixed = (1 - sigma)[:, None, None] * latent + sigma[:, None, None] * noise
        key = (width, height, tokens)
        if key not in self.layouts:
            self.layouts[key] = layout(self.model.transformer, width, height, tokens, device)
        empty, angles, word_angles = self.layouts[key]
        place = torch.arange(tokens, device=device)[None]
        pad = place >= lengths[:, None]
        with precise:
            text = self.model.embed(ids, (~pad).long())
            forward = self.forward if tokens == SHORT else self.model
            velocity = forward(mixed, empty, angles, text, pad, word_angles, 1 - sigma)
        error = (velocity.float() - (latent - noise)).square().mean(2)
        return error[:, ~empty].mean(), len(latent)


def pipeline(model: Denoiser, vae: Path, tokens: Any) -> Any:
    """A ZImagePipeline of copies of the parts, on the CPU in float32, with diffusers' own attention."""
    from diffusers import ZImagePipeline

    coder, shift, scale = load_autoencoder(vae, torch.device("cpu"))
    coder.register_to_config(shift_factor=shift, scaling_factor=scale)
    copy = Denoiser(tokens)
    copy.load_state_dict({name: weight.float().cpu() for name, weight in model.state_dict().items()})
    return ZImagePipeline(
        scheduler=scheduler(), vae=coder, text_encoder=copy.text.model, tokenizer=tokens, transformer=copy.transformer
    )


def lesson_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every training on a `Drawer`'s scenes."""
    options = parser(description)
    options.add_argument("--compile", choices=("whole", "blocks", "none"), default="whole")
    options.add_argument("--loose", type=float, default=1.0, help="how far place, size and tilt vary, 1 as ever")
    return options


def main() -> None:
    command = lesson_parser(__doc__)
    command.add_argument("--vae", type=Path, required=True)
    options = command.parse_args()
    torch.manual_seed(options.seed)
    tokens = tokenizer(load_nouns())
    model = Denoiser(tokens)
    model.real_rotary()
    if options.begin_with:
        load_parts(options.begin_with, {"text_encoder": model.text.model, "transformer": model.transformer})
    course = Course(model, options, rate=8e-4)
    torch.manual_seed(options.seed + 1000 * course.rank + course.step)
    lesson = Lesson(model, Atlas(options.sprites, device=course.device), options.vae, options.compile)
    seed = options.seed + course.rank + 100 * course.step
    batches = feed(Drawer(tokens, options.batch, options.loose), seed, options.feeders)
    course.run(lambda step: lesson.loss(next(batches)))
    course.use_mean()
    if course.rank == 0:
        size = write_folder(pipeline(model, options.vae, tokens), options.out)
        course.say({"folder": str(options.out), "bytes": size})


if __name__ == "__main__":
    main()
