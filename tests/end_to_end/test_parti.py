"""The main job on real input: PartiPrompts through the embedded model on two workers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from command import Ended
from workplace import Workplace

COMMAND = ("--prompt-column", "Prompt", "--model", "tiny", "--workers", "2", "--size", "64x64", "--steps", "2")


def paint(place: Workplace, source: Path, *options: str) -> Ended:
    return place("run", source, *COMMAND, "--device", "cpu", "--out", "out", *options)


def check(place: Workplace, source: Path, ended: Ended, count: int) -> None:
    """`count` valid pictures of the first prompts, all different, made by both workers."""
    assert ended.code == 0, ended.text
    assert f"{count} done ({count} in this run" in ended.out
    with source.open(encoding="utf-8") as file:
        prompts = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:count]
    assert len(prompts) == count
    results = place.results()
    assert [one["prompt"] for one in results] == [row["Prompt"] for row in prompts]
    assert [one["metadata"]["Category"] for one in results] == [row["Category"] for row in prompts]
    assert [one["seed"] for one in results] == list(range(42, 42 + count))
    for one in results:
        with Image.open(place.folder / "out" / one["path"]) as image:
            image.load()
            assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")
            assert len(set(image.get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata())) > 1
    assert len(set(place.pixels().values())) == count
    assert {one["worker"] for one in results} == {0, 1}
    assert place.leftovers() == []


def test_the_first_prompts_become_as_many_pictures_on_two_workers(place: Workplace, data: Path) -> None:
    source = data / "prompts" / "parti_prompts.tsv"
    check(place, source, paint(place, source, "--limit", "24"), 24)


@pytest.mark.slow
def test_all_1632_prompts_become_pictures_on_two_workers(place: Workplace, data: Path) -> None:
    source = data / "prompts" / "parti_prompts.tsv"
    check(place, source, paint(place, source), 1632)
    again = paint(place, source)
    assert "1632 done (0 in this run" in again.out
