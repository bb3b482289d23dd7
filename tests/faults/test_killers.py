"""Many tasks that kill their workers, wherever they stand in the file: they are given up, and no healthy device with them.

Under virtual time (see `world.py`): with real processes it is minutes of starting workers again.
"""

from __future__ import annotations

from random import Random

import pytest

from imagemill.backlog import spread
from imagemill.records import Ticket
from imagemill.schedule import LOSSES_AT_MOST, Limits, Scheduler
from imagemill.worker_state import PROBE_AFTER
from world import Faults, World

COUNT = 80
KILLERS = {
    "first": frozenset(range(50)),
    "last": frozenset(range(62, COUNT)),
    "every second": frozenset(range(0, COUNT, 2)),
    "between": frozenset(range(10, 60)),
}


def ran(policy: str, workers: int, batch: int, killers: frozenset[int], ahead: float = 0.0) -> World:
    limits = Limits(batch=lambda _: batch)
    scheduler = Scheduler({number: f"GPU {number}" for number in range(workers)}, policy, 2, limits)
    tickets = [Ticket(seq, ("model:m", "adapters:0"), "", 1.0) for seq in range(COUNT)]
    return World(scheduler, tickets, Random(7), Faults(poison=killers), chunk=COUNT, ahead=ahead).run()


@pytest.mark.parametrize("where", KILLERS)
@pytest.mark.parametrize("policy", ["dynamic", "static", "lockstep", "window"])
@pytest.mark.parametrize(("workers", "batch", "ahead"), [(2, 1, 0.0), (2, 1, 1.0), (2, 4, 0.0), (3, 1, 0.5)])
def test_many_tasks_that_kill_cost_themselves_alone(
    policy: str, where: str, workers: int, batch: int, ahead: float
) -> None:
    world = ran(policy, workers, batch, KILLERS[where], ahead)
    assert {seq for seq, one in world.settled.items() if one.receipt} == set(range(COUNT)) - KILLERS[where]
    if (policy, where) == ("static", "every second"):
        return  # all of one worker's own kill: when the others are done, nothing is left to show it whole
    assert world.halt is not None
    assert world.halt.reason == "done", world.halt.message
    assert all(worker.usable for worker in world.scheduler.board.workers.values())


@pytest.mark.parametrize("where", ["first", "every second"])
def test_the_only_device_survives_them_too(where: str) -> None:
    world = ran("dynamic", 1, 1, KILLERS[where])
    assert {seq for seq, one in world.settled.items() if one.receipt} == set(range(COUNT)) - KILLERS[where]


def test_where_every_task_kills_the_run_ends_and_leaves_the_others_for_later() -> None:
    world = ran("dynamic", 2, 1, frozenset(range(COUNT)))
    assert world.halt is not None
    assert world.halt.reason == "no_workers"
    lost = 2 * LOSSES_AT_MOST
    assert len(world.attempts) == lost, "each of the losses that count is that of another task"
    assert len(world.settled) < lost // 2


def test_what_is_tried_out_of_turn_is_spread_over_all_that_waits() -> None:
    places = [spread(number, 100) for number in range(PROBE_AFTER, LOSSES_AT_MOST)]
    assert all(min(abs(place - other) for other in places if other != place) >= 2 for place in places)
    assert max(places) - min(places) > 80
    assert spread(0, 100) == 0
