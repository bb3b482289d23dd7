"""Trains the autoencoder that both embedded models share: `python training/vae.py --out build/vae.safetensors`.

Pictures of every look and crops of photos, 128x128. Loss: L1 + L1 of the gradients + 0.5 MSE + 3e-4 KL (a mean a latent value).
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from architecture import autoencoder
from course import Batch, Course, feed, parser
from edits import Editor
from nouns import load_nouns
from photos import HELD_OUT
from render import Atlas, numbers_of, on
from scenes import Captioner

MIX = (("3d", 6), ("flat", 1), ("pixel-art", 2), ("line-icon", 1))
KL = 3e-4


class Coder(nn.Module):
    """Encode, draw a latent, decode."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = autoencoder()

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = self.vae.encoder(picture).float().chunk(2, 1)
        spread = spread.clamp(-20, 8)
        latent = mean + (0.5 * spread).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        return self.vae.decoder(latent), kl


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.manual_seed(options.seed)
    coder = Coder()
    course = Course(coder, options, rate=1.2e-3, warmup=100)
    torch.manual_seed(options.seed + 1000 * course.rank)
    coder.to(memory_format=torch.channels_last)
    atlas = Atlas(options.sprites, options.photos, course.device)
    nouns = load_nouns()
    photos = [number for number, name in enumerate(atlas.photo_names) if name not in HELD_OUT]
    looks = [look for look, weight in MIX for _ in range(weight)]

    def draw(seed: int, turn: int) -> Batch:
        dice = random.Random(seed)
        if turn % 4 == 3:  # a quarter of the batches: what the editor sees, photos above all
            editor = Editor(nouns, photos, dice)
            edits = [editor.edit(on_photo=True) for _ in range(options.batch)]
            return numbers_of([dice.choice((edit.source, edit.target)) for edit in edits])
        captioner = Captioner(nouns, dice)
        return numbers_of([captioner.scene() for _ in range(options.batch)])

    batches = feed(draw, options.seed + course.rank, options.feeders)
    forward = coder if options.no_compile else torch.compile(coder, dynamic=False)

    def loss_of(step: int) -> tuple[Tensor, int]:
        look = "3d" if step % 4 == 3 else looks[(step // 4 * 3 + step % 4) % len(looks)]
        with torch.no_grad():
            picture = atlas.scenes(on(course.device, next(batches)), 128, 128, look) * 2 - 1
            picture = picture.contiguous(memory_format=torch.channels_last)
        with torch.autocast(course.device.type, torch.bfloat16, enabled=course.device.type == "cuda"):
            made, kl = forward(picture)
        return distance(made.float(), picture) + KL * kl, len(picture)

    course.run(loss_of)
    course.use_mean()
    if course.rank == 0:
        finish(coder, atlas, draw(10**9, 0), draw(10**9 + 1, 3), options.out, course)


def distance(made: Tensor, picture: Tensor) -> Tensor:
    """L1, L1 of the differences between neighbours, and half the MSE."""
    error = made - picture
    edges = (error[:, :, 1:] - error[:, :, :-1]).abs().mean() + (error[:, :, :, 1:] - error[:, :, :, :-1]).abs().mean()
    return error.abs().mean() + edges + 0.5 * F.mse_loss(made, picture)


@torch.no_grad()
def finish(coder: Coder, atlas: Atlas, scenes: Batch, photos: Batch, out: object, course: Course) -> None:
    """Measure, choose shift and scale so that latents have mean 0 and deviation 1, and write."""
    coder.eval().float()
    figures = {}
    latents = []
    for name, batch, look in (
        ("3d", scenes, "3d"), ("pixel-art", scenes, "pixel-art"), ("line-icon", scenes, "line-icon"), ("photo", photos, "3d"),
    ):  # fmt: skip
        picture = (
            atlas.scenes(on(atlas.device, {key: value[:96] for key, value in batch.items()}), 128, 128, look) * 2 - 1
        )
        latent = coder.vae.encoder(picture).chunk(2, 1)[0]
        made = coder.vae.decoder(latent).clamp(-1, 1)
        error = ((made - picture) / 2).square().mean((1, 2, 3))
        figures[name] = round(float(-10 * error.log10().mean()), 2)
        if look == "3d":
            latents.append(latent)
    all_latents = torch.cat(latents)
    shift, scale = float(all_latents.mean()), float(1 / all_latents.std())
    course.say({"psnr": figures, "shift_factor": shift, "scaling_factor": scale})
    weights = {name: weight.half().contiguous().cpu() for name, weight in coder.vae.state_dict().items()}
    save_file(weights, str(out), metadata={"shift_factor": repr(shift), "scaling_factor": repr(scale)})


if __name__ == "__main__":
    main()
