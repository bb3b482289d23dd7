"""What a judge's name means, what its revision hangs on, and how it is asked."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imagemill import crew, judges, models
from imagemill.config import JudgeSettings, Settings, merge
from imagemill.errors import ConfigError, InputError
from imagemill.records import ModelSpec

URL = "http://localhost:8000/v1"


def spec(name: str, dtype: str = "float32", **settings: Any) -> ModelSpec:
    return models.resolve(name, dtype=dtype, judge=JudgeSettings(**{"base_url": URL, **settings})).spec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a vision-language model's folder looks like from outside."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "README.md").write_text("read by people alone")
    return made


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "runner"),
    [
        ("judge:reference", "judge_reference"),
        ("judge:preservation", "judge_preservation"),
        ("judge:openai:org/model:tag", "judge_openai"),
        ("judge:fake", "fake"),
    ],
)
def test_a_judge_is_known_by_its_name(name: str, runner: str) -> None:
    found = models.resolve(name, judge=JudgeSettings(base_url=URL))
    assert (found.spec.name, found.spec.runner, found.spec.family) == (name, runner, "judge")
    assert found.planned.family.name == "judge"
    assert found.planned.revision == found.spec.revision


@pytest.mark.parametrize(
    "name", ["judge:", "judge:nope", "judge:openai", "judge:openai:", "judge:vlm:", "judge:reference:x", "judge:fake:"]
)
def test_an_unknown_judge_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match="is no judge; known: judge:reference, judge:preservation, judge:vlm:FOLDER"):
        spec(name)


def test_a_judge_behind_an_endpoint_wants_its_address() -> None:
    with pytest.raises(InputError, match=r"give judge.base_url, such as http://localhost:8000/v1"):
        spec("judge:openai:m", base_url=None)


def test_a_folder_is_a_judge(folder: Path) -> None:
    found = spec(f"judge:vlm:{folder}")
    assert (found.runner, found.folder, found.dtype) == ("judge_vlm", str(folder), "float32")
    assert found.memory > 2**31


@pytest.mark.parametrize(
    ("gone", "lack"),
    [("config.json", "it lacks config.json"), ("model.safetensors", "it lacks safetensors weights")],
)
def test_an_incomplete_folder_is_refused(folder: Path, gone: str, lack: str) -> None:
    (folder / gone).unlink()
    with pytest.raises(InputError, match=lack):
        spec(f"judge:vlm:{folder}")


def test_a_folder_that_lacks_a_shard_its_index_names_is_refused(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"it lacks model-2\.safetensors"):
        spec(f"judge:vlm:{folder}")


def test_a_folder_that_is_not_there_is_refused_without_a_look_at_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        spec(f"judge:vlm:{tmp_path / 'nope'}")


# --- revisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["judge:fake", "judge:openai:m", "judge:vlm"])
def test_pixels_and_tokens_make_another_judge_and_how_many_are_asked_at_once_does_not(name: str, folder: Path) -> None:
    name = f"judge:vlm:{folder}" if name == "judge:vlm" else name
    own = spec(name).revision
    others = [spec(name, pixels=4096), spec(name, max_new_tokens=5)]
    assert len({own, *(other.revision for other in others)}) == 3
    same = [{"batch_size": 4}, {"concurrency": 3}, {"timeout": 5.0}, {"api_key_env": "KEY"}, {"base_url": URL + "x"}]
    assert {spec(name, **settings).revision for settings in same} == {own}


def test_another_model_behind_the_endpoint_is_another_judge() -> None:
    assert spec("judge:openai:a").revision != spec("judge:openai:b").revision


def test_weights_and_precision_make_another_judge_and_the_folders_place_does_not(folder: Path) -> None:
    own = spec(f"judge:vlm:{folder}").revision
    assert spec(f"judge:vlm:{folder}", dtype="bfloat16").revision != own
    (folder / "README.md").write_text("changed")
    moved = folder.rename(folder.with_name("moved"))
    assert spec(f"judge:vlm:{moved}").revision == own
    (moved / "model.safetensors").write_bytes(b"trained")
    assert spec(f"judge:vlm:{moved}").revision != own


@pytest.mark.parametrize("name", ["judge:reference", "judge:preservation"])
def test_a_judge_without_a_model_is_the_same_whatever_the_settings_and_the_precision(name: str) -> None:
    assert spec(name, dtype="bfloat16", pixels=4096).revision == spec(name).revision


# --- how it is asked --------------------------------------------------------------------------------------------------


def test_how_many_tasks_a_worker_is_handed_follows_the_kind_of_judge(folder: Path) -> None:
    def batch(name: str, **settings: Any) -> int:
        return judges.batch(spec(name, **settings), JudgeSettings(**settings))

    assert batch(f"judge:vlm:{folder}") == 16
    assert batch(f"judge:vlm:{folder}", batch_size=3) == 3
    assert batch("judge:openai:m", concurrency=5) == 10
    assert batch("judge:fake") == 1


@pytest.mark.parametrize(
    ("workers", "tasks", "size"), [(1, 24, 24), (1, 500, 64), (1, None, 64), (2, 24, 6), (8, 2000, 64), (8, None, 16)]
)
def test_on_gpus_a_worker_is_handed_its_part_of_the_tasks_up_to_a_bound(
    folder: Path, workers: int, tasks: int | None, size: int
) -> None:
    asked, part = spec(f"judge:vlm:{folder}"), crew.share(workers, tasks)
    assert judges.batch(asked, JudgeSettings(), True, part) == size
    assert judges.batch(asked, JudgeSettings(batch_size=3), True, part) == 3
    assert judges.batch(asked, JudgeSettings(), False, part) == 16


@pytest.mark.parametrize(
    ("name", "workers"), [("judge:reference", 3), ("judge:preservation", 3), ("judge:openai:m", 1), ("judge:fake", 3)]
)
def test_judges_that_need_no_gpu_work_on_the_cpu_and_one_worker_asks_an_endpoint(name: str, workers: int) -> None:
    settings = Settings(model=name, devices={"device": "cpu", "workers": 3}, judge={"base_url": URL})
    found = crew.find_models(settings).get(None)
    assert [device.torch_device for device in crew.choose(settings, [found], None).devices] == ["cpu"] * workers


def test_gpus_that_are_asked_for_do_not_matter_to_a_judge_that_needs_none() -> None:
    settings = Settings(model="judge:reference", devices={"gpus": 4})
    found = models.resolve("judge:reference")
    assert [device.label for device in crew.choose(settings, [found], None).devices] == ["CPU 0"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("judge.base_url", "localhost:8000", "is no address; write such as http://localhost:8000/v1"),
        ("judge.base_url", "http://me:secret@host/v1", "a key belongs into the variable of api_key_env"),
        ("judge.base_url", "http://host/v1?key=secret", "a key belongs into the variable of api_key_env"),
        ("judge.api_key_env", "sk-secret", "judge.api_key_env: is no name of an environment variable"),
        ("judge.api_key_env", "gsk_secret", "judge.api_key_env: is no name of an environment variable"),
        ("judge.pixels", 10, "judge.pixels"),
        ("judge.nope", 1, "judge.nope: is not a known key"),
    ],
)
def test_a_mistake_in_the_settings_is_told_without_a_secret(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        merge(Settings(), {key: value})
    assert "secret" not in str(caught.value)


def test_options_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1234567890")
    assert "sk-1234567890" not in repr(spec("judge:openai:m"))
    assert replace(spec("judge:openai:m"), name="x").options["api_key_env"] == "OPENAI_API_KEY"


def test_an_endpoint_that_takes_no_connection_is_told_before_any_edit() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        spec = ModelSpec("judge:openai:m", "", "judge_openai", options={"base_url": address})
        with pytest.raises(InputError, match=f"{re.escape(address)} takes no connection"):
            judges.check_endpoint(spec)
        free.listen()
        judges.check_endpoint(spec)
    judges.check_endpoint(ModelSpec("judge:reference", "", "judge_reference"))
