"""The text and the pictures of the next batch, encoded between the steps of the one at work: what is gained, and that nothing
changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_editors
import torch
from PIL import Image
from tiny_model import SPEC, Pixels, loaded, pixels, write_lora

from imagemill.errors import BadTask, OutOfMemory, Transient
from imagemill.families import family
from imagemill.records import ModelSpec, PlannedTask, Task, WorkOrder
from imagemill.runners import Result, early, references
from imagemill.runners.diffusion import DiffusionRunner
from imagemill.runners.early import Early
from imagemill.runners.references import Member
from imagemill.runners.streams import HostLane, Stages
from orders import order_of, planned

STEPS = 4
ENDED = "nothing is encoded ahead of its turn any more, since that failed:"
SIZE = (64, 48)


class Recording(HostLane):
    """A host that is said to overlap; keeps what was launched, in order."""

    overlaps = True

    def __init__(self) -> None:
        self.launched: list[str] = []

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.launched.append("beside")
        yield

    def join(self) -> None:
        self.launched.append("join")

    @contextmanager
    def stage(self, stages: Stages, name: str) -> Iterator[None]:
        if name != "adapters":
            self.launched.append(name)
        with super().stage(stages, name):
            yield


class Bench:
    """A loaded editor, orders for it, and what its runner launched for one that comes after another."""

    def __init__(self, runner: DiffusionRunner, spec: ModelSpec, folder: Path) -> None:
        self.runner, self.spec, self.folder = runner, spec, folder

    def planned(self, seq: int, **changes: Any) -> PlannedTask:
        path = self.folder / f"{seq}.png"
        if not path.exists():
            fields = np.random.default_rng(seq).integers(0, 256, (3, 4, 3), dtype=np.uint8)
            Image.fromarray(fields).resize(SIZE, Image.Resampling.NEAREST).save(path)
        task = Task(
            **{
                "id": str(seq), "prompt": f"paint it in colour {seq}", "images": (str(path),), "model": "m", "steps": STEPS,
                "width": SIZE[0], "height": SIZE[1], "seed": seq, "true_cfg_scale": 4.0, "negative_prompt": " ", **changes,
            }
        )  # fmt: skip
        return planned(task, "r", seq)

    def order(self, *tasks: PlannedTask) -> WorkOrder:
        return order_of(*tasks, model=self.spec, batch=tasks[0].ticket.seq)

    def run(
        self, order: WorkOrder, following: WorkOrder | None = None, wanted: list[bool] | None = None
    ) -> list[Result]:
        """The results of the order; `following` is told at each beat, and its pictures are read when the steps begin. `wanted`
        takes for each beat whether it was wanted."""

        def beat(stage: str, seq: int, step: int, steps: int) -> None:
            if wanted is not None:
                wanted.append(self.runner.wants_next)
            if following is not None and self.runner.wants_next:
                self.runner.follow(following)
                self.early._next._reading.exception()  # the pictures are read when the step goes on

        return sorted((one.landed() for one in self.runner.run(order, beat)), key=lambda one: one.seq)

    @property
    def early(self) -> Any:
        return self.runner._early

    def on(self, lane: HostLane, monkeypatch: pytest.MonkeyPatch, *, pays: bool = True) -> None:
        """The runner on that lane."""
        runner = self.runner
        made = Early(runner._pipe, runner._family, self.spec, lane, runner._tell, pays=pays)  # type: ignore[arg-type]
        monkeypatch.setattr(self.runner, "_lane", lane)
        monkeypatch.setattr(self.runner, "_early", made)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("qwen")
    spec = ModelSpec(name="m", folder=str(tiny_editors.qwen(folder / "model")), revision="r")
    for runner in loaded(spec):
        yield Bench(runner, spec, folder)


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    for runner in loaded():
        yield Bench(runner, SPEC, tmp_path_factory.mktemp("text"))


@pytest.fixture
def lane(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recording]:
    lane = Recording()
    bench.on(lane, monkeypatch)
    yield lane
    bench.early.close()


def raising(error: Exception) -> Any:
    """In the place of `pieces`."""

    def fail(*anything: Any) -> Iterator[None]:
        raise error
        yield

    return fail


def ahead_of_its_turn() -> bool:
    return threading.current_thread().name.startswith("pictures")


def alone(bench: Bench, *tasks: PlannedTask) -> list[Pixels]:
    with pytest.MonkeyPatch.context() as patch:
        bench.on(HostLane(), patch)
        return [pixels(result) for result in bench.run(bench.order(*tasks))]


def same(results: list[Result], expected: list[Pixels]) -> bool:
    return all((pixels(one) == other).all() for one, other in zip(results, expected, strict=True))


def test_the_next_order_is_encoded_between_the_steps_and_joined_at_its_turn(bench: Bench, lane: Recording) -> None:
    first, second = bench.order(bench.planned(1)), bench.order(bench.planned(2))
    expected = alone(bench, *second.tasks)
    bench.run(first, second)
    assert lane.launched == ["encode", "denoise", *("beside", "encode") * 3, "decode"]
    lane.launched.clear()
    (result,) = bench.run(second)
    assert lane.launched == ["join", "denoise", "decode"]
    assert same([result], expected)
    assert result.seconds["encode"] == pytest.approx(sum(s.seconds for s in result.spans if s.stage == "encode"))
    assert [span.stage for span in result.spans] == ["encode"] * 3 + ["denoise", "decode"]


def test_text_is_encoded_behind_the_last_steps_whatever_adapter_comes_next(
    painter: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def text(seq: int, **changes: Any) -> PlannedTask:
        return painter.planned(seq, **{"images": (), "true_cfg_scale": None, "negative_prompt": None, **changes})

    first = painter.order(text(1), text(2))
    adapted = painter.order(*(text(seq, loras=(write_lora(tmp_path),)) for seq in (3, 4)))
    expected = alone(painter, *adapted.tasks)
    lane = Recording()
    painter.on(lane, monkeypatch)
    beats: list[bool] = []
    painter.run(first, adapted, beats)
    assert beats == [False] * 3 + [True] * 3
    assert lane.launched == ["encode", "denoise", "beside", "encode", "decode"]
    lane.launched.clear()
    assert same(painter.run(adapted), expected)
    assert lane.launched == ["join", "denoise", "decode"]
    painter.early.close()


def test_text_that_comes_at_the_last_step_is_still_encoded_before_the_decoder(
    painter: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is asked one step before the end, so its answer is there at the last, and no thread is waited for."""
    lane = Recording()
    painter.on(lane, monkeypatch)
    plain = {"images": (), "true_cfg_scale": None, "negative_prompt": None}
    orders = [painter.order(painter.planned(seq, **plain)) for seq in range(1, 5)]
    for order, following in pairwise(orders):
        lane.launched.clear()

        def beat(stage: str, seq: int, step: int, steps: int, following: WorkOrder = following) -> None:
            if stage == "denoise" and step == steps:
                painter.runner.follow(following)

        for result in painter.runner.run(order, beat):
            result.landed()
        assert lane.launched[-4:] == ["denoise", "beside", "encode", "decode"]
    painter.early.close()


def test_a_driver_that_answers_a_step_later_and_a_step_of_reading_leave_time_for_all_pieces(
    bench: Bench, lane: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bench.order(bench.planned(1, steps=8)), bench.order(bench.planned(2))
    reading, read = threading.Event(), early.take_in

    def slow(*arguments: Any) -> Iterator[Member | Result]:
        if ahead_of_its_turn():
            assert reading.wait(20)
        yield from read(*arguments)

    monkeypatch.setattr(early, "take_in", slow)
    beats: list[int] = []

    def beat(stage: str, seq: int, step: int, steps: int) -> None:
        if bench.runner.wants_next:
            beats.append(step)
        if len(beats) >= 2:
            bench.runner.follow(second)
        if len(beats) >= 3:
            reading.set()
            bench.early._next._reading.result()

    for result in bench.runner.run(first, beat):
        result.landed()
    assert lane.launched == ["encode", "denoise", *("beside", "encode") * 3, "decode"]


def test_an_order_that_runs_in_parts_calls_the_next_one_in_its_last(bench: Bench, lane: Recording) -> None:
    """An order of five edits is run as four and one: another worker may be free before both are done."""
    wanted: list[tuple[int, bool]] = []
    order = bench.order(*(bench.planned(seq) for seq in range(2, 7)))
    for result in bench.runner.run(order, lambda stage, seq, *step: wanted.append((seq, bench.runner.wants_next))):
        result.landed()
    assert not any(wants for seq, wants in wanted if seq == 2)
    assert any(wants for seq, wants in wanted if seq == 6)


def test_pieces_that_found_no_step_are_launched_at_the_order_s_own_turn(bench: Bench, lane: Recording) -> None:
    """The prompts, the negative prompts, the pictures, and one step between which to launch them."""
    second = bench.order(bench.planned(2))
    expected = alone(bench, *second.tasks)
    bench.run(bench.order(bench.planned(1, steps=1)), second)
    assert lane.launched.count("beside") == 1
    lane.launched.clear()
    assert same(bench.run(second), expected)
    assert lane.launched == [*("beside", "encode") * 2, "join", "denoise", "decode"]


def test_only_the_first_batch_of_an_order_is_encoded_early(bench: Bench, lane: Recording) -> None:
    """An order of five edits is run as four and one."""
    second = bench.order(*(bench.planned(seq) for seq in range(2, 7)))
    expected = alone(bench, *second.tasks)
    bench.run(bench.order(bench.planned(1)), second)
    lane.launched.clear()
    assert same(bench.run(second), expected)
    assert lane.launched == ["join", "denoise", "decode", "encode", "denoise", "decode"]


def test_an_order_that_does_not_come_is_forgotten(bench: Bench, lane: Recording) -> None:
    awaited, came = bench.order(bench.planned(2)), bench.order(bench.planned(3))
    expected = alone(bench, *came.tasks)
    bench.run(bench.order(bench.planned(1)), awaited)
    lane.launched.clear()
    assert same(bench.run(came), expected)
    assert lane.launched == ["encode", "denoise", "decode"]


def test_a_picture_that_cannot_be_read_costs_its_task_alone(bench: Bench, lane: Recording) -> None:
    good, bad = bench.planned(2), bench.planned(3)
    Path(bad.task.images[0]).write_bytes(b"no picture")
    expected = alone(bench, good)
    second = bench.order(bad, good)
    bench.run(bench.order(bench.planned(1)), second)
    made, refused = bench.run(second)
    Path(bad.task.images[0]).unlink()
    assert same([made], expected)
    assert refused.error is not None
    assert refused.error.kind == "bad_task"


def test_what_fails_early_is_tried_at_the_order_s_own_turn(
    bench: Bench, lane: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = bench.order(bench.planned(2))
    expected = alone(bench, *second.tasks)

    def broken(*anything: Any) -> Iterator[None]:
        yield
        raise RuntimeError("the device is out of sorts")

    with monkeypatch.context() as patch:
        patch.setattr(early, "pieces", broken)
        bench.run(bench.order(bench.planned(1)), second)
    assert lane.launched.count("beside") == 2
    assert bench.runner.notes() == (f"{ENDED} RuntimeError: the device is out of sorts",)
    lane.launched.clear()
    assert same(bench.run(second, second), expected)
    assert lane.launched == ["encode", "denoise", "decode"]


def test_a_task_that_cannot_be_encoded_ends_nothing_but_itself(
    bench: Bench, lane: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = bench.order(bench.planned(2))
    expected = alone(bench, *second.tasks)
    with monkeypatch.context() as patch:
        patch.setattr(early, "pieces", raising(BadTask("too many words")))
        bench.run(bench.order(bench.planned(1)), second)
    assert same(bench.run(second, second), expected)
    assert lane.launched.count("beside") == 1 + 3
    assert bench.runner.notes() == ()


def test_a_spoilt_context_is_told_where_it_is_found(
    bench: Bench, lane: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "pieces", raising(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench.run(bench.order(bench.planned(1)), bench.order(bench.planned(2)))


def test_a_disk_that_fails_while_an_order_waits_is_read_again_at_its_turn(
    bench: Bench, lane: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = bench.order(bench.planned(2), bench.planned(3))
    expected = alone(bench, *second.tasks)
    read, failures = references.read, list[Exception]()

    def hiccup(*arguments: Any) -> Any:
        if ahead_of_its_turn():
            failures.append(failure)
            raise failure
        return read(*arguments)

    monkeypatch.setattr(references, "read", hiccup)
    for failure in (Transient("the disk hiccups"), RuntimeError("nobody foresaw this")):
        bench.run(bench.order(bench.planned(1)), second)
        assert failure in failures
        assert same(bench.run(second), expected)


def test_pictures_that_nobody_needs_any_more_are_not_read(
    bench: Bench, lane: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = bench.order(*(bench.planned(seq) for seq in range(2, 7)))
    begun, go_on, read = threading.Event(), threading.Event(), list[int]()
    usual = references.read

    def slow(planned: PlannedTask, model: ModelSpec) -> Any:
        begun.set()
        assert go_on.wait(20)
        read.append(planned.ticket.seq)
        return usual(planned, model)

    monkeypatch.setattr(references, "read", slow)
    bench.runner.follow(order)
    reading = bench.early._next._reading
    assert begun.wait(20)
    bench.early.give_up()
    go_on.set()
    reading.result()
    assert read == [2]


def test_out_of_memory_lets_go_of_what_is_early_and_ends_it(
    bench: Bench, lane: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bench.order(bench.planned(1)), bench.order(bench.planned(2))
    expected, last = alone(bench, *first.tasks), alone(bench, *second.tasks)
    kind = family("qwen_edit")
    decode, calls = type(kind).decode, []

    def tight(*arguments: Any) -> Any:
        calls.append(threading.get_ident())
        if len(calls) == 1:
            raise OutOfMemory("no room")
        return decode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(kind), "decode", tight)
        made = bench.run(first, second)
    assert same(made, expected)
    assert len(calls) == 2
    assert bench.runner.notes() == ()
    lane.launched.clear()
    assert same(bench.run(second, first), last)
    assert "beside" not in lane.launched


def test_out_of_memory_with_nothing_early_on_the_device_costs_no_further_try(bench: Bench, lane: Recording) -> None:
    """The ladder's next step is taken at once, though this order was encoded early."""
    first, second = bench.order(bench.planned(1)), bench.order(bench.planned(2))
    bench.run(first, second)
    bench.run(second)
    assert not bench.early.give_up()


def test_out_of_memory_while_encoding_early_ends_it(
    bench: Bench, lane: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = bench.order(bench.planned(2))
    expected = alone(bench, *second.tasks)
    with monkeypatch.context() as patch:
        patch.setattr(early, "pieces", raising(OutOfMemory("no room")))
        bench.run(bench.order(bench.planned(1)), second)
    assert bench.runner.notes() == (f"{ENDED} no room",)
    assert same(bench.run(second, second), expected)
    assert lane.launched.count("beside") == 1


@pytest.mark.parametrize("why", ["another model", "adapters change text", "the CPU"])
def test_nothing_is_done_early_where_it_does_not_pay(
    bench: Bench, lane: Recording, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    first, following = bench.order(bench.planned(1)), bench.order(bench.planned(2))
    if why == "another model":
        following = order_of(*following.tasks, model=ModelSpec(name="other", folder=""), batch=2)
    elif why == "adapters change text":
        bench.on(lane, monkeypatch, pays=False)
    else:
        lane = Recording()
        lane.overlaps = False
        bench.on(lane, monkeypatch)
    wanted = []
    for result in bench.runner.run(first, lambda *beat: wanted.append(bench.runner.wants_next)):
        result.landed()
    assert any(wanted) is (why == "another model")
    bench.runner.follow(following)
    assert bench.early._next is None


def test_the_next_order_is_wanted_in_the_last_steps_alone(bench: Bench, lane: Recording) -> None:
    """Before that another worker may be free for it first."""
    wanted: list[bool] = []
    for result in bench.runner.run(
        bench.order(bench.planned(1, steps=7)), lambda *beat: wanted.append(bench.runner.wants_next)
    ):
        result.landed()
    assert wanted == [False] * 3 + [True] * 5 + [True]


def test_a_task_s_pictures_are_prepared_and_looked_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative prompt speaks of the same pictures as the prompt."""
    pipe = bench.runner._pipe
    model, prepared, looked = pipe.text_encoder.model, [], []
    usual, features = type(pipe.processor.image_processor), type(model).get_image_features
    prepare = usual.__call__

    def count(self: Any, *arguments: Any, **named: Any) -> Any:
        prepared.append(1)
        return prepare(self, *arguments, **named)

    def look(self: Any, *arguments: Any, **named: Any) -> Any:
        looked.append(1)
        return features(self, *arguments, **named)

    expected = alone(bench, bench.planned(1), bench.planned(2))
    monkeypatch.setattr(usual, "__call__", count)
    monkeypatch.setattr(type(model), "get_image_features", look)
    assert same(bench.run(bench.order(bench.planned(1), bench.planned(2))), expected)
    assert (len(prepared), len(looked)) == (2, 2)
    assert "get_image_features" not in vars(model)
    assert type(pipe.processor.image_processor) is usual
