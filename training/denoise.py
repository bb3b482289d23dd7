"""What both denoisers train with: the shipped autoencoder, noise levels, rotary positions on real numbers, writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from architecture import DIM, HEADS, autoencoder

SHIFT = 3.0


def load_autoencoder(path: Path, device: torch.device) -> tuple[Any, float, float]:
    """The trained autoencoder, frozen, with its shift and scale."""
    vae = autoencoder()
    weights = {name: weight.float() for name, weight in load_file(path).items()}
    means, variances = weights.pop("bn.running_mean", None), weights.pop("bn.running_var", None)
    weights.pop("bn.num_batches_tracked", None)
    vae.load_state_dict(weights)
    config = path.with_name("config.json")
    facts = json.loads(config.read_text("utf-8")) if config.exists() else {}
    if means is not None and variances is not None:  # the one of a Flux 2 pipeline, which keeps statistics instead
        spread = variances.mean() + means.var(correction=0)
        facts = {"shift_factor": float(means.mean()), "scaling_factor": float(1 / spread.sqrt())}
    elif "scaling_factor" not in facts:
        with safe_open(path, "pt") as file:
            facts = file.metadata()
    vae.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return vae, float(facts["shift_factor"]), float(facts["scaling_factor"])


def noise_levels(count: int, device: torch.device) -> Tensor:
    """Sigmas in 0 to 1 (1 is all noise): a mix that spends most on the high levels, where the shapes are decided."""
    kind = torch.rand(count, device=device)
    normal = torch.randn(count, device=device)
    middle = torch.sigmoid(0.5 + 1.1 * normal)
    high = torch.sigmoid(1.0 + 1.1 * normal)
    flat = torch.rand(count, device=device)
    shifted = SHIFT * flat / (1 + (SHIFT - 1) * flat)
    return torch.where(kind < 0.35, middle, torch.where(kind < 0.65, high, shifted)).clamp(1e-4, 1.0)


class RealRotary:
    """Z-Image's attention with rotary positions as cosine and sine (..., 2): complex numbers do not compile well."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        heads = (attn.heads, DIM // HEADS)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, heads))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, heads))
        value = attn.to_v(hidden_states).unflatten(-1, heads)
        assert freqs_cis is not None
        query, key = rotate(query, freqs_cis).to(value), rotate(key, freqs_cis).to(value)
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out


def rotate(vectors: Tensor, angles: Tensor) -> Tensor:
    """Turn neighbouring pairs of (batch, tokens, heads, width) by the angles (batch or 1, tokens, width/2, 2)."""
    cosine, sine = angles[..., 0].unsqueeze(2), angles[..., 1].unsqueeze(2)
    even, odd = vectors.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2)


def load_parts(folder: Path, parts: dict[str, Any]) -> None:
    """Fill modules with the trained weights of a pipeline's folder: `{"transformer": module, "text_encoder": module}`."""
    for name, part in parts.items():
        (file,) = (folder / name).glob("*.safetensors")
        weights = {key: weight.float() for key, weight in load_file(file).items()}
        missing, unexpected = part.load_state_dict(weights, strict=False)
        tied = {"lm_head.weight"}  # not stored: it is the word embedding
        if set(missing) - tied or unexpected:
            raise ValueError(f"{file} is of another architecture: {[*missing, *unexpected][:3]}")


def write_folder(pipe: Any, folder: Path) -> int:
    """Save a pipeline in float16, files with mode 0644; gives the bytes."""
    pipe.to(torch.float16)
    pipe.save_pretrained(str(folder), safe_serialization=True)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
