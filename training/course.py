"""The course of a training: one or several GPUs in step, a rate that warms up and falls, a running mean, state on disk.

Start a script with `torchrun --standalone --nproc-per-node N` to train on N GPUs; each gets its own data, all take the
mean of the gradients. `--minutes` measures the first steps and derives how many fit; the log names that number, and
`--steps` repeats it elsewhere.
"""

from __future__ import annotations

import argparse
import atexit
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

SLOW = ("adaLN_modulation", "t_embedder", "modulation", "time_guidance_embed", "norm_out")
"""Parts that make training diverge at the full rate (measured: adaLN scales of 1e5 after some thousand steps)."""
SLOWER = 0.08
SETTLE = 60
"""Steps that compile and warm up, not counted when the speed is measured over as many again: fewer made it out half as
fast as it was."""

DIVERGED = 4.0
"""A loss (flow matching begins near 2) that no healthy training shows."""

Batch = dict[str, np.ndarray[Any, Any]]


class Course:
    """One training. Parameters are those of `model` that require gradients."""

    def __init__(self, model: nn.Module, options: argparse.Namespace, rate: float, warmup: int = 250) -> None:
        self.model = model
        self.options = options
        self.rate = rate
        self.warmup = warmup
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device()
        model.to(self.device)
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        slow = [weight for name, weight in named if any(part in name for part in SLOW)]
        fast = [weight for name, weight in named if not any(part in name for part in SLOW)]
        self.weights = fast + slow
        self.optimizer = torch.optim.AdamW(
            [{"params": fast, "scale": 1.0}, {"params": slow, "scale": SLOWER}],
            lr=rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )
        self.step = 0
        self.steps = options.steps or 0
        self.samples = 0
        self.losses: list[Tensor] = []
        self.begun = time.monotonic()
        if options.state and Path(options.state).exists():
            self.restore(Path(options.state))
        self.mean = [weight.detach().clone() for weight in self.weights] if self.step == 0 else self.mean
        self.first = self.step
        if self.world > 1:
            for weight in self.weights:
                dist.broadcast(weight.data, 0)

    def run(self, loss_of: Callable[[int], tuple[Tensor, int]]) -> None:
        """Train until the steps are done. `loss_of(step)` gives the loss and the number of samples in it."""
        marks: dict[int, float] = {}
        while not self.steps or self.step < self.first + self.steps:
            done = self.step - self.first
            if done in (SETTLE, 2 * SETTLE):
                torch.cuda.synchronize() if self.device.type == "cuda" else None
                marks[done] = time.monotonic()
            if not self.steps and done == 2 * SETTLE:
                self.choose_steps((marks[2 * SETTLE] - marks[SETTLE]) / SETTLE)
            self.set_rate(done)
            loss, samples = loss_of(self.step)
            loss.backward()  # type: ignore[no-untyped-call]
            self.update(loss)
            self.samples += samples * self.world
            self.losses.append(loss.detach())
            self.step += 1
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # see the README: launched ahead, steps have failed to learn
            if self.step % 100 == 0:
                self.report()
        self.report()
        if self.options.state and self.rank == 0:
            self.save(Path(self.options.state))

    def choose_steps(self, seconds: float) -> None:
        """How many steps the asked minutes hold, as rank 0 finds it."""
        left = self.options.minutes * 60 - (time.monotonic() - self.begun)
        steps = torch.tensor([2 * SETTLE + max(1, int(left / seconds))], device=self.device)
        if self.world > 1:
            dist.broadcast(steps, 0)
        self.steps = int(steps)
        self.say({"steps": self.steps, "seconds_a_step": round(seconds, 4), "gpus": self.world})

    def set_rate(self, done: int) -> None:
        """Linear warm-up, then a cosine down to a fiftieth; while the length is unknown the rate stays up."""
        part = done / self.steps if self.steps else 0.0
        high, low = self.options.rate_from, self.options.rate_to
        # a training in several sittings runs through one cosine: from `high` to `low` of its half turn
        turn = high + (low - high) * part
        factor = 0.02 + 0.98 * (1 + math.cos(math.pi * turn)) / 2
        factor *= min(1.0, (done + 1) / self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor * group["scale"]

    def update(self, loss: Tensor) -> None:
        """Mean of the gradients over the GPUs, clipped at 1; a step without a finite gradient is left out."""
        grads = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in self.weights]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        norm = flat.norm()
        flat *= torch.where(norm.isfinite(), (1 / norm).clamp(max=1.0), 0.0)
        flat = torch.nan_to_num(flat)
        kept = [torch.empty_like(weight) for weight in self.weights]  # in the weights' own memory formats
        pieces = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(kept, [piece.view(grad.shape) for piece, grad in zip(pieces, kept, strict=True)])
        for weight, grad in zip(self.weights, kept, strict=True):
            weight.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(0.999, (self.step + 1) / (self.step + 10), 1 - 1 / max(20, self.step * 0.1 + 20))
        torch._foreach_lerp_(self.mean, [weight.detach() for weight in self.weights], 1 - decay)

    def report(self) -> None:
        loss = torch.stack(self.losses[-100:]).mean()
        if not bool(loss.isfinite()) or (self.step > 500 and float(loss) > DIVERGED):
            sys.exit(f"step {self.step}: the loss is {float(loss):.3g}; lower the rate")
        seconds = time.monotonic() - self.begun
        self.say({
            "step": self.step, "loss": round(float(loss), 5), "rate": self.optimizer.param_groups[0]["lr"],
            "samples": self.samples, "samples_a_second": round(self.samples / seconds), "seconds": round(seconds, 1),
        })  # fmt: skip

    def say(self, facts: dict[str, Any]) -> None:
        if self.rank == 0:
            line = json.dumps({"run": self.options.name, **facts})
            print(line, flush=True)
            if self.options.record:
                with Path(self.options.record).open("a") as record:
                    record.write(line + "\n")

    def use_mean(self) -> None:
        """Put the running mean of the weights into the model: what is shipped."""
        for weight, mean in zip(self.weights, self.mean, strict=True):
            weight.data.copy_(mean)

    def save(self, path: Path) -> None:
        state = {
            "weights": [weight.data for weight in self.weights],
            "mean": self.mean,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "samples": self.samples,
        }
        torch.save(state, path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        for weight, kept in zip(self.weights, state["weights"], strict=True):
            weight.data.copy_(kept)
        self.mean = state["mean"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.samples = state["step"], 0
        self.say({"resumed_at": self.step, "samples_before": state["samples"]})


def device() -> torch.device:
    """This process's GPU, or the CPU; joins the other processes where there are several."""
    rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    where = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=where if cuda else None)
        atexit.register(dist.destroy_process_group)
    return where


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options all trainings share."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sprites", type=Path, default=Path("build/sprites.npz"))
    options.add_argument("--photos", type=Path, default=Path("build/photos.npz"))
    options.add_argument("--out", type=Path, required=True, help="folder or file for the trained weights")
    options.add_argument("--steps", type=int, default=0)
    options.add_argument("--minutes", type=float, default=10.0, help="instead of --steps; measured on the first steps")
    options.add_argument("--batch", type=int, default=512, help="samples a GPU and step")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--state", default="", help="file that a later sitting goes on from")
    options.add_argument("--begin-with", type=Path, default=None, help="folder of a trained pipeline to begin with")
    options.add_argument(
        "--rate-from", type=float, default=0.0, help="where in the rate's half turn this sitting begins"
    )
    options.add_argument("--rate-to", type=float, default=1.0, help="and where it ends")
    options.add_argument("--record", default="", help="file that each report is added to, as JSON lines")
    options.add_argument("--name", default="")
    options.add_argument("--no-compile", action="store_true")
    options.add_argument("--feeders", type=int, default=6, help="processes that draw scenes, a GPU")
    return options


class Feed(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Batches that `draw(dice, step)` makes, each feeder process with its own seed."""

    def __init__(self, draw: Callable[[int, int], Batch], seed: int) -> None:
        self.draw = draw
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        turn = number
        while True:
            # batch `turn` is the same whatever the number of feeders
            yield self.draw(self.seed * 1_000_003 + turn, turn)
            turn += count


def feed(draw: Callable[[int, int], Batch], seed: int, feeders: int) -> Iterator[Batch]:
    """An endless run of batches, drawn ahead by other processes, in order."""
    loader = torch.utils.data.DataLoader(
        Feed(draw, seed), batch_size=None, num_workers=feeders, prefetch_factor=4 if feeders else None, collate_fn=same
    )
    return iter(loader)


def same(batch: Batch) -> Batch:
    return batch
