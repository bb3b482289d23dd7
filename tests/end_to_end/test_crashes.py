"""Whatever dies, a worker or the driver: no task is lost, none is done twice, no process and no half file stays."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from typing import Any

import pytest

from command import WORKERS, kill_the_driver, until
from workplace import Workplace, rows

SEED = 20250711
FOLDERS, QUICK, KILLS = 5, 3, 4
COUNT = 40


@pytest.fixture(scope="module")
def golden(shared_place: Workplace) -> dict[str, str]:
    """The pictures of an unbroken run."""
    assert shared_place.fake(shared_place.tasks(rows(COUNT)), "golden").code == 0
    return shared_place.pixels("golden")


def first(count: int, golden: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in golden.items() if int(name[1:].removesuffix(".png")) < count}


# --- workers ----------------------------------------------------------------------------------------------------------


def test_a_worker_killed_from_outside_costs_only_its_own_batch_which_another_does(
    place: Workplace, golden: dict[str, str]
) -> None:
    running = place.start_fake(place.tasks(rows(10, delay=1.0)), "out", *WORKERS, "--schedule", "lockstep")
    # In lockstep both start their next task when two pictures are there, and are a second long at it.
    until(lambda: len(list((place.folder / "out").glob("*.png"))) == 2)
    victim = running.children()[-1]
    os.kill(victim, signal.SIGKILL)
    ended = running.wait()
    assert ended.code == 0, ended.text
    assert place.pixels() == first(10, golden)
    assert sorted(place.attempts().values()) == [1] * 9 + [2]
    lost = place.ledger("SELECT id, worker, kind, message FROM attempts WHERE kind IS NOT NULL")
    assert [(kind, "SIGKILL" in message) for _, _, kind, message in lost] == [("worker_lost", True)]
    ((task, worker, _, _),) = lost
    (elsewhere,) = place.ledger(f"SELECT worker FROM attempts WHERE id = '{task}' AND kind IS NULL")
    assert elsewhere != (worker,)
    assert place.leftovers() == []
    assert running.family() == []


@pytest.mark.parametrize(("how", "crew"), [("kill", ("--isolate",)), ("segv", WORKERS), ("exit", WORKERS)])
def test_a_task_whose_worker_dies_once_is_done_in_the_second_attempt(
    how: str, crew: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(8, t2={"crash": how, "crash_attempts": 1}))
    ended = place.fake("tasks.jsonl", "out", *crew)
    assert ended.code == 0, ended.text
    assert place.pixels() == first(8, golden)
    assert place.attempts() == {f"t{number}": 2 if number == 2 else 1 for number in range(8)}
    words = {"kill": "SIGKILL", "segv": "SIGSEGV", "exit": "code 0"}[how]
    ((kind, message),) = place.ledger("SELECT kind, message FROM attempts WHERE kind IS NOT NULL")
    assert kind == "worker_lost"
    assert words in message


@pytest.mark.parametrize("how", ["segv", "exit"])
def test_a_task_that_kills_every_worker_is_given_up_and_the_others_are_done(
    how: str, place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(8, t2={"crash": how}))
    ended = place.fake("tasks.jsonl", "out", *WORKERS)
    assert ended.code == 1, ended.text
    assert "1 failed" in ended.out
    assert place.states() == {f"t{number}": "failed" if number == 2 else "done" for number in range(8)}
    poison = place.results()[2]
    assert (poison["kind"], poison["attempts"]) == ("worker_lost", 2)
    assert place.pixels() == {name: digest for name, digest in first(8, golden).items() if name != "t2.png"}
    assert place.attempts() == {f"t{number}": 2 if number == 2 else 1 for number in range(8)}
    devices = place.ledger("SELECT DISTINCT worker FROM attempts WHERE id = 't2'")
    assert len(devices) == 2
    assert place.leftovers() == []


def test_a_task_that_hangs_is_ended_by_the_deadline_and_given_up(place: Workplace, golden: dict[str, str]) -> None:
    place.write("settings.yaml", "limits: {task_timeout: 2.0}\n")
    place.tasks(rows(6, t1={"hang": True}, t4={"hang": "spin", "hang_attempts": 1}))
    ended = place.fake("tasks.jsonl", "out", *WORKERS, "--config", "settings.yaml")
    assert ended.code == 1, ended.text
    assert place.states() == {f"t{number}": "failed" if number == 1 else "done" for number in range(6)}
    assert (place.results()[1]["kind"], place.results()[1]["attempts"]) == ("timeout", 2)
    assert place.results()[4]["attempts"] == 2
    assert place.pixels() == {name: digest for name, digest in first(6, golden).items() if name != "t1.png"}


def test_a_slow_task_that_beats_is_not_taken_for_a_hang(place: Workplace) -> None:
    place.write("settings.yaml", "limits: {task_timeout: 0.8}\n")
    place.tasks(rows(2, delay=1.6))
    ended = place.fake("tasks.jsonl", "out", *WORKERS, "--config", "settings.yaml")
    assert ended.code == 0, ended.text
    assert set(place.attempts().values()) == {1}


def test_a_worker_that_is_stopped_is_ended_by_the_deadline(place: Workplace) -> None:
    place.write("settings.yaml", "limits: {task_timeout: 2.0}\n")
    running = place.start_fake(place.tasks(rows(6, delay=0.5)), "out", *WORKERS, "--config", "settings.yaml")
    until(lambda: len(list((place.folder / "out").glob("*.png"))) >= 2)
    os.kill(running.children()[0], signal.SIGSTOP)
    ended = running.wait()
    assert ended.code == 0, ended.text
    assert set(place.states().values()) == {"done"}
    assert running.family() == []


def test_a_device_on_which_no_model_loads_costs_that_device(place: Workplace, golden: dict[str, str]) -> None:
    place.tasks(rows(8, delay=0.3))
    load = '{"fail": "crash", "only": ["CPU 1"]}'
    ended = place.fake("tasks.jsonl", "out", *WORKERS, IMAGEMILL_FAKE_LOAD=load)
    assert ended.code == 0, ended.text
    assert place.pixels() == first(8, golden)
    assert {one["worker"] for one in place.results()} == {0}


PASSING: dict[str, dict[str, Any]] = {
    "transient": {"fail": "transient", "fail_attempts": 1},
    "poisoned": {"fail": "worker_lost", "fail_attempts": 1},
    "killed": {"crash": "kill", "crash_attempts": 1},
}


def test_many_crashes_end_with_every_task_settled(place: Workplace, golden: dict[str, str]) -> None:
    # Three tasks that fail on a device, are done elsewhere, and have none done there between them, put it out; what it then
    # has in hand takes an attempt more. No device comes to three here: task i begins on worker i mod 3, two of each
    # worker's fail there, and every second attempt succeeds, wherever it is.
    scripts = {f"t{number}": PASSING["killed"] for number in (0, 3, 4, 8)}
    scripts |= {"t5": PASSING["transient"], "t7": PASSING["poisoned"]}
    place.tasks(rows(12, **scripts))
    ended = place.fake("tasks.jsonl", "out", "--workers", "3", "--schedule", "static")
    assert ended.code == 0, ended.text
    assert place.pixels() == first(12, golden)
    assert place.attempts() == {f"t{number}": 2 if number in (0, 3, 4, 5, 7, 8) else 1 for number in range(12)}


def test_tasks_that_kill_every_worker_hold_up_no_task_of_workers_on_a_leash(
    place: Workplace, golden: dict[str, str]
) -> None:
    # On a leash any worker may get any task. Only a task that is done in the end counts against the device it failed on,
    # and there are two of those, one fewer than put a device out.
    scripts: dict[str, dict[str, Any]] = {f"t{number}": {"crash": "kill"} for number in (0, 3, 6)}
    scripts |= {"t5": PASSING["transient"], "t7": PASSING["poisoned"]}
    place.tasks(rows(12, **scripts))
    ended = place.fake("tasks.jsonl", "out", *WORKERS, "--schedule", "window:2")
    assert ended.code == 1, ended.text
    assert place.states() == {f"t{number}": "failed" if number in (0, 3, 6) else "done" for number in range(12)}
    given_up = {f"t{number}.png" for number in (0, 3, 6)}
    assert place.pixels() == {name: digest for name, digest in first(12, golden).items() if name not in given_up}
    assert place.attempts() == {f"t{number}": 2 if number in (0, 3, 5, 6, 7) else 1 for number in range(12)}


# --- the driver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", [*range(QUICK), *(pytest.param(one, marks=pytest.mark.slow) for one in range(QUICK, FOLDERS))]
)
def test_the_driver_killed_at_random_moments_loses_nothing(
    folder: int, place: Workplace, golden: dict[str, str]
) -> None:
    """Twenty kills in all, twelve in the quick suite: four one after the other in a folder, with one and with two workers."""
    dice = random.Random(SEED + folder)
    crew = ("--isolate",) if folder == 0 else WORKERS
    place.tasks(rows(COUNT, delay=0.1))
    for _ in range(KILLS):
        running = place.start_fake("tasks.jsonl", "out", *crew)
        with suppress(Exception):
            running.process.wait(dice.uniform(0.2, 1.6))
        kill_the_driver(running)
    place.tasks(rows(COUNT))
    ended = place.fake("tasks.jsonl", "out", *crew)
    assert ended.code == 0, ended.text
    assert place.pixels() == golden
    assert set(place.states().values()) == {"done"}
    assert len(place.states()) == COUNT
    assert place.leftovers() == []


def test_what_was_done_before_the_driver_died_is_not_made_again(place: Workplace, golden: dict[str, str]) -> None:
    running = place.start_fake(place.tasks(rows(12, delay=0.5)), "out", *WORKERS)
    done = "SELECT id FROM tasks WHERE state = 'done'"
    until(lambda: (place.folder / "out" / "logs").exists() and len(place.ledger(done)) >= 4)
    kill_the_driver(running)
    kept = {name for (name,) in place.ledger(done)}
    times = {name: (place.folder / "out" / f"{name}.png").stat().st_mtime_ns for name in kept}
    ended = place.fake(place.tasks(rows(12)), "out", *WORKERS)
    assert ended.code == 0, ended.text
    assert f"12 done ({12 - len(kept)} in this run" in ended.out
    assert {name: (place.folder / "out" / f"{name}.png").stat().st_mtime_ns for name in kept} == times
    assert place.pixels() == first(12, golden)


def test_a_driver_that_is_gone_takes_a_hanging_and_a_loading_worker_with_it(place: Workplace) -> None:
    load = '{"hang": true, "fail": "hang", "only": ["CPU 1"]}'
    place.tasks(rows(4, t0={"hang": "spin"}, t1={"hang": True}, t2={"hang": True}, t3={"hang": True}))
    running = place.start_fake("tasks.jsonl", "out", *WORKERS, IMAGEMILL_FAKE_LOAD=load)
    until(lambda: "loaded" in read(place, "worker-0.log") and len(running.children()) == 2)
    kill_the_driver(running)


def read(place: Workplace, log: str) -> str:
    path = place.folder / "out" / "logs" / log
    return path.read_text("utf-8") if path.exists() else ""
