"""The embedded models show what they are asked for. A part of the prompts of training/figures.py, with fixed seeds.

What is measured how stands in training/measure.py; all figures are in the models' MODEL_CARD.md.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Sequence
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


def paint(folder: Path, tasks: Sequence[dict[str, Any]], **settings: Any) -> list[Picture]:
    """The pictures of the tasks, in order."""
    report = imagemill.run(tasks, out=folder, **{"model": "tiny", "workers": 2, **settings})
    assert report.exit_code == 0, report
    results = map(json.loads, (folder / "results.jsonl").read_text("utf-8").splitlines())
    return [np.asarray(Image.open(folder / result["path"]).convert("RGB")) for result in results]


def painted(folder: Path, prompts: Sequence[str], **fields: Any) -> list[Picture]:
    return paint(folder, [{"prompt": prompt, **fields} for prompt in prompts])


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


def test_backgrounds_have_the_asked_colour_and_things_are_recognised(tmp_path: Path, classifier: Classifier) -> None:
    prompts = [pair for noun in WHOLE[:3] for pair in background_prompts([noun])]
    pictures = painted(tmp_path, [prompt for prompt, _ in prompts])
    assert len(prompts) == 3 * len(COLOURS)
    right = [background_colour(picture) == want for picture, (_, want) in zip(pictures, prompts, strict=True)]
    assert share(right) >= 0.98
    seen = nouns_seen(classifier, pictures)
    assert share([NOUNS[number] == WHOLE[place // len(COLOURS)] for place, number in enumerate(seen)]) >= 0.97


def test_nouns_from_the_whole_list_are_recognised(tmp_path: Path, classifier: Classifier) -> None:
    chosen = random.Random(7).sample(NOUNS, 48)
    seen = nouns_seen(classifier, painted(tmp_path, [prompt for prompt, _ in noun_prompts(chosen)]))
    assert share([NOUNS[number] == noun for number, noun in zip(seen, chosen, strict=True)]) >= 0.95


def test_two_and_three_things_are_counted(tmp_path: Path) -> None:
    prompts = count_prompts(list(WHOLE[:10]))
    pictures = painted(tmp_path, [prompt for prompt, _ in prompts])
    assert share([parts(picture) == count for picture, (_, count) in zip(pictures, prompts, strict=True)]) >= 0.9


def test_things_stand_where_the_prompt_says(tmp_path: Path) -> None:
    prompts = place_prompts(["apple", "rocket"])
    pictures = painted(tmp_path, [prompt for prompt, _ in prompts])
    assert share([stands_at(picture, place) for picture, (_, place) in zip(pictures, prompts, strict=True)]) >= 0.95


def test_a_prompt_from_outside_gives_a_clean_picture(tmp_path: Path) -> None:
    """No noise and no haze: neighbouring pixels are alike, as in a drawing, and there is something to see."""
    prompts = ["quantum chromodynamics", "一只在月亮下唱歌的猫", "the feeling of a long Sunday, " * 12, "?"]
    for picture in painted(tmp_path, prompts):
        steps = np.abs(np.diff(picture.astype(int), axis=1))
        assert np.median(steps) <= 2
        assert picture.std() > 8


def test_batches_and_workers_do_not_change_a_picture(tmp_path: Path) -> None:
    tasks = [{"prompt": f"a {noun} on a white background"} for noun in WHOLE[:8]]
    alone = paint(tmp_path / "1", tasks, batch_size=1, workers=1)
    two = paint(tmp_path / "2", tasks, batch_size=1)
    four = paint(tmp_path / "4", tasks, batch_size=4, workers=1)
    assert all((one == other).all() for one, other in zip(alone, two, strict=True))
    assert max(np.abs(one.astype(int) - other).max() for one, other in zip(alone, four, strict=True)) <= 1


@pytest.mark.parametrize("look", LOOKS)
def test_an_adapter_gives_its_look(look: str, tmp_path: Path, atlas: Atlas) -> None:
    nouns = atlas.nouns[:14]
    tasks = [{"prompt": prompt + " on a yellow background"} for prompt, _ in noun_prompts(nouns)]
    base = paint(tmp_path / "base", tasks)
    none = paint(tmp_path / "0", tasks[:2], loras=[f"{look}:0"])
    half = paint(tmp_path / "0.5", tasks[:8], loras=[f"{look}:0.5"])
    full = paint(tmp_path / "1", tasks, loras=[look])
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


def test_edits_come_nearer_to_their_targets(tmp_path: Path) -> None:
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
