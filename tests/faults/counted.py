"""A plugin of pytest that counts what the fault suite really does, for the table of docs/reliability.md.

    PYTHONPATH=tests/faults python -m pytest -p counted -m "slow or not slow" -n 2 tests/faults tests/end_to_end/test_crashes.py

Each process of the run adds a line of JSON to the file that IMAGEMILL_COUNTED names (`counted.jsonl` without it); the last
lines of a run are their sum. Signals are counted by what they hit; those by which a test tidies up are not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FILE = Path(os.environ.get("IMAGEMILL_COUNTED", "counted.jsonl")).absolute()
IN_USE = "another run works in this folder"
TIDYING = ("end", "pytest_runtest_teardown")
"""Functions whose signals are no faults."""

counts: Counter[str] = Counter()
kill, killpg, start = os.kill, os.killpg, subprocess.Popen.__init__


def target(pid: int) -> str:
    """What a process is."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "what is gone"
    names = {b"imagemill.worker": "a worker", b"imagemill.cli": "a driver"}
    return next((names[word] for word in words if word in names), "another process")


def note(pid: int, number: int) -> None:
    """Count a signal, unless it is none or tidies up."""
    if number and sys._getframe(2).f_code.co_name not in TIDYING:
        counts[f"signal: {signal.Signals(number).name} to {target(pid)}"] += 1


def told_kill(pid: int, number: int) -> None:
    """In place of `os.kill`."""
    note(pid, number)
    kill(pid, number)


def told_killpg(group: int, number: int) -> None:
    """In place of `os.killpg`."""
    note(group, number)
    killpg(group, number)


def told_start(self: Any, *arguments: Any, **how: Any) -> None:
    """In place of the constructor of `Popen`."""
    command = how.get("args", arguments[0] if arguments else ())
    if "imagemill.cli" in command:
        counts["commands started"] += 1
        point = (how.get("env") or os.environ).get("IMAGEMILL_CRASH_AT")
        if point:
            counts[f"crash point: {point.partition(':')[0]}"] += 1
    start(self, *arguments, **how)


def pytest_configure(config: pytest.Config) -> None:
    """Begin."""
    os.kill, os.killpg = told_kill, told_killpg
    subprocess.Popen.__init__ = told_start  # type: ignore[method-assign]
    if not hasattr(config, "workerinput"):
        FILE.unlink(missing_ok=True)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Count the test, and what it left that tells of faults."""
    report = (yield).get_result()
    if report.when != "call":
        return
    counts[f"tests {report.outcome}"] += 1
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    for path in folder.rglob("*") if folder else ():
        if path.suffix == ".err" and IN_USE in path.read_text("utf-8", "replace"):
            counts["second drivers refused"] += 1
        if path.name == "life-clock":
            counts["readings of a clock that jumps by a day"] += path.stat().st_size


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Add what this process has counted."""
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(counts) + "\n")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say the sums."""
    total: Counter[str] = Counter()
    for line in FILE.read_text("utf-8").splitlines():
        total.update(json.loads(line))
    for name, count in sorted(total.items()):
        terminalreporter.write_line(f"{count:8}  {name}")
