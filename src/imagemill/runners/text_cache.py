"""Embeddings of prompts that were encoded already, kept on the device with their pipeline.

A prompt comes again under other seeds, sizes and adapters, and the negative prompt is mostly the same for a whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from imagemill.runners.shelf import Shelf

if TYPE_CHECKING:
    import torch

MAX_BYTES = 256 * 2**20
"""Of device memory for the embeddings of one pipeline: about 500 prompts of 100 tokens, 2560 wide, in bfloat16."""

MAX_TEXTS = 4096

_shelves: WeakKeyDictionary[Any, Shelf[torch.Tensor]] = WeakKeyDictionary()


def shelf_of(pipe: Any) -> Shelf[torch.Tensor]:
    """The embeddings kept for this pipeline, by `key`; they go when the pipeline goes."""
    if pipe not in _shelves:
        _shelves[pipe] = Shelf(MAX_TEXTS, MAX_BYTES)
    return _shelves[pipe]


def key(prompt: str) -> str:
    """The name under which a prompt's embedding is kept."""
    return sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def embedded(
    pipe: Any, prompts: Sequence[str], device: torch.device, encode: Callable[[list[str]], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """One embedding a prompt, on the device; `encode` gets those that are not kept, each once, in their order.

    What is kept must never be written to. It may be dropped from the shelf while the batch still needs it, so the batch
    holds on to what it was given.
    """
    shelf = shelf_of(pipe)
    found: dict[str, torch.Tensor] = {}
    for prompt in prompts:
        kept = shelf.get(key(prompt))
        if kept is not None and kept.device.type == device.type:
            found[prompt] = kept
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
    if missing:
        for prompt, made in zip(missing, encode(missing), strict=True):
            shelf.put(key(prompt), made, made.nbytes)
            found[prompt] = made
    return [found[prompt] for prompt in prompts]
