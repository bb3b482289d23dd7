"""A model that knows only some sizes: whoever asks for another is told, once, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from imagemill import Engine, models
from imagemill.config import Settings
from imagemill.forecast import forecast
from imagemill.listing import forecast_text
from imagemill.progress import Silent
from imagemill.remarks import untrained
from imagemill.sitting import RunOptions
from imagemill.staging import Shape

Find = Callable[[str], models.Model]


@pytest.fixture(scope="module")
def tiny() -> models.Model:
    return models.resolve("tiny")


def of(*sizes: str, model: str = "tiny") -> list[Shape]:
    return [Shape(f"model:{model}", f"shape:{size}", 1, 1.0) for size in sizes]


def test_nothing_is_said_of_the_sizes_a_model_was_trained_at(tiny: models.Model) -> None:
    assert untrained([tiny], of("128x128", "160x96", "96x160")) == ()


def test_other_sizes_are_named_in_one_line(tiny: models.Model) -> None:
    (line,) = untrained([tiny], of("128x128", "64x64", "512x512"))
    assert line == ("tiny was trained at 128x128, 160x96, 96x160 alone; pictures of 64x64, 512x512 will look wrong")
    (line,) = untrained([tiny], of("8x8", "16x16", "24x24", "32x32", "40x40"))
    assert "pictures of 8x8, 16x16, 24x24 and 2 other sizes will" in line


def test_the_sizes_of_another_model_are_its_own_matter(tiny: models.Model) -> None:
    fake = models.resolve("fake")
    assert untrained([tiny, fake], [*of("128x128"), *of("640x480", model="fake")]) == ()
    edit = models.resolve("tiny-edit")
    (line,) = untrained([tiny, edit], [*of("160x96"), *of("160x96", model="tiny-edit")])
    assert line.startswith("tiny-edit was trained at 128x128 alone")


def test_a_model_from_a_folder_takes_any_size() -> None:
    folder = models.resolve(str(models.ASSETS / "tiny"))
    assert untrained([folder], of("64x64", model=folder.spec.name)) == ()


def test_the_plan_says_it(tmp_path: Path) -> None:
    source = tmp_path / "tasks.jsonl"
    source.write_text('{"prompt": "an owl"}\n{"prompt": "an owl", "size": "64x64"}\n', "utf-8")
    text = forecast_text(forecast(str(source), tmp_path / "out", Settings(), RunOptions()))
    assert len(re.findall("^warning: tiny was trained at .*; pictures of 64x64 will look wrong$", text, re.M)) == 1


class Heard(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_run_says_it_before_it_starts(tmp_path: Path) -> None:
    heard = Heard()
    with Engine(model="tiny", device="cpu", steps=1, show=heard) as engine:
        tasks = [{"prompt": "an owl", "size": "64x64"}]
        assert [outcome.state for outcome in engine.run(tasks, out=tmp_path / "out")] == ["done"]
        assert [line for line in heard.lines if "was trained at" in line] == [
            "tiny was trained at 128x128, 160x96, 96x160 alone; pictures of 64x64 will look wrong"
        ]
        heard.lines.clear()
        list(engine.run(tasks, out=tmp_path / "out"))
    assert heard.lines == []
