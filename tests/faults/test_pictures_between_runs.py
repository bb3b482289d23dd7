"""Whatever befalls the output folder between two runs: what is lost is made again, nothing outside the folder is touched.

Pictures deleted, cut short, emptied, altered, swapped or replaced by a link are in end_to_end/test_resume.py, one at a time.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checks import after

from command import until
from imagemill import Engine
from imagemill.errors import InputError
from workplace import rows

COUNT = 12
SEED = 20250713
TEMPORARY = ".imagemill-0-1-0123456789ab.part"


@pytest.fixture
def outside(place: Any) -> Path:
    """A folder of precious things beside the output folder."""
    folder = Path(place.folder / "outside")
    folder.mkdir()
    (folder / "precious").write_bytes(b"precious")
    (folder / TEMPORARY).write_bytes(b"half of another run's picture")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def befall(path: Path, dice: random.Random, outside: Path) -> None:
    """One of the things that happen to files."""
    match dice.choice(["gone", "cut", "empty", "altered", "noise", "link", "dangling", "pipe"]):
        case "gone":
            path.unlink()
        case "cut":
            os.truncate(path, dice.randrange(path.stat().st_size))
        case "empty":
            path.write_bytes(b"")
        case "altered":
            data = bytearray(path.read_bytes())
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            path.write_bytes(data)
        case "noise":
            path.write_bytes(dice.randbytes(path.stat().st_size))
        case "link":
            path.unlink()
            path.symlink_to(outside / "precious")
        case "dangling":
            path.unlink()
            path.symlink_to(outside / "nothing")
        case "pipe":
            path.unlink()
            os.mkfifo(path)


def test_whatever_befalls_many_pictures_only_those_are_made_again(
    place: Any, outside: Path, golden: Mapping[str, str]
) -> None:
    dice = random.Random(SEED)
    assert place.fake(place.tasks(rows(COUNT))).code == 0
    precious = contents(outside)
    for _ in range(4):
        pictures = sorted((place.folder / "out").glob("*.png"))
        chosen = dice.sample(pictures, dice.randrange(1, COUNT))
        kept = {path: path.stat().st_mtime_ns for path in pictures if path not in chosen}
        for path in chosen:
            befall(path, dice, outside)
        ended = place.fake("tasks.jsonl")
        assert ended.code == 0, ended.text
        assert f"{COUNT} done ({len(chosen)} in this run" in ended.out
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        after(place, ended, golden=golden)
        assert contents(outside) == precious


def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_is_whole(place: Any, outside: Path) -> None:
    assert place.fake(place.tasks(rows(3))).code == 0
    lock = place.folder / "out" / ".imagemill.lock"
    lock.unlink()
    lock.symlink_to(outside / "precious")
    ended = place.fake("tasks.jsonl")
    assert ended.code == 2, ended.text
    assert len(ended.err.splitlines()) == 1
    assert (outside / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("logs", ""),
        ("logs", "not there"),
        ("logs/driver.log", "precious"),
        ("logs/worker-1.log", "precious"),
        ("trace.json", "precious"),
        (".imagemill-sources", ""),
        (".imagemill-downloads", ""),
    ],
)
def test_what_a_run_writes_beside_its_pictures_goes_through_no_link_out_of_the_folder(
    link: str, target: str, place: Any, outside: Path
) -> None:
    precious = contents(outside)
    at = place.folder / "out" / link
    at.parent.mkdir(parents=True)
    at.symlink_to(outside / target)
    with Engine(model="fake", workers=2, trace=True) as engine:
        with pytest.raises(InputError, match=f"out/{link}: is a link that leads out of the output folder; remove it"):
            list(engine.run(rows(2), place.folder / "out"))
        assert contents(outside) == precious
        at.unlink()
        if target == "not there":
            assert all(outcome.ok for outcome in engine.run(rows(2), place.folder / "out"))


def test_links_that_stay_inside_the_folder_or_lead_where_the_settings_say_are_followed(
    place: Any, outside: Path
) -> None:
    (place.folder / "out" / "mine").mkdir(parents=True)
    (place.folder / "out" / "logs").symlink_to("mine")
    (place.folder / "linked").symlink_to(outside)
    for name, settings in (("out", {}), ("other", {"logging.folder": str(place.folder / "linked")})):
        with Engine(model="fake", **settings) as engine:
            assert all(outcome.ok for outcome in engine.run(rows(2), place.folder / name))
    assert (place.folder / "out" / "mine" / "driver.log").exists()
    assert (outside / "driver.log").exists()


def test_a_temporary_name_that_is_a_link_is_removed_and_not_written_through(
    place: Any, outside: Path, golden: Mapping[str, str]
) -> None:
    out = place.folder / "out"
    running = place.start_fake(place.tasks(rows(COUNT, delay=600)))
    until(lambda: (out / "logs" / "worker-0.log").exists())
    running.end()
    for position, fingerprint in place.ledger("SELECT position, fingerprint FROM tasks"):
        (out / f".imagemill-{position}-1-{fingerprint[:12]}.part").symlink_to(outside / "precious")
    precious = contents(outside)
    ended = place.fake(place.tasks(rows(COUNT)))
    assert ended.code == 0, ended.text
    after(place, ended, golden=golden)
    assert contents(outside) == precious


@pytest.mark.parametrize("same", [True, False], ids=["the same source", "another source"])
def test_a_folder_that_has_become_a_link_is_neither_written_nor_swept(same: bool, place: Any, outside: Path) -> None:
    """Half a run into `deep/`; the folder then leads to another run's, with that run's temporary files."""
    running = place.start_fake(place.tasks([{**row, "output_path": f"deep/{row['id']}.png"} for row in rows(3, 600)]))
    until(lambda: (place.folder / "out" / "logs" / "worker-0.log").exists())
    running.end()
    assert len(place.ledger("SELECT id FROM tasks WHERE state = 'pending'")) == 3
    shutil.rmtree(place.folder / "out" / "deep", ignore_errors=True)
    (place.folder / "out" / "deep").symlink_to(outside)
    precious = contents(outside)
    if not same:
        place.tasks([{"id": "other", "prompt": "b"}])
    ended = place.fake("tasks.jsonl")
    assert ended.code == (2 if same else 0), ended.text
    assert contents(outside) == precious
