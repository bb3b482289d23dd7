"""The weights of a model without adapters, kept so that they come back bit by bit."""

from __future__ import annotations

import logging
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

log = logging.getLogger(__name__)

CHUNK = 2**30
"""Bytes of one block of pinned memory. A power of two: torch's allocator of pinned memory rounds up to one."""

ALIGNMENT = 256
"""Bytes; each tensor in a block begins at a multiple of it."""


class KeptBase:
    """Copies of weights, each made when an adapter first touches its module.

    They lie on the device, or with `on_device` off, or once the device is full, in pinned host memory. The weights of
    quantised modules are those that `hold` has seen before. `bytes` is what the copies on the device take.
    """

    def __init__(self, on_device: bool) -> None:
        self.on_device = on_device
        self.bytes = 0
        self._held: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._pinned = Pinned()

    def hold(self, model: Module, names: Any) -> None:
        """Keep the tensors themselves that are the weights of these modules now, before they are quantised."""
        self._held = {name: model.get_submodule(name).weight.detach() for name in names}

    def has(self, name: str, module: Any) -> bool:
        """True when the base of this module is known, or is what it computes with now."""
        return not quantised(module.weight) or name in self._held

    def of(self, name: str, module: Any) -> Tensor:
        """The base of a module; when it is first asked for, the module must compute with it."""
        if name not in self._kept:
            weight = module.weight.detach()
            self._kept[name] = self._held[name] if quantised(module.weight) else self._copy(weight)
        return self._kept[name]

    def restore(self, name: str, module: Any) -> None:
        """Write the base back."""
        write(module, self._kept[name])

    def clear(self) -> None:
        """Drop the copies; only when every module computes with its base again. What is held stays."""
        self._kept.clear()
        self._pinned = Pinned()
        self.bytes = 0

    def _copy(self, weight: Tensor) -> Tensor:
        import torch

        if not weight.is_cuda:
            return weight.clone(memory_format=torch.contiguous_format)
        if self.on_device:
            try:
                copy = weight.clone(memory_format=torch.contiguous_format)
            except torch.OutOfMemoryError:
                log.warning("no room on the device for a copy of the weights; the rest is kept in host memory")
                self.on_device = False
            else:
                self.bytes += copy.nbytes
                return copy
        return self._pinned.copy(weight)


class Pinned:
    """Pinned host memory in large blocks: single tensors would each be rounded up to a power of two."""

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._used = 0

    def copy(self, weight: Tensor) -> Tensor:
        """A copy of a tensor on the device, made on the current stream; the host does not wait for it."""
        size = -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
        if self._block is None or self._used + size > self._block.nbytes:
            self._block, self._used = self._new(max(CHUNK, size), weight.is_cuda), 0
        place = self._block[self._used : self._used + weight.nbytes].view(weight.dtype).view(weight.shape)
        self._used += size
        place.copy_(weight, non_blocking=True)
        return place

    def _new(self, size: int, pinned: bool) -> Tensor:
        import torch

        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def merge(base: Tensor, terms: list[tuple[Tensor, Tensor, float]], device: torch.device) -> Tensor:
    """base + Σ strength · up · down, computed in float32 on the device: (down, up, strength) are the terms."""
    import torch

    there = base.to(device, non_blocking=True)
    total = there.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    matrix = total.view(base.shape[0], prod(base.shape[1:]))
    for down, up, strength in terms:
        matrix.addmm_(up.to(device, torch.float32), down.to(device, torch.float32), alpha=strength)
    return total


def write(module: Any, weight: Tensor) -> None:
    """Write a weight into the module's own, in place and on the current stream, so that compiled code stays valid."""
    if quantised(module.weight):
        from importlib import import_module

        import_module("imagemill.runners.precision").set_weight(module, weight.to(module.weight.dtype))
    else:
        module.weight.copy_(weight, non_blocking=True)


def quantised(weight: Any) -> bool:
    """True for a weight that torchao keeps in fewer bits."""
    import torch

    kinds = (type(weight), type(getattr(weight, "data", weight)))
    return any(kind not in (torch.Tensor, torch.nn.Parameter) for kind in kinds)
