"""What a person sees of a run: the count in one line, the rounds of lockstep, plain lines without repetition, and the
live display of a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import pytest
import rich.console
from rich.cells import cell_len

from imagemill import progress
from imagemill.progress import Plain, Progress, Silent, Tally, Terminal, WorkerView, duration
from imagemill.records import (
    BatchEnded,
    Lora,
    Outcome,
    PlannedTask,
    Receipt,
    SourceEnded,
    State,
    Task,
    TasksArrived,
    Ticket,
    WorkerBeat,
    WorkerLost,
    WorkerReady,
)
from imagemill.schedule import Scheduler

CONSOLE = rich.console.Console
LABELS = {0: "GPU 0", 1: "GPU 1"}


def outcome(state: State = "done", resumed: bool = False) -> Outcome:
    return Outcome(Task("a", "p"), 0, state, resumed=resumed)


def planned(name: str = "cat", *loras: Lora) -> PlannedTask:
    return PlannedTask(Task(name, "p", loras=loras), "f", Ticket(0))


def idle_scheduler() -> Scheduler:
    return Scheduler(LABELS)


def ended(worker: int = 0, batch: int = 1, seq: int = 0) -> BatchEnded:
    return BatchEnded(worker, batch, (Receipt(seq, 1, 16, 16),), (), frozenset())


class Clock:
    """Stands in for the module's `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


# --- the line ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tally", "line"),
    [
        (Tally(), "0 done"),
        (Tally(done=3), "3 done"),
        (Tally(total=0), "0/0 done"),
        (Tally(total=1632, done=412, failed=1), "412/1632 done, 1 failed"),
        (Tally(total=10, done=2, resumed=5), "7/10 done (5 by an earlier run)"),
        (Tally(total=10, resumed=10), "10/10 done (10 by an earlier run)"),
    ],
)
def test_the_line_counts_what_is_done_failed_and_resumed(tally: Tally, line: str) -> None:
    assert tally.line() == line


@pytest.mark.parametrize(
    ("spacing", "words"),
    [
        (0.5, "2.0 pictures/s, 49 s left"),
        (1.0, "1.0 pictures/s, 1 min 38 s left"),
        (4.0, "4.0 s a picture, 6 min 32 s left"),
        (400.0, "400.0 s a picture, 10 h 53 min left"),
        (0.49, ""),
        (0.0, ""),
    ],
)
def test_the_line_says_how_fast_and_how_long(spacing: float, words: str) -> None:
    tally = Tally(total=100, done=2)
    tally.ends.extend([50.0, 50.0 + spacing])
    assert tally.line() == ", ".join(filter(None, ["2/100 done", words]))


def test_nothing_is_left_when_all_is_settled_and_the_time_left_is_never_negative() -> None:
    tally = Tally(total=4, done=2, failed=1, resumed=3)
    tally.ends.extend([0.0, 10.0])
    assert tally.left() == 0
    assert "left" not in tally.line()
    tally.total = None
    assert tally.left() is None


def test_the_rate_is_that_of_the_last_pictures(clock: Clock) -> None:
    silent = Silent()
    silent.begin(10_000, LABELS)
    for _ in range(300):
        clock.now += 10
        silent.settled(outcome())
    for _ in range(progress.RATE_WINDOW):
        clock.now += 0.5
        silent.settled(outcome())
    assert silent.tally.rate() == pytest.approx(2.0)
    assert silent.tally.left() == pytest.approx((10_000 - 500) / 2)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (48.4, "48 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (394, "6 min 34 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (11_520, "3 h 12 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# --- counting ---------------------------------------------------------------------------------------------------------


def test_each_outcome_is_counted_once_and_in_its_place() -> None:
    silent = Silent()
    silent.begin(6, LABELS)
    for one in (outcome(), outcome(resumed=True), outcome("failed"), outcome("failed", resumed=True), outcome()):
        silent.settled(one)
    tally = silent.tally
    assert (tally.done, tally.resumed, tally.failed, len(tally.ends)) == (2, 1, 2, 2)


def test_a_worker_is_shown_as_it_says_of_itself() -> None:
    silent = Silent()
    silent.begin(2, LABELS)
    view = silent.tally.workers[1]
    assert view == WorkerView("GPU 1", state="starting")
    silent.event(WorkerReady(1, frozenset(), memory=5))
    assert (view.state, view.memory) == ("ready", 5)
    silent.dispatched(1, [planned("cat", Lora("/l/ink.safetensors", 0.80), Lora("b.safetensors")), planned("dog")])
    assert (view.state, view.task, view.adapter) == ("working", "cat +1", "ink.safetensors@0.8 b.safetensors@1")
    silent.event(WorkerBeat(1, 0, 3, 8, "denoise", 6))
    assert (view.state, view.step, view.steps, view.memory) == ("denoise", 3, 8, 6)
    silent.event(ended(1))
    assert (view.state, view.task, view.step, view.steps) == ("ready", "", 0, 0)
    silent.dispatched(1, [planned("dog")])
    silent.event(WorkerLost(1))
    assert (view.state, view.task) == ("lost", "")


def test_facts_of_nobody_shown_are_passed_over() -> None:
    silent = Silent()
    silent.event(WorkerBeat(5))
    silent.begin(1, LABELS)
    silent.event(WorkerBeat(5))
    silent.event(SourceEnded())
    assert set(silent.tally.workers) == {0, 1}


def test_a_new_run_counts_from_zero() -> None:
    silent = Silent()
    silent.begin(1, LABELS)
    silent.settled(outcome())
    silent.begin(7, {0: "CPU"})
    assert (silent.tally.done, silent.tally.total, list(silent.tally.workers)) == (0, 7, [0])


# --- lockstep ---------------------------------------------------------------------------------------------------------


def lockstep(tasks: int) -> Scheduler:
    """Two workers that are ready, with the first round open."""
    scheduler = Scheduler(LABELS, "lockstep")
    scheduler.on(TasksArrived(tuple(Ticket(seq) for seq in range(tasks))), 0.0)
    scheduler.on(SourceEnded(), 0.0)
    for worker in LABELS:
        scheduler.on(WorkerReady(worker, frozenset()), 1.0)
    return scheduler


def end_round(scheduler: Scheduler) -> None:
    batches = {worker.id: worker.batch for worker in scheduler.board.workers.values() if worker.batch}
    for worker, batch in batches.items():
        assert batch is not None
        scheduler.on(ended(worker, batch.id, batch.tickets[0].seq), 2.0)


def round_text(scheduler: Scheduler) -> str:
    silent = Silent()
    silent.begin(None, LABELS)
    silent.refresh(scheduler)
    return silent.tally.round_text


def test_lockstep_says_which_round_is_done_and_how_many_workers_are_in_step() -> None:
    scheduler, texts = lockstep(5), []
    for _ in range(4):
        texts.append(round_text(scheduler))
        end_round(scheduler)
    assert texts == [f"round {done}/3 done, 2 workers in step" for done in range(4)]


def test_lockstep_counts_only_the_workers_that_live() -> None:
    scheduler = lockstep(6)
    scheduler.on(WorkerLost(1), 1.5)
    assert round_text(scheduler).endswith("1 workers in step")
    scheduler.on(WorkerLost(0), 1.5)
    assert round_text(scheduler) == ""


def test_other_policies_have_no_rounds() -> None:
    assert round_text(idle_scheduler()) == ""


# --- plain lines ------------------------------------------------------------------------------------------------------


def plain(out: io.StringIO) -> Plain:
    made = Plain(out, interval=5.0)
    made.begin(4, LABELS)
    return made


def test_plain_lines_come_at_intervals_and_only_with_news(clock: Clock) -> None:
    out = io.StringIO()
    shown, scheduler = plain(out), idle_scheduler()
    shown.settled(outcome())
    shown.refresh(scheduler)
    assert out.getvalue() == ""
    clock.now += 5
    shown.refresh(scheduler)
    shown.settled(outcome("failed"))
    shown.refresh(scheduler)
    assert out.getvalue() == "1/4 done\n"
    clock.now += 5
    shown.refresh(scheduler)
    clock.now += 50
    shown.refresh(scheduler)
    assert out.getvalue() == "1/4 done\n1/4 done, 1 failed\n"


def test_the_last_count_is_said_once(clock: Clock) -> None:
    out = io.StringIO()
    shown = plain(out)
    shown.settled(outcome())
    shown.end()
    shown.end()
    assert out.getvalue() == "1/4 done\n"


def test_a_second_run_says_its_last_count_too(clock: Clock) -> None:
    out = io.StringIO()
    shown = plain(out)
    for _ in range(2):
        shown.begin(1, LABELS)
        shown.settled(outcome())
        shown.end()
    assert out.getvalue() == "1/1 done\n1/1 done\n"


def test_plain_lines_name_the_round_in_lockstep(clock: Clock) -> None:
    out = io.StringIO()
    shown, scheduler = plain(out), lockstep(4)
    end_round(scheduler)
    clock.now += 5
    shown.refresh(scheduler)
    assert out.getvalue() == "round 1/2 done, 2 workers in step: 0/4 done\n"


# --- the terminal -----------------------------------------------------------------------------------------------------


@pytest.fixture
def consoles(monkeypatch: pytest.MonkeyPatch) -> list[rich.console.Console]:
    """The consoles that displays made: 100 columns, recorded, nothing on the real terminal."""
    made: list[rich.console.Console] = []

    def create(**options: Any) -> rich.console.Console:
        assert options == {"stderr": True}
        made.append(CONSOLE(file=io.StringIO(), width=100, force_terminal=True, record=True, color_system=None))
        return made[-1]

    monkeypatch.setattr(rich.console, "Console", create)
    return made


def drawn(terminal: Terminal) -> list[str]:
    """The lines of the display as it is now."""
    console = CONSOLE(file=io.StringIO(), width=100, record=True, color_system=None)
    console.print(terminal._render())
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.usefixtures("consoles")
def test_the_terminal_shows_one_line_over_all_and_one_a_worker() -> None:
    terminal = Terminal()
    terminal.begin(8, LABELS)
    try:
        terminal.settled(outcome())
        terminal.settled(outcome("failed"))
        terminal.event(WorkerReady(0, frozenset(), memory=3 * 2**30))
        terminal.dispatched(0, [planned("a [red]cat[/red]", Lora("/l/ink.safetensors", 0.5))])
        terminal.event(WorkerBeat(0, 0, 3, 8, "denoise", 12 * 2**30))
        terminal.event(WorkerLost(1))
        terminal.tally.round_text = "round 1/4 done, 2 workers in step"
        head, first, second = drawn(terminal)
    finally:
        terminal.end()
    assert head.endswith("1/8 done, 1 failed; round 1/4 done, 2 workers in step")
    assert re.split(r"\s{2,}", first) == [
        "0 GPU 0",
        "denoise 3/8",
        "12.0 GiB",
        "a [red]cat[/red] ink.safetensors@0.5",
    ]
    assert re.split(r"\s{2,}", second) == ["1 GPU 1", "lost"]


@pytest.mark.usefixtures("consoles")
def test_a_long_task_name_never_takes_a_second_line() -> None:
    terminal = Terminal()
    terminal.begin(None, LABELS)
    try:
        terminal.dispatched(1, [planned("名字\nline two \x1b[2J " * 40)])
        lines = drawn(terminal)
    finally:
        terminal.end()
    assert len(lines) == 3
    assert all(cell_len(line) <= 100 for line in lines)
    assert lines[2].endswith("…")
    assert "\x1b" not in lines[2]


def test_the_terminal_display_goes_and_leaves_the_last_count(
    consoles: list[rich.console.Console], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    for _ in range(2):
        terminal.begin(1, LABELS)
        terminal.settled(outcome())
        terminal.end()
    assert capsys.readouterr().err == "1/1 done\n1/1 done\n"
    assert "0 GPU 0" in consoles[0].export_text()


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("options", "terminal", "kind"),
    [({}, True, Terminal), ({}, False, Plain), ({"quiet": True}, True, Silent), ({"quiet": True}, False, Silent)],
)
def test_the_display_fits_where_it_is_shown(
    options: Mapping[str, bool], terminal: bool, kind: type[Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", Stream(terminal))
    assert type(progress.create(**options)) is kind
