"""Mistakes in how the command was typed, in one line like every other; typer would print four, some without the value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from imagemill.errors import InputError

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for them, wherever the installed version has it from."""

HELP_ASKED = "NoArgsIsHelpError"
"""The one that prints the help: the command was typed alone."""

NUMBERS = {"int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number"}
"""What an option takes, by pydantic's name of the mistake."""


class Commands(TyperGroup):
    """The commands of `imagemill`. Raises `InputError` for what typer would have printed with its usage."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """With the options before the command."""
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """With the command and its own options."""
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        if type(error).__name__ == HELP_ASKED:
            raise
        context = getattr(error, "ctx", None)
        more = f" (see `{context.command_path} -h`)" if context is not None else ""
        raise InputError(f"{_said(error)}{more}") from error


def _said(error: Any) -> str:
    """The mistake, with the option and what was given to it."""
    option, cause = getattr(error, "param", None), error.__cause__
    if option is not None and isinstance(cause, ValidationError):
        wrong = cause.errors()[0]
        if takes := NUMBERS.get(wrong["type"]):
            return f"{option.opts[0]}: {wrong['input']!r} is not {takes}"
    text = str(error.format_message()).removesuffix(".").replace(". Did you", "; did you")
    if near := getattr(error, "possibilities", None):
        text = f"{error.message}; did you mean {' or '.join(sorted(near))}?"
    return text[:1].lower() + text[1:]
