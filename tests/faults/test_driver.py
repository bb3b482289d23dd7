"""The driver asked to stop, left without a terminal, killed at any moment, started twice: it ends as promised, or goes on."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from checks import AHEAD, HASTE, ROOT, after, at_start, has_pictures, workers

from command import GONE_WITHIN, WORKERS, Ended, Started, kill, kill_the_driver, until
from imagemill.keeper import Keeper
from workplace import Workplace, rows

COUNT = 24
NAMES = {f"t{number}" for number in range(COUNT)}
SEED = 20250712

CREWS = pytest.mark.parametrize("crew", [(), WORKERS], ids=["inline", "processes"])


def started(place: Workplace, *crew: str, delay: float = 0.8, **environment: str) -> Any:
    """A run that has made a picture and is at work on the next."""
    running = place.start_fake(place.tasks(rows(COUNT, delay=delay)), "out", *crew, **environment)
    until(lambda: has_pictures(place, 1))
    return running


def stopped(place: Workplace, ended: Any, running: Any, golden: dict[str, str]) -> int:
    """Checks of a run that was stopped; returns how many tasks are done."""
    states = after(place, ended, running=running, golden=golden, ids=NAMES)
    assert set(states.values()) == {"done", "pending"}
    assert "not reached; the same command goes on" in ended.out
    return list(states.values()).count("done")


def goes_on(place: Workplace, golden: dict[str, str], *crew: str) -> None:
    """The same command does what is left, and only that."""
    running = place.start_fake(place.tasks(rows(COUNT)), "out", *crew)
    states = after(place, ended := running.wait(), running=running, golden=golden, ids=NAMES)
    assert ended.code == 0, ended.text
    assert set(states.values()) == {"done"}
    assert place.pixels() == golden


# --- asked to stop ----------------------------------------------------------------------------------------------------


@CREWS
def test_sighup_finishes_what_is_in_flight_however_often_it_comes(
    crew: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    running = started(place, *crew)
    for _ in range(3):
        running.signal(signal.SIGHUP)
        until(lambda: "stopping" in running.err)
    ended = running.wait()
    assert ended.code == 128 + signal.SIGHUP, ended.text
    assert ended.err.count("stopping") == 1
    assert stopped(place, ended, running, golden) >= 2
    assert set(place.ledger("SELECT kind FROM attempts")) == {(None,)}
    assert place.ledger("SELECT status FROM runs") == [("drained",)]
    goes_on(place, golden, *crew)


IGNORED = """
if fd < 0:
    import signal
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
"""
"""For `at_start`: what `nohup` does."""


def test_under_nohup_sighup_changes_nothing(place: Workplace, golden: dict[str, str]) -> None:
    running = started(place, delay=0.1, **at_start(place, IGNORED))
    running.signal(signal.SIGHUP)
    states = after(place, ended := running.wait(), running=running, golden=golden, ids=NAMES)
    assert ended.code == 0, ended.text
    assert set(states.values()) == {"done"}


@pytest.mark.parametrize(
    ("first", "second", "crew"),
    [
        (signal.SIGTERM, signal.SIGTERM, ()),
        (signal.SIGINT, signal.SIGTERM, WORKERS),
        (signal.SIGHUP, signal.SIGINT, WORKERS),
    ],
)
def test_the_second_signal_stops_at_once_with_the_code_of_the_first(
    first: signal.Signals, second: signal.Signals, crew: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    scripts = {f"t{number}": {"delay": 600} for number in range(4, COUNT)}
    running = place.start_fake(place.tasks(rows(COUNT, **scripts)), "out", *crew, "--schedule", "static")
    until(lambda: has_pictures(place, 4))
    running.signal(first)
    until(lambda: "stopping" in running.err)
    running.signal(second)
    ended = running.wait()
    assert ended.code == 128 + first, ended.text
    assert stopped(place, ended, running, golden) == 4
    goes_on(place, golden, *crew)


def test_the_second_signal_ends_the_command_though_the_worker_inside_it_hangs(
    place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(COUNT, t2={"hang": "spin"}))
    patient = "import imagemill.executors.inline as room; room.GRACE = 600"
    running = place.start_fake("tasks.jsonl", "out", **at_start(place, patient))
    until(lambda: has_pictures(place, 2))
    running.signal(signal.SIGINT)
    until(lambda: "stopping" in running.err)
    running.signal(signal.SIGINT)
    assert running.wait().code == 128 + signal.SIGINT
    after(place, running=running, golden=golden, ids=NAMES, clean=False)
    goes_on(place, golden)


@pytest.mark.parametrize("mode", [(), (AHEAD,)], ids=["in turn", "ahead"])
def test_a_signal_to_the_driver_and_all_its_workers_finishes_what_is_in_flight(
    mode: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    """As a service manager ends a service: each of its processes gets the signal."""
    running = started(place, *WORKERS, **at_start(place, *mode))
    for pid in [*workers(running), running.pid]:
        kill(pid, signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 128 + signal.SIGTERM, ended.text
    stopped(place, ended, running, golden)
    assert set(place.ledger("SELECT kind FROM attempts")) == {(None,)}


SLOW: dict[str, str] = {
    "reading": "import imagemill.intake as room; slow(room.Intake, 'stage')",
    "starting": "import imagemill.crew as room; slow(room, 'hire')",
    "leaving": "import imagemill.executors.processes as room; slow(room.ProcessExecutor, 'close')",
    "reporting": "import imagemill.report.drafts as room; slow(room.Drafts, 'write')",
}


def held_at(moment: str) -> str:
    """For `at_start`: the driver says when it has come to the moment, and then it takes for ever."""
    return f"""
if fd < 0:
    import time

    def slow(room, name):
        def call(*arguments, **more):
            print("it is there now", file=sys.stderr, flush=True)
            time.sleep(600)
        setattr(room, name, call)

    {SLOW[moment]}
"""


@pytest.mark.parametrize(("moment", "number"), list(zip(SLOW, [signal.SIGINT, signal.SIGTERM] * 2, strict=True)))
def test_a_signal_before_and_after_the_work_ends_the_command_with_its_code(
    moment: str, number: signal.Signals, place: Workplace, golden: dict[str, str]
) -> None:
    running = place.start_fake(place.tasks(rows(COUNT)), "out", *WORKERS, **at_start(place, held_at(moment)))
    until(lambda: "it is there now" in running.err)
    running.signal(number)
    ended = running.wait()
    assert ended.code == 128 + number, ended.text
    assert "Traceback" not in ended.err
    until(lambda: not running.family(), 5.0)
    if moment in ("leaving", "reporting"):
        after(place, golden=golden, ids=NAMES, clean=False)
    assert list((place.folder / "out").glob(".imagemill-*")) == []
    assert (place.folder / "out").exists() == (moment != "reading")
    goes_on(place, golden)


IN_A_WRITE = """
import array, fcntl, os, signal, sys, termios, threading, time
from imagemill.progress import Plain
from imagemill.signals import stop_signals

class Work:
    drained = 0
    def drain(self):
        self.drained += 1
        return True
    cancel = drain

reader, writer = os.pipe()
out = open(writer, "w")
work, size = Work(), 1 << 20

def interrupt():
    while array.array("i", fcntl.ioctl(reader, termios.FIONREAD, b"0000"))[0] < 65536:  # full: the writer waits
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    while not work.drained:
        time.sleep(0.01)
    with open(reader) as lines:
        sys.stdout.write(str(len(lines.read())))

other = threading.Thread(target=interrupt)
with stop_signals(work, Plain(out)) as code:
    other.start()
    print("x" * size, file=out, flush=True)
out.close()
other.join()
assert code == [130], code
"""


def test_a_signal_in_the_middle_of_a_write_to_a_pipe_that_nobody_reads_breaks_nothing() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(
        [sys.executable, "-c", IN_A_WRITE], env=environment, capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr.decode()
    note = "stopping: what is in flight is finished, a model that loads too; again to stop at once\n"
    assert int(ended.stdout) == (1 << 20) + 1 + len(note)


# --- the terminal is closed -------------------------------------------------------------------------------------------


class OnTerminal(Started):
    """A command whose output and session belong to a terminal, as one that a person started. `close` closes the terminal."""

    def __init__(self, place: Workplace, *command: str, **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=place.folder,
            env={**place.environment(**environment), "IMAGEMILL_TEST_MARK": self.mark, "TERM": "xterm"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        place.started.append(self)
        self._shown = bytearray()
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """What is shown is taken, or the command would be held up; until the terminal is closed."""
        os.set_blocking(self._master, False)
        while not self._closed.wait(0.01):
            with suppress(BlockingIOError, OSError):
                self._shown += os.read(self._master, 1 << 16)

    @property
    def err(self) -> str:
        return self._shown.decode(errors="replace")

    def close(self) -> None:
        self._closed.set()
        self._reader.join()
        os.close(self._master)

    def wait(self) -> Any:
        return Ended(self.process.wait(60), "", self.err)


RUN = ("-m", "imagemill.cli", "run", "tasks.jsonl", "--out", "out", "--model", "fake")


@CREWS
def test_a_terminal_that_is_closed_finishes_what_is_in_flight(
    crew: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(COUNT, delay=0.8))
    running = OnTerminal(place, *RUN, *crew)
    until(lambda: has_pictures(place, 1))
    running.close()
    ended = running.wait()
    assert ended.code == 128 + signal.SIGHUP, ended.text
    states = after(place, ended, running=running, golden=golden, ids=NAMES)
    assert set(states.values()) == {"done", "pending"}
    assert place.ledger("SELECT status FROM runs") == [("drained",)]
    assert (place.folder / "out" / "report.html").is_file()
    goes_on(place, golden, *crew)


SAYS_MORE = """
import sys, threading
from imagemill.progress import Silent
from imagemill.signals import stop_signals

asked = threading.Event()

class Work:
    def drain(self):
        return not asked.set()
    cancel = drain

with stop_signals(Work(), Silent()) as code:
    print("begun", flush=True)
    asked.wait()
    print("more", flush=True)
    print("more", file=sys.stderr, flush=True)
sys.exit(code[0])
"""


def test_what_is_said_once_the_terminal_is_gone_goes_nowhere_and_breaks_nothing(place: Workplace) -> None:
    running = OnTerminal(place, "-c", SAYS_MORE)
    until(lambda: "begun" in running.err)
    running.close()
    assert running.wait().code == 128 + signal.SIGHUP


@pytest.mark.parametrize("options", [(), ("--quiet",)], ids=["display", "quiet"])
def test_a_run_under_nohup_outlives_its_terminal(
    options: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(COUNT, delay=0.1))
    running = OnTerminal(place, *RUN, *options, **at_start(place, IGNORED))
    until(lambda: has_pictures(place, 1))
    running.close()
    ended = running.wait()
    assert ended.code == 0, ended.text
    states = after(place, ended, running=running, golden=golden, ids=NAMES)
    assert set(states.values()) == {"done"}


def test_ctrl_c_on_a_terminal_finishes_what_is_in_flight_and_says_so(place: Workplace, golden: dict[str, str]) -> None:
    place.tasks(rows(COUNT, delay=0.8))
    running = OnTerminal(place, *RUN, *WORKERS)
    until(lambda: has_pictures(place, 1))
    os.write(running._master, b"\x03")
    until(lambda: "stopping" in running.err)
    ended = running.wait()
    assert ended.code == 128 + signal.SIGINT, ended.text
    after(place, ended, running=running, golden=golden, ids=NAMES)
    running.close()


# --- two drivers ------------------------------------------------------------------------------------------------------


def test_of_many_drivers_started_at_once_in_one_folder_one_runs_and_the_others_refuse(
    place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(COUNT, delay=0.3))
    (place.folder / "link").symlink_to("out", target_is_directory=True)
    (place.folder / "out").mkdir()
    running = [place.start_fake("tasks.jsonl", out) for out in ("out", "link", "out/../out", place.folder / "out")]
    ends = [one.wait() for one in running]
    assert sorted(ended.code for ended in ends) == [0, 2, 2, 2]
    for ended in ends:
        assert ended.code == 0 or ("another run works in this folder" in ended.err and "--out" in ended.err)
    states = after(place, running=running[0], golden=golden, ids=NAMES)
    assert set(states.values()) == {"done"}
    assert place.ledger("SELECT count(*) FROM runs") == [(1,)]
    assert set(place.attempts().values()) == {1}


def test_a_lock_file_that_somebody_removed_lets_no_second_driver_in(place: Workplace, golden: dict[str, str]) -> None:
    running = started(place, delay=0.3)
    (place.folder / "out" / ".imagemill.lock").unlink()
    second = place.fake("tasks.jsonl")
    assert second.code == 2, second.text
    assert "another run works in this folder" in second.err
    after(place, ended := running.wait(), running=running, golden=golden, ids=NAMES)
    assert ended.code == 0, ended.text
    assert place.ledger("SELECT count(*) FROM runs") == [(1,)]


def test_a_stopped_driver_still_holds_its_folder_and_a_dead_one_does_not(
    place: Workplace, golden: dict[str, str]
) -> None:
    running = started(place, *WORKERS, delay=0.3)
    kill(running.pid, signal.SIGSTOP)
    assert place.fake("tasks.jsonl").code == 2
    kill(running.pid, signal.SIGCONT)
    until(lambda: has_pictures(place, 6))
    # At once, while its workers may still be dying.
    kill(running.pid)
    running.wait()
    goes_on(place, golden)
    assert running.family() == []


# --- killed, and what could outlive it --------------------------------------------------------------------------------

STOPS = """
if fd >= 0:
    import signal
    if life("worker") == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
"""
"""For `at_start`: the first worker is stopped before a line of imagemill has run in it."""

HELPER = """
if fd >= 0:
    import subprocess
    subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"])
"""
"""For `at_start`: a library starts a process in every worker, and leaves it to itself."""


def test_a_worker_stopped_before_its_first_line_ends_with_a_killed_driver(place: Workplace) -> None:
    running = place.start_fake(place.tasks(rows(4)), "out", *WORKERS, **at_start(place, STOPS))
    until(lambda: any(state_of(pid) == "T" for pid in workers(running)))
    kill_the_driver(running)


@pytest.mark.parametrize("how", [pytest.param("stopped", marks=pytest.mark.slow), "at work"])
def test_what_the_workers_of_a_killed_driver_have_started_ends_with_them(how: str, place: Workplace) -> None:
    running = started(place, *WORKERS, **at_start(place, HELPER))
    until(lambda: len(running.children()) == 4)
    for pid in running.children() if how == "stopped" else ():
        kill(pid, signal.SIGSTOP)
    kill_the_driver(running)


def test_without_its_keeper_a_run_goes_on_and_workers_still_end_with_the_driver(place: Workplace) -> None:
    running = started(place, *WORKERS, delay=0.3, **at_start(place, HASTE))
    (keeper,) = set(running.family()) - set(running.children()) - {running.pid}
    kill(keeper)
    victim = workers(running)[0]
    kill(victim)
    until(lambda: victim not in running.family() and len(workers(running)) == 2)
    kill_the_driver(running)


def test_the_keeper_kills_what_it_was_told_of_and_not_what_it_was_told_to_forget() -> None:
    def group() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, process_group=0)

    kept, forgotten = group(), group()
    keeper = Keeper()
    for one in (kept, forgotten):
        keeper.watch(one.pid)
    keeper.forget(forgotten.pid)
    keeper.close()
    assert kept.wait(GONE_WITHIN) == -signal.SIGKILL
    assert forgotten.poll() is None
    forgotten.communicate(b"\n")
    assert forgotten.returncode == 0


def test_a_keeper_that_takes_no_more_is_let_go_and_kills_nothing() -> None:
    sleeper = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, process_group=0)
    keeper = Keeper()
    assert keeper._process is not None
    os.kill(keeper._process.pid, signal.SIGSTOP)
    for _ in range(20_000):  # more than a pipe holds
        keeper.watch(sleeper.pid)
    assert keeper._process is None
    assert sleeper.poll() is None
    sleeper.communicate(b"\n")
    assert sleeper.returncode == 0


def state_of(pid: int) -> str:
    """The kernel's letter for what the process does; empty when it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


# --- killed at random moments -----------------------------------------------------------------------------------------

QUICK, LONG, KILLS = 2, 11, 4
"""Folders, and how often the driver is killed in each: eight kills in the quick suite, 52 in all."""

KINDS: Sequence[tuple[tuple[str, ...], tuple[str, ...]]] = (
    (WORKERS, (AHEAD,)),
    ((), ()),
    (WORKERS, ()),
    (("--isolate",), (AHEAD,)),
)
SOME = [*range(QUICK), *(pytest.param(number, marks=pytest.mark.slow) for number in range(QUICK, QUICK + LONG))]


@pytest.mark.parametrize("number", SOME)
def test_a_driver_killed_at_random_moments_loses_nothing_and_tells_nothing_untrue(
    number: int, place: Workplace, golden: dict[str, str]
) -> None:
    """The command is given again when all processes are gone, or at once, while workers of the last may still be dying."""
    dice = random.Random(SEED + number)
    crew, mode = KINDS[number % len(KINDS)]
    environment = at_start(place, *mode)
    place.tasks(rows(COUNT, delay=0.05))
    done, all_started = 0, []
    for _ in range(KILLS):
        running = place.start_fake("tasks.jsonl", "out", *crew, **environment)
        all_started.append(running)
        kill_within(running, place, done + dice.randint(0, 5), dice.uniform(0.0, 0.2))
        if dice.random() < 0.5:
            kill_the_driver(running)
        states = after(place, golden=golden, clean=False) if known(place) else {}
        now = list(states.values()).count("done")
        assert now >= done
        done = now
    goes_on(place, golden, *crew)
    assert set(place.attempts().values()) == {1}
    until(lambda: not any(running.family() for running in all_started), 5.0)


def kill_within(running: Any, place: Workplace, pictures: int, later: float) -> None:
    """SIGKILL to the driver this many seconds after that many pictures are there, unless it has ended by then."""
    until(lambda: has_pictures(place, pictures) or running.process.poll() is not None)
    with suppress(subprocess.TimeoutExpired):
        running.process.wait(later)
    kill(running.pid)
    running.wait()


def known(place: Workplace) -> bool:
    """Whether there is a ledger with its tables."""
    path: Path = place.folder / "out" / "ledger.sqlite"
    return path.exists() and bool(place.ledger("SELECT 1 FROM sqlite_master WHERE name = 'tasks'"))
