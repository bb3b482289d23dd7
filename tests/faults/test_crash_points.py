"""A process killed at every moment that matters: nothing is lost, nothing is told that is not so, the same command goes on."""

from __future__ import annotations

import ast
import os
import random
import signal
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from checks import AHEAD, HASTE, ROOT, after, at_start, log_of, temporary_files

from command import GONE_WITHIN, WORKERS, until
from imagemill import Engine, crashpoints
from imagemill.crashpoints import DRIVER, POINTS, VARIABLE, WORKER, asked
from imagemill.publish import OutputFolder
from workplace import Workplace, rows

COUNT = 24
NAMES = {f"t{number}" for number in range(COUNT)}
SEED = 20250711

BEFORE_THE_LEDGER = ("before-lock", "after-lock")
AT_WORK = (*DRIVER[DRIVER.index("before-dispatch") : DRIVER.index("before-end-run")], *WORKER[2:])
"""Points that a run comes by once a batch or more; less often, if `TOGETHER`."""

TOGETHER = ("before-folder-sync", "after-folder-sync", "before-commit", "in-commit", "after-commit")
"""Points that tasks which end within 50 ms come by together."""

START, END = DRIVER[: DRIVER.index("before-dispatch")], DRIVER[DRIVER.index("before-end-run") :]
CHAINS: dict[str, Sequence[str]] = {
    "start": (*START, *WORKER[:2]),
    "driver at work": tuple(point for point in DRIVER if point in AT_WORK),
    "worker at work": WORKER[2:],
    "end": END,
}

ONE_LIFE = """
if fd >= 0 and life("crash") > 1:
    os.environ.pop("IMAGEMILL_CRASH_AT", None)
"""
"""For `at_start`: of all worker processes only the first dies."""


# --- the list ---------------------------------------------------------------------------------------------------------


def in_the_source() -> Iterator[str]:
    """The names that the code hands to `crash_point`, directly or through a callback."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and "crash_point" in {
                getattr(one, "id", "") for one in (node.func, *node.args)
            }:
                (name,) = (one.value for one in node.args if isinstance(one, ast.Constant))
                yield str(name)


def test_every_point_of_the_list_is_in_the_code_once_and_no_other() -> None:
    assert sorted(in_the_source()) == sorted(POINTS)
    assert {*START, *AT_WORK, *END, *WORKER} == set(POINTS)


def test_a_point_that_does_not_exist_is_refused_and_none_is_asked_for_by_default() -> None:
    assert asked({}) == {}
    assert asked({VARIABLE: "in-commit"}) == {"in-commit": 1}
    assert asked({VARIABLE: "in-commit:3"}) == {"in-commit": 3}
    with pytest.raises(ValueError, match="no crash point 'in-comit'"):
        asked({VARIABLE: "in-comit"})


# --- the order that makes a picture safe ------------------------------------------------------------------------------


class Seen(dict[str, int]):
    """In place of the points asked for: writes down which were come by."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __contains__(self, name: object) -> bool:
        self.events.append(str(name))
        return False


def between(events: Sequence[str], first: str, last: str) -> list[str]:
    """What happened between two events that happened once, in this order."""
    assert (events.count(first), events.count(last)) == (1, 1), events
    return list(events[events.index(first) : events.index(last) + 1])


def test_a_picture_is_on_disk_before_it_has_its_name_and_its_name_is_before_the_ledger_says_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, fsync = Seen(), os.fsync

    def told(handle: int) -> None:
        seen.events.append(f"fsync {os.readlink(f'/proc/self/fd/{handle}')}")
        fsync(handle)

    monkeypatch.setattr(crashpoints, "_left", seen)
    monkeypatch.setattr(os, "fsync", told)
    out = tmp_path / "new" / "out"
    task = {"id": "a", "prompt": "a", "output_path": "deep/er/a.png"}
    with Engine(model="fake") as engine:
        assert [outcome.state for outcome in engine.run([task], out)] == ["done"]
    order = ["temporary-opened", "temporary-written", "temporary-synced", "temporary-checked", "before-receipt"]
    order += ["before-rename", "after-rename", "before-folder-sync", "after-folder-sync", "before-commit", "in-commit"]
    assert [event for event in seen.events if event in order] == order
    (synced,) = between(seen.events, "temporary-written", "temporary-synced")[1:-1]
    assert Path(synced.removeprefix("fsync ")).parent == out / "deep" / "er"
    folders = between(seen.events, "before-folder-sync", "after-folder-sync")[1:-1]
    assert set(folders) == {f"fsync {folder}" for folder in (out / "deep" / "er", out / "deep", out)}
    # The folder itself was made for the run, and so was the one above it.
    made = between(seen.events, seen.events[0], "before-lock")[:-1]
    assert set(made) == {f"fsync {folder}" for folder in (tmp_path, tmp_path / "new")}


# --- the driver -------------------------------------------------------------------------------------------------------


def crash(
    place: Workplace, point: str, *crew: str, golden: dict[str, str], nth: int = 1, **environment: str
) -> dict[str, str]:
    """Start the run, see it die at the point and its workers with it, and check what it left; returns the states."""
    environment[VARIABLE] = f"{point}:{nth}"
    running = place.start_fake("tasks.jsonl", "out", *crew, **environment)
    assert running.wait().code == -signal.SIGKILL, f"{point} is not come by: {running.err}"
    until(lambda: not running.family(), GONE_WITHIN)
    if not (place.folder / "out" / "ledger.sqlite").exists():
        assert point in BEFORE_THE_LEDGER
        return {}
    return after(place, golden=golden, clean=False)


def forget_the_death(place: Workplace) -> None:
    """As if the last run had been stopped: after one that died the worker would get a process of its own."""
    path = place.folder / "out" / "ledger.sqlite"
    if path.exists():
        with closing(sqlite3.connect(path)) as ledger, ledger:
            ledger.execute("UPDATE runs SET status = 'drained' WHERE status IN ('running', 'died')")


def assert_resumed(place: Workplace, *crew: str, golden: dict[str, str]) -> None:
    """The same command does the rest, and afterwards nothing tells of what happened but the ledger's runs."""
    running = place.start_fake("tasks.jsonl", "out", *crew)
    states = after(place, ended := running.wait(), running=running, golden=golden, ids=NAMES)
    assert ended.code == 0, ended.text
    assert set(states.values()) == {"done"}
    assert place.pixels() == golden
    assert place.attempts() == dict.fromkeys(NAMES, 1)
    hidden = {path.name for path in (place.folder / "out").iterdir() if path.name.startswith(".imagemill-")}
    assert hidden == set()


@pytest.mark.parametrize("chain", CHAINS)
def test_a_driver_killed_at_each_point_one_after_the_other_loses_nothing(
    chain: str, place: Workplace, golden: dict[str, str]
) -> None:
    """With the worker inside the driver's process: each of its points is one of the driver's too."""
    place.tasks(rows(COUNT))
    done = 0
    for point in CHAINS[chain]:
        states = crash(place, point, golden=golden)
        forget_the_death(place)
        now = list(states.values()).count("done")
        assert now >= done, "what was done stays done, whatever dies"
        done = now
    assert_resumed(place, golden=golden)


def test_a_driver_with_worker_processes_killed_where_they_are_at_work_loses_nothing(
    place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(COUNT, delay=0.05))
    environment = at_start(place, AHEAD)
    for nth, point in enumerate(("after-spawn", "before-load", "after-dispatch", "after-rename", "in-commit"), 1):
        crash(place, point, *WORKERS, golden=golden, nth=1 if point in TOGETHER else min(nth, 2), **environment)
    assert_resumed(place, *WORKERS, golden=golden)


def test_a_driver_killed_in_its_second_run_loses_nothing_of_the_first(place: Workplace, golden: dict[str, str]) -> None:
    place.tasks(rows(COUNT // 2))
    assert place.fake("tasks.jsonl").code == 0
    place.tasks(rows(COUNT))
    kept = {path.name: path.stat().st_ino for path in (place.folder / "out").glob("*.png")}
    known = {point: len(crash(place, point, golden=golden)) for point in ("before-accept", "in-commit")}
    assert known == {"before-accept": COUNT // 2, "in-commit": COUNT}
    (place.folder / "out" / "t3.png").unlink()
    # What is to be made again is pending from here on, not done without a picture.
    assert crash(place, "after-accept", golden=golden)["t3"] == "pending"
    crash(place, "after-rename", golden=golden)
    assert place.fake("tasks.jsonl").code == 0
    assert place.pixels() == golden
    now = {path.name: path.stat().st_ino for path in (place.folder / "out").glob("*.png")}
    assert {name for name in kept if now[name] != kept[name]} <= {"t3.png"}


def test_a_half_written_picture_of_a_task_that_the_source_no_longer_holds_is_removed(
    place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(COUNT))
    crash(place, "temporary-written", golden=golden, nth=3)
    assert len(temporary_files(place.folder / "out")) == 1
    ended = place.fake(place.tasks(rows(2)))
    assert ended.code == 0, ended.text
    assert temporary_files(place.folder / "out") == []


def test_half_written_reports_of_a_dead_driver_are_removed_and_those_of_a_living_process_are_not(
    tmp_path: Path,
) -> None:
    dead = os.spawnv(os.P_NOWAIT, "/bin/true", ["true"])
    os.waitpid(dead, 0)
    names = {f".imagemill-{pid}-{name}" for pid in (dead, os.getpid()) for name in ("results.jsonl", "report.html")}
    kept = {f".imagemill-{os.getpid()}-results.jsonl", f".imagemill-{os.getpid()}-report.html"}
    for name in names | {f".imagemill-{dead}-other", "report.html"}:
        (tmp_path / name).touch()
    folder = OutputFolder(tmp_path, exclusive=False)
    folder.sweep_reports()
    folder.close()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == kept | {f".imagemill-{dead}-other", "report.html"}


# --- a worker ---------------------------------------------------------------------------------------------------------


def killed_worker(place: Workplace, point: str, nth: int, *mode: str) -> Any:
    """A run of which one worker process dies at the point, the nth time it comes by."""
    place.tasks(rows(COUNT))
    environment = {**at_start(place, *mode, ONE_LIFE, HASTE), VARIABLE: f"{point}:{nth}"}
    return place.start_fake("tasks.jsonl", "out", *WORKERS, "--schedule", "static", **environment)


def assert_only_its_own_was_tried_again(place: Workplace, point: str, mode: tuple[str, ...]) -> None:
    lost = [task for (task,) in place.ledger("SELECT id FROM attempts WHERE kind = 'worker_lost'")]
    attempts = place.attempts()
    assert {name for name, count in attempts.items() if count > 1} == set(lost)
    if point in WORKER[:2]:
        assert lost == []
    elif not mode:
        assert len(lost) == 1 or (point == "after-receipt" and not lost)
    else:
        assert len(lost) <= 3  # two that are being saved and the one on the device


SOME = ("after-loading", "order-taken", "temporary-written", "temporary-checked", "before-receipt", "after-receipt")


@pytest.mark.parametrize(
    "point", [point if point in SOME else pytest.param(point, marks=pytest.mark.slow) for point in WORKER]
)
def test_a_worker_killed_at_each_point_costs_its_own_tasks_an_attempt_and_the_run_goes_on(
    point: str, place: Workplace, golden: dict[str, str]
) -> None:
    mode = (AHEAD,) if point in ("order-taken", "temporary-written", "before-receipt", "after-receipt") else ()
    running = killed_worker(place, point, 1 if point in WORKER[:2] else 3, *mode)
    states = after(place, ended := running.wait(), running=running, golden=golden, ids=NAMES)
    assert ended.code == 0, ended.text
    assert set(states.values()) == {"done"}
    assert "killed by SIGKILL" in log_of(place, "driver.log"), f"{point} is not come by"
    assert_only_its_own_was_tried_again(place, point, mode)


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), (AHEAD,)], ids=["in turn", "ahead"])
@pytest.mark.parametrize("point", DRIVER)
def test_a_driver_with_worker_processes_killed_at_each_point_loses_nothing(
    point: str, mode: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    dice = random.Random(f"{SEED} {point} {mode}")
    place.tasks(rows(COUNT, delay=0.05))
    most = 2 if point in TOGETHER else 4 if point in AT_WORK else 1
    nth = dice.randint(1, most)
    crash(place, point, *WORKERS, golden=golden, nth=nth, **at_start(place, *mode))
    assert_resumed(place, *WORKERS, golden=golden)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), (AHEAD,)], ids=["in turn", "ahead"])
@pytest.mark.parametrize("nth", [2, 5])
@pytest.mark.parametrize("point", WORKER[2:])
def test_a_worker_killed_at_each_point_later_on_costs_its_own_tasks_an_attempt(
    point: str, nth: int, mode: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    running = killed_worker(place, point, nth, *mode)
    after(place, ended := running.wait(), running=running, golden=golden, ids=NAMES)
    assert ended.code == 0, ended.text
    assert_only_its_own_was_tried_again(place, point, mode)
