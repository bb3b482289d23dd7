"""Trains the judge of nouns: `python training/classifier.py --out tests/data/noun_classifier.safetensors`.

A small convolutional network that names the one thing in a 128x128 picture. It sees the atlas in the scenes that the
models learn from, a little blurred and noisy, never a generated picture.
"""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from course import Batch, Course, feed, parser
from nouns import Noun, load_nouns
from render import Atlas, numbers_of, on
from scenes import Captioner, Scene

WIDTHS = (32, 64, 112, 160)


class Classifier(nn.Module):
    """Pictures (batch, 3, 128, 128) in 0 to 1 to one logit a noun."""

    def __init__(self, nouns: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 5, 2, 2)]
        for before, after in pairwise(WIDTHS):
            layers += [nn.GroupNorm(8, before), nn.SiLU(), nn.Conv2d(before, after, 3, 2, 1), Residual(after)]
        layers += [Residual(WIDTHS[-1]), nn.GroupNorm(8, WIDTHS[-1]), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * WIDTHS[-1], nouns)

    def forward(self, picture: Tensor) -> Tensor:
        features = self.body(picture * 2 - 1)
        logits: Tensor = self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))
        return logits


class Residual(nn.Module):
    """Norm, activation, convolution, added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = features + self.body(features)
        return out


def load_classifier(path: Path) -> Classifier:
    """The trained classifier on the CPU, in float32."""
    weights = {name: weight.float() for name, weight in load_file(path).items()}
    model = Classifier(len(weights["head.bias"]))
    model.load_state_dict(weights)
    return model.eval()


def single_scenes(nouns: list[Noun], count: int, dice: random.Random) -> list[Scene]:
    """Scenes with one thing each, as captions of single things have them."""
    captioner = Captioner(nouns, dice)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = captioner.scene()
        if len(scene.things) == 1:
            scenes.append(scene)
    return scenes


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.manual_seed(options.seed)
    nouns = load_nouns()
    model = Classifier(len(nouns))
    course = Course(model, options, rate=2e-3, warmup=100)
    torch.manual_seed(options.seed + 1000 * course.rank)
    atlas = Atlas(options.sprites, device=course.device)

    def draw(seed: int, turn: int) -> Batch:
        return numbers_of(single_scenes(nouns, options.batch, random.Random(seed)))

    batches = feed(draw, options.seed + course.rank + 5000, options.feeders)
    model.to(memory_format=torch.channels_last)
    forward = model if options.no_compile else torch.compile(model, dynamic=False)

    def loss_of(step: int) -> tuple[Tensor, int]:
        numbers = on(course.device, next(batches))
        with torch.no_grad():
            picture = worn(atlas.scenes(numbers, 128, 128))
        with torch.autocast(course.device.type, torch.bfloat16, enabled=course.device.type == "cuda"):
            logits = forward(picture.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), numbers["noun"][:, 0], label_smoothing=0.05), len(picture)

    course.run(loss_of)
    course.use_mean()
    if course.rank == 0:
        weights = {name: weight.half().contiguous().cpu() for name, weight in model.state_dict().items()}
        save_file(weights, str(options.out))
        right = [accuracy(model, atlas, draw(10**9 + number, 0)) for number in range(8)]
        course.say(
            {
                "held_out_accuracy": round(float(np.mean(right)), 4),
                "parameters": sum(p.numel() for p in model.parameters()),
            }
        )


def worn(picture: Tensor) -> Tensor:
    """Half the pictures blurred a little, all with faint noise: what an autoencoder does to them."""
    blurred = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(picture), 1, 1, 1, device=picture.device)
    share = torch.where(share < 0.5, 0.0, share)
    noise = torch.randn_like(picture) * torch.rand(len(picture), 1, 1, 1, device=picture.device) * 0.03
    return picture + (blurred - picture) * share + noise


@torch.no_grad()
def accuracy(model: Classifier, atlas: Atlas, batch: Batch) -> float:
    """Share of scenes named right."""
    numbers = on(atlas.device, batch)
    named = model(atlas.scenes(numbers, 128, 128)).argmax(1)
    return float((named == numbers["noun"][:, 0]).float().mean())


if __name__ == "__main__":
    main()
