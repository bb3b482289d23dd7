"""ImgEdit-Bench, basic suite: edits of one turn.

Layout after github.com/PKU-YuanGroup/ImgEdit, `Benchmark/Basic/basic_edit.json` and `basic_bench_readme.md` (737 edits in
9 types; the repository states no licence, so nothing of it is shipped): a JSON object of
`{"1082": {"id": "animal/000342021.jpg", "prompt": "...", "edit_type": "adjust"}}`, whose `id` is the path of the source
picture. The pictures come apart, in Benchmark.tar on the hub (sysuyy/ImgEdit), whose folder `singleturn` holds them and,
under the name `singleturn.json`, an earlier version of the file. They are looked for beside the file, and in
`singleturn`, `Benchmark/singleturn` and `original_images` beside it or one or two folders up.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from imagemill.scoring.benchmarks import Options
from imagemill.scoring.benchmarks._files import head, keys_in, mapping_rows
from imagemill.scoring.benchmarks._row import Row
from imagemill.scoring.item import Item

FILES = ("basic_edit.json", "singleturn.json", "Basic/basic_edit.json", "singleturn/singleturn.json")
"""The file inside a folder that is given in its place."""

PICTURES = ("singleturn", "Benchmark/singleturn", "original_images")
KNOWN = ("id", "prompt", "edit_type", "key")


class ImgEdit:
    """ImgEdit-Bench, its edits of one turn."""

    name = "ImgEdit-Bench (basic_edit.json)"
    languages = ("en",)
    fields = ()

    def recognises(self, path: Path) -> bool:
        """Such a file by its keys, or a folder that holds it."""
        path = _file(path)
        text = head(path) if path.suffix.lower() == ".json" else ""
        return text.startswith("{") and {"id", "prompt"} <= keys_in(text) and '"fullset/' not in text

    def rows(self, path: Path, options: Options) -> Iterator[Row]:
        """The rows under the keys of the file."""
        path = _file(path)
        above = (path.parent, *path.parent.parents[:2])
        roots = [path.parent, *(folder / name for folder in above for name in PICTURES)]
        return (Row(place, data, options, roots) for place, data in mapping_rows(path))

    def key(self, row: Row, options: Options) -> str:
        """The key of the file."""
        return row.text("key")

    def item(self, row: Row, key: str, options: Options) -> Item:
        """The item."""
        return Item(
            id=key,
            category=row.text("edit_type", "write one; only edits of one turn of the basic suite are read"),
            instruction=row.text("prompt"),
            image=row.picture("id"),
            source=row.text("id"),
            metadata=row.rest(KNOWN),
        )


def _file(path: Path) -> Path:
    return next((path / name for name in FILES if (path / name).is_file()), path)


FORMAT = ImgEdit()
