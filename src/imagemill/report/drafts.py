"""Files that are written under temporary names and get their own only when all of them are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

from imagemill.crashpoints import crash_point
from imagemill.errors import OutputError


class Drafts:
    """A context manager: leaving it renames all drafts to their names; an exception inside removes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._drafts: dict[str, Path] = {}

    def __enter__(self) -> Drafts:
        return self

    @contextmanager
    def open(self, name: str) -> Iterator[TextIO]:
        """The draft of a text file (UTF-8, line feeds) that will be called `name`."""
        draft = self._folder / f".imagemill-{os.getpid()}-{name}"
        try:
            with draft.open("w", encoding="utf-8", newline="\n") as out:
                self._drafts[name] = draft
                yield out
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise OutputError(f"{self._folder / name}: cannot be written ({error.strerror or error})") from error

    def write(self, name: str, text: str) -> None:
        """A whole text as the draft of `name`."""
        with self.open(name) as out:
            out.write(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for draft in self._drafts.values():
                draft.unlink(missing_ok=True)
            return
        for name, draft in self._drafts.items():
            try:
                draft.replace(self._folder / name)
                crash_point("in-report")
            except OSError as failed:
                raise OutputError(f"{self._folder / name}: cannot be written ({failed.strerror})") from failed
