"""Attention of Qwen's vision models over windows: those of one length in one call, not each in its own.

Without flash-attention transformers calls `scaled_dot_product_attention` for every window of every picture in every layer:
a picture of 1024x1024 has 100 windows in Qwen2.5-VL, so that a batch costs the host many thousand calls.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "imagemill_flash_windows"
"""transformers hands all windows over at once to what has `flash` in its name."""

KEPT = 4
"""Plans that are kept: the layers of a model take turns between windows and whole pictures."""

log = logging.getLogger(__name__)


def join_windows(model: Any) -> int:
    """Have the vision part of the model attend so, where it is one of Qwen's and uses torch's attention; how many layers do.

    The rest of the model stays as it is.
    """
    from transformers import AttentionInterface

    parts = [part for part in model.modules() if type(part).__name__.endswith("VisionAttention")]
    parts = [part for part in parts if getattr(getattr(part, "config", None), "_attn_implementation", "") == "sdpa"]
    if not parts or not all(hasattr(part, "qkv") for part in parts):
        return 0
    AttentionInterface.register(NAME, Windows())
    for part in parts:
        part.config._attn_implementation = NAME
    log.debug("%d layers attend to windows of one length together", len(parts))
    return len(parts)


class Windows:
    """An attention function of transformers. Keeps the plans of the last lengths that it met."""

    def __init__(self) -> None:
        self._plans: list[tuple[torch.Tensor, list[tuple[int, torch.Tensor | None]]]] = []

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Query, key and value (1, heads, tokens, width); the result is (1, tokens, heads, width).

        `cu_seq_lens_q` is where windows begin and end; without it there is one. Each token sees those of its window.
        """
        import torch

        whole = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        plan = [(query.shape[2], None)] if cu_seq_lens_q is None else self._plan(cu_seq_lens_q)
        out = torch.empty_like(whole[2], memory_format=torch.contiguous_format)
        for length, rows in plan:
            parts = [
                (tensor if rows is None else tensor.index_select(0, rows)).unflatten(0, (-1, length)).transpose(1, 2)
                for tensor in whole
            ]
            seen = torch.nn.functional.scaled_dot_product_attention(*parts, scale=scaling).transpose(1, 2).flatten(0, 1)
            if rows is None:
                return seen.unsqueeze(0), None
            out.index_copy_(0, rows, seen)
        return out.unsqueeze(0), None

    def _plan(self, bounds: torch.Tensor) -> list[tuple[int, torch.Tensor | None]]:
        """Each length with the tokens that stand in windows of it; None for all of them."""
        for known, plan in self._plans:
            if known is bounds:
                return plan
        plan = plan_of(bounds)
        self._plans = [*self._plans[1 - KEPT :], (bounds, plan)]
        return plan


def plan_of(bounds: torch.Tensor) -> list[tuple[int, torch.Tensor | None]]:
    """Reads the bounds, which waits for the device: once for all layers."""
    import torch

    there = bounds.cpu().long()
    starts, lengths = there[:-1], there.diff()
    found = [length for length in lengths.unique().tolist() if length]
    if len(found) == 1:
        return [(found[0], None)]
    plan: list[tuple[int, torch.Tensor | None]] = []
    for length in found:
        rows = starts[lengths == length][:, None] + torch.arange(length)
        plan.append((length, rows.flatten().to(bounds.device)))
    return plan
