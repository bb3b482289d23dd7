"""Compiled parts of a pipeline: the repeated blocks of its denoising model, and the decoder of its VAE.

Both are compiled in place, so the pipeline, its stages and its adapters see the modules they know. A part whose code does
not compile, at the start or at a shape that comes later, goes on in eager mode: that costs speed, never a run. A model
that wears adapters as PEFT layers computes in eager mode as long as it wears them, since its blocks would have to be
compiled again for every adapter and every strength; merged adapters change numbers only.

The blocks are compiled once for any number of tokens (`dynamic`): captions fill buckets of 32 tokens and sizes vary, and
each shape of its own would cost as long as the first. One row and several are two graphs all the same, with and without
a mask as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from imagemill.errors import OutOfMemory, WorkerGone, classify

log = logging.getLogger(__name__)

COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "triton")
"""Modules whose exceptions mean that code did not compile, not that it failed while it ran."""

GRAPHS = 16
"""Graphs of one module at one shape: kinds of blocks, one row or several, with a mask or without."""

BUCKETS = 16
"""Caption lengths (512 tokens in steps of 32), each a shape of its own where shapes are static."""


class Compiled:
    """Modules that are compiled together, and fall back to eager together.

    `eager_now` is asked at every call: True runs the module as it is, this time. `undone` is called once after the fall
    back. `failure` is why they fell back, empty as long as they are compiled.
    """

    def __init__(
        self,
        what: str,
        modules: Sequence[Any],
        *,
        eager_now: Callable[[], bool] = lambda: False,
        undone: Callable[[], None] = lambda: None,
        **how: Any,
    ) -> None:
        self.what = what
        self.failure = ""
        self._modules = list(modules)
        self._eager_now = eager_now
        self._undone = undone
        for module in self._modules:
            module.compile(**how)
            module._compiled_call_impl = self._guarded(module, module._compiled_call_impl)

    def _guarded(self, module: Any, fast: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.failure or self._eager_now():
                return module._call_impl(*args, **kwargs)
            try:
                return fast(*args, **kwargs)
            except Exception as error:
                if not is_compilers(error) or isinstance(classify(error), OutOfMemory | WorkerGone):
                    raise
                self.undo(one_line(error))
            return module._call_impl(*args, **kwargs)

        return call

    def undo(self, reason: str) -> None:
        """Back to eager mode, with this reason, for as long as the model stays loaded."""
        if self.failure:
            return
        self.failure = reason
        log.warning("%s did not compile and goes on in eager mode: %s", self.what, reason)
        for module in self._modules:
            module._compiled_call_impl = None
        self._undone()

    def line(self) -> str:
        """What became of it, for the log and the report."""
        return f"{self.what}: eager, it did not compile: {self.failure}" if self.failure else f"{self.what}: compiled"


def is_compilers(error: BaseException) -> bool:
    """Whether the exception says that code did not compile."""
    return any(kind.__module__.startswith(COMPILERS) for kind in type(error).__mro__)


def one_line(error: BaseException) -> str:
    """The first line of an error that says something; of what a compiler raised, when torch only wraps that."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, Exception):
        return one_line(inner)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


# --- the parts --------------------------------------------------------------------------------------------------------


def compile_blocks(transformer: Any, dynamic: bool | None, backend: str = "inductor") -> Compiled | None:
    """Compile the repeated blocks of a denoising model, each as one graph; None for a model that names none.

    `dynamic` is torch's: True for all shapes at once, False for each shape apart, None for the first apart.
    """
    kinds = set(getattr(transformer, "_repeated_blocks", None) or ())
    blocks = [module for module in transformer.modules() if type(module).__name__ in kinds]
    if not blocks:
        return None
    return Compiled(
        f"the blocks of {type(transformer).__name__}",
        blocks,
        eager_now=lambda: bool(getattr(transformer, "peft_config", None)),
        fullgraph=True,
        dynamic=dynamic,
        backend=backend,
    )


def compile_decoder(vae: Any, dynamic: bool | None, backend: str = "inductor") -> Compiled | None:
    """Compile the decoder of a VAE for pictures, with channels last; None for a VAE of another kind.

    In eager mode channels last is the slower layout on a GPU, so it is taken back with the compiled code. VAEs made for
    video (with convolutions in three dimensions) keep state from call to call and stay as they are.
    """
    import torch
    from torch.nn import Conv2d, Conv3d

    decoder = getattr(vae, "decoder", None)
    kinds = {type(module) for module in decoder.modules()} if decoder is not None else set()
    if any(issubclass(kind, Conv3d) for kind in kinds) or not any(issubclass(kind, Conv2d) for kind in kinds):
        return None
    lay_out(decoder, torch.channels_last)
    return Compiled(
        f"the decoder of {type(vae).__name__}",
        [decoder],
        undone=lambda: lay_out(decoder, torch.contiguous_format),
        dynamic=dynamic,
        backend=backend,
    )


def lay_out(module: Any, layout: Any) -> None:
    """Bring the module's weights into a memory layout, outside of inference mode: they must stay ordinary tensors."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        module.to(memory_format=layout)


def set_up(sizes: int, dynamic: bool | None) -> None:
    """Let torch keep as many graphs as the shapes need; at its own limit (8) a graph that must be whole raises instead.

    Numbers that a block holds, such as the epsilon of a norm, are constants of its code. As inputs, which they are where all is
    dynamic, torch finds out only after the first trace that most cannot be, and traces again, at every start. To be called
    on the thread that compiles: what is set here is that thread's.
    """
    import torch._dynamo.config as config

    shapes = 1 if dynamic else max(1, sizes) * BUCKETS
    limit = GRAPHS * (1 + shapes)
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * limit)
    config.specialize_float = True
