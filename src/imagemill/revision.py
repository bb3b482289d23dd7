"""The revision of a model: a digest of its files that is quick also where they are large."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

SMALL_FILE = 2**20
SMALL_FOLDER = 64 * 2**20
SAMPLE = 4096
SAMPLES = 64
EDGE = 64 * 1024
MAX_HEADER = 100 * 2**20
"""Bytes; the limit that safetensors itself sets to a header."""


def of_files(folder: Path, files: Iterable[Path]) -> str:
    """A sha256 in hex over files of the folder, by their paths in it: the same wherever a copy of it lies.

    Folders under 64 MiB and files under 1 MiB count whole. Of a larger file count its size, both ends, 64 spread
    samples and, of safetensors, the header and a sample from the middle of each tensor: training changes them all.
    """
    paths = list(files)
    sizes = [path.stat().st_size for path in paths]
    whole = sum(sizes) < SMALL_FOLDER
    total = hashlib.sha256()
    for path, size in zip(paths, sizes, strict=True):
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            for offset, length in [(0, size)] if whole or size < SMALL_FILE else _samples(file.fileno(), path, size):
                digest.update(os.pread(file.fileno(), length, offset))
        total.update(f"{path.relative_to(folder).as_posix()}\0{size}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()


def _samples(file: int, path: Path, size: int) -> list[tuple[int, int]]:
    """Places (offset, bytes) of a large file that stand for all of it."""
    places = [(0, EDGE), (size - EDGE, EDGE)]
    places += [((size - SAMPLE) * number // (SAMPLES - 1), SAMPLE) for number in range(SAMPLES)]
    if path.suffix != ".safetensors":
        return places
    header = int.from_bytes(os.pread(file, 8, 0), "little")
    if header > min(MAX_HEADER, size - 8):
        return places  # no safetensors file: the loader will refuse it
    places.append((8, header))
    try:
        tensors = json.loads(os.pread(file, header, 8))
        spans = [entry["data_offsets"] for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return places
    return places + [(8 + header + max(start, (start + end - SAMPLE) // 2), SAMPLE) for start, end in spans]
