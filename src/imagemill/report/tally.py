"""What report.json says: counts over the results, one pass, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imagemill.ledger import Ledger
from imagemill.report.figures import cut
from imagemill.report.runs import Run

FORMAT = 1
LISTED = 1000
"""How many failures, flagged pictures and skipped rows report.json names; results.jsonl has every task."""

MAX_GROUPS = 10_000
"""Distinct models, adapters or shapes that are counted apart; what comes after goes under `others`."""

OTHERS = "(others)"
SKIPPED = (
    "SELECT place, reason FROM skipped s WHERE run = (SELECT max(run) FROM runs) "
    "OR EXISTS (SELECT 1 FROM tasks t WHERE t.run = s.run) GROUP BY place, reason ORDER BY min(rowid)"
)


@dataclass(slots=True)
class Group:
    """Tasks that have a model, an adapter or a shape in common. `seconds` are those of the `done` ones together, 0 where
    a ledger was rebuilt and does not know them."""

    name: str
    states: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    strengths: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """For report.json."""
        done = self.states["done"]
        found: dict[str, Any] = {"name": self.name, "tasks": self.states.total()}
        found |= {state: self.states[state] for state in ("done", "failed", "pending")}
        found["mean_seconds"] = round(self.seconds / done, 4) if done and self.seconds else None
        if self.strengths:
            found["strengths"] = list(self.strengths)
        return found


class Groups:
    """Groups by name, at most `MAX_GROUPS` of them."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}

    def add(self, name: str, result: Mapping[str, Any], strength: float | None = None) -> None:
        """Count a result under a name."""
        if name not in self._groups and len(self._groups) >= MAX_GROUPS:
            name = OTHERS
        group = self._groups.setdefault(name, Group(name))
        group.states[result["state"]] += 1
        if result["state"] == "done":
            group.seconds += result["elapsed"] or 0.0
        if strength is not None:
            low, high = group.strengths or (strength, strength)
            group.strengths = min(low, strength), max(high, strength)

    def as_json(self) -> list[dict[str, Any]]:
        """The largest first, at most `LISTED`."""
        ordered = sorted(self._groups.values(), key=lambda group: (-group.states.total(), group.name))
        return [group.as_json() for group in ordered[:LISTED]]


@dataclass(slots=True)
class Tally:
    """Counts over all results. A task with two adapters counts under both; one with none counts under none."""

    states: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    bytes: int = 0
    flagged_total: int = 0
    models: Groups = field(default_factory=Groups)
    adapters: Groups = field(default_factory=Groups)
    shapes: Groups = field(default_factory=Groups)
    failures: list[dict[str, Any]] = field(default_factory=list)
    flagged: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: Mapping[str, Any]) -> None:
        """Count one result."""
        self.states[result["state"]] += 1
        self.bytes += result["bytes"] or 0
        self.retried += result["state"] == "done" and result["attempts"] > 1
        self.models.add(str(result["model"]), result)
        self.shapes.add(f"{result['width']}x{result['height']}" if result["width"] else "answer", result)
        for lora in result["loras"] or ():
            self.adapters.add(lora["path"], result, lora["strength"])
        if result["state"] == "failed":
            self._fail(result)
        if result["flags"]:
            self._flag(result)

    def _fail(self, result: Mapping[str, Any]) -> None:
        self.kinds[result["kind"] or "unknown"] += 1
        if len(self.failures) < LISTED:
            shown = {name: result[name] for name in ("id", "kind", "message", "attempts", "worker")}
            self.failures.append(shown | {"prompt": cut(result["prompt"], 400)})

    def _flag(self, result: Mapping[str, Any]) -> None:
        self.flags.update(result["flags"])
        self.flagged_total += 1
        if len(self.flagged) < LISTED:
            self.flagged.append({name: result[name] for name in ("id", "flags", "path")})


def read_skipped(ledger: Ledger) -> dict[str, Any]:
    """Rows of the sources that made no task: total and the first of them.

    Every run notes its skipped rows again, so equal ones count once; those of a run all of whose tasks a later run
    took over are left out, as the later run has noted what still holds.
    """
    total = next(iter(ledger.rows(f"SELECT count(*) AS total FROM ({SKIPPED})")))["total"]
    rows = ledger.rows(f"{SKIPPED} LIMIT ?", (LISTED,))
    return {"total": total, "rows": list(rows)}


def summarise(tally: Tally, runs: Sequence[Run], skipped: Mapping[str, Any]) -> dict[str, Any]:
    """The content of report.json. Durations are seconds, moments ISO 8601 in UTC, sizes bytes.

    `pictures_per_second` is over the runs that made a picture: a run that found everything done tells nothing of speed.
    """
    making = [run for run in runs if run.pictures and run.seconds > 0]
    wall = sum(run.seconds for run in making)
    return {
        "format": FORMAT,
        "tasks": {"total": tally.states.total()} | {s: tally.states[s] for s in ("done", "failed", "pending")},
        "failed_by_kind": dict(tally.kinds.most_common()),
        "retried": tally.retried,
        "bytes": tally.bytes,
        "wall_seconds": round(sum(run.seconds for run in runs), 3),
        "pictures_per_second": round(sum(run.pictures for run in making) / wall, 4) if making else None,
        "skipped": dict(skipped),
        "runs": [run.as_json() for run in runs],
        "models": tally.models.as_json(),
        "adapters": tally.adapters.as_json(),
        "shapes": tally.shapes.as_json(),
        "failures": {"total": tally.states["failed"], "rows": tally.failures},
        "flags": {"total": tally.flagged_total, "counts": dict(tally.flags.most_common()), "rows": tally.flagged},
    }
