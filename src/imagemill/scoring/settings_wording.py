"""Checks data against a form and words what is wrong as `imagemill.config` does: place, field, value, mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from imagemill.config.wording import field_path, message, shown
from imagemill.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Form = TypeVar("Form", bound=BaseModel)

ANY = "*"
"""In a dotted key: a name that the user chooses, such as a category."""


def validated(
    form: type[Form],
    data: Mapping[Any, Any],
    prefix: str = "",
    options: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
) -> Form:
    """The data as that form. `prefix` goes before the fields of a file; `options` maps dotted keys to the options that
    set them, which stand for themselves; `missing` says what to write for keys that are needed. Raises `ConfigError`."""
    try:
        return form.model_validate(data)
    except ValidationError as error:
        found = (_line(form, details, prefix, options or {}, missing or {}) for details in error.errors())
        raise ConfigError("\n".join(dict.fromkeys(found))) from error


def keys(form: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a form with its dotted path; `*` for names that the user chooses."""
    for name, field in form.model_fields.items():
        yield prefix + name
        inner, chosen = _section(field.annotation)
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}.{ANY}." if chosen else f"{prefix}{name}.")


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that is most like it, or empty."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), "")


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The form inside an annotation, and whether it is one of many under names that the user chooses."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in get_args(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part, get_origin(annotation) is not UnionType
    return None, False


def _line(
    form: type[BaseModel],
    error: ErrorDetails,
    prefix: str,
    options: Mapping[str, str],
    missing: Mapping[str, str],
) -> str:
    loc = [part for part in error["loc"] if part != "[key]"]
    path = field_path(loc)
    option = options.get(path) or options.get(path.partition("[")[0])
    name = option or f"{prefix}{path}" if path else prefix.removesuffix(": ")
    if error["type"] == "invalid_key":
        return f"{prefix}{shown(error['input'])}: is not a known key; {_suggestion(form, [''])}"
    if error["type"] == "extra_forbidden":
        return f"{name}: is not a known key; {_suggestion(form, loc)}"
    if error["type"] == "missing":
        return f"{name}: is missing; {missing.get(path, 'write one')}"
    return f"{name}: {message(error)}" if name else message(error)


def _suggestion(form: type[BaseModel], loc: Sequence[int | str]) -> str:
    """What to do with an unknown key: the nearest known name beside it, else anywhere, else the names beside it."""
    name = str(loc[-1]) if loc else ""
    known = list(keys(form))
    beside = [key for key in known if _is_in(key, loc[:-1])]
    for candidates in (beside, known):
        by_name = {key.rpartition(".")[2]: key for key in candidates}
        if close := nearest(name, list(by_name)):
            return f"did you mean {_filled(by_name[close], loc)}?"
    return f"known here: {', '.join(key.rpartition('.')[2] for key in beside)}" if beside else "remove it"


def _is_in(key: str, section: Sequence[int | str]) -> bool:
    parts = key.split(".")[:-1]
    return len(parts) == len(section) and all(part in (ANY, asked) for part, asked in zip(parts, section, strict=True))


def _filled(key: str, loc: Sequence[int | str]) -> str:
    """The key with the user's own names where it stands beside what the user wrote."""
    return field_path([*loc[:-1], key.rpartition(".")[2]]) if _is_in(key, loc[:-1]) else key.replace(ANY, "NAME")
