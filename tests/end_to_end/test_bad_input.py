"""A user's mistake ends with exit code 2 and a line that names the place and the mend; nothing is started or changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import Ended
from imagemill import devices
from workplace import Workplace

GOOD = '{"prompt": "a"}\n'
TOGETHER = 8
"""Bad rows that go into one file: all problems of so few are shown in full."""

needs_no_gpu = pytest.mark.skipif(bool(devices.gpus()), reason="this machine has a GPU")


def refused(ended: Ended, *words: str) -> None:
    """Exit code 2, no traceback, and every word in what was said."""
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text
    assert ended.out == ""
    for word in words:
        assert word in ended.err


def started_nothing(place: Workplace, out: str = "out") -> None:
    """No picture, report or log, and no run in the books."""
    left = {path.name for path in (place.folder / out).rglob("*")}
    assert {name for name in left if not name.startswith((".imagemill.lock", "ledger.sqlite"))} == set()
    if "ledger.sqlite" in left:
        assert place.ledger("SELECT id FROM tasks UNION SELECT run FROM runs", out) == []


# --- rows -------------------------------------------------------------------------------------------------------------

ROWS: list[tuple[str, str, tuple[str, ...]]] = [
    ("no_json", '{"prompt": "a"', ("JSON",)),
    ("second_line", "prompt", ("JSON",)),
    ("no_object", "7", ("object",)),
    ("key_twice", '{"prompt": "a", "prompt": "b"}', ("'prompt' twice", "keep one")),
    ("no_prompt", '{"text": "a", "id": "x"}', ("prompt", "missing", "text, id", "--prompt-column")),
    ("empty_prompt", '{"prompt": "  "}', ("prompt", "empty", "write one")),
    ("prompt_is_number", '{"prompt": 7}', ("prompt", "7 is not text")),
    ("nul_in_prompt", '{"prompt": "a\\u0000b"}', ("prompt", "NUL", "remove it")),
    ("half_surrogate", '{"prompt": "a\\ud800"}', ("prompt", "surrogate", "remove it")),
    ("long_prompt", json.dumps({"prompt": "a" * 100_001}), ("prompt", "100,001", "at most 100,000")),
    ("two_names", '{"prompt": "a", "steps": 2, "num_inference_steps": 2}', ("num_inference_steps", "keep one")),
    ("text_as_number", '{"prompt": "a", "steps": "2"}', ("steps", "'2'")),
    ("true_as_number", '{"prompt": "a", "seed": true}', ("seed", "true")),
    ("fraction", '{"prompt": "a", "steps": 2.5}', ("steps", "2.5")),
    ("nan", '{"prompt": "a", "guidance": NaN}', ("guidance", "finite")),
    ("infinity", '{"prompt": "a", "guidance_scale": 1e999}', ("guidance_scale", "finite")),
    ("huge_integer", '{"prompt": "a", "seed": 99999999999999999999999}', ("seed", "64 bit", "smaller")),
    ("digits_without_end", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", ("digits", "64 bit")),
    ("nested_without_end", '{"prompt": ' + "[" * 100_000, ("nested too deeply",)),
    ("negative_seed", '{"prompt": "a", "seed": -1}', ("seed", "-1", "0 to 2**63-1")),
    ("seeds_run_over", '{"prompt": "a", "seed": 9223372036854775807, "num_images": 2}', ("seed", "2**63-1")),
    ("no_steps", '{"prompt": "a", "steps": 0}', ("steps", "1 to 1000")),
    ("no_multiple", '{"prompt": "a", "size": "65x64", "model": "tiny"}', ("width", "65", "multiples of", "64")),
    ("no_size", '{"prompt": "a", "size": "big"}', ("size", "'big'", "1024x1024")),
    ("giant", '{"prompt": "a", "width": 65536, "height": 65536}', ("width", "limit", "pixels")),
    ("many", '{"prompt": "a", "num_images": 10001}', ("num_images", "1 to 10000")),
    ("no_field_of_the_model", '{"prompt": "a", "model": "tiny", "true_cfg_scale": 2}', ("true_cfg_scale", "remove")),
    ("no_model", '{"prompt": "a", "model": "tinny"}', ("model", "'tinny'", "did you mean tiny")),
    ("metadata_nan", '{"prompt": "a", "score": NaN}', ("score", "null")),
    ("parent", '{"prompt": "a", "output_path": "../x.png"}', ("output_path", "'../x.png'", "leaves")),
    ("parent_inside", '{"prompt": "a", "output_path": "a/../../x.png"}', ("output_path", "leaves")),
    ("absolute", '{"prompt": "a", "output_path": "/tmp/x.png"}', ("output_path", "absolute", "relative")),
    ("drive", '{"prompt": "a", "output_path": "C:/x.png"}', ("output_path", "absolute")),
    ("backslash", '{"prompt": "a", "output_path": "a\\\\x.png"}', ("output_path", "backslash", "/")),
    ("nul_in_path", '{"prompt": "a", "output_path": "a\\u0000.png"}', ("output_path", "no file name", "remove")),
    ("reserved", '{"prompt": "a", "output_path": ".imagemill-1.png"}', ("output_path", "reserved")),
    ("ledgers_place", '{"prompt": "a", "output_path": "ledger.sqlite"}', ("output_path", ".png")),
    ("long_part", json.dumps({"prompt": "a", "output_path": "x" * 300}), ("output_path", "255 bytes")),
    ("lora_url", '{"prompt": "a", "lora_path": "https://x.y/z.safetensors"}', ("loras[0]", "URL", "local")),
    ("lora_missing", '{"prompt": "a", "model": "tiny", "lora_path": "no.safetensors"}', ("loras[0]", "no.safetensors")),
    ("lora_alone", '{"prompt": "a", "lora_strength": 1}', ("lora_strength", "lora_path")),
    ("lora_strength", '{"prompt": "a", "loras": [{"path": "a", "strength": 101}]}', ("loras[0].strength", "100")),
    ("lora_field", '{"prompt": "a", "loras": [{"path": "a", "scale": 1}]}', ("loras[0].scale",)),
    ("edit", '{"prompt": "a", "image": "x.png"}', ("images", "x.png")),
]

FILES: list[tuple[str, str | bytes, tuple[str, ...]]] = [
    ("same_id", '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', ("line 2", "'x'", "line 1", "its own")),
    ("id_of_a_row", '{"prompt": "a", "id": "000002"}\n{"prompt": "b"}\n', ("line 2", "'000002'", "line 1")),
    (
        "same_path",
        '{"prompt": "a", "output_path": "x.png"}\n{"prompt": "b", "output_path": "x"}\n',
        ("line 2", "'x.png'", "line 1", "its own"),
    ),
    (
        "same_path_up_to_case",
        '{"prompt": "a", "output_path": "Straße/X.png"}\n{"prompt": "b", "output_path": "STRASSE/x.PNG"}\n',
        ("line 2", "line 1", "case", "'Straße/X.png'"),
    ),
    ("not_utf8", b'{"prompt": "caf\xe9"}\n', ("line 1, byte 16", "UTF-8")),
    ("utf16", '{"prompt": "a"}\n'.encode("utf-16"), ("line 1", "UTF-16", "save it as UTF-8")),
    ("empty", "", ("holds no task",)),
    ("only_blank_lines", "\n \r\n\n", ("holds no task",)),
]


@pytest.fixture(scope="module")
def refusals(shared_place: Workplace) -> dict[str, str]:
    """What was said of each bad row; a few of them go into each file."""
    said = {}
    for start in range(0, len(ROWS), TOGETHER):
        some = ROWS[start : start + TOGETHER]
        shared_place.write("tasks.jsonl", GOOD + "".join(f"{content}\n" for _, content, _ in some) + GOOD)
        ended = shared_place.fake("tasks.jsonl")
        refused(ended, "nothing was started", "--skip-bad")
        started_nothing(shared_place)
        lines = ended.err.removeprefix("imagemill: ").splitlines()
        for number, (name, _, _) in enumerate(some, 2):
            said[name] = "\n".join(line for line in lines if line.startswith(f"tasks.jsonl, line {number}: "))
        assert not [
            line for line in lines if line.startswith(("tasks.jsonl, line 1:", f"tasks.jsonl, line {len(some) + 2}:"))
        ]
    return said


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, _, words in ROWS], ids=[row[0] for row in ROWS])
def test_a_bad_row_is_named_by_file_line_and_field(name: str, words: tuple[str, ...], refusals: dict[str, str]) -> None:
    for word in words:
        assert word in refusals[name]


@pytest.mark.parametrize(("content", "words"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_rows_that_do_not_go_together_are_named_by_file_and_line(
    content: str | bytes, words: tuple[str, ...], place: Workplace
) -> None:
    place.write("tasks.jsonl", content)
    refused(place.fake("tasks.jsonl"), *words)
    started_nothing(place)


def test_all_bad_rows_are_counted_and_the_first_twenty_shown(place: Workplace) -> None:
    place.tasks([{"prompt": "a"}] + [{"prompt": 7}] * 25)
    ended = place.fake("tasks.jsonl")
    refused(ended, "line 2: prompt", "line 21: prompt", "and 5 more", "--skip-bad")
    assert "line 22" not in ended.err
    started_nothing(place)


def test_every_problem_of_a_row_is_named(place: Workplace) -> None:
    place.tasks([{"prompt": 7, "steps": "x", "seed": -1.5}])
    refused(place.fake("tasks.jsonl"), "line 1: prompt", "line 1: steps", "line 1: seed")


def test_skip_bad_goes_on_without_bad_rows_and_lists_them(place: Workplace) -> None:
    place.tasks([{"prompt": "a"}, {"prompt": 7}, {"prompt": "c"}, {"prompt": "d", "output_path": "../d"}])
    ended = place.fake("tasks.jsonl", "out", "--skip-bad")
    assert ended.code == 0, ended.text
    for line in (2, 4):
        assert f"tasks.jsonl, line {line}: skipped" in ended.out
    assert [(one["id"], one["seed"], one["state"]) for one in place.results()] == [
        ("000001", 42, "done"),
        ("000003", 44, "done"),
    ]
    for name in ("report.json", "report.md", "report.html"):
        text = (place.folder / "out" / name).read_text("utf-8")
        assert "line 2" in text
        assert "line 4" in text


def test_skip_bad_with_no_good_row_is_refused_and_says_what_was_wrong(place: Workplace) -> None:
    place.tasks([{"prompt": 7}])
    refused(place.fake("tasks.jsonl", "out", "--skip-bad"), "no task that could run")
    started_nothing(place)


# --- sources ----------------------------------------------------------------------------------------------------------


SOURCES: list[tuple[str, str | None, tuple[str, ...]]] = [
    ("gone.jsonl", None, ("gone.jsonl", "no such file", "check the path")),
    ("tasks.xlsx", "x", ("tasks.xlsx", "'.xlsx'", ".jsonl", ".parquet")),
    ("tasks", "x", ("tasks", "no suffix", ".jsonl")),
    (".", None, ("folder", ".jsonl")),
    ("tasks.json", '{"persona": 1}', ("tasks.json", "holds no tasks", '{"tasks": [...]}')),
    ("tasks.json", '[{"prompt": "a"},\n {"prompt"}]', ("tasks.json", "line 2", "JSON")),
    ("tasks.json", '{"tasks": [{"prompt": "a"}], "steps": 2}', ("tasks.json", "'steps'", "--config")),
    ("tasks.json", '[{"prompt": "a"}, {"prompt": 1}]', ("tasks.json, item 2: prompt", "1 is not text")),
    ("tweets.json", '{"tweets": []}', ("tweets.json", "persona")),
    (
        "tweets.json",
        '{"persona": {"name": "../"}, "tweets": []}',
        ("tweets.json", "persona.name", "letter or digit"),
    ),
    ("tweets.json", '{"persona": {"name": "x"}, "tweets": [{"text": "a"}]}', ("no task",)),
    ("tasks.csv", "text;size\na;b\n", ("tasks.csv, line 1", "';'", "','")),
    ("tasks.csv", "text,category\na,b\n", ("tasks.csv, line 1", "'prompt'", "text, category", "--prompt-column")),
    ("tasks.csv", 'prompt\n"a\nb\n', ("tasks.csv, line 2", "never closes", "close it")),
    ("tasks.csv", "prompt,prompt\na,b\n", ("tasks.csv, line 1", "twice", "rename")),
    ("tasks.csv", "prompt,seed\na\n", ("tasks.csv, line 2", "1 columns", "2")),
    ("tasks.csv", "prompt,seed\na,x\n", ("tasks.csv, line 2: seed", "'x'")),
    ("tasks.csv", "prompt\n", ("no task",)),
    ("tasks.tsv", "prompt\tseed\na\t1\tb\n", ("tasks.tsv, line 2", "3 columns", "2")),
    ("tasks.parquet", "no parquet", ("tasks.parquet", "Parquet")),
]


@pytest.fixture(scope="module")
def source_refusals(shared_place: Workplace) -> list[Ended]:
    """What was said of each source."""
    commands = []
    for number, (name, content, _) in enumerate(SOURCES):
        path = f"sources/{number}/{name}"
        (shared_place.folder / "sources" / str(number)).mkdir(parents=True)
        if content is not None:
            shared_place.write(path, content)
        commands.append(("run", path, "--out", f"source-{number}", "--model", "fake"))
    return shared_place.forked(commands)


@pytest.mark.parametrize("number", range(len(SOURCES)), ids=[f"{name} {content}" for name, content, _ in SOURCES])
def test_a_source_that_cannot_be_read_is_named_with_the_mend(
    number: int, shared_place: Workplace, source_refusals: list[Ended]
) -> None:
    refused(source_refusals[number], *SOURCES[number][2])
    started_nothing(shared_place, f"source-{number}")


def test_standard_input_is_named_too(place: Workplace) -> None:
    refused(place("run", "-", "--out", "out", "--model", "fake", stdin=b'{"prompt": 7}\n'), "<stdin>, line 1: prompt")
    refused(place("run", "-", "--out", "out", "--model", "fake", stdin=b""), "no task")
    started_nothing(place)


# --- options ----------------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--attention", "flsh"), ("--attention", "'flsh'", "did you mean flash?")),
    (("--attention", "foo"), ("--attention", "'foo'", "write auto, or one of native")),
    (("--attention", "flash_hub"), ("--attention", "code from the network")),
    (("--schedule", "fastest"), ("--schedule", "'fastest'", "dynamic, static, lockstep, window:K")),
    (("--schedule", "window:0"), ("--schedule", "'window:0'", "K from 1")),
    (("--size", "big"), ("--size", "'big'", "1024x1024")),
    (("--size", "17x16", "--model", "tiny"), ("17", "multiples of")),
    (("--size", "65536x65536"), ("imagemill: size: 65536x65536: is over the limit of 67,108,864 pixels",)),
    (("--size", "9999999999x16"), ("--size: '9999999999x16' is over the limit of 67,108,864 pixels",)),
    (("--size", "999999999x16"), ("imagemill: size: 999999999x16: is over the limit",)),
    (("--format", "gif"), ("--format", "'gif'", "png")),
    (("--sink", "tape"), ("--sink", "'tape'", "files")),
    (("--device", "tpu"), ("--device", "'tpu'", "cpu")),
    (("--lora", "gone.safetensors", "--model", "tiny"), ("gone.safetensors", "no such LoRA file")),
    (
        ("--lora", "pickle.pt:abc", "--model", "tiny"),
        ("no such LoRA file", "or write a number for 'abc', such as pickle.pt:0.8"),
    ),
    (("--lora", "pickle.pt", "--model", "tiny"), ("pickle.pt", "run code", "safetensors")),
    (("--lora", "text.safetensors:0.5", "--model", "tiny"), ("text.safetensors", "no safetensors")),
    (("--lora", "gone.safetensors:nan"), ("--lora", "finite", "FILE:0.8")),
    (("--lora", ":0.5"), ("--lora", "names no file")),
    (("--lora", "https://x.y/z.safetensors"), ("--lora", "URL")),
    (("--gpus", "many"), ("--gpus", "'many'", "auto")),
    (("--gpus", "0"), ("--gpus", "0", "auto")),
    (("--gpu-ids", "a,b"), ("--gpu-ids", "'a,b'", "0,2,4")),
    (("--gpu-ids", "0,0"), ("gpu_ids", "twice")),
    (("--gpus", "1", "--gpu-ids", "0"), ("gpus", "gpu_ids", "keep one")),
    (("--gpus", "1", "--device", "cpu"), ("cpu", "remove one")),
    (("--workers", "0"), ("--workers", "0")),
    (("--workers", "two"), ("--workers",)),
    (("--steps", "0"), ("--steps", "0")),
    (("--seed", "-1"), ("--seed", "-1")),
    (("--seed", "99999999999999999999"), ("--seed",)),
    (("--guidance", "nan"), ("--guidance",)),
    (("--limit", "0"), ("--limit",)),
    (("--batch-size", "0"), ("--batch-size", "0")),
    (("--retry-failed=never",), ("--retry-failed", "'never'", "oom", "all")),
    (("--prompt-column", "Text"), ("line 1: Text", "missing", "--prompt-column")),
    (("--model", "tinny"), ("'tinny'", "did you mean tiny", "imagemill models")),
    (("--model", ""), ("--model",)),
    (("--model", "./gone"), ("./gone", "no such folder")),
    (("--model", "hollow"), ("hollow", "model_index.json", "diffusers format")),
    (("--model", "row.jsonl"), ("row.jsonl", "is a file", "folder")),
    (("--model", "nobody/nothing"), ("nobody/nothing", "HF_HUB_OFFLINE", "hf download")),
    (("--out", "row.jsonl"), ("row.jsonl", "output folder", "--out")),
    (("--config", "gone.yaml"), ("gone.yaml", "no such file")),
    (("--colour", "red"), ("--colour",)),
]


@pytest.fixture(scope="module")
def option_refusals(shared_place: Workplace) -> list[Ended]:
    """What was said of each option."""
    shared_place.write("row.jsonl", GOOD)
    shared_place.write("pickle.pt", b"\x80\x02")
    shared_place.write("text.safetensors", "this is no safetensors file")
    (shared_place.folder / "hollow").mkdir()
    commands = []
    for number, (options, _) in enumerate(OPTIONS):
        usual = {"--out": f"option-{number}", "--model": "fake"}
        given = [word for name, value in usual.items() if name not in options for word in (name, value)]
        commands.append(("run", "row.jsonl", *given, *options))
    return shared_place.forked(commands)


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=[" ".join(options) for options, _ in OPTIONS])
def test_a_wrong_option_is_named_with_the_mend(
    number: int, shared_place: Workplace, option_refusals: list[Ended]
) -> None:
    refused(option_refusals[number], *OPTIONS[number][1])
    started_nothing(shared_place, f"option-{number}")


@needs_no_gpu
@pytest.mark.parametrize("options", [("--gpus", "2"), ("--gpu-ids", "0,7"), ("--device", "cuda")])
def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(options: tuple[str, ...], place: Workplace) -> None:
    place.write("tasks.jsonl", GOOD)
    refused(place.fake("tasks.jsonl", "out", *options), "no NVIDIA GPU", "--device cpu")
    started_nothing(place)


SETTINGS: list[tuple[str, tuple[str, ...]]] = [
    ("stepz: 2\n", ("settings.yaml", "stepz", "did you mean steps")),
    ("output:\n  formt: png\n", ("settings.yaml", "output.formt", "did you mean output.format")),
    ("steps: two\n", ("settings.yaml", "steps", "'two'")),
    ("steps: 1\nsteps: 2\n", ("settings.yaml, line 2", "'steps'", "twice")),
    ("steps: [\n", ("settings.yaml, line",)),
    ("- steps\n", ("settings.yaml", "steps: 8")),
    ("limits: {task_timeout: .nan}\n", ("settings.yaml", "limits.task_timeout")),
    ("schedule: window\n", ("settings.yaml", "schedule", "window:K")),
    (
        "bench: b.jsonl\n",
        ("bench: is a key of an evaluation's settings; give them to `imagemill eval", "settings.yaml`"),
    ),
    (
        "diffusion_model: {}\nlogging: {level: INFO}\n",
        ("diffusion_model: is a key of an evaluation's", "`imagemill eval"),
    ),
]


@pytest.fixture(scope="module")
def settings_refusals(shared_place: Workplace) -> list[Ended]:
    """What was said of each settings file."""
    shared_place.write("row.jsonl", GOOD)
    for number, (text, _) in enumerate(SETTINGS):
        shared_place.write(f"settings/{number}/settings.yaml", text)
    return shared_place.forked(
        (
            "run",
            "row.jsonl",
            "--out",
            f"settings-{number}",
            "--model",
            "fake",
            "--config",
            f"settings/{number}/settings.yaml",
        )
        for number in range(len(SETTINGS))
    )


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=[text.strip() for text, _ in SETTINGS])
def test_a_mistake_in_the_settings_file_is_named_by_file_and_field(
    number: int, shared_place: Workplace, settings_refusals: list[Ended]
) -> None:
    refused(settings_refusals[number], *SETTINGS[number][1])
    started_nothing(shared_place, f"settings-{number}")


TYPED: list[tuple[tuple[str, ...], str]] = [
    (("run",), "missing argument 'SOURCE' (see `imagemill run -h`)"),
    (("report",), "missing argument"),
    (("plan",), "missing argument 'SOURCE' (see `imagemill plan -h`)"),
    (("paint", "x"), "no such command 'paint'; did you mean 'plan'? (see `imagemill -h`)"),
    (("--nope",), "no such option: --nope (see `imagemill -h`)"),
    (("run", "t.jsonl", "--stepps", "2"), "no such option: --stepps; did you mean --steps? (see `imagemill run -h`)"),
    (("run", "t.jsonl", "--steps", "abc"), "--steps: 'abc' is not a whole number (see `imagemill run -h`)"),
    (("run", "t.jsonl", "--seed=1.5"), "--seed: '1.5' is not a whole number (see `imagemill run -h`)"),
    (("run", "t.jsonl", "--model"), "option '--model' requires an argument"),
    (("run", "t.jsonl", "--compile=maybe"), "option '--compile' does not take a value"),
    (("eval", "b.jsonl", "--min-coverage", "most"), "--min-coverage: 'most' is not a number (see `imagemill eval -h`)"),
]


@pytest.mark.parametrize(("arguments", "line"), TYPED, ids=[" ".join(arguments) for arguments, _ in TYPED])
def test_a_command_that_is_typed_wrong_is_answered_in_one_line(
    arguments: tuple[str, ...], line: str, place: Workplace
) -> None:
    ended = place(*arguments)
    refused(ended)
    assert ended.err.startswith(f"imagemill: {line}")
    assert ended.err.count("\n") == 1
    assert list(place.folder.iterdir()) == []


def test_the_command_alone_shows_its_help(place: Workplace) -> None:
    ended = place()
    assert "Usage: imagemill" in ended.text
    assert "doctor" in ended.text


def test_a_folder_that_is_gone_has_no_report(place: Workplace) -> None:
    refused(place("report", "gone"))
    assert list(place.folder.iterdir()) == []


def test_report_refuses_a_folder_that_no_run_wrote(place: Workplace) -> None:
    (place.folder / "empty").mkdir()
    refused(place("report", "empty"), "empty", "ledger.sqlite", "--out")
    assert list((place.folder / "empty").iterdir()) == []


# --- the output folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [{"prompt": 7}, {"prompt": "a", "model": "gone"}, {"prompt": "a", "lora_path": "gone.safetensors"}], ids=str
)
def test_a_refused_run_leaves_no_folder_behind(row: dict[str, Any], place: Workplace) -> None:
    refused(place.fake(place.tasks([row]), "new/out"))
    assert [path.name for path in place.folder.iterdir()] == ["tasks.jsonl"]


def test_a_refused_evaluation_leaves_no_folder_behind(place: Workplace) -> None:
    place.tasks([{"id": "a", "instruction": "make it night", "image": "gone.png", "category": 7}])
    refused(place("eval", "tasks.jsonl", "--edit-model", "fake", "--judge", "reference", "--out", "new/out"))
    assert [path.name for path in place.folder.iterdir()] == ["tasks.jsonl"]


def test_a_refused_run_leaves_a_folder_that_was_there(place: Workplace) -> None:
    (place.folder / "out").mkdir()
    refused(place.fake(place.tasks([{"prompt": 7}])))
    assert (place.folder / "out").is_dir()


def test_a_folder_that_is_a_link_to_elsewhere_is_refused(place: Workplace) -> None:
    (place.folder / "out").mkdir()
    (place.folder / "elsewhere").mkdir()
    (place.folder / "out" / "album").symlink_to(place.folder / "elsewhere")
    place.tasks([{"prompt": "a", "output_path": "album/x.png"}])
    refused(place.fake("tasks.jsonl"), "line 1: output_path", "'album/x.png'", "link", "remove the link")
    assert list((place.folder / "elsewhere").iterdir()) == []


def test_a_file_that_no_run_made_is_not_overwritten(place: Workplace) -> None:
    place.write("out/x.png", "mine")
    place.tasks([{"prompt": "a", "output_path": "x.png"}])
    refused(place.fake("tasks.jsonl"), "line 1", "'x.png'", "stands there", "--out")
    assert (place.folder / "out" / "x.png").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_that_cannot_be_written_is_refused(place: Workplace) -> None:
    place.write("tasks.jsonl", GOOD)
    (place.folder / "out").mkdir(mode=0o555)
    refused(place.fake("tasks.jsonl"), "out", "output folder", "--out")


def test_a_damaged_ledger_is_refused_with_the_mend_and_left_as_it_is(place: Workplace) -> None:
    place.write("tasks.jsonl", GOOD)
    place.write("out/ledger.sqlite", "this was a ledger once " * 100)
    refused(place.fake("tasks.jsonl"), "ledger.sqlite", "move the folder away")
    assert (place.folder / "out" / "ledger.sqlite").read_text() == "this was a ledger once " * 100


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Times and bytes of every file, without SQLite's shared memory, which reading alone may touch."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(("ledger.sqlite", ".imagemill"))
    }


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda rows: [*rows, {"prompt": 7}], ("line 4: prompt",)),
        (lambda rows: [{"prompt": "other"}, *rows[1:]], ("changed", "--rerun-changed")),
        (lambda rows: [*rows, {"prompt": "d", "id": "new", "output_path": "000001.png"}], ("line 4", "000001.png")),
    ],
    ids=["bad row", "changed task", "path of another task"],
)
def test_a_refused_run_changes_nothing_of_an_earlier_one(
    spoil: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], words: tuple[str, ...], place: Workplace
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    assert place.fake(place.tasks(rows)).code == 0
    tables = ("runs", "tasks", "attempts", "skipped", "spans")
    before = contents(place.folder / "out"), [place.ledger(f"SELECT * FROM {table}") for table in tables]
    refused(place.fake(place.tasks(spoil(rows))), *words)
    assert (contents(place.folder / "out"), [place.ledger(f"SELECT * FROM {table}") for table in tables]) == before
