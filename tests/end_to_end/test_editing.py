"""Editing from end to end: tasks with pictures through the command, the engine and `MultiGPUImageEditor`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import imagemill
from imagemill.errors import BadTask, InputError, Transient
from workplace import Workplace

sys.path.append(str(Path(__file__).parents[1] / "contract"))


@pytest.fixture(scope="session")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.2 [klein] with random weights."""
    import tiny_editors

    return tiny_editors.klein(tmp_path_factory.mktemp("klein") / "model")


def draw(path: Path, size: tuple[int, int] = (96, 64), seed: int = 0) -> Path:
    fields = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(fields).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: Image.open(path).size for path in sorted(folder.glob("*.png"))}


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def edits(place: Workplace) -> Path:
    """Seven tasks whose pictures lie beside their file: one picture, two, none; the source's aspect, an exact size."""
    for seed in range(3):
        draw(place.folder / "in" / "pictures" / f"{seed}.png", ((96, 64), (64, 64), (64, 128))[seed], seed)
    rows: list[dict[str, Any]] = [
        {"id": f"e{number}", "prompt": f"make it {word}", "image": f"pictures/{number % 3}.png", "size": "96x64"}
        for number, word in enumerate(("red", "blue", "green", "gold"))
    ]
    rows.append({"id": "two", "prompt": "join them", "images": ["pictures/0.png", "pictures/2.png"], "size": "64x64"})
    rows.append({"id": "wide", "prompt": "paint it", "image": "pictures/0.png", "width": 96})
    rows.append({"id": "text", "prompt": "a cat", "size": "64x64"})
    return place.tasks(rows, "in/tasks.jsonl")


def test_inline_and_two_workers_edit_alike(place: Workplace, edits: Path, klein: Path) -> None:
    command = ["run", edits, "--model", klein, "--device", "cpu", "--steps", "2"]
    for ended in place.many([[*command, "--out", "one"], [*command, "--out", "two", "--workers", "2"]]):
        assert ended.code == 0, ended.err
    assert place.pixels("one") == place.pixels("two")
    assert len(set(place.pixels("one").values())) == 7
    made = sizes(place.folder / "one")
    assert (made["e0.png"], made["two.png"], made["wide.png"]) == ((96, 64), (64, 64), (96, 64))
    page = (place.folder / "one" / "report.html").read_text("utf-8")
    assert page.count('class="source"') == 6


def test_a_changed_source_under_the_same_id_stops_with_a_diff(place: Workplace, edits: Path) -> None:
    assert place.fake(edits).code == 0
    before = place.pixels()
    assert place.fake(edits).code == 0
    draw(place.folder / "in" / "pictures" / "2.png", (64, 128), 77)
    ended = place.fake(edits)
    assert ended.code == 2
    assert "2 tasks changed" in ended.err
    assert "(id 'e2'): the model, or a picture it edits, has changed" in ended.err
    assert place.pixels() == before
    ended = place.fake(edits, "out", "--rerun-changed")
    assert ended.code == 0
    assert "2 in this run" in ended.out
    assert {name for name, digest in place.pixels().items() if digest != before[name]} == {"e2.png", "two.png"}


def test_pictures_that_do_not_read_fail_their_tasks_alone(place: Workplace) -> None:
    good = draw(place.folder / "good.png")
    (place.folder / "cut.png").write_bytes(good.read_bytes()[:120])
    (place.folder / "text.png").write_text("no picture")
    place.tasks([{"id": name, "prompt": "edit it", "image": f"{name}.png"} for name in ("cut", "good", "text")])
    planned = place("plan", "tasks.jsonl", "--model", "fake")
    assert planned.out.count("is no picture that reads; its tasks will fail") == 1  # a cut one tells only when decoded
    ended = place.fake("tasks.jsonl")
    assert ended.code == 1, ended.err
    results = {result["id"]: result for result in place.results()}
    assert place.states() == {"cut": "failed", "good": "done", "text": "failed"}
    assert {results[name]["kind"] for name in ("cut", "text")} == {"bad_task"}
    assert "cut.png is damaged or cut off" in results["cut"]["message"]
    assert "text.png is none that can be read" in results["text"]["message"]
    assert place.attempts() == {"cut": 1, "good": 1, "text": 1}


def test_a_missing_picture_is_a_mistake_before_anything_starts(place: Workplace) -> None:
    place.tasks([{"prompt": "a", "image": "gone.png"}])
    ended = place.fake("tasks.jsonl")
    assert ended.code == 2
    assert "tasks.jsonl, line 1: images[0]: " in ended.err
    assert "gone.png: there is no such picture file; check the path" in ended.err


def test_a_model_that_edits_wants_a_picture_and_takes_no_more_than_it_can(place: Workplace) -> None:
    import tiny_editors

    tiny_editors.kontext(place.folder / "kontext")
    draw(place.folder / "a.png")
    place.tasks([{"prompt": "no picture"}, {"prompt": "two", "images": ["a.png", "a.png"]}])
    ended = place("plan", "tasks.jsonl", "--model", "./kontext", "--device", "cpu")
    assert ended.code == 2
    assert "line 1: images: the model './kontext' edits pictures; name at least one" in ended.err
    assert "line 2: images: names 2; flux_kontext takes at most 1 picture" in ended.err


def test_the_plan_knows_the_size_of_what_will_be_made(place: Workplace, klein: Path) -> None:
    draw(place.folder / "a.png", (1600, 900))
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(place.folder / "a.png") as image:
        image.save(place.folder / "turned.jpg", exif=exif)
    place.write("tasks.csv", "prompt,image\nedit it,a.png\nedit it,turned.jpg\n")
    ended = place("plan", "tasks.csv", "--model", klein, "--device", "cpu")
    assert ended.code == 0, ended.err
    assert "1360x768" in ended.out
    assert "768x1360" in ended.out


# --- the library ------------------------------------------------------------------------------------------------------


def test_an_engine_takes_pictures_from_memory_and_goes_on_with_them(tmp_path: Path) -> None:
    from_disk = draw(tmp_path / "a.png")
    tasks: list[dict[str, Any]] = [
        {"id": "memory", "prompt": "edit it", "image": Image.open(from_disk), "seed": 1},
        {"id": "both", "prompt": "edit it", "images": [from_disk, Image.new("L", (8, 8))], "seed": 1},
    ]
    reports = [imagemill.run(tasks, tmp_path / "out", model="fake") for _ in range(2)]
    assert [(report.done, report.resumed) for report in reports] == [(2, 0), (2, 2)]
    lines = (tmp_path / "out" / "results.jsonl").read_text("utf-8").splitlines()
    assert all(Path(path).is_file() for line in lines for path in json.loads(line)["images"])
    tasks[0]["image"] = Image.new("RGB", (8, 8))
    with pytest.raises(imagemill.InputError, match="1 task changed") as told:
        imagemill.run(tasks, tmp_path / "out", model="fake")
    assert "give options=RunOptions(rerun_changed=True)" in str(told.value)
    again = imagemill.run(tasks, tmp_path / "out", model="fake", options=imagemill.RunOptions(rerun_changed=True))
    assert (again.done, again.resumed) == (2, 1)


def test_a_damaged_picture_from_memory_is_a_bad_row(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png", (300, 300))
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(imagemill.InputError, match="task 1: images: the picture in memory is damaged or cut off"):
        imagemill.run([{"prompt": "edit it", "image": Image.open(path)}], tmp_path / "out", model="fake")


@pytest.fixture(scope="module")
def editor(klein: Path) -> Iterator[imagemill.MultiGPUImageEditor]:
    with imagemill.MultiGPUImageEditor(
        model_name=str(klein), num_inference_steps=2, device="cpu", workers=2, size="64x64"
    ) as made:
        yield made


def test_edited_pictures_come_in_order_with_failures_in_their_places(
    editor: imagemill.MultiGPUImageEditor, tmp_path: Path
) -> None:
    path = draw(tmp_path / "a.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(path.read_bytes()[:120])
    memory = [Image.open(draw(tmp_path / f"{seed}.png", seed=seed)) for seed in (1, 2)]
    images = [memory[0], str(cut), path, tmp_path / "gone.png", [memory[1], path]]
    words = ["make it red", "b", "make it blue", "d", "join them"]
    edited = editor.batch_edit(images, words, seed=[7, 1, 8, 1, 9])
    assert [type(item) for item in edited] == [Image.Image, BadTask, Image.Image, InputError, Image.Image]
    assert "cut.png is damaged or cut off" in str(edited[1])
    assert "gone.png: there is no such picture file" in str(edited[3])
    alone = editor.batch_edit([path], "make it blue", enable_batch_sync=False, seed=8)
    assert alone[0].tobytes() == edited[2].tobytes()  # type: ignore[union-attr]
    assert all(item.size == (64, 64) and item.mode == "RGB" for item in edited if isinstance(item, Image.Image))
    for item, source in zip(edited, (memory[0], None, Image.open(path), None, memory[1]), strict=True):
        if isinstance(item, Image.Image):
            assert np.abs(np.asarray(item).astype(int) - np.asarray(source.resize((64, 64))).astype(int)).mean() > 5


def test_batch_sync_is_lockstep_and_loads_nothing_again(editor: imagemill.MultiGPUImageEditor, tmp_path: Path) -> None:
    pictures = [draw(tmp_path / f"{seed}.png", seed=seed) for seed in range(4)]
    policies = []
    for sync in (True, False, None):
        edited = editor.batch_edit(pictures, "make it night", enable_batch_sync=sync, size="64x64")
        assert all(isinstance(item, Image.Image) for item in edited)
        policies.append(str(editor._engine.settings.schedule))
    assert policies == ["lockstep", "dynamic", "lockstep"]
    assert editor.batch_edit([], []) == []


def test_on_error_raise_raises_the_first_failure_after_the_batch(
    editor: imagemill.MultiGPUImageEditor, tmp_path: Path
) -> None:
    path = draw(tmp_path / "a.png")
    cut = shutil.copy(path, tmp_path / "cut.png")
    cut.write_bytes(path.read_bytes()[:120])
    with pytest.raises(BadTask, match=r"cut\.png"):
        editor.batch_edit([path, cut, path], "x", on_error="raise")


@pytest.mark.parametrize(
    ("images", "words", "more", "part"),
    [
        (["a.png"], ["a", "b"], {}, "instructions: 2 for 1 images"),
        (["a.png"], "a", {"seed": [1, 2]}, "seed: 2 for 1 images"),
        ("a.png", "a", {}, "give a list"),
        ([3], "a", {}, r"images\[0\]: int is neither"),
        ([[]], "a", {}, r"images\[0\]: is an empty list"),
        (["a.png"], "a", {"output_path": "x"}, "output_path: batch_edit sets it itself"),
        (["a.png"], "a", {"on_error": "ignore"}, "on_error"),
        (["a.png"], "a", {"width": 50, "height": 64}, "multiples of 16"),
        (["a.png"], " ", {}, "item 0: prompt: is empty"),
        (["gone.png", "a.png"], ["a", " "], {}, "item 1: prompt: is empty"),
        (["a.png"], None, {}, "instructions: NoneType is neither a text nor a list"),
        (["a.png"], [3], {}, "item 0: prompt: 3 is not text"),
        (["a.png"], {"a": "b"}, {}, "instructions: dict is neither"),
        (["a.png"], "a", {"seed": 1.5}, "seed: float is neither a whole number nor a list"),
        (["a.png"], "a", {"seed": True}, "item 0: seed: true is not a whole number"),
        (["a.png"], "a", {"num_inference_step": 3}, "is no field of a task; did you mean num_inference_steps"),
    ],
)
def test_a_call_that_cannot_be_used_starts_nothing(
    editor: imagemill.MultiGPUImageEditor,
    images: Any,
    words: Any,
    more: dict[str, Any],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=part):
        editor.batch_edit(images, words, **more)


def test_the_seed_of_an_item_does_not_depend_on_those_before_it(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png")
    with imagemill.MultiGPUImageEditor(model_name="fake", device="cpu", enable_batch_sync=False) as made:
        whole = made.batch_edit([path, path, path], "edit it")
        lacking = made.batch_edit([tmp_path / "gone.png", path, path], "edit it")
        alone = made.batch_edit([path], "edit it", seed=44)
    assert isinstance(lacking[0], InputError)
    pictures = [item.tobytes() for item in (*whole, *lacking[1:], *alone) if isinstance(item, Image.Image)]
    assert pictures[3:] == [*pictures[1:3], pictures[2]]
    assert len(set(pictures)) == 3


def test_an_empty_picture_costs_its_item_alone() -> None:
    with imagemill.MultiGPUImageEditor(model_name="fake", device="cpu") as made:
        empty, good = made.batch_edit([Image.new("RGB", (0, 5)), Image.new("RGB", (8, 8))], "edit it")
    assert isinstance(empty, BadTask)
    assert isinstance(good, Image.Image)


def test_an_item_that_a_stopped_batch_did_not_reach_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    with imagemill.MultiGPUImageEditor(model_name="fake", device="cpu") as made:
        run = made._engine.run
        # What `drain` leaves behind depends on time: outcomes for the tasks in flight, none for those after them.
        monkeypatch.setattr(made._engine, "run", lambda *given: islice(run(*given), 1))
        edited = made.batch_edit([Image.new("RGB", (8, 8))] * 3, "edit it")
    assert isinstance(edited[0], Image.Image)
    assert isinstance(edited[-1], Transient)
    assert "stopped before this item's turn" in str(edited[-1])


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ({"gpu_ids": [0]}, "gpu_ids: its name here is device_ids"),
        ({"schedule": "static"}, "schedule: its name here is enable_batch_sync"),
        ({"sink": "none"}, "sink: the pictures are read back"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(
    setting: dict[str, Any], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(InputError, match=part):
        imagemill.MultiGPUImageEditor(model_name="fake", **setting)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind(klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with imagemill.MultiGPUImageEditor(model_name="fake", device="cpu") as made:
        (item,) = made.batch_edit([Image.new("RGB", (8, 8))], "edit it")
        assert isinstance(item, Image.Image)
    made.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError):
        imagemill.MultiGPUImageEditor(model_name="fake", steps_or_so=3)
    assert list(tmp_path.iterdir()) == []
