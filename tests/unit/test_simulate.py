"""The virtual-time simulation runs the real scheduler and tells what came of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from imagemill import simulate as module
from imagemill.records import Command, Event, Ticket
from imagemill.schedule import Limits, Scheduler
from imagemill.simulate import World, simulate

POLICIES = ("dynamic", "static", "lockstep", "window")
A, B = ("model:m", "adapters:a"), ("model:m", "adapters:b")


def tickets(*costs: float, needs: tuple[str, ...] = ()) -> list[Ticket]:
    return [Ticket(number, needs, "", cost) for number, cost in enumerate(costs)]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_task_is_dispatched_once_under_every_policy(policy: str) -> None:
    result = simulate(tickets(*[1.0] * 50), 3, policy, lead=2)
    assert sum(result.dispatched) == 50
    assert all(result.dispatched)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_worker_takes_the_sum_of_all_costs(policy: str) -> None:
    result = simulate(tickets(1, 2, 3), 1, policy)
    assert result.makespan == 6
    assert result.idle == (0,)


def test_the_longest_first_ends_sooner_than_a_fixed_deal() -> None:
    costs = tickets(1, 1, 4, 1, 1)
    assert simulate(costs, 2, "dynamic").makespan == 4
    assert simulate(costs, 2, "static").makespan == 6


def test_lockstep_waits_for_the_slowest_of_each_round() -> None:
    result = simulate(tickets(1, 3, 1, 3, 1), 2, "lockstep")
    assert result.makespan == 3 + 3 + 1
    assert result.rounds == 3
    assert result.held[0] == 4
    assert result.largest_lead == 1


def test_window_bounds_the_lead_that_dynamic_does_not() -> None:
    def seconds(ticket: Ticket, worker: int) -> float:
        return 10.0 if worker == 0 else 1.0

    world = World(seconds)
    assert simulate(tickets(*[1.0] * 40), 2, "dynamic", world=world).largest_lead > 5
    assert simulate(tickets(*[1.0] * 40), 2, "window", lead=2, world=world).largest_lead == 2


def test_loading_is_one_worker_at_a_time_as_the_limits_say() -> None:
    world = World(load_seconds=5)
    one = simulate(tickets(*[1.0] * 30), 3, "lockstep", world=world)
    all_at_once = simulate(tickets(*[1.0] * 30), 3, "lockstep", limits=Limits(parallel_loads=3), world=world)
    assert (one.first_start, all_at_once.first_start) == (15, 5)
    assert one.makespan == all_at_once.makespan + 10


def test_a_switch_is_counted_by_the_place_of_the_need_and_takes_its_time() -> None:
    mixed = [Ticket(number, A if number % 2 else B, "", 1.0) for number in range(6)]
    world = World(switch_seconds=(100.0, 10.0), resident=frozenset({"model:m"}))
    result = simulate(mixed, 1, "static", world=world)
    assert result.switches == (0, 6)
    assert result.makespan == 6 + 6 * 10
    assert simulate(mixed, 1, "dynamic", world=world).switches == (0, 2)


def test_a_batch_takes_the_sum_of_its_tasks_and_switches_once() -> None:
    limits = Limits(batch=lambda _: 4)
    result = simulate(tickets(*[1.0] * 8, needs=A), 1, limits=limits, world=World(switch_seconds=(0.0, 0.5)))
    assert result.makespan == 8.5
    assert result.switches == (1, 1)


def test_tickets_are_read_no_further_ahead_than_the_scheduler_wants() -> None:
    read, most = 0, 0

    def source() -> Iterator[Ticket]:
        nonlocal read
        for read in range(1, 201):
            yield Ticket(read - 1)

    def seconds(ticket: Ticket, worker: int) -> float:
        nonlocal most
        most = max(most, read - ticket.seq)
        return 1.0

    simulate(source(), 2, "static", limits=Limits(read_ahead=10), world=World(seconds))
    assert read == 200
    assert most <= 4 * 10


@pytest.mark.parametrize("policy", POLICIES)
def test_no_tasks_take_no_time(policy: str) -> None:
    result = simulate([], 2, policy, world=World(load_seconds=5))
    assert (result.makespan, result.first_start, result.dispatched, result.switches) == (0, 0, (0, 0), ())


def test_the_same_arguments_give_the_same_result() -> None:
    costs = tickets(*[1 + number % 7 / 3 for number in range(300)])
    assert simulate(costs, 3) == simulate(costs, 3)


def test_a_scheduler_that_stops_short_is_an_error_with_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asleep(Scheduler):
        def on(self, event: Event, now: float) -> list[Command]:
            return [] if self.board.workers[0].live else super().on(event, now)

    monkeypatch.setattr(module, "Scheduler", Asleep)
    with pytest.raises(RuntimeError, match=r"stopped short at 1 s: .*0 busy"):
        simulate(tickets(1, 1), 1)


def test_a_run_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="at least one"):
        simulate(tickets(1), 0)


def test_the_simulation_imports_the_pure_core_only() -> None:
    code = "import sys, imagemill.simulate; print(*(name for name in sys.modules if name.startswith('imagemill.')))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    core = {"records", "errors", "schedule", "worker_state", "policies", "backlog", "retry", "simulate", "version"}
    assert {name.removeprefix("imagemill.") for name in ended.stdout.split()} <= core
