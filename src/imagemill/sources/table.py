"""Tables: CSV, TSV and Parquet.

CSV is read by RFC 4180. TSV is not CSV with another separator: most TSV files (PartiPrompts is one) use quotes as plain
characters, others were written by a CSV library. So a TSV is read as quoted, like CSV, when every name in its header
stands in quotes. Otherwise a line break ends a row, a tab ends a cell, and quotes are plain characters, but for a cell
that stands in quotes and whose inner quotes are all doubled, such as `"the ""best"" cat"`: CSV libraries write that.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from imagemill.errors import InputError
from imagemill.plan import Problem
from imagemill.sources.columns import field_of, table_prompt_column
from imagemill.sources.lines import lines, parse_json
from imagemill.sources.rows import Row, bad_row, row_from_mapping

if TYPE_CHECKING:
    import pyarrow as pa

MAX_CELL = 16 * 2**20
"""Characters; a longer CSV cell is taken for a quote that never closes."""

PARQUET_BATCH = 1024

_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,40}\s*")
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+|nan|inf)(?:e[+-]?[0-9]+)?\s*", re.IGNORECASE)

Convert: TypeAlias = Callable[[str], Any]
Cells: TypeAlias = Iterator[tuple[int, list[str] | csv.Error]]
"""Of each row: the line it starts on, and its cells or what is wrong with its quotes."""


def read_csv(stream: BinaryIO, name: str, prompt_column: str | None, base: Path | None) -> Iterator[Row]:
    """The rows of a CSV file with a header. Raises `InputError` for a header without prompt and for open quotes."""
    return _rows(_quoted(lines(stream, name), name, ","), name, prompt_column, base)


def read_tsv(stream: BinaryIO, name: str, prompt_column: str | None, base: Path | None) -> Iterator[Row]:
    """The rows of a TSV file with a header; see the top of this file for its quotes."""
    text = lines(stream, name)
    header = next(text, "")
    whole = _chain(header, text)
    cells = header.rstrip("\r\n").split("\t")
    if all(len(cell) >= 2 and cell[0] == cell[-1] == '"' for cell in cells):
        return _rows(_quoted(whole, name, "\t"), name, prompt_column, base)
    return _rows(_plain(whole), name, prompt_column, base)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _quoted(text: Iterator[str], name: str, delimiter: str) -> Cells:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field limit" in str(error):
                raise InputError(
                    f"{name}, line {start}: a quote opens in this row and never closes; close it"
                ) from error
            yield start, error
        else:
            if cells and not (len(cells) == 1 and cells[0].isspace()):
                yield start, cells


def _plain(text: Iterator[str]) -> Cells:
    for number, line in enumerate(text, 1):
        if line.strip("\r\n "):
            yield number, [_unquoted(cell) for cell in line.removesuffix("\n").removesuffix("\r").split("\t")]


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    if cell[:1] == cell[-1:] == '"' and '"' in inner and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


# --- from cells to rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Header:
    """The columns of a table, which one is the prompt, and how the cells of each are read."""

    names: tuple[str, ...]
    prompt: str
    converts: tuple[Convert | None, ...]

    def read(self, cells: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
        """The values of a row; an empty cell of a known column is not given."""
        values: dict[str, Any] = {}
        problems = []
        for name, convert, cell in zip(self.names, self.converts, cells, strict=True):
            if convert is None:
                values[name] = cell
            elif cell.strip():
                try:
                    values[name] = convert(cell)
                except ValueError as error:
                    problems.append(Problem(name, str(error)))
            else:
                values[name] = None
        return values, problems


def _rows(table: Cells, name: str, prompt_column: str | None, base: Path | None) -> Iterator[Row]:
    header = _header(table, name, prompt_column)
    if header is None:
        return
    for index, (line, cells) in enumerate(table):
        place = f"{name}, line {line}"
        if isinstance(cells, csv.Error):
            yield bad_row(index, place, "", f"its quotes do not fit ({cells}); double the quotes inside quotes")
        elif len(cells) != len(header.names):
            yield bad_row(index, place, "", _miscounted(cells, header.names))
        else:
            values, problems = header.read(cells)
            row = row_from_mapping(values, index, place, prompt_column=header.prompt, base=base)
            yield replace(row, task=None, problems=(*problems, *row.problems)) if problems else row


def _header(table: Cells, name: str, prompt_column: str | None) -> _Header | None:
    """The header, or `None` for an empty file. Raises `InputError` for columns that are there twice."""
    line, cells = next(table, (0, None))
    if cells is None:
        return None
    place = f"{name}, line {line}"
    if isinstance(cells, csv.Error):
        raise InputError(f"{place}: the quotes of the header do not fit ({cells})")
    names = tuple(cell.strip().strip('"') or f"column_{number}" for number, cell in enumerate(cells, 1))
    _refuse_twice(names, place)
    prompt, known = table_prompt_column(names, prompt_column, place), frozenset(names)
    return _Header(names, prompt, tuple(None if column == prompt else _convert(column, known) for column in names))


def _refuse_twice(names: Sequence[str], place: str) -> None:
    (twice, count), *_ = Counter(names).most_common(1) or [("", 0)]
    if count > 1:
        raise InputError(f"{place}: the column {twice!r} is there twice; rename or remove one")


def _miscounted(cells: Sequence[str], names: Sequence[str]) -> str:
    text = f"has {len(cells)} columns where the header has {len(names)}"
    if any(cell.startswith('"') or cell.endswith('"') for cell in cells):
        return f"{text}; separators inside a cell need quotes around it, in a TSV also around every name of the header"
    return f"{text}; put quotes around cells that hold a separator"


def _convert(column: str, columns: Container[str]) -> Convert | None:
    """How the cells of a column are read; `None` leaves the text as it is, empty or not."""
    field = field_of(column, columns)
    if field is None or field in ("prompt", "metadata"):
        return None
    if field in ("width", "height", "steps", "seed", "num_images"):
        return _whole
    if field in ("guidance_scale", "true_cfg_scale", "lora_strength"):
        return _number
    return _list if field in ("loras", "images") else str


def _whole(cell: str) -> Any:
    return int(cell) if _WHOLE.fullmatch(cell) else _number(cell)


def _number(cell: str) -> Any:
    return float(cell) if _NUMBER.fullmatch(cell) else cell


def _list(cell: str) -> Any:
    return parse_json(cell) if cell.lstrip().startswith(("[", "{")) else cell.strip()


# --- Parquet ----------------------------------------------------------------------------------------------------------


def read_parquet(stream: BinaryIO, name: str, prompt_column: str | None, base: Path | None) -> Iterator[Row]:
    """The rows of a Parquet file, some at a time. Raises `InputError` for a damaged file or no prompt column."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"{name}: reading Parquet needs pyarrow; run: pip install pyarrow") from error
    index = 0
    try:
        file = pq.ParquetFile(stream)
        names = list(file.schema_arrow.names)
        _refuse_twice(names, name)
        prompt = table_prompt_column(names, prompt_column, name)
        for batch in file.iter_batches(batch_size=PARQUET_BATCH):
            columns = [
                _values(column, f"{name}, after row {index}: {of!r}")
                for of, column in zip(names, batch.columns, strict=True)
            ]
            for values in zip(*columns, strict=True):
                data = dict(zip(names, values, strict=True))
                yield row_from_mapping(data, index, f"{name}, row {index + 1}", prompt_column=prompt, base=base)
                index += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name}, after row {index}: does not read as Parquet: {reason}") from error


def _values(column: pa.Array, place: str) -> list[Any]:
    """A column as Python values; times that Python does not have (nanoseconds, the year 10000) as text.

    Raises `InputError` for text that is none.
    """
    import pyarrow as pa

    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        column = column.cast(pa.string())
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: holds text that is not UTF-8; save it as UTF-8") from error
    except (ValueError, OverflowError):
        values = column.cast(pa.string()).to_pylist()
    return values
