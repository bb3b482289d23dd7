"""How the vision-language judge keeps a device busy: what it prepares apart, what it asks ahead, what it tells of its stages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_judges import qwen2_5_vl, qwen3_vl, random_pictures

from imagemill import models, runners
from imagemill.config import JudgeSettings
from imagemill.errors import BadTask, OutOfMemory
from imagemill.records import (
    BatchEnded,
    BatchMade,
    Event,
    ModelSpec,
    PlannedTask,
    Task,
    WorkerSpec,
    WorkOrder,
)
from imagemill.runners import Result, judge_vlm, vision_inputs, vision_windows
from imagemill.runners.judge_vlm import VisionLanguageRunner
from imagemill.worker import Worker
from orders import order_of, planned

CPU = torch.device("cpu")
SIZES = [(56, 140), (300, 90), (73, 131), (448, 448), (30, 33)]
TIMEOUT = 30.0


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen2_5_vl(tmp_path_factory.mktemp("judge") / "model")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return random_pictures(tmp_path_factory.mktemp("pictures"), SIZES)


def spec_of(folder: Path, **settings: Any) -> ModelSpec:
    asked = JudgeSettings(**{"max_new_tokens": 6, **settings})
    return models.resolve(f"judge:vlm:{folder}", dtype="float32", judge=asked).spec


@pytest.fixture
def start() -> Iterator[Callable[..., VisionLanguageRunner]]:
    """Loads a runner, and ends its threads after the test."""
    begun = []

    def load(spec: ModelSpec, *, ahead: bool) -> VisionLanguageRunner:
        runner = VisionLanguageRunner("cpu", ahead=ahead)
        begun.append(runner)
        runner.load(spec, lambda *_: None)
        return runner

    yield load
    for runner in begun:
        runner.unload()


def order_about(spec: ModelSpec, pictures: list[str], *numbers: int) -> WorkOrder:
    members = []
    for seq in numbers:
        task = Task(
            f"t{seq}",
            f"how good is number {seq}? " * (1 + seq % 3),
            images=tuple(pictures[(seq + k) % len(pictures)] for k in range(1 + seq % 2)),
            system_prompt="be strict" if seq % 2 else None,
        )
        members.append(planned(task, spec.revision, seq))
    return order_of(*members, model=spec, batch=numbers[0])


def fault_of(result: Result) -> Exception | None:
    """What went wrong with a result that was on its way."""
    try:
        return result.landed().error
    except Exception as error:
        return error


def answers(results: list[Result]) -> dict[int, Any]:
    return {result.seq: result.landed().answer for result in results}


# --- preparation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [qwen2_5_vl, qwen3_vl])
@pytest.mark.parametrize("as_bytes", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_made_apart_are_those_of_one_call_of_the_processor(
    tmp_path: Path,
    pictures: list[str],
    start: Callable[..., VisionLanguageRunner],
    kind: Callable[[Path], Path],
    as_bytes: bool,
    dtype: torch.dtype,
) -> None:
    spec = spec_of(kind(tmp_path / "model"))
    runner = start(spec, ahead=False)
    made = vision_inputs.inputs_by(runner._processor, as_bytes=as_bytes)
    assert made.apart
    assert (made.values is not None) == as_bytes
    order = order_about(spec, pictures, *range(6))
    runner._inputs = vision_inputs.Inputs(runner._processor)
    questions = [runner._question(planned, spec) for planned in order.tasks]
    parts = [made.own(question.text, question.pictures, dtype) for question in questions]
    joined = made.join(parts, CPU, dtype)
    whole = made.whole([question.text for question in questions], [q.pictures for q in questions], CPU, dtype)
    assert {part["pixel_values"].dtype for part in parts} == {torch.uint8 if as_bytes else dtype}
    assert joined.keys() == dict(whole).keys()
    for name, tensor in joined.items():
        assert tensor.dtype == whole[name].dtype, name
        assert torch.equal(tensor, whole[name]), name


def test_pictures_whose_numbers_hang_on_more_than_the_level_are_not_sent_as_bytes(
    folder: Path, start: Callable[..., VisionLanguageRunner]
) -> None:
    pictures = start(spec_of(folder), ahead=False)._processor.image_processor

    def dimmed(**how: Any) -> Any:
        made = pictures(**how)
        if "do_rescale" not in how:
            made["pixel_values"] = made["pixel_values"] * torch.linspace(0.5, 1, len(made["pixel_values"]))[:, None]
        return made

    assert vision_inputs.values_of(pictures, 112) is not None
    assert vision_inputs.values_of(dimmed, 112) is None


def test_answers_are_the_same_for_a_processor_that_takes_only_whole_batches(
    folder: Path, pictures: list[str], start: Callable[..., VisionLanguageRunner]
) -> None:
    spec = spec_of(folder, batch_size=3)
    runner, order = start(spec, ahead=False), order_about(spec, pictures, *range(6))
    apart = answers(list(runner.run(order, lambda *_: None)))
    runner._inputs = vision_inputs.Inputs(runner._processor)
    assert answers(list(runner.run(order, lambda *_: None))) == apart
    runner._inputs = vision_inputs.inputs_by(runner._processor, as_bytes=True)
    assert answers(list(runner.run(order, lambda *_: None))) == apart


def test_tasks_are_prepared_on_several_threads(
    folder: Path, pictures: list[str], start: Callable[..., VisionLanguageRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_vlm.devices, "processors", lambda: 3)
    spec = spec_of(folder)
    runner, meeting = start(spec, ahead=False), threading.Barrier(3)
    question = runner._question

    def wait_for_others(planned: PlannedTask, model: ModelSpec) -> Any:
        meeting.wait(TIMEOUT)
        return question(planned, model)

    monkeypatch.setattr(runner, "_question", wait_for_others)
    found = list(runner.run(order_about(spec, pictures, 0, 1, 2), lambda *_: None))
    assert [result.error for result in found] == [None] * 3


# --- windows ----------------------------------------------------------------------------------------------------------


def test_windows_of_one_length_are_attended_to_in_one_call_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[1]
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model, calls = Qwen2_5_VisionTransformerPretrainedModel(config).eval(), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(*parts: Any, **how: Any) -> torch.Tensor:
        calls.append(1)
        return attend(*parts, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    # Windows are 8 patches wide: pictures of whole windows, of torn ones, and one smaller than a window.
    grid = torch.tensor([[1, 16, 16], [1, 18, 30], [1, 4, 6], [1, 16, 16]])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14)
    found = []
    with torch.inference_mode():
        found.append(model(patches, grid).pooler_output)
        alone = len(calls)
        assert vision_windows.join_windows(model) == 3
        calls.clear()
        found.append(model(patches, grid).pooler_output)
        together = len(calls)
        found.append(model(patches.flip(0), grid.flip(0)).pooler_output)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert alone == 2 * (4 + 12 + 1 + 4) + 4
    assert together == 2 * 5 + 3  # 8x8, 8x6, 2x8, 2x6, 4x6 patches; 16x16 twice, 18x30, 4x6


def test_attention_that_is_not_torchs_own_stays_as_it_is(
    folder: Path, start: Callable[..., VisionLanguageRunner]
) -> None:
    model = start(spec_of(folder), ahead=False)._model
    assert model.model.visual.config._attn_implementation == vision_windows.NAME
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    model.model.visual.config._attn_implementation = "eager"
    assert vision_windows.join_windows(model) == 0


# --- ahead ------------------------------------------------------------------------------------------------------------


def test_the_next_order_is_prepared_while_the_one_before_is_asked(
    folder: Path, pictures: list[str], start: Callable[..., VisionLanguageRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(folder, batch_size=2)
    runner = start(spec, ahead=True)
    ready, generate, asked = threading.Event(), runner._model.generate, []

    def wait_for_the_next(**inputs: Any) -> Any:
        asked.append(len(inputs["input_ids"]))
        assert ready.wait(TIMEOUT), "nothing was prepared while the device was busy"
        return generate(**inputs)

    monkeypatch.setattr(runner._model, "generate", wait_for_the_next)
    first = list(runner.run(order_about(spec, pictures, 0, 1, 2), lambda *_: None))
    assert all(result.arrive is not None for result in first)
    coming = runner.run(order_about(spec, pictures, 3, 4), lambda *_: None)
    second = [next(coming), next(coming)]
    assert asked == [2], "the first order is still with the device"
    ready.set()
    assert list(coming) == []
    landed = [result.landed() for result in first + second]
    alone = start(spec, ahead=False)
    held = list(alone.run(order_about(spec, pictures, 0, 1, 2, 3, 4), lambda *_: None))
    assert answers(landed) == answers(held)
    assert sorted(result.batch_size for result in landed) == [1, 2, 2, 2, 2]


def test_run_ends_when_the_order_before_is_answered(
    folder: Path, pictures: list[str], start: Callable[..., VisionLanguageRunner]
) -> None:
    spec = spec_of(folder)
    runner = start(spec, ahead=True)
    first = list(runner.run(order_about(spec, pictures, 0), lambda *_: None))
    before = runner._flying
    list(runner.run(order_about(spec, pictures, 1), lambda *_: None))
    assert before is not None
    assert before.done()
    assert first[0].landed().answer


def test_out_of_memory_ahead_costs_what_is_left_of_its_order_and_no_other(
    folder: Path, pictures: list[str], start: Callable[..., VisionLanguageRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(folder, batch_size=1)
    runner = start(spec, ahead=True)
    generate, calls = runner._model.generate, []

    def short(**inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(runner._model, "generate", short)
    first = list(runner.run(order_about(spec, pictures, 0, 1, 2), lambda *_: None))
    second = list(runner.run(order_about(spec, pictures, 3), lambda *_: None))
    faults = [fault for fault in map(fault_of, first) if fault is not None]
    assert [type(fault) for fault in faults] == [OutOfMemory] * 2
    assert {fault.__context__ for fault in faults} == {None}, "it would keep what the batch had on the device"
    assert second[0].landed().answer
    assert len(calls) == 3


def test_a_task_that_cannot_be_asked_is_told_at_once(
    tmp_path: Path, folder: Path, pictures: list[str], start: Callable[..., VisionLanguageRunner]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    spec = spec_of(folder)
    runner = start(spec, ahead=True)
    found = list(runner.run(order_about(spec, [*pictures[:1], str(tmp_path / "broken.png")], 0, 1), lambda *_: None))
    assert [type(result.error) for result in sorted(found, key=lambda result: result.seq)] == [type(None), BadTask]


def test_a_run_that_is_stopped_stops_the_thread_that_asks(
    folder: Path, pictures: list[str], start: Callable[..., VisionLanguageRunner]
) -> None:
    spec = spec_of(folder, max_new_tokens=512)
    runner, steps = start(spec, ahead=True), []

    def beat(stage: str, seq: int, step: int, total: int) -> None:
        if stage == "judge":
            steps.append(step)
            if len(steps) == 2:
                raise runners.Cancelled

    (result,) = runner.run(order_about(spec, pictures, 0), beat)
    with pytest.raises(runners.Cancelled):
        result.landed()
    assert steps == [1, 2]


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [True, False])
def test_stages_are_told_once_a_turn_and_preparation_once_a_task(
    folder: Path, pictures: list[str], start: Callable[..., VisionLanguageRunner], ahead: bool
) -> None:
    spec = spec_of(folder, batch_size=2)
    found = list(start(spec, ahead=ahead).run(order_about(spec, pictures, 0, 1, 2, 3), lambda *_: None))
    landed = [result.landed() for result in found]
    spans = [span for result in landed for span in result.spans]
    names = [span.stage for span in spans]
    assert {name: names.count(name) for name in names} == {"prepare": 4, "prefill": 2, "generate": 2}
    assert {span.stage for span in spans if not span.on_device} == {"prepare"}
    for result in landed:
        assert result.seconds.keys() == {"prepare", "judge"}
        turn = {span.stage: span for span in result.spans}
        if "prefill" in turn:
            begun, read = turn["prefill"], turn["generate"]
            assert begun.start + begun.seconds == pytest.approx(read.start)
            assert result.seconds["judge"] == pytest.approx((begun.seconds + read.seconds) / 2)


def test_a_worker_takes_the_next_order_while_answers_are_on_their_way(
    folder: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, events = spec_of(folder), list[Event]()
    monkeypatch.setattr(judge_vlm, "create", lambda device, threads: VisionLanguageRunner(device, threads, ahead=True))
    monkeypatch.setattr(VisionLanguageRunner, "memory", _steep)
    worker = Worker(WorkerSpec(0, "cpu", "CPU 0", spec, ahead=True), events.append, lambda: None)
    assert worker.load()
    for numbers in ((0, 1), (2, 3)):
        worker.work(order_about(spec, pictures, *numbers))
    worker.close()
    ended = [event for event in events if isinstance(event, BatchEnded)]
    assert [event.batch for event in events if isinstance(event, BatchMade)][:1] == [0]
    assert [len(event.receipts) for event in ended] == [2, 2]
    assert [event.failures for event in ended] == [(), ()]
    assert {receipt.peak_memory for event in ended for receipt in event.receipts} == {7}


def _steep(self: VisionLanguageRunner) -> tuple[int, int]:
    """Seven bytes while answering, three else."""
    answering = threading.current_thread().name.startswith("imagemill-judge")
    peak = 7 if answering else 3
    self._peak = max(self._peak, peak)
    return 1, peak
