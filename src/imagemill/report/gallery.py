"""The pictures that the page shows: evenly chosen, as thumbnails inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from PIL import Image

from imagemill import source_image
from imagemill.errors import BadTask
from imagemill.ledger import Ledger
from imagemill.report.figures import cut, number

SHOWN = 200
"""Pictures on the page; with `MAX_THUMBNAIL` and `MAX_SOURCE` this keeps it under 10 MB."""

SIDE = 192
"""The longer side of a thumbnail in pixels."""

MAX_THUMBNAIL = 20_000
"""Bytes above which a thumbnail is coded again at a lower quality."""

SOURCE_SIDE = 128
MAX_SOURCE = 6_000
"""The same for the thumbnail of a picture that was edited."""

MAX_PROMPT = 1000
KEPT = "SELECT count(*) AS total FROM tasks WHERE state = 'done' AND json_extract(receipt, '$.path') != ''"


@dataclass(frozen=True, slots=True)
class Card:
    """One picture of the page. `thumbnail` is a data URI, or empty with the reason in `missing`.

    `source` is that of the first picture it was edited from, empty when it does not read any more; `sources` counts them.
    """

    id: str
    prompt: str
    facts: tuple[str, ...]
    adapters: tuple[tuple[str, str], ...]
    flags: tuple[str, ...]
    model: str
    link: str
    thumbnail: str
    missing: str
    sources: int
    source: str


class Gallery:
    """Takes the results in order and keeps cards of `SHOWN` of them, evenly spread over all that have a file."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self.total: int = next(iter(ledger.rows(KEPT)))["total"]
        self.cards: list[Card] = []
        self._folder = folder.resolve()
        self._seen = 0
        self._sources: dict[str, str] = {}  # many tasks may edit one picture, and a large one takes seconds to decode

    def add(self, result: Mapping[str, Any]) -> None:
        """Make a card of the result when it is one of the chosen."""
        if result["state"] != "done" or not result["path"]:
            return
        wanted = min(self.total, SHOWN)
        if self._seen * wanted % self.total < wanted:
            self.cards.append(self._card(result))
        self._seen += 1

    def _card(self, result: Mapping[str, Any]) -> Card:
        thumbnail, missing = self._thumbnail(result["path"])
        steps = result["steps"]
        facts = [f"seed {result['seed']}", f"{result['width']}×{result['height']}"]
        facts += [f"{steps} step{'s' * (steps != 1)}"] if steps is not None else []
        images = result["images"] or ()
        facts += [f"from {len(images)} pictures"] if len(images) > 1 else []
        facts += [f"batch of {result['batch_size']}"] if (result["batch_size"] or 1) > 1 else []
        return Card(
            id=result["id"],
            prompt=cut(result["prompt"], MAX_PROMPT),
            facts=tuple(facts),
            adapters=tuple((PurePosixPath(a["path"]).stem, number(a["strength"])) for a in result["loras"] or ()),
            flags=tuple(result["flags"]),
            model=str(result["model"]),
            # "./" keeps a name such as "data:x.png" from being read as a scheme.
            link="" if missing else "./" + quote(result["path"]),
            thumbnail=thumbnail,
            missing=missing,
            sources=len(images),
            source=self._source(images[0]) if images else "",
        )

    def _source(self, path: str) -> str:
        if path not in self._sources:
            self._sources[path] = _source(path)
        return self._sources[path]

    def _thumbnail(self, path: str) -> tuple[str, str]:
        file = (self._folder / path).resolve()
        if not file.is_relative_to(self._folder):
            return "", "outside the folder"
        try:
            data = thumbnail(file)
        except FileNotFoundError:
            return "", "not on disk"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return "", "does not decode"  # Pillow raises any of these on a damaged file
        return data_uri(data), ""


def _source(path: str) -> str:
    """The thumbnail of a picture to edit as a data URI; empty when it is gone or does not read any more."""
    try:
        small = source_image.thumbnail(path, SOURCE_SIDE)
    except BadTask:
        return ""
    return data_uri(webp(small, MAX_SOURCE))


def data_uri(data: bytes) -> str:
    """A WebP file as a data URI."""
    return f"data:image/webp;base64,{base64.b64encode(data).decode('ascii')}"


def thumbnail(file: Path) -> bytes:
    """A picture file as WebP of at most `SIDE` pixels a side. Raises what Pillow raises on a file it cannot read."""
    with Image.open(file) as picture:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
        small = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    return webp(small, MAX_THUMBNAIL)


def webp(small: Image.Image, most: int) -> bytes:
    """The picture as WebP: at the best of three qualities that gives no more than `most` bytes, else at the lowest."""
    data = b""
    for quality in (80, 50, 20):
        out = io.BytesIO()
        small.save(out, "WEBP", quality=quality, method=4)
        data = out.getvalue()
        if len(data) <= most:
            break
    return data
