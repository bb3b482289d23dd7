"""The driver's hand on the output folder: one run at a time, whole pictures only, and nothing removed but its own."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

import imagemill
from imagemill.errors import FolderInUseError, InputError
from imagemill.lock import LOCK_NAME
from imagemill.publish import OutputFolder
from imagemill.records import Receipt

SOURCES = str(Path(imagemill.__file__).parents[1])
HOLD = """
import sys
from pathlib import Path
from imagemill.publish import OutputFolder
folder = OutputFolder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def receipt(path: str, temporary: str = ".imagemill-0-1-abc.part") -> Receipt:
    return Receipt(0, 1, 16, 16, temporary=str(Path(path).parent / temporary) if path else "", path=path)


def written(root: Path, one: Receipt, content: bytes = b"picture") -> Receipt:
    (root / one.temporary).parent.mkdir(parents=True, exist_ok=True)
    (root / one.temporary).write_bytes(content)
    return one


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_made_with_all_above_it(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    folder.close()


def test_a_second_run_in_the_same_folder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    first = OutputFolder(tmp_path)
    with pytest.raises(FolderInUseError, match=rf"pid {os.getpid()}\).*--out"):
        OutputFolder(tmp_path)
    first.close()


def test_the_lock_is_free_after_close(tmp_path: Path) -> None:
    first = OutputFolder(tmp_path)
    first.close()
    first.close()
    OutputFolder(tmp_path).close()


def test_a_link_to_the_folder_does_not_lead_around_the_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    first = OutputFolder(tmp_path / "real")
    with pytest.raises(FolderInUseError):
        OutputFolder(tmp_path / "link")
    first.close()


def test_a_look_without_the_lock_disturbs_nobody(tmp_path: Path) -> None:
    first = OutputFolder(tmp_path)
    OutputFolder(tmp_path, exclusive=False).close()
    with pytest.raises(FolderInUseError):
        OutputFolder(tmp_path)
    first.close()


@pytest.mark.parametrize("how", ["kill", "end"])
def test_the_lock_ends_with_its_process_however_that_ends(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=f"pid {holder.pid}"):
            OutputFolder(tmp_path)
        if how == "kill":
            holder.kill()
        else:
            holder.stdin.close()
        holder.wait(60)
    OutputFolder(tmp_path).close()


def test_a_process_started_by_the_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    with subprocess.Popen(["sleep", "600"], close_fds=False) as child:
        folder.close()
        OutputFolder(tmp_path).close()
        child.kill()


def test_a_folder_that_cannot_be_used_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(InputError, match=r"cannot be used as output folder: .*--out") as caught:
            OutputFolder(path)
        assert str(path) in str(caught.value)


# --- publishing -------------------------------------------------------------------------------------------------------


def test_a_published_picture_has_its_name_and_no_other(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    one = written(tmp_path / "out", receipt("deep/cat.png"))
    assert folder.publish(one) == str((tmp_path / "out").resolve() / "deep" / "cat.png")
    assert [place.name for place in (tmp_path / "out" / "deep").iterdir()] == ["cat.png"]
    folder.sync()
    folder.close()


def test_publishing_replaces_an_older_picture_and_a_link_but_never_what_a_link_leads_to(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out" / "old.png").write_text("old")
    (tmp_path / "out" / "link.png").symlink_to(tmp_path / "victim")
    for name in ("old.png", "link.png"):
        folder.publish(written(tmp_path / "out", receipt(name), b"new"))
        assert (tmp_path / "out" / name).read_bytes() == b"new"
        assert stat.S_ISREG((tmp_path / "out" / name).lstat().st_mode)
    assert (tmp_path / "victim").read_text() == "precious"
    folder.close()


def test_a_receipt_without_a_path_publishes_nothing(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    assert folder.publish(receipt("")) == ""
    folder.sync()
    folder.close()
    assert [place.name for place in tmp_path.iterdir()] == [LOCK_NAME]


def test_sync_makes_names_durable_up_to_the_output_folder_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(tmp_path)
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(os.readlink(f"/proc/self/fd/{handle}"))))
    for name in ("a/b/1.png", "a/b/2.png", "3.png"):
        folder.publish(written(tmp_path, receipt(name)))
    folder.sync()
    root = tmp_path.resolve()
    assert sorted(synced) == [root, root / "a", root / "a" / "b"]
    synced.clear()
    folder.sync()
    assert synced == []
    folder.publish(written(tmp_path, receipt("a/b/4.png")))
    folder.sync()
    assert synced == [root / "a" / "b"]
    folder.close()


def test_discarding_removes_one_temporary_file_and_may_come_twice(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    one = written(tmp_path, receipt("a.png"))
    for relative in (one.temporary, one.temporary, ""):
        folder.discard(relative)
    assert [place.name for place in tmp_path.iterdir()] == [LOCK_NAME]
    folder.close()


def test_a_path_stays_inside_or_is_known_to_lead_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = OutputFolder(out)
    (out / "inside").mkdir()
    (out / "round").symlink_to("inside")
    (out / "away").symlink_to(tmp_path)
    (out / "circle").symlink_to("circle")
    assert folder.holds("a.png")
    assert folder.holds("not/there/yet/a.png")
    assert folder.holds("round/a.png")
    assert not folder.holds("away/a.png")
    assert not folder.holds("away/out2/a.png")
    assert not folder.holds("../a.png")
    assert not folder.holds("circle/a.png")
    folder.close()


def test_whatever_stands_at_a_place_is_seen(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    (tmp_path / "file.png").write_text("x")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to("nowhere")
    assert [folder.occupied(f"{name}.png") for name in ("file", "folder", "dangling", "free")] == [True] * 3 + [False]
    folder.close()


# --- what is there ----------------------------------------------------------------------------------------------------


def test_pictures_that_are_gone_or_changed_are_found(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    content, digest = b"a whole picture", sha256(b"a whole picture").hexdigest()
    names = ["whole", "deleted", "truncated", "altered", "linked", "folder", "pipe", "emptied", "dangling"]
    places = {name: tmp_path / "out" / f"{name}.png" for name in names}
    for place in places.values():
        place.write_bytes(content)
    for name in names[1:]:
        places[name].unlink()
    (tmp_path / "elsewhere.png").write_bytes(content)
    places["truncated"].write_bytes(content[:-1])
    places["altered"].write_bytes(content[:-1] + b"!")
    places["linked"].symlink_to(tmp_path / "elsewhere.png")
    places["dangling"].symlink_to(tmp_path / "nowhere.png")
    places["folder"].mkdir()
    os.mkfifo(places["pipe"])
    places["emptied"].touch()
    found = folder.damaged((name, place.name, digest) for name, place in places.items())
    assert list(found) == names[1:]
    folder.close()


def test_pictures_of_a_folder_that_is_gone_are_damaged_and_unkept_ones_are_not(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    assert list(folder.damaged([("a", "gone/a.png", "0" * 64), ("b", "", "")])) == ["a"]
    folder.close()


def test_sweeping_removes_what_a_dead_run_left_and_nothing_else(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    kept = ["a.png", ".imagemill-notes", "imagemill-1.part", "download.part", ".imagemill-1-1-abc.part.png"]
    ours = [".imagemill-0-1-0123456789ab.part", ".imagemill-17-3-ffffffffffff.part"]
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "b"):
        for name in kept + ours:
            (place / name).write_text("x")
    (tmp_path / "b" / "deep" / ours[0]).write_text("in a folder that was not named")
    (tmp_path / "b" / ".imagemill-folder.part").mkdir()
    assert folder.sweep([".", "b", "gone", "a.png"]) == 4
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "b", LOCK_NAME])
    assert sorted(os.listdir(tmp_path / "b")) == sorted([*kept, "deep", ".imagemill-folder.part"])
    assert os.listdir(tmp_path / "b" / "deep") == [ours[0]]
    folder.close()
