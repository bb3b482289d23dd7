"""Scheduler: one promise a test, told as a short story of events and what it answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import pytest

from imagemill.records import (
    Batch,
    BatchEnded,
    BatchMade,
    Cancel,
    Command,
    Dispatch,
    Drain,
    Event,
    Failure,
    Halt,
    Kill,
    Kind,
    Load,
    Receipt,
    Settle,
    SourceEnded,
    Spawn,
    TasksArrived,
    Tick,
    Ticket,
    WorkerBeat,
    WorkerLost,
    WorkerReady,
)
from imagemill.schedule import BLAME_AT_MOST, LOADS_AT_MOST, LOSSES_AT_MOST, Limits, Scheduler

C = TypeVar("C")
NEEDS = ("model:m",)


class Story:
    """A scheduler, the clock, and every command so far. Spawned workers load and are ready at once, unless told not to."""

    def __init__(self, workers: int = 2, policy: str = "dynamic", lead: int = 1, *, ready: bool = True, **limits: Any):
        self.scheduler = Scheduler({n: f"GPU {n}" for n in range(workers)}, policy, lead, Limits(**limits))
        self.now = 0.0
        self.ready = ready
        self.all: list[Command] = []
        self.turns = 0

    def tell(self, *events: Event) -> list[Command]:
        """What it answers to the events, answers to loads that end at once included."""
        commands: list[Command] = []
        queue = list(events)
        while queue:
            answer = self.scheduler.on(queue.pop(0), self.now)
            commands += answer
            if self.ready:
                queue += [WorkerReady(one.worker, frozenset()) for one in answer if isinstance(one, Load)]
        self.all += commands
        return commands

    def tasks(
        self, number: int, first: int = 0, needs: tuple[str, ...] = NEEDS, *, ended: bool = True
    ) -> list[Command]:
        """Tasks arrive, all alike; the source then ends."""
        arrived = TasksArrived(tuple(Ticket(seq, needs) for seq in range(first, first + number)))
        return self.tell(arrived, *[SourceEnded()] * ended)

    def wait(self, seconds: float) -> list[Command]:
        """Time passes, then a Tick."""
        self.now += seconds
        return self.tell(Tick())

    def batch(self, worker: int) -> Batch:
        """What the worker has at hand."""
        batch = self.scheduler.board.workers[worker].batch
        assert batch
        return batch

    def done(self, worker: int) -> list[Command]:
        """The worker ends its batch well."""
        batch = self.batch(worker)
        receipts = tuple(Receipt(t.seq, a, 1, 1) for t, a in zip(batch.tickets, batch.attempts, strict=True))
        return self.tell(BatchEnded(worker, batch.id, receipts, (), frozenset(batch.needs)))

    def made(self, worker: int, *, made: bool = True) -> list[Command]:
        """The worker's batch leaves the device, or is about to: it calls for the next one."""
        batch = self.batch(worker)
        return self.tell(BatchMade(worker, batch.id, frozenset(batch.needs), made))

    def fails(self, worker: int, kind: Kind, batch: Batch | None = None) -> list[Command]:
        """Every task of the worker's batch fails; another than the one at hand may be said."""
        batch = batch or self.batch(worker)
        failures = tuple(Failure(t.seq, a, kind, kind) for t, a in zip(batch.tickets, batch.attempts, strict=True))
        return self.tell(BatchEnded(worker, batch.id, (), failures, frozenset(batch.needs)))

    def dies(self, worker: int, kind: Kind = "worker_lost") -> list[Command]:
        """The worker's process is gone."""
        return self.tell(WorkerLost(worker, kind, "killed by SIGKILL"))

    def goes_on(self) -> bool:
        """Whether it has not halted; fails when it never will."""
        self.turns += 1
        assert self.turns < 1000, "it never halts"
        return not self.of(Halt)

    def state(self, worker: int) -> str:
        """The worker's state."""
        return self.scheduler.board.workers[worker].state

    def of(self, kind: type[C]) -> list[C]:
        """Every command of that kind so far."""
        return only(self.all, kind)


def only(commands: Iterable[Command], kind: type[C]) -> list[C]:
    return [command for command in commands if isinstance(command, kind)]


def given(commands: Iterable[Command]) -> dict[int, list[int]]:
    """The tasks dispatched, by worker."""
    return {one.worker: [ticket.seq for ticket in one.batch.tickets] for one in only(commands, Dispatch)}


# --- workers die --------------------------------------------------------------------------------------------------------


def test_a_killed_worker_costs_only_its_own_batch() -> None:
    story = Story(batch=lambda _: 2)
    story.tasks(4)
    story.dies(0)
    assert story.of(Settle) == []
    assert [ticket.seq for ticket in story.batch(1).tickets] == [2, 3]
    again = story.done(1)
    assert given(again) == {1: [0]}
    assert only(again, Dispatch)[0].batch.attempts == (2,)
    story.done(1)
    assert only(story.done(1), Halt)[0].reason == "done"
    settled = story.of(Settle)
    assert sorted(one.seq for one in settled) == [0, 1, 2, 3]
    assert all(one.receipt for one in settled)
    assert {one.seq: one.attempts for one in settled} == {0: 2, 1: 2, 2: 1, 3: 1}


def test_a_task_that_kills_workers_on_two_devices_is_given_up_and_the_rest_go_on() -> None:
    story = Story(workers=3)
    story.tasks(4)
    story.dies(0)
    given_up = [*story.done(1), *story.dies(1)]
    (poison,) = [one for one in only(given_up, Settle) if one.failure]
    assert (poison.seq, poison.attempts, poison.failure and poison.failure.kind) == (0, 2, "worker_lost")
    assert {one.worker for one in poison.tries} == {0, 1}
    assert "GPU 1" in (poison.failure.message if poison.failure else "")
    story.done(2)
    assert only(story.done(2), Halt)[0].reason == "done"


def test_a_poison_task_on_the_only_device_is_given_up_after_two_workers() -> None:
    story = Story(workers=1)
    story.tasks(2)
    story.dies(0)
    story.wait(1)
    assert [ticket.seq for ticket in story.batch(0).tickets] == [0]
    (poison,) = only(story.dies(0), Settle)
    assert (poison.seq, poison.attempts) == (0, 2)
    story.wait(10)
    assert only(story.done(0), Halt)[0].reason == "done"


def test_a_task_that_failed_on_the_only_worker_needed_goes_to_one_that_was_not_started() -> None:
    story = Story(workers=3)
    story.tasks(1)
    assert {one.worker for one in story.of(Spawn)} == {0}
    elsewhere = story.fails(0, "bad_output")
    assert [one.worker for one in only(elsewhere, Spawn)] == [1]
    assert given(elsewhere) == {1: [0]}
    assert only(story.done(1), Halt)[0].reason == "done"


def test_a_worker_on_the_leash_does_not_keep_a_retry_from_the_only_other_one() -> None:
    story = Story(workers=3, policy="window")
    story.tasks(2)
    story.fails(0, "bad_output")
    story.scheduler.board.workers[1].completed = 9
    assert given(story.done(1)) == {0: [0]}


def test_the_members_of_a_killed_batch_are_tried_alone_and_only_the_poison_one_is_given_up() -> None:
    story = Story(workers=2, batch=lambda _: 3)
    story.tasks(3)
    story.dies(0)
    while story.goes_on():
        story.wait(31)
        for worker in (0, 1):
            if story.state(worker) == "busy":
                assert len(story.batch(worker).tickets) == 1
                _ = story.dies(worker) if story.batch(worker).tickets[0].seq == 1 else story.done(worker)
    assert {one.seq: bool(one.receipt) for one in story.of(Settle)} == {0: True, 1: False, 2: True}


@pytest.mark.parametrize("poisoned", [False, True])
def test_an_order_that_waited_when_its_worker_was_lost_loses_no_life(poisoned: bool) -> None:
    """The one before it calls for it early and may end the worker, or spoil the device's context, before it begins."""
    story = Story(workers=1)
    story.tasks(2)
    first = story.batch(0)
    assert given(story.made(0, made=False)) == {0: [1]}
    if poisoned:
        assert only(story.fails(0, "worker_lost", first), Kill)
    assert only(story.dies(0), Settle) == []
    while story.goes_on():
        story.wait(31.0)
        if story.state(0) == "busy" and [ticket.seq for ticket in story.batch(0).tickets] == [0]:
            story.done(0)
        elif story.state(0) == "busy":
            attempt = story.batch(0).attempts[0]
            assert (story.dies(0) if attempt == 2 else story.done(0)) is not None
    assert {one.seq: one.attempts for one in story.of(Settle) if one.receipt} == {0: 2, 1: 3}


@pytest.mark.parametrize(("poison", "begun", "attempts"), [(0, False, 2), (1, False, 3), (0, True, 2), (1, True, 2)])
def test_of_two_orders_lost_together_the_poison_one_is_still_given_up(poison: int, begun: bool, attempts: int) -> None:
    """The second has not begun until the worker says that the last steps of the first are over."""
    story = Story(workers=1)
    story.tasks(2)
    first = story.batch(0)
    story.made(0, made=False)
    if begun:
        story.tell(BatchMade(0, first.id, frozenset(first.needs)))
    story.dies(0)
    while story.goes_on():
        story.wait(31.0)
        if story.state(0) == "busy":
            (story.dies if story.batch(0).tickets[0].seq == poison else story.done)(0)
    settled = {one.seq: (one.failure.kind if one.failure else "done", one.attempts) for one in story.of(Settle)}
    assert settled == {poison: ("worker_lost", attempts), 1 - poison: ("done", 2)}


@pytest.mark.parametrize("poisons", [False, True])
def test_many_tasks_that_each_cost_two_workers_put_no_device_out(poisons: bool) -> None:
    """Whether they end the process or poison the device's context."""
    story = Story(workers=1)
    story.tasks(LOSSES_AT_MOST - 1)
    while story.goes_on():
        story.wait(31.0)
        if story.state(0) == "busy":
            if poisons:
                story.fails(0, "worker_lost")
            story.dies(0)
    assert [halt.reason for halt in story.of(Halt)] == ["done"]
    assert len(story.of(Settle)) == LOSSES_AT_MOST - 1


def test_what_a_spoilt_context_takes_along_does_not_blame_the_device() -> None:
    """All four tasks are done by the other device, which speaks twice against this one."""
    story = Story(workers=2)
    story.tasks(30)
    for _ in range(2):
        first = story.batch(0)
        story.made(0)
        story.fails(0, "worker_lost", first)
        story.dies(0)
        for _ in range(4):
            story.done(1)
        story.wait(31.0)
    worker = story.scheduler.board.workers[0]
    assert (worker.state, worker.blame) == ("busy", 2)


def test_an_early_call_is_over_with_its_batch() -> None:
    """What comes later is no bystander any more."""
    story = Story(workers=1)
    story.tasks(2)
    first = story.batch(0)
    story.made(0, made=False)
    story.tell(BatchEnded(0, first.id, (Receipt(0, 1, 1, 1),), (), frozenset(first.needs)))
    story.dies(0)
    story.wait(31.0)
    assert [one.attempts for one in only(story.dies(0), Settle)] == [2]


def test_a_retry_waits_for_a_leashed_worker_that_called_for_more_early() -> None:
    """The pictures of its batch are not there yet, so the leash keeps it from more; a broken device must not get its task
    back for that."""
    story = Story(policy="window", lead=2)
    story.tasks(4)
    story.made(1)
    story.made(1, made=False)
    assert given(story.fails(0, "bad_output")) != {0: [0]}


def test_back_off_grows_with_each_loss_in_a_row_and_a_finished_task_resets_it() -> None:
    story = Story(workers=1)
    story.tasks(20)
    worker, delays = story.scheduler.board.workers[0], []
    for _ in range(5):
        story.dies(0)
        delays.append(worker.not_before - story.now)
        assert story.scheduler.wake_at() == worker.not_before
        assert only(story.wait(delays[-1] / 2), Spawn) == []
        assert len(only(story.wait(delays[-1]), Spawn)) == 1
    assert delays == sorted(set(delays))
    story.done(0)
    story.dies(0)
    assert worker.not_before - story.now == delays[0]


def test_a_worker_that_only_dies_is_not_started_for_ever() -> None:
    story = Story(workers=1)
    story.tasks(100)
    while not story.of(Halt):
        story.dies(0)
        story.wait(31)
    assert only(story.all, Halt) == [Halt("no_workers", story.of(Halt)[0].message)]
    again = 1  # the first task, which was given up; from the third loss on others were tried
    assert len(story.of(Spawn)) == LOSSES_AT_MOST + again


def test_a_poisoned_context_ends_the_worker_and_its_task_goes_elsewhere() -> None:
    story = Story()
    story.tasks(2)
    assert [one.worker for one in only(story.fails(0, "worker_lost"), Kill)] == [0]
    assert given(story.done(1)) == {1: [0]}
    story.dies(0)
    assert only(story.done(1), Halt)[0].reason == "done"


def test_a_task_that_another_took_down_gets_its_second_try_on_that_device_not_on_one_that_makes_nan() -> None:
    story = Story(batch=lambda _: 2)
    story.tasks(2)
    assert given(story.dies(0)) == {1: [0]}  # one of the two kills, the other was only there
    assert given(story.done(1)) == {1: [1]}
    assert given(story.fails(1, "bad_output")) == {}
    assert given(story.wait(1)) == {0: [1]}
    assert only(story.done(0), Halt)[0].reason == "done"


# --- deadlines ----------------------------------------------------------------------------------------------------------


def test_a_silent_worker_is_killed_at_its_deadline() -> None:
    story = Story(workers=1, task_timeout=60)
    story.tasks(1)
    assert story.scheduler.wake_at() == 60
    assert story.wait(59.9) == []
    assert [one.worker for one in only(story.wait(0.1), Kill)] == [0]
    assert only(story.wait(1000), Kill) == []
    story.dies(0)
    story.wait(1)
    story.wait(60)
    (settled,) = only(story.dies(0), Settle)
    assert settled.failure
    assert settled.failure.kind == "timeout"
    assert "silent for 60 s" in settled.failure.message


def test_a_beating_worker_is_left_alone() -> None:
    story = Story(workers=1, task_timeout=60)
    story.tasks(1)
    for _ in range(20):
        assert story.wait(59) == []
        assert story.tell(WorkerBeat(0, 0, 1, 8)) == []
        assert story.scheduler.wake_at() == story.now + 60
    assert only(story.done(0), Halt)[0].reason == "done"


def test_a_worker_silent_while_loading_is_killed_and_one_that_beats_is_not() -> None:
    story = Story(workers=1, ready=False, load_timeout=100)
    story.tasks(1)
    story.wait(99)
    story.tell(WorkerBeat(0))
    assert only(story.wait(99), Kill) == []
    assert [one.worker for one in only(story.wait(1), Kill)] == [0]


def test_a_worker_that_is_ready_only_after_it_was_killed_gets_nothing() -> None:
    story = Story(workers=1, ready=False, load_timeout=100)
    story.tasks(1)
    assert only(story.wait(100), Kill)
    assert story.tell(WorkerBeat(0), WorkerReady(0, frozenset())) == []
    assert only(story.wait(1000), Kill) == []
    story.dies(0)
    assert only(story.wait(1), Spawn) == [Spawn(0)]


# --- memory -------------------------------------------------------------------------------------------------------------


def test_out_of_memory_splits_the_batch_and_the_limit_is_remembered() -> None:
    story = Story(workers=1, batch=lambda _: 8)
    story.tasks(16)
    assert len(story.batch(0).tickets) == 8
    story.fails(0, "oom")
    sizes = []
    while story.goes_on():
        sizes.append(len(story.batch(0).tickets))
        story.done(0)
    assert sizes == [4, 4, 4, 4]
    assert all(one.receipt for one in story.of(Settle))
    assert sum(one.attempts for one in story.of(Settle)) == 16 + 8


def test_the_limit_after_out_of_memory_holds_for_its_own_kind_of_batch_only() -> None:
    story = Story(workers=1, batch=lambda _: 4)
    story.tell(
        TasksArrived(tuple(Ticket(seq, NEEDS, "large" if seq < 4 else "small") for seq in range(8))), SourceEnded()
    )
    story.fails(0, "oom")
    sizes = {}
    while story.goes_on():
        sizes[story.batch(0).tickets[0].group] = len(story.batch(0).tickets)
        story.done(0)
    assert sizes == {"large": 2, "small": 4}


def test_a_lone_task_out_of_memory_is_tried_once_more_then_given_up() -> None:
    story = Story(workers=2)
    story.tasks(2)
    story.fails(0, "oom")
    assert given(story.done(1)) == {1: [0]}
    (settled,) = only(story.fails(1, "oom"), Settle)
    assert settled.failure
    assert (settled.failure.kind, settled.attempts) == ("oom", 2)


def test_a_batch_too_large_for_one_device_does_not_count_against_that_device() -> None:
    story = Story(workers=2, batch=lambda _: 16)
    story.tell(TasksArrived(tuple(Ticket(seq, NEEDS, str(seq // 16)) for seq in range(32))), SourceEnded())
    story.fails(0, "oom")
    story.fails(1, "oom")
    while story.goes_on():
        for worker in (1, 0):
            if story.state(worker) == "busy":
                story.done(worker)
    assert story.of(Kill) == []
    assert all(one.receipt for one in story.of(Settle))


# --- loading ------------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_loaded_halts_the_run() -> None:
    story = Story(ready=False)
    story.tasks(2)
    assert only(story.dies(0, "bad_model"), Halt) == [Halt("bad_model", "killed by SIGKILL")]


def test_a_model_that_cannot_be_loaded_lets_what_is_in_flight_end_first() -> None:
    story = Story(ready=False)
    story.tasks(5)
    story.tell(WorkerReady(0, frozenset()))
    assert story.dies(1, "bad_model") == []
    ended = story.done(0)
    assert only(ended, Settle)
    assert given(ended) == {}
    assert only(ended, Halt)[0].reason == "bad_model"


def test_a_device_is_quarantined_after_three_failed_loads_while_the_rest_finish() -> None:
    story = Story(ready=False)
    story.tasks(2)
    for _ in range(LOADS_AT_MOST):
        assert story.state(0) == "loading"
        story.dies(0)
        if story.state(1) == "loading":
            story.tell(WorkerReady(1, frozenset()))
        story.wait(31)
    assert story.state(0) == "quarantined"
    story.done(1)
    assert only(story.done(1), Halt)[0].reason == "done"
    assert [one.worker for one in story.of(Load)].count(0) == LOADS_AT_MOST


def test_the_only_task_is_done_by_the_second_device_when_the_first_never_loads() -> None:
    story = Story(ready=False)
    story.tasks(1)
    for _ in range(LOADS_AT_MOST):
        story.dies(0)
        story.wait(31)
    story.tell(WorkerReady(1, frozenset()))
    assert only(story.done(1), Halt)[0].reason == "done"


def test_the_run_halts_with_no_workers_when_all_are_quarantined() -> None:
    story = Story(ready=False)
    story.tasks(2)
    for _ in range(2 * LOADS_AT_MOST):
        for worker in (0, 1):
            if story.state(worker) == "loading":
                story.dies(worker)
        story.wait(31)
    (halt,) = story.of(Halt)
    assert halt.reason == "no_workers"
    assert "GPU 1" in halt.message
    assert story.of(Settle) == []


@pytest.mark.parametrize("at_a_time", [1, 2, 4])
def test_loads_are_serial_up_to_parallel_loads(at_a_time: int) -> None:
    story = Story(workers=4, ready=False, parallel_loads=at_a_time)
    story.tasks(4)
    assert len(story.of(Spawn)) == 4
    assert [one.worker for one in story.of(Load)] == list(range(at_a_time))
    for worker in range(4):
        story.tell(WorkerReady(worker, frozenset()))
        assert len(story.of(Load)) == min(4, worker + 1 + at_a_time)


@pytest.mark.parametrize("policy", ["dynamic", "static", "lockstep", "window"])
def test_never_more_workers_are_started_than_tasks_have_come(policy: str) -> None:
    story = Story(workers=4, policy=policy)
    assert story.tell(Tick()) == []
    story.tasks(1, ended=False)
    assert len(story.of(Spawn)) == 1
    story.tasks(2, first=1, ended=False)
    assert len(story.of(Spawn)) == 3
    story.tasks(9, first=3)
    assert len(story.of(Spawn)) == 4


# --- policies in the scheduler ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lockstep", "window"])
def test_policies_in_step_wait_for_all_workers_before_the_first_task(policy: str) -> None:
    story = Story(workers=3, policy=policy, ready=False)
    story.tell(Tick())
    story.tasks(6)
    for worker in (0, 1):
        assert given(story.tell(WorkerReady(worker, frozenset()))) == {}
    assert given(story.tell(WorkerReady(2, frozenset()))).keys() == {0, 1, 2}


def test_a_common_start_does_not_wait_for_a_worker_that_failed_to_load() -> None:
    story = Story(workers=2, policy="lockstep", ready=False)
    story.tasks(4)
    story.tell(WorkerReady(0, frozenset()))
    assert given(story.dies(1)) == {0: [0]}


def test_dynamic_starts_with_the_first_ready_worker() -> None:
    story = Story(workers=2, ready=False)
    story.tasks(4)
    assert given(story.tell(WorkerReady(0, frozenset()))) == {0: [0]}


def test_lockstep_retries_inside_the_open_round() -> None:
    story = Story(workers=2, policy="lockstep")
    assert given(story.tasks(4)) == {0: [0], 1: [1]}
    assert given(story.done(1)) == {}
    assert given(story.fails(0, "bad_output")) == {1: [0]}
    assert story.scheduler.rounds_done == 0
    assert given(story.done(1)) == {0: [2], 1: [3]}
    assert story.scheduler.rounds_done == 1


@pytest.mark.parametrize("policy", ["dynamic", "static", "lockstep", "window"])
def test_enough_is_read_ahead_for_every_worker_however_small_the_bound(policy: str) -> None:
    story = Story(workers=4, policy=policy, read_ahead=1)
    first = 0
    while wanted := story.scheduler.wanted():
        story.tasks(wanted, first, ended=False)
        first += wanted
    assert len(given(story.all)) == 4


def test_the_source_is_read_no_further_ahead_than_the_bound() -> None:
    story = Story(workers=1, read_ahead=10)
    story.tasks(10, ended=False)
    assert story.scheduler.wanted() == 1
    story.tasks(1, first=10, ended=False)
    assert story.scheduler.wanted() == 0
    story.done(0)
    assert story.scheduler.wanted() == 1


def test_what_waits_behind_one_slow_task_is_bounded() -> None:
    story = Story(workers=2, read_ahead=10)
    story.tasks(1, ended=False)
    arrived = 1
    while wanted := story.scheduler.wanted():
        story.tasks(wanted, arrived, ended=False)
        arrived += wanted
        while story.state(1) == "busy":
            story.done(1)
    assert arrived == 40


# --- stale and lying events ---------------------------------------------------------------------------------------------


def test_a_stale_batch_ended_is_ignored() -> None:
    story = Story(workers=1)
    story.tasks(2)
    old = story.batch(0)
    receipts = (Receipt(0, 1, 1, 1),)
    story.done(0)
    assert story.tell(BatchEnded(0, old.id, receipts, (), frozenset())) == []
    assert story.state(0) == "busy"
    story.dies(0)
    assert story.tell(BatchEnded(0, old.id, receipts, (), frozenset())) == []
    assert [one.seq for one in story.of(Settle)] == [0]


def test_a_batch_that_ends_after_its_worker_was_killed_is_ignored() -> None:
    story = Story(workers=2, task_timeout=60)
    story.tasks(1)
    story.wait(60)
    assert story.tell(BatchEnded(0, story.batch(0).id, (Receipt(0, 1, 1, 1),), (), frozenset())) == []
    story.dies(0)
    assert story.of(Settle) == []


def test_a_task_that_its_worker_says_nothing_of_is_tried_again() -> None:
    story = Story(workers=1)
    story.tasks(1)
    batch = story.batch(0)
    assert only(story.tell(BatchEnded(0, batch.id, (), (), frozenset())), Settle) == []
    assert given(story.wait(1)) == {0: [0]}


def test_a_receipt_of_another_attempt_does_not_count() -> None:
    story = Story(workers=1)
    story.tasks(1)
    batch = story.batch(0)
    assert only(story.tell(BatchEnded(0, batch.id, (Receipt(0, 7, 1, 1),), (), frozenset())), Settle) == []


def test_a_second_ready_of_a_busy_worker_changes_nothing() -> None:
    story = Story(workers=1)
    story.tasks(2)
    assert story.tell(WorkerReady(0, frozenset())) == []
    assert story.state(0) == "busy"


# --- devices that only fail ---------------------------------------------------------------------------------------------


def test_a_device_that_only_fails_is_quarantined_when_others_succeed_with_its_tasks() -> None:
    story = Story(workers=2)
    story.tasks(20)
    while story.goes_on():
        if story.state(0) == "busy":
            story.fails(0, "bad_output")
        if only(story.done(1), Kill):
            story.dies(0)
    assert story.state(0) == "quarantined"
    assert [one.worker for one in story.of(Kill)] == [0]
    assert story.of(Halt)[0].reason == "done"
    assert all(one.receipt for one in story.of(Settle))
    blamed = [one for one in story.of(Settle) if any(t.worker == 0 for t in one.tries)]
    # Beside those that proved it: one that had failed and waited, and one that it had at hand.
    assert BLAME_AT_MOST <= len(blamed) <= BLAME_AT_MOST + 2


def test_a_task_in_hand_when_its_device_is_put_out_loses_no_life() -> None:
    story = Story(workers=2)
    story.tasks(20)
    while not story.of(Kill):
        story.fails(0, "bad_output")
        story.done(1)
    (ticket,) = story.batch(0).tickets
    story.dies(0)
    for _ in range(2):
        story.wait(31.0)
        while story.state(1) == "busy" and story.batch(1).tickets[0].seq != ticket.seq:
            story.done(1)
    assert [one.kind for one in story.scheduler.board.in_flight[ticket.seq].tries] == ["worker_lost"]
    assert story.scheduler.board.in_flight[ticket.seq].tries[0].bystander


def test_tasks_that_fail_everywhere_cost_no_device() -> None:
    story = Story(workers=2)
    story.tasks(12)
    while story.goes_on():
        for worker in (0, 1):
            if story.state(worker) == "busy":
                story.fails(worker, "bad_output")
    assert story.of(Kill) == []
    assert all(one.failure and one.attempts == 2 for one in story.of(Settle))


def test_a_bad_task_costs_that_task_alone() -> None:
    story = Story(workers=1)
    story.tasks(2)
    (settled,) = only(story.fails(0, "bad_task"), Settle)
    assert settled.failure
    assert (settled.attempts, settled.failure.kind) == (1, "bad_task")
    assert only(story.done(0), Halt)[0].reason == "done"


# --- the end ------------------------------------------------------------------------------------------------------------


def test_drain_ends_what_is_in_flight_and_starts_nothing_more() -> None:
    story = Story()
    story.tasks(10)
    assert story.tell(Drain()) == []
    assert story.scheduler.wanted() == 0
    assert [type(one) for one in story.done(0)] == [Settle]
    last = story.done(1)
    assert [type(one) for one in last] == [Settle, Halt]
    assert only(last, Halt)[0].reason == "drained"


def test_drain_with_nothing_in_flight_halts_at_once_even_while_workers_load() -> None:
    story = Story(ready=False)
    story.tasks(2)
    assert story.tell(Drain()) == [Halt("drained")]


def test_a_drained_run_does_not_try_again_what_fails() -> None:
    story = Story(workers=1)
    story.tasks(1)
    story.tell(Drain())
    assert story.fails(0, "transient") == [Halt("drained")]


def test_cancel_kills_every_worker_and_halts_at_once() -> None:
    story = Story(workers=3, ready=False)
    story.tasks(2)
    story.tell(WorkerReady(0, frozenset()))
    commands = story.tell(Cancel())
    assert [one.worker for one in only(commands, Kill)] == [0, 1]
    assert commands[-1] == Halt("cancelled")


def test_after_halt_nothing_follows() -> None:
    story = Story(workers=1)
    story.tasks(1)
    story.done(0)
    assert story.scheduler.halted
    assert story.tasks(3, first=1) == []
    assert story.tell(Tick(), WorkerLost(0), Cancel(), Drain()) == []


def test_an_empty_source_is_done_without_a_worker() -> None:
    story = Story()
    assert story.tell(SourceEnded()) == [Halt("done")]


# --- time ---------------------------------------------------------------------------------------------------------------


def test_wake_at_is_never_in_the_past_and_none_when_time_changes_nothing() -> None:
    story = Story(workers=2, task_timeout=60)
    assert story.scheduler.wake_at() is None
    story.tasks(1, ended=False)
    assert story.scheduler.wake_at() == 60
    story.now = 70.0
    story.tasks(1, first=1, ended=False)
    assert story.scheduler.wake_at() == 70.0
    assert only(story.tell(Tick()), Kill)
    assert story.scheduler.wake_at() == 130.0


def test_wake_at_names_the_moment_of_a_retry() -> None:
    story = Story(workers=1)
    story.tasks(1)
    story.now = 5.0
    story.fails(0, "transient")
    wake = story.scheduler.wake_at()
    assert wake is not None
    assert wake > 5.0
    assert given(story.wait(wake - story.now)) == {0: [0]}


def test_idle_seconds_count_waiting_workers_and_held_those_that_the_policy_kept_waiting() -> None:
    story = Story(workers=2, policy="lockstep")
    story.tasks(4)
    story.now += 3
    story.done(0)
    story.now += 4
    story.done(1)
    first, second = story.scheduler.board.workers.values()
    assert (first.idle, first.held) == (4, 4)
    assert (second.idle, second.held) == (0, 0)


def test_a_worker_without_work_is_idle_and_not_held() -> None:
    story = Story(workers=2)
    story.tasks(2)
    story.done(0)
    story.now += 5
    story.done(1)
    first = story.scheduler.board.workers[0]
    assert (first.idle, first.held) == (5, 0)


def test_a_crew_of_an_earlier_run_goes_on_without_loading_again() -> None:
    story = Story(workers=2)
    story.tasks(2)
    story.done(0)
    story.done(1)
    crew = story.scheduler.board.workers
    again = Scheduler({0: "GPU 0", 1: "GPU 1"}, crew=crew)
    commands = again.on(TasksArrived((Ticket(0, NEEDS), Ticket(1, NEEDS))), 100.0)
    assert [type(one) for one in commands] == [Dispatch, Dispatch]
    assert again.board.workers[0].completed == 0
