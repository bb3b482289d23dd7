"""From results to receipts: on threads ahead of the driver, or one after the other."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
from PIL.Image import Image, new

from imagemill.errors import BadOutput
from imagemill.records import (
    BatchEnded,
    BatchMade,
    Event,
    PlannedTask,
    Span,
    WorkOrder,
)
from imagemill.runners import Result
from imagemill.saving import Saver
from imagemill.sinks import Stored
from orders import fake_task, order_of

HELD = frozenset({"model:fake"})


class SlowSink:
    """Keeps nothing, and not before it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.threads: set[str] = set()

    def store(self, image: Image, planned: PlannedTask, attempt: int, facts: Mapping[str, Any]) -> Stored:
        assert self.go.wait(20)
        self.threads.add(threading.current_thread().name)
        if planned.task.prompt == "full":
            raise OSError(28, "No space left on device")
        return Stored("t", f"{planned.task.id}.png", 7, "ab")


class Desk:
    """A saver, its sink and what it said."""

    def __init__(self, *, ahead: bool) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.sink = SlowSink()
        self.saver = Saver(3, self.hear, ahead=ahead)

    def hear(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, BatchEnded):
            self.ended.set()


def order(*prompts: str) -> WorkOrder:
    return order_of(*(fake_task(seq, prompt=prompt) for seq, prompt in enumerate(prompts)), batch=9, attempt=2)


def made(seq: int) -> Result:
    return Result(
        seq, image=new("RGB", (16, 16)), seconds={"denoise": 0.5}, spans=(Span("denoise", 1.0, 0.5, seq=seq),)
    )


def test_ahead_the_device_is_free_before_the_pictures_are_saved() -> None:
    desk = Desk(ahead=True)
    batch = desk.saver.batch(order("a", "b"))
    batch.take(made(0), desk.sink)
    batch.take(Result(1, arrive=lambda: made(1)), desk.sink)
    batch.made(HELD, 123, ("in tiles",))
    assert desk.events == [BatchMade(3, 9, HELD)]
    desk.sink.go.set()
    assert desk.ended.wait(20)
    ended = desk.events[1]
    assert isinstance(ended, BatchEnded)
    assert {receipt.seq: (receipt.attempt, receipt.peak_memory) for receipt in ended.receipts} == {
        0: (2, 123),
        1: (2, 123),
    }
    assert ended.notes == ("in tiles",)
    assert sorted(span.stage for span in ended.spans) == ["denoise", "denoise", "save", "save"]
    assert all(set(receipt.seconds) == {"denoise", "save"} for receipt in ended.receipts)
    assert threading.current_thread().name not in desk.sink.threads
    desk.saver.close()


def test_a_batch_that_calls_the_next_early_says_when_it_is_made() -> None:
    desk = Desk(ahead=True)
    batch = desk.saver.batch(order("a"))
    batch.call_next(frozenset())
    batch.call_next(frozenset())
    assert desk.events == [BatchMade(3, 9, frozenset(), made=False)]
    batch.take(made(0), desk.sink)
    batch.made(HELD, 0, ())
    assert desk.events[1:] == [BatchMade(3, 9, HELD)]
    desk.sink.go.set()
    assert desk.ended.wait(20)
    desk.saver.close()


def test_without_it_each_picture_is_saved_before_the_next_is_asked_for() -> None:
    desk = Desk(ahead=False)
    desk.sink.go.set()
    batch = desk.saver.batch(order("a"))
    batch.take(made(0), desk.sink)
    assert desk.sink.threads == {threading.current_thread().name}
    assert desk.events == []
    batch.made(HELD, 0, ())
    (ended,) = desk.events
    assert isinstance(ended, BatchEnded)
    assert [receipt.seq for receipt in ended.receipts] == [0]
    desk.saver.close()


@pytest.mark.parametrize("ahead", [True, False])
def test_what_goes_wrong_costs_its_own_task(ahead: bool) -> None:
    def lost() -> Result:
        raise BadOutput("the picture contains NaN")

    desk = Desk(ahead=ahead)
    desk.sink.go.set()
    batch = desk.saver.batch(order("a", "b", "full", "never made"))
    batch.take(made(0), desk.sink)
    batch.take(Result(1, arrive=lost), desk.sink)
    batch.take(made(2), desk.sink)
    batch.fail(RuntimeError("CUDA out of memory"))
    batch.made(HELD, 0, ())
    assert desk.ended.wait(20)
    ended = desk.events[-1]
    assert isinstance(ended, BatchEnded)
    assert [receipt.seq for receipt in ended.receipts] == [0]
    kinds = {failure.seq: (failure.kind, failure.ends_run) for failure in ended.failures}
    assert kinds[1] == ("bad_output", False)
    assert kinds[2][1], "a full disk is nothing of the task's"
    assert set(kinds) == {1, 2, 3}
    desk.saver.close()


def test_leaving_waits_for_what_is_being_saved() -> None:
    desk = Desk(ahead=True)
    batch = desk.saver.batch(order("a"))
    batch.take(made(0), desk.sink)
    batch.made(HELD, 0, ())
    threading.Timer(0.05, desk.sink.go.set).start()
    desk.saver.close()
    assert desk.ended.is_set()
