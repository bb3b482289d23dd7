"""A disk that is full or read-only, and handles that run out: one clear line, nothing half made, and it goes on later."""

from __future__ import annotations

import errno
import io
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import pytest
from checks import after, at_start, done_is_true, equal_to_golden, temporary_files

import imagemill
from command import until
from imagemill.errors import ImagemillError, InputError, OutputError
from imagemill.ledger import Ledger
from imagemill.publish import OutputFolder
from imagemill.report import write_reports
from workplace import rows

COUNT = 24


def mounted(*arguments: str) -> None:
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount: {error}")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk with these options; again, to change them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    there = False

    def mount(options: str) -> Path:
        nonlocal there
        mounted("-t", "tmpfs", "-o", f"remount,{options}" if there else options, "none", str(folder))
        there = True
        return folder

    yield mount
    if there:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def attempt(folder: Path) -> tuple[str, str]:
    """A run in this process, and its reports: what it says at its end, and what stands on standard error."""
    said, errors = "", io.StringIO()
    with redirect_stderr(errors):
        try:
            with imagemill.Engine("fake", device="cpu", keep=False) as engine:
                for _ in engine.run(rows(COUNT), folder):
                    pass
        except (OutputError, InputError) as error:
            said = str(error)
        with suppress(ImagemillError):
            write_reports(folder)
    return said, errors.getvalue()


SIZES = [f"size={size}k" for size in (*range(16, 180, 24), *range(184, 500, 48))]
INODES = [f"nr_inodes={number}" for number in range(2, 40, 3)]


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param(SIZES[::3], id="bytes"),
        pytest.param(INODES[::3], id="files"),
        pytest.param(SIZES, id="all bytes", marks=pytest.mark.slow),
        pytest.param(INODES, id="all files", marks=pytest.mark.slow),
    ],
)
def test_wherever_a_disk_is_full_the_run_says_so_and_goes_on_when_there_is_room(
    limits: list[str], small: Callable[[str], Path], golden: Mapping[str, str]
) -> None:
    ends = set()
    for number, options in enumerate(limits):
        folder = small(options) / f"out{number}"
        said, errors = attempt(folder)
        ends.add(said.partition(":")[0].replace(str(folder), ""))
        assert "\n" not in said
        assert "damaged" not in said
        assert "repair" not in said
        assert errors == ""
        if (folder / "ledger.sqlite").exists() and (folder / "ledger.sqlite").stat().st_size:
            with suppress(sqlite3.OperationalError):  # no table yet
                equal_to_golden(folder, done_is_true(folder), golden)
        assert temporary_files(folder) == []
        small("size=8m,nr_inodes=10000")
        said, errors = attempt(folder)
        assert (said, errors) == ("", "")
        done = done_is_true(folder)
        assert len(done) == COUNT
        equal_to_golden(folder, done, golden)
        assert temporary_files(folder) == []
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    assert len(ends) >= 2, ends


@pytest.mark.parametrize("crew", [(), ("--workers", "2")], ids=["inline", "processes"])
def test_a_disk_full_of_pictures_ends_the_command_with_one_line(
    crew: tuple[str, ...], place: Any, golden: Mapping[str, str], tmp_path: Path
) -> None:
    """The ledger has room; the pictures lie on a disk of their own."""
    pictures = place.folder / "out" / "deep"
    pictures.mkdir(parents=True)
    place.tasks([{**row, "output_path": f"deep/{row['id']}.png"} for row in rows(COUNT)])
    golden = {f"deep/{name}": digest for name, digest in golden.items()}
    mounted("-t", "tmpfs", "-o", "size=40k", "none", str(pictures))
    try:
        ended = place.fake("tasks.jsonl", "out", *crew)
        assert ended.code == 1, ended.text
        last = ended.err.splitlines()[-1]
        assert last.startswith("imagemill: the output folder refuses deep/t")
        assert "No space left on device" in last
        assert "the same command goes on" in last
        states = after(place, ended, golden=golden)
        assert set(states.values()) == {"done", "pending"}
        mounted("-o", "remount,size=8m", str(pictures))
        ended = place.fake("tasks.jsonl", "out", *crew)
        assert ended.code == 0, ended.text
        after(place, ended, golden=golden)
    finally:
        subprocess.run(["umount", "-l", str(pictures)], check=True)


def test_a_folder_that_becomes_read_only_in_the_middle_ends_the_run(place: Any, golden: Mapping[str, str]) -> None:
    out = place.folder / "out"
    running = place.start_fake(place.tasks(rows(COUNT, delay=0.2)), "out", "--workers", "2")
    until(lambda: len(list(out.glob("*.png"))) >= 4)
    mounted("--bind", str(out), str(out))
    try:
        mounted("-o", "remount,bind,ro", str(out))
        ended = running.wait()
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)
    assert ended.code == 1, ended.text
    assert "Read-only file system" in ended.err.splitlines()[-1]
    after(place, ended, golden=golden, running=running, clean=False)
    ended = place.fake(place.tasks(rows(COUNT)), "out", "--workers", "2")
    assert ended.code == 0, ended.text
    after(place, ended, golden=golden)


# --- without the right to mount ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "crew"),
    [(errno.ENOSPC, ()), (errno.ENOSPC, ("--workers", "2")), (errno.EDQUOT, ()), (errno.EIO, ())],
)
def test_whatever_the_disk_says_to_a_picture_ends_the_run_and_leaves_nothing_half_made(
    number: int, crew: tuple[str, ...], place: Any, golden: Mapping[str, str]
) -> None:
    code = f"""
    import imagemill.sinks.files as files
    store, refused = files.picture.check, {number}

    def check(data, width, height):
        store(data, width, height)
        if life("saves") > 5:
            raise OSError(refused, os.strerror(refused))

    class Broken:
        encode = staticmethod(files.picture.encode)
        check = staticmethod(check)

    files.picture = Broken
    """
    broken = at_start(place, code)
    ended = place.fake(place.tasks(rows(COUNT)), "out", *crew, **broken)
    assert ended.code == 1, ended.text
    assert os.strerror(number) in ended.err.splitlines()[-1]
    states = after(place, ended, golden=golden)
    assert sorted(states.values()) == ["done"] * 5 + ["pending"] * (COUNT - 5)
    ended = place.fake("tasks.jsonl", "out", *crew)
    assert ended.code == 0, ended.text
    assert set(place.attempts().values()) <= {1, 2}
    after(place, ended, golden=golden)


@pytest.mark.parametrize("pages", range(5))
def test_a_ledger_that_cannot_grow_books_nothing_that_is_not_there(
    pages: int, tmp_path: Path, golden: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite is held to a size: it says `database or disk is full`, wherever that is in the run."""
    folder = tmp_path / "out"
    begin = Ledger.begin_run

    def held(self: Ledger, *given: Any) -> int:
        number = begin(self, *given)
        now = self._db.execute("PRAGMA page_count").fetchone()[0]
        self._db.execute(f"PRAGMA max_page_count = {now + pages}")
        return number

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "begin_run", held)
        said, errors = attempt(folder)
    assert "the ledger cannot be written: database or disk is full" in said
    assert errors == ""
    equal_to_golden(folder, done_is_true(folder), golden)
    assert temporary_files(folder) == []
    assert attempt(folder) == ("", "")
    assert len(done_is_true(folder)) == COUNT
    equal_to_golden(folder, done_is_true(folder), golden)


def test_temporary_files_that_cannot_be_removed_hide_no_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = OutputFolder(tmp_path)

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        folder.discard(".imagemill-0-1-abc.part")
    (tmp_path / ".imagemill-0-1-abc.part").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda path: refuse(Path(path)))
        with pytest.raises(OutputError, match="cannot be removed: Read-only"):
            folder.sweep(["."])
    folder.close()


def test_no_room_for_staging_is_said_with_the_folder_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.staging.begin()
    ledger._db.execute("PRAGMA temp.max_page_count = 1")
    from imagemill.records import PlannedTask, Task, Ticket

    def fill() -> None:
        for number in range(200):
            task = Task(f"t{number}", "p" * 1000, output_path=f"{number}.png")
            ledger.staging.add(PlannedTask(task, "0", Ticket(number)), "row")

    with pytest.raises(OutputError, match="SQLITE_TMPDIR"):
        fill()
    ledger.staging.abandon()
    ledger.close()


# --- handles ----------------------------------------------------------------------------------------------------------

SCARCE = """
import os, resource, sys
left = int(sys.argv.pop(1))
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (left, hard))
from imagemill.cli import main
main()
"""


@pytest.mark.parametrize("crew", [(), ("--workers", "2")], ids=["inline", "processes"])
@pytest.mark.parametrize("left", [8, 13, 17])
def test_too_few_handles_end_with_one_line_or_suffice(
    left: int, crew: tuple[str, ...], place: Any, golden: Mapping[str, str]
) -> None:
    place.tasks(rows(COUNT))
    command = [sys.executable, "-c", SCARCE, str(left), "run", "tasks.jsonl", "--out", "out", "--model", "fake", *crew]
    environment = place.environment()
    ended = subprocess.run(command, cwd=place.folder, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.returncode in (0, 1), ended.stderr
    if ended.returncode:
        assert "open files" in ended.stderr.splitlines()[-1]
        again = place.fake("tasks.jsonl", "out", *crew)
        assert again.code == 0, again.text
    after(place, golden=golden, ids=[f"t{number}" for number in range(COUNT)])
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > left
