"""Retry: what becomes of a task after each kind of failure."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from imagemill.errors import KINDS
from imagemill.records import Kind, Try
from imagemill.retry import FIRST_DELAY, LONGEST_DELAY, Decision, backoff, blames_device, decide, doubt


def tries(*kinds: Kind, size: int = 1) -> list[Try]:
    """One try after another, each on a worker of its own."""
    return [Try(number + 1, number, kind, kind, size) for number, kind in enumerate(kinds)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_rule_and_none_is_tried_for_ever(kind: Kind) -> None:
    actions = [decide(tries(*[kind] * number), max_attempts=3).action for number in range(1, 5)]
    assert actions[-1] == "give_up"
    assert "give_up" in actions[:3]


@pytest.mark.parametrize("kind", ["bad_task", "bad_model"])
@pytest.mark.parametrize("size", [1, 8])
def test_what_would_fail_everywhere_is_given_up_at_once(kind: Kind, size: int) -> None:
    assert decide(tries(kind, size=size), max_attempts=3) == Decision("give_up")


def test_out_of_memory_splits_a_batch_and_a_lone_task_gets_one_more_try() -> None:
    assert decide(tries("oom", size=4), 3).action == "split"
    assert decide(tries("oom"), 3).action == "elsewhere"
    assert decide(tries("oom", size=4) + tries("oom"), 3).action == "elsewhere"
    assert decide(tries("oom", "oom"), 3).action == "give_up"


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_passing_failure_is_tried_max_attempts_times_with_growing_delays(most: int) -> None:
    decisions = [decide(tries(*["transient"] * number), most) for number in range(1, most + 1)]
    assert [decision.action for decision in decisions] == ["again"] * (most - 1) + ["give_up"]
    delays = [decision.delay for decision in decisions[:-1]]
    assert delays == sorted(set(delays))
    assert all(delay > 0 for delay in delays)


def test_bad_output_goes_elsewhere_once() -> None:
    assert [decide(tries(*["bad_output"] * number), 9).action for number in (1, 2)] == ["elsewhere", "give_up"]


@pytest.mark.parametrize(("first", "second"), [("worker_lost", "timeout"), ("timeout", "timeout")])
def test_a_task_that_cost_two_workers_alone_is_given_up(first: Kind, second: Kind) -> None:
    assert decide(tries(first), 9).action == "elsewhere"
    assert decide(tries(first, second), 9).action == "give_up"


def test_a_worker_lost_with_a_whole_batch_is_not_held_against_its_members() -> None:
    together = tries("worker_lost", size=4)
    assert decide(together, 3).action == "elsewhere"
    assert decide(together + tries("worker_lost"), 3).action == "elsewhere"
    assert decide(together + tries("worker_lost", "worker_lost"), 3).action == "give_up"


def test_a_worker_lost_to_another_batch_is_not_held_against_a_task() -> None:
    before = [replace(one, shared=True, bystander=True) for one in tries("worker_lost")]
    assert decide(before, 3).action == "elsewhere"
    assert decide(before + tries("worker_lost"), 3).action == "elsewhere"
    assert decide(before + tries("worker_lost", "timeout"), 3).action == "give_up"


@pytest.mark.parametrize("kind", ["worker_lost", "timeout"])
def test_a_loss_in_company_speaks_less_against_a_device_than_what_a_task_met_there_alone(kind: Kind) -> None:
    (own,), (together,) = tries(kind), tries(kind, size=2)
    others = [together, replace(own, shared=True), replace(own, bystander=True)]
    assert [doubt(one) for one in others] == [1, 1, 1]
    assert [doubt(one) for one in (own, *tries("bad_output", "oom"), *tries("bad_output", size=2))] == [2, 2, 2, 2]
    assert [doubt(one) for one in (*tries("transient"), *tries("oom", size=2))] == [0, 0]


def test_failures_of_different_kinds_are_counted_apart() -> None:
    mixed = tries("transient", "oom", "bad_output", "worker_lost", "transient")
    assert decide(mixed, 3).action == "again"
    assert decide(mixed + tries("transient"), 3).action == "give_up"


def test_back_off_grows_from_the_first_delay_to_the_longest() -> None:
    delays = [backoff(failures) for failures in range(1, 20)]
    assert delays[0] == FIRST_DELAY
    assert delays == sorted(delays)
    assert all(later == min(2 * earlier, LONGEST_DELAY) for earlier, later in pairwise(delays))
    assert backoff(0) == 0.0
    assert backoff(10**6) == LONGEST_DELAY


@pytest.mark.parametrize("kind", ["oom", "worker_lost", "timeout"])
def test_a_failure_of_a_whole_batch_does_not_blame_the_device(kind: Kind) -> None:
    assert blames_device(tries(kind)[0])
    assert not blames_device(tries(kind, size=2)[0])
    assert blames_device(tries("bad_output", size=2)[0])
