"""Rows 8 and 10: pictures that are none, on the way out (NaN, black, of one colour) and on the way in (missing, cut, bombs)."""

from __future__ import annotations

import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checks import after, at_start
from PIL import Image

import imagemill
from imagemill import source_image
from imagemill.errors import BadTask

SIZE = "16x16"

# --- row 8: what a model may give -------------------------------------------------------------------------------------


def test_nan_fails_and_black_and_constant_pictures_are_done_and_flagged_in_every_report(place: Any) -> None:
    scripts = {"nan": {"nan": True}, "black": {"black": True}, "grey": {"grey": True}, "good": {}}
    place.tasks([{"id": name, "prompt": name, "size": SIZE, "fake": script} for name, script in scripts.items()])
    shim = """
    if fd >= 0:
        import imagemill.runners.fake as fake
        from PIL import Image
        made = fake.picture
        def picture(planned, black=False):
            grey = planned.task.metadata["fake"].get("grey")
            return Image.new("RGB", (16, 16), (90, 90, 90)) if grey else made(planned, black)
        fake.picture = picture
    """
    ended = place.fake("tasks.jsonl", "out", "--isolate", **at_start(place, shim))
    states = after(place, ended)
    assert states == {"nan": "failed", "black": "done", "grey": "done", "good": "done"}
    found = {one["id"]: one for one in place.results()}
    assert found["nan"]["kind"] == "bad_output"
    assert "NaN" in found["nan"]["message"]
    assert not (place.folder / "out" / "nan.png").exists()
    assert {name: one["flags"] for name, one in found.items()} == {
        "nan": [],
        "black": ["black", "constant"],
        "grey": ["constant"],
        "good": [],
    }
    out = place.folder / "out"
    counts = json.loads((out / "report.json").read_text("utf-8"))["flags"]["counts"]
    assert counts == {"constant": 2, "black": 1}
    assert re.search(
        r"Flagged pictures.*\| black \| black, constant \|.*\| grey \| constant \|",
        (out / "report.md").read_text(),
        re.S,
    )
    page = (out / "report.html").read_text("utf-8")
    assert page.count('<span class="chip warn">constant</span>') == 2
    assert page.count('<span class="chip warn">black</span>') == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_fails_before_the_cast_would_hide_it(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cast to bytes makes such numbers black or white, so that nobody would see them."""
    from imagemill.families.z_image import ZImage

    whole = ZImage.decode

    def spoilt(family: ZImage, pipe: Any, tasks: Any, latents: Any) -> Any:
        pictures = whole(family, pipe, tasks, latents).clone()
        for number, task in enumerate(tasks):
            if task.prompt == "b":
                pictures[number, 1, 5, 5] = value
        return pictures

    monkeypatch.setattr(ZImage, "decode", spoilt)
    with imagemill.Engine(model="tiny", device="cpu", size="64x64", steps=1, batch_size=3) as engine:
        outcomes = list(engine.run(list("abc"), tmp_path))
    assert [(one.state, one.kind) for one in outcomes] == [("done", None), ("failed", "bad_output"), ("done", None)]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["000001.png", "000003.png"]


# --- row 10: what a task may name -------------------------------------------------------------------------------------


def png(size: tuple[int, int] = (32, 32), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 90).convert(mode).save(out, "PNG")
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int = 11_000) -> bytes:
    """A PNG of one bit a pixel: 363 MB once it is RGB."""
    lines = zlib.compressobj(9)
    body = b"".join(lines.compress(bytes(1 + side // 8)) for _ in range(side)) + lines.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def lying() -> bytes:
    """A PNG whose header says 16x16 and whose pixels go on for 256 MiB."""
    lines = zlib.compressobj(9)
    body = b"".join(lines.compress(bytes(2**20)) for _ in range(256)) + lines.flush()
    head = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose text chunk unpacks to 256 MiB."""
    lines = zlib.compressobj(9)
    text = b"".join(lines.compress(bytes(2**20)) for _ in range(256)) + lines.flush()
    whole = png()
    return whole[:33] + chunk(b"zTXt", b"Comment\0\0" + text) + whole[33:]


BROKEN: dict[str, tuple[bytes, str]] = {
    "cut": (png()[:-30], "damaged or cut off"),
    "cut_early": (png()[:40], "none that can be read"),
    "no_end": (png()[:-12], "damaged or cut off"),
    "page": (b"<html>404</html>", "none that can be read"),
    "pickle": (b"\x80\x04\x95" + bytes(40), "none that can be read"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "none that can be read"),
    "bomb": (bomb(), "giant: 11000x11000"),
    "empty_picture": (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)),
        "damaged|empty",
    ),
}


def test_the_bomb_is_as_small_as_the_promise_says() -> None:
    assert len(bomb()) < 16_000
    assert 3 * 11_000**2 == 363_000_000


def test_broken_pictures_fail_their_tasks_alone_without_being_decoded(place: Any) -> None:
    for name, (content, _) in BROKEN.items():
        place.write(f"{name}.png", content)
    place.write("good.png", png())
    names = [*BROKEN, "good"]
    place.tasks([{"id": name, "prompt": "a", "size": SIZE, "images": [f"{name}.png"]} for name in names])
    running = place.start_fake("tasks.jsonl", "out", "--workers", "1", "--isolate")
    ended = running.wait()
    states = after(place, ended, running=running, ids=names)
    assert states == {name: "done" if name == "good" else "failed" for name in states}
    found = {one["id"]: one for one in place.results()}
    for name, (_, reason) in BROKEN.items():
        assert re.search(reason, found[name]["message"]), found[name]["message"]
        assert (found[name]["kind"], found[name]["attempts"]) == ("bad_task", 1)


def test_a_picture_that_is_not_there_is_its_rows_problem_before_anything_starts(place: Any) -> None:
    place.write("empty.png", b"")
    (place.folder / "folder.png").mkdir()
    os.mkfifo(place.folder / "pipe.png")
    os.symlink("/dev/zero", place.folder / "device.png")
    os.symlink("loop.png", place.folder / "loop.png")
    reasons = {
        "gone": "no such picture file",
        "empty": "is an empty file",
        "folder": "is a folder",
        "pipe": "is no regular file",
        "device": "is no regular file",
        "loop": "cannot be read",
    }
    place.tasks([{"id": name, "prompt": "a", "images": [f"{name}.png"]} for name in reasons])
    ended = place.fake("tasks.jsonl")
    assert ended.code == 2, ended.text
    for number, (name, reason) in enumerate(reasons.items(), 1):
        assert re.search(rf"line {number}: images\[0\]: .*{name}\.png: .*{reason}", ended.err), ended.err
    assert not list((place.folder / "out").rglob("*.png"))


def test_a_picture_that_goes_or_changes_while_the_run_goes_on_fails_its_task(place: Any) -> None:
    for name in ("gone", "changed", "good"):
        place.write(f"{name}.png", png())
    shim = f"""
    if fd >= 0:
        import pathlib
        pathlib.Path({str(place.folder)!r}, "gone.png").unlink(missing_ok=True)
        pathlib.Path({str(place.folder)!r}, "changed.png").write_bytes(b"other")
    """
    names = ("gone", "changed", "good")
    place.tasks([{"id": name, "prompt": "a", "size": SIZE, "images": [f"{name}.png"]} for name in names])
    ended = place.fake("tasks.jsonl", "out", "--isolate", **at_start(place, shim))
    assert ended.code == 1, ended.text
    states = {one["id"]: one["state"] for one in place.results()}
    assert states == {"gone": "failed", "changed": "failed", "good": "done"}


MEMORY = """
import resource, sys
from imagemill import source_image
from imagemill.errors import BadTask
source_image.read(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    for look in (source_image.header, source_image.read, lambda path: source_image.thumbnail(path, 64)):
        try:
            look(path)
        except BadTask:
            pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
BOUND = 64
"""MiB that pictures with a lie inside may cost; each would unpack to several times as much."""


def test_no_bomb_costs_the_memory_it_claims(tmp_path: Path) -> None:
    bombs = {"bomb": bomb(), "lying": lying(), "text": text_bomb()}
    for name, content in {"good": png(), **bombs}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    paths = [str(tmp_path / f"{name}.png") for name in ("good", *bombs)]
    ended = subprocess.run([sys.executable, "-c", MEMORY, *paths], check=True, capture_output=True, text=True)
    assert int(ended.stdout) < BOUND


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO")


def damaged() -> Iterator[bytes]:
    """Whole pictures of every kind with bytes changed, cut out or put in, by a fixed seed."""
    dice = random.Random(20250711)
    for kind in KINDS:
        out = io.BytesIO()
        Image.effect_noise((24, 24), 90).convert("RGB").save(out, kind)
        whole = out.getvalue()
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(dice.randint(1, 8)):
                place = dice.randrange(len(data))
                match dice.randrange(3):
                    case 0:
                        data[place] = dice.randrange(256)
                    case 1:
                        del data[place : place + dice.randint(1, 40)]
                    case _:
                        data[place:place] = dice.randbytes(dice.randint(1, 8))
                if not data:
                    break
            yield bytes(data)


def test_damaged_pictures_of_every_kind_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    path, read, refused = tmp_path / "a", 0, []
    for data in damaged():
        path.write_bytes(data)
        for look in (source_image.header, source_image.read):
            try:
                look(path)
                read += 1
            except BadTask as error:
                refused.append(str(error))
    assert read
    assert refused
    assert not [message for message in refused if "\n" in message]
