"""What goes onto a pipe comes off it, in whatever pieces; everything else is a `FrameError` and never half a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill import wire
from imagemill.records import (
    BatchEnded,
    ModelSpec,
    PlannedTask,
    Receipt,
    SinkSpec,
    Task,
    Ticket,
    WorkerBeat,
    WorkerLost,
    WorkerReady,
    WorkOrder,
)
from imagemill.wire import FrameError, FrameReader

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
SIMPLE = {
    Any: JSON,
    str: TEXT,
    int: st.integers(-(2**63), 2**63 - 1),
    float: NUMBERS,
    bool: st.booleans(),
    type(None): st.none(),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field of a record, by its type."""
    if hint in SIMPLE:
        return SIMPLE[hint]
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in fields(hint)})
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (Union, UnionType):
        return st.one_of(*map(values, inner))
    if origin is tuple and Ellipsis not in inner:
        return st.tuples(*map(values, inner))
    if origin is tuple:
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    if origin is frozenset:
        return st.frozensets(values(inner[0]), max_size=3)
    if origin is Mapping:
        return st.dictionaries(values(inner[0]), values(inner[1]), max_size=3)
    raise TypeError(f"no values for {hint}")


MESSAGES = st.sampled_from(sorted(wire.MESSAGES)).flatmap(lambda name: values(wire.MESSAGES[name]))


def read(data: bytes) -> list[Any]:
    return list(FrameReader().feed(data))


def frame_of(body: bytes) -> bytes:
    return wire.HEADER.pack(len(body)) + body


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", wire.MESSAGES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_message_comes_back_as_it_went(name: str, data: st.DataObject) -> None:
    message = data.draw(values(wire.MESSAGES[name]))
    assert read(wire.frame(message)) == [message]


@settings(max_examples=50, deadline=None)
@given(messages=st.lists(MESSAGES, max_size=4), data=st.data())
def test_frames_come_together_from_any_pieces(messages: list[Any], data: st.DataObject) -> None:
    stream = b"".join(map(wire.frame, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    reader = FrameReader()
    found: list[Any] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:end])
    assert found == messages


def test_frames_come_together_byte_by_byte() -> None:
    messages = [WorkerReady(3, frozenset({"model:猫"}), 1.5), wire.Leave(), WorkerLost(3, "oom", "full 🐈")]
    reader = FrameReader()
    found: list[Any] = []
    for byte in b"".join(map(wire.frame, messages)):
        found += reader.feed(bytes([byte]))
    assert found == messages


def test_half_a_frame_is_nothing_yet() -> None:
    data = wire.frame(WorkerBeat(0, 1, 2, 3))
    for cut in range(len(data)):
        reader = FrameReader()
        assert list(reader.feed(data[:cut])) == []
        assert list(reader.feed(data[cut:])) == [WorkerBeat(0, 1, 2, 3)]


@settings(max_examples=50, deadline=None)
@given(values(Task))
def test_a_task_comes_back_from_its_json(task: Task) -> None:
    assert wire.task_from_json(wire.to_json(task)) == task


@settings(max_examples=25, deadline=None)
@given(values(PlannedTask))
def test_a_planned_task_comes_back_from_its_json(planned: PlannedTask) -> None:
    assert wire.planned_from_json(wire.to_json(planned)) == planned


def test_metadata_nested_as_deep_as_sources_allow_comes_back() -> None:
    nested: Any = "bottom"
    for _ in range(64):
        nested = [nested]
    task = Task("1", "p", metadata={"column": nested})
    assert wire.task_from_json(wire.to_json(task)) == task
    order = WorkOrder(1, ModelSpec("fake", ""), SinkSpec("none"), (PlannedTask(task, "f", Ticket(0)),), (1,))
    assert read(wire.frame(order)) == [order]


# --- garbage ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_no_garbage_is_taken_for_a_message(body: bytes) -> None:
    with pytest.raises(FrameError):
        read(frame_of(body))


@settings(max_examples=200, deadline=None)
@given(MESSAGES, st.data())
def test_a_damaged_frame_is_a_frame_error_or_another_whole_message(message: Any, data: st.DataObject) -> None:
    body = bytearray(wire.frame(message)[wire.HEADER.size :])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = wire.parse(bytes(body))
    except FrameError:
        return
    assert type(found) in wire.MESSAGES.values()


@pytest.mark.parametrize("name", ["Pickle", "", "workerready", "Task", "WorkerReady\0", "Wörker", "X" * 5000])
def test_a_frame_of_an_unknown_kind_is_refused_and_named(name: str) -> None:
    with pytest.raises(FrameError, match="unknown kind") as caught:
        read(frame_of(name.encode() + b" {}"))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"worker": null}',
        '{"worker": "1"}',
        '{"worker": 1.5}',
        '{"worker": true}',
        '{"worker": 1, "step": "2"}',
        '{"worker": 1, "stage": 7}',
        '{"worker": 1} {"worker": 2}',
        '{"worker": 1',
        '{"worker": NaN}',
        '{"worker": 1, "stage": "\\ud800"}',
        "[" * 10_000,
    ],
)
def test_a_record_that_does_not_read_strictly_is_refused(text: str) -> None:
    with pytest.raises(FrameError, match="WorkerBeat"):
        read(frame_of(b"WorkerBeat " + text.encode()))


def test_a_kind_of_failure_that_does_not_exist_is_refused() -> None:
    with pytest.raises(FrameError):
        read(frame_of(b'WorkerLost {"worker": 1, "kind": "bored"}'))


@pytest.mark.parametrize("length", [wire.MAX_FRAME + 1, 2**32 - 1])
def test_a_giant_length_is_refused_before_anything_of_it_comes(length: int) -> None:
    with pytest.raises(FrameError, match="claims"):
        read(wire.HEADER.pack(length))


def test_a_message_over_the_limit_is_not_sent() -> None:
    with pytest.raises(FrameError, match="over the limit"):
        wire.frame(WorkerLost(0, message="x" * (wire.MAX_FRAME + 1)))


def test_what_came_whole_before_garbage_is_kept() -> None:
    messages = FrameReader().feed(wire.frame(wire.Leave()) + b"\xff" * 8)
    assert next(messages) == wire.Leave()
    with pytest.raises(FrameError):
        next(messages)


def test_a_frame_is_a_length_a_name_and_json() -> None:
    data = wire.frame(BatchEnded(1, 2, (Receipt(3, 1, 16, 16),), (), frozenset({"a"})))
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    name, _, text = data[4:].partition(b" ")
    assert name == b"BatchEnded"
    assert json.loads(text)["receipts"][0]["seq"] == 3
