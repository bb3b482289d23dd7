"""Policies: what each proposes to an idle worker, from a board set up by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from imagemill.backlog import Backlog, Entry
from imagemill.policies import Board, Dynamic, Lockstep, Policy, Static, Window, create
from imagemill.records import Batch, Ticket
from imagemill.worker_state import Worker


def board(workers: int, *, limit: int = 1, patience: int = 100, ended: bool = True) -> Board:
    crew = {number: Worker(number, state="idle") for number in range(workers)}
    return Board(crew, Backlog(), lambda entry: limit, patience, ended)


def arrive(policy: Policy, on: Board, tickets: Sequence[Ticket]) -> list[Entry]:
    entries = [Entry(ticket, ticket.seq) for ticket in tickets]
    for entry in entries:
        on.backlog.add(entry)
    policy.arrived(entries)
    return entries


def simple(number: int) -> list[Ticket]:
    return [Ticket(seq) for seq in range(number)]


def choose(policy: Policy, on: Board, worker: int) -> list[int]:
    """What the worker gets; it is taken from the backlog and the worker is busy with it."""
    entries = policy.choose(on.workers[worker], on)
    for entry in entries:
        on.backlog.take(entry)
        on.in_flight[entry.ticket.seq] = entry
    if entries:
        on.workers[worker].state = "busy"
    return [entry.ticket.seq for entry in entries]


def ends(on: Board, worker: int) -> None:
    on.workers[worker].state = "idle"
    on.workers[worker].completed += 1
    on.in_flight.clear()


# --- dynamic ----------------------------------------------------------------------------------------------------------


def test_dynamic_takes_the_longest_first() -> None:
    policy, on = Dynamic(), board(1)
    arrive(policy, on, [Ticket(0, cost=1.0), Ticket(1, cost=3.0), Ticket(2, cost=2.0)])
    assert [choose(policy, on, 0)[0] for _ in range(3)] == [1, 2, 0]
    assert choose(policy, on, 0) == []


def test_dynamic_prefers_what_the_worker_has_resident_to_what_is_longer() -> None:
    policy, on = Dynamic(), board(1)
    on.workers[0].resident = frozenset({"model:m", "adapters:a"})
    arrive(policy, on, [Ticket(0, ("model:m", "adapters:b"), cost=9.0), Ticket(1, ("model:m", "adapters:a"))])
    assert choose(policy, on, 0) == [1]


def test_a_dearer_need_decides_before_any_cheaper_one() -> None:
    policy, on = Dynamic(), board(1)
    on.workers[0].resident = frozenset({"model:m", "adapters:a", "shape:s"})
    arrive(
        policy,
        on,
        [Ticket(0, ("model:n", "adapters:a", "shape:s"), cost=9.0), Ticket(1, ("model:m", "adapters:b", "shape:t"))],
    )
    assert choose(policy, on, 0) == [1]


def test_of_adapters_it_lacks_a_worker_takes_one_that_nobody_else_holds() -> None:
    policy, on = Dynamic(), board(2)
    on.workers[1].resident = frozenset({"adapters:a"})
    arrive(policy, on, [Ticket(0, ("adapters:a",), cost=9.0), Ticket(1, ("adapters:b",))])
    assert choose(policy, on, 0) == [1]


def test_what_a_worker_is_at_work_with_counts_as_held() -> None:
    policy, on = Dynamic(), board(2)
    on.workers[1].state, on.workers[1].batch = "busy", Batch(1, (Ticket(9, ("adapters:a",)),), (1,))
    arrive(policy, on, [Ticket(0, ("adapters:a",)), Ticket(1, ("adapters:b",))])
    assert choose(policy, on, 0) == [1]


def test_the_oldest_is_passed_over_at_most_patience_times() -> None:
    policy, on = Dynamic(), board(1, patience=3)
    arrive(policy, on, [Ticket(0, cost=1.0), *(Ticket(seq, cost=5.0) for seq in range(1, 10))])
    assert [choose(policy, on, 0)[0] for _ in range(5)] == [1, 2, 3, 0, 4]


def test_a_batch_is_filled_from_the_same_bucket_in_order_of_arrival() -> None:
    policy, on = Dynamic(), board(1, limit=3)
    needs = ("model:m",)
    arrive(
        policy, on, [Ticket(0, needs), Ticket(1, needs, "g"), Ticket(2, needs), Ticket(3, needs, cost=2.0), Ticket(4)]
    )
    assert choose(policy, on, 0) == [3, 0, 2]


def test_a_batch_is_filled_with_the_nearest_lengths() -> None:
    policy, on = Dynamic(), board(1, limit=3)
    arrive(policy, on, [Ticket(seq, length=length) for seq, length in enumerate([1, 9, 2, 1, 9, 8, 1])])
    assert [choose(policy, on, 0) for _ in range(3)] == [[0, 3, 6], [1, 4, 5], [2]]


# --- static -----------------------------------------------------------------------------------------------------------


def test_static_deals_task_i_to_worker_i_mod_n_in_order() -> None:
    policy, on = Static([0, 1, 2]), board(3)
    arrive(policy, on, [Ticket(seq, cost=float(seq)) for seq in range(7)])
    dealt = {worker: [seq for _ in range(3) for seq in choose(policy, on, worker)] for worker in range(3)}
    assert dealt == {0: [0, 3, 6], 1: [1, 4], 2: [2, 5]}


def test_static_leaves_the_tasks_of_a_quarantined_worker_to_the_others_in_turn() -> None:
    policy, on = Static([0, 1, 2]), board(3)
    arrive(policy, on, simple(9))
    on.workers[1].state = "quarantined"
    dealt = {worker: [seq for _ in range(9) for seq in choose(policy, on, worker)] for worker in (0, 2)}
    assert dealt == {0: [0, 3, 6, 1, 7], 2: [2, 5, 8, 4]}


def test_static_batches_only_neighbours_of_one_bucket() -> None:
    policy, on = Static([0]), board(1, limit=4)
    arrive(policy, on, [Ticket(0), Ticket(1), Ticket(2, group="g"), Ticket(3)])
    assert [choose(policy, on, 0) for _ in range(3)] == [[0, 1], [2], [3]]


# --- lockstep ---------------------------------------------------------------------------------------------------------


def test_lockstep_opens_a_round_only_when_the_last_has_ended_everywhere() -> None:
    policy, on = Lockstep(), board(2)
    arrive(policy, on, simple(4))
    assert [choose(policy, on, worker) for worker in (0, 1)] == [[0], [1]]
    on.workers[0].state = "idle"
    del on.in_flight[0]
    assert choose(policy, on, 0) == []
    ends(on, 1)
    assert [choose(policy, on, worker) for worker in (0, 1)] == [[2], [3]]
    assert policy.rounds == 2


def test_lockstep_waits_for_a_full_round_while_the_source_goes_on() -> None:
    policy, on = Lockstep(), board(3, ended=False)
    arrive(policy, on, simple(2))
    assert choose(policy, on, 0) == []
    on.source_ended = True
    assert [choose(policy, on, worker) for worker in range(3)] == [[0], [1], []]


def test_lockstep_keeps_a_round_open_while_a_retry_waits() -> None:
    policy, on = Lockstep(), board(1)
    arrive(policy, on, simple(1))
    on.backlog.add(Entry(Ticket(9), 9, alone=True))
    assert choose(policy, on, 0) == []


def test_lockstep_hands_each_task_of_a_round_to_the_worker_that_fits_best() -> None:
    policy, on = Lockstep(), board(2)
    on.workers[0].resident = frozenset({"adapters:b"})
    arrive(policy, on, [Ticket(0, ("adapters:a",)), Ticket(1, ("adapters:b",))])
    on.workers[1].resident = frozenset({"adapters:a"})
    assert [choose(policy, on, worker) for worker in (0, 1)] == [[1], [0]]


# --- window -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [1, 2, 5])
def test_window_lets_no_worker_run_more_than_k_ahead_of_the_slowest(lead: int) -> None:
    policy, on = Window(lead), board(2)
    arrive(policy, on, simple(20))
    on.workers[1].state = "busy"
    done = 0
    while policy.may(on.workers[0], on):
        assert choose(policy, on, 0)
        ends(on, 0)
        done += 1
    assert done == lead
    on.workers[1].completed = 1
    assert policy.may(on.workers[0], on)


def test_window_ignores_workers_that_are_not_there() -> None:
    policy, on = Window(1), board(3)
    arrive(policy, on, simple(5))
    on.workers[0].completed = 7
    on.workers[1].state, on.workers[2].state = "absent", "quarantined"
    assert policy.may(on.workers[0], on)


def test_window_cuts_a_batch_to_what_the_leash_allows() -> None:
    policy, on = Window(3), board(2, limit=8)
    arrive(policy, on, simple(8))
    on.workers[0].completed = 1
    assert len(choose(policy, on, 0)) == 2


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("dynamic", Dynamic), ("static", Static), ("lockstep", Lockstep), ("window", Window)]
)
def test_each_policy_is_made_by_its_name(name: str, kind: type) -> None:
    policy = create(name, 3, [0, 1])
    assert type(policy) is kind
    assert policy.common_start == (name in ("lockstep", "window"))
    assert getattr(policy, "lead", 3) == 3
