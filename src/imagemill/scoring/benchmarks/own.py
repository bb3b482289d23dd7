"""imagemill's own benchmark: JSONL or Parquet, one edit a row.

Fields: `id`, `category`, `instruction`, `image` are needed. Optional are `instruction_zh` (for `lang="zh"`),
`source_caption`, `source_caption_zh`, `seed`, `images` (further references), `target` (the picture as it should be),
`mask` (what may change is white), `questions` (text). What else is there becomes metadata. Paths of pictures are relative
to the file; in Parquet a picture may also be bytes, or the `{bytes, path}` of the library datasets. A folder is read when
it holds `bench.jsonl` or `bench.parquet`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from imagemill.scoring.benchmarks import Options
from imagemill.scoring.benchmarks._files import Rows, columns, head, jsonl_rows, keys_in, parquet_rows
from imagemill.scoring.benchmarks._row import Row
from imagemill.scoring.item import Item

LINES = (".jsonl", ".ndjson")
NAMES = ("bench.jsonl", "bench.parquet")
GEDIT = "instruction_language"
"""A column of GEdit-Bench, whose rows also come as Parquet and JSONL."""

KNOWN = (
    *("id", "category", "instruction", "instruction_zh", "image", "images", "source_caption", "source_caption_zh"),
    *("seed", "target", "mask", "questions"),
)


class Own:
    """The format that imagemill's own benchmarks are in."""

    name = "imagemill's JSONL and Parquet"
    languages = ("en", "zh")
    fields = KNOWN

    def recognises(self, path: Path) -> bool:
        """A `.jsonl` or Parquet file, or a folder with `bench.jsonl`."""
        path = _file(path)
        if path.suffix.lower() in LINES:
            return GEDIT not in keys_in(head(path).partition("\n")[0])
        found = columns(path) if path.suffix.lower() == ".parquet" else set()
        return "instruction" in found and GEDIT not in found

    def rows(self, path: Path, options: Options) -> Iterator[Row]:
        """The rows of the file."""
        path = _file(path)
        lines = path.suffix.lower() in LINES
        rows: Rows = jsonl_rows(path) if lines else parquet_rows(path, pictures=not options.listing)
        return (Row(place, data, options, [path.parent]) for place, data in rows)

    def key(self, row: Row, options: Options) -> str:
        """Its `id`."""
        return row.name("id")

    def item(self, row: Row, key: str, options: Options) -> Item:
        """The item, in the language."""
        image, named = row.picture("image"), row.raw("image")
        return Item(
            id=key,
            category=row.text("category"),
            instruction=_instruction(row, options.lang),
            image=image,
            images=row.pictures("images"),
            source_caption=(row.maybe("source_caption_zh") if options.lang == "zh" else "")
            or row.maybe("source_caption"),
            target=row.maybe_picture("target"),
            mask=row.maybe_picture("mask"),
            seed=row.seed(),
            questions=row.texts("questions"),
            source=named if isinstance(named, str) else Path(image).name,
            metadata=row.rest(KNOWN),
        )


def _instruction(row: Row, lang: str) -> str:
    if lang == "zh":
        return row.text("instruction_zh", "write the instruction in Chinese, or read the benchmark with --lang en")
    return row.text("instruction")


def _file(path: Path) -> Path:
    """The file of a benchmark that is given by its folder."""
    return next((path / name for name in NAMES if (path / name).is_file()), path)


FORMAT = Own()
