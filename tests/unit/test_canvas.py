"""The size of an edit follows its source unless a size is asked for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.canvas import EDIT_PIXELS, edited_size, output_size
from imagemill.plan import Defaults, PlannedModel, resolve
from imagemill.records import Task

stable = settings(max_examples=200, deadline=None, derandomize=True, database=None)
MEGAPIXEL = (1024, 1024)


@pytest.mark.parametrize(
    ("source", "own", "wanted"),
    [
        ((1600, 900), MEGAPIXEL, (1360, 768)),
        ((900, 1600), MEGAPIXEL, (768, 1360)),
        ((500, 500), MEGAPIXEL, (1024, 1024)),
        ((1600, 900), (128, 128), (176, 96)),
        ((64, 48), (None, None), (64, 48)),
        ((6400, 4800), (None, None), (1184, 880)),
        (None, (128, 64), (128, 64)),
        (None, (None, None), (1024, 1024)),
        ((100, 1), (256, 256), (720, 96)),
    ],
)
def test_without_a_size_the_source_gives_the_aspect_and_the_model_the_pixels(
    source: tuple[int, int] | None, own: tuple[int | None, int | None], wanted: tuple[int, int]
) -> None:
    assert edited_size(None, None, source, own, 16) == wanted


def test_what_is_asked_for_is_taken_as_it_is_and_one_side_gives_the_other() -> None:
    assert edited_size(640, 200, (1600, 900), MEGAPIXEL, 16) == (640, 200)
    assert edited_size(640, None, (1600, 900), MEGAPIXEL, 16) == (640, 368)
    assert edited_size(None, 368, (1600, 900), MEGAPIXEL, 16) == (656, 368)
    assert edited_size(7, None, (1600, 900), MEGAPIXEL, 16) == (7, 16)  # planning refuses the 7


@stable
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(64, 2048), st.sampled_from([1, 8, 16, 32]))
def test_the_size_has_about_the_pixels_and_the_aspect(width: int, height: int, side: int, multiple: int) -> None:
    wide, high = output_size(width, height, side * side, multiple)
    assert wide % multiple == high % multiple == 0
    aspect = min(max(width / height, 1 / 8), 8)
    assert abs(wide - side * math.sqrt(aspect)) <= max(multiple / 2, multiple - side / math.sqrt(8)) + 1e-6
    assert abs(high - side / math.sqrt(aspect)) <= max(multiple / 2, multiple - side / math.sqrt(8)) + 1e-6
    assert output_size(wide, wide, EDIT_PIXELS, 16) == (1024, 1024)


class Edits:
    name, fields, multiple, max_images = "edits", frozenset({"images"}), 16, 1

    def group(self, task: Task) -> str:
        return ""

    def cost(self, task: Task) -> float:
        return 1.0


def test_a_task_goes_before_the_run_and_the_run_before_the_source() -> None:
    model = PlannedModel("m", "r", Edits(), Defaults(width=128, height=128, steps=1))

    def size(run: Defaults, **fields: int) -> tuple[int | None, int | None]:
        task = resolve(Task("a", "p", images=("x",), **fields), 0, run, model, "png", (200, 100))
        return task.width, task.height

    assert size(Defaults()) == (176, 96)
    assert size(Defaults(width=64, height=64)) == (64, 64)
    assert size(Defaults(width=64, height=64), width=32, height=48) == (32, 48)
    assert size(Defaults(), width=64) == (64, 32)
    assert size(Defaults(width=64, height=64), width=0) == (0, 64)  # planning refuses it
