"""Intake: from rows to the work of a run; whatever is wrong is named before anything of the folder changes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from imagemill import models
from imagemill.config import Settings
from imagemill.config.settings import OutputSettings
from imagemill.errors import ChangedTasksError, InputError, TaskFileError
from imagemill.intake import Admission, Intake, Models
from imagemill.ledger import FILE_NAME, Ledger
from imagemill.models import Model
from imagemill.publish import OutputFolder
from imagemill.records import Failure, Kind, Receipt, Settle
from imagemill.sources import Row, from_iterable, open_source
from imagemill.staging import Comparison


class Folder:
    """An output folder and one command after another in it; every command opens it anew."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = path
        self.path.mkdir(exist_ok=True)
        self.settings = Settings(**settings)

    def takes(
        self,
        *tasks: Mapping[str, Any] | str,
        rows: Iterator[Row] | None = None,
        skip_bad: bool = False,
        rerun_changed: bool = False,
        retry: tuple[str, ...] = (),
        overwrite: bool = False,
        limit: int | None = None,
    ) -> Taken:
        """A command takes the tasks in, and dies."""
        folder, ledger = OutputFolder(self.path), Ledger(self.path / FILE_NAME)
        try:
            intake = Intake(self.settings, Models(models.resolve, "fake"), ledger, folder, overwrite=overwrite)
            admission = intake.stage(rows or from_iterable(tasks), limit=limit)
            comparison = intake.check(admission, skip_bad=skip_bad, rerun_changed=rerun_changed)
            ledger.begin_run(1000.0, {}, {})
            damaged = intake.damaged()
            intake.accept(admission, retry=retry, again=damaged)
            work = [(planned.task.id, planned.task.output_path) for planned, outcome in ledger.work() if not outcome]
            seeds = {planned.task.id: planned.task.seed for planned, _ in ledger.work()}
            return Taken(admission, comparison, len(damaged), work, seeds)
        finally:
            ledger.staging.abandon()
            ledger.close()
            folder.close()

    def makes(self, *names: str) -> None:
        """A worker makes the pictures of these ids."""
        ledger = Ledger(self.path / FILE_NAME)
        keep = self.settings.output.sink == "files"
        for name in names:
            (path,) = (row["path"] for row in ledger.rows("SELECT path FROM tasks WHERE id = ?", (name,)))
            content = f"picture of {name}".encode()
            if keep:
                (self.path / path).parent.mkdir(parents=True, exist_ok=True)
                (self.path / path).write_bytes(content)
            digest = sha256(content).hexdigest() if keep else ""
            receipt = Receipt(0, 1, 16, 16, len(content), digest, path=path if keep else "")
            ledger.settle([(name, Settle(0, 1, 0, receipt=receipt))], [], 2000.0)
        ledger.close()

    def fails(self, name: str, kind: Kind) -> None:
        """A task fails for good."""
        ledger = Ledger(self.path / FILE_NAME)
        ledger.settle([(name, Settle(0, 1, 0, failure=Failure(0, 1, kind, kind)))], [], 2000.0)
        ledger.close()

    def known(self) -> int:
        """How many tasks its ledger knows."""
        ledger = Ledger(self.path / FILE_NAME)
        (row,) = ledger.rows("SELECT count(*) AS number FROM tasks")
        ledger.close()
        return int(row["number"])


class Taken:
    """What a command that took tasks in knows: what it found, and the (id, path) of what is left to do."""

    def __init__(
        self,
        admission: Admission,
        comparison: Comparison,
        damaged: int,
        work: list[tuple[str, str | None]],
        seeds: dict[str, int | None],
    ) -> None:
        self.admission, self.comparison, self.damaged, self.work, self.seeds = (
            admission,
            comparison,
            damaged,
            work,
            seeds,
        )

    @property
    def ids(self) -> list[str]:
        """The ids of what is left to do."""
        return [name for name, _ in self.work]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out")


def task(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "prompt": f"a {name}", **fields}


def refused(folder: Folder, *tasks: Mapping[str, Any], **how: Any) -> list[str]:
    """The lines of the refusal; the folder then knows what it knew before."""
    before = folder.known()
    with pytest.raises(TaskFileError) as found:
        folder.takes(*tasks, **how)
    assert folder.known() == before
    return str(found.value).splitlines()


# --- what comes in ------------------------------------------------------------------------------------------------------


def test_tasks_become_the_work_of_the_run_in_order(folder: Folder) -> None:
    taken = folder.takes(task("b"), task("a"), "only a prompt")
    assert taken.work == [("b", "b.png"), ("a", "a.png"), ("000003", "000003.png")]
    assert (taken.admission.tasks, taken.comparison.new) == (3, 3)


def test_seeds_count_from_the_runs_seed_by_the_place_in_the_source(tmp_path: Path) -> None:
    folder = Folder(tmp_path, seed=7)
    assert folder.takes(task("a"), task("b", seed=1), task("c")).seeds == {"a": 7, "b": 1, "c": 9}


def test_num_images_becomes_as_many_tasks_with_seeds_counting_up(folder: Folder) -> None:
    taken = folder.takes(task("a", num_images=3, seed=5, output_path="x/a.png"), task("b"))
    assert taken.work == [("a_1", "x/a_1.png"), ("a_2", "x/a_2.png"), ("a_3", "x/a_3.png"), ("b", "b.png")]
    assert [taken.seeds[f"a_{number}"] for number in (1, 2, 3)] == [5, 6, 7]
    assert (taken.admission.rows, taken.admission.tasks) == (2, 4)


def test_limit_takes_the_first_rows_and_reads_no_further(folder: Folder) -> None:
    read = []

    def rows() -> Iterator[Row]:
        for row in from_iterable([task("a", num_images=2), task("b"), task("c"), task("d")]):
            read.append(row.index)
            yield row

    assert folder.takes(rows=rows(), limit=2).ids == ["a_1", "a_2", "b"]
    assert len(read) <= 3


def test_skipped_rows_are_reported_with_their_place_and_do_not_count_as_bad(folder: Folder) -> None:
    (good,) = from_iterable([task("a")])
    rows = iter([Row(0, "tweets[0]", None, skipped="has no scene_hint"), good])
    taken = folder.takes(rows=rows)
    assert taken.ids == ["a"]
    assert taken.admission.skipped == [("tweets[0]", "has no scene_hint")]
    assert taken.admission.bad_rows == 0
    ledger = Ledger(folder.path / FILE_NAME)
    assert [row["place"] for row in ledger.rows("SELECT place FROM skipped")] == ["tweets[0]"]
    ledger.close()


def test_a_source_without_a_task_is_refused_with_the_reason(folder: Folder) -> None:
    with pytest.raises(InputError, match="no task that could run: it is empty; write a row"):
        folder.takes()
    rows = [Row(number, f"tweets[{number}]", None, skipped="has no scene_hint") for number in range(3)]
    with pytest.raises(InputError, match=r"could run: tweets\[0\]: has no scene_hint \(and 2 more like it\)"):
        folder.takes(rows=iter(rows))
    with pytest.raises(InputError, match="could run: task 1: steps: is 0"):
        folder.takes(task("a", steps=0), skip_bad=True)


def test_no_row_is_blamed_for_a_size_of_the_run(tmp_path: Path) -> None:
    for skip in (False, True):
        intake = Intake(
            Settings(size=(128, 130)),
            Models(models.resolve, "tiny"),
            ledger := Ledger(tmp_path / f"{skip}.sqlite"),
            folder := OutputFolder(tmp_path / str(skip)),
        )
        admission = intake.stage(from_iterable([{"prompt": "a"}, {"prompt": "b", "size": "64x64"}]))
        with pytest.raises(
            InputError, match="size: 128x130: z_image takes multiples of 16; write 128x128, for example"
        ):
            intake.check(admission, skip_bad=skip, rerun_changed=False)
        ledger.close()
        folder.close()


def test_rows_are_staged_one_at_a_time_and_never_held(folder: Folder) -> None:
    ledger, out = Ledger(folder.path / FILE_NAME), OutputFolder(folder.path)
    intake = Intake(folder.settings, Models(models.resolve, "fake"), ledger, out)
    staged = []

    def rows() -> Iterator[Row]:
        for row in from_iterable(task(f"t{number}") for number in range(50)):
            staged.append(ledger.staging.compare().total if row.index else 0)
            yield row

    admission = intake.stage(rows())
    assert staged == list(range(50))
    assert not any(
        isinstance(getattr(admission, name), (list, tuple)) and getattr(admission, name) for name in ("skipped", "bad")
    )
    ledger.close()
    out.close()


# --- what is wrong with the rows ----------------------------------------------------------------------------------------


def test_a_row_that_is_none_is_named_by_its_place_alone(folder: Folder) -> None:
    lines = refused(folder, task("a"), 3)  # type: ignore[arg-type]
    assert lines[0] == "task 2: 3 is no task; give a prompt, a dict or a Task"
    rows = open_source("-", stdin=io.BytesIO(b'{"prompt": "a"}\n{"prompt"\n3\n'))
    assert refused(folder, rows=rows)[:2] == [
        "<stdin>, line 2: does not read as JSON at column 10: Expecting ':' delimiter",
        '<stdin>, line 3: is no JSON object; write {"prompt": "..."}',
    ]
    rows = open_source("-", stdin=io.BytesIO(b'{"prompt": "a"}\n3\n'))
    assert folder.takes(rows=rows, skip_bad=True).admission.skipped == [
        ("<stdin>, line 2", 'is no JSON object; write {"prompt": "..."}')
    ]


def test_duplicate_ids_are_named_with_both_places(folder: Folder) -> None:
    lines = refused(folder, task("a"), task("b"), task("a", output_path="other.png"))
    assert lines[0] == "task 3: id: 'a' is already that of task 1; give each row its own"
    assert "--skip-bad" in lines[-1]


def test_duplicate_paths_up_to_case_are_named_with_both_places(folder: Folder) -> None:
    lines = refused(folder, task("a", output_path="x/One.png"), task("b", output_path="X/one.png"))
    assert lines[0].startswith("task 2: output_path: 'X/one.png' is already that of task 1 (up to case: 'x/One.png')")


@pytest.mark.parametrize("path", ["x//a.png", "./x/a.png", "x/./a.png"])
def test_two_ways_to_write_one_path_are_one_path(folder: Folder, path: str) -> None:
    lines = refused(folder, task("a", output_path="x/a.png"), task("b", output_path=path))
    assert "is already that of task 1" in lines[0]


def test_ids_that_meet_after_num_images_was_expanded_are_found(folder: Folder) -> None:
    assert "'a_2' is already that of task 1" in refused(folder, task("a_2"), task("a", num_images=3))[0]


def test_a_bad_row_is_left_out_whole_with_skip_bad(folder: Folder) -> None:
    taken = folder.takes(task("a_2"), task("a", num_images=3), task("b"), task("a_1"), skip_bad=True)
    assert taken.ids == ["a_2", "b", "a_1"]
    assert [place for place, _ in taken.admission.skipped] == ["task 2"]


def test_every_bad_row_is_counted_and_the_first_twenty_shown_in_full(folder: Folder) -> None:
    with pytest.raises(TaskFileError) as found:
        folder.takes(*(task(f"t{number}", steps=-number) for number in range(30)))
    assert found.value.total == 30
    assert len(found.value.problems) == 20
    assert "... and 10 more" in str(found.value)
    assert found.value.problems[0].startswith("task 1: steps: is 0;")


def test_what_is_wrong_with_all_rows_alike_is_told_once(folder: Folder) -> None:
    content = b'{"text": "a"}\n{"text": "b", "n": 1}\n{"text": "c"}\n'
    missing = "<stdin>, line 1: Text: is missing; the columns here are text; name the one to read with --prompt-column"
    rows = open_source("-", prompt_column="Text", stdin=io.BytesIO(content))
    assert refused(folder, rows=rows) == [f"{missing} (the same in all 3 rows)", "nothing was started"]
    rows = open_source("-", prompt_column="Text", stdin=io.BytesIO(content))
    assert refused(folder, rows=rows, limit=2) == [f"{missing} (the same in all 2 rows)", "nothing was started"]
    *lines, _ = refused(folder, task("a", steps=0, seed=-1), task("b", steps=0, seed=-1))
    assert [line.partition(":")[0] for line in lines] == ["task 1", "task 1"]
    assert all(line.endswith("(the same in all 2 rows)") for line in lines)
    for others in ([task("b")], [task("b", steps=1001)], [task("b", steps=0, seed=-1)]):
        assert refused(folder, task("a", steps=0), *others)[0] == "task 1: steps: is 0; 1 to 1000 are taken"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("../a.png", "leaves the output folder"),
        ("x/../../a.png", "leaves the output folder"),
        ("/etc/a.png", "is absolute"),
        ("C:/a.png", "is absolute"),
        ("x\\a.png", "backslash"),
        ("a\0.png", "no file name can hold"),
        ("a.exe", "no picture's name"),
        ("x/", "no picture's name"),
        (".imagemill-1.png", "reserved"),
        ("é" * 130 + ".png", "longer than 255 bytes"),
        ("x/" * 1200 + "a.png", "longer than any name (2,405 characters)"),
    ],
)
def test_paths_that_cannot_be_are_refused(folder: Folder, path: str, why: str) -> None:
    assert why in refused(folder, task("a", output_path=path))[0]


def test_a_path_that_a_link_leads_out_of_the_folder_is_refused(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder.path / "link").symlink_to(tmp_path / "elsewhere")
    (folder.path / "inner").symlink_to("real")
    (folder.path / "round").symlink_to("round")
    assert folder.takes(task("fine", output_path="inner/a.png")).ids == ["fine"]
    for path in ("link/a.png", "link/deep/a.png", "round/a.png"):
        assert "through a link" in refused(folder, task("a", output_path=path, num_images=2))[0]


def test_a_model_that_is_not_known_is_a_problem_of_its_row(folder: Folder) -> None:
    lines = refused(folder, task("a", model="fakee"), task("b"))
    assert lines[0].startswith("task 1: model: ")


def test_a_model_that_only_edits_wants_a_picture_though_its_family_does_not(folder: Folder) -> None:
    lines = refused(folder, task("a", model="tiny-edit"), task("b"))
    assert lines[0] == "task 1: images: the model 'tiny-edit' edits pictures; name at least one"


def test_a_lora_file_that_is_missing_is_a_problem_of_its_row(folder: Folder, tmp_path: Path) -> None:
    lines = refused(folder, task("a", lora_path=str(tmp_path / "none.safetensors")))
    assert lines[0].startswith("task 1: loras[0].path: ")


def test_an_adapter_that_a_task_names_twice_is_a_problem_of_its_row(folder: Folder, tmp_path: Path) -> None:
    first, copy, other = paths = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "c")]
    for path, value in zip(paths, (1.0, 1.0, 2.0), strict=True):
        parts = {"lora_A": np.full((4, 16), value, np.float32), "lora_B": np.full((16, 4), value, np.float32)}
        save_file({f"transformer.layer.{part}.weight": tensor for part, tensor in parts.items()}, path)
    assert refused(folder, task("a", loras=[first, other, copy]))[0] == (
        f"task 1: loras[2].path: {copy}: is there twice; give it once, with the strength you want in all"
    )
    assert folder.takes(task("a", loras=[first, other])).admission.tasks == 1


def test_each_model_is_looked_up_once(folder: Folder) -> None:
    asked = []

    def find(name: str) -> Model:
        asked.append(name)
        return models.resolve(name)

    book = Models(find, "fake")
    for name in (None, "fake", "nonsense", "nonsense", None):
        if name == "nonsense":
            with pytest.raises(InputError):
                book.get(name)
        else:
            assert book.get(name).spec.name == "fake"
    assert asked == ["fake", "nonsense"]
    assert [model.spec.name for model in book.used()] == ["fake"]


# --- the second command in the folder -----------------------------------------------------------------------------------


def test_the_same_command_again_does_what_is_left(folder: Folder) -> None:
    folder.takes(task("a"), task("b"))
    folder.makes("a")
    taken = folder.takes(task("a"), task("b"))
    assert taken.ids == ["b"]
    assert (taken.comparison.done, taken.comparison.pending, taken.comparison.new) == (1, 1, 0)


def test_changed_tasks_stop_with_a_diff(folder: Folder) -> None:
    folder.takes(task("a"), task("b"))
    with pytest.raises(ChangedTasksError) as found:
        folder.takes(task("a", prompt="a dog"), task("b", steps=4))
    assert found.value.total == 2
    assert found.value.differences == (
        "task 1 (id 'a'): prompt: 'a a' -> 'a dog'",
        "task 2 (id 'b'): steps: 1 -> 4",
    )


def test_rerun_changed_does_the_changed_tasks_again_and_only_those(folder: Folder) -> None:
    folder.takes(task("a"), task("b"))
    folder.makes("a", "b")
    assert folder.takes(task("a", prompt="a dog"), task("b"), rerun_changed=True).ids == ["a"]
    folder.makes("a")
    assert folder.takes(task("a", prompt="a dog"), task("b")).ids == []


def test_two_tasks_may_swap_their_paths_with_rerun_changed(folder: Folder) -> None:
    one, two = task("a", output_path="x.png"), task("b", output_path="y.png")
    folder.takes(one, two)
    folder.makes("a", "b")
    taken = folder.takes(task("a", output_path="y.png"), task("b", output_path="x.png"), rerun_changed=True)
    assert taken.work == [("a", "y.png"), ("b", "x.png")]


def test_failures_are_tried_again_by_kind(folder: Folder) -> None:
    folder.takes(task("a"), task("b"), task("c"))
    folder.fails("a", "oom")
    folder.fails("b", "bad_task")
    assert folder.takes(task("a"), task("b"), task("c")).ids == ["c"]
    assert folder.takes(task("a"), task("b"), task("c"), retry=("oom", "timeout")).ids == ["a", "c"]


@pytest.mark.parametrize("damage", ["gone", "cut off", "altered", "a link", "a folder", "a pipe"])
def test_a_damaged_picture_is_made_again(folder: Folder, tmp_path: Path, damage: str) -> None:
    folder.takes(task("a"), task("b"))
    folder.makes("a", "b")
    place = folder.path / "a.png"
    content = place.read_bytes()
    place.unlink()
    match damage:
        case "cut off":
            place.write_bytes(content[:-1])
        case "altered":
            place.write_bytes(content[:-1] + b"!")
        case "a link":
            (tmp_path / "a.png").write_bytes(content)
            place.symlink_to(tmp_path / "a.png")
        case "a folder":
            place.mkdir()
        case "a pipe":
            os.mkfifo(place)
    taken = folder.takes(task("a"), task("b"))
    assert (taken.ids, taken.damaged) == (["a"], 1)


def test_what_a_run_without_files_has_done_is_made_once_files_are_asked_for(folder: Folder) -> None:
    bare = Folder(folder.path, output=OutputSettings(sink="none"))
    bare.takes(task("a"))
    bare.makes("a")
    assert bare.takes(task("a")).ids == []
    taken = folder.takes(task("a"))
    assert (taken.ids, taken.damaged) == (["a"], 1)


def test_temporary_files_of_a_dead_run_are_swept(folder: Folder) -> None:
    folder.takes(task("a", output_path="x/a.png"))
    (folder.path / "x").mkdir()
    (folder.path / "x" / ".imagemill-0-1-abc.part").touch()
    (folder.path / "x" / "mine.part").touch()
    ledger, out = Ledger(folder.path / FILE_NAME), OutputFolder(folder.path)
    assert ledger.open_folders() == {"x"}
    out.sweep(ledger.open_folders())
    ledger.close()
    out.close()
    assert [place.name for place in (folder.path / "x").iterdir()] == ["mine.part"]


def test_taking_a_chunk_in_leaves_the_temporary_files_of_the_run_alone(folder: Folder) -> None:
    folder.takes(task("a", output_path="x/a.png"))
    (folder.path / "x").mkdir()
    (folder.path / "x" / ".imagemill-0-1-abc.part").touch()
    folder.takes(task("b", output_path="x/b.png"))
    assert [place.name for place in (folder.path / "x").iterdir()] == [".imagemill-0-1-abc.part"]


# --- files of others ----------------------------------------------------------------------------------------------------


def test_a_foreign_file_is_never_overwritten_unasked(folder: Folder) -> None:
    (folder.path / "a.png").write_bytes(b"holiday")
    lines = refused(folder, task("a"), task("b"))
    assert lines[0] == "task 1: output_path 'a.png': a file that is no picture of this folder's runs stands there"
    assert folder.takes(task("a"), overwrite=True).ids == ["a"]


def test_a_changed_task_does_not_move_onto_a_foreign_file(folder: Folder) -> None:
    folder.takes(task("a"))
    (folder.path / "mine.png").write_bytes(b"holiday")
    lines = refused(folder, task("a", output_path="mine.png"), rerun_changed=True)
    assert "task 1: output_path 'mine.png'" in lines[0]


def test_a_picture_of_another_source_is_not_taken_over(folder: Folder) -> None:
    folder.takes(task("a", output_path="x.png"))
    lines = refused(folder, task("b", output_path="x.png"))
    assert "holds the picture of task 'a' of an earlier run" in lines[0]


def test_without_files_nothing_in_the_folder_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"holiday")
    folder = Folder(tmp_path, output=OutputSettings(sink="none"))
    assert folder.takes(task("a")).ids == ["a"]


# --- chunks of an iterator ----------------------------------------------------------------------------------------------


def test_a_refused_chunk_leaves_the_run_able_to_settle_what_came_before(folder: Folder) -> None:
    ledger, out = Ledger(folder.path / FILE_NAME), OutputFolder(folder.path)
    intake = Intake(folder.settings, Models(models.resolve, "fake"), ledger, out)
    ledger.begin_run(1000.0, {}, {})
    first = intake.stage(from_iterable([task("a")]))
    intake.check(first, skip_bad=False, rerun_changed=False)
    intake.accept(first, retry=(), again=[])
    second = intake.stage(from_iterable([task("b", steps=0)]), first=1)
    with pytest.raises(TaskFileError):
        intake.check(second, skip_bad=False, rerun_changed=False)
    ledger.settle([("a", Settle(0, 1, 0, receipt=Receipt(0, 1, 16, 16)))], [], 2000.0)
    assert ledger.counts() == {"done": 1}
    ledger.close()
    out.close()


def test_chunks_number_on_and_an_id_that_comes_twice_is_refused(folder: Folder) -> None:
    ledger, out = Ledger(folder.path / FILE_NAME), OutputFolder(folder.path)
    intake = Intake(folder.settings, Models(models.resolve, "fake"), ledger, out)
    ledger.begin_run(1000.0, {}, {})
    for first, name in enumerate(("a", "b")):
        admission = intake.stage(from_iterable([task(name)]), first=first)
        intake.check(admission, skip_bad=False, rerun_changed=False)
        intake.accept(admission, retry=(), again=[])
    assert [planned.ticket.seq for planned, _ in ledger.work()] == [0, 1]
    third = intake.stage(from_iterable([task("a")]), first=2)
    with pytest.raises(TaskFileError, match="'a' came before in this run"):
        intake.check(third, skip_bad=False, rerun_changed=False)
    ledger.close()
    out.close()
