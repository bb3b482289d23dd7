"""An engine is used again after runs that ended in odd ways; one task's trouble stays its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from imagemill import Engine, InputError, MultiGPUImageGenerator
from imagemill.records import BatchEnded, Halt, Receipt, SourceEnded, TasksArrived, Ticket, WorkerLost, WorkerReady
from imagemill.schedule import Scheduler


def rows(count: int, **fake: Any) -> list[dict[str, Any]]:
    return [{"id": f"t{number}", "prompt": "p", "fake": fake} for number in range(count)]


def test_a_loop_that_is_left_early_frees_the_engine(tmp_path: Path) -> None:
    with Engine(model="fake", device="cpu", workers=2) as engine:
        for _ in engine.run(rows(4, delay=0.1), tmp_path / "first"):
            break
        assert all(outcome.ok for outcome in engine.run(rows(4), tmp_path / "second"))


def test_a_run_that_was_read_to_its_last_outcome_only_frees_the_engine(tmp_path: Path) -> None:
    with Engine(model="fake", device="cpu") as engine:
        stream = engine.run(rows(3), tmp_path / "first")
        assert len(list(islice(stream, 3))) == 3
        assert len(list(engine.run(rows(3), tmp_path / "second"))) == 3


def test_a_run_that_is_open_is_not_mixed_with_another(tmp_path: Path) -> None:
    with Engine(model="fake", device="cpu") as engine:
        stream = engine.run(rows(3, delay=0.2), tmp_path / "first")
        next(stream)
        with pytest.raises(InputError, match="runs already"):
            engine.run(rows(3), tmp_path / "second")
        assert len(list(stream)) == 2


def test_a_worker_that_dies_between_two_runs_is_replaced(tmp_path: Path) -> None:
    with Engine(model="fake", device="cpu", workers=2, schedule="static") as engine:
        assert len(list(engine.run(rows(4), tmp_path / "first"))) == 4
        assert engine._roster.crew is not None
        os.kill(engine._roster.crew.executor.pids[1], signal.SIGKILL)  # type: ignore[attr-defined]
        time.sleep(0.2)
        assert all(outcome.ok for outcome in engine.run(rows(4), tmp_path / "second"))


def test_facts_that_come_with_the_end_are_kept_for_the_next_run() -> None:
    scheduler = Scheduler({0: "a", 1: "b", 2: "c"}, limits=None)
    scheduler.on(TasksArrived(tuple(map(Ticket, range(3)))), 0.0)
    scheduler.on(SourceEnded(), 0.0)
    scheduler.on(WorkerReady(0, frozenset()), 1.0)
    for number in range(3):
        commands = scheduler.on(BatchEnded(0, number + 1, (Receipt(number, 1, 1, 1),), (), frozenset()), 2.0 + number)
    assert commands[-1] == Halt("done")
    assert scheduler.on(WorkerReady(1, frozenset({"m"})), 6.0) == []
    assert scheduler.on(WorkerLost(0), 6.0) == []
    states = {number: worker.state for number, worker in scheduler.board.workers.items()}
    assert states == {0: "absent", 1: "idle", 2: "waiting"}


def test_a_folder_in_the_place_of_a_picture_costs_that_task_alone(tmp_path: Path) -> None:
    with Engine(model="fake", device="cpu") as engine:
        list(engine.run(rows(3), tmp_path))
        (tmp_path / "t1.png").unlink()
        (tmp_path / "t1.png").mkdir()
        outcomes = list(engine.run(rows(3), tmp_path))
    assert [(outcome.state, outcome.kind) for outcome in outcomes] == [
        ("done", None),
        ("failed", "bad_task"),
        ("done", None),
    ]


def test_a_mapping_is_not_taken_for_a_list_of_prompts(tmp_path: Path) -> None:
    with Engine(model="fake", device="cpu") as engine, pytest.raises(InputError, match="no list"):
        engine.run({"prompt": "a cat"}, tmp_path)


def test_a_second_batch_overwrites_no_picture_of_the_first(tmp_path: Path) -> None:
    with MultiGPUImageGenerator(model="fake", device="cpu", output_dir=tmp_path) as generator:
        paths = [generator.generate_batch([{"prompt": "p"}])[0]["output_path"] for _ in range(2)]
    assert paths[0] != paths[1]


def test_output_that_nobody_reads_changes_neither_report_nor_exit_code(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "p"}\n')
    command = [sys.executable, "-m", "imagemill.cli", "run", "tasks.jsonl", "--model", "fake", "--out", "out"]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=writer)
    os.close(writer)
    assert ended.returncode == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_lora_of_the_whole_run_is_blamed_on_no_row(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "p"}\n' * 3)
    command = [
        sys.executable,
        "-m",
        "imagemill.cli",
        "run",
        "tasks.jsonl",
        "--model",
        "fake",
        "--lora",
        "no.safetensors",
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("there is no such LoRA file") == 1
    assert "line" not in ended.stderr
