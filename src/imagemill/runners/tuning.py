"""Makes a loaded pipeline fast on its device: fp8 weights, an attention back end, compiled code that is warmed up.

In this order: weights change before anything is compiled, and the attention that is chosen is what gets compiled.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from imagemill.families import Family
from imagemill.records import Span, Tuning
from imagemill.runners import Beat, attention, compile_cache, compiled, precision, real_rotary, vision_windows, warm_up
from imagemill.runners.compiled import Compiled
from imagemill.runners.loading import timed

log = logging.getLogger(__name__)

DYNAMIC = True
"""Whether blocks are compiled for all numbers of tokens at once; see `compiled`."""


def tune(
    pipe: Any,
    family: Family,
    tuning: Tuning,
    device: str,
    beat: Beat,
    *,
    spans: list[Span] | None = None,
    dynamic: bool | None = DYNAMIC,
    backend: str = "inductor",
) -> list[str]:
    """Do what `tuning` asks for to a pipeline without adapters on it, and say in a line each what was done and what was not.

    `spans` takes how long each part took; `dynamic` and `backend` are what torch.compile takes. On the CPU a default
    `Tuning()` does nothing. Adapters that are to be merged into fp8 weights hold the weights before. Raises `BadModel` for
    fp8 where the device cannot, and for an attention back end that does not work here. What does not compile stays eager
    and is one of the lines.
    """
    model = denoiser(pipe)
    lines, spans = [], [] if spans is None else spans
    if tuning.precision == "fp8":
        with timed("round weights", device, spans):
            lines.append(round_weights(model, device))
    if model is not None:
        with timed("choose attention", device, spans):
            lines += attention.set_up(model, tuning, device)
    if tuning.compile:
        lines += compile_parts(pipe, family, tuning, device, beat, spans, dynamic, backend)
    for line in lines:
        log.info("%s", line)
    return lines


def denoiser(pipe: Any) -> Any:
    """The pipeline's transformer or UNet; None for one that has neither."""
    return getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)


def round_weights(model: Any, device: str) -> str:
    """Quantise the model; the line says how many layers."""
    precision.refuse_without_float8(device)
    count = precision.quantise(model)
    return f"fp8: {count} linear layers of {type(model).__name__}"


def compile_parts(
    pipe: Any,
    family: Family,
    tuning: Tuning,
    device: str,
    beat: Beat,
    spans: list[Span],
    dynamic: bool | None,
    backend: str,
) -> list[str]:
    """Compile blocks and decoder, and meet all shapes; of several workers one compiles and the others read. A text encoder
    that looks at pictures attends to their windows together."""
    started = time.monotonic()
    prepare_cache()
    compiled.set_up(len(tuning.sizes), dynamic)
    model, vae = denoiser(pipe), getattr(pipe, "vae", None)
    if encoder := getattr(pipe, "text_encoder", None):
        vision_windows.join_windows(encoder)
    blocks = blocks_of(model, dynamic, backend)
    decoder = compiled.compile_decoder(vae, True if len(tuning.sizes) > 1 else None, backend)
    lines = [
        f"{type(one).__name__}: not compiled" for one, part in ((model, blocks), (vae, decoder)) if one and not part
    ]
    found = warm_up.rounds(tuning, family, dynamic)
    with compile_cache.turn(work(pipe, tuning, device, dynamic), lambda: beat(warm_up.STAGE, -1, 0, len(found))):
        notes = warm_up.warm_up(pipe, family, found, device, beat, spans)
    lines += [part.line() for part in (blocks, decoder) if part]
    return [*lines, *notes, f"compiled and warmed up in {time.monotonic() - started:.1f} s"]


def blocks_of(model: Any, dynamic: bool | None, backend: str) -> Compiled | None:
    """Compile the model's repeated blocks, with rotary positions that the compiler takes. These stay when the blocks fall
    back to eager mode: positions of a batch under way are real by then."""
    part = compiled.compile_blocks(model, dynamic, backend)
    if part:
        real_rotary.put_on(model)
    return part


def prepare_cache() -> None:
    """The cache's folder for a worker inside the driver's process; those of their own were started with it."""
    for name, value in compile_cache.environment().items():
        os.environ.setdefault(name, value)


def work(pipe: Any, tuning: Tuning, device: str, dynamic: bool | None) -> str:
    """What is compiled, for workers to compare: the same words mean the same code."""
    import torch

    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    shape = sorted(dict(getattr(denoiser(pipe), "config", {})).items())
    return f"{torch.__version__} {kind} {type(pipe).__name__} {shape} {tuning} {dynamic}"
