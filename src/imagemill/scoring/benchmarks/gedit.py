"""GEdit-Bench: 606 edits that users asked for, in English and in Chinese.

Layout after github.com/stepfun-ai/Step1X-Edit (Apache-2.0), `GEdit-Bench/generate_image_example.py`,
`test_gedit_score.py` and `EVAL.md`: rows of `task_type` (the category), `key`, `instruction`, `instruction_language`
(`en`, `cn`), `input_image`, `input_image_raw`, `Intersection_exist`. They are read from

- a Parquet file or a folder of them (`data/train-*.parquet`), as the hub's stepfun-ai/GEdit-Bench has them,
- a folder that the library datasets saved (`save_to_disk`: `*.arrow`),
- an exported folder: the rows as `info.jsonl`, `metadata.jsonl` or `data.json`, without the pictures, which lie at
  `fullset/TASK/LANGUAGE/KEY_SRCIMG.png` (as the repository's example writes them) or `KEY_SRCIMG.png`, or where the row's
  `input_image` says; or `gedit_edit.json`, the mapping of keys to `{prompt, id, edit_type}` that evaluations such as
  UniWorld-V1's make of it.

The source is `input_image`, which the benchmark's own scores compare with, and `input_image_raw` where that is not there.
`lang="intersection"` and `"zh-intersection"` take the rows of `Intersection_exist`. Ids are `TASK_LANGUAGE_KEY`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from imagemill.errors import InputError
from imagemill.inputs import digest_file
from imagemill.scoring.benchmarks import Options
from imagemill.scoring.benchmarks._files import (
    Rows,
    arrow_rows,
    columns,
    head,
    jsonl_rows,
    keys_in,
    list_rows,
    mapping_rows,
    parquet_rows,
)
from imagemill.scoring.benchmarks._row import Row
from imagemill.scoring.item import Item

LISTS = ("info.jsonl", "metadata.jsonl", "data.jsonl", "info.json", "metadata.json", "data.json", "gedit_edit.json")
"""Files of an exported folder that hold its rows."""

TABLES = {".parquet": parquet_rows, ".arrow": arrow_rows}
PICTURES = ("input_image", "input_image_raw", "file_name")
KNOWN = ("task_type", "key", "instruction", "instruction_language", "Intersection_exist", *PICTURES)
CODES = {"en": "en", "intersection": "en", "zh": "cn", "zh-intersection": "cn"}


class GEdit:
    """GEdit-Bench."""

    name = "GEdit-Bench"
    languages = ("en", "zh", "intersection", "zh-intersection")
    fields = ()

    def recognises(self, path: Path) -> bool:
        """Its files by their columns or keys, and folders that hold them."""
        if path.is_dir() and (path / "fullset").is_dir():
            return True
        tables = _tables(path)
        if tables:
            return "instruction_language" in columns(tables[0])
        file = _list(path)
        text = head(file) if file else ""
        return "instruction_language" in keys_in(text) or (text.startswith("{") and '"fullset/' in text)

    def rows(self, path: Path, options: Options) -> Iterator[Row]:
        """The rows of all languages."""
        root = path if path.is_dir() else path.parent
        return (Row(place, data, options, [root]) for place, data in _rows(path, options))

    def key(self, row: Row, options: Options) -> str | None:
        """TASK_LANGUAGE_KEY."""
        language = row.text("instruction_language", "write en or cn")
        if language not in ("en", "cn"):
            raise row.refusal("instruction_language", f"{language!r} is no language of GEdit-Bench; write en or cn")
        if language != CODES[options.lang] or not _asked(row, options.lang):
            return None
        return f"{row.text('task_type')}_{language}_{row.text('key')}"

    def item(self, row: Row, key: str, options: Options) -> Item:
        """The item, its source known by the digest of its bytes."""
        image, language = _picture(row), row.text("instruction_language")
        metadata = {"key": row.text("key"), "instruction_language": language, **row.rest(KNOWN)}
        if "Intersection_exist" in row:
            metadata["Intersection_exist"] = row.flag("Intersection_exist")
        return Item(
            id=key,
            category=row.text("task_type"),
            instruction=row.text("instruction"),
            image=image,
            source=digest_file(image) if image else "",
            metadata=metadata,
        )


def _asked(row: Row, lang: str) -> bool:
    if not lang.endswith("intersection"):
        return True
    if "Intersection_exist" not in row:
        raise row.refusal("Intersection_exist", "is missing; read all rows with --lang en or zh")
    return row.flag("Intersection_exist")


def _picture(row: Row) -> str:
    """The source of a row: in it, where it says, or where the example of the repository writes it."""
    for field in PICTURES:
        if field in row:
            return row.picture(field)
    task, language, key = (row.text(field) for field in ("task_type", "instruction_language", "key"))
    places = (
        f"fullset/{task}/{language}/{key}_SRCIMG.png",
        f"{key}_SRCIMG.png",
        f"fullset/{task}/{language}/{key}.png",
    )
    return row.first("input_image", places)


def _rows(path: Path, options: Options) -> Rows:
    tables = _tables(path)
    for table in tables:
        yield from TABLES[table.suffix](table, pictures=not options.listing)
    if tables:
        return
    file = _list(path)
    if file is None:
        raise InputError(
            f"{path}: has pictures in fullset/ but no instructions; put the benchmark's rows beside them as info.jsonl, "
            "or give the folder of its Parquet files"
        )
    if file.suffix.lower() != ".json":
        yield from jsonl_rows(file)
    elif head(file).startswith("["):
        yield from list_rows(file)
    else:
        yield from map(_from_mapping, mapping_rows(file))


def _from_mapping(row: tuple[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    """A row of `gedit_edit.json` under the names of the benchmark; its `id` is `fullset/TASK/LANGUAGE/KEY.png`."""
    place, data = row
    path = PurePosixPath(str(data.get("id", "")))
    if len(path.parts) != 4 or path.parts[0] != "fullset":
        raise InputError(f"{place}: id: {str(path)!r} is no path such as fullset/color_alter/en/KEY.png; write that")
    named = {"instruction": data.get("prompt"), "task_type": data.get("edit_type", path.parts[1])}
    found = {name: value for name, value in named.items() if value is not None}
    return place, {"key": path.stem, "instruction_language": path.parts[2], **found}


def _tables(path: Path) -> list[Path]:
    """The Parquet or Arrow files that are meant, in the order of their names."""
    if path.is_file():
        return [path] if path.suffix.lower() in TABLES else []
    for folder in (path, path / "data", path / "train"):
        for suffix in TABLES:
            if found := sorted(folder.glob(f"*{suffix}")):
                return found
    return []


def _list(path: Path) -> Path | None:
    """The file with the rows of an exported folder, or the file itself."""
    if path.is_file():
        return path if path.suffix.lower() in (".json", ".jsonl") else None
    return next((path / name for name in LISTS if (path / name).is_file()), None)


FORMAT = GEdit()
