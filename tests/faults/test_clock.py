"""The wall clock set a day forward and back: no time-out fires, no duration is negative, no count is wrong."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

import pytest
from checks import HASTE, ROOT, after, at_start, has_pictures

from command import WORKERS, kill_the_driver, until
from workplace import Workplace, rows

COUNT = 12
NAMES = {f"t{number}" for number in range(COUNT)}
DAY = 86_400
LONG = 600.0
"""Seconds that no run of this file takes, nor anything in it."""

BACK, FORWARD, BOTH = "-readings", "readings", "(0, 1, -1)[readings % 3]"
"""By how many days the clock of a process is wrong when it is read for the nth time."""


def jumping(days: str) -> str:
    """For `at_start`: a clock that is set between any two readings."""
    return f"""
import time
real, readings = time.time, 0

def jumping():
    global readings
    readings += 1
    life("clock")
    return real() + {DAY} * {days}

time.time = jumping
"""


def shifted(days: int) -> str:
    """For `at_start`: a clock that is so many days wrong."""
    return f"import time; real = time.time; time.time = lambda: real() + {days * DAY}"


def durations(place: Workplace) -> Iterator[tuple[str, float]]:
    """Every duration that the ledger, the reports and the trace tell, in seconds."""
    for table in ("runs", "attempts", "spans"):
        for (seconds,) in place.ledger(f"SELECT ended - started FROM {table}"):
            yield table, seconds
    for began, started, ended in place.ledger(
        "SELECT r.started, a.started, a.ended FROM attempts a JOIN runs r USING (run)"
    ):
        yield "from the run's start to an attempt's", started - began
        yield "from the run's start to an attempt's end", ended - began
    for result in place.results():
        yield result["id"], result["elapsed"] or 0.0
    report = json.loads((place.folder / "out" / "report.json").read_text("utf-8"))
    for run in report["runs"]:
        yield "run", run["seconds"]
        for worker in run["workers"]:
            yield from (
                (name, worker[name]) for name in worker if name.endswith("_seconds") and worker[name] is not None
            )
    for event in json.loads((place.folder / "out" / "trace.json").read_text("utf-8")):
        if event["ph"] == "X":
            yield event["name"], event["dur"] / 1e6
            yield event["name"], event["ts"] / 1e6


def in_words(text: str) -> list[int]:
    """The numbers of "12 done (8 in this run"."""
    done, _, rest = text.partition(" done (")
    return [int(done.rpartition("\n")[2]), int(rest.split()[0])]


@pytest.mark.parametrize(("crew", "days"), [((), BACK), (WORKERS, FORWARD)], ids=["inline back", "processes forward"])
def test_while_the_clock_jumps_no_time_out_fires_and_no_duration_is_negative(
    crew: tuple[str, ...], days: str, place: Workplace, golden: dict[str, str]
) -> None:
    place.write("settings.yaml", "limits: {task_timeout: 3.0, load_timeout: 3.0}\n")
    # One failure of the passing kind: the wait before it is tried again is a time too.
    place.tasks(rows(COUNT, delay=0.4, t2={"delay": 0.1, "fail": "transient", "fail_attempts": 1}))
    environment = at_start(place, jumping(days))
    running = place.start_fake("tasks.jsonl", "out", *crew, "--config", "settings.yaml", "--trace", **environment)
    states = after(place, ended := running.wait(), running=running, golden=golden, ids=NAMES)
    assert ended.code == 0, ended.text
    assert set(states.values()) == {"done"}
    assert (place.folder / "life-clock").stat().st_size >= 4
    assert place.ledger("SELECT id, kind FROM attempts WHERE kind IS NOT NULL") == [("t2", "transient")]
    assert place.ledger("SELECT count(*) FROM spans WHERE what = 'lost'") == [(0,)]
    told = list(durations(place))
    assert [(what, seconds) for what, seconds in told if not -1e-3 <= seconds < LONG] == []
    assert len(told) > 60
    assert in_words(ended.out) == [COUNT, COUNT]


def test_while_the_clock_jumps_a_hanging_task_is_still_ended_by_its_deadline_and_a_dead_worker_started_again(
    place: Workplace, golden: dict[str, str]
) -> None:
    place.write("settings.yaml", "limits: {task_timeout: 2.0}\n")
    place.tasks(rows(COUNT, t3={"hang": True, "hang_attempts": 1}, t6={"crash": "kill", "crash_attempts": 1}))
    environment = at_start(place, jumping(BOTH), HASTE)
    running = place.start_fake(
        "tasks.jsonl", "out", *WORKERS, "--schedule", "static", "--config", "settings.yaml", "--trace", **environment
    )
    after(place, ended := running.wait(), running=running, golden=golden, ids=NAMES)
    assert ended.code == 0, ended.text
    kinds = set(place.ledger("SELECT id, kind FROM attempts WHERE kind IS NOT NULL"))
    assert kinds == {("t3", "timeout"), ("t6", "worker_lost")}
    assert [(what, seconds) for what, seconds in durations(place) if not -1e-3 <= seconds < LONG] == []


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_set_between_two_runs_changes_no_count(days: int, place: Workplace, golden: dict[str, str]) -> None:
    running = place.start_fake(place.tasks(rows(COUNT, delay=0.2)), **at_start(place, shifted(days)))
    until(lambda: has_pictures(place, 4))
    kill_the_driver(running)
    ((kept,),) = place.ledger("SELECT count(*) FROM tasks WHERE state = 'done'")
    assert kept
    ended = place.fake(place.tasks(rows(COUNT)), "out", "--trace")
    assert ended.code == 0, ended.text
    assert in_words(ended.out) == [COUNT, COUNT - kept]
    assert in_words(place.fake("tasks.jsonl", "out", "--trace").out) == [COUNT, 0]
    after(place, golden=golden, ids=NAMES)
    report = json.loads((place.folder / "out" / "report.json").read_text("utf-8"))
    assert [run["pictures"] for run in report["runs"]] == [kept, COUNT - kept, 0]
    assert all(0 <= run["seconds"] < LONG for run in report["runs"])


# --- who looks at the clock -------------------------------------------------------------------------------------------

CLOCKS = {
    *("time", "time_ns", "localtime", "gmtime", "ctime", "strftime"),
    *("now", "utcnow", "today", "clock_gettime", "clock_gettime_ns"),
}
"""Names of functions of `time`, `datetime` and `date` that read the wall clock."""

ALLOWED = [("repair.py", "_build"), ("sitting.py", "_begin")]
"""One reading a run, or a repair, kept as the distance to the monotonic clock: for people, who want to know when it was."""


def readings() -> Iterator[tuple[str, str]]:
    """File and function of every call that reads the wall clock."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree: Any = ast.parse(path.read_text("utf-8"))
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime")
            for alias in node.names
        }
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
                continue
            for call in own_calls(function):
                name = call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "")
                room = getattr(getattr(call, "value", None), "attr", getattr(getattr(call, "value", None), "id", ""))
                if name in CLOCKS and (room in ("time", "datetime", "date") or name in imported):
                    yield path.name, getattr(function, "name", "")


def own_calls(function: Any) -> Iterator[Any]:
    """What a function calls itself, not what those inside it call."""
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Call):
            yield node.func
        yield from own_calls(node)


def test_the_wall_clock_is_read_once_a_run_and_nowhere_else() -> None:
    assert list(readings()) == ALLOWED
