"""How much main memory is free, and how many workers may load a model at once in it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30

LOAD_BYTES = 4 * GIB
"""What a worker that loads straight to its GPU takes of main memory beside the files: interpreter, libraries, CUDA
context and the tensors that are on their way. The files themselves are mapped, never copied: all workers share their pages."""


def parallel_loads(asked: int | None, host_free: int, model_bytes: int, workers: int) -> int:
    """How many of `workers` may load at once: what was asked for, else as many as `host_free` bytes hold.

    The model's files (`model_bytes`) count once, since all workers read the same pages. Where they do not all stay in
    memory, two loads would push each other's pages out, so there is one at a time. At least 1, at most `workers`.
    """
    fitting = (host_free - model_bytes) // LOAD_BYTES if asked is None else asked
    return max(1, min(fitting, workers))


def free(root: Path = Path("/")) -> int:
    """Bytes of main memory that can be had without swapping: the kernel's `MemAvailable`, within the limits (cgroup v2) of
    the process's own group and of those above it. 0 where nothing tells. `root` is where `proc` and `sys` are found."""
    info = root / "proc/meminfo"
    if not info.is_file():
        return 0
    (available,) = re.findall(r"^MemAvailable:\s+(\d+) kB", info.read_text("ascii"), re.MULTILINE)
    return min([int(available) * 1024, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each group's limit leaves; pages of files that nobody has used lately are given back on demand."""
    own, top = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    found = re.findall(r"^0::/(.*)$", own.read_text("utf-8"), re.MULTILINE) if own.is_file() else []
    group = top / found[0] if found and (top / found[0]).is_dir() else top
    for place in (group, *group.parents):
        limit = place / "memory.max"
        if limit.is_file() and (text := limit.read_text("ascii").strip()).isdigit():
            cache = re.findall(r"^inactive_file (\d+)", (place / "memory.stat").read_text("ascii"), re.MULTILINE)
            used = int((place / "memory.current").read_text("ascii")) - int(cache[0] if cache else 0)
            yield max(0, int(text) - used)
        if place == top:
            return
