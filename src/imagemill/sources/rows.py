"""One row of a source, as anyone may have written it, to a task; or the reasons why it is none.

The outside form is checked by a strict pydantic model: no text is taken for a number, no truth value for one, no NaN.
What imagemill does not know becomes metadata.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from imagemill.config.values import Loras, as_path, parse_lora, parse_size
from imagemill.config.wording import field_path, message, shown
from imagemill.errors import InputError
from imagemill.inputs import is_path, lora_path, picture_path
from imagemill.plan import MAX_PATH, Problem, is_unicode
from imagemill.records import Lora, Task
from imagemill.sources.columns import field_of, listed, meant, prompt_column_of
from imagemill.sources.metadata import jsonable

MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One data row of a source: a task, or the problems that make it none, or why it was skipped.

    `index` counts the data rows from 0, bad and skipped ones too, so that seeds do not move. `place` is for people. `slips`
    are columns that became metadata and are nearly known ones.
    """

    index: int
    place: str
    task: Task | None
    problems: tuple[Problem, ...] = ()
    skipped: str = ""
    slips: tuple[str, ...] = ()


def bad_row(index: int, place: str, field: str, text: str) -> Row:
    """A row that is no task, for one reason; `field` is empty where it is the row as a whole."""
    return Row(index, place, None, (Problem(field, text),))


def row_from_mapping(
    data: Mapping[str, Any],
    index: int,
    place: str,
    *,
    prompt_column: str | None = None,
    base: Path | None = None,
) -> Row:
    """The task that a mapping of columns describes; everything that is wrong with it is in `problems`.

    `prompt_column` is the column to read the prompt from; without it `prompt`, or the one column that differs from it
    only in case. Relative paths are looked up under `base`, then in the current folder. `None` means: not given.
    """
    columns = _Columns(data, prompt_column)
    problems, values = columns.problems, columns.values
    if "lora_path" in values or "lora_strength" in values:
        _single_lora({field_of(key, data) for key in data}, values, problems)
    if "size" in values:
        _size(data, values, problems)
    metadata = _metadata(values.pop("metadata", None), columns.extra, problems)
    try:
        form = TaskForm.model_validate(values)
    except ValidationError as error:
        known = {problem.field for problem in problems}
        found = (Problem(columns.path(details["loc"]), message(details)) for details in error.errors())
        problems += [problem for problem in found if problem.field not in known]
        return Row(index, place, None, tuple(problems))
    if form.prompt.isspace() or not form.prompt:
        problems.append(Problem(columns.prompt, "is empty; write one"))
    task = _task(form, index, metadata, base, problems)
    slips = tuple(name for name in columns.extra if isinstance(name, str) and name in metadata and meant(name))
    return Row(index, place, None if problems else task, tuple(problems), slips=slips)


# --- the outside form -------------------------------------------------------------------------------------------------


def _whole(value: Any) -> Any:
    """Whole numbers of any kind as int, also 8.0; all else is left for pydantic to refuse."""
    if type(value) is not int:
        if isinstance(value, bool):
            return value
        if isinstance(value, Integral) or (isinstance(value, float) and value.is_integer() and abs(value) < 2**53):
            value = int(value)
    if type(value) is int and not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise ValueError(f"{shown(value)} does not fit in 64 bit; write a smaller number")
    return value


def _real(value: Any) -> Any:
    """Numbers of any kind as float; all else is left for pydantic to refuse."""
    if type(value) is float or isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return float(_whole(value))
    return float(value)


def _id(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, Integral):
        return value
    return str(_whole(value))


def _paths(value: Any) -> Any:
    """One path or a list of them as a tuple of text."""
    if isinstance(value, list | tuple):
        return tuple(as_path(item) for item in value)
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{shown(value)} is no path; write one, or a list of paths")
    return (as_path(value),)


Whole: TypeAlias = Annotated[int, BeforeValidator(_whole)]
Decimal: TypeAlias = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]


class TaskForm(BaseModel):
    """A row as it comes from outside, after aliases have been resolved."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str
    id: Annotated[str, BeforeValidator(_id)] | None = None
    negative_prompt: str | None = None
    images: Annotated[tuple[str, ...], BeforeValidator(_paths)] = ()
    model: Annotated[str, BeforeValidator(as_path)] | None = None
    width: Whole | None = None
    height: Whole | None = None
    steps: Whole | None = None
    guidance_scale: Decimal | None = None
    true_cfg_scale: Decimal | None = None
    seed: Whole | None = None
    loras: Loras = ()
    output_path: Annotated[str, BeforeValidator(as_path)] | None = None
    num_images: Whole = 1
    system_prompt: str | None = None


class _Columns:
    """The columns of one row, sorted into known fields and the rest."""

    def __init__(self, data: Mapping[str, Any], prompt_column: str | None) -> None:
        self.values: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}
        self.problems: list[Problem] = []
        self._names: dict[str, str] = {}
        self.prompt = prompt_column or prompt_column_of(data)
        for key, value in data.items():
            name = "prompt" if key == self.prompt else field_of(key, data)
            if name is None or (name == "prompt" and key != self.prompt):
                self.extra[key] = value
            elif value is not None:
                self._put(name, key, value)
        if "prompt" not in self.values:
            self.problems.append(Problem(self.prompt, self._missing(data)))
            self._names["prompt"] = self.prompt

    def path(self, loc: Sequence[int | str]) -> str:
        """The path of a field with the name that the user wrote."""
        return field_path((self._names.get(str(loc[0]), loc[0]), *loc[1:]))

    def _put(self, name: str, key: str, value: Any) -> None:
        if name in self.values:
            self.problems.append(Problem(key, f"means the same as {self._names.get(name, name)}; keep one of them"))
            return
        self.values[name] = value
        if key != name:
            self._names[name] = key

    def _missing(self, data: Mapping[str, Any]) -> str:
        if self.prompt in data:
            return "is empty; write one"
        return f"is missing; the columns here are {listed(data)}; name the one to read with --prompt-column"


def _single_lora(fields: Container[str | None], values: dict[str, Any], problems: list[Problem]) -> None:
    """`lora_path` and `lora_strength` as the one entry of `loras`; without a path the strength is that of the one adapter
    that `loras` names. An empty path takes its strength with it."""
    path, strength = values.pop("lora_path", None), values.pop("lora_strength", None)
    if path not in (None, ""):
        if "loras" in values:
            problems.append(Problem("lora_path", "means the same as loras; keep one of them"))
        else:
            values["loras"] = ({"path": path, "strength": 1.0 if strength is None else strength},)
    elif "lora_path" not in fields:
        try:
            values["loras"] = (_strengthened(values.get("loras"), strength),)
        except InputError as error:
            problems.append(Problem("lora_strength", str(error)))


def _strengthened(loras: Any, strength: Any) -> Any:
    """The one adapter that `loras` names, at this strength. Raises `InputError` for none, several, or a second strength."""
    named = loras if isinstance(loras, list | tuple) else () if loras is None else (loras,)
    if not named:
        raise InputError("is there without lora or lora_path; name the file")
    if len(named) > 1:
        raise InputError(f"is one strength for {len(named)} adapters; write each its own in loras")
    one = {"path": named[0]} if isinstance(named[0], str | os.PathLike) else named[0]
    written = isinstance(one, Lora) or (isinstance(one, Mapping) and "strength" in one)
    if written or (isinstance(named[0], str) and parse_lora(named[0]).path != named[0]):
        raise InputError("is there beside a strength in loras; keep one of them")
    return {**one, "strength": strength} if isinstance(one, Mapping) else one


def _size(data: Mapping[str, Any], values: dict[str, Any], problems: list[Problem]) -> None:
    size = values.pop("size")
    if "width" in values or "height" in values:
        problems.append(Problem("size", "means the same as width and height; keep one of them"))
        return
    try:
        if not isinstance(size, str):
            raise InputError(f"{shown(size)} is not a size; write WIDTHxHEIGHT, such as 1024x1024")
        values["width"], values["height"] = parse_size(size)
    except InputError as error:
        problems.append(Problem("size", str(error)))


def _metadata(own: Any, extra: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Unknown columns, together with the entries of a `metadata` column that is a mapping."""
    if own is None and not extra:
        return {}
    if own is not None and isinstance(own, Mapping):
        problems += [
            Problem(f"metadata.{key}", f"is there as the column {key} too; keep one of them")
            for key in own
            if key in extra
        ]
        extra = {**own, **extra}
    elif own is not None:
        extra["metadata"] = own
    return {key: jsonable(value, key, problems) for key, value in extra.items() if _is_name(key, problems)}


def _is_name(key: Any, problems: list[Problem]) -> bool:
    if isinstance(key, str) and is_unicode(key):
        return True
    problems.append(Problem(shown(key), "is no column name; names are text"))
    return False


def _task(form: TaskForm, index: int, metadata: dict[str, Any], base: Path | None, problems: list[Problem]) -> Task:
    if form.model is not None and ("\0" in form.model or not is_unicode(form.model)):
        problems.append(Problem("model", f"{form.model!r} contains a character no name can hold; remove it"))
    for field, text in (("model", form.model or ""), ("output_path", form.output_path or "")):
        if len(text) > MAX_PATH or (field == "model" and is_unicode(text) and not is_path(text)):
            problems.append(Problem(field, f"is longer than any name ({len(text):,} characters); shorten it"))
    return Task(
        id=form.id if form.id is not None else f"{index + 1:06d}",
        prompt=form.prompt,
        negative_prompt=form.negative_prompt,
        images=tuple(_located(picture_path, form.images, "images", base, problems)) if form.images else (),
        model=form.model or None,
        width=form.width,
        height=form.height,
        steps=form.steps,
        guidance_scale=form.guidance_scale,
        true_cfg_scale=form.true_cfg_scale,
        seed=form.seed,
        loras=_located_loras(form.loras, base, problems) if form.loras else (),
        output_path=form.output_path or None,
        num_images=form.num_images,
        system_prompt=form.system_prompt,
        metadata=metadata,
    )


def _located_loras(loras: tuple[Lora, ...], base: Path | None, problems: list[Problem]) -> tuple[Lora, ...]:
    paths = _located(lora_path, [lora.path for lora in loras], "loras", base, problems)
    return tuple(replace(lora, path=path) for lora, path in zip(loras, paths, strict=False))


def _located(
    locate: Callable[[str, Path | None], str],
    paths: Sequence[str],
    field: str,
    base: Path | None,
    problems: list[Problem],
) -> Iterator[str]:
    for number, path in enumerate(paths):
        try:
            yield locate(path, base)
        except InputError as error:
            problems.append(Problem(f"{field}[{number}]", str(error)))
