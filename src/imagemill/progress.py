"""What a person sees while a run goes on: a live display on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Protocol, TextIO

from imagemill.policies import Lockstep
from imagemill.records import BatchEnded, Event, Outcome, PlannedTask, WorkerBeat, WorkerLost, WorkerReady
from imagemill.schedule import Scheduler

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger("imagemill")

PLAIN_INTERVAL = 5.0
"""Seconds between two plain lines."""

RATE_WINDOW = 200
"""Ended pictures from which the current rate is taken."""

RATE_SPAN = 0.5
"""Seconds: outcomes are committed together, so that fewer say nothing of a rate."""


class Progress(Protocol):
    """Is told what happens; shows it or not."""

    def begin(self, total: int | None, labels: Mapping[int, str]) -> None:
        """A run begins; `total` tasks (None: not known), `labels` name the workers' devices."""

    def note(self, text: str) -> None:
        """A line that a person should read before the work starts."""

    def event(self, event: Event) -> None:
        """A fact from a worker."""

    def dispatched(self, worker: int, tasks: Sequence[PlannedTask]) -> None:
        """A worker was given a batch."""

    def settled(self, outcome: Outcome) -> None:
        """A task has ended for good."""

    def refresh(self, scheduler: Scheduler) -> None:
        """A turn of the loop is over."""

    def end(self) -> None:
        """The run is over."""


@dataclass(slots=True)
class WorkerView:
    """What is shown of one worker."""

    label: str
    state: str = "starting"
    task: str = ""
    adapter: str = ""
    step: int = 0
    steps: int = 0
    memory: int = 0


@dataclass(slots=True)
class Tally:
    """The counts behind every display. `done` counts this run's own; `resumed` what an earlier run had made.

    `stage` goes before the line, and `unit` is what one task gives.
    """

    total: int | None = None
    stage: str = ""
    unit: str = "picture"
    done: int = 0
    failed: int = 0
    resumed: int = 0
    started: float = field(default_factory=time.monotonic)
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW))
    workers: dict[int, WorkerView] = field(default_factory=dict)
    round_text: str = ""

    def rate(self) -> float:
        """Pictures a second over the last ones; 0 until they span `RATE_SPAN`."""
        if len(self.ends) < 2 or self.ends[-1] - self.ends[0] < RATE_SPAN:
            return 0.0
        return (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])

    def left(self) -> float | None:
        """Seconds to go at the current rate; None when unknown."""
        rate = self.rate()
        if self.total is None or not rate:
            return None
        return max(0, self.total - self.done - self.failed - self.resumed) / rate

    def line(self) -> str:
        """All in one line: `412/1632 done, 1 failed, 3.1 pictures/s, 6 min 34 s left`."""
        ended = self.done + self.resumed
        parts = [f"{ended}/{self.total} done" if self.total is not None else f"{ended} done"]
        if self.resumed:
            parts[0] += f" ({self.resumed} by an earlier run)"
        if self.failed:
            parts.append(f"{self.failed} failed")
        rate, left = self.rate(), self.left()
        if rate:
            parts.append(f"{rate:.1f} {self.unit}s/s" if rate >= 0.95 else f"{1 / rate:.1f} s a {self.unit}")
        if left is not None and left >= 1:
            parts.append(f"{duration(left)} left")
        return f"{self.stage} " * bool(self.stage) + ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them: `48 s`, `6 min 34 s`, `3 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _printable(text: str) -> str:
    """The text in one line: an id may hold line ends and the escapes of a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


class Silent:
    """Counts and shows nothing."""

    def __init__(self, stage: str = "", unit: str = "picture") -> None:
        self.tally = Tally(stage=stage, unit=unit)

    def begin(self, total: int | None, labels: Mapping[int, str]) -> None:
        """Start counting."""
        views = {number: WorkerView(label) for number, label in labels.items()}
        self.tally = Tally(total=total, stage=self.tally.stage, unit=self.tally.unit, workers=views)

    def note(self, text: str) -> None:
        """Say nothing."""

    def event(self, event: Event) -> None:
        """Keep what the worker says of itself."""
        view = self.tally.workers.get(getattr(event, "worker", -1))
        if view is None:
            return
        match event:
            case WorkerReady():
                view.state, view.memory = "ready", event.memory
            case WorkerBeat():
                view.state = event.stage or view.state
                view.step, view.steps, view.memory = event.step, event.steps, event.memory
            case BatchEnded():
                view.state, view.task, view.step, view.steps = "ready", "", 0, 0
            case WorkerLost():
                view.state, view.task, view.step, view.steps = "lost", "", 0, 0

    def dispatched(self, worker: int, tasks: Sequence[PlannedTask]) -> None:
        """Keep what the worker works on."""
        view = self.tally.workers[worker]
        view.state = "working"
        view.task = _printable(tasks[0].task.id) + (f" +{len(tasks) - 1}" if len(tasks) > 1 else "")
        names = [f"{lora.path.rsplit('/', 1)[-1]}@{lora.strength:g}" for lora in tasks[0].task.loras]
        view.adapter = _printable(" ".join(names))

    def settled(self, outcome: Outcome) -> None:
        """Count it."""
        if outcome.state == "failed":
            self.tally.failed += 1
        elif outcome.resumed:
            self.tally.resumed += 1
        else:
            self.tally.done += 1
            self.tally.ends.append(time.monotonic())

    def refresh(self, scheduler: Scheduler) -> None:
        """Note the rounds of lockstep."""
        if not isinstance(scheduler.policy, Lockstep):
            return
        crew = sum(worker.live for worker in scheduler.board.workers.values())
        to_do = len(scheduler.board.backlog) + len(scheduler.board.in_flight)
        open_rounds = ceil(to_do / crew) if crew else 0
        done = scheduler.rounds_done
        self.tally.round_text = f"round {done}/{done + open_rounds} done, {crew} workers in step" if crew else ""

    def end(self) -> None:
        """Nothing to close."""


class Logged(Silent):
    """For the library: logs what a person should read before the work starts, as a warning of the logger `imagemill`."""

    def note(self, text: str) -> None:
        """One record."""
        log.warning("%s", text)


class Plain(Silent):
    """One line every few seconds, for logs and pipes."""

    def __init__(
        self, out: TextIO | None = None, interval: float = PLAIN_INTERVAL, *, stage: str = "", unit: str = "picture"
    ) -> None:
        super().__init__(stage, unit)
        self._out = out or sys.stderr
        self._interval = interval
        self._last = time.monotonic()
        self._said = ""

    def begin(self, total: int | None, labels: Mapping[int, str]) -> None:
        """Start counting; what an earlier run said may be said again."""
        super().begin(total, labels)
        self._said = ""

    def note(self, text: str) -> None:
        """Print the line."""
        self._print(text)

    def _print(self, text: str) -> None:
        try:
            print(text, file=self._out, flush=True)
        except OSError:
            # Whoever read the lines has gone, or the disk that keeps them is full; the run goes on without them.
            self._out = open(os.devnull, "w")  # noqa: SIM115

    def refresh(self, scheduler: Scheduler) -> None:
        """Say how far the run is, when it is time and there is news."""
        super().refresh(scheduler)
        if time.monotonic() - self._last >= self._interval:
            self._say()

    def _say(self) -> None:
        self._last = time.monotonic()
        text = f"{self.tally.round_text}: {self.tally.line()}" if self.tally.round_text else self.tally.line()
        if text != self._said:
            self._said = text
            self._print(text)

    def end(self) -> None:
        """Say the last count."""
        self._say()


class Terminal(Silent):
    """One line over all and one a worker, redrawn in place. A terminal that is gone shows nothing more; the run goes on."""

    def __init__(self, stage: str = "", unit: str = "picture") -> None:
        super().__init__(stage, unit)
        from rich.console import Console
        from rich.live import Live

        self._live = Live(
            console=Console(stderr=True), get_renderable=self._render, refresh_per_second=8, transient=True
        )

    def begin(self, total: int | None, labels: Mapping[int, str]) -> None:
        """Start drawing."""
        super().begin(total, labels)
        with suppress(OSError):
            self._live.start()

    def note(self, text: str) -> None:
        """Print the line above the display."""
        with suppress(OSError):
            self._live.console.print(text, markup=False, highlight=False)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        tally = self.tally
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(width=24)
        head.add_column(ratio=1, no_wrap=True)
        bar = ProgressBar(total=tally.total or 1, completed=tally.done + tally.failed + tally.resumed, width=24)
        head.add_row(bar, Text(tally.line() + (f"; {tally.round_text}" if tally.round_text else "")))
        crew = Table.grid(padding=(0, 2), expand=True)
        for _ in range(3):
            crew.add_column(no_wrap=True)
        crew.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for number, view in tally.workers.items():
            step = f"{view.step}/{view.steps}" if view.steps else ""
            memory = f"{view.memory / 2**30:.1f} GiB" if view.memory else ""
            crew.add_row(
                Text(f"{number} {view.label}", style="bold"),
                Text(f"{view.state} {step}".strip(), style="red" if view.state == "lost" else "cyan"),
                Text(memory, style="dim"),
                Text(f"{view.task} {view.adapter}".strip()),
            )
        return Group(head, crew)

    def end(self) -> None:
        """Clear the display and leave the last count."""
        with suppress(OSError):
            self._live.stop()
            print(self.tally.line(), file=sys.stderr)


def create(*, quiet: bool = False, stage: str = "", unit: str = "picture") -> Progress:
    """The display that fits standard error; `stage` goes before its counts, `unit` is what they count."""
    if quiet:
        return Silent(stage, unit)
    return Terminal(stage, unit) if sys.stderr.isatty() else Plain(stage=stage, unit=unit)
