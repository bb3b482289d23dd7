"""Row 4, out of memory, once and always: batches are halved, the worker gives way, one task fails, the worker lives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import AHEAD, after, at_start, golden_of, log_of

import imagemill
from imagemill.families.z_image import ZImage
from imagemill.records import ModelSpec, PlannedTask, Task, Ticket
from imagemill.runners import tiles
from imagemill.runners.diffusion import DiffusionRunner, create
from orders import order_of
from workplace import pixels, rows

BATCHES = ("--batch-size", "4", "--workers", "1", "--isolate")
COUNT = 8
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB"


@pytest.fixture(scope="module")
def golden(shared_place: Any) -> dict[str, str]:
    return golden_of(shared_place, COUNT)


def lives(place: Any) -> int:
    """How many processes the one worker has had."""
    return len(re.findall(r", pid \d+", log_of(place, "worker-0.log")))


def sizes(place: Any, task: str) -> list[int]:
    """The batch size of each attempt of a task, in order."""
    return [size for (size,) in place.ledger(f"SELECT batch_size FROM attempts WHERE id = '{task}' ORDER BY attempt")]


FAULTS: dict[str, tuple[dict[str, Any], str, list[int]]] = {
    "once": ({"fail": "oom", "fail_attempts": 1}, "done", [4, 2]),
    "until_one": ({"oom": 2}, "done", [4, 2, 1]),
    "always": ({"oom": 1}, "failed", [4, 2, 1, 1]),
}


@pytest.mark.parametrize(("fault", "ahead"), [*((fault, False) for fault in FAULTS), ("always", True)])
def test_out_of_memory_halves_the_batch_and_costs_at_most_its_own_task(
    fault: str, ahead: bool, place: Any, golden: dict[str, str]
) -> None:
    script, state, attempts = FAULTS[fault]
    running = place.start_fake(
        place.tasks(rows(COUNT, t1=script)), "out", *BATCHES, **(at_start(place, AHEAD) if ahead else {})
    )
    ended = running.wait()
    states = after(place, ended, running=running, golden=golden, ids=[f"t{number}" for number in range(COUNT)])
    assert states == {name: state if name == "t1" else "done" for name in states}
    assert ended.code == (0 if state == "done" else 1)
    assert sizes(place, "t1") == attempts
    assert lives(place) == 1
    if state == "failed":
        (failed,) = (one for one in place.results() if one["id"] == "t1")
        assert failed["kind"] == "oom"
        assert "memory" in failed["message"]


def test_many_tasks_that_never_fit_cost_themselves_alone(place: Any, golden: dict[str, str]) -> None:
    never = {f"t{number}": {"oom": 1} for number in (0, 3, 4, 7)}
    ended = place.fake(place.tasks(rows(COUNT, **never)), "out", *BATCHES)
    states = after(place, ended, golden=golden)
    assert {name for name, state in states.items() if state == "failed"} == set(never)
    assert ended.code == 1
    assert lives(place) == 1


def test_what_failed_for_want_of_memory_is_made_when_there_is_room(place: Any, golden: dict[str, str]) -> None:
    place.write("room", "")
    shim = f"""
    import imagemill.runners.fake as fake
    if fd >= 0 and not os.path.exists({str(place.folder / "there-is-room")!r}):
        fake.scripted = lambda script, what, attempt: False
        real = fake.script_of
        fake.script_of = lambda task: {{"oom": 1}} if task.id == "t2" else real(task)
    """
    source = place.tasks(rows(COUNT))
    assert place.fake(source, "out", *BATCHES, **at_start(place, shim)).code == 1
    assert after(place)["t2"] == "failed"
    place.write("there-is-room", "")
    again = place.fake(source, "out", "--retry-failed=oom", *BATCHES, **at_start(place, shim))
    assert again.code == 0, again.text
    assert set(after(place, again, golden=golden).values()) == {"done"}


# --- a pipeline -------------------------------------------------------------------------------------------------------


class Short:
    """Has a stage of the family run out of memory, as torch says it, as long as `lacks` says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage: str, lacks: Callable[[Any, list[Task]], bool]) -> None:
        self.seen: list[list[str]] = []
        whole = getattr(ZImage, stage)

        def short(family: ZImage, pipe: Any, tasks: Any, *rest: Any) -> Any:
            self.seen.append([task.prompt for task in tasks])
            if lacks(pipe, list(tasks)):
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            return whole(family, pipe, tasks, *rest)

        monkeypatch.setattr(ZImage, stage, short)


TINY = {"model": "tiny", "device": "cpu", "size": "64x64", "steps": 1, "batch_size": 4, "compile": "off"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the embedded model makes of four prompts, one at a time."""
    folder = tmp_path_factory.mktemp("whole")
    assert imagemill.run(list("abcd"), folder, **{**TINY, "batch_size": 1}).done == 4
    return pixels(folder)


@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_a_pipeline_that_finds_no_room_for_a_batch_makes_its_pictures_one_by_one(
    stage: str, pictures: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Short(monkeypatch, stage, lambda pipe, tasks: len(tasks) > 1)
    report = imagemill.run(list("abcd"), tmp_path, **TINY)
    assert (report.done, report.exit_code) == (4, 0)
    assert {len(tasks) for tasks in short.seen} == {4, 2, 1}
    assert pixels(tmp_path) == pictures


@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_a_picture_that_never_finds_room_fails_alone_as_oom_and_the_pipeline_goes_on(
    stage: str, pictures: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Short(monkeypatch, stage, lambda pipe, tasks: any(task.prompt == "b" for task in tasks))
    with imagemill.Engine(**TINY) as engine:
        outcomes = list(engine.run(list("abcd"), tmp_path))
    assert [(one.state, one.kind) for one in outcomes] == [
        ("done", None),
        ("failed", "oom"),
        ("done", None),
        ("done", None),
    ]
    assert "CUDA out of memory" in outcomes[1].message
    made = pixels(tmp_path)
    assert made == {name: digest for name, digest in pictures.items() if name != "000002.png"}


def test_a_picture_whose_decode_finds_no_room_is_made_in_tiles_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ladder, under a whole run: the batch cannot be halved, so the worker gives way."""
    monkeypatch.setattr(tiles, "SMALL_TILE", 32)
    short = Short(monkeypatch, "decode", lambda pipe, tasks: not pipe.vae.use_tiling)
    with imagemill.Engine(**TINY) as engine:
        (outcome,) = engine.run(["a"], tmp_path)
    assert outcome.state == "done"
    assert len(short.seen) == 2
    assert outcome.receipt is not None
    assert "decoded in tiles of 32 pixels" in outcome.receipt.flags


@pytest.fixture(scope="module")
def runner() -> Iterator[DiffusionRunner]:
    threads = torch.get_num_threads()
    made = create("cpu", 1)
    made.load(ModelSpec("tiny", str(Path(imagemill.__file__).parent / "assets" / "tiny")), lambda *_: None)
    yield made
    made.unload()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_the_runner_itself_serves_the_next_batch_after_it_ran_out(
    stage: str, runner: DiffusionRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task("a", "a", width=64, height=64, steps=1, guidance_scale=0.0, seed=1, model="tiny")
    order = order_of(PlannedTask(task, "0" * 64, Ticket(0)), model=ModelSpec("tiny", ""))
    before = [result.landed() for result in runner.run(order, lambda *_: None)]
    with monkeypatch.context() as patch:
        Short(patch, stage, lambda *_: True)
        with pytest.raises(torch.OutOfMemoryError):
            list(runner.run(order, lambda *_: None))
    after_it = [result.landed() for result in runner.run(order, lambda *_: None)]
    assert before[0].image is not None
    assert after_it[0].image is not None
    assert before[0].image.tobytes() == after_it[0].image.tobytes()
