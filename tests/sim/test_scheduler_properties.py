"""What the scheduler promises under any order of events, in a world of virtual time (see `world.py`)."""

from __future__ import annotations

from itertools import count
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagemill.records import Cancel, Drain, Ticket
from imagemill.schedule import Limits, Scheduler
from world import Faults, World, most_attempts

POLICIES = ("dynamic", "static", "lockstep", "window")


def examples(number: int) -> Any:
    """Settings that keep CI stable: the same examples every time, no deadline."""
    return settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


chances = st.sampled_from([0.0, 0.0, 0.05, 0.2])


@st.composite
def all_faults(draw: st.DrawFn) -> Faults:
    few = st.frozensets(st.integers(0, 30), max_size=3)
    return Faults(
        task=draw(chances),
        whole=draw(chances),
        crash=draw(chances),
        hang=draw(chances),
        load=draw(chances),
        sudden=draw(chances),
        echo=draw(chances),
        poison=draw(few),
        broken=draw(st.frozensets(st.integers(0, 4), max_size=2)),
        unloadable=draw(st.frozensets(st.integers(0, 4), max_size=2)),
        capacity=draw(st.sampled_from([1, 3, 1000])),
    )


@st.composite
def worlds(draw: st.DrawFn, policy: str, faulty: bool = True, stops: bool = False) -> World:
    """A world with workers, tasks and a source of any kind."""
    rng = Random(draw(st.integers(0, 2**32)))
    workers = draw(st.integers(1, 5))
    number = draw(st.integers(0, 40))
    adapters = draw(st.integers(1, 4))
    batch = draw(st.sampled_from([1, 1, 2, 8]))
    cost = draw(st.sampled_from([0.0, 1.0, 10.0]))
    tickets = [
        Ticket(seq, ("model:m", f"adapters:{rng.randrange(adapters)}"), "", 1.0 + rng.random() * cost)
        for seq in range(number)
    ]
    limits = Limits(
        load_timeout=15.0,
        task_timeout=15.0,
        max_attempts=draw(st.integers(1, 4)),
        parallel_loads=draw(st.integers(1, 3)),
        read_ahead=draw(st.sampled_from([1, 2, 5, 1024])),
        batch=lambda _: batch,
    )
    lead = draw(st.integers(1, 4))
    world = World(
        Scheduler({number: f"GPU {number}" for number in range(workers)}, policy, lead, limits),
        tickets,
        rng,
        draw(all_faults()) if faulty else Faults(),
        chunk=draw(st.sampled_from([1, 3, 1000])),
        pause=draw(st.sampled_from([0.0, 5.0])),
        load_seconds=lambda rng: rng.uniform(0, 20),
        seconds=lambda ticket, rng: ticket.cost * rng.uniform(0.5, 2.0),
    )
    if stops:
        world.stop_at = draw(st.floats(0, 60))
        world.stop_with = draw(st.sampled_from([Drain(), Cancel()]))
    return world


@pytest.mark.parametrize("policy", POLICIES)
@examples(300)
@given(data=st.data())
def test_each_task_settles_exactly_once_whatever_fails(policy: str, data: st.DataObject) -> None:
    world = data.draw(worlds(policy)).run()
    assert world.halt
    assert world.halt.reason in ("done", "no_workers")
    if world.halt.reason == "done":
        assert world.settled.keys() == {ticket.seq for ticket in world.tickets}


@pytest.mark.parametrize("policy", POLICIES)
@examples(150)
@given(data=st.data())
def test_after_a_stop_nothing_is_dispatched_and_no_task_settles_twice(policy: str, data: st.DataObject) -> None:
    world = data.draw(worlds(policy, stops=True)).run()
    assert world.halt
    assert world.halt.reason in ("done", "drained", "cancelled", "no_workers")
    assert world.settled.keys() <= {ticket.seq for ticket in world.tickets}
    assert world.dispatched_after_stop == 0


@pytest.mark.parametrize("policy", POLICIES)
@examples(100)
@given(data=st.data())
def test_without_faults_each_task_is_tried_once(policy: str, data: st.DataObject) -> None:
    world = data.draw(worlds(policy, faulty=False)).run()
    assert world.halt
    assert world.halt.reason == "done"
    assert all(settle.attempts == 1 and settle.receipt for settle in world.settled.values())
    assert len(world.settled) == len(world.tickets)
    assert len(world.spawned) <= len(world.tickets), "more workers than tasks"


@pytest.mark.parametrize("policy", POLICIES)
@examples(200)
@given(data=st.data())
def test_attempts_are_bounded(policy: str, data: st.DataObject) -> None:
    world = data.draw(worlds(policy)).run()
    limits = world.limits
    bound = most_attempts(limits.max_attempts, limits.batch(("model:m",)))
    assert max(world.attempts.values(), default=0) <= bound


@pytest.mark.parametrize("policy", POLICIES)
@examples(75)
@given(data=st.data())
def test_the_same_events_give_the_same_commands(policy: str, data: st.DataObject) -> None:
    world = data.draw(worlds(policy, stops=True)).run()
    first = world.scheduler
    lead = getattr(first.policy, "lead", 1)
    devices = {number: worker.device for number, worker in first.board.workers.items()}
    again = Scheduler(devices, policy, lead, first.limits)
    for event, now, commands in world.script:
        assert tuple(again.on(event, now)) == commands


# --- lockstep ---------------------------------------------------------------------------------------------------------


@examples(300)
@given(data=st.data())
def test_lockstep_never_has_two_rounds_open(data: st.DataObject) -> None:
    world = data.draw(worlds("lockstep"))
    opened: list[set[int]] = []
    settled: set[int] = set()
    world.run()
    for _, _, commands in world.script:
        settled |= {command.seq for command in commands if type(command).__name__ == "Settle"}
        fresh = [c for c in commands if type(c).__name__ == "Dispatch" and c.batch.attempts[0] == 1]
        if fresh:
            # Every task of the rounds before has ended; the new round has one task a worker.
            assert set().union(*opened) <= settled
            assert all(len(command.batch.tickets) == 1 for command in fresh)
            assert len({command.worker for command in fresh}) == len(fresh)
            opened.append({command.batch.tickets[0].seq for command in fresh})
    assert world.scheduler.policy.rounds == len(opened)  # type: ignore[attr-defined]
    if world.halt and world.halt.reason == "done":
        assert world.scheduler.rounds_done == len(opened)


@examples(100)
@given(data=st.data())
def test_without_faults_each_round_of_lockstep_has_one_task_a_worker_in_order(data: st.DataObject) -> None:
    world = data.draw(worlds("lockstep", faulty=False))
    workers = len(world.scheduler.board.workers)
    world.chunk = 1000
    world.run()
    sizes = [len(turn) for turn in world.turns]
    number = len(world.tickets)
    if world.limits.read_ahead >= workers:
        full, rest = divmod(number, workers)
        assert sizes == [workers] * full + [rest] * bool(rest)
    dispatched = [sorted(command.batch.tickets[0].seq for command in turn) for turn in world.turns]
    assert [seq for turn in dispatched for seq in turn] == list(range(number))


# --- window -----------------------------------------------------------------------------------------------------------


@examples(200)
@given(data=st.data())
def test_window_never_lets_a_worker_lead_by_more_than_k(data: st.DataObject) -> None:
    world = data.draw(worlds("window", faulty=False)).run()
    assert world.lead <= world.scheduler.policy.lead  # type: ignore[attr-defined]


# --- static -----------------------------------------------------------------------------------------------------------


@examples(100)
@given(data=st.data())
def test_without_faults_static_gives_task_i_to_worker_i_mod_n_in_order(data: st.DataObject) -> None:
    world = data.draw(worlds("static", faulty=False)).run()
    workers = len(world.scheduler.board.workers)
    for worker in range(workers):
        had = [ticket.seq for _, who, batch in world.dispatches if who == worker for ticket in batch.tickets]
        assert had == list(range(worker, len(world.tickets), workers))


# --- dynamic ----------------------------------------------------------------------------------------------------------


def makespan(costs: list[float], workers: int) -> float:
    """The seconds that `dynamic` takes when all workers are ready and all tasks known at 0."""
    tickets = [Ticket(seq, cost=cost) for seq, cost in enumerate(costs)]
    limits = Limits(task_timeout=1e9)
    world = World(Scheduler(dict.fromkeys(range(workers), ""), limits=limits), tickets, Random(0)).run()
    assert len(world.settled) == len(costs)
    return world.now


def lower_bound(costs: list[float], workers: int) -> float:
    """No schedule is shorter: the load shared evenly, the longest task, and for each k the k+1 least of the
    k·m+1 longest tasks, of which some worker must do k+1."""
    longest = sorted(costs, reverse=True)
    bounds = [sum(costs) / workers, longest[0]]
    for k in count(1):
        if k * workers >= len(costs):
            return max(bounds)
        bounds.append(sum(longest[k * workers - k : k * workers + 1]))
    raise AssertionError


def optimum(costs: list[float], workers: int) -> float:
    """The shortest makespan there is, by search with the bound above; for a handful of tasks."""
    longest = sorted(costs, reverse=True)
    best = sum(costs)

    def place(number: int, loads: tuple[float, ...]) -> None:
        nonlocal best
        if number == len(longest):
            best = min(best, max(loads))
            return
        for worker in {load: worker for worker, load in enumerate(loads)}.values():
            load = loads[worker] + longest[number]
            if load < best:
                place(number + 1, (*loads[:worker], load, *loads[worker + 1 :]))

    place(0, (0.0,) * workers)
    return best


@examples(200)
@given(costs=st.lists(st.integers(1, 100), min_size=1, max_size=9), workers=st.integers(1, 4))
def test_dynamic_takes_at_most_four_thirds_of_the_optimum(costs: list[int], workers: int) -> None:
    """Graham 1969: longest first is within 4/3 - 1/(3m) of the optimum."""
    bound = (4 / 3 - 1 / (3 * workers)) * optimum([float(cost) for cost in costs], workers)
    assert makespan([float(cost) for cost in costs], workers) <= bound + 1e-9


@examples(60)
@given(seed=st.integers(0, 2**32), workers=st.integers(1, 8), spread=st.sampled_from([0.1, 1.0, 20.0]))
def test_dynamic_takes_at_most_four_thirds_of_the_lower_bound_on_many_tasks(
    seed: int, workers: int, spread: float
) -> None:
    rng = Random(seed)
    costs = [1.0 + spread * rng.random() for _ in range(rng.randrange(4 * workers, 200))]
    assert makespan(costs, workers) <= 4 / 3 * lower_bound(costs, workers) + 1e-9


def switches(adapters: int, workers: int, each: int, seed: int) -> int:
    rng = Random(seed)
    kinds = [adapter for adapter in range(adapters) for _ in range(each)]
    rng.shuffle(kinds)
    tickets = [Ticket(seq, ("model:m", f"adapters:{kind}")) for seq, kind in enumerate(kinds)]
    world = World(
        Scheduler(dict.fromkeys(range(workers), ""), limits=Limits(read_ahead=10_000, task_timeout=1e9)),
        tickets,
        rng,
        seconds=lambda ticket, rng: rng.uniform(0.9, 1.1),
    ).run()
    return world.switches


@examples(80)
@given(adapters=st.integers(1, 12), workers=st.integers(1, 6), each=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_affinity_keeps_the_number_of_adapter_switches_small(adapters: int, workers: int, each: int, seed: int) -> None:
    """Each adapter is put on once, and at the end, when there are fewer left than workers, a worker helps out twice at most
    on average."""
    assert switches(adapters, workers, each, seed) <= adapters + 2 * (workers - 1)
