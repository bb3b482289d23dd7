"""The runs of a folder: when each was, how fast, and what every worker did."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from imagemill.ledger import Ledger
from imagemill.report.figures import moment
from imagemill.report.lanes import Lane

LOSSES = 100
"""How many lost workers of a run are named."""

NOTES = 1000
"""The same for what workers changed."""

RUNS = "SELECT run, started, ended, status, settings, machine, stats FROM runs ORDER BY run"
BOUNDS = (
    "SELECT run, min(started) AS first, max(ended) AS last, sum(kind IS NULL) AS pictures, "
    "sum(kind IS NOT NULL) AS failures FROM attempts GROUP BY run"
)
SPANS = "SELECT run, worker, what, started, ended, note FROM spans ORDER BY run, worker, started"
# The members of a batch share its times: grouping them gives one row a batch, and one for its failures.
BATCHES = (
    "SELECT run, worker, started, ended, kind IS NULL AS ok, count(*) AS tasks FROM attempts "
    "WHERE worker IS NOT NULL AND started IS NOT NULL AND ended IS NOT NULL "
    "GROUP BY run, worker, started, ended, ok ORDER BY run, worker, started, ended, ok"
)


@dataclass(slots=True)
class Run:
    """One run. `ended` is None when it goes on or died; its seconds then count to the last thing the ledger knows.

    `pictures` and `failures` are attempts of this run that gave a picture, or none. `first` and `last` are the start of
    the first attempt and the end of the last. `notes` are what workers had to change on their way.
    """

    number: int
    started: float
    ended: float | None
    status: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    stats: Mapping[str, Any]
    pictures: int = 0
    failures: int = 0
    first: float | None = None
    last: float | None = None
    seen: float = 0.0
    lanes: dict[int, Lane] = field(default_factory=dict)
    losses: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def until(self) -> float:
        """The end of the run, or the last sign of life."""
        return max(self.started, self.ended if self.ended is not None else self.seen)

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.until - self.started

    @property
    def rate(self) -> float | None:
        """Pictures a second over the whole run, loading included."""
        return self.pictures / self.seconds if self.seconds > 0 else None

    @property
    def steady(self) -> float | None:
        """Pictures a second from the start of the first attempt to the end of the last."""
        if self.first is None or self.last is None or self.last <= self.first:
            return None
        return self.pictures / (self.last - self.first)

    @property
    def policy(self) -> str:
        """The policy's name, or empty where neither statistics nor settings tell."""
        return str(self.stats.get("policy") or self.settings.get("schedule") or "")

    @property
    def tuning(self) -> Mapping[str, Any]:
        """How its models were made fast, by their names; empty where the statistics do not tell."""
        known: Mapping[str, Any] = self.stats.get("tuning") or {}
        return known

    def lane(self, worker: int) -> Lane:
        """What this worker did, made when first asked for."""
        if worker not in self.lanes:
            known = _worker_stats(self.stats, worker)
            self.lanes[worker] = Lane(
                worker,
                str(known.get("label") or f"worker {worker}"),
                self.started,
                max(self.seconds, 1e-9),
                reported_idle=known.get("idle"),
                held=known.get("held"),
            )
        return self.lanes[worker]

    def as_json(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "run": self.number,
            "status": self.status,
            "started": moment(self.started),
            "ended": moment(self.ended),
            "last_activity": moment(self.until),
            "seconds": round(self.seconds, 3),
            "pictures": self.pictures,
            "failed_attempts": self.failures,
            "pictures_per_second": _rounded(self.rate),
            "steady_pictures_per_second": _rounded(self.steady),
            "policy": self.policy or None,
            "workers": [lane.as_json() for _, lane in sorted(self.lanes.items())],
            "lost": self.losses,
            "tuning": dict(self.tuning),
            "notes": self.notes,
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "stats": dict(self.stats),
        }


def read_runs(ledger: Ledger) -> list[Run]:
    """Every run of the folder, oldest first."""
    runs = {run.number: run for run in _bare(ledger)}
    for row in ledger.rows(BOUNDS):
        run = runs[row["run"]]
        run.pictures, run.failures = row["pictures"], row["failures"]
        run.first, run.last = row["first"], row["last"]
        run.seen = max(run.seen, row["last"] or 0.0)
    for row in ledger.rows("SELECT run, max(ended) AS last FROM spans GROUP BY run"):
        runs[row["run"]].seen = max(runs[row["run"]].seen, row["last"])
    for run in runs.values():
        for worker in run.stats.get("workers") or {}:
            run.lane(int(worker))
    for row in ledger.rows(SPANS):
        _add_span(runs[row["run"]], row)
    for row in ledger.rows(BATCHES):
        runs[row["run"]].lane(row["worker"]).batch(row["started"], row["ended"], bool(row["ok"]), row["tasks"])
    return list(runs.values())


def _bare(ledger: Ledger) -> Iterator[Run]:
    for row in ledger.rows(RUNS):
        texts = (json.loads(row[name]) for name in ("settings", "machine", "stats"))
        yield Run(row["run"], row["started"], row["ended"], row["status"], *texts)


def _add_span(run: Run, row: Mapping[str, Any]) -> None:
    lane, what = run.lane(row["worker"]), row["what"]
    told = {"worker": lane.worker, "label": lane.label, "after_seconds": round(row["ended"] - run.started, 3)}
    if what == "note":
        if len(run.notes) < NOTES:
            run.notes.append(told | {"note": row["note"]})
        return
    lane.span(what, row["started"], row["ended"])
    if what == "lost" and len(run.losses) < LOSSES:
        run.losses.append(told | {"reason": row["note"]})


def _worker_stats(stats: Mapping[str, Any], worker: int) -> Mapping[str, Any]:
    known: Mapping[str, Any] = (stats.get("workers") or {}).get(str(worker)) or {}
    return known


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
