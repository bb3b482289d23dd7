"""Adapters (LoRA) on a pipeline: kept parsed, put on by name, switched only when the set or a strength changes.

`Adapters` puts them on as PEFT layers; `merged.Merged` adds them to weights whose base it keeps; `choose` takes one of
them. diffusers' own fusing is not used: subtracting an adapter again does not give the base weights back bit by bit.
Files reach the pipeline as tensors, never as a path, because diffusers takes a path that does not exist for a name on the
network.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadTask, OutOfMemory, WorkerGone, classify
from imagemill.records import Lora
from imagemill.runners import lora_file
from imagemill.runners.adapter_cost import NEIGHBOURS_VARIABLE, Mode, adapter_mode
from imagemill.runners.ahead import Ahead
from imagemill.runners.lora_file import LoraFile
from imagemill.runners.shelf import Shelf

if TYPE_CHECKING:
    from torch.nn import Module

    from imagemill.runners.merged import Merged

log = logging.getLogger(__name__)

Applied = tuple[tuple[str, float], ...]
"""Adapters by name with their strengths, in the order of the task's list."""


def choose(device: str, pipe: Any, force: Mode | None = None) -> Adapters | Merged:
    """The adapters for this loaded pipeline, without any on it yet; to be called once, before its weights are quantised.

    The device, the model, the free memory and how many workers share it decide, or `force` does; `adapter_cost` says why.
    """
    from imagemill.devices import host_memory
    from imagemill.runners.merged import Merged, device_free, mergeable_bytes

    weights = mergeable_bytes(pipe)
    neighbours = int(os.environ.get(NEIGHBOURS_VARIABLE, "1"))
    mode = adapter_mode(device, weights, device_free(device), host_memory()[0], neighbours=neighbours, force=force)
    log.info("adapters are put on as %s (%.1f GiB of weights)", mode.replace("_", " "), weights / 2**30)
    return Adapters() if mode == "layers" else Merged(pipe, on_device=mode == "merged")


class Adapters:
    """The adapters of one pipeline, as PEFT layers beside the base layers.

    Two least-recently-used sets, each bounded by `max_files` and `max_bytes`: files parsed in host memory, and adapters
    loaded on the model. What the current task needs is never dropped, whatever the bounds. `reads`, `loads`,
    `switches` and `evictions` count what happened since the start.
    """

    def __init__(self, max_files: int = 8, max_bytes: int = 4 * 2**30) -> None:
        self.max_files = max_files
        self.max_bytes = max_bytes
        self.reads = self.loads = self.switches = self.evictions = 0
        self._lock = Lock()
        self._parsed: Shelf[LoraFile] = Shelf(max_files, max_bytes)
        self._ahead = Ahead(self._read, max_files)
        self._loaded: OrderedDict[str, int] = OrderedDict()
        self._applied: Applied = ()

    @property
    def applied(self) -> Applied:
        """What is switched on now."""
        return self._applied

    def apply(self, pipe: Any, loras: Sequence[Lora]) -> bool:
        """Switch exactly these adapters on, each at its strength; says whether anything had to change.

        Strength 0 is left out; a file named twice counts with the sum of its strengths. Raises `BadTask` when a file is
        refused or does not fit the model; the pipeline is then without adapters.
        """
        try:
            wanted = self.wanted(loras)
            if tuple((name, strength) for name, strength, _ in wanted) == self._applied:
                return False
            self._switch(pipe, wanted)
        except BaseException:
            self._off(pipe)
            raise
        return True

    def prefetch(self, loras: Sequence[Lora]) -> None:
        """Parse the files of coming tasks on a thread; returns at once. Their faults are raised by the `apply` they meet."""
        for lora in loras:
            if lora.strength and lora.digest and self._parsed.get(lora.digest) is None:
                self._ahead.start(lora)

    def hold(self, pipe: Any) -> None:
        """Before the weights are quantised: nothing to keep, layers leave them as they are."""

    def clear(self, pipe: Any) -> None:
        """Take every adapter off the pipeline, forget the parsed files and end the thread that parses ahead."""
        self.close()
        self.take_off(pipe)

    def close(self) -> None:
        """Forget the parsed files and end the thread that parses ahead, without touching the pipeline."""
        self._ahead.stop()
        self._parsed.clear()

    def take_off(self, pipe: Any) -> None:
        """Take every adapter off the pipeline, and the layers that held them: its modules are then those it was loaded with."""
        self._applied = ()
        self._loaded.clear()
        if any(True for _ in adapter_layers(pipe)):
            pipe.unload_lora_weights()

    def wanted(self, loras: Sequence[Lora]) -> list[tuple[str, float, Lora]]:
        """The adapters to switch on: name, strength, and a file of that content. Raises `BadTask` as `apply` does."""
        merged: dict[str, tuple[float, Lora]] = {}
        for lora in loras:
            if not lora.strength:
                continue
            name = lora_file.adapter_name(lora.digest or self.parse(lora).digest)
            merged[name] = (merged.get(name, (0.0, lora))[0] + lora.strength, lora)
        return [(name, strength, lora) for name, (strength, lora) in merged.items() if strength]

    def _switch(self, pipe: Any, wanted: Sequence[tuple[str, float, Lora]]) -> None:
        if not wanted:
            self._off(pipe)
            self.switches += 1
            return
        for name, _, lora in wanted:
            if name not in self._loaded:
                self._load(pipe, self.parse(lora))
            self._loaded.move_to_end(name)
        names = [name for name, _, _ in wanted]
        self._evict(pipe, keep=names)
        pipe.set_adapters(names, [strength for _, strength, _ in wanted])
        enable(pipe, True)
        self._applied = tuple((name, strength) for name, strength, _ in wanted)
        self.switches += 1

    def _off(self, pipe: Any) -> None:
        """With its adapter layers disabled, the model computes with its base layers alone."""
        if self._loaded:
            enable(pipe, False)
        self._applied = ()

    def parse(self, lora: Lora) -> LoraFile:
        """The file, parsed and checked: from the shelf, from the thread that is at it, or now. Any thread may ask."""
        return self._parsed.get(lora.digest) or self._ahead.take(lora)

    def _read(self, lora: Lora) -> LoraFile:
        if there := self._parsed.get(lora.digest):
            return there
        file = lora_file.read(lora)
        with self._lock:
            self.reads += 1
        self._parsed.put(file.digest, file, file.bytes)
        return file

    def _load(self, pipe: Any, file: LoraFile) -> None:
        if not hasattr(pipe, "load_lora_weights"):
            raise BadTask(f"{type(pipe).__name__} takes no LoRA; remove {file.path}")
        self._loaded[file.name] = file.bytes
        try:
            put_on(pipe, file)
        except BaseException:
            self._drop(pipe, file.name)
            raise
        self.loads += 1

    def _evict(self, pipe: Any, keep: Sequence[str]) -> None:
        for name in [name for name in self._loaded if name not in keep]:
            if len(self._loaded) <= self.max_files and sum(self._loaded.values()) <= self.max_bytes:
                return
            self._drop(pipe, name)
            self.evictions += 1

    def _drop(self, pipe: Any, name: str) -> None:
        with quiet_peft():
            pipe.delete_adapters([name])
        del self._loaded[name]


def put_on(pipe: Any, file: LoraFile) -> None:
    """Load the file under its name and check that it landed.

    Raises `BadTask` when the pipeline refuses it (ranks or shapes that do not fit) or no key belongs to this model;
    warns when only some do.
    """
    try:
        expected = modules_in(pipe.lora_state_dict(dict(file.tensors)))
        with quiet_peft():
            pipe.load_lora_weights(dict(file.tensors), adapter_name=file.name)
    except Exception as error:
        known = classify(error)
        if isinstance(known, OutOfMemory | WorkerGone):
            raise
        raise BadTask(f"the LoRA file {file.path} does not fit the model: {known}") from error
    listed = any(file.name in names for names in pipe.get_list_adapters().values())
    check_landed(file, sum(holds(module, file.name) for module in adapter_layers(pipe)) if listed else 0, expected)


def check_landed(file: LoraFile, landed: int, expected: int) -> None:
    """Raises `BadTask` when none of the modules that the file is for is in the model; warns when some are not."""
    if not landed:
        example = next(iter(file.tensors))
        raise BadTask(f"the LoRA file {file.path} is for another model: none of its keys is used, such as {example!r}")
    if landed < expected:
        log.warning("%s: only %d of its %d modules are in this model", file.path, landed, expected)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without peft's warnings about what is meant here: several adapters, of which the active one may be deleted, and layers
    over weights in fp8, into which peft is never asked to merge."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
        yield


def modules_in(converted: Any) -> int:
    """How many modules a state dict, as the pipeline converts it, is for."""
    state = converted[0] if isinstance(converted, tuple) else converted
    return len({key.split(".lora")[0].split(".lokr")[0] for key in state if "lora" in key or "lokr" in key})


def adapter_layers(pipe: Any) -> Iterator[Module]:
    """Every layer of the pipeline's models that can hold adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.nn import Module

    for component in pipe.components.values():
        if isinstance(component, Module):
            yield from (module for module in component.modules() if isinstance(module, BaseTunerLayer))


def holds(layer: Any, name: str) -> bool:
    """True when the layer has weights of this adapter, and they were filled from a file."""
    weights = [
        parameter
        for attribute in layer.adapter_layer_names
        for parameters in [getattr(layer, attribute, {})]
        if name in parameters
        for parameter in getattr(parameters[name], "parameters", lambda item=parameters[name]: [item])()
    ]
    return bool(weights) and not any(weight.is_meta for weight in weights)


def enable(pipe: Any, on: bool) -> None:
    """Switch all adapter layers on or off."""
    layer: Any
    for layer in adapter_layers(pipe):
        layer.enable_adapters(on)
