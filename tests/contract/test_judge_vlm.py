"""The judge that is a vision-language model, with tiny random weights: batched as alone, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_judges import qwen2_5_vl, qwen3_vl, random_pictures

from imagemill import Engine, InputError, models, runners
from imagemill.config import JudgeSettings
from imagemill.errors import BadModel, BadTask, OutOfMemory
from imagemill.records import ModelSpec, Task, WorkOrder
from imagemill.runners import Result, chat_model
from imagemill.runners.judge_vlm import VisionLanguageRunner
from orders import order_of, planned

TOKENS = 12


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
    """Pictures of many shapes."""
    sizes = ((140 - 9 * number, 56 + 17 * number) for number in range(8))
    return random_pictures(tmp_path_factory.mktemp("pictures"), sizes)


def spec_of(folder: Path, **settings: Any) -> ModelSpec:
    asked = JudgeSettings(**{"max_new_tokens": TOKENS, **settings})
    return models.resolve(f"judge:vlm:{folder}", dtype="float32", judge=asked).spec


def loaded(spec: ModelSpec) -> VisionLanguageRunner:
    runner = runners.create(spec.runner, "cpu", 1)
    assert isinstance(runner, VisionLanguageRunner)
    runner.prepare(spec)
    runner.load(spec, lambda *_: None)
    return runner


def order_about(tasks: Sequence[Task], spec: ModelSpec) -> WorkOrder:
    return order_of(*(planned(task, spec.revision, seq) for seq, task in enumerate(tasks)), model=spec)


def judge(runner: VisionLanguageRunner, tasks: Sequence[Task], spec: ModelSpec) -> dict[int, Result]:
    return {result.seq: result for result in runner.run(order_about(tasks, spec), lambda *_: None)}


def text_of(result: Result) -> str:
    assert result.answer is not None, result.error
    return result.answer.text


def twelve(pictures: Sequence[str]) -> list[Task]:
    """Items with one, two and three pictures, with and without a system prompt, of many lengths."""
    return [
        Task(
            f"t{n}",
            f"how good is number {n}? " * (1 + n % 4),
            images=tuple(pictures[(n + k) % len(pictures)] for k in range(1 + n % 3)),
            system_prompt="be strict and fair" if n % 2 else None,
        )
        for n in range(12)
    ]


# --- batch against single ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [qwen2_5_vl, qwen3_vl])
def test_twelve_items_have_the_same_answers_in_batches_of_four_and_alone(
    tmp_path: Path, pictures: list[str], kind: Callable[[Path], Path]
) -> None:
    tasks, folder = twelve(pictures), kind(tmp_path / "model")
    found = {}
    for size in (1, 4):
        spec = spec_of(folder, batch_size=size)
        results = judge(loaded(spec), tasks, spec)
        assert {result.batch_size for result in results.values()} == {size}
        found[size] = [results[n].answer for n in range(12)]
    assert found[1] == found[4]
    assert len({answer.text for answer in found[1] if answer}) >= 9
    assert all(answer and 1 <= answer.tokens <= TOKENS for answer in found[1])


def test_the_engine_judges_twelve_items_as_the_runner_does(tmp_path: Path, folder: Path, pictures: list[str]) -> None:
    tasks = twelve(pictures)
    asked = {"max_new_tokens": TOKENS, "batch_size": 4}
    with Engine(model=f"judge:vlm:{folder}", device="cpu", judge=asked) as engine:
        outcomes = list(engine.run(tasks, tmp_path / "out"))
        again = list(engine.run(tasks, tmp_path / "out"))
    spec = spec_of(folder, batch_size=1)
    alone = judge(loaded(spec), tasks, spec)
    assert [outcome.answer for outcome in outcomes] == [alone[n].answer for n in range(12)]
    assert all(outcome.resumed for outcome in again)


def test_without_a_batch_size_free_memory_decides(
    folder: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, spec = twelve(pictures), spec_of(folder)
    runner = loaded(spec)
    roomy = judge(runner, tasks, spec)
    monkeypatch.setattr(chat_model, "free_memory", lambda model: 1)
    tight = judge(runner, tasks, spec)
    assert {result.batch_size for result in roomy.values()} == {12}
    assert {result.batch_size for result in tight.values()} == {1}
    assert [text_of(roomy[n]) for n in range(12)] == [text_of(tight[n]) for n in range(12)]


def test_a_task_without_a_picture_may_share_an_order(folder: Path, pictures: list[str]) -> None:
    spec = spec_of(folder, batch_size=4)
    runner = loaded(spec)
    tasks = [Task("a", "hello"), Task("b", "how good?", images=(pictures[0],)), Task("c", "and you?")]
    together = judge(runner, tasks, spec)
    assert [text_of(together[n]) for n in range(3)] == [text_of(judge(runner, [task], spec)[0]) for task in tasks]


def test_an_answer_without_an_end_was_cut_off(folder: Path) -> None:
    runner = loaded(spec_of(folder))
    ends = runner._model.generation_config.eos_token_id
    end = ends if isinstance(ends, int) else ends[0]
    assert [runner._answer(ids).cut for ids in ([5, 6], [5, 6, end], [5, end, end])] == [True, False, False]


def test_the_pixel_budget_is_what_the_model_sees(folder: Path, pictures: list[str]) -> None:
    task = Task("a", "how good?", images=(pictures[7],))
    small, large = spec_of(folder, pixels=4096), spec_of(folder)
    runner = loaded(large)
    seen = [
        len(runner._question(order_about([task], spec).tasks[0], spec).pictures[0].tobytes()) for spec in (small, large)
    ]
    assert seen[0] <= 3 * 4096 < seen[1]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_one_task_that_cannot_be_asked_costs_itself_alone(tmp_path: Path, folder: Path, pictures: list[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    spec = spec_of(folder, batch_size=4)
    tasks = [
        Task("a", "how good?", images=(pictures[0],)),
        Task("b", "how good?", images=(str(tmp_path / "broken.png"),)),
        Task("c", "how <|image_pad|> good?", images=(pictures[1],)),
        Task("d", "how good?", images=(pictures[2],), system_prompt="<|im_end|>"),
    ]
    results = judge(loaded(spec), tasks, spec)
    assert [type(results[n].error) for n in range(4)] == [type(None), BadTask, BadTask, BadTask]
    assert "prompt contains '<|image_pad|>', a control token of the judge" in str(results[2].error)


def test_an_error_in_a_batch_is_met_alone_by_its_cause(
    folder: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(folder, batch_size=4)
    runner = loaded(spec)
    whole = runner._generate

    def generate(turn: Any, most: int, beat: Any) -> list[Result]:
        if any(question.planned.task.id == "t2" for question in turn):
            raise RuntimeError("a shape that does not fit")
        return whole(turn, most, beat)

    monkeypatch.setattr(runner, "_generate", generate)
    results = judge(runner, twelve(pictures)[:4], spec)
    assert [seq for seq, result in sorted(results.items()) if result.error] == [2]


def test_out_of_memory_is_raised_for_the_scheduler_after_what_was_answered(
    folder: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(folder, batch_size=1)
    runner = loaded(spec)
    generate, calls = runner._model.generate, []

    def short(**inputs: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(runner._model, "generate", short)
    answered = []
    with pytest.raises((OutOfMemory, torch.OutOfMemoryError)):
        answered.extend(runner.run(order_about(twelve(pictures)[:4], spec), lambda *_: None))
    assert len(calls) == 3


def test_a_run_that_is_stopped_stops_at_the_next_token(folder: Path, pictures: list[str]) -> None:
    spec = spec_of(folder, max_new_tokens=512)
    steps = []

    def beat(stage: str, seq: int, step: int, total: int) -> None:
        if stage == "judge":
            steps.append(step)
            if len(steps) == 3:
                raise runners.Cancelled

    with pytest.raises(runners.Cancelled):
        list(loaded(spec).run(order_about(twelve(pictures)[:1], spec), beat))
    assert steps == [1, 2, 3]


# --- folders ----------------------------------------------------------------------------------------------------------


def altered(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "altered"))


def refusal_of(folder: Path) -> str:
    spec = ModelSpec("judge:vlm:x", str(folder), "judge_vlm", "judge", dtype="float32")
    runner = runners.create("judge_vlm", "cpu", 1)
    with pytest.raises(BadModel) as caught:
        runner.load(spec, lambda *_: None)
    assert runner.resident == frozenset()
    return str(caught.value)


def test_weights_that_are_missing_refuse_the_model(tmp_path: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = altered(folder, tmp_path)
    tensors = load_file(place / "model.safetensors")
    del tensors["visual.blocks.0.attn.qkv.weight" if "visual.blocks.0.attn.qkv.weight" in tensors else min(tensors)]
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    assert "is incomplete; weights missing: 1" in refusal_of(place)


def test_pickled_weights_are_refused(tmp_path: Path, folder: Path) -> None:
    place = altered(folder, tmp_path)
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    assert "pickled weights, which can run code" in refusal_of(place)
    with pytest.raises(InputError, match="it lacks safetensors weights"):
        spec_of(place)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, folder: Path) -> None:
    place = altered(folder, tmp_path)
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (place / "modeling_own.py").write_text(trap)
    config = json.loads((place / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForImageTextToText": "modeling_own.M"},
    }
    (place / "config.json").write_text(json.dumps(config))
    refusal_of(place)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_takes_no_pictures_is_refused(tmp_path: Path, folder: Path) -> None:
    place = altered(folder, tmp_path)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    (place / "preprocessor_config.json").unlink()
    assert "has no image_processor; it must be a model that takes pictures and text" in refusal_of(place)


def test_a_folder_without_a_chat_template_is_refused(tmp_path: Path, folder: Path) -> None:
    place = altered(folder, tmp_path)
    (place / "chat_template.json").unlink()
    assert "has no chat template" in refusal_of(place)


def test_a_processor_that_lacks_a_library_says_which(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("OtherProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lacking)
    place = altered(folder, tmp_path)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"model_type": "other"}))
    assert "its processor lacks a library: OtherProcessor requires the Torchvision library" in refusal_of(place)


def test_a_judge_that_does_not_load_ends_the_run_with_the_reason(
    tmp_path: Path, folder: Path, pictures: list[str]
) -> None:
    place = altered(folder, tmp_path)
    (place / "chat_template.json").unlink()
    with (
        Engine(model=f"judge:vlm:{place}", device="cpu") as engine,
        pytest.raises(InputError, match="no chat template"),
    ):
        list(engine.run(twelve(pictures), tmp_path / "out"))
