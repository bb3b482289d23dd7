"""pydantic's errors in the words that a user reads: field path, value, mend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NEEDED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "mapping_type": "an object",
    "finite_number": "a finite number",
}
"""What pydantic's error types ask for."""

BOUNDS = {"greater_than_equal": ("ge", ">="), "greater_than": ("gt", ">"), "less_than_equal": ("le", "<=")}


def shown(value: Any, limit: int = 60) -> str:
    """A value as a message shows it: JSON's words for JSON's values, cut to `limit` characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length():,} bits"
    if isinstance(value, dict | list | tuple):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def field_path(loc: Sequence[int | str]) -> str:
    """`("loras", 0, "strength")` as `loras[0].strength`."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def message(error: ErrorDetails) -> str:
    """What is wrong with the value and what is needed, as it stands after the field's path."""
    kind, value, context = error["type"], shown(error["input"]), error.get("ctx", {})
    if kind in NEEDED:
        return f"{value} is not {NEEDED[kind]}"
    if kind == "literal_error":
        names = str(context["expected"]).replace(" or ", ", ").replace("'", "")
        return f"{value} is not one of {names}"
    if kind in BOUNDS:
        name, sign = BOUNDS[kind]
        bound = context[name]
        return f"{value} is out of range; it must be {sign} {int(bound) if bound == int(bound) else bound}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "is not known"
    if kind == "string_too_short":
        return "is empty; write one or remove it"
    return f"{value}: {error['msg']}"
