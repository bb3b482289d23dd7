"""A judgment is a task of the engine: plan, workers, retry, ledger and resume are those of pictures."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagemill import Engine, InputError, Outcome, RunOptions, Task
from imagemill.errors import ChangedTasksError
from imagemill.ledger import FILE_NAME, Ledger
from imagemill.records import Answer, BatchEnded, PlannedTask, Receipt, SinkSpec, Ticket, WorkerSpec, WorkOrder
from imagemill.report import write_reports
from imagemill.report.results import results
from imagemill.runners import Result, Untold
from imagemill.saving import MAX_ANSWER
from imagemill.wire import FrameReader, frame
from imagemill.worker import Worker
from orders import order_of


def picture(path: Path, seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """An edit and its source."""
    return [picture(tmp_path / "edit.png", 1), picture(tmp_path / "source.png", 2)]


def asked(count: int, images: list[str], **script: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"t{n}", "prompt": "how good?", "system_prompt": "be fair", "images": images}
        | {"metadata": {"fake": {"answer": f"Score: {n}", **script}}}
        for n in range(count)
    ]


def judge(
    tasks: Any, out: Path, model: str = "judge:fake", options: RunOptions | None = None, **settings: Any
) -> list[Outcome]:
    with Engine(model=model, device="cpu", **settings) as engine:
        return list(engine.run(tasks, out, options))


def texts(outcomes: list[Outcome]) -> list[str | None]:
    return [outcome.answer.text if outcome.answer else None for outcome in outcomes]


# --- one answer a task ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_has_its_answer_in_order_and_no_file_is_made(
    tmp_path: Path, images: list[str], workers: int
) -> None:
    outcomes = judge(asked(7, images), tmp_path / "out", workers=workers, judge={"batch_size": 2})
    assert texts(outcomes) == [f"Score: {n}" for n in range(7)]
    assert [outcome.answer.tokens for outcome in outcomes if outcome.answer] == [2] * 7
    assert all(outcome.ok and outcome.path == "" for outcome in outcomes)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made <= {FILE_NAME, ".imagemill.lock", "logs"}


def test_results_and_reports_hold_the_answers(tmp_path: Path, images: list[str]) -> None:
    bad = {"id": "bad", "prompt": "x", "metadata": {"fake": {"fail": "bad_task"}}}
    judge([*asked(2, images), bad], tmp_path / "o")
    write_reports(tmp_path / "o")
    rows = [json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()]
    assert [row.get("answer") for row in rows] == [
        *({"text": f"Score: {n}", "tokens": 2, "cut": False} for n in range(2)),
        None,
    ]
    assert [row["path"] for row in rows] == [None] * 3
    assert [row.get("system_prompt") for row in rows] == ["be fair", "be fair", None]
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert [shape["name"] for shape in report["shapes"]] == ["answer"]


def test_a_judge_without_a_script_answers_by_the_fingerprint(tmp_path: Path) -> None:
    tasks = [{"id": f"t{n}", "prompt": f"how good is {n}?"} for n in range(5)]
    once, again = judge(tasks, tmp_path / "a"), judge(tasks, tmp_path / "b", workers=2)
    assert texts(once) == texts(again)
    assert len(set(texts(once))) > 1


def test_a_field_of_pictures_is_refused_in_a_judges_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steps: the judge 'judge:fake' makes no picture; remove it"):
        judge([{"id": "a", "prompt": "p", "steps": 3}], tmp_path / "out")
    with pytest.raises(InputError, match=r"system_prompt: the model 'tiny' .* does not take it"):
        judge([Task("a", "p", system_prompt="be fair")], tmp_path / "out", model="tiny")


def test_settings_of_pictures_do_not_reach_a_judge(tmp_path: Path, images: list[str]) -> None:
    tasks = asked(3, images)
    judge(tasks, tmp_path / "out")
    again = judge(tasks[::-1], tmp_path / "out", steps=9, size="64x64", seed=77, negative_prompt="rain")
    assert [outcome.resumed for outcome in again] == [True] * 3


# --- failure, retry, splitting ----------------------------------------------------------------------------------------


def test_one_bad_judgment_costs_itself_alone(tmp_path: Path, images: list[str]) -> None:
    tasks = asked(4, images)
    tasks[1]["metadata"]["fake"] = {"fail": "bad_task"}
    outcomes = judge(tasks, tmp_path / "out", judge={"batch_size": 4})
    assert [outcome.state for outcome in outcomes] == ["done", "failed", "done", "done"]
    assert outcomes[1].answer is None


def test_a_judge_out_of_memory_is_asked_in_smaller_batches(tmp_path: Path, images: list[str]) -> None:
    outcomes = judge(asked(8, images, oom=3), tmp_path / "out", judge={"batch_size": 8})
    assert texts(outcomes) == [f"Score: {n}" for n in range(8)]
    assert {outcome.receipt.batch_size for outcome in outcomes if outcome.receipt} <= {1, 2}


def test_a_worker_killed_while_it_judges_loses_nothing(tmp_path: Path, images: list[str]) -> None:
    tasks = asked(12, images, delay=0.05)
    with Engine(model="judge:fake", device="cpu", workers=2, judge={"batch_size": 2}) as engine:
        outcomes = []
        for outcome in engine.run(tasks, tmp_path / "out"):
            outcomes.append(outcome)
            if len(outcomes) == 2:
                assert engine._roster.crew is not None
                os.kill(engine._roster.crew.executor.pids[0], signal.SIGKILL)
    assert texts(outcomes) == [f"Score: {n}" for n in range(12)]


def test_a_judge_that_dies_at_a_task_takes_that_task_alone_with_it(tmp_path: Path, images: list[str]) -> None:
    tasks = asked(4, images)
    tasks[2]["metadata"]["fake"] = {"crash": "kill"}
    outcomes = judge(tasks, tmp_path / "out", workers=2)
    assert [outcome.kind for outcome in outcomes] == [None, None, "worker_lost", None]


# --- resume -----------------------------------------------------------------------------------------------------------


def attempts(folder: Path) -> int:
    ledger = Ledger(folder / FILE_NAME, read_only=True)
    try:
        return int(next(ledger.rows("SELECT count(*) AS n FROM attempts"))["n"])
    finally:
        ledger.close()


def test_no_answer_is_made_twice(tmp_path: Path, images: list[str]) -> None:
    tasks, out = asked(6, images), tmp_path / "out"
    with Engine(model="judge:fake", device="cpu") as engine:
        stream = engine.run(tasks, out)
        first = [next(stream), next(stream)]
        stream.close()  # type: ignore[attr-defined]
    second = judge(tasks, out)
    third = judge(tasks, out)
    assert texts(first) == texts(second)[:2] == texts(third)[:2]
    assert all(outcome.resumed for outcome in [*second[:2], *third])
    assert texts(third) == [f"Score: {n}" for n in range(6)]
    assert attempts(out) == 6


def test_a_failed_judgment_is_tried_again_only_when_asked(tmp_path: Path, images: list[str]) -> None:
    tasks, out = asked(2, images), tmp_path / "out"
    tasks[0]["metadata"]["fake"] |= {"fail": "bad_output", "fail_attempts": 2}
    assert [outcome.state for outcome in judge(tasks, out)] == ["failed", "done"]
    del tasks[0]["metadata"]["fake"]["fail"]
    assert [outcome.state for outcome in judge(tasks, out)] == ["failed", "done"]
    assert texts(judge(tasks, out, options=RunOptions(retry=("bad_output",)))) == ["Score: 0", "Score: 1"]


def edit_changed(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    picture(Path(tasks[0]["images"][0]), seed=9)
    return {}


def rubric_changed(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    for task in tasks:
        task["system_prompt"] = "be strict"
    return {}


@pytest.mark.parametrize(
    "change",
    [
        edit_changed,
        rubric_changed,
        lambda tasks: {"judge": {"pixels": 4096}},
        lambda tasks: {"judge": {"max_new_tokens": 7}},
    ],
    ids=["edit", "system_prompt", "pixels", "max_new_tokens"],
)
def test_what_an_answer_hangs_on_makes_it_another_judgment(
    tmp_path: Path, images: list[str], change: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> None:
    tasks, out = asked(2, images), tmp_path / "out"
    judge(tasks, out)
    settings = change(tasks)
    with pytest.raises(ChangedTasksError):
        judge(tasks, out, **settings)
    again = judge(tasks, out, options=RunOptions(rerun_changed=True), **settings)
    assert [outcome.resumed for outcome in again] == [False, False]


def test_how_many_are_asked_at_once_makes_no_other_judgment(tmp_path: Path, images: list[str]) -> None:
    tasks, out = asked(4, images), tmp_path / "out"
    judge(tasks, out)
    again = judge(tasks, out, workers=2, judge={"batch_size": 4, "concurrency": 2, "timeout": 3.0})
    assert all(outcome.resumed for outcome in again)


# --- records and the worker -------------------------------------------------------------------------------------------


def test_an_answer_goes_over_the_pipe_as_it_is() -> None:
    text = 'Score: 8\n"分数" 😀\u0000' + "x" * 10_000
    receipt = Receipt(1, 1, 0, 0, answer=Answer(text, 12))
    (event,) = FrameReader().feed(frame(BatchEnded(0, 1, (receipt,), (), frozenset())))
    assert event.receipts == (receipt,)


class OddRunner(Untold):
    """Gives what it was made with."""

    def __init__(self, **result: Any) -> None:
        self.result = result

    resident: frozenset[str] = frozenset()

    def load(self, spec: Any, beat: Any) -> None:
        pass

    def run(self, order: WorkOrder, beat: Any) -> Any:
        return [Result(planned.ticket.seq, **self.result) for planned in order.tasks]

    def unload(self) -> None:
        pass

    def memory(self) -> tuple[int, int]:
        return 0, 0


def end_of(monkeypatch: pytest.MonkeyPatch, folder: Path, task: Task, **result: Any) -> BatchEnded:
    """What a worker says when its runner gives that result for the task."""
    from imagemill import models, runners

    events: list[Any] = []
    spec = models.resolve("judge:fake").spec
    monkeypatch.setattr(runners, "create", lambda *_: OddRunner(**result))
    worker = Worker(WorkerSpec(0, "cpu", "CPU 0", spec), events.append, lambda: None)
    planned = PlannedTask(task, "0" * 64, Ticket(1))
    worker.work(order_of(planned, model=spec, sink=SinkSpec(folder=str(folder))))
    (ended,) = [event for event in events if isinstance(event, BatchEnded)]
    return ended


ASKED = Task("a", "how good?")
PICTURED = Task("a", "a cat", width=8, height=8, steps=1, seed=1, output_path="a.png")


@pytest.mark.parametrize(
    ("task", "result", "message"),
    [
        (ASKED, {}, "gave no answer"),
        (ASKED, {"image": Image.new("RGB", (8, 8))}, "gave no answer"),
        (PICTURED, {"answer": Answer("Score: 8", 2)}, "neither picture nor error"),
        (ASKED, {"answer": Answer("x" * (MAX_ANSWER + 1), 2)}, "at most 200,000 are taken"),
    ],
)
def test_a_runner_that_gives_the_wrong_thing_fails_the_task(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: Task, result: dict[str, Any], message: str
) -> None:
    ended = end_of(monkeypatch, tmp_path, task, **result)
    assert ended.receipts == ()
    assert ended.failures[0].kind == "bad_output"
    assert message in ended.failures[0].message


def test_half_of_a_surrogate_pair_in_an_answer_breaks_no_ledger(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended = end_of(monkeypatch, tmp_path, ASKED, answer=Answer("Score: 8 \ud800!", 4))
    assert ended.receipts[0].answer == Answer("Score: 8 ?!", 4)
    assert ended.receipts[0].width == ended.receipts[0].height == 0
    frame(ended)


def test_the_ledger_gives_answers_back_whole(tmp_path: Path) -> None:
    text = 'line one\nline "two" 分数 😀'
    task = {"id": "a", "prompt": "p", "metadata": {"fake": {"answer": text}}}
    judge([task], tmp_path / "out")
    ledger = Ledger(tmp_path / "out" / FILE_NAME, read_only=True)
    try:
        (row,) = results(ledger)
    finally:
        ledger.close()
    assert row["answer"]["text"] == text
