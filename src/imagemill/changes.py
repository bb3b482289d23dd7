"""How a task differs from what it was: the message that stops a run whose folder knows its ids with other content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from imagemill.config.wording import field_path

IGNORED = ("id", "metadata")
LONG = 80
BEFORE = 24
"""Characters kept before the first one that differs, where both values are long."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two tasks (as JSON objects) differ, one line each: `prompt: 'a cat' -> 'a dog'`. Of lists and
    objects that have as many members only the members that differ are named: `loras[0].strength: 0.5 -> 1.0`."""
    fields = (name for name in dict.fromkeys([*old, *new]) if name not in IGNORED)
    return [line for name in fields for line in _lines((name,), old.get(name), new.get(name))]


def _lines(at: tuple[str | int, ...], old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.keys() == new.keys():
        if old.get("path") is not None and _only("digest", old, new):
            yield f"{field_path(at)}: the content of {old['path']} has changed"
            return
        for key in old:
            yield from _lines((*at, key), old[key], new[key])
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _lines((*at, number), before, after)
    else:
        before, after = repr(old), repr(new)
        same = _shared(before, after) if len(before) > LONG and len(after) > LONG else 0
        yield f"{field_path(at)}: {_short(before, same)} -> {_short(after, same)}"


def _only(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return key in old and all(old[other] == new[other] for other in old if other != key)


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _short(text: str, same: int) -> str:
    """At most `LONG` characters of the text; what comes long before the `same` first characters' end is left out."""
    start = same - BEFORE if same > BEFORE else 0
    part = f"...{text[start:]}" if start else text
    return part if len(part) <= LONG else part[: LONG - 3] + "..."
