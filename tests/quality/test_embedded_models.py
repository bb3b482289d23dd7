"""The embedded models show what they are asked for. A part of the prompts of training/figures.py, with fixed seeds.

What is measured how stands in training/measure.py; all figures are in the models' MODEL_CARD.md.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import imagemill
from classifier import Classifier, load_classifier, single_scenes
from imagemill.models import ASSETS
from measure import (
    WHOLE,
    Picture,
    add_instructions,
    background_colour,
    background_prompts,
    count_prompts,
    nearer,
    noun_prompts,
    nouns_seen,
    parts,
    place_prompts,
    psnr,
    stands_at,
)
from nouns import load_nouns
from render import Atlas, numbers_of, on
from scenes import COLOURS

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
BENCH = ROOT / "examples" / "bench_tiny"
NOUNS = [noun.name for noun in load_nouns()]
LOOKS = ("line-icon", "pixel-art")
EMBEDDED = ("tiny", "tiny-edit")


class Painter:
    """The embedded models, each loaded once for all tests."""

    def __init__(self) -> None:
        self._engines: dict[str, imagemill.Engine] = {}

    def __call__(self, folder: Path, tasks: Sequence[dict[str, Any]], model: str = "tiny") -> list[Picture]:
        """The pictures of the tasks, in order."""
        if model not in self._engines:
            self._engines[model] = imagemill.Engine(model, device="cpu", workers=1)
        outcomes = list(self._engines[model].run(tasks, folder))
        assert [outcome.message for outcome in outcomes if not outcome.ok] == []
        return [opened(outcome.path) for outcome in sorted(outcomes, key=lambda outcome: outcome.seq)]

    def texts(self, folder: Path, prompts: Sequence[str]) -> list[Picture]:
        """The pictures of the prompts, in order."""
        return self(folder, [{"prompt": prompt} for prompt in prompts])

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()


@pytest.fixture(scope="module")
def paint() -> Iterator[Painter]:
    made = Painter()
    yield made
    made.close()


def opened(path: str | Path) -> Picture:
    return np.asarray(Image.open(path).convert("RGB"))


def run_apart(folder: Path, tasks: Sequence[dict[str, Any]], **settings: Any) -> list[Picture]:
    """The pictures of the tasks, in order, by a run of its own."""
    report = imagemill.run(tasks, out=folder, model="tiny", **settings)
    assert report.exit_code == 0, report
    results = map(json.loads, (folder / "results.jsonl").read_text("utf-8").splitlines())
    return [opened(folder / result["path"]) for result in results]


def share(values: Sequence[bool]) -> float:
    return sum(map(bool, values)) / len(values)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier(DATA / "noun_classifier.safetensors")


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas(DATA / "atlas.npz")


# --- what is measured with --------------------------------------------------------------------------------------------


def test_the_classifier_names_the_things_of_scenes_it_never_saw(classifier: Classifier, atlas: Atlas) -> None:
    named = {noun.name: noun for noun in load_nouns()}
    scenes = single_scenes([named[name] for name in atlas.nouns], 160, random.Random(2_000_000))
    pictures = [picture for part in batches(scenes, 32) for picture in drawn(atlas, part)]
    seen = nouns_seen(classifier, pictures)
    assert share([NOUNS[n] == atlas.nouns[s.things[0].noun] for n, s in zip(seen, scenes, strict=True)]) >= 0.97


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def drawn(atlas: Atlas, scenes: Sequence[Any]) -> list[Picture]:
    pictures = atlas.scenes(on(atlas.device, numbers_of(list(scenes))), 128, 128)
    return [np.asarray((picture * 255).round().byte().permute(1, 2, 0)) for picture in pictures]


# --- tiny -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("things", [WHOLE[:1], pytest.param(WHOLE[1:6], marks=pytest.mark.slow)], ids=len)
def test_backgrounds_have_the_asked_colour_and_things_are_recognised(
    things: Sequence[str], paint: Painter, tmp_path: Path, classifier: Classifier
) -> None:
    prompts = [pair for noun in things for pair in background_prompts([noun])]
    pictures = paint.texts(tmp_path, [prompt for prompt, _ in prompts])
    assert len(prompts) == len(things) * len(COLOURS)
    right = [background_colour(picture) == want for picture, (_, want) in zip(pictures, prompts, strict=True)]
    assert share(right) >= 0.98
    seen = nouns_seen(classifier, pictures)
    assert share([NOUNS[number] == things[place // len(COLOURS)] for place, number in enumerate(seen)]) >= 0.97


@pytest.mark.parametrize("count", [32, pytest.param(128, marks=pytest.mark.slow)])
def test_nouns_from_the_whole_list_are_recognised(
    count: int, paint: Painter, tmp_path: Path, classifier: Classifier
) -> None:
    chosen = random.Random(7).sample(NOUNS, count)
    seen = nouns_seen(classifier, paint.texts(tmp_path, [prompt for prompt, _ in noun_prompts(chosen)]))
    assert share([NOUNS[number] == noun for number, noun in zip(seen, chosen, strict=True)]) >= 0.95


@pytest.mark.slow
def test_two_and_three_things_are_counted(paint: Painter, tmp_path: Path) -> None:
    prompts = count_prompts(list(WHOLE[:10]))
    pictures = paint.texts(tmp_path, [prompt for prompt, _ in prompts])
    assert share([parts(picture) == count for picture, (_, count) in zip(pictures, prompts, strict=True)]) >= 0.9


@pytest.mark.slow
def test_things_stand_where_the_prompt_says(paint: Painter, tmp_path: Path) -> None:
    prompts = place_prompts(["apple", "rocket"])
    pictures = paint.texts(tmp_path, [prompt for prompt, _ in prompts])
    assert share([stands_at(picture, place) for picture, (_, place) in zip(pictures, prompts, strict=True)]) >= 0.95


def test_a_prompt_from_outside_gives_a_clean_picture(paint: Painter, tmp_path: Path) -> None:
    """No noise and no haze: neighbouring pixels are alike, as in a drawing, and there is something to see."""
    prompts = ["quantum chromodynamics", "一只在月亮下唱歌的猫", "the feeling of a long Sunday, " * 12, "?"]
    for picture in paint.texts(tmp_path, prompts):
        steps = np.abs(np.diff(picture.astype(int), axis=1))
        assert np.median(steps) <= 2
        assert picture.std() > 8


def test_batches_and_workers_do_not_change_a_picture(tmp_path: Path) -> None:
    tasks = [{"prompt": f"a {noun} on a white background"} for noun in WHOLE[:4]]
    alone = run_apart(tmp_path / "1", tasks, batch_size=1, workers=1)
    two = run_apart(tmp_path / "2", tasks, batch_size=1, workers=2)
    four = run_apart(tmp_path / "4", tasks, batch_size=4, workers=1)
    assert all((one == other).all() for one, other in zip(alone, two, strict=True))
    assert max(np.abs(one.astype(int) - other).max() for one, other in zip(alone, four, strict=True)) <= 1


YELLOW = 14
"""How many things are drawn on yellow, without an adapter and with each."""


def on_yellow(atlas: Atlas, count: int = YELLOW, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt + " on a yellow background", **fields} for prompt, _ in noun_prompts(atlas.nouns[:count])]


@pytest.fixture(scope="module")
def plain(paint: Painter, atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    return paint(tmp_path_factory.mktemp("plain"), on_yellow(atlas))


@pytest.mark.parametrize("look", [LOOKS[0], pytest.param(LOOKS[1], marks=pytest.mark.slow)])
def test_an_adapter_gives_its_look(
    look: str, paint: Painter, plain: list[Picture], tmp_path: Path, atlas: Atlas
) -> None:
    nouns, base = atlas.nouns[:YELLOW], plain
    none = paint(tmp_path / "0", on_yellow(atlas, 2, lora=f"{look}:0"))
    half = paint(tmp_path / "0.5", on_yellow(atlas, 4, lora=f"{look}:0.5"))
    full = paint(tmp_path / "1", on_yellow(atlas, lora=look))
    assert all((one == other).all() for one, other in zip(base, none, strict=False))
    far, there, back = np.mean(
        [
            [
                np.abs(start.astype(int) - end).mean(),
                np.abs(start.astype(int) - middle).mean(),
                np.abs(end.astype(int) - middle).mean(),
            ]
            for start, middle, end in zip(base, half, full, strict=False)
        ],
        axis=0,
    )
    assert far > 4
    assert max(there, back) < far
    assert share([nearer(picture, noun, atlas, look) for picture, noun in zip(full, nouns, strict=True)]) >= 0.85
    assert share([nearer(picture, noun, atlas, look) for picture, noun in zip(base, nouns, strict=True)]) <= 0.15


# --- tiny-edit --------------------------------------------------------------------------------------------------------


def test_edits_come_nearer_to_their_targets(paint: Painter, tmp_path: Path) -> None:
    pairs = [json.loads(line) for line in (BENCH / "bench.jsonl").read_text("utf-8").splitlines()]
    chosen = pairs[::2]
    tasks = [{"id": pair["id"], "prompt": pair["instruction"], "image": str(BENCH / pair["image"])} for pair in chosen]
    edited = paint(tmp_path, tasks, model="tiny-edit")
    gains = []
    for pair, picture in zip(chosen, edited, strict=True):
        source, target = (np.asarray(Image.open(BENCH / pair[name]).convert("RGB")) for name in ("image", "target"))
        gains.append(psnr(picture, target) > psnr(source, target))
    assert {pair["category"] for pair in chosen} == {"background", "color", "object", "geometry", "tone"}
    assert share(gains) >= 0.9


@pytest.mark.slow
def test_things_that_are_added_are_recognised(paint: Painter, tmp_path: Path, classifier: Classifier) -> None:
    added = add_instructions(random.Random(5).sample(NOUNS, 24), tmp_path / "plain")
    seen = nouns_seen(classifier, paint(tmp_path / "run", [task for task, _ in added], model="tiny-edit"))
    assert share([NOUNS[number] == want for number, (_, want) in zip(seen, added, strict=True)]) >= 0.9


def test_the_benchmark_is_whole() -> None:
    pairs = [json.loads(line) for line in (BENCH / "bench.jsonl").read_text("utf-8").splitlines()]
    assert len({pair["id"] for pair in pairs}) == 50
    assert all([pair["category"] for pair in pairs].count(kind) == 10 for kind in {p["category"] for p in pairs})
    for pair in pairs:
        pictures = {name: np.asarray(Image.open(BENCH / pair[name])) for name in ("image", "target", "mask")}
        assert {picture.shape[:2] for picture in pictures.values()} == {(128, 128)}
        outside = pictures["mask"] == 0
        apart = np.abs(pictures["image"].astype(int) - pictures["target"]).max(2)
        assert apart[outside].max(initial=0) <= 6
        assert (~outside).any()
    assert sum(path.stat().st_size for path in BENCH.iterdir()) < 2_000_000


# --- the files --------------------------------------------------------------------------------------------------------


def files(name: str) -> list[Path]:
    return sorted(path for path in (ASSETS / name).rglob("*") if path.is_file())


@pytest.mark.parametrize("name", EMBEDDED)
def test_weights_are_those_that_were_measured(name: str) -> None:
    lines = (DATA / "embedded.sha256").read_text("utf-8").splitlines()
    kept = {path: digest for digest, path in (line.split("  ") for line in lines) if path.startswith(f"{name}/")}
    found = {path.relative_to(ASSETS).as_posix(): path for path in files(name) if path.suffix != ".md"}
    assert {place: hashlib.sha256(path.read_bytes()).hexdigest() for place, path in found.items()} == kept


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_model_fits_into_20_mb(name: str) -> None:
    pipeline = [path for path in files(name) if "loras" not in path.parts and path.suffix != ".md"]
    assert sum(path.stat().st_size for path in pipeline) <= 20_000_000


@pytest.mark.parametrize("name", EMBEDDED)
def test_weights_are_float16_safetensors(name: str) -> None:
    from safetensors import safe_open

    weights = [path for path in files(name) if path.suffix not in (".json", ".jinja", ".md")]
    assert weights
    for path in weights:
        assert path.suffix == ".safetensors"
        with safe_open(path, "pt") as file:
            kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        assert kinds <= {torch.float16, torch.int64}


def test_the_files_have_mode_0644() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-s", "src/imagemill/assets"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    assert {line.split()[0] for line in listed.stdout.splitlines()} == {"100644"}
