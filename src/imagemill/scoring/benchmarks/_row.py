"""One row of a benchmark, whose fields are asked for by kind; what is wrong ends in one line with place and mend."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagemill.config.wording import shown
from imagemill.errors import InputError
from imagemill.inputs import is_web_address
from imagemill.plan import MAX_SEED, Problem, is_unicode
from imagemill.scoring.benchmarks import Options, RowError, UnreachableError
from imagemill.scoring.benchmarks._pictures import bytes_of, from_base64, keep
from imagemill.sources.metadata import jsonable


class Row:
    """The fields of a row. `roots` are the folders under which its pictures are looked for, in that order; `id` is the id of
    its item where the file as a whole gives it.

    Every method raises `RowError` with place, field and mend for a value that is not what it asks for.
    """

    def __init__(self, place: str, data: Mapping[str, Any], options: Options, roots: Sequence[Path]) -> None:
        self.id = ""
        self._place = place
        self._data = data
        self._options = options
        self._roots = roots

    def __contains__(self, field: str) -> bool:
        return field in self._data

    def raw(self, field: str) -> Any:
        """The value as it stands in the file, None where there is none."""
        return self._data.get(field)

    def refusal(self, field: str, problem: str) -> RowError:
        """The error for a field."""
        return RowError(self._place, f"{field}: {problem}")

    def text(self, field: str, mend: str = "write one") -> str:
        """Text that is there and not blank."""
        if field not in self._data:
            raise self.refusal(field, f"is missing; {mend}")
        found = self.maybe(field)
        if not found.strip():
            raise self.refusal(field, f"is empty; {mend}")
        return found

    def maybe(self, field: str) -> str:
        """Text, empty where there is none."""
        value = self._data.get(field, "")
        if not isinstance(value, str):
            raise self.refusal(field, f"{shown(value)} is not text; write it in quotes")
        if not is_unicode(value):
            raise self.refusal(field, "contains half of a surrogate pair; remove it")
        return value

    def name(self, field: str) -> str:
        """Text, or a whole number as text."""
        value = self._data.get(field)
        return str(value) if type(value) is int else self.text(field)

    def seed(self, field: str = "seed") -> int | None:
        """A whole number from 0 to 2^63 - 1, or none."""
        value = self._data.get(field)
        if value is not None and (type(value) is not int or not 0 <= value <= MAX_SEED):
            raise self.refusal(field, f"{shown(value)} is no seed; write a whole number from 0 to 2^63 - 1")
        return value

    def flag(self, field: str) -> bool:
        """True or false; none is false."""
        value = self._data.get(field, False)
        if not isinstance(value, bool):
            raise self.refusal(field, f"{shown(value)} is not true or false")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of text that is not blank; none is an empty one."""
        values = self._listed(field)
        for number, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise self.refusal(f"{field}[{number}]", f"{shown(value)} is not text; write one")
        return tuple(values)

    def picture(self, field: str) -> str:
        """The absolute path of the picture that a field names or holds; empty when the benchmark is only listed."""
        if self._options.listing:
            return ""
        if field not in self._data:
            raise self.refusal(field, "is missing; name the picture's file")
        return self._located(field, self._data[field])

    def maybe_picture(self, field: str) -> str:
        """As `picture`, empty where there is none."""
        return self.picture(field) if self._data.get(field) not in (None, "") else ""

    def pictures(self, field: str) -> tuple[str, ...]:
        """The paths of a list of pictures."""
        if self._options.listing:
            return ()
        return tuple(self._located(f"{field}[{n}]", value) for n, value in enumerate(self._listed(field)))

    def decoded(self, field: str) -> str:
        """The path of the picture that a field holds in base64."""
        text = self.text(field, "write the picture's file in base64")
        if self._options.listing:
            return ""
        try:
            return str(keep(from_base64(text), self._options.cache))
        except ValueError as error:
            raise self.refusal(field, str(error)) from error

    def first(self, field: str, names: Iterable[str]) -> str:
        """The first of these files that is there; `field` is what the message names when none is."""
        if self._options.listing:
            return ""
        candidates = list(names)
        for name in candidates:
            for root in self._roots:
                if (root / name).is_file():
                    return os.path.abspath(root / name)
        raise self.refusal(field, f"there is no picture {candidates[0]} under {self._roots[0]}; put it there")

    def rest(self, known: Iterable[str]) -> dict[str, Any]:
        """The fields that are not known, as JSON's values."""
        problems: list[Problem] = []
        left = set(self._data).difference(known)
        found = {name: jsonable(value, name, problems) for name, value in self._data.items() if name in left}
        if problems:
            raise self.refusal(problems[0].field, problems[0].message)
        return found

    def _listed(self, field: str) -> list[Any]:
        value = self._data.get(field, [])
        if not isinstance(value, list):
            raise self.refusal(field, f"{shown(value)} is not a list; write [...]")
        return value

    def _located(self, field: str, value: Any) -> str:
        data = bytes_of(value)
        if data is not None:
            try:
                return str(keep(data, self._options.cache))
            except ValueError as error:
                raise self.refusal(field, str(error)) from error
        if not isinstance(value, str) or not value.strip():
            raise self.refusal(field, f"{shown(value)} is no picture; name the picture's file")
        if is_web_address(value) and self._options.fetch is not None:
            try:
                return self._options.fetch(value)
            except InputError as error:
                raise UnreachableError(self._place, f"{field}: {error}") from error
        if "://" in value:
            mend = "download it" + (", or give --allow-urls" if is_web_address(value) else "")
            raise self.refusal(field, f"{shown(value)} is a URL; only local files are read: {mend}")
        if "\0" in value or not is_unicode(value):
            raise self.refusal(field, "contains a character no file name can hold; remove it")
        return self.first(field, [os.path.expanduser(value)])
