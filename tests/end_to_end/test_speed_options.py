"""The options that say how fast and how exact a run is, from the command line to the report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import pytest

from command import until
from workplace import Workplace

ON_CPU = ("--device", "cpu", "--model", "fake")


def test_a_trace_lies_beside_the_report_and_names_every_worker(place: Workplace) -> None:
    place.tasks([{"prompt": str(number)} for number in range(6)])
    ended = place("run", "tasks.jsonl", "--out", "out", *ON_CPU, "--workers", "2", "--trace")
    assert ended.code == 0, ended.text
    events = json.loads((place.folder / "out" / "trace.json").read_text("utf-8"))
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {1: "CPU 0", 2: "CPU 1"}
    saved = [event["args"]["seq"] for event in events if event["name"] == "save"]
    assert sorted(saved) == list(range(6))


def test_without_the_option_there_is_no_trace(place: Workplace) -> None:
    place.tasks([{"prompt": "a"}])
    assert place("run", "tasks.jsonl", "--out", "out", *ON_CPU).code == 0
    assert not (place.folder / "out" / "trace.json").exists()


@pytest.mark.parametrize(
    ("options", "sizes"),
    [((), {1}), (("--batch-size", "auto"), {1}), (("--batch-size", "4"), {4}), (("--exact",), {1})],
)
def test_tasks_share_batches_only_where_it_was_asked_for_on_the_cpu(
    place: Workplace, options: Sequence[str], sizes: set[int]
) -> None:
    place.tasks([{"prompt": str(number)} for number in range(8)])
    ended = place("run", "tasks.jsonl", "--out", "out", *ON_CPU, *options)
    assert ended.code == 0, ended.text
    lines = (place.folder / "out" / "results.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["batch_size"] for line in lines} == sizes


def test_the_report_says_how_the_model_was_made_fast(place: Workplace) -> None:
    place.tasks([{"prompt": "a", "steps": 1, "size": "64x64"}])
    ended = place("run", "tasks.jsonl", "--out", "out", "--device", "cpu", "--model", "tiny", "--no-compile")
    assert ended.code == 0, ended.text
    (run,) = json.loads((place.folder / "out" / "report.json").read_text("utf-8"))["runs"]
    assert run["tuning"] == {
        "tiny": {"compiled": False, "why": "as asked", "precision": "fp32", "attention": "auto", "sizes": ["64x64"],
                 "batch_size": 1},
    }  # fmt: skip
    assert "not compiled (as asked)" in (place.folder / "out" / "report.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--exact", "--batch-size", "4"), "exact keeps batches of one, and batch_size is 4; keep one of them"),
        (("--precision", "fp8"), "precision fp8 needs a GPU, and this run is on the CPU; remove it"),
        (("--precision", "fp4"), "--precision: 'fp4' is not one of bf16, fp8"),
        (
            ("--batch-size", "many"),
            "--batch-size: 'many' is no batch size; write auto or a whole number from 1 to 1024",
        ),
        (("--attention", "Flash 3"), "--attention: 'Flash 3' is no attention back end"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(place: Workplace, options: Sequence[str], text: str) -> None:
    place.tasks([{"prompt": "a"}])
    for command in ("run", "plan"):
        ended = place(command, "tasks.jsonl", "--out", "out", *ON_CPU, *options)
        assert ended.code == 2, ended.text
        assert text in ended.err
        assert len(ended.err.splitlines()) == 1
    assert not (place.folder / "out" / "ledger.sqlite").exists()


def test_preloading_starts_the_workers_while_the_source_is_read(place: Workplace) -> None:
    """The source is a pipe that gives nothing yet; without the option no worker would be there before its end."""
    source = place.folder / "tasks.jsonl"
    os.mkfifo(source)
    started = place.start_fake(source, "out", *ON_CPU, "--workers", "2", "--preload")
    until(lambda: len(started.children()) == 2)
    # long enough that the second worker is there before the first has done them all
    row = {"metadata": {"fake": {"delay": 1.0}}}
    source.write_text("".join(json.dumps({"prompt": str(number), **row}) + "\n" for number in range(6)))
    ended = started.wait()
    assert ended.code == 0, ended.text
    assert set(place.states().values()) == {"done"}
    assert {result["worker"] for result in place.results()} == {0, 1}


def test_workers_that_were_started_for_nothing_are_gone_at_the_end(place: Workplace) -> None:
    place.tasks([{"prompt": ""}])
    started = place.start_fake("tasks.jsonl", "out", *ON_CPU, "--workers", "2", "--preload")
    ended = started.wait()
    assert ended.code == 2, ended.text
    assert started.children() == []
