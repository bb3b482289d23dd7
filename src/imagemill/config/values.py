"""Values as people write them in a settings file, on the command line and in task files."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    PlainSerializer,
)

from imagemill.config.wording import shown
from imagemill.errors import ConfigError
from imagemill.plan import TOO_LARGE
from imagemill.records import Lora

_STRENGTH = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"\s*[+-]?(?:nan|inf|infinity)\s*", re.IGNORECASE)
T = TypeVar("T")

MAX_DIGITS = 9
"""Digits of a side in pixels; one of more is over the limit of pixels by itself."""

ATTENTION = (
    "native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "_native_npu", "_native_xla",
    "flash", "flash_varlen", "_flash_3", "_flash_varlen_3", "flex", "xformers",
    "sage", "sage_varlen", "_sage_qk_int8_pv_fp8_cuda", "_sage_qk_int8_pv_fp8_cuda_sm90", "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
)  # fmt: skip
"""The attention back ends of diffusers that need no download; importing diffusers to ask it takes seconds."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A policy of the scheduler by name; `k` is the lead in tasks of `window` and 0 for the others."""

    name: Literal["dynamic", "static", "lockstep", "window"] = "dynamic"
    k: int = 0

    def __str__(self) -> str:
        """As a user writes it: `dynamic`, `window:3`."""
        return f"window:{self.k}" if self.name == "window" else self.name


def parse_size(text: str) -> tuple[int, int]:
    """`"1024x768"` to (width, height) in pixels. Raises `ConfigError`."""
    return _or_config_error(_size, text)


def parse_lora(text: str) -> Lora:
    """`"FILE"` or `"FILE:STRENGTH"`; only a number after the last colon is a strength. Raises `ConfigError`."""
    return _or_config_error(_lora, text)


def parse_schedule(text: str) -> Schedule:
    """`dynamic`, `static`, `lockstep` or `window:K`. Raises `ConfigError`."""
    return _or_config_error(_schedule, text)


def _or_config_error(read: Callable[[str], T], text: str) -> T:
    try:
        return read(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*0*([0-9]+)\s*[xX\u00d7]\s*0*([0-9]+)\s*", text)
    if not match or "0" in match.groups():
        raise ValueError(f"{shown(text)} is not a size; write WIDTHxHEIGHT, such as 1024x1024")
    if max(map(len, match.groups())) > MAX_DIGITS:
        raise ValueError(f"{shown(text)} {TOO_LARGE}")
    return int(match[1]), int(match[2])


def _lora(text: str) -> Lora:
    path, colon, tail = text.rpartition(":")
    if colon and _NOT_FINITE.fullmatch(tail):
        raise ValueError(f"{shown(text)} has a strength that is not finite; write FILE:STRENGTH, such as FILE:0.8")
    if not colon or not _STRENGTH.fullmatch(tail):
        path, tail = text, "1"
    if not path.strip():
        raise ValueError(f"{shown(text)} names no file; write FILE or FILE:STRENGTH")
    if not math.isfinite(float(tail)):
        raise ValueError(f"{shown(text)} has a strength that is not finite; write FILE:STRENGTH, such as FILE:0.8")
    return Lora(path, float(tail))


def _schedule(text: str) -> Schedule:
    match = re.fullmatch(r"window:([0-9]{1,9})", text)
    if match and int(match[1]) >= 1:
        return Schedule("window", int(match[1]))
    if text in ("dynamic", "static", "lockstep"):
        return Schedule(cast(Literal["dynamic", "static", "lockstep"], text))
    raise ValueError(f"{shown(text)} is not one of dynamic, static, lockstep, window:K (K from 1)")


# --- the same as pydantic types ---------------------------------------------------------------------------------------


def as_tuple(value: Any) -> Any:
    """A list as a tuple, null as an empty one: strict models take no list where a frozen record holds a tuple."""
    return tuple(value or ()) if value is None or isinstance(value, list) else value


def as_size(value: Any) -> Any:
    """Text or a pair of whole numbers as (width, height)."""
    if isinstance(value, str):
        return _size(value)
    if isinstance(value, tuple | list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return tuple(value)
    raise ValueError(f"{shown(value)} is not a size; write WIDTHxHEIGHT, such as 1024x1024")


def as_schedule(value: Any) -> Any:
    """Text as a schedule."""
    return value if isinstance(value, Schedule) else _schedule(value if isinstance(value, str) else shown(value))


def as_gpus(value: Any) -> Any:
    """`auto`, or how many GPUs."""
    if value == "auto" or (type(value) is int and 1 <= value <= 4096):
        return value
    raise ValueError(f"{shown(value)} is no number of GPUs; write auto or a whole number from 1")


def as_switch(value: Any) -> Any:
    """`auto`, `on` or `off`; YAML reads the last two as true and false, and Python has these anyway."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def as_batch(value: Any) -> Any:
    """`auto`, or how many tasks run together."""
    return _auto_or_count(value, "batch size", 1024)


def as_loads(value: Any) -> Any:
    """`auto`, or how many workers load at once."""
    return _auto_or_count(value, "number of loads", 4096)


def _auto_or_count(value: Any, what: str, most: int) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= most):
        return value
    raise ValueError(f"{shown(value)} is no {what}; write auto or a whole number from 1 to {most}")


def as_attention(value: Any) -> Any:
    """`auto`, or a name as diffusers gives its attention back ends."""
    if value == "auto" or value in ATTENTION:
        return value
    if isinstance(value, str) and value.endswith("_hub"):
        raise ValueError(f"{shown(value)} is code from the network, which is not run; install the back end itself")
    close = difflib.get_close_matches(str(value), ATTENTION, n=1)
    mend = f"did you mean {close[0]}?" if close else f"write auto, or one of {', '.join(ATTENTION)}"
    raise ValueError(f"{shown(value)} is no attention back end; {mend}")


def as_base_url(value: str) -> str:
    """The address of an endpoint without a slash at its end; it must hold no user name, password, key or fragment."""
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{shown(value)} is no address; write such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        # Not shown: what stands there may be a key.
        raise ValueError("the address holds more than host and path; a key belongs into the variable of api_key_env")
    return value.rstrip("/")


def as_variable(value: str) -> str:
    """The name of an environment variable in capitals, as such names are: what is none may be the key itself."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
        raise ValueError("is no name of an environment variable; write the name in capitals, such as OPENAI_API_KEY")
    return value


def as_path(value: Any) -> Any:
    """A `PathLike` as text."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class LoraForm(BaseModel):
    """A LoRA as people write it: `{path, strength}`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    path: Annotated[str, BeforeValidator(as_path), Field(min_length=1)]
    strength: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 1.0


def _lora_fields(value: Any) -> Any:
    if isinstance(value, str):
        value = _lora(value)
    if isinstance(value, Lora):
        return {"path": value.path, "strength": value.strength}
    return {"path": os.fspath(value)} if isinstance(value, os.PathLike) else value


def _as_record(form: LoraForm) -> Lora:
    return Lora(form.path, form.strength)


def _as_fields(lora: Lora) -> dict[str, Any]:
    return {"path": lora.path, "strength": lora.strength}


def _one_as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str | os.PathLike | Mapping | Lora) else as_tuple(value)


def _lora_schema(_: Any, handler: GetCoreSchemaHandler) -> Any:
    return handler.generate_schema(Annotated[LoraForm, BeforeValidator(_lora_fields), AfterValidator(_as_record)])


Size: TypeAlias = Annotated[tuple[int, int], BeforeValidator(as_size)]
Loras: TypeAlias = Annotated[
    tuple[Annotated[Lora, GetPydanticSchema(_lora_schema), PlainSerializer(_as_fields)], ...],
    BeforeValidator(_one_as_list),
]
"""`FILE[:STRENGTH]`, `{path, strength}`, or a list of these."""
