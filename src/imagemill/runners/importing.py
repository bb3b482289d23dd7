"""What a worker imports before it loads: most of the seconds from its start to its first picture.

Python's collector of cycles stands still meanwhile: modules make millions of objects that stay, and looking through them
over and over takes a tenth of the time. Importing the compiler on another thread while the weights load gains nothing: the
two wait for each other at the interpreter's lock.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from imagemill.records import ModelSpec, Span, Tuning
from imagemill.runners import loading
from imagemill.runners.page_cache import read_ahead


def import_for(spec: ModelSpec, device: str = "cpu") -> tuple[Span, ...]:
    """Import the pipeline's class, those of its components and what tuning and saving need. Meanwhile the weights are read
    into the page cache, and a GPU's context is made. Raises `BadModel` as loading does. Returns the parts, for the trace.

    Every worker does all of this; files that one has asked the kernel for cost the others nothing.
    """
    folder = Path(spec.folder)
    spans: list[Span] = []
    index = loading.read_index(folder)
    read_ahead([path for name in loading.components(index) for path in loading.weight_files(folder / name)])
    with collector_paused():
        with part("torch", spans):
            import_module("torch")  # before the other thread asks for it
        hush()
        with ThreadPoolExecutor(1) as side:
            context = side.submit(open_device, device, spans)
            with part("classes", spans):
                loading.choose_family(spec, index["_class_name"])
                for name in loading.components(index):
                    loading.component_class(*index[name])
            with part("tools", spans):
                for module in needed_modules(spec.tuning):
                    import_module(module)
            context.result()
    return tuple(spans)


@contextmanager
def part(name: str, spans: list[Span]) -> Iterator[None]:
    """Adds the block's span, `import NAME`."""
    started = time.monotonic()
    yield
    spans.append(Span(f"import {name}", started, time.monotonic() - started, on_device=False))


_pauses = threading.Lock()
_paused = 0
_was_enabled = True


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's collector of cycles in the block, in all threads; blocks may overlap."""
    global _paused, _was_enabled
    with _pauses:
        if not _paused:
            _was_enabled = gc.isenabled()
            gc.disable()
        _paused += 1
    try:
        yield
    finally:
        with _pauses:
            _paused -= 1
            if not _paused and _was_enabled:
                gc.enable()


@contextmanager
def collector_spared() -> Iterator[None]:
    """In the block the collector does not look through what is there already: the modules, half a second each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def hush() -> None:
    """Without what libraries say of torchao as soon as it is installed: its kernels for other GPUs do not load, and diffusers
    cannot read its checkpoints. fp8 that does not work raises."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)


def needed_modules(tuning: Tuning) -> list[str]:
    """What a worker imports sooner or later beside the model's classes; of the optional ones those that are installed."""
    modules = ["diffusers.models.attention_dispatch", "peft", "PIL.PngImagePlugin"]
    if tuning.compile:
        modules += ["torch._dynamo", "torch._inductor.compile_fx"]
    if tuning.precision == "fp8" and find_spec("torchao"):
        modules.append("torchao.quantization")
    return modules


def open_device(device: str, spans: list[Span]) -> None:
    """Make the context of a GPU, with a product of two small matrices so that its libraries are there too."""
    if device.startswith("cuda"):
        import torch

        with part("device", spans):
            small = torch.ones(16, 16, device=device)
            torch.mm(small, small)
            torch.cuda.synchronize(device)
