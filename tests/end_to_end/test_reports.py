"""The commands beside `run`: report, plan, models, doctor. They start no worker; all but report write nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workplace import Workplace

FILES = ("results.jsonl", "report.json", "report.md", "report.html")
ROWS: list[dict[str, Any]] = [
    {"id": "owl", "prompt": "an owl <b>at</b> night", "seed": 7, "mood": "calm"},
    {"id": "volcano", "prompt": "a volcano", "fake": {"fail": "bad_task"}},
    {"id": "street", "prompt": "巴黎的一条街", "output_path": "album/street.png"},
    {"id": "crash", "prompt": "a crash", "fake": {"crash": "kill", "crash_attempts": 1}},
]


@pytest.fixture
def done(place: Workplace) -> Workplace:
    """A run with a done, a failed and a twice tried task, and a bad row."""
    place.tasks([*ROWS, {"prompt": 7}])
    assert place.fake("tasks.jsonl", "out", "--workers", "2", "--skip-bad").code == 1
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_rebuilds_its_files_from_the_ledger_alone(done: Workplace) -> None:
    out = done.folder / "out"
    before = {name: (out / name).read_bytes() for name in FILES}
    for name in FILES:
        (out / name).unlink()
    ended = done("report", "out")
    assert ended.code == 0, ended.text
    assert ended.out.split() == [str(Path("out") / name) for name in FILES]
    assert {name: (out / name).read_bytes() for name in FILES} == before


def test_report_needs_no_picture_no_log_and_no_source(done: Workplace) -> None:
    out = done.folder / "out"
    before = (out / "results.jsonl").read_bytes()
    for path in [*out.rglob("*.png"), *(out / "logs").iterdir(), done.folder / "tasks.jsonl"]:
        path.unlink()
    ended = done("report", "out")
    assert ended.code == 0, ended.text
    assert (out / "results.jsonl").read_bytes() == before


def test_results_hold_a_line_a_task_with_all_that_is_known(done: Workplace) -> None:
    owl, volcano, street, crash = done.results()
    assert (owl["state"], owl["path"], owl["seed"], owl["metadata"]) == ("done", "owl.png", 7, {"mood": "calm"})
    assert len(owl["sha256"]) == len(owl["fingerprint"]) == 64
    assert (volcano["state"], volcano["kind"], volcano["sha256"]) == ("failed", "bad_task", None)
    assert (street["path"], street["prompt"]) == ("album/street.png", "巴黎的一条街")
    assert (crash["state"], crash["attempts"]) == ("done", 2)


def test_the_page_is_one_file_that_needs_no_network_and_shows_everything(done: Workplace) -> None:
    page = (done.folder / "out" / "report.html").read_text("utf-8")
    assert "an owl &lt;b&gt;at&lt;/b&gt; night" in page
    assert "<b>at</b>" not in page
    for words in ("巴黎的一条街", "bad_task", "album/street.png", "tasks.jsonl, line 5", "worker"):
        assert words in page
    for remote in ('src="http', "src='http", 'href="http', "@import", "<link", "url(http"):
        assert remote not in page
    data = json.loads((done.folder / "out" / "report.json").read_text("utf-8"))
    assert "tasks.jsonl, line 5" in json.dumps(data)
    text = (done.folder / "out" / "report.md").read_text("utf-8")
    assert "bad_task" in text
    assert "line 5" in text


def test_report_of_a_run_that_died_shows_what_there_is(place: Workplace) -> None:
    load = '{"fail": "crash"}'
    assert place.fake(place.tasks(ROWS), "out", "--isolate", IMAGEMILL_FAKE_LOAD=load).code == 1
    ended = place("report", "out")
    assert ended.code == 0, ended.text
    assert set(place.states().values()) == {"pending"}


# --- models and doctor ------------------------------------------------------------------------------------------------


def test_models_lists_the_known_ones_with_family_size_and_memory(place: Workplace) -> None:
    ended = place("models")
    assert ended.code == 0, ended.text
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line.strip()}
    assert "z_image" in lines["tiny"]
    assert "z_image" in lines["z-image-turbo"]
    assert "GiB" in ended.out
    assert "Tongyi-MAI/Z-Image-Turbo" in ended.out
    for name in ("sdxl", "qwen-image", "flux.1-dev", "sd3.5-large"):
        assert name in lines
    assert list(place.folder.iterdir()) == []


def test_doctor_says_what_the_machine_has(place: Workplace) -> None:
    ended = place("doctor")
    assert ended.code in (0, 1), ended.text  # 1 where something is wrong with this machine
    assert "Traceback" not in ended.text
    for words in ("Python", "CPU cores", "Memory", "NVIDIA driver", "torch", "diffusers"):
        assert words in ended.out
    assert list(place.folder.iterdir()) == []


# --- plan -------------------------------------------------------------------------------------------------------------

PLANS = pytest.mark.parametrize("command", [("plan",), ("run", "--dry-run")], ids=["plan", "dry-run"])


@PLANS
def test_a_plan_starts_no_worker_and_writes_nothing(command: tuple[str, ...], place: Workplace) -> None:
    place.tasks([{"prompt": f"prompt {number}", "fake": {"delay": 600}} for number in range(9)])
    ended = place(*command, "tasks.jsonl", "--out", "out", "--model", "fake", "--workers", "2")
    assert ended.code == 0, ended.text
    assert "9" in ended.out
    for words in ("fake", "16x16", "dynamic", "static", "lockstep"):
        assert words in ended.out
    assert [path.name for path in place.folder.iterdir()] == ["tasks.jsonl"]


@PLANS
def test_a_plan_of_the_real_kind_of_model_imports_no_torch(command: tuple[str, ...], place: Workplace) -> None:
    place.tasks([{"prompt": "a"}, {"prompt": "b", "size": "128x64"}])
    place.write("torch.py", "raise SystemExit('torch was imported')\n")
    ended = place(*command, "tasks.jsonl", "--model", "tiny", "--size", "64x64", "--steps", "2", "--device", "cpu")
    assert ended.code == 0, ended.text
    for words in ("tiny", "64x64", "128x64"):
        assert words in ended.out
    assert sorted(path.name for path in place.folder.iterdir()) == ["tasks.jsonl", "torch.py"]


@PLANS
def test_a_plan_of_a_folder_that_has_begun_changes_nothing_in_it(command: tuple[str, ...], place: Workplace) -> None:
    rows = [{"prompt": f"prompt {number}"} for number in range(6)]
    assert place.fake(place.tasks(rows[:4])).code == 0
    place.tasks(rows)
    before = contents(place.folder)
    ended = place(*command, "tasks.jsonl", "--out", "out", "--model", "fake")
    assert ended.code == 0, ended.text
    assert "4" in ended.out
    after = contents(place.folder)
    shared_memory = "out/ledger.sqlite-shm"  # of SQLite; who reads a ledger may touch it
    assert {name: data for name, data in after.items() if not name.startswith(shared_memory)} == {
        name: data for name, data in before.items() if not name.startswith(shared_memory)
    }
    assert "6 done (2 in this run" in place.fake("tasks.jsonl").out


@PLANS
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": 7}, "line 1: prompt"),
        ({"prompt": "a", "lora_path": "gone.safetensors"}, "gone.safetensors"),
        ({"prompt": "a", "output_path": "../x.png"}, "line 1: output_path"),
    ],
)
def test_a_plan_refuses_what_a_run_would_refuse(
    command: tuple[str, ...], row: dict[str, Any], words: str, place: Workplace
) -> None:
    ended = place(*command, place.tasks([row]), "--out", "out", "--model", "tiny")
    assert ended.code == 2, ended.text
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert [path.name for path in place.folder.iterdir()] == ["tasks.jsonl"]


def test_a_plan_says_that_tasks_have_changed(place: Workplace) -> None:
    assert place.fake(place.tasks([{"id": "a", "prompt": "old"}])).code == 0
    ended = place("plan", place.tasks([{"id": "a", "prompt": "new"}]), "--out", "out", "--model", "fake")
    assert ended.code == 2
    assert "'old' -> 'new'" in ended.err
