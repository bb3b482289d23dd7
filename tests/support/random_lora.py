"""Adapters with random weights that fit the embedded model: they change its pictures, and mean nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from imagemill.models import ASSETS

WEIGHTS = ASSETS / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors"
TARGETS = (*(f"attention.to_{name}" for name in "qkv"), "attention.to_out.0", "feed_forward.w1", "feed_forward.w2")


def make_lora(path: Path, seed: int = 0, rank: int = 4, gain: float = 0.1, prefix: str = "transformer.") -> Path:
    """Write an adapter for the attention and feed-forward of the first two main layers, float32.

    `gain` is the standard deviation of both factors; `prefix` stands before every key (diffusers wants `transformer.`).
    """
    dice = torch.Generator().manual_seed(seed)
    weights = {}
    with safe_open(WEIGHTS, "pt") as model:
        for name in (f"layers.{layer}.{target}" for layer in range(2) for target in TARGETS):
            outputs, inputs = model.get_slice(f"{name}.weight").get_shape()
            weights[f"{prefix}{name}.lora_A.weight"] = gain * torch.randn(rank, inputs, generator=dice)
            weights[f"{prefix}{name}.lora_B.weight"] = gain * torch.randn(outputs, rank, generator=dice)
    save_file(weights, str(path), metadata={"format": "pt"})
    return path
