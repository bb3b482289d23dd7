"""Reference tokens: the encoded pictures to edit, which a transformer sees behind the tokens of the picture it makes.

diffusers' pipelines give the same references to every prompt of a call, or take one prompt only. Here each picture of a
batch has its own, while the loop over the steps stays that of the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Extend = Callable[[dict[str, Any]], dict[str, Any]]
"""From the keyword arguments of a call to those that speak of the references too: their places, their shapes."""


@contextmanager
def attached(transformer: Any, tokens: torch.Tensor | None, extend: Extend) -> Iterator[None]:
    """Inside the block every call of the transformer gets `tokens` (batch, n, channels) behind its `hidden_states`.

    What comes out is cut to the call's own tokens. With `tokens` None nothing changes.
    """
    if tokens is None:
        yield
        return
    import torch

    def before(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        own = named["hidden_states"]
        return given, {**extend(named), "hidden_states": torch.cat([own, tokens.to(own)], dim=1)}

    def after(module: Any, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> tuple[Any, ...]:
        own = named["hidden_states"].shape[1] - tokens.shape[1]
        return (output[0][:, :own], *output[1:])

    handles = (
        transformer.register_forward_pre_hook(before, with_kwargs=True),
        transformer.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
