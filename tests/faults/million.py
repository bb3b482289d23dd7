"""A million tasks: the driver's memory and the time of a resume, against stated bounds. Run by hand: `make million`.

    python tests/faults/million.py [--tasks 1000000] [--memory 400] [--scan 180] [--folder DIR]

The `fake` model makes the pictures and the sink `none` drops them, so what is measured is the machinery. One run is
killed with SIGKILL at half, the same command finishes it, and a third finds everything done. Each row's metadata scripts
now and then a failure that passes. Exit code 1 when a bound is broken or a task is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

MEMORY = 400.0
"""MiB of the driver at most, however many tasks there are; docs/reliability.md states it."""

SCAN = 180.0
"""Seconds a million tasks at most, from the start of a resuming command to the first picture that it commits: the source
is read, checked, and compared with the ledger. docs/reliability.md states it."""

LOOK = 0.5
"""Seconds between two looks at the driver."""

FLAKY = 1000
"""Every so many-th task fails in its first attempt."""


def write_tasks(path: Path, tasks: int) -> None:
    """A JSONL file with ids, prompts of some 300 bytes and metadata."""
    with path.open("w") as out:
        for number in range(tasks):
            row = {"id": f"t{number}", "prompt": f"picture {number} " + "of a harbour at dawn " * 14}
            if number % FLAKY == 0:
                row |= {"fake": {"fail": "transient", "fail_attempts": 1}}  # type: ignore[assignment]
            out.write(json.dumps(row) + "\n")


def memory(pid: int) -> float:
    """The most MiB that the process has held so far; 0 when it is over."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def count(out: Path, query: str) -> int:
    """One number from the ledger; 0 while it cannot be asked."""
    try:
        with closing(sqlite3.connect(f"{(out / 'ledger.sqlite').absolute().as_uri()}?mode=ro", uri=True)) as ledger:
            return int(ledger.execute(query).fetchone()[0] or 0)
    except sqlite3.Error:
        return 0


DONE = "SELECT count(*) FROM tasks WHERE state = 'done'"


class Measured:
    """One `imagemill run`: seconds to its first new picture and to its end, its exit code, the driver's peak in MiB."""

    def __init__(self, source: Path, out: Path, workers: int) -> None:
        self.out = out
        self.peak = self.first = 0.0
        self._before = count(out, DONE)
        command = [sys.executable, "-m", "imagemill.cli", "run", source, "--out", out, "--model", "fake"]
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [*map(str, command), "--workers", str(workers), "--sink", "none", "--quiet"],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def until(self, stop: Callable[[], bool]) -> int | None:
        """Watch it to its end, or kill its driver once `stop` says so. Its exit code; None when it was killed."""
        while self._process.poll() is None:
            self.peak = max(self.peak, memory(self._process.pid))
            if not self.first and count(self.out, DONE) > self._before:
                self.first = time.monotonic() - self._began
            if stop():
                self._process.send_signal(signal.SIGKILL)
                self._process.wait()
                self.seconds = time.monotonic() - self._began
                return None
            time.sleep(LOOK)
        self.seconds = time.monotonic() - self._began
        return self._process.returncode


def check(out: Path, tasks: int) -> list[str]:
    """What the ledger and results.jsonl say against the promises."""
    wrong = []
    if (done := count(out, DONE)) != tasks:
        wrong.append(f"{done} of {tasks} are done")
    ids, lines, done = set(), 0, 0
    with (out / "results.jsonl").open() as results:
        for line in results:
            result = json.loads(line)
            ids.add(result["id"])
            lines, done = lines + 1, done + (result["state"] == "done")
    if (len(ids), lines, done) != (tasks, tasks, tasks):
        wrong.append(f"results.jsonl has {lines} lines of {len(ids)} tasks, {done} done")
    twice = "SELECT count(*) FROM (SELECT id FROM attempts WHERE kind IS NULL GROUP BY id HAVING count(*) > 1)"
    if number := count(out, twice):
        wrong.append(f"{number} tasks were made twice")
    return wrong


def measure(folder: Path, options: argparse.Namespace) -> list[str]:
    """The three runs; prints a line for each and returns what is wrong."""
    source, out, tasks = folder / "tasks.jsonl", folder / "out", options.tasks
    write_tasks(source, tasks)
    print(f"{tasks:,} tasks, {source.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} processors", flush=True)
    wrong = []
    scan = options.scan * max(tasks, 100_000) / 1e6
    for name in ("killed at half", "resumed", "nothing left to do"):
        run = Measured(source, out, options.workers)
        half = name == "killed at half"
        code = run.until(lambda half=half: half and count(out, DONE) >= tasks / 2)  # type: ignore[misc]
        done = count(out, DONE)
        first = f"first picture after {run.first:.0f} s, " if run.first else ""
        print(f"{name}: {first}{run.seconds:.0f} s, {done:,} done, driver {run.peak:.0f} MiB", flush=True)
        if code != (None if half else 0):
            wrong.append(f"{name}: exit code {code}")
        if run.peak > options.memory:
            wrong.append(f"{name}: the driver held {run.peak:.0f} MiB, over {options.memory:.0f}")
        if run.first > scan:
            wrong.append(f"{name}: the first picture came after {run.first:.0f} s, over {scan:.0f}")
    print(f"ledger {(out / 'ledger.sqlite').stat().st_size / 1e6:.0f} MB")
    return wrong + check(out, tasks)


def main() -> None:
    """Measure, print, and end with 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", type=float, default=MEMORY, help="MiB of the driver at most")
    parser.add_argument("--scan", type=float, default=SCAN, help="seconds a million tasks")
    parser.add_argument("--folder", help="where the files go; a temporary folder when none is given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        wrong = measure(Path(scratch), options)
    print("\n".join(wrong) or "all bounds kept, every task done once")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
