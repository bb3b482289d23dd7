"""trace.json: every stage of every worker in Chrome's trace format, which Perfetto (https://ui.perfetto.dev) opens.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Each worker is a process
of the trace. What keeps its device busy stands on tracks of its own, of category `gpu`, what the CPU does on others, of
category `cpu`. Stages that overlap never share a track.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from imagemill.errors import OutputError
from imagemill.records import Span

FILE_NAME = "trace.json"

LANES = 16
"""Tracks that one kind of stage may have; what overlaps more than that shares the last."""


def write(path: Path, spans_by_worker: Mapping[int, Sequence[Span]], labels: Mapping[int, str], origin: float) -> None:
    """A whole trace at once. Raises `OutputError`."""
    with TraceFile(path, labels, origin) as trace:
        for worker, spans in spans_by_worker.items():
            trace.add(worker, spans)


class TraceFile:
    """A trace that grows while the run goes on. Raises `OutputError` when it cannot be written.

    `labels` are the names of the workers' devices, `origin` is the moment of the monotonic clock that counts as 0. The
    file is an array of events, one a line, and nothing is kept in memory. Until `close` it lacks its closing bracket,
    which the format allows: what a run that died has left opens as well.
    """

    def __init__(self, path: Path, labels: Mapping[int, str], origin: float) -> None:
        self._path = path
        self._labels = labels
        self._origin = origin
        self._tracks: dict[int, _Tracks] = {}
        self._separator = "[\n"
        try:
            self._file = path.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise self._refused(error) from error
        for worker in sorted(labels):
            self._known(worker)

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, worker: int, spans: Iterable[Span]) -> None:
        """Write what a worker tells of its stages; they are in the file when this returns."""
        tracks = self._known(worker)
        events: list[dict[str, Any]] = []
        for span in sorted(spans, key=lambda span: span.start):
            start, end = (round((moment - self._origin) * 1e6) for moment in (span.start, span.start + span.seconds))
            track, start, new = tracks.place(_kind(span), start, end)
            events += [_named(worker, "thread_name", new, track)] if new else []
            events.append(_complete(worker, span, track, start, end))
        self._write(events)

    def close(self) -> None:
        """Close the array and the file; can be called again."""
        if self._file.closed:
            return
        try:
            with self._file:
                self._file.write("[\n]\n" if self._separator == "[\n" else "\n]\n")
        except OSError as error:
            raise self._refused(error) from error

    def _known(self, worker: int) -> _Tracks:
        if worker not in self._tracks:
            self._tracks[worker] = _Tracks()
            self._write([_named(worker, "process_name", self._labels.get(worker, f"worker {worker}"))])
        return self._tracks[worker]

    def _write(self, events: Sequence[Mapping[str, Any]]) -> None:
        try:
            for event in events:
                self._file.write(self._separator + json.dumps(event, ensure_ascii=False, separators=(",", ":")))
                self._separator = ",\n"
            self._file.flush()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(f"{self._path}: the trace cannot be written ({error.strerror or error})")


class _Tracks:
    """The tracks of one worker, numbered from 1: for each kind of stage as many as overlap. Times are microseconds."""

    def __init__(self) -> None:
        self._ends: dict[str, list[tuple[int, int]]] = {}
        self._count = 0

    def place(self, kind: str, start: int, end: int) -> tuple[int, int, str]:
        """The number of the track for a stage, its start on it, and the track's name if it is new.

        A stage that begins the moment another ends may seem to begin a microsecond before, by rounding.
        """
        lanes = self._ends.setdefault(kind, [])
        for lane, (track, until) in enumerate(lanes):
            if until <= start + 1 or lane == LANES - 1:
                lanes[lane] = (track, max(until, end))
                return track, max(start, until) if until <= start + 1 else start, ""
        self._count += 1
        lanes.append((self._count, end))
        return self._count, start, kind if len(lanes) == 1 else f"{kind} {len(lanes)}"


def _kind(span: Span) -> str:
    """Text is encoded on a stream beside the device's main one; each stage of the CPU (the first word) has its own threads."""
    if not span.on_device:
        return f"CPU: {span.stage.partition(' ')[0]}"
    return "device: encode" if span.stage == "encode" else "device"


def _complete(worker: int, span: Span, track: int, start: int, end: int) -> dict[str, Any]:
    return {
        "name": span.stage,
        "cat": "gpu" if span.on_device else "cpu",
        "ph": "X",
        "ts": start,
        "dur": max(0, end - start),
        "pid": _pid(worker),
        "tid": track,
        "args": {} if span.seq is None else {"seq": span.seq},
    }


def _named(worker: int, what: str, name: str, track: int = 0) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": _pid(worker), "tid": track, "args": {"name": name}}


def _pid(worker: int) -> int:
    """0 is the idle process of viewers."""
    return worker + 1
