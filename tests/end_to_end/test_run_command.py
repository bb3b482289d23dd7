"""`imagemill run`: every kind of source goes in, pictures, results and one exit code come out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from command import Ended, until
from random_lora import make_lora
from workplace import Workplace

ROWS: list[dict[str, Any]] = [
    {"id": "owl", "prompt": "an owl, at night", "seed": 7, "category": "Animals"},
    {"id": "volcano", "prompt": 'a "small" volcano', "seed": 8, "category": "Outdoor"},
    {"id": "街", "prompt": "巴黎的一条街", "seed": 9, "category": "World"},
]
TWEETS = [f"Harbour_Notes_{number:02}" for number in range(1, 17)]
TINY = ("--size", "64x64", "--steps", "2", "--device", "cpu")


def as_table(rows: list[dict[str, Any]], path: Path, delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def write_source(kind: str, place: Workplace) -> tuple[str, bytes]:
    """The rows as a source of this kind: its name for the command, and what stands on standard input."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    name = f"tasks.{kind}"
    match kind:
        case "jsonl" | "ndjson":
            place.write(name, lines)
        case "stdin":
            return "-", lines.encode()
        case "dos":
            place.write("tasks.jsonl", b"\xef\xbb\xbf" + lines.replace("\n", "\r\n\r\n").encode())
            name = "tasks.jsonl"
        case "json":
            place.write(name, json.dumps(ROWS))
        case "tasks":
            place.write("tasks.json", json.dumps({"tasks": ROWS}))
            name = "tasks.json"
        case "csv":
            as_table(ROWS, place.folder / name, ",")
        case "tsv":
            header = "\t".join(ROWS[0])
            place.write(name, "\n".join([header, *("\t".join(map(str, row.values())) for row in ROWS)]))
        case "parquet":
            as_parquet(ROWS, place.folder / name)
    return name, b""


@pytest.fixture(scope="module")
def golden(shared_place: Workplace) -> dict[str, str]:
    """The pictures of `ROWS`."""
    ended = shared_place.fake(shared_place.tasks(ROWS, "golden.jsonl"), "golden", "--workers", "1")
    assert ended.code == 0, ended.text
    return shared_place.pixels("golden")


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "stdin", "dos", "json", "tasks", "csv", "tsv", "parquet"])
def test_a_source_of_every_kind_gives_the_same_pictures_and_keeps_unknown_columns(
    kind: str, place: Workplace, golden: dict[str, str]
) -> None:
    name, stdin = write_source(kind, place)
    ended = place("run", name, "--out", "out", "--model", "fake", stdin=stdin)
    assert ended.code == 0, ended.text
    assert place.pixels() == golden
    assert [(one["id"], one["prompt"], one["seed"], one["state"]) for one in place.results()] == [
        (row["id"], row["prompt"], row["seed"], "done") for row in ROWS
    ]
    assert [one["metadata"] for one in place.results()] == [{"category": row["category"]} for row in ROWS]


def test_the_prompt_may_stand_in_another_column(place: Workplace) -> None:
    place.write("tasks.tsv", "Text\tCategory\na red apple\tFood\na pear\tFood\n")
    ended = place.fake("tasks.tsv", "out", "--prompt-column", "Text")
    assert ended.code == 0, ended.text
    assert [(one["prompt"], one["metadata"]) for one in place.results()] == [
        ("a red apple", {"Category": "Food"}),
        ("a pear", {"Category": "Food"}),
    ]


def test_a_limit_takes_the_first_rows_and_raising_it_goes_on(place: Workplace) -> None:
    place.tasks([{"prompt": f"prompt {number}"} for number in range(10)])
    assert place.fake("tasks.jsonl", "out", "--limit", "3").code == 0
    assert list(place.states()) == ["000001", "000002", "000003"]
    ended = place.fake("tasks.jsonl", "out", "--limit", "5")
    assert "5 done (2 in this run" in ended.out
    assert list(place.states()) == ["000001", "000002", "000003", "000004", "000005"]


def test_without_out_the_folder_is_named_after_the_source(place: Workplace) -> None:
    place.tasks(ROWS, "birds.jsonl")
    assert place("run", "birds.jsonl", "--model", "fake").code == 0
    assert len(place.pixels("outputs/birds")) == len(ROWS)


def test_num_images_counts_seeds_ids_and_names_up(place: Workplace) -> None:
    place.tasks([{"id": "apple", "prompt": "an apple", "seed": 7, "num_images": 3, "output_path": "fruit/apple.png"}])
    assert place.fake("tasks.jsonl").code == 0
    assert [(one["id"], one["seed"], one["path"]) for one in place.results()] == [
        (f"apple_{number}", 6 + number, f"fruit/apple_{number}.png") for number in (1, 2, 3)
    ]
    assert len(set(place.pixels().values())) == 3


# --- tweet batches ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tweets(shared_place: Workplace, data: Path) -> Ended:
    """The shared tweet batch, run without naming a model."""
    return shared_place("run", data / "persona_tweets.json", "--out", "tweets", *TINY)


def test_a_tweet_batch_gives_a_picture_a_tweet_named_after_the_persona(shared_place: Workplace, tweets: Ended) -> None:
    assert tweets.code == 0, tweets.text
    assert list(shared_place.pixels("tweets")) == [f"{name}.png" for name in TWEETS]
    results = shared_place.results("tweets")
    assert [one["id"] for one in results] == TWEETS
    assert [one["seed"] for one in results] == list(range(42, 58))
    assert {(one["width"], one["height"], one["steps"], one["model"]) for one in results} == {(64, 64, 2, "tiny")}
    assert results[0]["metadata"] == {"persona": "Harbour Notes", "text": "note 1"}


def test_without_a_model_one_line_names_the_embedded_one_and_how_to_get_a_real_one(tweets: Ended) -> None:
    lines = [line for line in tweets.err.splitlines() if line.startswith("model:")]
    assert len(lines) == 1
    assert "tiny" in lines[0]
    assert "--model" in lines[0]


def test_a_named_model_needs_no_word_about_the_default(place: Workplace) -> None:
    assert "model:" not in place.fake(place.tasks(ROWS)).err


def test_a_missing_lora_of_a_tweet_batch_stops_before_anything_starts(place: Workplace, data: Path) -> None:
    ended = place("run", data / "persona_tweets_lora.json", "--out", "out", *TINY)
    assert ended.code == 2
    assert "loras/flat.safetensors" in ended.err
    assert "Traceback" not in ended.err
    assert place.pixels() == {}


def test_a_tweet_batch_with_a_lora_uses_it_and_reports_the_tweet_without_a_hint(
    place: Workplace, data: Path, shared_place: Workplace, tweets: Ended
) -> None:
    batch = json.loads((data / "persona_tweets_lora.json").read_text("utf-8"))
    batch["tweets"] = batch["tweets"][:6]  # the fourth has no hint
    place.write("batch.json", json.dumps(batch))
    (place.folder / "loras").mkdir()
    make_lora(place.folder / "loras" / "flat.safetensors", seed=3)
    ended = place("run", "batch.json", "--out", "out", *TINY)
    assert ended.code == 0, ended.text
    assert list(place.pixels()) == [f"Harbour_Notes_{number:02}.png" for number in (1, 2, 3, 5, 6)]
    assert [one["seed"] for one in place.results()] == [42, 43, 44, 46, 47]
    assert all([lora["strength"] for lora in one["loras"]] == [0.8] for one in place.results())
    without, with_ = shared_place.pixels("tweets"), place.pixels()
    for number in (1, 2, 3):  # the same prompts and seeds as in the batch without an adapter
        assert without[f"Harbour_Notes_{number:02}.png"] != with_[f"Harbour_Notes_{number:02}.png"]
    skipped = [line for line in ended.out.splitlines() if "skipped" in line]
    assert len(skipped) == 1
    assert "tweet 4" in skipped[0]
    assert "scene_hint" in skipped[0]
    report = json.loads((place.folder / "out" / "report.json").read_text("utf-8"))
    assert "tweet 4" in json.dumps(report)
    assert "tweet 4" in (place.folder / "out" / "report.md").read_text("utf-8")


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_pictures_are_of_the_asked_format_and_carry_the_task(name: str, kind: str, place: Workplace) -> None:
    ended = place.fake(place.tasks(ROWS[:1]), "out", "--format", name, "--size", "32x16")
    assert ended.code == 0, ended.text
    with Image.open(place.folder / "out" / f"owl.{name}") as image:
        assert (image.format, image.size) == (kind, (32, 16))
        if name != "png":
            assert "an owl, at night" in image.getexif()[0x010E]


def test_a_png_holds_the_task_as_json_and_as_the_text_that_viewers_read(place: Workplace) -> None:
    assert place.fake(place.tasks(ROWS), "out", "--size", "32x16", "--steps", "3").code == 0
    with Image.open(place.folder / "out" / "owl.png") as image:
        parameters, task = image.text["parameters"], json.loads(image.text["imagemill"])
    prompt, values = parameters.splitlines()
    assert prompt == "an owl, at night"
    assert {"Steps: 3", "Seed: 7", "Size: 32x16", "Model: fake"} <= set(values.split(", "))
    assert task["task"]["prompt"] == "an owl, at night"
    assert task["task"]["metadata"] == {"category": "Animals"}
    assert task["fingerprint"] == place.results()[0]["fingerprint"]


def test_no_metadata_leaves_the_task_out_and_the_pixels_alone(place: Workplace, golden: dict[str, str]) -> None:
    for number, name in enumerate(("png", "jpg", "webp")):
        ended = place.fake(place.tasks(ROWS), f"out{number}", "--no-metadata", "--format", name)
        assert ended.code == 0, ended.text
        for path in (place.folder / f"out{number}").glob(f"*.{name}"):
            assert b"owl, at night" not in path.read_bytes()
            assert b"Animals" not in path.read_bytes()
            with Image.open(path) as image:
                assert not getattr(image, "text", {})
                assert not image.getexif()
    assert place.pixels("out0") == golden


def test_the_sink_none_keeps_no_pictures_but_the_books(place: Workplace) -> None:
    assert place.fake(place.tasks(ROWS), "out", "--sink", "none").code == 0
    assert place.pixels() == {}
    assert set(place.states().values()) == {"done"}
    assert [one["path"] for one in place.results()] == [None] * 3
    again = place.fake("tasks.jsonl", "out", "--sink", "none")
    assert "3 done (0 in this run" in again.out


def test_every_run_leaves_its_reports_and_its_logs(place: Workplace) -> None:
    ended = place.fake(place.tasks(ROWS), "out", "--workers", "2", "--schedule", "static")
    out = place.folder / "out"
    for name in ("results.jsonl", "report.json", "report.md", "report.html", "ledger.sqlite"):
        assert (out / name).stat().st_size > 0
    assert str(Path("out") / "report.html") in ended.out
    assert sorted(path.name for path in (out / "logs").iterdir()) == ["driver.log", "worker-0.log", "worker-1.log"]
    for number in (0, 1):
        text = (out / "logs" / f"worker-{number}.log").read_text("utf-8")
        assert f"worker {number} on" in text
        assert f"worker {1 - number} on" not in text
    assert place.leftovers() == []


def test_settings_of_a_yaml_file_stand_below_options_and_those_below_the_task(place: Workplace) -> None:
    place.write("settings.yaml", "model: fake\nsize: 48x48\nsteps: 5\noutput:\n  folder: from_yaml\n  format: webp\n")
    place.tasks([{"prompt": "a"}, {"prompt": "b", "steps": 7}])
    ended = place("run", "tasks.jsonl", "--config", "settings.yaml", "--size", "32x32")
    assert ended.code == 0, ended.text
    assert [(one["width"], one["steps"], one["path"]) for one in place.results("from_yaml")] == [
        (32, 5, "000001.webp"),
        (32, 7, "000002.webp"),
    ]


# --- progress ---------------------------------------------------------------------------------------------------------


def test_away_from_a_terminal_progress_is_plain_lines(place: Workplace) -> None:
    ended = place.fake(place.tasks(ROWS), "out", "--schedule", "lockstep", "--workers", "2")
    assert "3/3 done" in ended.err
    assert "round 2/2 done" in ended.err
    assert "\x1b" not in ended.text
    assert "\r" not in ended.text


def test_quiet_says_nothing_but_the_summary(place: Workplace) -> None:
    ended = place.fake(place.tasks(ROWS), "out", "--quiet")
    assert ended.err == ""
    assert ended.out.startswith("3 done")


# --- workers ----------------------------------------------------------------------------------------------------------

SLOW = [{"prompt": f"slow {number}", "fake": {"delay": 0.6}} for number in range(3)]


def has_picture(place: Workplace) -> bool:
    return any((place.folder / "out").glob("*.png"))


def test_one_worker_runs_inside_the_process(place: Workplace) -> None:
    running = place.start_fake(place.tasks(SLOW))
    until(lambda: has_picture(place))  # the next task is at work
    assert running.children() == []
    assert running.wait().code == 0


@pytest.mark.parametrize(("options", "count"), [(("--isolate",), 1), (("--workers", "2"), 2), (("--workers", "9"), 3)])
def test_isolate_and_more_workers_start_processes_but_never_more_than_tasks(
    options: tuple[str, ...], count: int, place: Workplace
) -> None:
    running = place.start_fake(place.tasks(SLOW), "out", *options)
    until(running.children)
    ended = running.wait()
    assert ended.code == 0, ended.text
    assert len(list((place.folder / "out" / "logs").glob("worker-*.log"))) == count
    assert running.family() == []
    assert set(place.states().values()) == {"done"}


# --- exit codes -------------------------------------------------------------------------------------------------------


def test_columns_that_are_nearly_known_are_asked_about_once_and_named_as_given(place: Workplace) -> None:
    (place.folder / "sub").mkdir()
    rows = [{"prompt": "a", "stepps": 3, "category": "x"}, {"prompt": "b", "stepps": 4}]
    place.write("sub/tasks.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    said = "the column stepps is not known and becomes metadata; did you mean steps?"
    ended = place("run", "sub/tasks.jsonl", "--model", "fake", "--out", "out")
    assert (ended.code, ended.err.count("is not known"), ended.err.count(said)) == (0, 1, 1)
    assert said in place("plan", "sub/tasks.jsonl", "--model", "fake", "--out", "other").out
    place.write("sub/bad.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n')
    assert "imagemill: sub/bad.jsonl, line 2: prompt: 3 is not text" in place("plan", "sub/bad.jsonl").err


def test_exit_code_1_says_what_failed_and_keeps_the_rest(place: Workplace) -> None:
    place.tasks([{"id": "good", "prompt": "a"}, {"id": "bad", "prompt": "b", "fake": {"fail": "bad_task"}}])
    ended = place.fake("tasks.jsonl")
    assert ended.code == 1
    assert "1 done" in ended.out
    assert "1 failed: bad_task: scripted: bad_task in attempt 1; the report tells of each" in ended.out
    assert "--retry-failed" in ended.out
    good, bad = place.results()
    assert (good["state"], good["path"]) == ("done", "good.png")
    assert (bad["state"], bad["kind"], bad["message"]) == ("failed", "bad_task", "scripted: bad_task in attempt 1")
    assert list(place.pixels()) == ["good.png"]


@pytest.mark.parametrize("kind", ["bad_model", "oom", "transient", "bad_output"])
def test_each_kind_of_failure_is_settled_with_its_kind(kind: str, place: Workplace) -> None:
    script = {"nan": True} if kind == "bad_output" else {"fail": kind}
    place.tasks([{"id": "bad", "prompt": "b", "fake": script}, {"id": "good", "prompt": "a"}])
    assert place.fake("tasks.jsonl").code == 1
    assert {one["id"]: (one["state"], one["kind"]) for one in place.results()} == {
        "bad": ("failed", kind),
        "good": ("done", None),
    }


def test_a_failure_that_passes_is_tried_again(place: Workplace) -> None:
    place.tasks([{"id": "shy", "prompt": "b", "fake": {"fail": "transient", "fail_attempts": 2}}])
    assert place.fake("tasks.jsonl").code == 0
    assert place.results()[0]["attempts"] == 3
    assert place.attempts() == {"shy": 3}


def test_a_model_that_does_not_load_ends_the_run_with_its_reason(place: Workplace) -> None:
    ended = place.fake(place.tasks(ROWS), "out", IMAGEMILL_FAKE_LOAD='{"fail": "bad_model"}')
    assert ended.code == 2
    assert "the model does not load" in ended.err
    assert "Traceback" not in ended.err
    assert set(place.states().values()) == {"pending"}


def test_without_a_worker_that_could_go_on_the_run_ends_and_the_same_command_goes_on(place: Workplace) -> None:
    place.tasks(ROWS)
    ended = place.fake("tasks.jsonl", "out", "--workers", "2", IMAGEMILL_FAKE_LOAD='{"fail": "crash"}')
    assert ended.code == 1
    assert "no worker is left" in ended.err
    assert "Traceback" not in ended.err
    assert set(place.states().values()) == {"pending"}
    assert place.fake("tasks.jsonl", "out", "--workers", "2").code == 0


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("--version",)])
def test_help_and_version_end_with_0(arguments: tuple[str, ...], place: Workplace) -> None:
    ended = place(*arguments)
    assert ended.code == 0
    assert "imagemill" in ended.out
    assert ended.err == ""
