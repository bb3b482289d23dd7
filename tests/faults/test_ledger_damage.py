"""A ledger that is damaged is found when it is opened and refused with what to do; no run goes by a wrong one."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from checks import done_is_true, equal_to_golden

import imagemill
from imagemill.errors import ImagemillError, InputError, LedgerError, OutputError
from imagemill.ledger import FILE_NAME, Ledger
from imagemill.repair import repair
from workplace import Workplace, rows

COUNT = 24
PAGE = 4096
SEED = 20250712


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all tasks are done, but for one that was never reached."""
    folder = tmp_path_factory.mktemp("template") / "out"
    again(folder, COUNT - 1)
    return folder


@pytest.fixture
def folder(tmp_path: Path, template: Path) -> Path:
    shutil.copytree(template, tmp_path / "out")
    return tmp_path / "out"


def again(folder: Path, count: int = COUNT) -> imagemill.RunReport:
    """The same run in this process; what it raises is raised here."""
    with imagemill.Engine("fake", device="cpu", keep=False) as engine:
        for _ in engine.run(rows(count), folder):
            pass
        assert engine.report is not None
        return engine.report


def one_line(error: ImagemillError) -> str:
    message = str(error)
    assert "\n" not in message
    return message


def refused(folder: Path) -> str:
    """What a run says that does not begin; the pictures and the file are as they were."""
    path = folder / FILE_NAME
    before = path.read_bytes()
    with pytest.raises(LedgerError) as caught:
        again(folder)
    assert path.read_bytes() == before
    message = one_line(caught.value)
    assert str(path) in message
    return message


# --- found and refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [100, 512, PAGE, 3 * PAGE, 5 * PAGE + 1, -PAGE, -1])
def test_a_ledger_cut_short_is_refused_with_what_to_do(left: int, folder: Path) -> None:
    path = folder / FILE_NAME
    os.truncate(path, left if left > 0 else path.stat().st_size + left)
    message = refused(folder)
    assert "imagemill repair" in message
    assert "--out" in message


def test_a_ledger_of_another_version_is_refused_with_what_to_do(folder: Path) -> None:
    with closing(sqlite3.connect(folder / FILE_NAME)) as database, database:
        database.execute("UPDATE meta SET value = '2'")
    message = refused(folder)
    assert "ledger format 2, this one reads 1" in message
    assert "that version" in message
    assert "imagemill repair" in message


def test_a_ledger_that_lacks_a_table_is_refused(folder: Path) -> None:
    with closing(sqlite3.connect(folder / FILE_NAME)) as database, database:
        database.execute("DROP TABLE spans")
    assert "spans" in refused(folder)


def test_an_index_that_hides_a_task_from_the_run_is_found(folder: Path) -> None:
    """The pages are sound, the index lacks rows: a run that went by it would leave tasks out and call itself done."""
    sound = "CREATE INDEX tasks_in_order ON tasks (run, position)"
    for text, fill in ((f"{sound} WHERE position < 20", "REINDEX tasks_in_order"), (sound, "SELECT 1")):
        with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as database:
            database.execute("PRAGMA writable_schema = ON")
            database.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'tasks_in_order'", (text,))
        with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as database:
            database.execute(fill)
            assert database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    assert "imagemill repair" in refused(folder)


@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-journal"])
def test_a_link_in_the_ledgers_place_is_refused_and_not_followed(end: str, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    path = folder / (FILE_NAME + end)
    if end:
        target.write_bytes(b"precious")
    else:
        path.rename(target)
    path.symlink_to(target)
    before = target.read_bytes()
    with pytest.raises(LedgerError, match="is a link"):
        again(folder)
    assert target.read_bytes() == before


def test_a_log_that_was_lost_costs_no_finished_picture(tmp_path: Path, golden: Mapping[str, str]) -> None:
    """A driver that was killed leaves its last commits in the log beside the ledger; without it they are not there."""
    folder = tmp_path / "out"
    again(folder, COUNT)
    with closing(sqlite3.connect(folder / FILE_NAME)) as database:
        database.execute("DELETE FROM tasks")
        database.commit()
    with pytest.raises(InputError, match="stands there"):
        again(folder)
    assert repair(folder).rebuilt == COUNT
    report = again(folder)
    assert (report.exit_code, report.resumed) == (0, COUNT)
    equal_to_golden(folder, done_is_true(folder), golden)


# --- every page, overwritten ------------------------------------------------------------------------------------------


def spoil(data: bytearray, number: int, how: str, dice: random.Random) -> None:
    """Overwrite one page, or its end as a torn write does."""
    start, pages = number * PAGE, len(data) // PAGE
    match how:
        case "zeros":
            data[start : start + PAGE] = bytes(PAGE)
        case "noise":
            data[start : start + PAGE] = dice.randbytes(PAGE)
        case "torn":
            data[start + PAGE - 512 : start + PAGE] = dice.randbytes(512)
        case "another page":
            other = dice.randrange(pages) * PAGE
            data[start : start + PAGE] = data[other : other + PAGE]
        case "a flipped bit":
            data[start + dice.randrange(PAGE)] ^= 1 << dice.randrange(8)


@pytest.mark.parametrize("how", ["zeros", "noise", "torn", "another page", "a flipped bit"])
def test_a_page_overwritten_is_refused_or_harms_nothing(
    how: str, template: Path, tmp_path: Path, golden: Mapping[str, str]
) -> None:
    """For every page: one line that refuses, or a run that ends with every task done and every picture right."""
    dice = random.Random(f"{SEED} {how}")
    whole = (template / FILE_NAME).read_bytes()
    refusals = 0
    for number in range(len(whole) // PAGE):
        data = bytearray(whole)
        spoil(data, number, how, dice)
        folder = tmp_path / f"{how} {number}"
        shutil.copytree(template, folder)
        (folder / FILE_NAME).write_bytes(data)
        try:
            report = again(folder)
        except (InputError, OutputError):
            refusals += 1
            mended = repair(folder)
            if not mended.needed:
                shutil.rmtree(folder)
                continue  # sound for SQLite, but a task in it reads differently: the run showed the difference
            report = again(folder)
            assert report.resumed == COUNT - 1
        if report.exit_code == 0:
            assert report.done == COUNT
            done = done_is_true(folder)
            assert len(done) == COUNT
            equal_to_golden(folder, done, golden)
        shutil.rmtree(folder)
    if how != "a flipped bit":
        assert refusals


# --- a disk that is full ----------------------------------------------------------------------------------------------


def test_a_full_disk_is_not_called_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(sqlite3.Connection):
        def execute(self, text: str, *values: Any) -> sqlite3.Cursor:
            if "journal_mode" in text:
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            return super().execute(text, *values)

    connect = sqlite3.connect
    before = (folder / FILE_NAME).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *given, **more: connect(*given, **more, factory=Full))
        with pytest.raises(OutputError, match="cannot be written") as caught:
            Ledger(folder / FILE_NAME)
    assert "repair" not in one_line(caught.value)
    assert (folder / FILE_NAME).read_bytes() == before
    assert again(folder).exit_code == 0


def test_the_command_refuses_with_one_line(folder: Path) -> None:
    os.truncate(folder / FILE_NAME, 3 * PAGE)
    place: Any = Workplace(folder.parent)
    ended = place.fake(place.tasks(rows(COUNT)))
    assert ended.code == 2, ended.text
    assert len(ended.err.splitlines()) == 1
    assert "`imagemill repair out`" in ended.err
