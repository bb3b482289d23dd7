"""One JSON list with the pictures inside, in base64: the benchmark files of the system that imagemill replaces.

Fields: `subset` (the category, as it stands), `edit_instruction` and `original_description` in Chinese, the same with
`_en` in English (the default), `src_img_b64`, `tags`, `difficulty`, `original_image_path`, `seed`, `rationale_short`.
The id is the name of `original_image_path` without folder and suffix where that tells the rows apart, else the row's
number from 0 in five digits, with that name behind it.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from imagemill.scoring.benchmarks import Options
from imagemill.scoring.benchmarks._files import head, keys_in, list_rows
from imagemill.scoring.benchmarks._row import Row
from imagemill.scoring.item import Item

TEXTS = ("edit_instruction", "original_description", "rationale_short")
KNOWN = ("subset", "src_img_b64", "seed", *TEXTS, *(f"{name}_en" for name in TEXTS))


class Base64List:
    """The JSON list with base64 pictures."""

    name = "the JSON list with base64 pictures"
    languages = ("en", "zh")
    fields = ()

    def recognises(self, path: Path) -> bool:
        """A `.json` file that begins as a list of such rows."""
        text = head(path) if path.suffix.lower() == ".json" else ""
        return text.startswith("[") and bool({"src_img_b64", "edit_instruction", "edit_instruction_en"} & keys_in(text))

    def rows(self, path: Path, options: Options) -> list[Row]:
        """The rows of the list, with their ids."""
        rows = [Row(place, data, options, [path.parent]) for place, data in list_rows(path)]
        for row, known in zip(rows, _ids(rows), strict=True):
            row.id = known
        return rows

    def key(self, row: Row, options: Options) -> str:
        """The id that the file as a whole gives."""
        return row.id

    def item(self, row: Row, key: str, options: Options) -> Item:
        """The item, in the language."""
        end, other = ("", "en") if options.lang == "zh" else ("_en", "zh")
        image = row.decoded("src_img_b64")
        rationale = row.maybe(f"rationale_short{end}")
        return Item(
            id=key,
            category=row.text("subset"),
            instruction=row.text(f"edit_instruction{end}", f"write one, or read the other with --lang {other}"),
            image=image,
            source_caption=row.maybe(f"original_description{end}"),
            seed=row.seed(),
            source=Path(image).name,
            metadata={**row.rest(KNOWN), **({"rationale_short": rationale} if rationale else {})},
        )


def _ids(rows: list[Row]) -> list[str]:
    stems = [PurePosixPath(row.maybe("original_image_path")).stem for row in rows]
    if all(stems) and len(set(stems)) == len(stems):
        return stems
    return [f"{number:05d}" + (f"_{stem}" if stem else "") for number, stem in enumerate(stems)]


FORMAT = Base64List()
