"""Columns that imagemill does not know, as values that JSON holds."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any
from uuid import UUID

from imagemill.config.wording import shown
from imagemill.plan import Problem, is_unicode

MAX_DEPTH = 64


def jsonable(value: Any, path: str, problems: list[Problem], depth: int = 0) -> Any:
    """The value as JSON holds it; what JSON cannot hold is reported under `path`.

    Dates become ISO 8601 text, decimals, UUIDs and paths text. Bytes are left out: their place says how many they were.
    """
    if type(value) is str and value.isascii():
        return value
    if isinstance(value, str):
        return value if is_unicode(value) else _refuse(path, "contains half of a surrogate pair; remove it", problems)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        fits = value.__index__() if hasattr(value, "__index__") else int(value)
        if -(2**63) <= fits < 2**63:
            return fits
        return _refuse(path, f"{shown(fits)} does not fit in 64 bit; write it as text", problems)
    if isinstance(value, Real):
        if math.isfinite(value):
            return float(value)
        return _refuse(path, f"{float(value)} is no JSON number; write null", problems)
    if isinstance(value, Mapping | list | tuple):
        return _nested(value, path, problems, depth)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(bytes(value)):,} bytes left out: JSON holds no bytes>"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID | os.PathLike | datetime.timedelta):
        return os.fsdecode(value) if isinstance(value, os.PathLike) else str(value)
    return _refuse(path, f"is of the type {type(value).__name__}, which JSON cannot hold; write it as text", problems)


def _nested(value: Any, path: str, problems: list[Problem], depth: int) -> Any:
    if depth == MAX_DEPTH:
        return _refuse(path, f"is nested deeper than {MAX_DEPTH} levels; flatten it", problems)
    if not isinstance(value, Mapping):
        return [jsonable(item, f"{path}[{number}]", problems, depth + 1) for number, item in enumerate(value)]
    held = {}
    for key, item in value.items():
        if isinstance(key, str) and is_unicode(key):
            held[key] = jsonable(item, f"{path}.{key}", problems, depth + 1)
        else:
            _refuse(path, f"has the key {shown(key)}; keys are text", problems)
    return held


def _refuse(path: str, text: str, problems: list[Problem]) -> None:
    problems.append(Problem(path, text))
