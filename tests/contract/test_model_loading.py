"""Which model folders load, and that an incomplete one never does: the libraries only warn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import SPEC, TINY, loaded, no_beat, picture, planned, run

from imagemill.errors import BadModel
from imagemill.families import family
from imagemill.runners.diffusion import DiffusionRunner, create
from imagemill.runners.loading import choose_family, refuse_gaps


@pytest.fixture(scope="module")
def runner() -> Iterator[DiffusionRunner]:
    yield from loaded()


def test_an_unloaded_runner_holds_nothing_and_can_load_again() -> None:
    made, beats = create("cpu", 1), []
    assert made.resident == frozenset()
    made.load(SPEC, lambda *beat: beats.append(beat))
    assert {beat[:2] for beat in beats} == {("load", -1)}
    assert beats[-1][2:] == (5, 5)
    first = picture(made)
    made.unload()
    assert made.resident == frozenset()
    assert made._pipe is None
    with pytest.raises(BadModel, match="no model is loaded"):
        run(made, planned())
    made.load(SPEC, no_beat)
    assert np.array_equal(first, picture(made))
    made.unload()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model to damage."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def load_error(folder: Path, **changes: Any) -> str:
    with pytest.raises(BadModel) as caught:
        create("cpu", 1).load(replace(SPEC, folder=str(folder), **changes), no_beat)
    return str(caught.value)


def weights_of(folder: Path, component: str) -> Path:
    (path,) = (folder / component).glob("*.safetensors")
    return path


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("transformer", "layers.0.attention.to_q.weight"),
        ("text_encoder", "layers.1.mlp.up_proj.weight"),
        ("vae", "decoder.conv_out.bias"),
    ],
)
def test_a_missing_weight_refuses_the_model(folder: Path, component: str, key: str) -> None:
    path = weights_of(folder, component)
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path, metadata={"format": "pt"})
    message = load_error(folder)
    assert "weights missing: 1," in message
    assert key in message


def test_a_sharded_component_loads_and_a_missing_shard_refuses_it(folder: Path) -> None:
    path = weights_of(folder, "transformer")
    tensors = load_file(path)
    path.unlink()
    halves = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    names = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, path.parent / name, metadata={"format": "pt"})
    places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    made = create("cpu", 1)
    made.load(replace(SPEC, folder=str(folder)), no_beat)
    made.unload()
    (path.parent / names[1]).unlink()
    assert "transformer" in load_error(folder)


def test_pickled_torn_and_absent_weights_are_refused(folder: Path) -> None:
    path = weights_of(folder, "vae")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert "does not load" in load_error(folder)
    path.unlink()
    assert "has no safetensors weights" in load_error(folder)
    torch.save({}, path.with_suffix(".bin"))
    assert "only pickled weights" in load_error(folder)


def test_folders_that_are_no_model_are_refused(folder: Path) -> None:
    assert "does not exist" in load_error(folder / "nowhere")
    assert "no model_index.json" in load_error(folder / "vae")
    assert "serves FluxPipeline, not ZImagePipeline" in load_error(folder, family="flux")
    assert "dtype 'int3' is not known" in load_error(folder, dtype="int3")
    place = folder / "model_index.json"
    index = json.loads(place.read_text())
    for name, message in (
        ("MysteryPipeline", "has no pipeline class MysteryPipeline"),
        ("QwenImageEditInpaintPipeline", "is not served; pipelines that make a picture from text, or edit one by text"),
        ("FluxControlPipeline", "is not served"),
        ("FluxFillPipeline", "is not served"),
        ("StableDiffusionControlNetPipeline", "is not served"),
        ("WanPipeline", "is not served"),
        ("AutoencoderKL", "is not served"),
        (["pipeline", "Custom"], "names no pipeline class"),
    ):
        place.write_text(json.dumps(index | {"_class_name": name}))
        assert message in load_error(folder)
    place.write_text("{")
    assert "does not read" in load_error(folder)


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [
        ("Flux2KleinPipeline", "flux2"),
        ("QwenImageEditPlusPipeline", "qwen_edit"),
        ("FluxKontextPipeline", "flux_kontext"),
        ("StableDiffusionInstructPix2PixPipeline", "generic"),
        ("StableDiffusionXLImg2ImgPipeline", "generic"),
    ],
)
def test_pipelines_that_edit_by_text_are_served(pipeline: str, name: str) -> None:
    assert choose_family(SPEC, pipeline).name == name


def test_a_weight_left_on_meta_is_refused() -> None:
    with pytest.raises(BadModel, match="'weight' of unet was never filled"):
        refuse_gaps("unet", torch.nn.Linear(2, 2, device="meta"))


def test_the_embedded_model_is_small_readable_and_a_divisor_of_the_family_s_multiple(runner: DiffusionRunner) -> None:
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3 * 2**20
    assert family("z_image").multiple % (runner._pipe.vae_scale_factor * 2) == 0
