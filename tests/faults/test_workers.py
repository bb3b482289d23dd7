"""Workers that die, hang, fail to load or spoil their device: only what they had is tried again, and nothing is lost.

Each with workers that save a picture before the next batch, as on CPUs, and where that differs with workers that take
the next batch ahead, as on GPUs.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from checks import AHEAD, HASTE, WITNESS, after, at_start, has_pictures, log_of, pid_of

from command import WORKERS, kill, until
from imagemill.records import WorkerLost
from imagemill.schedule import Scheduler
from workplace import Workplace, rows

BOTH = pytest.mark.parametrize("mode", [pytest.param((), marks=pytest.mark.slow), (AHEAD,)], ids=["in turn", "ahead"])
STATIC = (*WORKERS, "--schedule", "static")
LOCKSTEP = (*WORKERS, "--schedule", "lockstep")
LOADS_AT_MOST = 3


def names(count: int) -> set[str]:
    return {f"t{number}" for number in range(count)}


def faults(place: Workplace) -> set[tuple[str, int, str]]:
    """Task, worker and kind of every attempt that failed."""
    return set(place.ledger("SELECT id, worker, kind FROM attempts WHERE kind IS NOT NULL"))


def makers(place: Workplace, task: str) -> list[int]:
    """The workers of a task's attempts, in their order."""
    return [worker for (worker,) in place.ledger(f"SELECT worker FROM attempts WHERE id = '{task}' ORDER BY attempt")]


def lives(place: Workplace, worker: int) -> int:
    """How many processes a worker has been."""
    return log_of(place, f"worker-{worker}.log").count(f"worker {worker} on CPU {worker}")


def hangs(place: Workplace, *workers: int) -> list[int]:
    """The workers that hang by their scripts."""
    return [worker for worker in workers or (0, 1) if "it hangs now" in log_of(place, f"worker-{worker}.log")]


# --- 1: SIGKILL -------------------------------------------------------------------------------------------------------


@BOTH
def test_only_the_batch_of_a_killed_worker_is_tried_again_and_its_members_alone(
    mode: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    environment = at_start(place, *mode, WITNESS, HASTE)
    place.tasks(rows(16, t6={"hang": True, "hang_attempts": 1}))
    running = place.start_fake("tasks.jsonl", "out", *WORKERS, "--batch-size", "4", **environment)
    (victim,) = until(lambda: hangs(place))
    until(lambda: has_pictures(place, 12))
    kill(pid_of(place, victim))
    states = after(place, ended := running.wait(), running=running, golden=golden, ids=names(16))
    assert ended.code == 0, ended.text
    assert set(states.values()) == {"done"}
    assert faults(place) == {(f"t{number}", victim, "worker_lost") for number in (4, 5, 6, 7)}
    assert place.ledger("SELECT count(*), batch_size FROM attempts GROUP BY batch_size ORDER BY 2") == [(4, 1), (16, 4)]
    assert lives(place, 1 - victim) == 1


def test_a_worker_killed_while_it_saves_one_picture_and_makes_the_next_costs_these_two(
    place: Workplace, golden: dict[str, str]
) -> None:
    environment = at_start(place, AHEAD, WITNESS, HASTE)
    place.tasks(rows(8, t2={"slow_save": True}, t4={"hang": True, "hang_attempts": 1}))
    running = place.start_fake("tasks.jsonl", "out", *STATIC, **environment)
    until(lambda: hangs(place, 0) and "it saves t2" in log_of(place, "worker-0.log"))
    until(lambda: has_pictures(place, 5))
    kill(pid_of(place, 0))
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(8))
    assert ended.code == 0, ended.text
    assert faults(place) == {("t2", 0, "worker_lost"), ("t4", 0, "worker_lost")}
    assert (makers(place, "t2"), makers(place, "t4")) == ([0, 1], [0, 1])


@BOTH
def test_a_worker_killed_while_idle_costs_no_attempt(
    mode: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(8, t1={"delay": 2.0}))
    running = place.start_fake("tasks.jsonl", "out", *LOCKSTEP, **at_start(place, *mode, HASTE))
    until(lambda: has_pictures(place, 1))
    kill(pid_of(place, 0))
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(8))
    assert ended.code == 0, ended.text
    assert faults(place) == set()
    assert (lives(place, 0), lives(place, 1)) == (2, 1)


FIRST_LIFE_HANGS_LOADING = """
if fd >= 0 and label == "CPU 1" and life("one") == 1:
    os.environ["IMAGEMILL_FAKE_LOAD"] = '{"fail": "hang"}'
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_killed_or_stopped_while_it_loads_is_started_again(
    number: signal.Signals, place: Workplace, golden: dict[str, str]
) -> None:
    environment = at_start(place, FIRST_LIFE_HANGS_LOADING, WITNESS, HASTE)
    place.write("settings.yaml", f"limits: {{load_timeout: {600 if number == signal.SIGKILL else 2}}}\n")
    place.tasks(rows(8))
    # In lockstep nothing starts before all are loaded or lost.
    running = place.start_fake("tasks.jsonl", "out", *LOCKSTEP, "--config", "settings.yaml", **environment)
    until(lambda: hangs(place, 1))
    kill(pid_of(place, 1), number)
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(8))
    assert ended.code == 0, ended.text
    assert faults(place) == set()
    words = "SIGKILL" if number == signal.SIGKILL else "silent for 2 s"
    assert words in log_of(place, "driver.log")


# --- 2: crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [pytest.param("kill", marks=pytest.mark.slow), "segv", "exit"])
def test_a_crash_of_a_worker_that_works_ahead_costs_what_it_had_and_is_told_as_what_it_was(
    how: str, place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(10, t1={"slow_save": True}, t5={"crash": how, "crash_attempts": 1}))
    running = place.start_fake("tasks.jsonl", "out", *STATIC, **at_start(place, AHEAD, WITNESS, HASTE))
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(10))
    assert ended.code == 0, ended.text
    lost = faults(place)
    assert (
        {("t1", 1, "worker_lost"), ("t5", 1, "worker_lost")}
        <= lost
        <= {(f"t{number}", 1, "worker_lost") for number in (1, 3, 5)}
    )
    words = {"kill": "SIGKILL", "segv": "SIGSEGV", "exit": "code 0"}[how]
    messages = place.ledger("SELECT DISTINCT message FROM attempts WHERE kind IS NOT NULL")
    assert [words in message for (message,) in messages] == [True]


CHILD = """
if fd >= 0:
    import subprocess
    subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
"""


@pytest.mark.parametrize("how", ["segv", pytest.param("exit", marks=pytest.mark.slow)])
def test_what_a_crashed_worker_has_started_ends_with_it(how: str, place: Workplace, golden: dict[str, str]) -> None:
    place.tasks(rows(6, t1={"crash": how}))
    running = place.start_fake("tasks.jsonl", "out", *WORKERS, **at_start(place, CHILD, HASTE))
    states = after(place, ended := running.wait(), running=running, golden=golden, ids=names(6))
    assert ended.code == 1, ended.text
    assert [name for name in states if states[name] == "failed"] == ["t1"]


# --- 3: hangs ---------------------------------------------------------------------------------------------------------


@BOTH
def test_a_busy_loop_that_ignores_sigterm_is_ended_by_the_deadline(
    mode: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    place.write("settings.yaml", "limits: {task_timeout: 3.0}\n")
    place.tasks(rows(8, t3={"hang": "spin", "hang_attempts": 1}))
    running = place.start_fake(
        "tasks.jsonl", "out", *STATIC, "--config", "settings.yaml", **at_start(place, *mode, WITNESS, HASTE)
    )
    until(lambda: hangs(place, 1))
    kill(pid_of(place, 1), signal.SIGTERM)
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(8))
    assert ended.code == 0, ended.text
    assert "killed by SIGTERM" not in log_of(place, "driver.log")
    assert ("t3", 1) in {(task, worker) for task, worker, _ in faults(place)}
    assert makers(place, "t3") == [1, 0]
    told = place.ledger("SELECT DISTINCT message FROM attempts WHERE id = 't3' AND kind IS NOT NULL")
    assert ["silent for 3 s" in message or "SIGKILL" in message for (message,) in told] == [True]


@BOTH
def test_a_worker_stopped_while_idle_costs_only_the_task_it_is_given_then(
    mode: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    place.write("settings.yaml", "limits: {task_timeout: 2.0}\n")
    place.tasks(rows(6, t1={"delay": 1.5}))
    environment = at_start(place, *mode, HASTE)
    running = place.start_fake("tasks.jsonl", "out", *LOCKSTEP, "--config", "settings.yaml", **environment)
    until(lambda: has_pictures(place, 1))
    kill(pid_of(place, 0), signal.SIGSTOP)
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(6))
    assert ended.code == 0, ended.text
    ((_, worker, _),) = faults(place)
    assert worker == 0
    assert "silent for 2 s" in log_of(place, "driver.log")


def test_a_worker_stopped_for_a_while_and_woken_before_its_deadline_is_left_alone(
    place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(8, delay=0.3))
    running = place.start_fake("tasks.jsonl", "out", *STATIC)
    until(lambda: has_pictures(place, 2))
    pid = pid_of(place, 0)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: len(list((place.folder / "out").glob("t[1357].png"))) == 4)
    os.kill(pid, signal.SIGCONT)
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(8))
    assert ended.code == 0, ended.text
    assert faults(place) == set()
    assert (lives(place, 0), lives(place, 1)) == (1, 1)


def test_slow_but_beating_is_left_alone_while_it_loads_and_while_it_works_ahead(
    place: Workplace, golden: dict[str, str]
) -> None:
    place.write("settings.yaml", "limits: {task_timeout: 1.2, load_timeout: 1.2, parallel_loads: 2}\n")
    place.tasks(rows(2, delay=2.0))
    environment = at_start(place, AHEAD)
    load = {"IMAGEMILL_FAKE_LOAD": '{"delay": 2.0}'}
    running = place.start_fake("tasks.jsonl", "out", *WORKERS, "--config", "settings.yaml", **environment, **load)
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(2))
    assert ended.code == 0, ended.text
    assert faults(place) == set()
    assert (lives(place, 0), lives(place, 1)) == (1, 1)


def test_a_worker_whose_disk_never_answers_is_ended_though_its_device_is_free(
    place: Workplace, golden: dict[str, str]
) -> None:
    place.write("settings.yaml", "limits: {task_timeout: 2.0}\n")
    place.tasks(rows(8, t2={"slow_save": True}, t4={"slow_save": True}))
    environment = at_start(place, AHEAD, WITNESS, HASTE)
    running = place.start_fake("tasks.jsonl", "out", *STATIC, "--config", "settings.yaml", **environment)
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(8))
    assert ended.code == 0, ended.text
    assert {task for task, _, _ in faults(place)} >= {"t2"}


def test_a_worker_that_does_not_leave_at_the_end_is_ended(place: Workplace, golden: dict[str, str]) -> None:
    stubborn = """
    if fd < 0:
        import imagemill.executors.processes as processes
        processes.LEAVE_TIMEOUT = 0.5
    else:
        import imagemill.worker, imagemill.runners.fake as fake
        fake.FakeRunner.unload = lambda self: fake.hang("spin")
    """
    running = place.start_fake(place.tasks(rows(4)), "out", *WORKERS, **at_start(place, stubborn))
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(4))
    assert ended.code == 0, ended.text


def test_a_worker_ended_for_its_silence_is_told_as_that_and_not_as_killed() -> None:
    scheduler = Scheduler({0: "CPU 0", 1: "CPU 1"})
    scheduler.board.workers[0].ending = "silent for 2 s"
    killed = [WorkerLost(number, "worker_lost", "killed by SIGKILL") for number in (0, 1)]
    assert list(map(scheduler.explained, killed)) == [WorkerLost(0, "timeout", "silent for 2 s"), killed[1]]


# --- 5: a poisoned context --------------------------------------------------------------------------------------------


@BOTH
def test_a_worker_whose_context_is_poisoned_is_replaced_and_its_task_tried_elsewhere(
    mode: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    words = "CUDA error: an illegal memory access was encountered"
    place.tasks(rows(10, delay=0.1, t3={"raise": words, "raise_attempts": 1}))
    running = place.start_fake("tasks.jsonl", "out", *STATIC, **at_start(place, *mode, HASTE))
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(10))
    assert ended.code == 0, ended.text
    assert ("t3", 1, "worker_lost") in faults(place)
    assert {worker for _, worker, _ in faults(place)} == {1}
    assert makers(place, "t3") == [1, 0]
    ((message,),) = place.ledger("SELECT message FROM attempts WHERE id = 't3' AND kind IS NOT NULL")
    assert words in message
    assert lives(place, 1) == 2
    assert "left as told" in log_of(place, "worker-1.log").rpartition(", pid ")[2]
    assert "left as told" not in log_of(place, "worker-1.log").rpartition(", pid ")[0]


# --- 6: devices that do not load --------------------------------------------------------------------------------------

NO_LOAD: dict[str, tuple[str, str]] = {
    "crash": ('os.environ["IMAGEMILL_FAKE_LOAD"] = \'{"fail": "crash"}\'', "SIGKILL"),
    "out of memory": ('os.environ["IMAGEMILL_FAKE_LOAD"] = \'{"fail": "oom"}\'', "does not load"),
    "hang": ('os.environ["IMAGEMILL_FAKE_LOAD"] = \'{"fail": "hang"}\'', "silent for 1.5 s"),
    "no interpreter": ("os._exit(3)", "exited with code 3"),
}

LOADS = [pytest.param(how, marks=pytest.mark.slow) if how in ("crash", "out of memory") else how for how in NO_LOAD]


def no_load(how: str, *labels: str) -> str:
    """Workers with these labels never load; each of their lives is counted."""
    return f"""
if fd >= 0 and label in {labels!r}:
    life(label[-1])
    {NO_LOAD[how][0]}
"""


def counted(place: Workplace, worker: int) -> int:
    path = place.folder / f"life-{worker}"
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("how", LOADS)
def test_a_device_that_fails_every_load_is_quarantined_and_the_rest_finish(
    how: str, place: Workplace, golden: dict[str, str]
) -> None:
    place.write("settings.yaml", "limits: {load_timeout: 1.5}\n")
    place.tasks(rows(8, delay=0.3))
    environment = at_start(place, no_load(how, "CPU 1"), HASTE)
    running = place.start_fake("tasks.jsonl", "out", *WORKERS, "--config", "settings.yaml", **environment)
    after(place, ended := running.wait(), running=running, golden=golden, ids=names(8))
    assert ended.code == 0, ended.text
    assert {one["worker"] for one in place.results()} == {0}
    assert 1 <= counted(place, 1) <= LOADS_AT_MOST


@pytest.mark.parametrize("how", LOADS)
def test_when_no_device_loads_the_run_ends_clearly_and_goes_on_later(
    how: str, place: Workplace, golden: dict[str, str]
) -> None:
    place.write("settings.yaml", "limits: {load_timeout: 1.5, parallel_loads: 2}\n")
    environment = at_start(place, no_load(how, "CPU 0", "CPU 1"), HASTE)
    running = place.start_fake(place.tasks(rows(6)), "out", *WORKERS, "--config", "settings.yaml", **environment)
    states = after(place, ended := running.wait(), running=running, golden=golden, ids=names(6))
    assert ended.code == 1, ended.text
    assert "no worker is left" in ended.err
    assert NO_LOAD[how][1] in ended.err
    assert set(states.values()) == {"pending"}
    assert (counted(place, 0), counted(place, 1)) == (LOADS_AT_MOST, LOADS_AT_MOST)
    again = place.fake("tasks.jsonl", "out", *WORKERS)
    assert set(after(place, again, golden=golden, ids=names(6)).values()) == {"done"}
    assert again.code == 0, again.text


# --- 7: tasks that kill -----------------------------------------------------------------------------------------------


def test_a_task_that_crashes_the_command_itself_costs_itself_alone_when_the_command_goes_on(
    place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(6, t2={"crash": "segv"}))
    assert place.fake("tasks.jsonl").code == -signal.SIGSEGV
    ended = place.fake("tasks.jsonl", **at_start(place, HASTE))
    assert "its worker now has a process of its own" in ended.err
    after(place, ended, golden=golden, ids=names(6))
    assert ended.code == 1, ended.text
    assert place.states() == {name: "failed" if name == "t2" else "done" for name in sorted(names(6))}
    assert {kind for _, _, kind in faults(place)} == {"worker_lost"}


@pytest.mark.parametrize(
    ("batch", "mode"),
    [("4", ()), ("1", (AHEAD,)), pytest.param("4", (AHEAD,), marks=pytest.mark.slow)],
    ids=["batches", "ahead", "batches ahead"],
)
def test_tasks_that_kill_every_worker_are_given_up_after_two_devices_and_nothing_else_is_lost(
    batch: str, mode: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    poison: dict[str, dict[str, Any]] = {"t1": {"crash": "kill"}, "t6": {"crash": "segv"}, "t9": {"crash": "exit"}}
    running = place.start_fake(
        place.tasks(rows(16, **poison)), "out", *WORKERS, "--batch-size", batch, **at_start(place, *mode, HASTE)
    )
    states = after(place, ended := running.wait(), running=running, golden=golden, ids=names(16))
    assert ended.code == 1, ended.text
    assert {name for name, state in states.items() if state == "failed"} == set(poison)
    for name in poison:
        assert set(makers(place, name)) == {0, 1}


def test_a_task_that_kills_the_only_worker_is_given_up_after_two(place: Workplace, golden: dict[str, str]) -> None:
    running = place.start_fake(
        place.tasks(rows(6, t2={"crash": "segv"})), "out", "--isolate", **at_start(place, AHEAD, HASTE)
    )
    states = after(place, ended := running.wait(), running=running, golden=golden, ids=names(6))
    assert ended.code == 1, ended.text
    assert [name for name, state in states.items() if state == "failed"] == ["t2"]
    assert place.results()[2]["attempts"] == 2
