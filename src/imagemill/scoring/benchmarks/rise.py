"""RISEBench: edits that need reasoning.

Layout after github.com/PhoenixZ810/RISEBench, `data/data_total.json` and `gpt_eval.py` (64 edits), the file
`datav2_total_w_subtask.json` of the hub's PhoenixZ/RISEBench (360), and the single edits of
`RISEBench++/data/overall_data.json` (the repository states no licence, so nothing of it is shipped): a JSON list of
`{"index", "category", "instruction", "image", "reference" | "reference_txt" | "reference_img"}`. Paths of pictures are
relative to the file, or to the folder `data` beside it. `image` may be a list: the first is edited, the others are
references. `reference_img`, a picture of the answer, is the item's `target`; a `reference` in words is kept in the
metadata, as is what else the row says (`subtask`, `reasoning_img`, `consistency_free`). `lang="zh"` takes
`instruction_chinese`, which RISEBench++ has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from imagemill.scoring.benchmarks import Options
from imagemill.scoring.benchmarks._files import head, keys_in, list_rows
from imagemill.scoring.benchmarks._row import Row
from imagemill.scoring.item import Item

FILES = ("datav2_total_w_subtask.json", "data_total.json", "overall_data.json")
KNOWN = (
    *("index", "category", "instruction", "instruction_chinese", "image"),
    *("reference", "reference_txt", "reference_txt_chinese", "reference_img"),
)


class Rise:
    """RISEBench."""

    name = "RISEBench"
    languages = ("en", "zh")
    fields = ()

    def recognises(self, path: Path) -> bool:
        """Such a list by its keys, or a folder that holds it, itself or in `data`."""
        path = _file(path)
        text = head(path) if path.suffix.lower() == ".json" else ""
        return text.startswith("[") and {"index", "instruction", "image"} <= keys_in(text)

    def rows(self, path: Path, options: Options) -> Iterator[Row]:
        """The rows of the list."""
        path = _file(path)
        roots = [path.parent, path.parent / "data"]
        return (Row(place, _with_images(data), options, roots) for place, data in list_rows(path))

    def key(self, row: Row, options: Options) -> str:
        """Its `index`."""
        return row.name("index")

    def item(self, row: Row, key: str, options: Options) -> Item:
        """The item, in the language."""
        for field in ("instruction", "category"):
            if isinstance(row.raw(field), list):
                raise row.refusal(field, "is a list of turns; only edits of one turn are read: take the row out")
        return Item(
            id=key,
            category=row.text("category"),
            instruction=row.text("instruction")
            if options.lang == "en"
            else row.text("instruction_chinese", "write the instruction in Chinese, or use --lang en"),
            image=row.picture("image"),
            images=row.pictures("images"),
            target=row.maybe_picture("reference_img"),
            source=row.text("image", "name the picture's file"),
            metadata={**_reference(row, options.lang), **row.rest((*KNOWN, "images"))},
        )


def _with_images(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the first of a list of pictures as `image` and the others as `images`."""
    image = data.get("image")
    return {**data, "image": image[0], "images": image[1:]} if isinstance(image, list) and image else data


def _reference(row: Row, lang: str) -> dict[str, Any]:
    chinese = row.maybe("reference_txt_chinese") if lang == "zh" else ""
    text = chinese or row.maybe("reference_txt") or row.maybe("reference")
    return {"reference": text} if text else {}


def _file(path: Path) -> Path:
    places = (folder / name for folder in (path, path / "data") for name in FILES)
    return next((place for place in places if place.is_file()), path)


FORMAT = Rise()
