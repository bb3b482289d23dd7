"""Files and standard input as lines of text, and JSONL."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from imagemill.errors import InputError
from imagemill.sources.rows import Row, bad_row, row_from_mapping

MAX_LINE = 64 * 2**20
"""Bytes; a longer line is taken for a file that has no lines."""

BOM = b"\xef\xbb\xbf"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file in bytes. Raises `InputError` when the system refuses to open it."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        yield file


def lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines with their ends, without the byte order mark. Only LF ends a line.

    Raises `InputError` with line and byte for what is not UTF-8.
    """
    number = 0
    while raw := stream.readline(MAX_LINE + 1):
        number += 1
        if len(raw) > MAX_LINE:
            raise InputError(f"{name}, line {number}: is longer than {MAX_LINE:,} bytes; write one row a line")
        if number == 1:
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise InputError(f"{name}, line 1: is UTF-16, not UTF-8 (byte 1 is 0x{raw[0]:02x}); save it as UTF-8")
            raw = raw.removeprefix(BOM)
        try:
            yield raw.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(name, number, error.start + 1, raw[error.start]) from error


def not_utf8(name: str, line: int, byte: int, value: int) -> InputError:
    """The error for a byte that is not UTF-8; `line` and `byte` count from 1."""
    return InputError(f"{name}, line {line}, byte {byte}: 0x{value:02x} is not UTF-8; save the file as UTF-8")


def read_jsonl(stream: BinaryIO, name: str, prompt_column: str | None, base: Path | None) -> Iterator[Row]:
    """One row a line; a line that does not parse is a bad row, empty lines are none."""
    index = 0
    for number, line in enumerate(lines(stream, name), 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            data = parse_json(line.rstrip("\r\n"))
        except ValueError as error:
            yield bad_row(index, place, "", str(error))
        else:
            yield row_from_json(data, index, place, prompt_column, base)
        index += 1


def row_from_json(data: Any, index: int, place: str, prompt_column: str | None, base: Path | None) -> Row:
    """The row of one JSON value: an object, or the prompt alone."""
    if isinstance(data, str):
        data, prompt_column = {"prompt": data}, None
    if not isinstance(data, Mapping):
        return bad_row(index, place, "", 'is no JSON object; write {"prompt": "..."}')
    return row_from_mapping(data, index, place, prompt_column=prompt_column, base=base)


def parse_json(text: str) -> Any:
    """The JSON value. Raises `ValueError` in a user's words; `json.JSONDecodeError` where there is a position."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = (
            f"column {error.colno}" if "\n" not in text.rstrip("\r\n") else f"line {error.lineno}, column {error.colno}"
        )
        raise ValueError(f"does not read as JSON at {where}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("holds a whole number of thousands of digits; 64 bit are taken") from error
        raise


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"names {twice!r} twice in one object; keep one of them")
    return data


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
