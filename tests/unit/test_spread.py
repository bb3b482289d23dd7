"""GPUs put together for a model that none of them takes alone."""

from __future__ import annotations

import pytest

from imagemill import crew, devices, models
from imagemill.config import Settings
from imagemill.devices import GIB, Gpu
from imagemill.records import ModelSpec
from imagemill.spread import spread

NEED = 150 * GIB


def gpu(index: int, free: float = 80, fault: str = "") -> Gpu:
    return Gpu(index, f"GPU-{index}", "H100", 80 * GIB, int(free * GIB), "580", fault)


EIGHT = [gpu(index) for index in range(8)]


def test_a_model_that_one_gpu_takes_is_not_spread() -> None:
    assert spread([gpu(0, 10), gpu(1, 80)], 80 * GIB) is None


def test_as_few_gpus_as_hold_it_make_a_device_and_each_worker_sees_its_own() -> None:
    choice = spread(EIGHT, NEED)
    assert choice is not None
    assert [device.label for device in choice.devices] == ["GPU 0+1+2", "GPU 3+4+5"]
    assert [device.torch_device for device in choice.devices] == ["cuda", "cuda"]
    assert choice.devices[1].environment["CUDA_VISIBLE_DEVICES"] == "GPU-3,GPU-4,GPU-5"
    assert [line.partition(":")[0] for line in choice.left_out] == ["GPU 6", "GPU 7"]


@pytest.mark.parametrize(("workers", "tasks", "count"), [(1, None, 1), (None, 1, 1), (5, 99, 2)])
def test_no_more_devices_than_workers_or_tasks_are_made(workers: int | None, tasks: int | None, count: int) -> None:
    choice = spread(EIGHT, NEED, workers, tasks)
    assert choice is not None
    assert len(choice.devices) == count


def test_a_broken_gpu_is_left_out_and_too_few_are_none() -> None:
    choice = spread([gpu(0, fault="lost"), *EIGHT[1:4]], NEED)
    assert choice is not None
    assert [device.label for device in choice.devices] == ["GPU 1+2+3"]
    assert choice.left_out == ("GPU 0: lost",)
    assert spread(EIGHT[:2], NEED) is None


def model(runner: str, memory: int) -> models.Model:
    spec = ModelSpec("judge:vlm:x", "/x", runner, "judge", memory=memory)
    return models._model(spec, models.family("judge"), None)


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: tuple(EIGHT[:4]))
    monkeypatch.setattr(devices, "torch_cuda", lambda: "13.0")


@pytest.mark.usefixtures("four")
def test_a_large_judge_gets_several_gpus_in_a_process_of_its_own() -> None:
    settings = Settings(model="x", devices={"gpus": 3})
    choice = crew.choose(settings, [model("judge_vlm", NEED)], None)
    assert [device.label for device in choice.devices] == ["GPU 0+1+2"]
    assert choice.devices[0].inline_device == ""
    chosen = crew.choose(Settings(model="x", devices={"gpu_ids": [3, 1, 0]}), [model("judge_vlm", NEED)], None)
    assert [device.label for device in chosen.devices] == ["GPU 3+1+0"]


@pytest.mark.usefixtures("four")
def test_a_small_judge_gets_a_gpu_a_worker() -> None:
    choice = crew.choose(Settings(model="x"), [model("judge_vlm", 20 * GIB)], None)
    assert [device.label for device in choice.devices] == ["GPU 0", "GPU 1", "GPU 2", "GPU 3"]
