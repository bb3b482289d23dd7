"""Settings: every key is known or refused, and an error names file, field, value and mend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.config import Schedule, Settings, load_settings, merge, parse_lora, parse_schedule, parse_size
from imagemill.errors import ConfigError
from imagemill.records import Lora

EVERYTHING = """
model: tiny
devices: {device: cuda, gpus: auto, gpu_ids: [0, 2], workers: 3, isolate: true}
size: 1024x768
steps: 8
guidance: 0
true_cfg_scale: 4.5
negative_prompt: ""
seed: 7
loras: [{path: a.safetensors, strength: 0.8}, "b.safetensors:0.5", /c.safetensors]
schedule: window:3
batch_size: 2
compile: on
precision: bf16
attention: _native_cudnn
dtype: bfloat16
preload: true
trace: true
output: {folder: pictures, format: webp, sink: none, metadata: false}
limits: {load_timeout: 60, task_timeout: 1.5, parallel_loads: 2, max_attempts: 5, read_ahead: 10}
logging: {level: debug, folder: null}
"""


def loaded(tmp_path: Path, text: str | bytes) -> Settings:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(path)


def refusal(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text)
    return str(caught.value).replace(str(tmp_path / "config.yaml"), "config.yaml")


def test_every_setting_arrives(tmp_path: Path) -> None:
    settings = loaded(tmp_path, EVERYTHING)
    assert settings.model == "tiny"
    assert settings.devices.model_dump() == {
        "device": "cuda", "gpus": "auto", "gpu_ids": (0, 2), "workers": 3, "isolate": True,
    }  # fmt: skip
    assert (settings.size, settings.steps, settings.guidance, settings.true_cfg_scale) == ((1024, 768), 8, 0.0, 4.5)
    assert (settings.negative_prompt, settings.seed, settings.batch_size) == ("", 7, 2)
    assert (settings.compile, settings.precision, settings.attention) == ("on", "bf16", "_native_cudnn")
    assert (settings.dtype, settings.preload, settings.trace, settings.exact) == ("bfloat16", True, True, False)
    assert settings.schedule == Schedule("window", 3)
    assert settings.output.model_dump() == {"folder": "pictures", "format": "webp", "sink": "none", "metadata": False}
    assert (settings.limits.task_timeout, settings.limits.max_attempts) == (1.5, 5)
    assert (settings.logging.level, settings.logging.folder) == ("debug", None)


def test_lora_paths_of_a_file_are_relative_to_its_folder(tmp_path: Path) -> None:
    assert loaded(tmp_path, EVERYTHING).loras == (
        Lora(str(tmp_path / "a.safetensors"), 0.8),
        Lora(str(tmp_path / "b.safetensors"), 0.5),
        Lora("/c.safetensors", 1.0),
    )


@pytest.mark.parametrize("text", ["", "# nothing\n", "\ufeff---\n"])
def test_an_empty_file_gives_the_defaults(tmp_path: Path, text: str) -> None:
    settings = loaded(tmp_path, text)
    assert settings == Settings()
    assert settings.model_fields_set == set()
    assert (settings.model, settings.devices.gpus, settings.schedule) == (None, "auto", Schedule("dynamic"))
    assert (settings.batch_size, settings.exact, settings.compile) == ("auto", False, "auto")
    assert (settings.precision, settings.attention, settings.preload, settings.trace) == ("bf16", "auto", False, False)
    assert settings.limits.model_dump() == {
        "load_timeout": 1800.0, "task_timeout": 600.0, "parallel_loads": "auto", "max_attempts": 3, "read_ahead": 1024,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "meant"),
    [("on", "on"), ("off", "off"), ("true", "on"), ("false", "off"), ("auto", "auto"), ("'on'", "on"), ("yes", "on")],
)
def test_compile_is_a_switch_however_yaml_reads_the_word(tmp_path: Path, text: str, meant: str) -> None:
    assert loaded(tmp_path, f"compile: {text}").compile == meant


def test_exact_goes_with_batches_of_one_and_with_auto(tmp_path: Path) -> None:
    assert loaded(tmp_path, "exact: true\nbatch_size: auto").exact
    assert loaded(tmp_path, "exact: true\nbatch_size: 1").exact


def test_python_says_compile_with_a_bool_and_none_leaves_it_alone() -> None:
    assert merge(Settings(), {"compile": True}).compile == "on"
    assert merge(Settings(compile="on"), {"compile": None}).compile == "on"
    with pytest.raises(ConfigError, match=r"^precision fp8 goes with dtype bfloat16, and dtype is float16"):
        merge(Settings(), {"precision": "fp8", "dtype": "float16"}, {"precision": "--precision"})


def test_guidance_scale_is_another_name_of_guidance(tmp_path: Path) -> None:
    assert loaded(tmp_path, "guidance_scale: 1.5").guidance == 1.5
    assert "another name of guidance" in refusal(tmp_path, "guidance_scale: 1.5\nguidance: 1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: {format: bmp}", "config.yaml: output.format: 'bmp' is not one of png, jpg, webp"),
        ("outptu: {}", "config.yaml: outptu: is not a known key; did you mean output?"),
        ("output: {fromat: png}", "config.yaml: output.fromat: is not a known key; did you mean output.format?"),
        ("format: png", "config.yaml: format: is not a known key; did you mean output.format?"),
        ("zzzz: 1", "config.yaml: zzzz: is not a known key; known here: model, devices, size"),
        ("1: 2", "config.yaml: 1: is not a known key"),
        ("steps: true", "config.yaml: steps: true is not a whole number"),
        ("steps: '8'", "config.yaml: steps: '8' is not a whole number"),
        ("steps: 0", "config.yaml: steps: 0 is out of range; it must be >= 1"),
        ("seed: -1", "config.yaml: seed: -1 is out of range; it must be >= 0"),
        ("seed: 9223372036854775808", "config.yaml: seed: 9223372036854775808 is out of range"),
        ("guidance: .nan", "config.yaml: guidance: nan is not a finite number"),
        ("limits: {task_timeout: .inf}", "config.yaml: limits.task_timeout: inf is not a finite number"),
        ("limits: {task_timeout: 0}", "config.yaml: limits.task_timeout: 0 is out of range; it must be > 0"),
        ("limits: 3", "config.yaml: limits: 3 is not an object"),
        ("output:", "config.yaml: output: null is not an object"),
        ("size: 1024", "config.yaml: size: 1024 is not a size; write WIDTHxHEIGHT, such as 1024x1024"),
        ("schedule: window:0", "config.yaml: schedule: 'window:0' is not one of dynamic, static, lockstep, window:K"),
        ("loras: [{path: a, strength: x}]", "config.yaml: loras[0].strength: 'x' is not a number"),
        ("loras: [{path: a, wieght: 1}]", "config.yaml: loras[0].wieght: is not a known key"),
        ("loras: ['a:nan']", "config.yaml: loras[0]: 'a:nan' has a strength that is not finite"),
        ("loras: ['https://x/y']", "config.yaml: loras: 'https://x/y' is a URL"),
        (
            "devices: {gpus: 0}",
            "config.yaml: devices.gpus: 0 is no number of GPUs; write auto or a whole number from 1",
        ),
        ("devices: {gpus: 2, gpu_ids: [0]}", "config.yaml: devices: gpus and gpu_ids are both given"),
        ("devices: {gpu_ids: [1, 1]}", "config.yaml: devices: gpu_ids names a GPU twice"),
        ("devices: {device: cpu, gpus: 2}", "config.yaml: devices: GPUs are named though device is cpu"),
        ("model: ''", "config.yaml: model: is empty"),
        ("batch_size: 0", "config.yaml: batch_size: 0 is no batch size; write auto or a whole number from 1 to 1024"),
        ("batch_size: true", "config.yaml: batch_size: true is no batch size"),
        (
            "limits: {parallel_loads: 0}",
            "config.yaml: limits.parallel_loads: 0 is no number of loads; write auto or a whole number from 1 to 4096",
        ),
        ("compile: maybe", "config.yaml: compile: 'maybe' is not one of auto, on, off"),
        ("precision: int4", "config.yaml: precision: 'int4' is not one of bf16, fp8"),
        (
            "attention: 3",
            "config.yaml: attention: 3 is no attention back end; write auto, or one of native, _native_cudnn",
        ),
        ("attention: flsh_3", "config.yaml: attention: 'flsh_3' is no attention back end; did you mean _flash_3?"),
        (
            "exact: true\nbatch_size: 4",
            "config.yaml: exact keeps batches of one, and batch_size is 4; keep one of them",
        ),
        ("exact: true\njudge: {batch_size: 2}", "config.yaml: exact keeps batches of one, and judge.batch_size is 2"),
        ("precision: fp8\ndtype: float32", "config.yaml: precision fp8 goes with dtype bfloat16, and dtype is float32"),
        (
            "precision: fp8\ndevices: {device: cpu}",
            "config.yaml: precision fp8 needs a GPU, and this run is on the CPU",
        ),
        ("steps: 1\nsteps: 2", "config.yaml, line 2, column 1: the key 'steps' is there twice; keep one of them"),
        ("output: {folder: a, folder: b}", "config.yaml, line 1, column 21: the key 'folder' is there twice"),
        ("steps: [", "config.yaml, line 1, column 9: "),
        ("- steps", "config.yaml: holds no settings"),
        (
            "steps: !!python/object/apply:os.getcwd []",
            "config.yaml, line 1, column 8: could not determine a constructor",
        ),
        ("? [a]\n: b", "config.yaml, line 1, column 3: found unhashable key"),
        ("\x01", "config.yaml: does not read as YAML"),
        ("[" * 5000, "config.yaml"),
        (b"a: \xff", "config.yaml, line 1: is not UTF-8"),
        (b"#" * (2**20 + 1), "config.yaml: is longer than"),
    ],
)
def test_a_mistake_is_named_by_file_field_and_mend(tmp_path: Path, text: str | bytes, message: str) -> None:
    found = refusal(tmp_path, text)
    assert found.startswith(message)
    assert "\n" not in found


def test_all_mistakes_are_told_one_a_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, "steps: x\noutput: {format: bmp}").splitlines() == [
        "config.yaml: steps: 'x' is not a whole number",
        "config.yaml: output.format: 'bmp' is not one of png, jpg, webp",
    ]


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_settings(tmp_path)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().steps = 3


# --- options above the file -------------------------------------------------------------------------------------------


def test_options_stand_above_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    settings = loaded(tmp_path, EVERYTHING)
    merged = merge(settings, {"output.format": "png", "steps": 4, "seed": None, "size": (64, 64), "schedule": "static"})
    assert (merged.output.format, merged.steps, merged.size, merged.schedule) == (
        "png",
        4,
        (64, 64),
        Schedule("static"),
    )
    assert (merged.seed, merged.output.folder, merged.loras) == (7, "pictures", settings.loras)
    assert merge(settings, {}) == settings


def test_merging_tells_what_was_given() -> None:
    merged = merge(Settings(), {"output.format": "jpg", "seed": None})
    assert merged.model_fields_set == {"output"}
    assert merged.output.model_fields_set == {"format"}


def test_loras_of_an_option_replace_those_of_the_file_and_are_relative_to_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = loaded(tmp_path, "loras: [a]")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merged = merge(settings, {"loras": ["b:0.5", Lora("/c", 2.0)]})
    assert merged.loras == (Lora(str(tmp_path / "here" / "b"), 0.5), Lora("/c", 2.0))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("output.format", "bmp", "--format: 'bmp' is not one of png, jpg, webp"),
        ("loras", ["a:inf"], "--lora: 'a:inf' has a strength that is not finite"),
        ("loras", ["http://x/y"], "--lora: 'http://x/y' is a URL"),
        ("schedule", "sorted", "--schedule: 'sorted' is not one of"),
        ("steps", 0, "steps: 0 is out of range"),
    ],
)
def test_a_bad_option_is_named_as_the_user_wrote_it(key: str, value: Any, message: str) -> None:
    options = {"output.format": "--format", "loras": "--lora", "schedule": "--schedule"}
    with pytest.raises(ConfigError) as caught:
        merge(Settings(), {key: value}, options)
    assert str(caught.value).startswith(message)


def test_one_choice_of_gpus_replaces_the_other(tmp_path: Path) -> None:
    settings = loaded(tmp_path, "devices: {gpus: 4}")
    assert merge(settings, {"devices.gpu_ids": [0, 2]}).devices.gpu_ids == (0, 2)
    ids = loaded(tmp_path, "devices: {gpu_ids: [1]}")
    assert merge(ids, {"devices.gpus": 3}).devices.gpu_ids == ()
    with pytest.raises(ConfigError, match="both given"):
        merge(Settings(), {"devices.gpus": 3, "devices.gpu_ids": [0]})


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("f.safetensors", "f.safetensors", 1.0),
        ("f.safetensors:0.8", "f.safetensors", 0.8),
        ("f.safetensors:-1", "f.safetensors", -1.0),
        ("f.safetensors:.5", "f.safetensors", 0.5),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
        ("a:b.safetensors:1e-1", "a:b.safetensors", 0.1),
        ("C:/f.safetensors", "C:/f.safetensors", 1.0),
        ("f:1_0", "f:1_0", 1.0),
        ("f:", "f:", 1.0),
    ],
)
def test_only_a_number_after_the_last_colon_is_a_strength(text: str, path: str, strength: float) -> None:
    assert parse_lora(text) == Lora(path, strength)


@given(path=st.text(min_size=1).filter(lambda text: bool(text.strip())), strength=st.floats(-100, 100))
def test_a_written_lora_reads_back(path: str, strength: float) -> None:
    assert parse_lora(f"{path}:{strength!r}") == Lora(path, strength)


@pytest.mark.parametrize("text", ["", " ", ":0.5", "f:nan", "f:-inf", "f:1e999"])
def test_a_lora_without_file_or_finite_strength_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_lora(text)


@given(width=st.integers(1, 999_999), height=st.integers(1, 999_999), sign=st.sampled_from("xX×"))
def test_a_written_size_reads_back(width: int, height: int, sign: str) -> None:
    assert parse_size(f"{width}{sign}{height}") == (width, height)


@pytest.mark.parametrize("text", ["", "64", "64x", "0x64", "-8x8", "8x8x8", "1e3x8", "8.0x8", "٨x٨"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write WIDTHxHEIGHT"):
        parse_size(text)


@pytest.mark.parametrize("text", ["dynamic", "static", "lockstep", "window:1", "window:30"])
def test_a_schedule_reads_and_writes_back(text: str) -> None:
    assert str(parse_schedule(text)) == text


@pytest.mark.parametrize("text", ["", "Dynamic", "window", "window:", "window:0", "window:-1", "window:x", "static:2"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="dynamic, static, lockstep, window:K"):
        parse_schedule(text)


def test_a_strength_of_a_lora_is_bounded_and_finite(tmp_path: Path) -> None:
    for strength in (math.nan, math.inf, 101.0):
        with pytest.raises(ConfigError, match=r"loras\[0\]\.strength"):
            merge(Settings(), {"loras": [Lora("/a", strength)]})
