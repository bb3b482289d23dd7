"""What every test of the fault suite shares: a real run that something is done to, and the same checks after every fault.

`after(place, ended, …)` holds a run's folder against the promises of docs/reliability.md; each check is also there alone.
The command in a process of its own, its folder and its tasks are in tests/support.
"""

from __future__ import annotations

import json
import os
import sqlite3
import textwrap
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from workplace import pixels, rows

ROOT = Path(__file__).resolve().parents[2]
TEMPORARY = ".imagemill-"
STATES = ("pending", "done", "failed")
PICTURES = (".png", ".jpg", ".webp")
UNLIKE_SOURCE = 2.0
"""Mean difference, of 255, that an edit must have from its source at the least."""


# --- what goes in -----------------------------------------------------------------------------------------------------


def golden_of(workplace: Any, count: int) -> dict[str, str]:
    """The pictures of an unbroken run of `rows(count)`; those of fewer rows are among them."""
    ended = workplace.fake(workplace.tasks(rows(count), "golden.jsonl"), "golden")
    assert ended.code == 0, ended.text
    return dict(workplace.pixels("golden"))


AHEAD = """
if fd < 0:
    import imagemill.crew as crew
    Spec = crew.WorkerSpec
    crew.WorkerSpec = lambda **fields: Spec(**{**fields, "ahead": True})
"""
"""For `at_start`: workers take the next batch while they save the pictures of the last, as on a GPU."""


def at_start(workplace: Any, *codes: str) -> dict[str, str]:
    """The environment of a command that runs these codes before anything else, in the driver and in every worker.

    `fd` is a worker's end of its pipe, -1 in the driver; `label` the worker's device; `life(name)` counts the calls of
    that name over all processes, from 1.
    """
    head = f"""
    import os, sys
    fd = int(sys.orig_argv[sys.orig_argv.index("--fd") + 1]) if "--fd" in sys.orig_argv else -1
    label = os.environ.get("IMAGEMILL_WORKER_LABEL", "")

    def life(name):
        handle = os.open({str(workplace.folder)!r} + "/life-" + name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(handle, b".")
        number = os.lseek(handle, 0, os.SEEK_CUR)
        os.close(handle)
        return number
    """
    code = "\n".join(map(textwrap.dedent, (head, *codes)))
    workplace.write("at-start/sitecustomize.py", code)
    return {"PYTHONPATH": os.pathsep.join([str(workplace.folder / "at-start"), str(ROOT / "src")])}


HASTE = """
if fd < 0:
    import imagemill.schedule as schedule
    schedule.backoff = lambda failures, first=0.0, longest=0.0: 0.05 if failures else 0.0
"""
"""For `at_start`: lost workers are started again after 50 ms. That the real delays grow is shown under virtual time."""

WITNESS = """
if fd >= 0:
    import imagemill.runners.fake as fake
    import imagemill.sinks.files as files
    import time
    hang, store = fake.hang, files.FileSink.store

    def told_hang(how):
        print("it hangs now", flush=True)
        hang(how)

    def told_store(self, image, planned, attempt, facts):
        name = planned.task.id
        if attempt == 1 and planned.task.metadata["fake"].get("slow_save"):
            print("it saves", name, flush=True)
            time.sleep(600)
        return store(self, image, planned, attempt, facts)

    fake.hang, files.FileSink.store = told_hang, told_store
"""
"""For `at_start`: the worker's log says when it hangs; `{"slow_save": true}` in a task's script: its first save never ends."""


# --- what is done to a run --------------------------------------------------------------------------------------------


def workers(running: Any) -> list[int]:
    """The living worker processes of a run, the longest living first."""
    found = []
    for pid in running.children():
        with suppress(OSError):
            if b"imagemill.worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def pid_of(workplace: Any, worker: int, out: str = "out") -> int:
    """The process that a worker's log names last; 0 while it names none."""
    text = log_of(workplace, f"worker-{worker}.log", out)
    return int(text.rpartition(", pid ")[2].split()[0]) if ", pid " in text else 0


def log_of(workplace: Any, name: str, out: str = "out") -> str:
    """A log file's text; empty while there is none."""
    path = workplace.folder / out / "logs" / name
    return path.read_text("utf-8", "replace") if path.exists() else ""


def has_pictures(workplace: Any, count: int, out: str = "out") -> bool:
    """Whether that many pictures have their own names."""
    return len(list((workplace.folder / out).glob("*.png"))) >= count


# --- what must hold afterwards ----------------------------------------------------------------------------------------


def after(
    workplace: Any,
    ended: Any = None,
    *,
    out: object = "out",
    running: Any = None,
    golden: Mapping[str, str] | None = None,
    ids: Collection[str] | None = None,
    clean: bool = True,
) -> dict[str, str]:
    """Every check that makes sense after this fault; returns the state of each task.

    `ended` and `running` are of the run that was broken, `golden` the pixels of an unbroken one, `ids` the tasks of its
    source. Not `clean` after an end that could not tidy up (SIGKILL, a full disk): temporary files, pictures not yet
    booked and a report from before may then be there.
    """
    folder = workplace.folder / str(out)
    states = one_state_each(folder, ids, reported=clean)
    done = done_is_true(folder)
    no_edit_equals_its_source(folder, workplace.folder)
    if golden is not None:
        equal_to_golden(folder, done, golden)
    if clean:
        no_temporary_files(folder)
        only_what_is_done(folder, done)
    if ended is not None:
        honest_exit(ended, states)
    if running is not None:
        nobody_left(running)
    return states


def _tasks(folder: Path) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(f"{(folder / 'ledger.sqlite').absolute().as_uri()}?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM tasks ORDER BY run, position, id")]


def _receipts(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: json.loads(row["receipt"]) for row in _tasks(folder) if row["state"] == "done"}


def one_state_each(folder: Path, ids: Collection[str] | None = None, *, reported: bool = True) -> dict[str, str]:
    """Every task of the source is in the ledger, in one state, with what belongs to it; the results say the same."""
    tasks = _tasks(folder)
    states = {task["id"]: task["state"] for task in tasks}
    assert len(states) == len(tasks)
    assert set(states.values()) <= set(STATES)
    if ids is not None:
        assert set(states) == set(ids)
    for task in tasks:
        if task["state"] == "done":
            assert task["receipt"], f"{task['id']} is done without a receipt"
            assert task["kind"] is None, f"{task['id']} is done and failed of {task['kind']}"
        if task["state"] == "failed":
            assert task["kind"], f"{task['id']} failed of nothing"
            assert task["message"], f"{task['id']} failed without a message"
    if reported:
        lines = (folder / "results.jsonl").read_text("utf-8").splitlines()
        told = [(line["id"], line["state"]) for line in map(json.loads, lines)]
        assert told == list(states.items())
    return states


def done_is_true(folder: Path) -> set[str]:
    """`done` means that the file is there, is no link, decodes, has its size and matches its hash; returns the paths."""
    found = set()
    for name, receipt in _receipts(folder).items():
        if not receipt.get("path"):
            continue  # an answer, or a run that keeps no pictures
        path = folder / receipt["path"]
        assert path.is_file(), f"{name} is done without a picture"
        assert not path.is_symlink(), f"{name} is a link"
        data = path.read_bytes()
        assert len(data) == receipt["bytes"], f"{name} has another length"
        assert sha256(data).hexdigest() == receipt["sha256"], f"{name} has other bytes"
        with Image.open(path) as image:
            image.load()
            assert image.size == (receipt["width"], receipt["height"]), f"{name} has another size"
        found.add(str(receipt["path"]))
    return found


def equal_to_golden(folder: Path, done: Collection[str], golden: Mapping[str, str]) -> None:
    """What is done equals the pictures of an unbroken run."""
    made = pixels(folder)
    assert {path: made[path] for path in done} == {path: golden[path] for path in done}


def temporary_files(folder: Path) -> list[str]:
    """Temporary files below the folder."""
    found = (path for path in folder.rglob(f"{TEMPORARY}*") if path.name.endswith(".part"))
    return sorted(str(path.relative_to(folder)) for path in found)


def no_temporary_files(folder: Path) -> None:
    """Nothing half made is left."""
    assert temporary_files(folder) == []


def only_what_is_done(folder: Path, done: Collection[str]) -> None:
    """No picture stands where a task is not done."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in PICTURES}
    assert found - set(done) == set()


def honest_exit(ended: Any, states: Mapping[str, str]) -> None:
    """Exit code 0 only when all is done; and an end that was foreseen shows no traceback."""
    if ended.code == 0:
        assert set(states.values()) <= {"done"}, ended.text
    assert "Traceback" not in ended.err, ended.err


def nobody_left(running: Any) -> None:
    """No process that the command has started lives."""
    assert running.family() == []


def no_edit_equals_its_source(folder: Path, base: Path) -> None:
    """No picture that is done is one of the pictures it was to edit, whatever their sizes."""
    for row in _tasks(folder):
        images: Sequence[Any] = json.loads(row["task"]).get("images") or ()
        if row["state"] != "done" or not images:
            continue
        path = json.loads(row["receipt"]).get("path")
        if not path:
            continue
        for source in map(str, images):
            with Image.open(folder / path) as made, Image.open(base / source) as given:
                size = made.size
                pair = [np.asarray(image.convert("RGB").resize(size), np.float64) for image in (made, given)]
            assert np.abs(pair[0] - pair[1]).mean() > UNLIKE_SOURCE, f"{row['id']} equals its source {source}"
