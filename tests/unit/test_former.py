"""A change that is broken off takes nothing away: what is not replaced yet is found again by those who go back."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill import crew, former
from imagemill.config import Settings
from imagemill.config.settings import OutputSettings
from imagemill.errors import ChangedTasksError, TaskFileError
from imagemill.forecast import forecast
from imagemill.intake import Intake
from imagemill.ledger import FILE_NAME, Ledger
from imagemill.publish import OutputFolder
from imagemill.records import Answer, Failure, Kind, Receipt, Settle
from imagemill.sitting import RunOptions
from imagemill.sources import from_iterable

NAMES = ("a", "b", "c")


class Folder:
    """An output folder with the tasks `NAMES`, and commands one after another in it that die when they have taken them in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir(exist_ok=True)
        self.written = 0

    def takes(
        self,
        steps: int = 1,
        picture: str = "png",
        *,
        sink: str = "files",
        rerun: bool = True,
        retry: tuple[str, ...] = (),
        again: tuple[str, ...] = (),
        tasks: tuple[Mapping[str, Any], ...] = tuple({"id": name, "prompt": name} for name in NAMES),
    ) -> list[str]:
        """A command takes the tasks in, with these settings, and dies; returns the ids that are to do. A plan says as many."""
        output = OutputSettings(format=picture, sink=sink)  # type: ignore[arg-type]
        chosen = Settings(model="fake", steps=steps, output=output)
        options = RunOptions(rerun_changed=rerun, retry=retry, again=again)
        planned = forecast("tasks", self.path, chosen, options, from_iterable(tasks)).to_do
        folder, ledger = OutputFolder(self.path), Ledger(self.path / FILE_NAME)
        try:
            intake = Intake(chosen, crew.find_models(chosen), ledger, folder)
            admission = intake.stage(from_iterable(tasks))
            to_do = intake.check(admission, skip_bad=False, rerun_changed=rerun).to_do(retry)
            found = intake.again(again, retry)
            ledger.begin_run(1000.0, {}, {})
            intake.accept(admission, retry=retry, again=found)
            work = [planned.task.id for planned, outcome in ledger.work() if outcome is None]
            assert to_do + len(found) == len(work), "the run counted otherwise than it works"
            assert again or planned == len(work), "the plan counted otherwise than the run works"
            return work
        finally:
            ledger.staging.abandon()
            ledger.close()
            folder.close()

    def rows(self) -> dict[str, dict[str, Any]]:
        """What the ledger says of each task."""
        ledger = Ledger(self.path / FILE_NAME)
        try:
            return {row["id"]: row for row in ledger.rows("SELECT * FROM tasks ORDER BY position")}
        finally:
            ledger.close()

    def states(self) -> dict[str, str]:
        return {name: row["kind"] or row["state"] for name, row in self.rows().items()}

    def writes(self, name: str) -> bytes:
        """The picture of a task gets its name; no two are alike."""
        row = self.rows()[name]
        self.written += 1
        content = f"{name} {row['fingerprint']} {self.written}".encode()
        (self.path / row["path"]).write_bytes(content)
        return content

    def makes(self, *names: str, keep: bool = True) -> None:
        """The pictures of these tasks are written and booked; without `keep` they are not kept."""
        for name in names:
            content = self.writes(name) if keep else b""
            digest, path = (sha256(content).hexdigest(), self.rows()[name]["path"]) if keep else ("", "")
            self.settles(name, Settle(0, 1, 0, receipt=Receipt(0, 1, 16, 16, len(content), digest, path=path)))

    def fails(self, name: str, kind: Kind = "oom") -> None:
        self.settles(name, Settle(0, 1, 0, failure=Failure(0, 1, kind, kind)))

    def settles(self, name: str, settle: Settle) -> None:
        ledger = Ledger(self.path / FILE_NAME)
        ledger.settle([(name, settle)], [], 2000.0)
        ledger.close()

    def check(self) -> None:
        """What is done has the picture that its row tells of, and the one that its task has."""
        for name, row in self.rows().items():
            if row["state"] == "done" and '"sha256":""' not in row["receipt"]:
                content = (self.path / row["path"]).read_bytes()
                assert content.startswith(f"{name} {row['fingerprint']} ".encode())
                assert sha256(content).hexdigest() in row["receipt"]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder in which all is done with one step."""
    made = Folder(tmp_path / "out")
    made.takes()
    made.makes(*NAMES)
    return made


# --- back again ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rerun", [False, True])
def test_who_goes_back_before_a_picture_was_replaced_finds_all_of_them(rerun: bool, folder: Folder) -> None:
    before = folder.rows()
    assert folder.takes(steps=2) == list(NAMES)
    assert set(folder.states().values()) == {"pending"}
    assert folder.takes(rerun=rerun) == []
    told = ("state", "fingerprint", "path", "receipt", "attempts", "worker", "elapsed", "settled", "task")
    assert [[row[name] for name in told] for row in folder.rows().values()] == [
        [row[name] for name in told] for row in before.values()
    ]
    folder.check()


def test_what_was_replaced_has_changed_and_the_rest_is_found(folder: Folder) -> None:
    folder.takes(steps=2)
    folder.makes("b")
    with pytest.raises(ChangedTasksError) as found:
        folder.takes(rerun=False)
    assert (found.value.total, len(found.value.differences)) == (1, 1)
    assert "(id 'b'): steps: 2 -> 1" in found.value.differences[0]
    assert folder.takes() == ["b"]
    folder.check()
    assert folder.takes(steps=2) == ["a", "c"], "and whoever turns round once more finds the new one"


def test_a_change_goes_on_where_it_was_broken_off(folder: Folder) -> None:
    folder.takes(steps=2)
    folder.makes("a")
    assert folder.takes(steps=2, rerun=False) == ["b", "c"]
    folder.makes("b", "c")
    assert folder.takes(steps=2, rerun=False) == []
    with pytest.raises(ChangedTasksError):
        folder.takes(rerun=False)


def test_one_broken_change_upon_another_leads_back_too(folder: Folder) -> None:
    for steps in (2, 3, 4):
        assert folder.takes(steps=steps) == list(NAMES)
    assert folder.takes() == []


@pytest.mark.parametrize("damage", ["gone", "cut off", "the next picture, not booked"])
def test_a_picture_that_is_no_longer_what_was_booked_is_not_taken_for_it(damage: str, folder: Folder) -> None:
    folder.takes(steps=2)
    place = folder.path / "b.png"
    match damage:
        case "gone":
            place.unlink()
        case "cut off":
            place.write_bytes(place.read_bytes()[:-1])
        case _:
            folder.writes("b")
    assert folder.takes() == ["b"]
    folder.check()


def test_failures_are_as_they_were_and_can_be_tried_again(folder: Folder) -> None:
    folder.fails("b", "timeout")
    folder.takes(steps=2)
    assert folder.takes() == []
    assert folder.states() == {"a": "done", "b": "timeout", "c": "done"}
    folder.takes(steps=2)
    assert folder.takes(retry=("oom",)) == []
    folder.takes(steps=2)
    assert folder.takes(retry=("timeout",)) == ["b"]


def test_a_failure_replaces_no_picture(folder: Folder) -> None:
    folder.takes(steps=2)
    folder.fails("b")
    assert folder.takes() == []
    assert set(folder.states().values()) == {"done"}
    assert folder.takes(steps=2) == ["a", "c"], "the failure is booked, too"
    folder.makes("a", "c")
    folder.takes(steps=2, retry=("oom",))
    folder.makes("b")
    assert folder.takes() == list(NAMES)


def test_pictures_of_another_format_are_found_again_even_when_all_are_replaced(folder: Folder) -> None:
    folder.takes(picture="jpg")
    folder.makes(*NAMES)
    assert folder.takes(picture="png") == []
    folder.check()
    assert folder.takes(picture="jpg") == []
    folder.check()
    folder.takes(steps=2, picture="jpg")
    folder.makes(*NAMES)
    assert folder.takes(picture="png") == [], "a.jpg is another, a.png is not"
    assert folder.takes(picture="jpg") == list(NAMES)


def test_a_name_that_a_task_had_is_its_own_while_its_older_picture_stands_there(folder: Folder) -> None:
    folder.takes(picture="jpg")
    folder.makes(*NAMES)
    (folder.path / "b.png").write_bytes(b"holiday")
    for steps in (1, 2):
        with pytest.raises(TaskFileError, match=r"task 2: output_path 'b\.png'.*stands there") as found:
            folder.takes(steps=steps)
        assert found.value.total == 1
    (folder.path / "b.png").unlink()
    assert folder.takes(steps=2) == list(NAMES)


def test_without_files_what_was_done_is_done_again_and_no_file_is_promised(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out")
    folder.takes(sink="none")
    folder.makes(*NAMES, keep=False)
    folder.takes(steps=2, sink="none")
    assert folder.takes(sink="none") == []
    folder.takes(steps=2, sink="none")
    assert folder.takes() == list(NAMES), "the pictures were not kept"
    folder.makes(*NAMES)
    folder.takes(steps=2, sink="none")
    folder.makes(*NAMES, keep=False)
    assert folder.takes(sink="none") == [], "no file was written over"
    folder.check()
    folder.takes(steps=2)
    folder.writes("b")
    assert folder.takes(sink="none") == ["b"]
    folder.check()


def test_answers_are_found_again_until_there_are_others(folder: Folder) -> None:
    for name in NAMES:
        folder.settles(name, Settle(0, 1, 0, receipt=Receipt(0, 1, 0, 0, answer=Answer(f"answer of {name}", 3))))
    folder.takes(steps=2)
    folder.settles("b", Settle(0, 1, 0, receipt=Receipt(0, 1, 0, 0, answer=Answer("another", 3))))
    assert folder.takes() == ["b"]
    assert "answer of a" in folder.rows()["a"]["receipt"]


def test_what_is_found_again_can_be_asked_for_once_more(folder: Folder) -> None:
    folder.takes(steps=2)
    assert folder.takes(again=("a", "c")) == ["a", "c"]


def test_what_was_asked_for_once_more_is_found_until_there_is_another(folder: Folder) -> None:
    for name in NAMES:
        folder.settles(name, Settle(0, 1, 0, receipt=Receipt(0, 1, 0, 0, answer=Answer(f"answer of {name}", 3))))
    assert folder.takes(again=NAMES) == list(NAMES)
    folder.fails("a")
    folder.settles("b", Settle(0, 1, 0, receipt=Receipt(0, 1, 0, 0, answer=Answer("another", 3))))
    assert folder.takes() == []
    assert folder.states() == dict.fromkeys(NAMES, "done")
    assert [name for name in NAMES if f"answer of {name}" in folder.rows()[name]["receipt"]] == ["a", "c"]


def test_a_damaged_picture_that_is_not_made_again_is_not_found(folder: Folder) -> None:
    folder.writes("a")
    assert folder.takes() == ["a"]
    folder.fails("a")
    assert folder.takes() == []
    assert folder.states()["a"] == "oom"


def test_variants_of_one_row_are_found_each_for_itself(tmp_path: Path) -> None:
    folder, row = Folder(tmp_path / "out"), ({"id": "a", "prompt": "a", "num_images": 3},)
    folder.takes(tasks=row)
    folder.makes("a_1", "a_2", "a_3")
    folder.takes(steps=2, tasks=row)
    folder.makes("a_2")
    more = ({"id": "a", "prompt": "a", "num_images": 4},)
    assert folder.takes(tasks=more) == ["a_2", "a_4"]
    folder.check()


def test_two_tasks_that_were_to_swap_their_places_have_them_again(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out")
    one, two = {"id": "a", "prompt": "a", "seed": 1}, {"id": "b", "prompt": "b", "seed": 2}
    rows = {**one, "output_path": "x.png"}, {**two, "output_path": "y.png"}
    swapped = {**one, "output_path": "y.png"}, {**two, "output_path": "x.png"}
    folder.takes(tasks=rows)
    folder.makes("a", "b")
    folder.takes(tasks=swapped)
    assert folder.takes(tasks=rows) == []
    folder.takes(tasks=swapped)
    folder.makes("a")
    assert folder.takes(tasks=rows) == ["b"], "y.png is the picture of a"
    folder.check()


# --- what stays ---------------------------------------------------------------------------------------------------------


def older(folder: Folder) -> list[str]:
    ledger = Ledger(folder.path / FILE_NAME)
    ledger.run = max(row["run"] for row in folder.rows().values())
    try:
        return list(ledger.older())
    finally:
        ledger.close()


def test_pictures_stay_until_others_have_their_names(folder: Folder) -> None:
    assert older(folder) == []
    folder.takes(steps=2)
    assert older(folder) == ["a.png", "b.png", "c.png"]
    folder.makes("a")
    folder.fails("b")
    assert older(folder) == ["b.png", "c.png"]
    folder.takes(steps=2, picture="jpg")
    folder.makes(*NAMES)
    assert older(folder) == ["a.png", "b.png", "c.png"]
    folder.takes(steps=3, sink="none")
    folder.makes(*NAMES, keep=False)
    assert older(folder) == ["a.jpg", "a.png", "b.jpg", "b.png", "c.jpg", "c.png"]


def test_a_name_that_another_task_has_now_holds_no_older_picture(tmp_path: Path) -> None:
    folder, rows = Folder(tmp_path / "out"), ({"id": "a", "prompt": "a", "output_path": "x.png"},)
    folder.takes(tasks=rows)
    folder.makes("a")
    moved = ({"id": "a", "prompt": "a", "output_path": "y.png"}, {"id": "b", "prompt": "b", "output_path": "X.png"})
    folder.takes(tasks=moved)
    assert older(folder) == ["x.png"]
    folder.makes("a", "b")
    assert older(folder) == []


def test_older_pictures_are_told_in_a_line() -> None:
    assert former.line(Path("out"), []) == ""
    one = "1 older picture of these tasks stays in out: a.png; going back to what made it finds it again"
    assert former.line(Path("out"), ["a.png"]) == one
    many = former.line(Path("out"), (f"{number}.png" for number in range(10)))
    assert many.startswith("10 older pictures of these tasks stay in out: 0.png, 1.png, 2.png and 7 more; ")


# --- ledgers from before ------------------------------------------------------------------------------------------------


def test_a_ledger_that_is_older_is_read_and_gone_on_with(folder: Folder) -> None:
    with closing(sqlite3.connect(folder.path / FILE_NAME)) as database, database:
        database.execute("DROP TABLE former")
    before = (folder.path / FILE_NAME).read_bytes()
    reader = Ledger(folder.path / FILE_NAME, read_only=True)
    assert len(list(reader.rows("SELECT id FROM tasks"))) == len(NAMES)
    reader.close()
    assert (folder.path / FILE_NAME).read_bytes() == before
    assert folder.takes(rerun=False) == []
    folder.takes(steps=2)
    assert folder.takes(rerun=False) == []


# --- any order ----------------------------------------------------------------------------------------------------------

SETTINGS = st.tuples(st.integers(1, 3), st.sampled_from(["png", "jpg"]))
EVENTS = st.one_of(
    st.tuples(st.just("takes"), SETTINGS),
    st.tuples(st.sampled_from(["makes", "makes", "writes", "fails", "loses", "again"]), st.sampled_from(NAMES)),
)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(events=st.lists(EVENTS, max_size=12))
def test_in_any_order_what_was_booked_and_not_replaced_is_found_and_nothing_else(events: list[tuple[str, Any]]) -> None:
    with TemporaryDirectory() as place:
        Story(Folder(Path(place) / "out")).goes(events)


class Story:
    """What happens in a folder. `booked` is what must be found: the state of each task under each settings, while its file is
    as it was; `stray` are pictures that have their names and were not booked; `open` are tasks asked for once more."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.now = folder, (1, "png")
        self.booked: dict[tuple[str, tuple[int, str]], str] = {}
        self.stray: set[str] = set()
        self.open: set[str] = set()
        folder.takes(*self.now)

    def goes(self, events: list[tuple[str, Any]]) -> None:
        for what, which in [*events, ("takes", (1, "png"))]:
            if what in ("takes", "loses", "again") or (which, self.now) not in self.booked or which in self.open:
                getattr(self, what)(which)

    def takes(self, wanted: tuple[int, str]) -> None:
        paths = {f"{name}.{wanted[1]}" for name in NAMES}
        if self.now[1] != wanted[1] and self.stray & paths:
            with pytest.raises(TaskFileError):
                self.folder.takes(*wanted)
            for path in self.stray & paths:
                (self.folder.path / path).unlink()
            self.stray -= paths
        self.now, self.open = wanted, set()
        todo = [name for name in NAMES if (name, wanted) not in self.booked]
        assert self.folder.takes(*wanted) == todo
        self.folder.check()

    def again(self, name: str) -> None:
        if self.booked.get((name, self.now)) == "failed":
            del self.booked[name, self.now]
        todo = [one for one in NAMES if (one, self.now) not in self.booked or one == name]
        assert self.folder.takes(*self.now, again=(name,)) == todo
        self.open = {name}

    def loses(self, name: str) -> None:
        path = f"{name}.{self.now[1]}"
        (self.folder.path / path).unlink(missing_ok=True)
        self.replaced(name)
        self.stray.discard(path)

    def writes(self, name: str) -> None:
        self.folder.writes(name)
        self.replaced(name)
        self.stray.add(f"{name}.{self.now[1]}")

    def makes(self, name: str) -> None:
        self.folder.makes(name)
        self.replaced(name)
        self.booked = {key: state for key, state in self.booked.items() if key[0] != name or state == "done"}
        self.booked[name, self.now] = "done"
        self.open.discard(name)
        self.stray.discard(f"{name}.{self.now[1]}")

    def fails(self, name: str) -> None:
        self.folder.fails(name)
        self.booked.setdefault((name, self.now), "failed")

    def replaced(self, name: str) -> None:
        """Of the pictures under the name that the task's has now none is left."""
        self.booked = {
            (one, (steps, picture)): state
            for (one, (steps, picture)), state in self.booked.items()
            if (one, picture, state) != (name, self.now[1], "done")
        }
