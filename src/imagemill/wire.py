"""Records as JSON, and frames on a worker's pipe.

A frame is four bytes of length (big endian), then the name of a record, a space, and the record as JSON. pydantic reads
the records back strictly, so that a torn or foreign frame is an error and never a half-filled record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from imagemill.records import (
    BatchEnded,
    BatchMade,
    ModelSpec,
    PlannedTask,
    Task,
    WorkerBeat,
    WorkerLost,
    WorkerReady,
    WorkerSpec,
    WorkOrder,
)

MAX_FRAME = 64 * 2**20
"""Bytes; a longer frame is taken for garbage."""

HEADER = struct.Struct(">I")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadModel:
    """To a worker: load the model of your spec and say `WorkerReady`; or this one, tuned since you were started."""

    model: ModelSpec | None = None


@dataclass(frozen=True, slots=True)
class Leave:
    """To a worker: free everything and exit."""


MESSAGES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (WorkerSpec, LoadModel, WorkOrder, Leave, WorkerReady, WorkerBeat, BatchMade, BatchEnded, WorkerLost)
}


class FrameError(ValueError):
    """The other side sent what is no frame."""


_adapters: dict[type[Any], TypeAdapter[Any]] = {}


def adapter(kind: type[T]) -> TypeAdapter[T]:
    """pydantic's reader and writer for a record, made once."""
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def to_json(record: Any) -> bytes:
    """A record as compact JSON in UTF-8."""
    return adapter(type(record)).dump_json(record)


def task_from_json(text: str | bytes) -> Task:
    """The task that `to_json` wrote."""
    return adapter(Task).validate_json(text)


def planned_from_json(text: str | bytes) -> PlannedTask:
    """The planned task that `to_json` wrote."""
    return adapter(PlannedTask).validate_json(text)


def frame(message: Any) -> bytes:
    """A message as it goes onto a pipe."""
    body = type(message).__name__.encode() + b" " + to_json(message)
    if len(body) > MAX_FRAME:
        raise FrameError(f"a frame of {len(body):,} bytes is over the limit of {MAX_FRAME:,}")
    return HEADER.pack(len(body)) + body


class FrameReader:
    """Puts frames together from whatever pieces a pipe gives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are complete now. Raises `FrameError` on garbage."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise FrameError(f"a frame claims {length:,} bytes; the limit is {MAX_FRAME:,}")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield parse(body)


def parse(body: bytes) -> Any:
    """The message of one frame's body. Raises `FrameError` on garbage."""
    name, _, text = body.partition(b" ")
    kind = MESSAGES.get(name.decode("ascii", "replace"))
    if kind is None:
        raise FrameError(f"a frame of an unknown kind: {name[:40]!r}")
    try:
        return adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise FrameError(f"a {kind.__name__} frame does not read: {error.error_count()} errors") from error
