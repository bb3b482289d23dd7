"""Adapters merged into the weights of a kept base: no cost in a forward, no recompile, no drift.

A switch computes base + Σ strength · up · down in float32 for each module and writes it into the parameter that is there.
Compiled code sees the same tensors with other numbers. Back to the base means a copy, so nothing adds up over switches.

diffusers' hotswap (`enable_lora_hotswap`) avoids the recompile as well, but it swaps numbers in PEFT layers: their cost
in every forward stays, ranks above its slot and further modules are refused, and strengths are reset.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Lock
from typing import Any

from imagemill.records import Lora
from imagemill.runners.adapters import Adapters, Applied
from imagemill.runners.ahead import Ahead
from imagemill.runners.kept_base import KeptBase, merge, write
from imagemill.runners.lora_factors import Factors, component_name, factors, mergeable_shapes, uploaded
from imagemill.runners.lora_file import adapter_name
from imagemill.runners.shelf import Shelf

log = logging.getLogger(__name__)

Wanted = Sequence[tuple[str, float, Lora]]


class Merged:
    """The adapters of one pipeline, merged into the weights of its denoising model. Used as `Adapters` is.

    Made for a loaded pipeline without adapters. `max_files` and `max_bytes` bound the factors that stay on the device. A
    set with an adapter that cannot be merged is put on as PEFT layers, all of it, and computes as `Adapters` does.
    """

    def __init__(self, pipe: Any, *, on_device: bool = True, max_files: int = 32, max_bytes: int = 2 * 2**30) -> None:
        self.switches = 0
        self._prefix = component_name(pipe)
        self._pipeline = type(pipe)
        self._shapes = mergeable_shapes(model_of(pipe))
        self._layers = Adapters(max_files=max_files)
        self._base = KeptBase(on_device)
        self._factors: Shelf[Factors] = Shelf(max_files, max_bytes)
        self._ahead = Ahead(self._make, max_files)
        self._lock = Lock()
        self._uploads = 0
        self._device = next((one.device for one in parameters(pipe)), None)
        self._stream: Any = None
        self._changed: set[str] = set()
        self._applied: Applied = ()
        self._layered = False

    @property
    def applied(self) -> Applied:
        """What is switched on now."""
        return self._applied

    @property
    def reads(self) -> int:
        """How many files were read."""
        return self._layers.reads

    @property
    def loads(self) -> int:
        """How many adapters were brought to the model's device."""
        return self._uploads + self._layers.loads

    @property
    def evictions(self) -> int:
        """How many adapters were dropped from the device for want of room."""
        return self._factors.evictions + self._layers.evictions

    @property
    def base_bytes(self) -> int:
        """What the copies of base weights take on the device now."""
        return self._base.bytes

    def hold(self, pipe: Any) -> None:
        """Keep the weights before they are quantised: an adapter merged into rounded weights would be rounded away.

        Keeps the tensors themselves, so it costs what quantising would have freed. Without it, or when the base is to be
        in host memory, adapters on quantised modules are PEFT layers.
        """
        if self._base.on_device:
            self._base.hold(model_of(pipe), self._shapes)

    def apply(self, pipe: Any, loras: Sequence[Lora]) -> bool:
        """Switch exactly these adapters on, as `Adapters.apply` does. On CUDA the host does not wait for the device."""
        import torch

        with torch.no_grad():
            try:
                wanted = self._layers.wanted(loras)
                applied = tuple((name, strength) for name, strength, _ in wanted)
                if applied == self._applied:
                    return False
                self._switch(pipe, wanted, loras)
            except BaseException:
                self._off(pipe)
                raise
        self._applied = applied
        self.switches += 1
        return True

    def prefetch(self, loras: Sequence[Lora]) -> None:
        """Parse the files of coming tasks and upload them on a thread, the copies on a stream of their own; returns at once.

        Their faults are raised by the `apply` that they meet.
        """
        for lora in loras:
            if lora.strength and lora.digest and self._factors.get(adapter_name(lora.digest)) is None:
                self._ahead.start(lora)

    def clear(self, pipe: Any) -> None:
        """Give the pipeline its own weights back, forget all files and copies, and end the thread that works ahead."""
        import torch

        self.close()
        with torch.no_grad():
            self._off(pipe)
        self._base.clear()

    def close(self) -> None:
        """Forget the files and end the thread that works ahead, without touching the pipeline."""
        self._ahead.stop()
        self._factors.clear()
        self._layers.close()

    def _switch(self, pipe: Any, wanted: Wanted, loras: Sequence[Lora]) -> None:
        found = [self._factors.get(name) or self._ahead.take(lora) for name, _, lora in wanted]
        if not all(self._mergeable(pipe, one) for one in found):
            self._restore(pipe, set())
            self._layered = True
            self._layers.apply(pipe, loras)
            return
        self._take_layers_off(pipe)
        terms: dict[str, list[Any]] = {}
        for (_, strength, _), one in zip(wanted, found, strict=True):
            one.expect()
            for part in one.parts:
                terms.setdefault(part.module, []).append((part.down, part.up, strength))
        self._restore(pipe, set(terms))
        model = model_of(pipe)
        for name, sums in terms.items():
            module = model.get_submodule(name)
            base = self._base.of(name, module)
            self._changed.add(name)
            write(module, merge(base, sums, module.weight.device))

    def _make(self, lora: Lora) -> Factors:
        """On the thread that works ahead, or on the caller's."""
        file = self._layers.parse(lora)
        if there := self._factors.get(file.name):
            return there
        made = factors(file, self._pipeline, self._prefix, self._shapes)
        if made.reason:
            log.info("%s is put on as layers, not merged: %s", lora.path, made.reason)
        else:
            if self._device is not None and self._device.type == "cuda":
                made = uploaded(made, self._side_stream())
            with self._lock:
                self._uploads += 1
        self._factors.put(file.name, made, made.bytes)
        return made

    def _side_stream(self) -> Any:
        import torch

        with self._lock:
            self._stream = self._stream or torch.cuda.Stream(self._device)
            return self._stream

    def _mergeable(self, pipe: Any, one: Factors) -> bool:
        model = model_of(pipe)
        known = (self._base.has(part.module, model.get_submodule(part.module)) for part in one.parts)
        return not one.reason and all(known)

    def _restore(self, pipe: Any, but: set[str]) -> None:
        """Give all modules but these their base back."""
        if not self._changed - but:
            return
        self._take_layers_off(pipe)
        model = model_of(pipe)
        for name in sorted(self._changed - but):
            self._base.restore(name, model.get_submodule(name))
            self._changed.discard(name)

    def _take_layers_off(self, pipe: Any) -> None:
        """Without PEFT's wrappers, modules have their names and forwards their cost again."""
        if self._layered:
            self._layers.take_off(pipe)
            self._layered = False

    def _off(self, pipe: Any) -> None:
        self._applied = ()
        self._take_layers_off(pipe)
        self._restore(pipe, set())


def model_of(pipe: Any) -> Any:
    """The pipeline's denoising model itself, also when it is compiled as a whole; `None` where there is none."""
    model = getattr(pipe, component_name(pipe), None)
    return getattr(model, "_orig_mod", model)


def parameters(pipe: Any) -> Any:
    """The parameters of the denoising model."""
    model = model_of(pipe)
    return () if model is None else model.parameters()


def mergeable_bytes(pipe: Any) -> int:
    """Bytes of all weights that adapters can be merged into: the most that is ever copied."""
    model = model_of(pipe)
    return sum(int(model.get_submodule(name).weight.nbytes) for name in mergeable_shapes(model))


def device_free(device: str) -> int:
    """Bytes that can still be allocated on a CUDA device; 0 for any other."""
    if not device.startswith("cuda"):
        return 0
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)
