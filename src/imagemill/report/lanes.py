"""What one worker did in one run: its figures, and its strip of the timeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WIDTH = 1000
"""Units across a timeline. Nothing finer is kept, so a strip holds at most `WIDTH / 2` blocks however long the run."""

BLOCK = 4.0
"""Blocks narrower than this are merged with their neighbour; wider ones stay apart, so that batches can be counted."""


@dataclass(slots=True)
class Strip:
    """Blocks of one colour, from left to right, as `[start, end]` in units of the timeline."""

    blocks: list[list[float]] = field(default_factory=list)
    _last_width: float = 0.0

    def add(self, start: float, end: float) -> None:
        """Put a block in; blocks come in the order of their starts."""
        end = max(end, start + 1)
        last = self.blocks[-1] if self.blocks else None
        overlaps = last is not None and start < last[1] - 0.01
        near = last is not None and start - last[1] < 1
        if last is not None and (overlaps or (near and min(end - start, self._last_width) < BLOCK)):
            last[1] = max(last[1], end)
        else:
            self.blocks.append([start, end])
        self._last_width = end - start

    def path(self, height: int) -> str:
        """The blocks as the `d` of one SVG path, with a hair between wide neighbours."""
        parts = []
        for start, end in self.blocks:
            width = min(end, WIDTH) - start
            width -= 1 if width > BLOCK else 0
            parts.append(f"M{start:.1f} 0h{width:.1f}v{height}h-{width:.1f}z")
        return "".join(parts)


@dataclass(slots=True)
class Lane:
    """A worker's share of a run. All times are seconds.

    `busy` is the time in which at least one task ran, `load` that of loading models. `reported_idle` and `held` come from
    the scheduler's own statistics; `held` is the part of the idle time that the policy made it wait.
    """

    worker: int
    label: str
    started: float
    seconds: float
    reported_idle: float | None = None
    held: float | None = None
    pictures: int = 0
    failures: int = 0
    busy: float = 0.0
    load: float = 0.0
    losses: int = 0
    strips: dict[str, Strip] = field(default_factory=dict)
    _horizon: float = 0.0

    @property
    def idle(self) -> float:
        """As the scheduler counted it, else what is left of the run beside work and loading."""
        return self.reported_idle if self.reported_idle is not None else max(0.0, self.seconds - self.busy - self.load)

    def batch(self, started: float, ended: float, ok: bool, tasks: int) -> None:
        """Count a batch, or the failures of one; batches come in the order of their starts."""
        self.busy += max(0.0, ended - max(started, self._horizon))
        self._horizon = max(self._horizon, ended)
        if ok:
            self.pictures += tasks
        else:
            self.failures += tasks
        self._draw("done" if ok else "failed", started, ended)

    def span(self, what: str, started: float, ended: float) -> None:
        """Count what the worker did outside batches: `load`, or `lost`."""
        if what == "load":
            self.load += max(0.0, ended - started)
        if what == "lost":
            self.losses += 1
            started = ended
        self._draw(what, started, ended)

    def _draw(self, what: str, started: float, ended: float) -> None:
        scale = WIDTH / self.seconds
        start = min(max((started - self.started) * scale, 0.0), WIDTH - 1.0)
        self.strips.setdefault(what, Strip()).add(start, max(start, (ended - self.started) * scale))

    def as_json(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "worker": self.worker,
            "label": self.label,
            "tasks": self.pictures + self.failures,
            "pictures": self.pictures,
            "failed_attempts": self.failures,
            "busy_seconds": round(self.busy, 3),
            "load_seconds": round(self.load, 3),
            "idle_seconds": round(self.idle, 3),
            "held_seconds": None if self.held is None else round(self.held, 3),
            "losses": self.losses,
        }
