"""A soak: runs that something is done to every second, for half an hour. Run by hand: `make soak`.

    python tests/faults/soak.py [--minutes 30] [--every 1.0] [--seed 1] [--tasks 120]

Rounds of one folder each: 2 workers, tasks of which some crash, hang or fail once by themselves, and a random fault to a
worker, to the driver or to a picture. A run that ended, however, is started again. At the end of a round, the same
command without faults must finish everything, and all checks of the fault suite must hold. Exit code 1 when one does not.
"""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

from _pytest.outcomes import Failed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from checks import after, at_start, golden_of, temporary_files, workers

from command import GONE_WITHIN, kill, until
from workplace import Workplace, rows

STUCK = 180.0
"""Seconds in which a run must end an attempt, or itself: far more than any deadline of its settings."""

SETTINGS = "limits: {task_timeout: 4.0, load_timeout: 30.0}\n"
FOLDER, SOURCE = "out", "tasks.jsonl"

PENDING = "SELECT count(*) FROM tasks WHERE state = 'pending'"
ATTEMPTS = "SELECT count(*) FROM attempts"

HOOKS = """
if fd >= 0:
    import errno, signal
    def garbage(*_):
        os.write(fd, os.urandom(64))
    def full(*_):
        real = os.fsync
        def fsync(handle):
            os.fsync = real
            raise OSError(errno.ENOSPC, "No space left on device")
        os.fsync = fsync
    signal.signal(signal.SIGUSR1, garbage)
    signal.signal(signal.SIGUSR2, full)
"""
"""Put into every worker: SIGUSR1 writes garbage into its pipe, after SIGUSR2 the disk is full for the next picture."""

TO_WORKERS = {
    "SIGKILL to a worker": signal.SIGKILL,
    "SIGSEGV to a worker": signal.SIGSEGV,
    "SIGABRT to a worker": signal.SIGABRT,
    "SIGTERM to a worker": signal.SIGTERM,
    "SIGSTOP to a worker": signal.SIGSTOP,
    "garbage on a worker's pipe": signal.SIGUSR1,
    "disk full for a worker": signal.SIGUSR2,
}
TO_DRIVER = {"SIGINT to the driver": signal.SIGINT, "SIGTERM to the driver": signal.SIGTERM}


def scripted(count: int, rng: Random) -> list[dict[str, Any]]:
    """Tasks of a moment each; one in ten has trouble of its own in its first attempt."""
    troubles: list[dict[str, Any]] = [
        {"crash": "segv", "crash_attempts": 1},
        {"crash": "exit", "crash_attempts": 1},
        {"hang": True, "hang_attempts": 1},
        {"hang": "spin", "hang_attempts": 1},
        {"fail": "transient", "fail_attempts": 2},
        {"fail": "bad_output", "fail_attempts": 1},
        {"fail": "worker_lost", "fail_attempts": 1},
        {"fail": "oom", "fail_attempts": 1},
    ]
    made = rows(count)
    for row in made:
        row["fake"] = {"delay": round(rng.uniform(0.05, 0.4), 2)}
        if rng.random() < 0.1:
            row["fake"] |= rng.choice(troubles)
    return made


class Moves:
    """Whether a run goes on: its ledger's attempts grow, or it ends."""

    def __init__(self, count: Callable[[str], int]) -> None:
        self._count = count
        self._last, self._known = time.monotonic(), -1

    def look(self, running: Any) -> None:
        """Raises `AssertionError` when nothing has moved for `STUCK` seconds."""
        now = self._count(ATTEMPTS)
        if now != self._known:
            self._last, self._known = time.monotonic(), now
        if time.monotonic() - self._last > STUCK:
            raise AssertionError(f"nothing has moved for {STUCK:g} s: {running.err[-2000:]}")


class Round:
    """One folder from its first run to the last check."""

    def __init__(self, folder: Path, rng: Random, tasks: int, faults: Counter[str]) -> None:
        self.place = Workplace(folder)
        self.rng, self.tasks, self.faults = rng, tasks, faults
        self.runs = 0
        self.place.write("settings.yaml", SETTINGS)
        self.golden = golden_of(self.place, tasks)
        self.place.tasks(scripted(tasks, rng), SOURCE)
        self.hooks = at_start(self.place, HOOKS)

    def start(self) -> Any:
        """The same command, with the hooks in its workers."""
        self.runs += 1
        options = ("--workers", "2", "--config", "settings.yaml", "--quiet")
        return self.place.start_fake(SOURCE, FOLDER, *options, **self.hooks)

    def count(self, query: str) -> int:
        """One number from the ledger; -1 while there is none to ask."""
        place = (self.place.folder / FOLDER / "ledger.sqlite").absolute().as_uri()
        try:
            with closing(sqlite3.connect(f"{place}?mode=ro", uri=True)) as ledger:
                return int(ledger.execute(query).fetchone()[0])
        except sqlite3.Error:
            return -1

    def under_fire(self, until: float, every: float) -> None:
        """Runs, and a fault every so often, until all is done or the time is over."""
        running, moves = self.start(), Moves(self.count)
        while time.monotonic() < until:
            time.sleep(every)
            if running.process.poll() is not None:
                code = running.wait().code
                self.faults[f"(ended with {code})"] += 1
                nobody(running)
                if code == 0 or self.count(PENDING) == 0:  # what failed is tried again at the end
                    break
                running, moves = self.start(), Moves(self.count)
                continue
            moves.look(running)
            self.strike(running)
        if running.process.poll() is None:
            kill_and_look(running)

    def strike(self, running: Any) -> None:
        """One random fault."""
        kinds: list[Callable[[Any], str | None]] = [self._worker] * 6 + [self._driver, self._picture]
        name = self.rng.choice(kinds)(running)
        if name:
            self.faults[name] += 1

    def _worker(self, running: Any) -> str | None:
        living = workers(running)
        if not living:
            return None
        name, victim = self.rng.choice(list(TO_WORKERS)), self.rng.choice(living)
        # A worker that has not come as far as the hooks dies of their signals, which is a fault as well.
        kill(victim, TO_WORKERS[name])
        return name

    def _driver(self, running: Any) -> str:
        if self.rng.random() < 0.5:
            kill_and_look(running)
            return "SIGKILL to the driver"
        name = self.rng.choice(list(TO_DRIVER))
        kill(running.pid, TO_DRIVER[name])
        if self.rng.random() < 0.5:
            kill(running.pid, TO_DRIVER[name])
            name += ", twice"
        return name

    def _picture(self, running: Any) -> str | None:
        made = sorted((self.place.folder / FOLDER).glob("*.png"))
        if not made:
            return None
        victim = self.rng.choice(made)
        if self.rng.random() < 0.5:
            victim.unlink(missing_ok=True)
            return "a picture deleted"
        os.truncate(victim, 10)
        return "a picture cut short"

    def check(self) -> None:
        """Without faults the same command does the rest, and everything holds."""
        options = ("--workers", "2", "--config", "settings.yaml", "--retry-failed")
        quiet, moves = self.place.start_fake(SOURCE, FOLDER, *options), Moves(self.count)
        while quiet.process.poll() is None:
            time.sleep(1)
            moves.look(quiet)
        ended = quiet.wait()
        assert ended.code == 0, ended.text
        ids = [f"t{number}" for number in range(self.tasks)]
        states = after(self.place, ended, out=FOLDER, running=quiet, golden=self.golden, ids=ids)
        assert set(states.values()) == {"done"}
        assert temporary_files(self.place.folder / FOLDER) == []


def kill_and_look(running: Any) -> None:
    """SIGKILL to the driver; all that it started must be gone within the seconds promised."""
    kill(running.pid)
    running.wait()
    try:
        until(lambda: not running.family(), GONE_WITHIN)
    except Failed:
        raise AssertionError("outlived the driver: " + "; ".join(map(described, running.family()))) from None


def described(pid: int) -> str:
    """A process in words, for the message of a soak that failed."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        maps = "worker.py loaded" if "ctypes" in Path(f"/proc/{pid}/maps").read_text() else "still importing"
    except OSError as error:
        return f"{pid} ({error.strerror})"
    return f"{pid} in state {state}, {maps}: {line}"


def nobody(running: Any) -> None:
    """A run that ended leaves no process."""
    assert running.family() == [], "a process outlives its driver"


def soak(options: argparse.Namespace) -> None:
    """Rounds until the time is over, and a line for each."""
    faults, end, number = Counter[str](), time.monotonic() + options.minutes * 60, 0
    while number == 0 or time.monotonic() < end:
        number += 1
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            one = Round(Path(scratch), Random(options.seed * 1000 + number), options.tasks, faults)
            try:
                one.under_fire(end, options.every)
                one.check()
            finally:
                for started in one.place.started:
                    started.end()
        print(f"round {number}: {one.runs} runs, {options.tasks} tasks done, all checks hold", flush=True)
    for name, count in sorted(faults.items()):
        print(f"{count:6}  {name}")
    tried = sum(count for name, count in faults.items() if not name.startswith("("))
    print(f"{tried} faults in {number} rounds, every task done, every check held")


def main() -> None:
    """Run, print, and end with a traceback and code 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=120, help="tasks a round")
    parser.add_argument("--folder", help="where the files go; a temporary folder when none is given")
    soak(parser.parse_args())
    sys.exit(0)


if __name__ == "__main__":
    main()
