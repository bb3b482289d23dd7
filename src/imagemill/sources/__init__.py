"""Sources: whatever a user has, as rows, lazily. A row is a task, or says why it is none."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

from imagemill import source_image
from imagemill.config.wording import shown
from imagemill.errors import BadTask, InputError
from imagemill.records import Task
from imagemill.sources.columns import field_of
from imagemill.sources.document import read_json
from imagemill.sources.lines import opened, read_jsonl
from imagemill.sources.rows import Row, bad_row, row_from_mapping
from imagemill.sources.table import read_csv, read_parquet, read_tsv

__all__ = ["READERS", "Row", "from_iterable", "open_source", "row_from_mapping"]

READERS: Mapping[str, Callable[[BinaryIO, str, str | None, Path | None], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
"""What reads a file, by its suffix: stream, name for messages, prompt column, folder for relative paths."""


def open_source(
    source: str | os.PathLike[str], *, prompt_column: str | None = None, stdin: BinaryIO | None = None
) -> Iterator[Row]:
    """The rows of a file, or of JSONL on standard input for `-`, read as they are asked for.

    Raises `InputError` at once for a file that is missing, a folder or of an unknown suffix, and while reading for one
    that is not UTF-8, does not parse as a whole, or has no column for the prompt. A bad row is no error: see `Row`.
    """
    if os.fspath(source) == "-":
        return read_jsonl(stdin or sys.stdin.buffer, "<stdin>", prompt_column, None)
    path = Path(source)
    _check(path)
    return _read(path, prompt_column)


def from_iterable(tasks: Iterable[Task | Mapping[str, Any] | str], kept: Path | None = None) -> Iterator[Row]:
    """The rows of tasks from Python: records, mappings with the columns of a file, or prompts.

    A picture to edit may be one of Pillow's in a mapping; it is written to the folder `kept`.
    """
    for index, given in enumerate(tasks):
        place = f"task {index + 1}"
        task: Any = given
        if isinstance(task, Task):
            task = {field.name: getattr(task, field.name) for field in fields(Task)}
        elif isinstance(task, str):
            task = {"prompt": task}
        if isinstance(task, Mapping):
            try:
                row = row_from_mapping(_on_disk(task, kept), index, place)
            except BadTask as error:
                row = bad_row(index, place, "images", str(error))
            yield row
        else:
            yield bad_row(index, place, "", f"{shown(task)} is no task; give a prompt, a dict or a Task")


def _on_disk(task: Mapping[str, Any], kept: Path | None) -> Mapping[str, Any]:
    """The task with files for its pictures from memory. Raises `BadTask` for one that cannot be kept."""
    found: dict[str, Any] = {}
    for column in (name for name in task if field_of(name, task) == "images"):
        value = task[column]
        if value is None or isinstance(value, str | os.PathLike):
            continue
        from PIL.Image import Image

        several = value if isinstance(value, list | tuple) else [value]
        if not any(isinstance(one, Image) for one in several):
            continue
        if kept is None:
            raise BadTask("is a picture in memory, and there is no folder to keep it in; give its path")
        found[column] = [source_image.keep(one, kept) if isinstance(one, Image) else one for one in several]
    return {**task, **found}


SETTINGS = dict.fromkeys((".yaml", ".yml"), "; settings go to --config, those of an evaluation to `imagemill eval`")
"""What else is said of files that hold no tasks."""


def _check(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    known = ", ".join(READERS)
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder; name a file in it ({known})")
    if path.suffix.lower() not in READERS:
        kind = (
            f"files of type {path.suffix!r} are not read"
            if path.suffix
            else "its name has no suffix that tells its type"
        )
        raise InputError(f"{path}: {kind}; known: {known}, - for stdin{SETTINGS.get(path.suffix.lower(), '')}")


def _read(path: Path, prompt_column: str | None) -> Iterator[Row]:
    with opened(path) as stream:
        yield from READERS[path.suffix.lower()](stream, str(path), prompt_column, Path(os.path.abspath(path.parent)))
