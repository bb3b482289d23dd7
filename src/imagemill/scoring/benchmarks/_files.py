"""The files of benchmarks as rows: a place for messages and a mapping of fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from imagemill.errors import InputError
from imagemill.sources.lines import BOM, lines, not_utf8, opened, parse_json

HEAD = 64 * 1024
"""Bytes of a file that are looked at to tell its format."""

BATCH = 16
"""Rows of a table in memory at once; each may hold a picture of megabytes."""

Rows: TypeAlias = Iterator[tuple[str, Mapping[str, Any]]]
"""Of each row: its place (`bench.jsonl, line 3`) and its fields; a field of null is left out."""


def head(path: Path) -> str:
    """The beginning of a text file, empty for what is no file or cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD).removeprefix(BOM).decode("utf-8", "replace").lstrip()
    except OSError:
        return ""


def keys_in(text: str) -> set[str]:
    """The names that stand as keys in the beginning of a JSON text."""
    return set(re.findall(r'"([\w+-]+)"\s*:', text))


def read_json(path: Path) -> Any:
    """A JSON file as a whole. Raises `InputError` with line and mend for one that does not read."""
    with opened(path) as stream:
        content = stream.read().removeprefix(BOM)
    try:
        return parse_json(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = error.start - content.rfind(b"\n", 0, error.start)
        raise not_utf8(path.name, line, byte, content[error.start]) from error
    except ValueError as error:
        raise InputError(f"{path.name}: {error}; mend the file or get it again") from error


def list_rows(path: Path) -> Rows:
    """The objects of a JSON list."""
    data = read_json(path)
    if not isinstance(data, list):
        raise InputError(f"{path.name}: is no JSON list; write [{{...}}, {{...}}]")
    for number, row in enumerate(data, 1):
        yield _row(f"{path.name}, item {number}", row)


def mapping_rows(path: Path) -> Rows:
    """The objects of a JSON object of objects, each with its key in the field `key`."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise InputError(f'{path.name}: is no JSON object; write {{"1": {{...}}, "2": {{...}}}}')
    for key, row in data.items():
        place, fields = _row(f"{path.name}, item {key!r}", row)
        yield place, {**fields, "key": key}


def jsonl_rows(path: Path) -> Rows:
    """The objects of a file with one a line; empty lines are none."""
    with opened(path) as stream:
        for number, line in enumerate(lines(stream, path.name), 1):
            if not line.strip():
                continue
            place = f"{path.name}, line {number}"
            try:
                row = parse_json(line)
            except ValueError as error:
                raise InputError(f"{place}: {error}; mend or remove the line") from error
            yield _row(place, row)


def parquet_rows(path: Path, *, pictures: bool) -> Rows:
    """The rows of a Parquet file; without `pictures` the columns that may hold them are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = [column.name for column in file.schema_arrow if pictures or not _holds_bytes(column.type)]
            for batch in file.iter_batches(batch_size=BATCH, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield _row(f"{path.name}, row {number}", row)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, number, "Parquet", error) from error


def arrow_rows(path: Path, *, pictures: bool) -> Rows:
    """The rows of an Arrow stream, as `datasets.save_to_disk` writes it."""
    import pyarrow as pa

    number = 0
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            names = [column.name for column in stream.schema if pictures or not _holds_bytes(column.type)]
            for batch in stream:
                for start in range(0, batch.num_rows, BATCH):
                    for row in batch.select(names).slice(start, BATCH).to_pylist():
                        number += 1
                        yield _row(f"{path.name}, row {number}", row)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, number, "an Arrow stream", error) from error


def columns(path: Path) -> set[str]:
    """The columns of a Parquet file, or of an Arrow stream; empty for what does not read as one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                return set(stream.schema.names)
        return set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return set()


def _row(place: str, row: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise InputError(f'{place}: is no JSON object; write {{"instruction": "..."}}')
    return place, {name: value for name, value in row.items() if value is not None}


def _holds_bytes(kind: Any) -> bool:
    """True for a column of pictures: bytes, or the `{bytes, path}` of the library datasets."""
    import pyarrow as pa

    return bool(
        pa.types.is_struct(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or (pa.types.is_list(kind) and _holds_bytes(kind.value_type))
    )


def _unreadable(path: Path, number: int, what: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"{path.name}, after row {number}: does not read as {what}: {reason}; get the file again")
