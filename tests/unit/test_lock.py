"""The lock of an output folder leaves no trace of a run that left nothing, and takes no folder from under another run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import imagemill
from imagemill import lock
from imagemill.errors import FolderInUseError
from imagemill.lock import LOCK_NAME, FolderLock

SOURCES = str(Path(imagemill.__file__).parents[1])
CROWD = """
import sys
from pathlib import Path
from imagemill.errors import FolderInUseError
from imagemill.lock import FolderLock
out, mark = Path(sys.argv[1]), Path(sys.argv[1] + ".alone")
for turn in range(int(sys.argv[2])):
    try:
        held = FolderLock(out)
    except FolderInUseError:
        continue
    mark.open("x").close()  # fails where two hold the lock
    assert (out / ".imagemill.lock").is_file()
    mark.unlink()
    held.close()
"""


def once(call: Callable[[], object]) -> Callable[..., None]:
    """Does it when called for the first time, whatever it is called with."""
    left = [call]

    def called(*_: Any) -> None:
        if left:
            left.pop()()

    return called


def in_use(path: Path) -> bool:
    try:
        FolderLock(path, create=False).close()
    except FolderInUseError:
        return True
    return False


def test_a_folder_in_which_nothing_was_left_goes_with_those_above_it(tmp_path: Path) -> None:
    FolderLock(tmp_path / "a" / "b" / "c").close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["a/b/picture.png", "a/picture.png"])
def test_a_folder_that_holds_anything_stays(left: str, tmp_path: Path) -> None:
    held = FolderLock(tmp_path / "a" / "b")
    (tmp_path / left).touch()
    held.close()
    assert (tmp_path / left).exists()
    assert (tmp_path / "a" / "b").exists() == (left == "a/b/picture.png")


def test_a_folder_that_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    FolderLock(tmp_path / "out").close()
    assert (tmp_path / "out").is_dir()


def test_a_run_that_is_refused_because_of_another_removes_nothing(tmp_path: Path) -> None:
    first = FolderLock(tmp_path / "out")
    assert in_use(tmp_path / "out")
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_NAME]
    first.close()


def test_who_waits_for_a_folder_that_is_removed_makes_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FolderLock(tmp_path / "out")
    monkeypatch.setattr(lock.time, "sleep", once(first.close))
    second = FolderLock(tmp_path / "out")
    assert (tmp_path / "out" / LOCK_NAME).read_text() == str(os.getpid())
    assert in_use(tmp_path / "out")
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_goes_before_its_lock_is_there_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "crash_point", once(lambda: shutil.rmtree(tmp_path / "out")))
    held = FolderLock(tmp_path / "out")
    assert in_use(tmp_path / "out")
    held.close()


def test_a_folder_is_not_removed_from_under_a_run_that_has_just_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has made a lock file of its own, as the old one was gone, and waits for the folder."""
    first, remove = FolderLock(tmp_path / "out"), Path.unlink
    came: list[FolderLock] = []

    def unlink(path: Path) -> None:
        remove(path)
        monkeypatch.setattr(lock.time, "sleep", once(first._release))
        came.append(FolderLock(tmp_path / "out"))

    monkeypatch.setattr(Path, "unlink", unlink)
    first.close()
    monkeypatch.undo()
    assert len(came) == 1
    assert in_use(tmp_path / "out")
    came[0].close()


def test_a_folder_that_cannot_be_made_is_an_error_and_no_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []

    def gone(path: Path) -> list[Path]:
        tried.append(path)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(lock, "make", gone)
    with pytest.raises(FileNotFoundError):
        FolderLock(Path("out"))
    assert len(tried) == lock.TRIES


def test_a_folder_that_goes_again_and_again_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "crash_point", lambda _: shutil.rmtree(tmp_path / "out"))
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path / "out")


def test_of_a_crowd_that_makes_and_removes_one_folder_never_two_hold_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CROWD, str(tmp_path / "deep" / "out"), "200"]
    (tmp_path / "deep").mkdir()
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    crowd = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [one.communicate(timeout=120)[1] for one in crowd] == [""] * 4
