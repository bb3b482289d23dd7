"""The same command in the same folder does what is left, and only that; and a run can be stopped at any time."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import until
from workplace import Workplace

ROWS: list[dict[str, Any]] = [{"id": f"t{number}", "prompt": f"prompt {number}"} for number in range(6)]


def slowly(delay: float, count: int = 6) -> list[dict[str, Any]]:
    """The same tasks as `ROWS`, and more; a delay does not change a picture."""
    return [{"id": f"t{number}", "prompt": f"prompt {number}", "fake": {"delay": delay}} for number in range(count)]


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a picture is written anew, even with the same bytes."""
    return {path.name: ((info := path.stat()).st_ino, info.st_mtime_ns) for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def golden(shared_place: Workplace) -> dict[str, str]:
    """The pixels of an unbroken run of twelve."""
    assert shared_place.fake(shared_place.tasks(slowly(0, 12)), "golden").code == 0
    return shared_place.pixels("golden")


@pytest.fixture
def done(place: Workplace) -> Workplace:
    """A folder in which `ROWS` are done."""
    assert place.fake(place.tasks(ROWS)).code == 0
    return place


# --- the same command again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--workers", "2", "--schedule", "lockstep")])
def test_the_same_command_again_makes_no_picture(options: tuple[str, ...], done: Workplace) -> None:
    before, results = inodes(done.folder / "out"), done.results()
    ended = done.fake("tasks.jsonl", "out", *options)
    assert ended.code == 0, ended.text
    assert "6 done (0 in this run" in ended.out
    assert inodes(done.folder / "out") == before
    assert done.results() == results
    assert done.attempts() == {row["id"]: 1 for row in ROWS}


def test_more_tasks_are_added_and_the_known_ones_left_alone(done: Workplace, golden: dict[str, str]) -> None:
    before = inodes(done.folder / "out")
    ended = done.fake(done.tasks(slowly(0, 12)), "out", "--workers", "2")
    assert "12 done (6 in this run" in ended.out
    after = inodes(done.folder / "out")
    assert {name: after[name] for name in before} == before
    assert done.pixels() == golden


def test_metadata_order_and_devices_are_no_other_content(done: Workplace) -> None:
    before = inodes(done.folder / "out")
    rows = [{"note": "new", "seed": 42 + number, **row} for number, row in enumerate(ROWS)]
    ended = done.fake(done.tasks(rows[::-1]), "out", "--workers", "2", "--schedule", "static")
    assert ended.code == 0, ended.text
    assert inodes(done.folder / "out") == before
    assert [(one["id"], one["metadata"]) for one in done.results()] == [
        (row["id"], {"note": "new"}) for row in rows[::-1]
    ]


# --- damaged pictures -------------------------------------------------------------------------------------------------


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def alter(path: Path) -> None:
    """Another content of the same length, with the times it had."""
    info, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def link(path: Path) -> None:
    """A link to the same bytes elsewhere."""
    elsewhere = path.parent.parent / "elsewhere.png"
    elsewhere.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(elsewhere)


def other(path: Path) -> None:
    """The valid picture of another task."""
    path.write_bytes((path.parent / "t0.png").read_bytes())


@pytest.mark.parametrize("damage", [delete, truncate, empty, alter, link, other])
def test_a_damaged_picture_and_only_that_is_made_again(damage: Callable[[Path], None], done: Workplace) -> None:
    picture = done.folder / "out" / "t3.png"
    before, pixels, content = inodes(done.folder / "out"), done.pixels(), picture.read_bytes()
    damage(picture)
    ended = done.fake("tasks.jsonl")
    assert ended.code == 0, ended.text
    assert "6 done (1 in this run" in ended.out
    assert not picture.is_symlink()
    assert done.pixels() == pixels
    after = inodes(done.folder / "out")
    assert {name for name in before if after[name] != before[name]} == {"t3.png"}
    if damage is link:
        assert (done.folder / "elsewhere.png").read_bytes() == content


def test_a_folder_of_pictures_that_is_gone_is_made_again(place: Workplace) -> None:
    place.tasks([{**row, "output_path": f"deep/er/{row['id']}.png"} for row in ROWS])
    assert place.fake("tasks.jsonl").code == 0
    before = place.pixels()
    for path in (place.folder / "out" / "deep" / "er").iterdir():
        path.unlink()
    (place.folder / "out" / "deep" / "er").rmdir()
    assert place.fake("tasks.jsonl", "out", "--workers", "2").code == 0
    assert place.pixels() == before


def test_a_folder_swapped_for_a_link_to_elsewhere_is_not_followed(place: Workplace) -> None:
    place.tasks([{**row, "output_path": f"deep/{row['id']}.png"} for row in ROWS])
    assert place.fake("tasks.jsonl").code == 0
    (place.folder / "out" / "deep").rename(place.folder / "moved")
    (place.folder / "out" / "deep").symlink_to(place.folder / "moved")
    (place.folder / "moved" / "t1.png").unlink()
    ended = place.fake("tasks.jsonl")
    assert ended.code == 2
    assert "link" in ended.err
    assert not (place.folder / "moved" / "t1.png").exists()


# --- failed tasks -----------------------------------------------------------------------------------------------------

FAILING: list[dict[str, Any]] = [
    {"id": "good", "prompt": "a"},
    {"id": "bad", "prompt": "b", "fake": {"fail": "bad_task"}},
    {"id": "nan", "prompt": "c", "fake": {"nan": True}},
]


@pytest.fixture
def failed(place: Workplace) -> Workplace:
    """A folder in which two tasks have failed, and a source in which they no longer would."""
    assert place.fake(place.tasks(FAILING)).code == 1
    assert place.states() == {"good": "done", "bad": "failed", "nan": "failed"}
    place.tasks([{key: value for key, value in row.items() if key != "fake"} for row in FAILING])
    return place


def test_failed_tasks_stay_failed(failed: Workplace) -> None:
    ended = failed.fake("tasks.jsonl")
    assert ended.code == 1
    assert "2 failed" in ended.out
    assert failed.attempts() == {"good": 1, "bad": 1, "nan": 2}


@pytest.mark.parametrize(
    "option",
    [
        "--retry-failed",
        "--retry-failed=all",
        "--retry-failed=bad_task,bad_output",
        "--retry-failed bad_task,bad_output",
    ],
)
def test_retry_failed_tries_all_of_them_again(option: str, failed: Workplace) -> None:
    before = inodes(failed.folder / "out")["good.png"]
    ended = failed.fake("tasks.jsonl", "out", *option.split())
    assert ended.code == 0, ended.text
    assert set(failed.states().values()) == {"done"}
    assert [one["kind"] for one in failed.results()] == [None] * 3
    assert inodes(failed.folder / "out")["good.png"] == before


def test_retry_failed_with_a_kind_tries_that_kind_alone(failed: Workplace) -> None:
    ended = failed.fake("tasks.jsonl", "out", "--retry-failed=bad_output")
    assert ended.code == 1
    assert failed.states() == {"good": "done", "bad": "failed", "nan": "done"}


def test_retry_failed_before_the_source_does_not_swallow_it(failed: Workplace) -> None:
    ended = failed("run", "--retry-failed", "tasks.jsonl", "--out", "out", "--model", "fake")
    assert ended.code == 0, ended.text


# --- changed tasks ----------------------------------------------------------------------------------------------------

CHANGED = [{**row, "prompt": "another"} if row["id"] == "t2" else row for row in ROWS]


def test_changed_tasks_stop_with_a_diff_and_change_nothing(done: Workplace) -> None:
    before, results = inodes(done.folder / "out"), done.results()
    ended = done.fake(done.tasks(CHANGED))
    assert ended.code == 2
    assert "1 tasks changed" in ended.err or "1 task changed" in ended.err
    assert "line 3" in ended.err
    assert "'t2'" in ended.err
    assert "prompt: 'prompt 2' -> 'another'" in ended.err
    assert "--rerun-changed" in ended.err
    assert "Traceback" not in ended.err
    assert inodes(done.folder / "out") == before
    assert done("report", "out").code == 0
    assert done.results() == results


@pytest.mark.parametrize(
    ("options", "field"),
    [(("--steps", "3"), "steps: 1 -> 3"), (("--size", "32x32"), "width: 16 -> 32"), (("--seed", "5"), "seed: 44 -> 7")],
)
def test_other_settings_are_other_content(options: tuple[str, ...], field: str, done: Workplace) -> None:
    ended = done.fake("tasks.jsonl", "out", *options)
    assert ended.code == 2
    assert "6 tasks changed" in ended.err
    assert field in ended.err


def test_another_format_under_old_ids_is_a_change_of_the_path(done: Workplace) -> None:
    ended = done.fake("tasks.jsonl", "out", "--format", "webp")
    assert ended.code == 2
    assert "output_path: 't0.png' -> 't0.webp'" in ended.err


def test_rerun_changed_makes_them_and_only_them_again(done: Workplace) -> None:
    before, pixels = inodes(done.folder / "out"), done.pixels()
    ended = done.fake(done.tasks(CHANGED), "out", "--rerun-changed")
    assert ended.code == 0, ended.text
    assert "6 done (1 in this run" in ended.out
    after = inodes(done.folder / "out")
    assert {name for name in before if after[name] != before[name]} == {"t2.png"}
    assert done.results()[2]["prompt"] == "another"
    assert done.pixels()["t2.png"] != pixels["t2.png"]
    again = done.fake("tasks.jsonl")
    assert "6 done (0 in this run" in again.out


STEPS = ("--steps", "2", "--rerun-changed")


def test_a_change_that_is_stopped_while_workers_load_takes_no_picture_away(done: Workplace) -> None:
    before, results = inodes(done.folder / "out"), done.results()
    load = json.dumps({"delay": 600})
    running = done.start_fake("tasks.jsonl", "out", "--workers", "2", *STEPS, IMAGEMILL_FAKE_LOAD=load)
    until(lambda: len(running.children()) == 2)
    running.signal(signal.SIGINT)
    stopped = running.wait()
    assert stopped.code == 130
    assert "6 older pictures of these tasks stay in out: t0.png" in stopped.out
    assert set(done.states().values()) == {"pending"}
    for options in ((), ("--rerun-changed",)):
        assert "6 pictures, 0 to do" in done.fake("tasks.jsonl", "out", "--dry-run", *options).out
    assert "6 pictures, 6 to do" in done.fake("tasks.jsonl", "out", "--dry-run", *STEPS).out
    back = done.fake("tasks.jsonl")
    assert back.code == 0, back.text
    assert "6 done (0 in this run" in back.out
    assert inodes(done.folder / "out") == before
    assert done.results() == results


def test_of_a_change_that_is_broken_off_only_the_new_pictures_are_made_again(done: Workplace) -> None:
    before, pixels = inodes(done.folder / "out"), done.pixels()
    # One picture has the other's name, and is not booked: it is not the one that the ledger speaks of.
    died = done.fake("tasks.jsonl", "out", *STEPS, IMAGEMILL_CRASH_AT="after-rename:2")
    assert died.code == -signal.SIGKILL
    replaced = {name for name, now in inodes(done.folder / "out").items() if now != before[name]}
    assert len(replaced) == 2
    assert "6 pictures, 2 to do" in done.fake("tasks.jsonl", "out", "--dry-run", "--rerun-changed").out
    refused = done.fake("tasks.jsonl")
    assert refused.code == 2
    assert "2 tasks changed" in refused.err
    back = done.fake("tasks.jsonl", "out", "--rerun-changed")
    assert back.code == 0, back.text
    assert "6 done (2 in this run" in back.out
    after = inodes(done.folder / "out")
    assert {name for name in before if after[name] != before[name]} == replaced
    assert done.pixels() == pixels


def test_pictures_that_stay_under_their_old_names_are_told_until_they_are_gone(done: Workplace) -> None:
    before = inodes(done.folder / "out")
    jpg = ("--format", "jpg", "--rerun-changed")
    plan = done.fake("tasks.jsonl", "out", "--dry-run", *jpg).out
    assert "6 of them under another name: the old pictures stay" in plan
    told = (
        "6 older pictures of these tasks stay in out: t0.png, t1.png, t2.png and 3 more; going back to what made them"
    )
    assert told in done.fake("tasks.jsonl", "out", *jpg).out
    assert inodes(done.folder / "out") == before
    for name in ("t0.png", "t2.png", "t3.png", "t4.png", "t5.png"):
        (done.folder / "out" / name).unlink()
    assert "1 older picture of these tasks stays in out: t1.png;" in done.fake("tasks.jsonl", "out", *jpg).out
    back = done.fake("tasks.jsonl", "out", "--rerun-changed").out
    assert "6 done (5 in this run" in back
    assert "6 older pictures of these tasks stay in out: t0.jpg, t1.jpg" in back
    for name in before:
        (done.folder / "out" / name).with_suffix(".jpg").unlink()
    assert "older" not in done.fake("tasks.jsonl").out


def test_two_changed_tasks_may_swap_their_paths(place: Workplace) -> None:
    first = [{"id": "a", "prompt": "x", "output_path": "1.png"}, {"id": "b", "prompt": "y", "output_path": "2.png"}]
    assert place.fake(place.tasks(first)).code == 0
    before = place.pixels()
    swapped = [{**first[0], "output_path": "2.png"}, {**first[1], "output_path": "1.png"}]
    # Without a seed the picture depends on the row's place, which stays.
    assert place.fake(place.tasks(swapped)).code == 2
    assert place.fake("tasks.jsonl", "out", "--rerun-changed").code == 0
    assert place.pixels() == {"1.png": before["2.png"], "2.png": before["1.png"]}


# --- two runs ---------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_is_not_disturbed(place: Workplace) -> None:
    first = place.start_fake(place.tasks(slowly(0.5, 4)))
    until(lambda: any((place.folder / "out").glob("*.png")))
    second = place.fake("tasks.jsonl")
    assert second.code == 2
    assert f"pid {first.pid}" in second.err
    assert "--out" in second.err
    assert "Traceback" not in second.err
    assert place.fake("tasks.jsonl", "other").code == 0
    assert first.wait().code == 0
    assert place.pixels() == place.pixels("other")
    assert place.fake("tasks.jsonl").code == 0


def test_a_report_can_be_made_while_a_run_goes_on(place: Workplace) -> None:
    running = place.start_fake(place.tasks(slowly(0.5, 4)))
    until(lambda: any((place.folder / "out").glob("*.png")))
    ended = place("report", "out")
    assert ended.code == 0, ended.text
    assert set(place.states().values()) == {"done", "pending"}
    assert running.wait().code == 0


# --- signals ----------------------------------------------------------------------------------------------------------

CREWS = pytest.mark.parametrize("crew", [(), ("--workers", "2")], ids=["inline", "processes"])


def assert_nothing_is_left(place: Workplace) -> None:
    assert place.leftovers() == []
    (running,) = place.started
    assert running.family() == []


@CREWS
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_the_first_signal_finishes_what_is_in_flight_and_starts_nothing_more(
    number: signal.Signals,
    code: int,
    crew: tuple[str, ...],
    place: Workplace,
    golden: dict[str, str],
) -> None:
    running = place.start_fake(place.tasks(slowly(0.8, 12)), "out", *crew)
    until(lambda: any((place.folder / "out").glob("*.png")))  # the next ones are in flight
    running.signal(number)
    ended = running.wait()
    assert ended.code == code, ended.text
    assert "Traceback" not in ended.err
    assert "stopping" in ended.err
    assert "not reached; the same command goes on" in ended.out
    assert_nothing_is_left(place)
    states = list(place.states().values())
    assert set(states) == {"done", "pending"}
    assert states.count("done") >= 2
    assert len(place.pixels()) == states.count("done")
    assert len(place.attempts()) == states.count("done")
    again = place.fake(place.tasks(slowly(0, 12)), "out", *crew)
    assert again.code == 0, again.text
    assert place.pixels() == golden
    assert set(place.attempts().values()) == {1}


@CREWS
def test_the_second_signal_stops_at_once(crew: tuple[str, ...], place: Workplace, golden: dict[str, str]) -> None:
    rows = slowly(0, 12)
    for row in rows[4:]:
        row["fake"] = {"delay": 600}
    running = place.start_fake(place.tasks(rows), "out", *crew, "--schedule", "static")
    until(lambda: len(list((place.folder / "out").glob("*.png"))) == 4)
    running.signal(signal.SIGINT)
    until(lambda: "stopping" in running.err)
    running.signal(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130, ended.text
    assert "Traceback" not in ended.err
    assert_nothing_is_left(place)
    assert list(place.states().values()) == ["done"] * 4 + ["pending"] * 8
    assert place.fake(place.tasks(slowly(0, 12)), "out", *crew).code == 0
    assert place.pixels() == golden


def test_a_signal_while_workers_load_ends_the_run(place: Workplace) -> None:
    running = place.start_fake(
        place.tasks(ROWS), "out", "--workers", "2", IMAGEMILL_FAKE_LOAD=json.dumps({"delay": 600})
    )
    until(lambda: len(running.children()) == 2)
    running.signal(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130, ended.text
    assert_nothing_is_left(place)
    assert place.fake("tasks.jsonl").code == 0
