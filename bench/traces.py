"""What a trace in Chrome's format says of the GPUs: how long no stage was under way on them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GPU_STAGES = ("encode", "denoise", "decode", "judge")


def idle(events: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of the time from the first picture's decode to the last one's in which no GPU stage was under way.

    Events as in Chrome's trace format, complete ones (`ph` X); those of category `gpu` count, else those named like a
    stage. Each process is a GPU of its own; the mean of all. None without two pictures.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    on_gpu = [event for event in complete if "gpu" in str(event.get("cat", "")).lower()]
    on_gpu = on_gpu or [event for event in complete if _stage(event)]
    shares = []
    for pid in {event.get("pid") for event in on_gpu}:
        own = sorted((e["ts"], e["ts"] + e.get("dur", 0)) for e in on_gpu if e.get("pid") == pid)
        ends = [e["ts"] + e.get("dur", 0) for e in on_gpu if e.get("pid") == pid and "decode" in str(e.get("name"))]
        if len(ends) > 1:
            shares.append(1 - _covered(own, min(ends), max(ends)) / (max(ends) - min(ends)))
    return sum(shares) / len(shares) if shares else None


def _stage(event: Mapping[str, Any]) -> bool:
    return any(stage in str(event.get("name", "")).lower() for stage in GPU_STAGES)


def _covered(spans: Sequence[tuple[float, float]], first: float, last: float) -> float:
    """How much of the time between two moments lies in at least one of the spans, which come ordered."""
    covered, reached = 0.0, first
    for begin, end in spans:
        begin, end = max(begin, reached), min(end, last)
        if end > begin:
            covered += end - begin
            reached = end
    return covered


def events_of(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file: a list, or an object that holds one."""
    data = json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    events: list[dict[str, Any]] = data["traceEvents"] if isinstance(data, dict) else data
    return events
