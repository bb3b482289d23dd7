"""JSON documents: lists of tasks, and the tweet batches of a persona."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from imagemill.config.wording import field_path, message, shown
from imagemill.errors import InputError
from imagemill.sources.lines import BOM, not_utf8, parse_json, row_from_json
from imagemill.sources.rows import Row, bad_row, row_from_mapping

SHAPES = 'a list of tasks, {"tasks": [...]} or {"persona": {...}, "tweets": [...]}'
MAX_STEM = 100
"""Bytes of a persona's name in the names of its files."""


def read_json(stream: BinaryIO, name: str, prompt_column: str | None, base: Path | None) -> Iterator[Row]:
    """The rows of a JSON document, which is read as a whole. Raises `InputError` for text that is no such document."""
    text = _text(stream.read(), name)
    if not text.strip():
        return iter(())
    try:
        data = parse_json(text)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    if isinstance(data, Mapping) and "tweets" in data:
        return read_tweets(data, name, base)
    if isinstance(data, Mapping) and "tasks" in data:
        unknown = [key for key in data if key != "tasks"]
        if unknown:
            raise InputError(
                f"{name}: {unknown[0]!r} is not known beside 'tasks'; put settings into a YAML file (--config)"
            )
        data = data["tasks"]
    if not isinstance(data, list):
        raise InputError(f"{name}: holds no tasks; a JSON source is {SHAPES}")
    return _items(data, name, prompt_column, base)


def _items(items: Sequence[Any], name: str, prompt_column: str | None, base: Path | None) -> Iterator[Row]:
    for index, item in enumerate(items):
        yield row_from_json(item, index, f"{name}, item {index + 1}", prompt_column, base)


def _text(content: bytes, name: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{name}, line 1: is UTF-16, not UTF-8 (byte 1 is 0x{content[0]:02x}); save it as UTF-8")
    content = content.removeprefix(BOM)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = error.start - content.rfind(b"\n", 0, error.start)
        raise not_utf8(name, line, byte, content[error.start]) from error


# --- tweet batches ----------------------------------------------------------------------------------------------------


class _PersonaLora(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    model_path: str | None = None
    strength: float = Field(default=1.0, ge=-100, le=100, allow_inf_nan=False)

    @model_validator(mode="after")
    def _path_is_there(self) -> _PersonaLora:
        if "strength" in self.model_fields_set and "model_path" not in self.model_fields_set:
            raise ValueError("has a strength without a model_path; name the file")
        return self


def _as_lora(value: Any) -> Any:
    """Empty text is no adapter; what is neither an object nor null is refused."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f'{shown(value)} is not an object; write {{"model_path": "FILE", "strength": 0.8}}')
    return value


class _Persona(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str = Field(pattern=r"\w")
    lora: Annotated[_PersonaLora | None, BeforeValidator(_as_lora)] = None


class _TweetBatch(BaseModel):
    model_config = ConfigDict(strict=True)

    persona: _Persona
    tweets: list[Any]


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all tweets of a batch share."""

    name: str
    persona: _Persona
    stem: str
    digits: int
    base: Path | None


def read_tweets(data: Mapping[str, Any], name: str, base: Path | None) -> Iterator[Row]:
    """One row a tweet, its `image_generation.scene_hint` the prompt; a tweet without a hint is a skipped row.

    Files are named by the persona and the place of the tweet, from 1. Other columns of `image_generation` are read as
    those of any task. Raises `InputError` for a persona that does not read.
    """
    try:
        batch = _TweetBatch.model_validate(data)
    except ValidationError as error:
        details = error.errors()[0]
        wrong = (
            "has no letter or digit to name files by"
            if details["type"] == "string_pattern_mismatch"
            else message(details)
        )
        raise InputError(f"{name}: {field_path(details['loc'])}: {wrong}") from error
    digits = max(2, len(str(len(batch.tweets))))
    frame = _Frame(name, batch.persona, persona_stem(batch.persona.name), digits, base)
    return (_tweet_row(tweet, index, frame) for index, tweet in enumerate(batch.tweets))


def persona_stem(name: str) -> str:
    """The persona's name as a part of file names: letters, digits, `-` and `_` stay, all else becomes `_`."""
    stem = re.sub(r"[^\w-]+", "_", name.strip()).strip("_-")[:MAX_STEM]
    while len(stem.encode()) > MAX_STEM:
        stem = stem[:-1]
    return stem


def _tweet_row(tweet: Any, index: int, frame: _Frame) -> Row:
    number = index + 1
    place = f"{frame.name}, tweet {number}"
    if not isinstance(tweet, Mapping):
        return bad_row(index, place, f"tweets[{index}]", 'is no object; write {"text": ..., "image_generation": {...}}')
    picture = tweet.get("image_generation") or {}
    if not isinstance(picture, Mapping):
        return bad_row(index, place, "image_generation", 'is no object; write {"scene_hint": "..."}')
    hint = picture.get("scene_hint")
    if hint is None or (isinstance(hint, str) and not hint.strip()):
        return Row(index, place, None, skipped=f"tweet {number} has no image_generation.scene_hint")
    return row_from_mapping(
        _tweet_task(tweet, picture, number, frame), index, place, prompt_column="scene_hint", base=frame.base
    )


def _tweet_task(tweet: Mapping[str, Any], picture: Mapping[str, Any], number: int, frame: _Frame) -> dict[str, Any]:
    name = f"{frame.stem}_{number:0{frame.digits}d}"
    task: dict[str, Any] = {"id": name, "output_path": name}
    lora = frame.persona.lora
    if lora is not None and lora.model_path and not {"lora", "loras", "lora_path"} & set(picture):
        task["loras"] = [{"path": lora.model_path, "strength": lora.strength}]
    metadata = {key: value for key, value in tweet.items() if key != "image_generation"}
    return {**task, **picture, "metadata": {"persona": frame.persona.name, **metadata}}
