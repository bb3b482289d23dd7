"""Pictures that lie inside a benchmark's file, kept once as files of their own."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagemill.errors import OutputError

MAGIC = {
    b"\x89PNG\r\n\x1a\n": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
"""The first bytes of picture files and the suffix each gets; WebP and AVIF have theirs further in."""


def keep(data: bytes, cache: Path) -> Path:
    """The file of a picture in the cache, named by the sha256 of its bytes; written whole or not at all.

    A file that is there and as long is taken as it is. Raises `ValueError` for bytes that begin like no picture, and
    `OutputError` when the folder cannot be written.
    """
    place = cache / f"{hashlib.sha256(data).hexdigest()}{_suffix(data)}"
    try:
        if place.is_file() and place.stat().st_size == len(data):
            return place
        cache.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".part", dir=cache)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise OutputError(f"{cache} cannot take the pictures of the benchmark: {error}") from error
    return place


def from_base64(text: str) -> bytes:
    """The bytes that base64 stands for; a `data:` URL is taken too. Raises `ValueError`."""
    plain = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(plain.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"does not read as base64 ({error}); write the picture's file in base64") from error


def bytes_of(value: Any) -> bytes | None:
    """The bytes of a picture in a table: bytes, or the `{bytes, path}` of the library datasets; None for all else."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value if isinstance(value, bytes) and value else None


def _suffix(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    for magic, suffix in MAGIC.items():
        if data.startswith(magic):
            return suffix
    raise ValueError("holds no picture (PNG, JPEG, WebP, ...); put the picture's file there")
