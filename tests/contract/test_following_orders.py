"""A worker tells its runner which order waits while another is at work, in both executors' loops."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from imagemill import wire
from imagemill.executors import inline
from imagemill.records import (
    BatchEnded,
    BatchMade,
    Event,
    ModelSpec,
    WorkerSpec,
    WorkOrder,
)
from imagemill.runners.fake import FakeRunner
from imagemill.worker import Inbox, Worker, serve
from orders import FAKE, fake_task, order_of

SPEC = WorkerSpec(0, "cpu", "CPU 0", FAKE)


def order(batch: int, model: ModelSpec = FAKE) -> WorkOrder:
    return order_of(fake_task(batch, steps=2), model=model, batch=batch)


def by_process(messages: queue.SimpleQueue[Any], emit: Callable[[Event], None]) -> None:
    serve(SPEC, messages, emit)


def by_thread(messages: queue.SimpleQueue[Any], emit: Callable[[Event], None]) -> None:
    inbox = Inbox(messages)
    worker = Worker(SPEC, emit, lambda: None, inbox.next_order)
    inline._take_orders(worker, inbox, threading.Event())
    worker.close()


@pytest.mark.parametrize("loop", [by_process, by_thread])
def test_the_waiting_order_is_told_and_still_comes(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    events: list[Event] = []
    monkeypatch.setattr(FakeRunner, "wants_next", True)
    monkeypatch.setattr(FakeRunner, "follow", lambda self, order: told.append(order.batch))
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for message in (wire.LoadModel(None), order(1), order(2), order(3), wire.Leave()):
        messages.put(message)
    loop(messages, events.append)
    assert [event.batch for event in events if isinstance(event, BatchEnded)] == [1, 2, 3]
    assert list(dict.fromkeys(told)) == [2, 3]


def test_an_order_for_another_model_and_a_message_of_another_kind_are_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[int] = []
    events: list[Event] = []
    monkeypatch.setattr(FakeRunner, "wants_next", True)
    monkeypatch.setattr(FakeRunner, "follow", lambda self, order: told.append(order.batch))
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    other = replace(FAKE, revision="s")
    for message in (wire.LoadModel(None), order(1), order(2, other), wire.LoadModel(None), order(3), wire.Leave()):
        messages.put(message)
    by_process(messages, events.append)
    assert [event.batch for event in events if isinstance(event, BatchEnded)] == [1, 2, 3]
    assert told == []


@pytest.mark.parametrize(("ahead", "wants"), [(True, True), (False, True), (True, False)])
def test_the_next_order_is_asked_for_early_where_the_runner_wants_it_and_pictures_are_saved_on_threads(
    ahead: bool, wants: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work: list[bool] = []
    events: list[Event] = []
    run = FakeRunner.run

    def watched(self: FakeRunner, order: WorkOrder, beat: Any) -> Any:
        yield from run(self, order, beat)
        at_work.append(any(isinstance(event, BatchMade) for event in events))

    monkeypatch.setattr(FakeRunner, "wants_next", wants)
    monkeypatch.setattr(FakeRunner, "run", watched)
    worker = Worker(replace(SPEC, ahead=ahead), events.append, lambda: None)
    assert worker.load()
    worker.work(order(1))
    worker.close()
    assert at_work == [ahead and wants]
    early = [event.batch for event in events if isinstance(event, BatchMade) and not event.made]
    assert early == ([1] if ahead and wants else [])
    assert [event.batch for event in events if isinstance(event, BatchEnded)] == [1]


def test_an_inbox_gives_each_message_once_and_in_order() -> None:
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    inbox = Inbox(messages)
    assert inbox.next_order() is None
    first = order(1)
    messages.put(first)
    messages.put(wire.Leave())
    assert inbox.next_order() is first
    assert inbox.next_order() is first
    assert inbox.take() is first
    assert inbox.next_order() is None
    assert isinstance(inbox.take(), wire.Leave)
