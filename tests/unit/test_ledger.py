"""Ledger: what is staged, what is applied, what is settled; and what it refuses to read."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imagemill.errors import LedgerError, OutputError
from imagemill.guidance import Guidance
from imagemill.ledger import FILE_NAME, Attempt, Ledger
from imagemill.records import Failure, Kind, Outcome, PlannedTask, Receipt, Settle, Task, Ticket
from imagemill.staging import SHOWN, Shape


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / FILE_NAME)
    yield made
    made.close()


def planned(seq: int, name: str | None = None, path: str | None = None, **fields: Any) -> PlannedTask:
    """A task; its fingerprint is its prompt."""
    name = name if name is not None else f"t{seq}"
    path = path if path is not None else f"{name}.png"
    task = Task(**{"id": name, "prompt": "p", "width": 8, "height": 8, "seed": 1, "output_path": path, **fields})
    return PlannedTask(task, f"print of {task.prompt}", Ticket(seq, ("model:m", "adapters:-"), "g", 2.5))


def take(ledger: Ledger, *tasks: PlannedTask, **apply: Any) -> None:
    """A run begins and takes these tasks in."""
    ledger.staging.begin()
    for number, one in enumerate(tasks):
        assert ledger.staging.add(one, f"row {number + 1}") is None
    ledger.begin_run(100.0, {}, {})
    ledger.staging.apply(ledger.run, **apply)


def done(seq: int, sha256: str = "ab") -> Settle:
    return Settle(seq, 1, 0, receipt=Receipt(seq, 1, 8, 8, 9, sha256, "tmp", f"t{seq}.png", seconds={"denoise": 2.0}))


def failed(seq: int, kind: Kind = "oom") -> Settle:
    return Settle(seq, 2, 1, failure=Failure(seq, 2, kind, f"{kind} it was"))


def states(ledger: Ledger) -> dict[str, str]:
    return {row["id"]: row["state"] for row in ledger.rows("SELECT id, state FROM tasks")}


# --- staging ------------------------------------------------------------------------------------------------------------


def test_nothing_of_the_folder_changes_before_apply(ledger: Ledger) -> None:
    ledger.staging.begin()
    ledger.staging.add(planned(0), "row 1")
    ledger.staging.abandon()
    assert states(ledger) == {}
    take(ledger, planned(0))
    assert states(ledger) == {"t0": "pending"}


def test_a_second_row_with_the_same_id_is_named_with_both_places(ledger: Ledger) -> None:
    ledger.staging.begin()
    assert ledger.staging.add(planned(0, "a"), "tasks.jsonl:1") is None
    problem = ledger.staging.add(planned(1, "a", "other.png"), "tasks.jsonl:7")
    assert problem
    assert problem.field == "id"
    assert "'a' is already that of tasks.jsonl:1" in problem.message


@pytest.mark.parametrize(("one", "two", "hint"), [("A.png", "A.png", False), ("Ä/a.png", "ä/A.PNG", True)])
def test_a_path_that_is_taken_up_to_case_is_named_with_its_place(
    ledger: Ledger, one: str, two: str, hint: bool
) -> None:
    ledger.staging.begin()
    ledger.staging.add(planned(0, "x", one), "row 1")
    problem = ledger.staging.add(planned(1, "y", two), "row 2")
    assert problem
    assert problem.field == "output_path"
    assert repr(two) in problem.message
    assert "row 1" in problem.message
    assert ("up to case" in problem.message) == hint
    assert ledger.staging.compare().total == 1


def test_what_is_taken_back_is_free_for_later_rows(ledger: Ledger) -> None:
    ledger.staging.begin()
    ledger.staging.add(planned(0), "row 1")
    ledger.staging.add(planned(1), "row 2")
    ledger.staging.take_back(1)
    assert ledger.staging.add(planned(1), "row 3") is None
    assert ledger.staging.compare().total == 2


def test_what_is_staged_is_counted_by_model_and_shape_and_says_whether_there_are_adapters(ledger: Ledger) -> None:
    ledger.staging.begin()
    for seq, (adapters, shape) in enumerate([("-", "64x64"), ("ab@1.0", "64x64"), ("-", "answer")]):
        one = planned(seq)
        ticket = Ticket(seq, ("model:m", f"adapters:{adapters}", f"shape:{shape}"), "g", 1.5)
        ledger.staging.add(replace(one, ticket=ticket), f"row {seq}")
    assert list(ledger.staging.shapes()) == [
        Shape("model:m", "shape:64x64", 2, 3.0, (Guidance(),), adapters=True),
        Shape("model:m", "shape:answer", 1, 1.5, (Guidance(),), adapters=False),
    ]
    ledger.staging.abandon()


def test_what_is_staged_tells_its_kinds_of_guidance_whatever_their_number(ledger: Ledger) -> None:
    ledger.staging.begin()
    for seq in range(60):
        ledger.staging.add(planned(seq, guidance_scale=seq / 10, negative_prompt="dull" if seq < 5 else None), "row")
    (found,) = ledger.staging.shapes()
    assert sorted(found.guidance) == [
        Guidance(0.0, None, True),
        Guidance(1.0, None, False),
        Guidance(1.0, None, True),
        Guidance(2.0, None, False),
    ]
    ledger.staging.abandon()


def test_a_run_can_be_settled_after_staging_was_given_up(ledger: Ledger) -> None:
    take(ledger, planned(0))
    ledger.staging.begin()
    ledger.staging.add(planned(1), "row 2")
    ledger.staging.abandon()
    ledger.settle([("t0", done(0))], [], 200.0)
    assert states(ledger) == {"t0": "done"}


# --- comparing ----------------------------------------------------------------------------------------------------------


def test_compare_counts_new_pending_done_failed_by_kind_and_changed(ledger: Ledger) -> None:
    take(ledger, *(planned(seq) for seq in range(6)))
    ledger.settle([("t0", done(0)), ("t1", failed(1)), ("t2", failed(2, "timeout")), ("t3", failed(3))], [], 200.0)
    ledger.staging.begin()
    for one in (*(planned(seq) for seq in range(5)), planned(5, prompt="another"), planned(6)):
        ledger.staging.add(one, f"row {one.ticket.seq + 1}")
    found = ledger.staging.compare()
    assert (found.total, found.new, found.pending, found.done, found.changed) == (7, 1, 1, 1, 1)
    assert found.failed == {"oom": 2, "timeout": 1}


def test_a_changed_task_is_shown_with_place_and_the_fields_that_differ(ledger: Ledger) -> None:
    take(ledger, planned(0))
    ledger.staging.begin()
    ledger.staging.add(planned(0, prompt="a dog", seed=2, path="new.png"), "tasks.csv:2")
    (line,) = ledger.staging.compare().differences
    assert line.startswith("tasks.csv:2 (id 't0'): ")
    for part in ("prompt: 'p' -> 'a dog'", "seed: 1 -> 2", "output_path: 't0.png' -> 'new.png'"):
        assert part in line


def test_a_change_that_no_field_shows_is_said_to_be_the_models_or_a_files(ledger: Ledger) -> None:
    take(ledger, planned(0))
    ledger.staging.begin()
    ledger.staging.add(replace(planned(0), fingerprint="of another model"), "row 1")
    assert "the model, or a file it reads, has changed" in ledger.staging.compare().differences[0]


def test_of_many_changes_the_first_are_shown_and_all_are_counted(ledger: Ledger) -> None:
    take(ledger, *(planned(seq) for seq in range(50)))
    ledger.staging.begin()
    for seq in range(50):
        ledger.staging.add(planned(seq, prompt="q"), f"row {seq}")
    found = ledger.staging.compare()
    assert found.changed == 50
    assert len(found.differences) == SHOWN
    assert found.differences[0].startswith("row 0 ")


def test_metadata_may_change_without_the_task_changing(ledger: Ledger) -> None:
    take(ledger, planned(0, metadata={"note": 1}))
    ledger.settle([("t0", done(0))], [], 200.0)
    ledger.staging.begin()
    ledger.staging.add(planned(0, metadata={"note": 2}), "row 1")
    assert (ledger.staging.compare().changed, ledger.staging.compare().done) == (0, 1)


def test_a_path_that_belongs_to_a_task_of_an_earlier_source_is_a_conflict(ledger: Ledger) -> None:
    take(ledger, planned(0, "old", "a.png"))
    ledger.staging.begin()
    ledger.staging.add(planned(0, "new", "A.png"), "row 1")
    (line,) = ledger.staging.conflicts(ledger.run)
    assert line == "row 1: output_path 'A.png' holds the picture of task 'old' of an earlier run"


def test_an_id_that_came_before_in_the_same_run_is_a_conflict(ledger: Ledger) -> None:
    take(ledger, planned(0))
    ledger.staging.begin()
    ledger.staging.add(planned(1, "t0"), "task 2")
    assert ledger.staging.conflicts(ledger.run) == ["task 2: id 't0' came before in this run; give each task its own"]


# --- applying -----------------------------------------------------------------------------------------------------------


def test_what_is_done_stays_done_and_only_the_rest_is_work(ledger: Ledger) -> None:
    take(ledger, planned(0), planned(1))
    ledger.settle([("t0", done(0))], [], 200.0)
    take(ledger, planned(0), planned(1), planned(2))
    assert states(ledger) == {"t0": "done", "t1": "pending", "t2": "pending"}


def test_failures_are_tried_again_by_kind_and_only_those_of_the_source(ledger: Ledger) -> None:
    take(ledger, *(planned(seq) for seq in range(4)))
    ledger.settle([("t0", failed(0)), ("t1", failed(1, "timeout")), ("t3", failed(3))], [], 200.0)
    take(ledger, planned(0), planned(1), planned(2), retry=("oom",))
    assert states(ledger) == {"t0": "pending", "t1": "failed", "t2": "pending", "t3": "failed"}


def test_named_pictures_are_done_again(ledger: Ledger) -> None:
    take(ledger, planned(0), planned(1))
    ledger.settle([("t0", done(0)), ("t1", done(1))], [], 200.0)
    take(ledger, planned(0), planned(1), again=["t1"])
    assert states(ledger) == {"t0": "done", "t1": "pending"}


def test_changed_tasks_are_done_again_even_when_two_of_them_swap_paths(ledger: Ledger) -> None:
    take(ledger, planned(0, "a", "x.png"), planned(1, "b", "y.png"), planned(2, "c", "z.png"))
    ledger.settle([("a", done(0)), ("b", done(1)), ("c", done(2))], [], 200.0)
    take(ledger, planned(0, "a", "y.png"), planned(1, "b", "x.png"), planned(2, "c", "z.png"))
    assert states(ledger) == {"a": "pending", "b": "pending", "c": "done"}
    paths = {row["id"]: (row["path"], row["path_key"]) for row in ledger.rows("SELECT id, path, path_key FROM tasks")}
    assert paths == {"a": ("y.png", "y.png"), "b": ("x.png", "x.png"), "c": ("z.png", "z.png")}


def test_a_new_task_may_take_the_path_that_a_changed_one_leaves(ledger: Ledger) -> None:
    take(ledger, planned(0, "a", "x.png"))
    take(ledger, planned(0, "a", "y.png"), planned(1, "b", "X.png"))
    assert sorted(planned.task.output_path or "" for planned, _ in ledger.work()) == ["X.png", "y.png"]


def test_apply_is_all_or_nothing(ledger: Ledger) -> None:
    take(ledger, planned(0, "a", "x.png"))
    ledger.settle([("a", done(0))], [], 200.0)
    ledger.staging.begin()
    ledger.staging.add(planned(0, "b", "b.png"), "row 1")
    ledger.staging.add(planned(1, "c", "X.png"), "row 2")
    ledger.begin_run(300.0, {}, {})
    with pytest.raises(OutputError):
        ledger.staging.apply(ledger.run, again=["a"])
    ledger.staging.abandon()
    assert states(ledger) == {"a": "done"}
    assert [row["run"] for row in ledger.rows("SELECT run FROM runs")] == [1]


# --- the work of a run --------------------------------------------------------------------------------------------------


def test_work_gives_back_each_task_as_it_was_planned_in_order(ledger: Ledger) -> None:
    tasks = [planned(seq, f"t{9 - seq}", metadata={"n": [1, {"ü": None}]}) for seq in range(10)]
    take(ledger, *tasks)
    assert [one for one, _ in ledger.work(page=3)] == tasks
    assert [one for one, _ in ledger.work(first=7, page=2)] == tasks[7:]
    assert [one for one, _ in ledger.work(page=10)] == tasks
    assert [one for one, _ in ledger.work(page=5)] == tasks


def test_work_carries_the_outcomes_of_earlier_runs(ledger: Ledger, tmp_path: Path) -> None:
    take(ledger, planned(0), planned(1), planned(2))
    ledger.settle([("t0", done(0)), ("t1", failed(1))], [], 200.0)
    take(ledger, planned(0), planned(1), planned(2))
    first, second, third = (outcome for _, outcome in ledger.work())
    assert first == Outcome(
        planned(0).task,
        0,
        "done",
        path=str(tmp_path / "t0.png"),
        attempts=1,
        worker=0,
        elapsed=2.0,
        receipt=done(0).receipt,
        resumed=True,
    )
    assert second
    assert (second.state, second.kind, second.message, second.attempts) == ("failed", "oom", "oom it was", 2)
    assert third is None


def test_tasks_are_read_page_by_page_and_never_held_together(ledger: Ledger) -> None:
    take(ledger, *(planned(seq) for seq in range(20)))
    work = ledger.work(page=4)
    seen = [next(work)]
    ledger.settle([("t3", done(3)), ("t4", done(4)), ("t19", done(19))], [], 200.0)
    seen += list(work)
    settled_after_the_first_page = [one.task.id for one, outcome in seen if outcome]
    assert settled_after_the_first_page == ["t4", "t19"]


def test_tasks_of_another_source_are_kept_and_are_no_work(ledger: Ledger) -> None:
    take(ledger, planned(0, "a"), planned(1, "b"))
    take(ledger, planned(0, "b"))
    assert [one.task.id for one, _ in ledger.work()] == ["b"]
    assert ledger.counts() == {"pending": 1}
    assert set(states(ledger)) == {"a", "b"}


def test_resumed_counts_what_earlier_runs_have_done(ledger: Ledger) -> None:
    take(ledger, planned(0), planned(1))
    ledger.settle([("t0", done(0))], [Attempt("t0", 1, 0, 40.0, 50.0, None, "", 1)], 50.0)
    take(ledger, planned(0), planned(1))
    ledger.settle([("t1", done(1))], [Attempt("t1", 1, 0, 190.0, 200.0, None, "", 1)], 200.0)
    assert ledger.resumed() == 1


# --- settling -----------------------------------------------------------------------------------------------------------


def test_settling_is_atomic(ledger: Ledger) -> None:
    take(ledger, planned(0), planned(1))
    attempts = [Attempt("t0", 1, 0, 1.0, 2.0, None, "", 1)]

    def settled() -> Iterator[tuple[str, Settle]]:
        yield "t0", done(0)
        raise ValueError("the disk is full, say")

    with pytest.raises(ValueError, match="full"):
        ledger.settle(settled(), attempts, 200.0)
    assert states(ledger) == {"t0": "pending", "t1": "pending"}
    assert list(ledger.rows("SELECT * FROM attempts")) == []
    ledger.settle([("t0", done(0))], attempts, 200.0)
    assert states(ledger) == {"t0": "done", "t1": "pending"}


def test_what_was_settled_is_there_after_the_driver_died(ledger: Ledger) -> None:
    take(ledger, planned(0), planned(1))
    ledger.settle([("t0", done(0))], [Attempt("t0", 1, 0, 1.0, 2.0, None, "", 1)], 200.0)
    ledger.staging.begin()
    ledger.staging.add(planned(5), "row 6")
    again = Ledger(ledger.path)
    assert states(again) == {"t0": "done", "t1": "pending"}
    assert len(list(again.rows("SELECT * FROM attempts"))) == 1
    again.close()


def test_a_run_after_a_died_one_marks_it_and_goes_on(tmp_path: Path) -> None:
    first = Ledger(tmp_path / FILE_NAME)
    take(first, planned(0), planned(1))
    first.settle([("t0", done(0))], [], 200.0)
    first.close()
    second = Ledger(tmp_path / FILE_NAME)
    take(second, planned(0), planned(1))
    second.end_run(300.0, "done", {"workers": {}})
    assert [row["status"] for row in second.rows("SELECT status FROM runs ORDER BY run")] == ["died", "done"]
    assert second.counts() == {"done": 1, "pending": 1}
    second.close()


def test_skipped_rows_and_spans_are_remembered_with_their_run(ledger: Ledger) -> None:
    take(ledger, planned(0))
    ledger.skip("tweets.json: tweets[3]", "has no scene_hint")
    ledger.span(1, "lost", 2.0, 3.0, "killed by SIGKILL")
    assert list(ledger.rows("SELECT * FROM skipped")) == [
        {"run": 1, "place": "tweets.json: tweets[3]", "reason": "has no scene_hint"}
    ]
    assert [row["note"] for row in ledger.rows("SELECT * FROM spans")] == ["killed by SIGKILL"]


# --- what it refuses ----------------------------------------------------------------------------------------------------


def refusal(path: Path, **how: Any) -> str:
    with pytest.raises(LedgerError) as found:
        Ledger(path, **how)
    message = str(found.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def filled(path: Path) -> Path:
    ledger = Ledger(path)
    take(ledger, *(planned(seq, prompt="p" * 300) for seq in range(300)))
    ledger.end_run(200.0, "drained", {})
    ledger.close()
    return path


def test_a_ledger_of_another_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = filled(tmp_path / FILE_NAME)
    db = sqlite3.connect(path)
    with db:
        db.execute("UPDATE meta SET value = '99'")
        db.execute("DROP TABLE skipped")
    db.close()
    assert "format 99" in refusal(path)
    db = sqlite3.connect(path)
    assert db.execute("SELECT 1 FROM sqlite_master WHERE name = 'skipped'").fetchone() is None
    db.close()


def test_a_database_that_is_no_ledger_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE photos (id)")
    db.close()
    before = path.read_bytes()
    refusal(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", [{}, {"read_only": True}])
@pytest.mark.parametrize("damage", ["garbage", "header", "middle", "cut off"])
def test_a_damaged_ledger_is_refused_with_one_clear_line(tmp_path: Path, damage: str, how: dict[str, Any]) -> None:
    path = filled(tmp_path / FILE_NAME)
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    match damage:
        case "garbage":
            data = bytearray(b"not a database at all " * 100)
        case "header":
            data[:16] = b"X" * 16
        case "middle":
            data[half : half + 8192] = b"\xff" * 8192
        case "cut off":
            del data[half:]
    path.write_bytes(data)
    refusal(path, **how)


def test_a_folder_in_the_ledgers_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    refusal(tmp_path / FILE_NAME)


def test_reading_a_ledger_that_is_not_there_makes_none(tmp_path: Path) -> None:
    refusal(tmp_path / FILE_NAME, read_only=True)
    assert list(tmp_path.iterdir()) == []
