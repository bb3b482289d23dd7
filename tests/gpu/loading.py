"""Run by hand on a machine with NVIDIA GPUs: `make gpu-test`, or alone with a pipeline folder as its argument.

The full-size Z-Image pipeline with random weights, 20 GiB of disk where no folder is named, is loaded through pinned
buffers and as the libraries load it, three times each. Checked: every weight on the GPU has the bytes of its file, and
what the upload took of pinned memory stays small. Printed: seconds, and the ratio of the medians.
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open

from imagemill.records import ModelSpec
from imagemill.runners import loading, upload

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 3


def check(what: str, holds: bool) -> None:
    """Print the line of one claim; stop at the first that does not hold."""
    print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)
    if not holds:
        sys.exit(1)


def timed_load(folder: Path, device: str, *, swiftly: bool) -> tuple[float, loading.Loaded]:
    """Seconds and the pipeline."""
    spec = ModelSpec(name="model", folder=str(folder), dtype="bfloat16")
    gc.collect()
    ways = nullcontext() if swiftly else mock.patch.object(upload, "swift", return_value=nullcontext())
    begun = time.monotonic()
    with ways:
        loaded = loading.load(spec, device, lambda *beat: None)
    seconds = time.monotonic() - begun
    parts = ", ".join(f"{span.stage.removeprefix('load ')} {span.seconds:.2f}" for span in loaded.spans)
    print(
        f"    {'through pinned buffers' if swiftly else 'as the libraries do'}: {seconds:.2f} s ({parts})", flush=True
    )
    return seconds, loaded


def stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a component's files, one at a time."""
    for path in loading.weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)


def differing(folder: Path, loaded: loading.Loaded, device: str) -> list[str]:
    """The weights on the device that differ from their file's, compared there, and those that have none."""
    found = []
    for part, module in loaded.pipe.components.items():
        held = module.state_dict() if isinstance(module, torch.nn.Module) else {}
        for name, tensor in stored(folder / part):
            weight = held.pop(name)
            if weight.device != torch.device(device) or not torch.equal(weight, tensor.bfloat16().to(device)):
                found.append(f"{part}.{name}")
        found += [f"{part}.{name}" for name in held]
    return found


def claims(folder: Path, device: str) -> None:
    """Everything that must hold."""
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**30
    timed_load(folder, device, swiftly=False)  # the first has the context and the page cache to wait for
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(ROUNDS):
        for swiftly in (True, False):
            took, loaded = timed_load(folder, device, swiftly=swiftly)
            seconds[swiftly].append(took)
            if swiftly:
                wrong = differing(folder, loaded, device)
                check(f"load {number + 1}: every weight has its file's bytes {wrong[:3]}", not wrong)
            del loaded
            gc.collect()
            torch.cuda.empty_cache()
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.peak"]
    check(f"no more than {pinned / 2**20:.0f} MiB of memory was pinned", pinned <= 4 * upload.BUFFERS * upload.CHUNK)
    swift, plain = (statistics.median(seconds[way]) for way in (True, False))
    print(f"    {size:.1f} GiB in {swift:.2f} s in place of {plain:.2f}: {plain / swift:.2f} times as fast")


def main() -> None:
    """Build the model if none is named, then make every claim."""
    if len(sys.argv) > 1:
        claims(Path(sys.argv[1]), "cuda:0")
        return
    base = Path(os.environ.get("IMAGEMILL_GPU_SCRATCH") or tempfile.mkdtemp(prefix="imagemill-gpu-"))
    folder = base / "z-image"
    try:
        # In a process of its own, so that this one holds no GPU memory.
        subprocess.run([sys.executable, str(ROOT / "bench" / "models.py"), "z-image", str(folder)], check=True)
        claims(folder, "cuda:0")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
