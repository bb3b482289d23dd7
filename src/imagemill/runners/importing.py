"""What a worker imports: most of the seconds from its start to its first picture.

What loading needs comes first. What only compiling needs is imported on a thread of its own while the weights load, since
their copying leaves the interpreter free. Python's collector of cycles stands still meanwhile: modules make millions of
objects that stay, and looking through them over and over takes a tenth of the time.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from imagemill.records import ModelSpec, Span, Tuning
from imagemill.runners import loading
from imagemill.runners.page_cache import read_ahead

COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")


class Imports:
    """The imports of a worker that are done, and those that go on beside loading."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._rest: Future[None] | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the block's span, `import NAME`."""
        started = time.monotonic()
        yield
        self._spans.append(Span(f"import {name}", started, time.monotonic() - started, on_device=False))

    def go_on(self, name: str, modules: tuple[str, ...]) -> None:
        """Import these on a thread of their own."""
        side = ThreadPoolExecutor(1, thread_name_prefix="import")
        self._rest = side.submit(self._import, name, modules)
        side.shutdown(wait=False)

    def _import(self, name: str, modules: tuple[str, ...]) -> None:
        with self.part(name), collector_paused():
            for module in modules:
                import_module(module)

    def finish(self) -> tuple[Span, ...]:
        """Wait for what goes on. Raises what an import raised. Returns all parts, for the trace."""
        if self._rest is not None:
            self._rest.result()
        return tuple(self._spans)


def import_for(spec: ModelSpec, device: str = "cpu") -> Imports:
    """Import the pipeline's class, those of its components and what tuning and saving need. Meanwhile the weights are read
    into the page cache, and a GPU's context is made. Raises `BadModel` as loading does.

    Every worker does all of this; files that one has asked the kernel for cost the others nothing.
    """
    folder, imports = Path(spec.folder), Imports()
    index = loading.read_index(folder)
    read_ahead([path for name in loading.components(index) for path in loading.weight_files(folder / name)])
    with collector_paused():
        with imports.part("torch"):
            import_module("torch")  # before the other thread asks for it
        hush()
        with ThreadPoolExecutor(1) as side:
            context = side.submit(open_device, device)
            with imports.part("classes"):
                loading.choose_family(spec, index["_class_name"])
                for name in loading.components(index):
                    loading.component_class(*index[name])
                for module in needed_modules(spec.tuning):
                    import_module(module)
            context.result()
    if spec.tuning.compile:
        # not before: two threads that import modules of one circle may see them half done
        imports.go_on("compiler", COMPILER)
    return imports


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


def hush() -> None:
    """Without what libraries say of torchao as soon as it is installed: its kernels for other GPUs do not load, and diffusers
    cannot read its checkpoints. fp8 that does not work raises."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)


def needed_modules(tuning: Tuning) -> list[str]:
    """What a worker imports sooner or later beside the model's classes; of the optional ones those that are installed."""
    modules = ["diffusers.models.attention_dispatch", "peft", "PIL.PngImagePlugin"]
    if tuning.precision == "fp8" and find_spec("torchao"):
        modules.append("torchao.quantization")
    return modules


def open_device(device: str) -> None:
    """Make the context of a GPU, with a product of two small matrices so that its libraries are there too."""
    if device.startswith("cuda"):
        import torch

        small = torch.ones(16, 16, device=device)
        torch.mm(small, small)
        torch.cuda.synchronize(device)
