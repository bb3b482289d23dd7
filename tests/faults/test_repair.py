"""`imagemill repair`: a ledger rebuilt from the pictures' own metadata, after which the same command does what is left."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from checks import after
from PIL import Image

from command import until
from imagemill.errors import FolderInUseError, InputError
from imagemill.publish import OutputFolder
from imagemill.repair import Repair, repair, summary
from workplace import rows

COUNT = 8


@pytest.fixture(scope="module")
def template(shared_place: Any) -> Path:
    """An output folder in which eight tasks are done."""
    assert shared_place.fake(shared_place.tasks(rows(COUNT))).code == 0
    return Path(shared_place.folder / "out")


@pytest.fixture
def made(place: Any, template: Path) -> Any:
    """A workplace with a copy of it, and with its tasks."""
    place.tasks(rows(COUNT))
    shutil.copytree(template, place.folder / "out")
    return place


def times(place: Any) -> dict[str, tuple[int, int]]:
    """What changes when a picture is written anew."""
    return {
        path.name: ((info := path.stat()).st_ino, info.st_mtime_ns) for path in (place.folder / "out").glob("*.png")
    }


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the lock's."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".imagemill.lock"
    }


def cut(path: Path) -> None:
    os.truncate(path, 5000)


def another_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE meta SET value = '99'")


def garbage(path: Path) -> None:
    path.write_bytes(b"this was a ledger once " * 500)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    path.unlink()


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.sqlite")
    path.symlink_to(path.parent.parent / "elsewhere.sqlite")


# --- what it mends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [cut, another_version, garbage, emptied, gone, linked])
def test_after_a_repair_the_same_command_makes_no_picture_again(
    damage: Callable[[Path], None], made: Any, golden: Mapping[str, str]
) -> None:
    ledger = made.folder / "out" / "ledger.sqlite"
    damage(ledger)
    damaged = ledger.read_bytes() if ledger.exists() else b""
    before = times(made)
    refused = made.fake("tasks.jsonl")
    assert refused.code == 2, refused.text
    assert "Traceback" not in refused.err
    mended = made("repair", "out")
    assert mended.code == 0, mended.text
    assert f"{COUNT} rebuilt, 0 unreadable, 0 foreign" in mended.out
    if damaged:
        assert (made.folder / "out" / "ledger.damaged-1.sqlite").read_bytes() == damaged
    ended = made.fake("tasks.jsonl")
    assert ended.code == 0, ended.text
    assert f"{COUNT} done (0 in this run" in ended.out
    assert times(made) == before
    after(made, ended, golden=golden, ids=[f"t{number}" for number in range(COUNT)])


@pytest.mark.parametrize("form", ["jpg", "webp"])
def test_pictures_of_every_format_tell_their_task(form: str, place: Any) -> None:
    place.tasks([{**row, "prompt": "Straße, 雨, \U0001f327", "seed": 2**62} for row in rows(3)])
    assert place.fake("tasks.jsonl", "out", "--format", form).code == 0
    garbage(place.folder / "out" / "ledger.sqlite")
    assert repair(place.folder / "out").rebuilt == 3
    ended = place.fake("tasks.jsonl", "out", "--format", form)
    assert ended.code == 0, ended.text
    assert "3 done (0 in this run" in ended.out


def test_what_is_left_after_a_repair_is_done_and_only_that(made: Any, golden: Mapping[str, str]) -> None:
    out = made.folder / "out"
    garbage(out / "ledger.sqlite")
    os.truncate(out / "t3.png", (out / "t3.png").stat().st_size - 30)
    (out / "t5.png").unlink()
    before = times(made)
    mended = made("repair", "out")
    assert mended.code == 1, mended.text
    assert f"{COUNT - 2} rebuilt, 1 unreadable, 0 foreign" in mended.out
    assert "unreadable: t3.png: the file does not decode" in mended.out
    assert times(made) == before
    ended = made.fake("tasks.jsonl")
    assert ended.code == 0, ended.text
    assert f"{COUNT} done (2 in this run" in ended.out
    later = times(made)
    assert {name for name in later if later[name] != before.get(name)} == {"t3.png", "t5.png"}
    after(made, ended, golden=golden)


def test_the_rebuilt_ledger_makes_the_reports(made: Any) -> None:
    before = {one["id"]: (one["sha256"], one["bytes"], one["prompt"], one["fingerprint"]) for one in made.results()}
    garbage(made.folder / "out" / "ledger.sqlite")
    assert made("repair", "out").code == 0
    ended = made("report", "out")
    assert ended.code == 0, ended.text
    told = {one["id"]: (one["sha256"], one["bytes"], one["prompt"], one["fingerprint"]) for one in made.results()}
    assert told == before
    # how long they took nobody knows any more
    summary = json.loads((made.folder / "out" / "report.json").read_text("utf-8"))
    assert [group["mean_seconds"] for group in summary["models"]] == [None]


def test_each_damaged_ledger_is_kept_under_a_name_of_its_own(made: Any) -> None:
    out = made.folder / "out"
    for number in (1, 2):
        (out / "ledger.sqlite").write_bytes(b"damage %d" % number * 200)
        (out / "ledger.sqlite-wal").write_bytes(b"its log %d" % number)
        assert repair(out).kept == out / f"ledger.damaged-{number}.sqlite"
    for number in (1, 2):
        assert (out / f"ledger.damaged-{number}.sqlite").read_bytes() == b"damage %d" % number * 200
        assert (out / f"ledger.damaged-{number}.sqlite-wal").read_bytes() == b"its log %d" % number
    assert not (out / "ledger.sqlite-wal").exists()


# --- what it leaves alone ---------------------------------------------------------------------------------------------


def test_a_ledger_that_reads_is_left_as_it_is(made: Any) -> None:
    before = contents(made.folder / "out")
    ended = made("repair", "out")
    assert ended.code == 0, ended.text
    assert "reads well" in ended.out
    assert contents(made.folder / "out") == before


@pytest.mark.parametrize("command", ["run", "plan"])
def test_where_the_ledger_is_gone_the_command_names_the_repair_that_brings_it_back(command: str, made: Any) -> None:
    gone(made.folder / "out" / "ledger.sqlite")
    before = contents(made.folder / "out")
    ended = made(command, "tasks.jsonl", "--out", "out", "--model", "fake")
    assert ended.code == 2, ended.text
    assert "the folder's ledger is gone: `imagemill repair out` rebuilds it" in ended.err
    assert contents(made.folder / "out") == before


def test_foreign_pictures_are_not_taken_for_those_of_a_lost_ledger(place: Any) -> None:
    place.write("out/t1.png", b"holiday")
    ended = place.fake(place.tasks(rows(2)))
    assert ended.code == 2, ended.text
    assert "stands there" in ended.err
    assert "repair" not in ended.err


def test_pictures_without_a_task_cannot_be_rebuilt_and_nothing_is_changed(place: Any) -> None:
    assert place.fake(place.tasks(rows(3)), "out", "--no-metadata").code == 0
    garbage(place.folder / "out" / "ledger.sqlite")
    before = contents(place.folder / "out")
    ended = place("repair", "out")
    assert ended.code == 2, ended.text
    assert len(ended.err.splitlines()) == 1
    assert "--no-metadata" in ended.err
    assert "3 without one" in ended.err
    assert "--out" in ended.err
    assert contents(place.folder / "out") == before


def test_a_folder_that_is_not_there_or_in_use_is_refused(made: Any) -> None:
    with pytest.raises(InputError, match="no such folder"):
        repair(made.folder / "gone")
    assert not (made.folder / "gone").exists()
    held = OutputFolder(made.folder / "out")
    garbage(made.folder / "out" / "ledger.sqlite")
    with pytest.raises(FolderInUseError):
        repair(made.folder / "out")
    held.close()


def claim(task: dict[str, Any], fingerprint: object = "0" * 64) -> str:
    return json.dumps({"task": {"width": 16, "height": 16, "steps": 1, "seed": 1, **task}, "fingerprint": fingerprint})


FOREIGN: dict[str, Any] = {
    "no_task.png": None,
    "no_json.png": "{",
    "no_object.png": "[7]",
    "deep.png": "[" * 100_000,
    "other_json.png": json.dumps({"prompt": "of another program"}),
    "no_prompt.png": claim({"id": "x", "output_path": "no_prompt.png"}),
    "no_print.png": claim({"id": "x", "prompt": "a", "output_path": "no_print.png"}, 7),
    "leads_out.png": claim({"id": "x", "prompt": "a", "output_path": "../leads_out.png"}),
    "elsewhere.png": claim({"id": "x", "prompt": "a", "output_path": "deep/elsewhere.png"}),
    "many.png": claim({"id": "x", "prompt": "a", "output_path": "many.png", "num_images": 3}),
}


def written(path: Path, text: str | None) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if text is not None:
        info.add_text("imagemill", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), "red").save(path, "PNG", pnginfo=info)


def test_what_no_run_put_there_is_counted_as_foreign_and_not_touched(made: Any) -> None:
    out = made.folder / "out"
    for name, text in FOREIGN.items():
        written(out / name, text)
    (out / "copy").mkdir()
    (out / "copy" / "t1.png").write_bytes((out / "t1.png").read_bytes())
    (made.folder / "secret.png").write_bytes((out / "t2.png").read_bytes())
    (out / "link.png").symlink_to(made.folder / "secret.png")
    (out / "away").symlink_to(made.folder)
    garbage(out / "ledger.sqlite")
    done = repair(out)
    assert (done.rebuilt, done.unreadable, done.foreign) == (COUNT, 0, len(FOREIGN) + 2)
    named = {line.split(": ")[1] for line in done.lines}
    assert named == {*FOREIGN, "copy/t1.png", "link.png"}
    assert (out / "link.png").is_symlink()
    assert made.fake("tasks.jsonl").code == 0


def test_a_picture_that_tells_nothing_is_named_and_stays(made: Any) -> None:
    out = made.folder / "out"
    (out / "t4.png").write_bytes(b"")
    (out / "t6.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xff" * 500)
    garbage(out / "ledger.sqlite")
    done = repair(out)
    assert (done.rebuilt, done.unreadable, done.in_the_way, done.exit_code) == (COUNT - 2, 2, 2, 1)
    assert "2 of the unreadable" in summary(done)
    assert (out / "t4.png").read_bytes() == b""
    refused = made.fake("tasks.jsonl")
    assert refused.code == 2
    assert "'t4.png'" in refused.err
    for name in ("t4.png", "t6.png"):
        (out / name).rename(made.folder / name)
    ended = made.fake("tasks.jsonl")
    assert ended.code == 0, ended.text
    assert f"{COUNT} done (2 in this run" in ended.out


def test_a_picture_of_another_size_than_its_task_is_made_again(made: Any) -> None:
    out = made.folder / "out"
    with Image.open(out / "t2.png") as image:
        text = image.info["imagemill"]
    (out / "t2.png").unlink()
    written(out / "t2.png", text)
    with Image.open(out / "t2.png") as image:
        image.load()
    Image.new("RGB", (8, 8)).save(out / "t3.png")
    garbage(out / "ledger.sqlite")
    with Image.open(out / "t1.png") as image:
        text = image.info["imagemill"].replace('"width": 16', '"width": 32').replace('"width":16', '"width":32')
    written(out / "t1.png", text)
    done = repair(out)
    assert [line for line in done.lines if line.startswith("unreadable: t1.png")] != []
    assert (done.rebuilt, done.unreadable, done.foreign) == (COUNT - 2, 1, 1)


def test_of_two_pictures_of_one_task_the_newer_counts(made: Any) -> None:
    changed = [{**row, "output_path": "new/place.png"} if row["id"] == "t2" else row for row in rows(COUNT)]
    assert made.fake(made.tasks(changed), "out", "--rerun-changed").code == 0
    garbage(made.folder / "out" / "ledger.sqlite")
    done = repair(made.folder / "out")
    assert (done.rebuilt, done.foreign) == (COUNT, 1)
    assert "t2.png" in done.lines[0]
    ended = made.fake("tasks.jsonl")
    assert ended.code == 0, ended.text
    assert f"{COUNT} done (0 in this run" in ended.out
    back = made.fake(made.tasks(rows(COUNT)), "out")
    assert back.code == 0, back.text
    assert f"{COUNT} done (0 in this run" in back.out, "the older one is still there for who goes back to it"


def test_long_lists_are_counted_whole_and_shown_in_part(tmp_path: Path) -> None:
    from imagemill.repair import SHOWN, Found

    done = Repair(tmp_path)
    for number in range(SHOWN + 5):
        done.note(Found(f"{number}.png", reason="why"))
    assert (done.unreadable, len(done.lines)) == (SHOWN + 5, SHOWN)


# --- when it is disturbed itself --------------------------------------------------------------------------------------


def test_a_repair_that_is_killed_is_done_by_the_next(made: Any, golden: Mapping[str, str]) -> None:
    out = made.folder / "out"
    garbage(out / "ledger.sqlite")
    # As it is between the two renames, and with a draft that was begun.
    (out / "ledger.sqlite").rename(out / "ledger.damaged-1.sqlite")
    (out / ".imagemill-repair.part").write_bytes(b"begun")
    (out / ".imagemill-repair.part-wal").write_bytes(b"begun")
    assert repair(out).rebuilt == COUNT
    assert not list(out.glob(".imagemill-repair*"))
    ended = made.fake("tasks.jsonl")
    assert f"{COUNT} done (0 in this run" in ended.out
    after(made, ended, golden=golden)


def test_a_repair_on_a_disk_that_refuses_changes_nothing(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from imagemill import repair as module
    from imagemill.errors import OutputError
    from imagemill.ledger import Ledger

    class Full(Ledger):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            if self.path.name == module.DRAFT:
                self._db.execute("PRAGMA max_page_count = 1")

    monkeypatch.setattr(module, "Ledger", Full)
    out = made.folder / "out"
    garbage(out / "ledger.sqlite")
    before = contents(out)
    with pytest.raises(OutputError, match="full"):
        repair(out)
    assert contents(out) == before


def test_a_run_that_died_can_be_repaired_too(place: Any, golden: Mapping[str, str]) -> None:
    running = place.start_fake(place.tasks(rows(12, delay=0.3)))
    until(lambda: len(list((place.folder / "out").glob("*.png"))) >= 3)
    running.end()
    garbage(place.folder / "out" / "ledger.sqlite")
    assert place("repair", "out").code == 0
    ended = place.fake(place.tasks(rows(12)))
    assert ended.code == 0, ended.text
    after(place, ended, golden=golden)
