"""The judges without a model: their figures against values worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagemill import models, runners
from imagemill.errors import BadTask
from imagemill.records import Task
from imagemill.runners import Result, similarity
from orders import order_of, planned

JUDGES = ("judge:reference", "judge:preservation")


def flat(path: Path, colour: Any, size: tuple[int, int] = (16, 12), mode: str = "RGB") -> str:
    Image.new(mode, size, colour).save(path)
    return str(path)


def noise(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def result_of(images: Sequence[str], judge: str = JUDGES[0], changed: bool = False) -> Result:
    spec = models.resolve(judge).spec
    runner = runners.create(spec.runner, "cpu", 1)
    task = Task("a", "compare", images=tuple(images))
    order = order_of(planned(task, spec.revision, 1), model=spec)
    if changed:
        noise(Path(images[0]), 99)
    runner.load(spec, lambda *_: None)
    (result,) = runner.run(order, lambda *_: None)
    assert runner.resident == {f"model:{judge}"}
    runner.unload()
    return result


def figures(*images: str, judge: str = JUDGES[0]) -> dict[str, Any]:
    result = result_of(images, judge)
    assert result.answer is not None, result.error
    found: dict[str, Any] = json.loads(result.answer.text)
    return found


@pytest.mark.parametrize("judge", JUDGES)
def test_equal_pictures_are_as_alike_as_can_be_and_the_infinite_psnr_is_a_hundred(tmp_path: Path, judge: str) -> None:
    one = noise(tmp_path / "a.png", 1)
    assert figures(one, one, judge=judge) == {"psnr": 100.0, "ssim": 1.0, "l1": 0.0, "resized": False}


@pytest.mark.parametrize("judge", JUDGES)
def test_flat_pictures_give_what_the_formulas_say(tmp_path: Path, judge: str) -> None:
    found = figures(flat(tmp_path / "a.png", (100,) * 3), flat(tmp_path / "b.png", (120,) * 3), judge=judge)
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / 400), abs=1e-6)  # 22.110 dB
    assert found["l1"] == pytest.approx(20 / 255, abs=1e-6)
    c1 = (0.01 * 255) ** 2
    assert found["ssim"] == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), abs=1e-6)  # no variance


def test_one_channel_of_three_counts_a_third(tmp_path: Path) -> None:
    found = figures(flat(tmp_path / "a.png", (0, 0, 0)), flat(tmp_path / "b.png", (255, 0, 0)))
    assert found["l1"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["psnr"] == pytest.approx(10 * math.log10(3), abs=1e-6)


def test_ssim_is_that_of_the_paper_at_a_pixel_worked_out_in_full() -> None:
    random = np.random.default_rng(3)
    one, other = random.uniform(0, 255, (2, 11, 11, 1))
    places = np.arange(11) - 5
    window = np.exp(-(places[:, None] ** 2 + places[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = one[..., 0], other[..., 0]
    mean_x, mean_y = (window * x).sum(), (window * y).sum()
    var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
    shared = (window * (x - mean_x) * (y - mean_y)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    by_hand = (2 * mean_x * mean_y + c1) * (2 * shared + c2)
    by_hand /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    assert similarity.ssim_map(one, other)[5, 5, 0] == pytest.approx(by_hand, abs=1e-9)


def test_a_negative_is_dissimilar_and_a_little_noise_is_not() -> None:
    one = np.random.default_rng(1).uniform(0, 255, (32, 32, 3))
    assert similarity.ssim(one, 255 - one) < -0.8
    assert similarity.ssim(one, one + np.random.default_rng(2).normal(0, 2, one.shape)) > 0.98


def test_a_mask_parts_what_was_to_be_edited_from_the_rest(tmp_path: Path) -> None:
    edit, other, mask = (Image.new("RGB", (32, 16), (50, 50, 50)) for _ in range(3))
    edit.paste((150, 150, 150), (0, 0, 8, 16))
    mask = Image.new("L", (32, 16))
    mask.paste(255, (0, 0, 8, 16))
    places = [str(tmp_path / name) for name in ("edit.png", "other.png", "mask.png")]
    for picture, place in zip((edit, other, mask), places, strict=True):
        picture.save(place)
    found = figures(*places)
    assert found["l1_masked"] == pytest.approx(100 / 255, abs=1e-6)
    assert found["psnr_masked"] == pytest.approx(10 * math.log10(255**2 / 100**2), abs=1e-6)
    assert (found["l1_outside"], found["psnr_outside"]) == (0.0, 100.0)
    assert found["l1"] == pytest.approx(25 / 255, abs=1e-6)
    assert found["ssim_masked"] < found["ssim"] < found["ssim_outside"]


@pytest.mark.parametrize(("level", "there", "absent"), [(255, "_masked", "_outside"), (0, "_outside", "_masked")])
def test_a_mask_with_one_side_has_no_figure_for_the_other(tmp_path: Path, level: int, there: str, absent: str) -> None:
    one, other = noise(tmp_path / "a.png", 1), noise(tmp_path / "b.png", 2)
    found = figures(one, other, flat(tmp_path / "m.png", level, (40, 30), "L"))
    assert found[f"psnr{there}"] == found["psnr"]
    assert f"psnr{absent}" not in found


def test_another_size_is_brought_to_the_edits_and_that_is_said(tmp_path: Path) -> None:
    edit, other = flat(tmp_path / "a.png", (9, 9, 9), (20, 10)), flat(tmp_path / "b.png", (9, 9, 9), (33, 21))
    assert figures(edit, other) == {"psnr": 100.0, "ssim": 1.0, "l1": 0.0, "resized": True}
    mask = flat(tmp_path / "m.png", 255, (7, 5), "L")
    assert figures(edit, edit, mask)["resized"] is True


@pytest.mark.parametrize("count", [1, 4])
def test_too_few_or_too_many_pictures_are_refused(tmp_path: Path, count: int) -> None:
    result = result_of([noise(tmp_path / "a.png", 1)] * count, "judge:preservation")
    assert isinstance(result.error, BadTask)
    assert f"names {count} pictures; give the edit, the source and perhaps a mask" in str(result.error)


def test_an_edit_that_changed_since_the_run_was_planned_is_not_judged(tmp_path: Path) -> None:
    result = result_of([noise(tmp_path / "a.png", 1), noise(tmp_path / "b.png", 2)], changed=True)
    assert isinstance(result.error, BadTask)
    assert "has changed since the run was planned" in str(result.error)


def test_a_broken_picture_fails_its_own_task(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    result = result_of([str(tmp_path / "a.png"), noise(tmp_path / "b.png", 2)])
    assert isinstance(result.error, BadTask)


def test_an_order_for_another_judge_is_a_defect(tmp_path: Path) -> None:
    spec = models.resolve("judge:reference").spec
    runner = runners.create(spec.runner, "cpu", 1)
    runner.load(spec, lambda *_: None)
    order = order_of(model=replace(spec, name="judge:preservation"))
    with pytest.raises(ValueError, match="is for model 'judge:preservation'"):
        list(runner.run(order, lambda *_: None))
