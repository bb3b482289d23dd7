"""trace.json: what Perfetto and the benchmarks read of it, also after a run that died."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from imagemill.errors import OutputError
from imagemill.records import Span
from imagemill.trace import LANES, TraceFile, write

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import traces

ORIGIN = 5000.0


def span(stage: str, start: float, seconds: float, *, on_device: bool = True, seq: int | None = 0) -> Span:
    return Span(stage, ORIGIN + start, seconds, on_device, seq)


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return found


def complete(path: Path) -> list[dict[str, Any]]:
    return [event for event in events(path) if event["ph"] == "X"]


def test_a_stage_is_a_complete_event_in_microseconds_since_the_origin(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    spans = [span("denoise", 1.5, 0.25, seq=7), span("save", 2.0, 0.001, on_device=False)]
    write(path, {3: [*spans, Span("load", ORIGIN, 1.0)]}, {3: "GPU 3"}, ORIGIN)
    assert complete(path) == [
        {"name": "load", "cat": "gpu", "ph": "X", "ts": 0, "dur": 1_000_000, "pid": 4, "tid": 1, "args": {}},
        {"name": "denoise", "cat": "gpu", "ph": "X", "ts": 1_500_000, "dur": 250_000, "pid": 4, "tid": 1,
         "args": {"seq": 7}},
        {"name": "save", "cat": "cpu", "ph": "X", "ts": 2_000_000, "dur": 1000, "pid": 4, "tid": 2, "args": {"seq": 0}},
    ]  # fmt: skip


def test_each_worker_is_a_process_named_after_its_device_also_one_that_did_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write(path, {0: [span("denoise", 0, 1)], 1: []}, {0: "GPU 2", 1: "GPU 5 ‒ 新"}, ORIGIN)
    names = {event["pid"]: event["args"]["name"] for event in events(path) if event["name"] == "process_name"}
    assert names == {1: "GPU 2", 2: "GPU 5 ‒ 新"}


def test_device_text_and_each_stage_of_the_cpu_have_tracks_with_names(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    spans = [span("encode", 0, 2), span("denoise", 1, 2), span("decode", 3, 1)]
    spans += [span(stage, 0, 1, on_device=False) for stage in ("text", "save")]
    write(path, {0: spans}, {0: "GPU 0"}, ORIGIN)
    names = {event["tid"]: event["args"]["name"] for event in events(path) if event["name"] == "thread_name"}
    by_stage = {event["name"]: names[event["tid"]] for event in complete(path)}
    assert by_stage == {
        "encode": "device: encode", "denoise": "device", "decode": "device", "text": "CPU: text", "save": "CPU: save",
    }  # fmt: skip


def test_parts_of_one_stage_share_a_track(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    parts = [span("load vae", 0, 1, on_device=False), span("load transformer", 1, 1, on_device=False)]
    write(path, {0: parts}, {0: "GPU 0"}, ORIGIN)
    assert [event["tid"] for event in complete(path)] == [1, 1]


def test_stages_that_overlap_share_no_track_and_those_that_touch_do(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    third = 1 / 3
    with TraceFile(path, {0: "GPU 0"}, ORIGIN) as trace:
        for number in range(50):  # each ends where the next begins, up to rounding
            trace.add(0, [span("denoise", number * third, third, seq=number)])
        trace.add(0, [span("save", 0, 1, on_device=False), span("save", 0.5, 1, on_device=False)])
        trace.add(0, [span("save", 1.0, 1, on_device=False)])
    assert {event["tid"] for event in complete(path) if event["name"] == "denoise"} == {1}
    assert [event["tid"] for event in complete(path) if event["name"] == "save"] == [2, 3, 2]
    by_track: dict[int, int] = {}
    for event in complete(path):
        assert event["ts"] >= by_track.get(event["tid"], 0)
        by_track[event["tid"]] = event["ts"] + event["dur"]


def test_the_number_of_tracks_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write(path, {0: [span("save", 0, 9, on_device=False) for _ in range(3 * LANES)]}, {0: "x"}, ORIGIN)
    assert len({event["tid"] for event in complete(path)}) == LANES


def test_the_share_of_idle_time_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """Two GPUs; each decodes from 1 to 2 and from 4 to 5: of the three seconds between, the second one rests for one."""
    path = tmp_path / "trace.json"
    busy = [span("denoise", 0, 1), span("decode", 1, 1), span("denoise", 2, 2), span("decode", 4, 1)]
    resting = [span("denoise", 0, 1), span("decode", 1, 1), span("denoise", 3, 1), span("decode", 4, 1)]
    saving = [span("save", 2, 1, on_device=False)]
    write(path, {0: busy, 1: [*resting, *saving]}, {0: "GPU 0", 1: "GPU 1"}, ORIGIN)
    assert traces.idle(traces.events_of(path)) == pytest.approx((0 + 1 / 3) / 2)


def test_what_a_run_that_died_leaves_lacks_only_the_closing_bracket(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = TraceFile(path, {0: "GPU 0"}, ORIGIN)
    trace.add(0, [span("denoise", 0, 1)])
    left = path.read_text("utf-8")
    with pytest.raises(json.JSONDecodeError):
        json.loads(left)
    assert [event["name"] for event in json.loads(left + "]")] == ["process_name", "thread_name", "denoise"]
    trace.close()
    trace.close()
    assert len(events(path)) == 3


def test_a_trace_without_workers_is_an_empty_list(tmp_path: Path) -> None:
    write(tmp_path / "trace.json", {}, {}, ORIGIN)
    assert events(tmp_path / "trace.json") == []


def test_many_batches_keep_nothing_in_memory_that_grows_with_them(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "trace.json", {0: "GPU 0"}, ORIGIN)
    for number in range(2000):
        trace.add(0, [span("denoise", number, 1), span("save", number, 1.5, on_device=False)])
    held = {kind: len(lanes) for kind, lanes in trace._tracks[0]._ends.items()}
    trace.close()
    assert held == {"device": 1, "CPU: save": 2}
    assert len(complete(tmp_path / "trace.json")) == 4000


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"none/trace\.json: the trace cannot be written"):
        TraceFile(tmp_path / "none" / "trace.json", {}, ORIGIN)
