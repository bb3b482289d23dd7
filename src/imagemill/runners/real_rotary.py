"""Z-Image's attention with rotary positions as pairs of real numbers: Inductor leaves complex arithmetic uncompiled.

In eager mode on the CPU the results have the same bits at the model's head width of 128. At a width that is no multiple of
the processor's vectors, torch's complex product rounds once less for the pairs that are left over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class RealRotaryProcessor:
    """Takes the place of diffusers' `ZSingleStreamAttnProcessor`: the same arithmetic in the same order.

    `freqs_cis` are (rows, tokens, half a head, 2) cosines and sines, or complex (rows, tokens, half a head) as diffusers
    hands them. `real_rotary` tells the denoising loop to hand the former. diffusers' `set_attention_backend` finds and
    sets `_attention_backend`.
    """

    real_rotary = True
    _parallel_config = None

    def __init__(self, attention_backend: Any = None) -> None:
        self._attention_backend = attention_backend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention of one block; `attention_mask` (rows, tokens) says which tokens are there."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if freqs_cis is not None:
            query, key = rotated(query, freqs_cis), rotated(key, freqs_cis)
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        mixed = dispatch_attention_fn(
            query, key, value, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=None
        )
        output: torch.Tensor = attn.to_out[0](mixed.flatten(2, 3).to(query.dtype))
        return attn.to_out[1](output) if len(attn.to_out) > 1 else output


def rotated(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Queries or keys (rows, tokens, heads, width), turned pair by pair in float32."""
    import torch

    pairs = (torch.view_as_real(freqs) if freqs.is_complex() else freqs).unsqueeze(2)
    cosine, sine = pairs.unbind(-1)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    return turned.flatten(3).type_as(x)


def put_on(transformer: Any) -> int:
    """Give every attention that has diffusers' processor of Z-Image this one; returns how many had. The chosen attention
    back end is kept."""
    from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

    found = [
        module
        for module in transformer.modules()
        if type(getattr(module, "processor", None)) is ZSingleStreamAttnProcessor
    ]
    for module in found:
        module.set_processor(RealRotaryProcessor(module.processor._attention_backend))
    return len(found)
