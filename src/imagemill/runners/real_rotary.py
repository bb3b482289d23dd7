"""Attention with rotary positions as pairs of real numbers: Inductor leaves complex arithmetic uncompiled.

For Z-Image and Qwen-Image. In eager mode on the CPU the results have the same bits at these models' head width of 128. At a
width that is no multiple of the processor's vectors, torch's complex product rounds once less for the pairs that are left
over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Processor:
    """What diffusers asks of every attention processor: `set_attention_backend` finds and sets `_attention_backend`."""

    _parallel_config = None

    def __init__(self, attention_backend: Any = None) -> None:
        self._attention_backend = attention_backend


class RealRotaryProcessor(Processor):
    """Takes the place of diffusers' `ZSingleStreamAttnProcessor`: the same arithmetic in the same order.

    `freqs_cis` are (rows, tokens, half a head, 2) cosines and sines, or complex (rows, tokens, half a head) as diffusers
    hands them. `real_rotary` tells the denoising loop to hand the former.
    """

    real_rotary = True

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


class RealRotaryQwenProcessor(Processor):
    """Takes the place of diffusers' `QwenDoubleStreamAttnProcessor2_0`: the same arithmetic in the same order.

    Text and picture are projected and normalised apart, and attend to each other together, the text in front.
    `image_rotary_emb` are the picture's positions and the text's, each (tokens, half a head, 2) cosines and sines, or
    complex (tokens, half a head) as diffusers hands them.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention of one block over picture and text; `encoder_hidden_states_mask` (rows, text tokens) says which
        text is there. Returns the picture's part and the text's. Raises `ValueError` for a mask over both."""
        import torch
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        if attention_mask is not None:
            raise ValueError("the mask of the text is what this attention takes, not one over text and picture")
        positions, text_positions = image_rotary_emb or (None, None)
        width = attn.inner_dim // attn.heads
        picture = [one(hidden_states).unflatten(-1, (-1, width)) for one in (attn.to_q, attn.to_k, attn.to_v)]
        text = [
            one(encoder_hidden_states).unflatten(-1, (-1, width))
            for one in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        ]
        for stream, norms, turns in (
            (picture, (attn.norm_q, attn.norm_k), positions),
            (text, (attn.norm_added_q, attn.norm_added_k), text_positions),
        ):
            for place, norm in enumerate(norms):
                if norm is not None:
                    stream[place] = norm(stream[place])
                if turns is not None:
                    stream[place] = rotated(stream[place], turns)
        query, key, value = (torch.cat([first, second], dim=1) for first, second in zip(text, picture, strict=True))
        mixed = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=with_pictures(encoder_hidden_states_mask, hidden_states.shape[1]),
            backend=self._attention_backend,
            parallel_config=None,
        )
        tokens = encoder_hidden_states.shape[1]
        of_text, of_picture = mixed.flatten(2, 3).to(query.dtype).split([tokens, mixed.shape[1] - tokens], dim=1)
        output: torch.Tensor = attn.to_out[0](of_picture.contiguous())
        output = attn.to_out[1](output) if len(attn.to_out) > 1 else output
        return output, attn.to_add_out(of_text.contiguous())


def with_pictures(mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """The mask of a text (rows, text tokens) with as many tokens of a picture, all there, behind it: (rows, 1, 1, all)."""
    from torch.nn.functional import pad

    return None if mask is None else pad(mask, (0, tokens), value=True)[:, None, None, :]


def rotated(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Queries or keys (rows, tokens, heads, width), turned pair by pair in float32; `freqs` as the processors take them."""
    import torch

    pairs = (torch.view_as_real(freqs) if freqs.is_complex() else freqs).unsqueeze(-3)
    cosine, sine = pairs.unbind(-1)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    return turned.flatten(3).type_as(x)


def put_on(transformer: Any) -> int:
    """Give every attention that has diffusers' processor of Z-Image or of Qwen-Image the one of its kind here; returns how
    many had. The chosen attention back end is kept. Qwen-Image's positions leave their module as real numbers from then on;
    Z-Image's loop hands them over."""
    from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
    from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

    kinds = {ZSingleStreamAttnProcessor: RealRotaryProcessor, QwenDoubleStreamAttnProcessor2_0: RealRotaryQwenProcessor}
    found = [module for module in transformer.modules() if type(getattr(module, "processor", None)) in kinds]
    for module in found:
        chosen = kinds[type(module.processor)](module.processor._attention_backend)
        module.set_processor(chosen)
    if found and isinstance(chosen, RealRotaryQwenProcessor):
        transformer.pos_embed.register_forward_hook(lambda module, given, made: as_pairs(made))
    return len(found)


def as_pairs(positions: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Complex positions as real numbers, with a last dimension of 2."""
    import torch

    return tuple(torch.view_as_real(one) if one.is_complex() else one for one in positions)
