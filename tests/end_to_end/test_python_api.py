"""What a Python program can lean on: `run`, the engine that keeps its workers, and the calls of the older script."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import imagemill
from command import descendants, until
from imagemill import (
    Engine,
    InputError,
    MultiGPUImageEditor,
    MultiGPUImageGenerator,
    Outcome,
    RunOptions,
    Task,
    devices,
)
from imagemill.generator import take_numbers

READ_AHEAD = 16


def rows(count: int, **fake: Any) -> list[dict[str, Any]]:
    return [{"id": f"t{number}", "prompt": f"prompt {number}", "fake": fake} for number in range(count)]


@pytest.fixture
def before() -> set[int]:
    """The processes that stood below this one before the test."""
    gc.collect()
    return descendants()


def fake_engine(**settings: Any) -> Engine:
    return Engine("fake", device="cpu", **{"workers": 2, **settings})


# --- one call ---------------------------------------------------------------------------------------------------------


def test_run_does_what_the_command_does(tmp_path: Path, before: set[int]) -> None:
    source = tmp_path / "tasks.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    report = imagemill.run(source, out=tmp_path / "out", model="fake", workers=2, schedule="lockstep")
    assert (report.done, report.failed, report.pending, report.resumed, report.exit_code) == (4, 0, 0, 0, 0)
    assert report.folder == tmp_path / "out"
    for name in ("t0.png", "results.jsonl", "report.json", "report.md", "report.html", "ledger.sqlite"):
        assert (tmp_path / "out" / name).is_file()
    again = imagemill.run(str(source), out=str(tmp_path / "out"), model="fake")
    assert (again.done, again.resumed) == (4, 4)
    assert descendants() == before


def test_run_takes_tasks_mappings_and_prompts(tmp_path: Path) -> None:
    report = imagemill.run(
        [Task("a", "a cat", seed=1), {"id": "b", "prompt": "a dog"}, "a bird"],
        out=tmp_path,
        model="fake",
        size=(32, 16),
    )
    assert (report.done, report.failed) == (3, 0)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["000003.png", "a.png", "b.png"]


def test_a_failed_task_is_counted_not_raised(tmp_path: Path) -> None:
    report = imagemill.run([*rows(2), {"prompt": "x", "fake": {"fail": "bad_task"}}], out=tmp_path, model="fake")
    assert (report.done, report.failed, report.exit_code) == (2, 1, 1)


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ([{"prompt": 7}], {}, "task 1: prompt"),
        ([object()], {}, "task 1"),
        (["a"], {"stepz": 2}, "stepz"),
        (["a"], {"schedule": "fast"}, "schedule"),
        (["a"], {"model": "tinny"}, "did you mean tiny"),
        ("gone.jsonl", {}, "gone.jsonl"),
        ([], {}, "no task"),
    ],
)
def test_bad_input_raises_with_the_words_of_the_command(
    source: Any, settings: dict[str, Any], words: str, tmp_path: Path, before: set[int]
) -> None:
    with pytest.raises(InputError, match=words):
        imagemill.run(source, out=tmp_path, **{"model": "fake", **settings})
    assert descendants() == before


# --- the engine -------------------------------------------------------------------------------------------------------


def test_workers_are_kept_between_runs_and_gone_after_the_block(tmp_path: Path, before: set[int]) -> None:
    with fake_engine() as engine:
        assert all(outcome.ok for outcome in engine.run(rows(6), tmp_path / "first"))
        crew = descendants() - before
        assert len(crew) == 2
        assert all(outcome.ok for outcome in engine.run(rows(6), tmp_path / "second"))
        assert descendants() - before == crew
    assert descendants() == before
    with pytest.raises(InputError, match="closed"):
        next(engine.run(rows(1), tmp_path / "third"))


def test_leaving_the_block_by_an_exception_frees_every_process(tmp_path: Path, before: set[int]) -> None:
    def leave_at_the_first_outcome() -> None:
        with fake_engine(schedule="static") as engine:
            for _ in engine.run([*rows(1), *rows(5, delay=600)[1:]], tmp_path):
                assert len(descendants() - before) == 2
                raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        leave_at_the_first_outcome()
    gc.collect()
    assert descendants() == before


def test_leaving_the_block_ends_a_run_that_somebody_still_holds(tmp_path: Path, before: set[int]) -> None:
    with fake_engine(schedule="static") as engine:
        outcomes = engine.run([*rows(1), *rows(5, delay=600)[1:]], tmp_path)
        assert next(outcomes).ok
    assert descendants() == before
    outcomes.close()
    assert not list(tmp_path.glob(".*.part"))
    with fake_engine() as engine:  # the folder is free again
        assert [outcome.resumed for outcome in engine.run(rows(5), tmp_path)] == [True] + [False] * 4


def test_outcomes_come_in_task_order_and_say_everything(tmp_path: Path) -> None:
    tasks = [{**row, "fake": {"delay": 0.4 if number % 3 == 0 else 0.0}} for number, row in enumerate(rows(9))]
    with fake_engine(size="32x16") as engine:
        outcomes = list(engine.run(tasks, tmp_path))
        report = engine.report
    assert [outcome.task.id for outcome in outcomes] == [row["id"] for row in tasks]
    assert [outcome.seq for outcome in outcomes] == list(range(9))
    for outcome in outcomes:
        assert isinstance(outcome, Outcome)
        assert (outcome.ok, outcome.state, outcome.kind, outcome.message) == (True, "done", None, "")
        assert Path(outcome.path).is_absolute()
        assert Path(outcome.path).is_file()
        assert outcome.receipt is not None
        assert (outcome.receipt.width, outcome.receipt.height) == (32, 16)
        assert (outcome.task.seed, outcome.task.width, outcome.task.steps) == (42 + outcome.seq, 32, 1)
        assert outcome.attempts == 1
        assert outcome.worker in (0, 1)
        assert not outcome.resumed
    assert report is not None
    assert (report.done, report.status) == (9, "done")


def test_an_outcome_is_handed_out_before_the_rest_is_done(tmp_path: Path) -> None:
    tasks = [*rows(1), *rows(3, delay=600)[1:]]
    with fake_engine(schedule="static") as engine:
        outcomes = engine.run(tasks, tmp_path)
        assert next(outcomes).task.id == "t0"
        outcomes.close()


def test_a_failed_task_is_an_outcome_with_kind_and_message(tmp_path: Path) -> None:
    tasks = rows(3)
    tasks[1]["fake"] = {"fail": "bad_task"}
    with fake_engine() as engine:
        good, bad, _ = engine.run(tasks, tmp_path)
    assert (bad.ok, bad.state, bad.kind, bad.path) == (False, "failed", "bad_task", "")
    assert "scripted" in bad.message
    assert good.ok


def test_what_an_earlier_run_made_is_handed_out_as_resumed_without_a_worker(tmp_path: Path, before: set[int]) -> None:
    with fake_engine() as engine:
        first = [outcome.path for outcome in engine.run(rows(4), tmp_path)]
    with fake_engine() as engine:
        outcomes = list(engine.run(rows(4), tmp_path))
        assert descendants() == before
    assert [outcome.path for outcome in outcomes] == first
    assert all(outcome.resumed and outcome.ok for outcome in outcomes)


def test_an_engine_goes_on_after_a_run_that_was_left_early(tmp_path: Path) -> None:
    with fake_engine() as engine:
        outcomes = engine.run(rows(40, delay=0.05), tmp_path)
        assert [outcome.task.id for outcome in islice(outcomes, 3)] == ["t0", "t1", "t2"]
        outcomes.close()
        again = list(engine.run(rows(40), tmp_path))
        assert [outcome.task.id for outcome in again] == [f"t{number}" for number in range(40)]
        assert all(outcome.ok for outcome in again)
        assert all(outcome.resumed for outcome in again[:3])
    assert not list(tmp_path.glob(".*.part"))


def test_an_engine_goes_on_after_a_worker_died(tmp_path: Path, before: set[int]) -> None:
    with fake_engine() as engine:
        assert all(outcome.ok for outcome in engine.run(rows(4), tmp_path / "first"))
        os.kill(min(descendants() - before), 9)
        assert all(outcome.ok for outcome in engine.run(rows(4), tmp_path / "second"))
    assert descendants() == before


def test_two_runs_of_one_engine_at_once_are_refused(tmp_path: Path) -> None:
    with fake_engine() as engine:
        outcomes = engine.run(rows(4, delay=0.2), tmp_path / "first")
        next(outcomes)
        with pytest.raises(InputError, match="runs already"):
            next(engine.run(rows(1), tmp_path / "second"))
        assert len(list(outcomes)) == 3


def test_a_run_can_be_ended_from_another_thread(tmp_path: Path) -> None:
    with fake_engine() as engine:
        outcomes = engine.run(rows(40, delay=0.2), tmp_path)
        first = next(outcomes)
        stopper = threading.Thread(target=engine.drain)
        stopper.start()
        rest = list(outcomes)
        stopper.join()
        assert engine.report is not None
        assert engine.report.status == "drained"
        assert engine.report.done == 1 + len(rest)
        assert engine.report.pending == 40 - engine.report.done > 0
    assert first.ok


# --- lazy sources -----------------------------------------------------------------------------------------------------


class Tape:
    """A source without end that counts how far it was read."""

    def __init__(self, **first: Any) -> None:
        self.read = 0
        self.first = first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.read += 1
            yield {"id": f"t{self.read - 1}", "prompt": "p", "fake": self.first if self.read == 1 else {}}


def test_an_iterator_is_read_only_as_far_ahead_as_settled(tmp_path: Path) -> None:
    tape = Tape()
    with fake_engine(read_ahead=READ_AHEAD, sink="none") as engine:
        outcomes = engine.run(iter(tape), tmp_path)
        for number, outcome in enumerate(islice(outcomes, 200)):
            assert outcome.task.id == f"t{number}"
            assert tape.read - number <= 4 * READ_AHEAD + 1
        outcomes.close()


def test_a_source_without_end_is_not_read_on_while_its_first_task_holds_back_the_order(tmp_path: Path) -> None:
    tape = Tape(delay=1.0)
    with fake_engine(read_ahead=256, sink="none") as engine:
        outcomes = engine.run(iter(tape), tmp_path)
        assert next(outcomes).task.id == "t0"
        assert 256 < tape.read <= 5 * 256  # the other worker went on, but not without bound
        outcomes.close()


def test_an_iterator_ends_where_it_ends_and_its_run_can_be_resumed(tmp_path: Path) -> None:
    for resumed in (False, True):
        with fake_engine(read_ahead=READ_AHEAD) as engine:
            outcomes = list(engine.run(iter(rows(50)), tmp_path))
        assert [outcome.task.id for outcome in outcomes] == [f"t{number}" for number in range(50)]
        assert {outcome.resumed for outcome in outcomes} == {resumed}


def test_a_bad_row_of_an_iterator_stops_the_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    def tasks() -> Iterator[dict[str, Any]]:
        yield from rows(600)
        yield {"prompt": 7}

    with fake_engine(read_ahead=READ_AHEAD, sink="none") as engine, pytest.raises(InputError, match="task 601: prompt"):
        list(engine.run(tasks(), tmp_path))
    with fake_engine(sink="none") as engine:
        outcomes = list(engine.run(iter(rows(600)), tmp_path))
    assert len(outcomes) == 600
    assert sum(outcome.resumed for outcome in outcomes) > 300


def test_an_error_of_the_source_itself_is_the_callers(tmp_path: Path, before: set[int]) -> None:
    def tasks() -> Iterator[dict[str, Any]]:
        yield from rows(3)
        raise LookupError("the database is gone")

    with fake_engine() as engine, pytest.raises(LookupError, match="the database is gone"):
        list(engine.run(tasks(), tmp_path))
    assert descendants() == before


def test_bad_rows_of_an_iterator_can_be_skipped(tmp_path: Path) -> None:
    source: Iterator[Any] = iter([*rows(2), {"prompt": 7}, *rows(4)[2:]])
    with fake_engine() as engine:
        outcomes = list(engine.run(source, tmp_path, RunOptions(skip_bad=True)))
        assert engine.report is not None
        assert [place for place, _ in engine.report.skipped] == ["task 3"]
    assert [outcome.task.id for outcome in outcomes] == ["t0", "t1", "t2", "t3"]


# --- scripts ----------------------------------------------------------------------------------------------------------


def test_a_script_needs_no_main_guard_and_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""\
        import imagemill
        print("begun")
        with imagemill.Engine("fake", workers=2) as engine:
            for outcome in engine.run(["a", "b", "c"], "out"):
                print(outcome.task.id, outcome.ok)
        """)
    )
    ended = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["begun", "000001 True", "000002 True", "000003 True"]


def test_files_of_the_users_folder_do_not_shadow_what_workers_import(tmp_path: Path) -> None:
    for name in ("json", "queue", "selectors", "PIL", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    script = "import imagemill, sys; sys.exit(imagemill.run(['a', 'b'], out='out', model='fake', workers=2).exit_code)"
    ended = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (0, "")


# --- the calls of the older script ------------------------------------------------------------------------------------

KEYS = ["task_id", "success", "output_path", "elapsed", "error"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_gpu_is_not_every_gpu() -> None:
    for make in (Engine, MultiGPUImageGenerator):
        with pytest.raises(InputError, match="gpu_ids: names no GPU; leave it out"):
            make(gpu_ids=[])


def test_a_model_that_is_none_is_told_when_the_engine_is_made(tmp_path: Path) -> None:
    for make in (Engine, MultiGPUImageGenerator):
        with pytest.raises(InputError, match="model 'tinny' is not known; did you mean tiny"):
            make(model="tinny", device="cpu")
        with pytest.raises(InputError, match=r"has no model_index\.json"):
            make(model=str(tmp_path), device="cpu")
    Engine(model="some/repository", device="cpu").close()  # the hub is asked when the first run needs it


@pytest.mark.skipif(bool(devices.gpus()), reason="this machine has a GPU")
def test_gpus_where_there_are_none_are_told_when_the_engine_is_made() -> None:
    for make in (
        lambda: Engine(model="fake", gpus=2),
        lambda: MultiGPUImageGenerator(num_gpus=2, model="fake"),
        lambda: MultiGPUImageEditor(device_ids=[0], model_name="tiny-edit"),
    ):
        with pytest.raises(InputError, match="there is no NVIDIA GPU here"):
            make()


def test_without_a_name_pictures_go_to_a_folder_of_their_own() -> None:
    with fake_engine() as engine:
        sources = ("birds.jsonl", "..jsonl", "-", [{"prompt": "a"}], iter(()))
        folders = [str(engine.default_folder(source)) for source in sources]
    assert folders == ["outputs/birds", "outputs/tasks", "outputs/stdin", "outputs/python", "outputs/python"]


def generator(**settings: Any) -> MultiGPUImageGenerator:
    return MultiGPUImageGenerator(**{"model": "fake", "device": "cpu", "workers": 2, **settings})


def test_generate_batch_returns_a_dict_a_task_in_order(here: Path, before: set[int]) -> None:
    tasks = [
        {"prompt": "an owl", "seed": 7, "output_path": "owl.png", "fake": {"delay": 0.5}},
        {"prompt": "a volcano", "seed": 8, "output_path": str(here / "deep" / "volcano.webp"), "width": 32, "steps": 3},
        {"prompt": "a street", "seed": 9, "output_path": "pictures/street"},
        {"prompt": "an apple", "task_id": "fruit"},
    ]
    with generator() as made:
        results = made.generate_batch(tasks)
        crew = descendants() - before
        assert len(crew) == 2
        assert [result["success"] for result in made.generate_batch(tasks)] == [True] * 4
        assert descendants() - before == crew
    assert descendants() == before
    assert [list(result) for result in results] == [KEYS] * 4
    assert [result["task_id"] for result in results] == ["0", "1", "2", "fruit"]
    assert [result["output_path"] for result in results] == [
        str(here / "owl.png"),
        str(here / "deep" / "volcano.webp"),
        str(here / "pictures" / "street.png"),
        str(here / "outputs" / "000003.png"),
    ]
    assert all(Path(result["output_path"]).is_file() for result in results)
    assert all(result["success"] is True and result["error"] is None for result in results)
    assert all(isinstance(result["elapsed"], float) and result["elapsed"] >= 0 for result in results)


def test_generate_batch_tells_a_failure_in_its_dict_and_does_the_others(here: Path) -> None:
    tasks = [
        {"prompt": "a", "output_path": "a.png"},
        {"prompt": "b", "output_path": "b.png", "fake": {"fail": "bad_task"}},
        {"prompt": "c", "output_path": "c.png", "fake": {"crash": "kill"}},
        {"prompt": "d", "output_path": "d.png"},
    ]
    with generator() as made:
        results = made.generate_batch(tasks)
    assert [result["success"] for result in results] == [True, False, False, True]
    for result, kind in ((results[1], "bad_task"), (results[2], "worker_lost")):
        assert list(result) == KEYS
        assert result["output_path"] is None
        assert result["error"].startswith(kind)
        assert isinstance(result["elapsed"], float)
    assert sorted(path.name for path in here.glob("*.png")) == ["a.png", "d.png"]


def test_what_will_not_do_what_it_should_is_a_warning_of_the_library(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with generator() as maker:
        (made,) = maker.generate_batch([{"prompt": "an owl", "stepps": 4}])
    assert made["success"]
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("imagemill", "WARNING", "the column stepps is not known and becomes metadata; did you mean steps?")
    ]


def test_pictures_without_a_path_take_numbers_that_nobody_has(here: Path) -> None:
    first, second = generator(workers=1), generator(workers=1)
    with first, second:
        makers = (first, second, first)
        made = [maker.generate_batch([{"prompt": "an owl"}, {"prompt": "a boat"}]) for maker in makers]
    (here / "outputs" / "000041.png").write_bytes(b"somebody else's")
    with generator(workers=1) as third:
        made.append(third.generate_batch([{"prompt": "a cat"}]))
    names = [Path(result["output_path"]).name for results in made for result in results]
    assert names == [f"{number:06d}.png" for number in (*range(6), 42)]
    assert (here / "outputs" / "000041.png").read_bytes() == b"somebody else's"


def test_numbers_are_taken_by_many_threads_without_a_gap_or_a_double(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda count: (take_numbers(tmp_path / "new", count), count), [1, 2, 3] * 20))
    assert sorted(number for first, count in taken for number in range(first, first + count)) == list(range(120))
    (tmp_path / "new" / ".imagemill.next").write_text("no number at all")
    assert [take_numbers(tmp_path / "new", 2) for _ in range(2)] == [0, 2]
    with pytest.raises(InputError, match=r"cannot be written to.*give another output_dir"):
        take_numbers(tmp_path / "new" / ".imagemill.next", 1)


def test_generate_batch_never_replaces_what_its_tasks_read(here: Path) -> None:
    source = here / "photo.png"
    Image.new("RGB", (64, 64), "red").save(source)
    before = source.read_bytes()
    with generator() as made, pytest.raises(InputError, match=r"photo\.png.*one of the files that the tasks read"):
        made.generate_batch([{"prompt": "bluer", "image": str(source), "output_path": "photo.png"}])
    assert source.read_bytes() == before


def test_what_generate_batch_refuses_names_no_option_of_the_command_and_no_column_that_nobody_gave(here: Path) -> None:
    Image.new("RGB", (64, 64)).save(here / "photo.png")
    with generator() as made:
        for task, told in (
            ({"text": "an owl"}, ["task 1: prompt: is missing; give one", "nothing was started"]),
            ({"prompt": "an owl", "steps": 0}, ["task 1: steps: is 0; 1 to 1000 are taken", "nothing was started"]),
            (
                {"prompt": "bluer", "image": "photo.png", "output_path": "photo"},
                [
                    "task 1: output_path 'photo.png': is one of the files that the tasks read",
                    "nothing was started; choose another output_path",
                ],
            ),
        ):
            with pytest.raises(InputError) as refused:
                made.generate_batch([task])
            assert str(refused.value).splitlines() == told
        with pytest.raises(InputError) as refused:
            made.generate_batch([{"text": "an owl"}, {"text": "a crow"}])
        told = ["task 1: prompt: is missing; give one (the same in all 2 rows)", "nothing was started"]
        assert str(refused.value).splitlines() == told


def test_generate_batch_replaces_files_and_leaves_nothing_else_behind(here: Path) -> None:
    (here / "a.png").write_text("old")
    with generator() as made:
        for _ in range(2):
            (result,) = made.generate_batch([{"prompt": "a", "output_path": "a.png"}])
            assert result["success"]
        assert made.generate_batch([]) == []
    assert (here / "a.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in here.iterdir()} == {"a.png", "outputs"}
    assert {path.name for path in (here / "outputs").rglob("*") if path.is_file()} <= {
        "driver.log",
        "worker-0.log",
        "worker-1.log",
    }


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([{"seed": 1}], "prompt"),
        ([{"prompt": "a", "steps": "x"}], "steps"),
        ([{"prompt": "a", "output_path": "a.png"}, {"prompt": "b", "output_path": "A.png"}], "A.png"),
        ([{"prompt": "a", "lora_path": "gone.safetensors", "lora_strength": 0.8}], "gone.safetensors"),
        ([{"prompt": "a"}, {"prompt": "a", "num_images": 2}], "task 2: num_images"),
        ([{"prompt": "a"}, {"prompt": ""}], "task 2: prompt"),
        ([{"prompt": "a"}, 5], "task 2: int is no dict"),
    ],
)
def test_generate_batch_refuses_dicts_that_cannot_be_used(tasks: list[dict[str, Any]], words: str, here: Path) -> None:
    with generator() as made, pytest.raises(InputError, match=words):
        made.generate_batch(tasks)
    assert not list(here.rglob("*.png"))


def test_the_older_scripts_ways_to_name_gpus_are_taken(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tuple(devices.Gpu(index, f"GPU-{index}", "NVIDIA H100", 80 << 30, 79 << 30, "570") for index in range(8))
    monkeypatch.setattr(devices, "gpus", lambda: there)
    monkeypatch.setattr(devices, "torch_cuda", lambda: "13.0")
    for how in ({"num_gpus": 4}, {"gpu_ids": [0, 2, 4, 6]}):
        with MultiGPUImageGenerator(model="fake", **how) as made:
            assert made.generate_batch([]) == []
    with pytest.raises(InputError, match="gpu"):
        MultiGPUImageGenerator(num_gpus=2, gpu_ids=[0, 1, 2])


def test_the_example_script_makes_the_pictures_of_a_tweet_batch(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, root / "examples" / "generate_images_from_tweets.py", root / "examples" / "tweets.json"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    tweets = json.loads((root / "examples" / "tweets.json").read_text("utf-8"))["tweets"]
    assert f"{len(tweets)} done, 0 failed" in ended.stdout
    assert len(list((tmp_path / "outputs" / "tweets").glob("*.png"))) == len(tweets)
    assert (tmp_path / "outputs" / "tweets" / "report.html").is_file()


def test_the_example_script_answers_ctrl_c_with_a_line(root: Path, tmp_path: Path) -> None:
    tweet = {"image_generation": {"scene_hint": "an owl", "fake": {"delay": 600}}}
    (tmp_path / "slow.json").write_text(json.dumps({"persona": {"name": "P"}, "tweets": [tweet]}))
    command = [sys.executable, root / "examples" / "generate_images_from_tweets.py", "slow.json"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "IMAGEMILL_MODEL": "fake"}
    started = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    until((tmp_path / "outputs" / "slow" / "logs" / "driver.log").exists)
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=120) == (None, "stopped; the same command does what is left\n")
    assert started.returncode == 130


def test_the_example_script_refuses_gpus_that_are_not_there(root: Path, tmp_path: Path) -> None:
    place = root / "examples"
    command = [sys.executable, place / "generate_images_from_tweets.py", place / "tweets.json", "4"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: there is no GPU that torch can use here; leave NUM_GPUS out to run on the CPU\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("a", "1", "2")])
def test_the_example_script_says_how_it_is_called(arguments: tuple[str, ...], root: Path) -> None:
    command = [sys.executable, root / "examples" / "generate_images_from_tweets.py", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.startswith("usage:")
