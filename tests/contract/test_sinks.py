"""Every sink takes pictures alike; the one that keeps files keeps them whole, durable, inside its folder, and with the
task written in them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pkgutil
import re
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagemill import picture, sinks, wire
from imagemill.errors import BadOutput, BadTask
from imagemill.records import Lora, PlannedTask, SinkSpec, Task, Ticket
from imagemill.sinks import Stored
from imagemill.sinks.files import TEMPORARY

SINKS = [module.name for module in pkgutil.iter_modules(sinks.__path__)]
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
FACTS = {"batch_size": 1, "imagemill": "0.1.0", "semantics": 1}
PNG_END = 12
"""Bytes of the end chunk: length, name, checksum."""

PROMPTS = {
    "plain": "a cat on a mat",
    "latin": "café à la crème, 100 % Müller",
    "Chinese": "一只猫坐在垫子上,水墨画风格",
    "emoji": "a 🐈‍⬛ under a 🏳️‍🌈 👩🏽‍🚀",
    "right to left": "قطة تجلس على الحصيرة שלום",
    "lines": 'first line\nsecond: line, with "quotes" and \\ and <lora:x:1>\ttab',
    "control": "a\x01b\x7fc\u2028d",
}


def drawing(width: int = 64, height: int = 48) -> Image.Image:
    image = Image.radial_gradient("L").resize((width, height))
    return Image.merge("RGB", (image, image.rotate(90), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))


def planned(path: str = "a.png", **fields: Any) -> PlannedTask:
    known: dict[str, Any] = {"width": 64, "height": 48, "steps": 8, "seed": 42, "model": "fake", "guidance_scale": 0.0}
    task = Task(id="one", output_path=path, **{"prompt": "a cat", **known, **fields})
    return PlannedTask(task, fingerprint="0123456789abcdef" * 4, ticket=Ticket(7))


def store(folder: Path, task: PlannedTask, image: Image.Image | None = None, **spec: Any) -> Stored:
    sink = sinks.create(SinkSpec(folder=str(folder), **spec))
    return sink.store(image or drawing(), task, 1, FACTS)


def kept(folder: Path, task: PlannedTask, **spec: Any) -> bytes:
    return (folder / store(folder, task, **spec).temporary).read_bytes()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def texts(data: bytes) -> tuple[str, str]:
    """What a viewer finds inside: the text `parameters` and the JSON of imagemill."""
    image: Any = opened(data)
    if image.format == "PNG":
        return image.text["parameters"], image.text["imagemill"]
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be"), image.getexif()[0x010E]


def read_parameters(text: str) -> dict[str, str]:
    """The parser of AUTOMATIC1111/stable-diffusion-webui, `infotext_utils.py::parse_generation_parameters`."""
    *lines, last = text.strip().split("\n")
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    assert len(pattern.findall(last)) >= 3
    found = {name: json.loads(value) if value.startswith('"') else value for name, value in pattern.findall(last)}
    prompt: list[str] = []
    negative: list[str] = []
    in_negative = False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            in_negative, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if in_negative else prompt).append(line)
    return {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative), **found}


# --- every sink -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SINKS)
def test_a_sink_takes_pictures_one_after_another(kind: str, tmp_path: Path) -> None:
    sink = sinks.create(SinkSpec(kind, str(tmp_path)))
    for number in range(3):
        stored = sink.store(drawing(), planned(f"{number}.png"), 1, FACTS)
        assert bool(stored.path) == bool(stored.temporary) == bool(stored.sha256) == bool(stored.bytes)
        assert not (tmp_path / f"{number}.png").exists()


def test_the_sink_none_writes_nothing(tmp_path: Path) -> None:
    assert store(tmp_path / "out", planned(), kind="none") == Stored("", "", 0, "")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_sink_is_refused() -> None:
    with pytest.raises(BadTask, match="'tape'"):
        sinks.create(SinkSpec("tape"))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_picture_lies_beside_its_place_under_a_temporary_name(suffix: str, tmp_path: Path) -> None:
    stored = store(tmp_path, planned(f"deep/er/cat.{suffix}"))
    place = tmp_path / stored.temporary
    data = place.read_bytes()
    assert stored.path == f"deep/er/cat.{suffix}"
    assert place.parent == tmp_path / "deep" / "er"
    assert place.name.startswith(TEMPORARY)
    assert list(place.parent.iterdir()) == [place]
    assert (stored.bytes, stored.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (opened(data).format, opened(data).size) == (FORMATS[suffix], (64, 48))


def test_a_picture_can_be_read_by_everybody_and_run_by_nobody(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        stored = store(tmp_path, planned())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / stored.temporary).stat().st_mode) == 0o644


def test_a_picture_is_durable_when_its_receipt_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def spy(handle: int) -> None:
        fsync(handle)
        synced.append(os.fstat(handle).st_size)

    monkeypatch.setattr(os, "fsync", spy)
    stored = store(tmp_path, planned())
    assert synced == [stored.bytes]


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_png_and_webp_keep_every_pixel(suffix: str, tmp_path: Path) -> None:
    assert opened(kept(tmp_path, planned(f"a.{suffix}"))).convert("RGB").tobytes() == drawing().tobytes()


def test_the_same_task_gives_the_same_bytes(tmp_path: Path) -> None:
    for suffix in FORMATS:
        first, again = (kept(tmp_path / folder, planned(f"a.{suffix}")) for folder in "ab")
        assert first == again


def test_attempts_and_tasks_never_share_a_temporary_name(tmp_path: Path) -> None:
    sink = sinks.create(SinkSpec(folder=str(tmp_path)))
    names = {sink.store(drawing(), planned(), attempt, FACTS).temporary for attempt in (1, 2)}
    other = PlannedTask(planned().task, fingerprint="f" * 64, ticket=Ticket(8))
    names.add(sink.store(drawing(), other, 1, FACTS).temporary)
    assert len(names) == 3


def test_what_a_dead_attempt_left_half_written_is_overwritten(tmp_path: Path) -> None:
    stored = store(tmp_path, planned())
    (tmp_path / stored.temporary).write_bytes(b"half" * 10_000)
    assert store(tmp_path, planned()) == stored
    assert (tmp_path / stored.temporary).stat().st_size == stored.bytes


def test_a_linked_folder_that_leads_out_is_refused(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "link").symlink_to(elsewhere)
    with pytest.raises(BadTask, match="leads out"):
        store(out, planned("link/a.png"))
    with pytest.raises(BadTask, match="leads out"):
        store(out, planned("link/deeper/a.png"))
    assert list(elsewhere.iterdir()) == []


def test_a_linked_folder_that_stays_inside_and_a_linked_output_folder_are_taken(tmp_path: Path) -> None:
    (tmp_path / "real" / "inside").mkdir(parents=True)
    (tmp_path / "real" / "link").symlink_to("inside")
    (tmp_path / "out").symlink_to("real")
    stored = store(tmp_path / "out", planned("link/a.png"))
    assert (tmp_path / "real" / "inside" / Path(stored.temporary).name).is_file()


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    name = store(tmp_path, planned()).temporary
    (tmp_path / name).unlink()
    (tmp_path / "victim").write_text("precious")
    (tmp_path / name).symlink_to("victim")
    with pytest.raises(OSError, match="symbolic links"):
        store(tmp_path, planned())
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("path", ["taken/a.png", "taken/deeper/a.png"])
def test_a_file_in_place_of_a_folder_is_the_tasks_fault(tmp_path: Path, path: str) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(BadTask, match="taken"):
        store(tmp_path, planned(path))


def test_an_output_folder_that_is_a_file_is_not_the_tasks_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for path in ("a.png", "b/a.png"):
        with pytest.raises(OSError, match="file"):
            store(tmp_path / "file", planned(path))


def test_a_picture_that_fails_its_check_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = picture.encode
    monkeypatch.setattr(picture, "encode", lambda *args, **kwargs: encode(*args, **kwargs)[:-40])
    with pytest.raises(BadOutput):
        store(tmp_path, planned("b/a.png"))
    assert list((tmp_path / "b").iterdir()) == []


def test_a_disk_that_refuses_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store(tmp_path, planned())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "image"),
    [
        ("a.jpg", Image.new("RGBA", (64, 48))),
        ("a.jpg", Image.new("RGB", (70_000, 1))),
        ("a.webp", Image.new("RGB", (20_000, 1))),
        ("a.png", Image.new("F", (64, 48))),
    ],
    ids=["alpha in JPEG", "too wide for JPEG", "too wide for WebP", "floats in PNG"],
)
def test_a_picture_that_the_format_cannot_hold_is_the_tasks_fault(
    path: str, image: Image.Image, tmp_path: Path
) -> None:
    with pytest.raises(BadTask, match="cannot be written as"):
        store(tmp_path, planned(path), image)
    assert list(tmp_path.iterdir()) == []


# --- what is written inside -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_the_task_can_be_read_back_from_its_picture(suffix: str, prompt: str, tmp_path: Path) -> None:
    task = planned(
        f"a.{suffix}",
        prompt=prompt,
        negative_prompt=prompt,
        loras=(Lora("/l/猫.safetensors", 0.3, "d" * 64),),
        metadata={"标题": prompt, "big": 2**70, "nested": [1.5, None, {"x": True}]},
    )
    parameters, content = texts(kept(tmp_path, task))
    facts = json.loads(content)
    assert wire.task_from_json(json.dumps(facts.pop("task"))) == task.task
    assert facts == {"fingerprint": task.fingerprint, **FACTS}
    assert parameters.startswith(f"{prompt} <lora:猫:0.3>\nNegative prompt: {prompt}\nSteps: 8,")


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), st.sampled_from(sorted(FORMATS)))
def test_any_prompt_can_be_read_back(prompt: str, suffix: str) -> None:
    task = planned(f"a.{suffix}", prompt=prompt, metadata={"column": prompt})
    parameters, content = texts(picture.encode(drawing(8, 8), task, FACTS, metadata=True))
    assert wire.task_from_json(json.dumps(json.loads(content)["task"])) == task.task
    assert parameters.startswith(f"{prompt}\nSteps: 8,")


def test_viewers_of_the_field_can_read_the_parameters(tmp_path: Path) -> None:
    task = planned(
        prompt="a cat, sitting: there",
        negative_prompt="dogs, blur",
        true_cfg_scale=4.5,
        loras=(Lora("/l/ink wash.safetensors", 0.8, "abcdef0123456789"), Lora("b.safetensors", 1.0, "0" * 64)),
    )
    assert read_parameters(texts(kept(tmp_path, task))[0]) == {
        "Prompt": "a cat, sitting: there <lora:ink wash:0.8> <lora:b:1>",
        "Negative prompt": "dogs, blur",
        "Steps": "8",
        "CFG scale": "0.0",
        "True CFG scale": "4.5",
        "Seed": "42",
        "Size": "64x48",
        "Model": "fake",
        "Lora hashes": "ink wash: abcdef012345, b: 000000000000",
        "Version": "imagemill 0.1.0",
    }


@pytest.mark.parametrize("model", ["my, model", "C:model", '"all"', 'a "quoted", one', "模型,二"])
def test_a_model_with_any_name_does_not_break_the_parameters(model: str, tmp_path: Path) -> None:
    found = read_parameters(texts(kept(tmp_path, planned(model=model)))[0])
    assert (found["Model"], found["Seed"], found["Version"]) == (model, "42", "imagemill 0.1.0")


@pytest.mark.parametrize("suffix", FORMATS)
def test_without_metadata_nothing_is_left_inside(suffix: str, tmp_path: Path) -> None:
    task = planned(f"a.{suffix}", prompt="a secret", metadata={"column": "a secret"})
    data = kept(tmp_path, task, metadata=False)
    image = opened(data)
    assert dict(image.getexif()) == {}
    assert not getattr(image, "text", {})
    assert not {"comment", "exif", "xmp", "parameters", "imagemill"} & set(image.info)
    for word in (b"secret", b"fake", b"imagemill", "secret".encode("utf-16-be")):
        assert word not in data


@pytest.mark.parametrize("prompt", ["long " * 16_000, "长" * 40_000], ids=["English", "Chinese"])
def test_a_long_prompt_is_kept_where_the_format_can_hold_it(prompt: str, tmp_path: Path) -> None:
    for suffix in ("png", "webp"):
        assert texts(kept(tmp_path, planned(f"a.{suffix}", prompt=prompt)))[0].startswith(prompt)
    assert dict(opened(kept(tmp_path, planned("a.jpg", prompt=prompt))).getexif()) == {}


def test_a_prompt_just_at_the_limit_of_a_jpeg_does_not_fail(tmp_path: Path) -> None:
    for length in range(19_000, 24_000, 100):
        data = picture.encode(drawing(8, 8), planned("a.jpg", prompt="x" * length), FACTS, metadata=True)
        picture.check(data, 8, 8)


# --- the check --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted({"png", "jpg", "webp"}))
def whole(request: pytest.FixtureRequest) -> bytes:
    data = picture.encode(drawing(), planned(f"a.{request.param}"), FACTS, metadata=True)
    picture.check(data, 64, 48)
    return data


def test_a_picture_cut_anywhere_does_not_pass(whole: bytes) -> None:
    for length in [*range(0, len(whole), 97), *range(len(whole) - 20, len(whole))]:
        with pytest.raises(BadOutput):
            picture.check(whole[:length], 64, 48)


@pytest.mark.parametrize("size", [(48, 64), (64, 47), (32, 24), (65, 48)])
def test_a_picture_of_another_size_does_not_pass(whole: bytes, size: tuple[int, int]) -> None:
    with pytest.raises(BadOutput, match="64x48"):
        picture.check(whole, *size)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\x89PNG\r\n\x1a\n", b"<svg/>", b"RIFF\0\0\0\0WEBP"])
def test_what_is_no_picture_does_not_pass(data: bytes) -> None:
    with pytest.raises(BadOutput, match="does not decode"):
        picture.check(data, 64, 48)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_picture_passes_or_is_a_bad_output_and_nothing_else(data: st.DataObject) -> None:
    for suffix in ("png", "jpg", "webp"):
        bent = bytearray(picture.encode(drawing(8, 8), planned(f"a.{suffix}"), {}, metadata=False))
        bent[data.draw(st.integers(0, len(bent) - 1))] ^= data.draw(st.integers(1, 255))
        with suppress(BadOutput):
            picture.check(bytes(bent), 8, 8)


def test_a_png_without_its_end_chunk_does_not_pass() -> None:
    data = picture.encode(drawing(), planned(), FACTS, metadata=False)
    assert data[-PNG_END:-4] == struct.pack(">I", 0) + b"IEND"
    for cut in range(1, PNG_END + 1):
        with pytest.raises(BadOutput):
            picture.check(data[:-cut], 64, 48)


@pytest.mark.parametrize(
    ("colour", "flags"),
    [((0, 0, 0), ("black", "constant")), ((2, 2, 2), ("black", "constant")), ((200, 3, 9), ("constant",))],
)
def test_pictures_of_one_colour_are_flagged(colour: tuple[int, int, int], flags: tuple[str, ...]) -> None:
    assert picture.flags(Image.new("RGB", (8, 8), colour)) == flags


def test_a_nearly_black_picture_is_flagged_and_a_drawing_is_not() -> None:
    dim = Image.new("RGB", (8, 8))
    dim.putpixel((3, 3), (2, 0, 1))
    assert picture.flags(dim) == ("black",)
    dim.putpixel((3, 3), (3, 0, 0))
    assert picture.flags(dim) == ()
    assert picture.flags(drawing()) == ()
