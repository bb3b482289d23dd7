"""Adapters on the embedded model, as layers and merged: exact strengths, an untouched base, and what is refused."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import SPEC, loaded, no_beat, picture, planned, run, write_lora

from imagemill.errors import BadTask
from imagemill.records import Lora
from imagemill.runners.adapters import Adapters
from imagemill.runners.diffusion import DiffusionRunner, create
from imagemill.runners.merged import Merged
from random_lora import make_lora

Make = Callable[..., Lora]
Kind = Callable[..., Adapters | Merged]


def layers(runner: DiffusionRunner, **bounds: int) -> Adapters:
    return Adapters(**bounds)


def merged(runner: DiffusionRunner, **bounds: int) -> Merged:
    return Merged(runner._pipe, **bounds)


@pytest.fixture(scope="module", params=[layers, merged])
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param
    return made


@pytest.fixture(scope="module")
def runner(kind: Kind) -> Iterator[DiffusionRunner]:
    for made in loaded():
        made.adapters = kind(made)
        yield made


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(write_lora, tmp_path)


def refused(runner: DiffusionRunner, *loras: Lora) -> str:
    (result,) = run(runner, planned(loras=loras))
    assert isinstance(result.error, BadTask)
    assert result.image is None
    return str(result.error)


def base_weights(runner: DiffusionRunner) -> dict[str, Any]:
    """Every weight of the model without those of adapters, under the names of the bare model."""
    state = runner._pipe.transformer.state_dict()
    return {key.replace(".base_layer", ""): tensor.clone() for key, tensor in state.items() if ".lora_" not in key}


def test_base_pictures_and_base_weights_are_bit_identical_after_many_switches(kind: Kind, make: Make) -> None:
    made = create("cpu", 1)
    made.load(SPEC, no_beat)
    made.adapters = kind(made, max_files=2)
    weights, before = base_weights(made), picture(made)
    loras = [make(seed) for seed in (1, 2, 3)]
    for round_number in range(4):
        picture(made, loras[round_number % 3])
        picture(made, *(replace(lora, strength=0.1 * round_number + 0.3) for lora in loras[:2]))
        assert np.array_equal(before, picture(made))
    assert made.adapters.evictions > 0
    after = base_weights(made)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    made.adapters.clear(made._pipe)
    assert made._pipe.transformer.state_dict().keys() == weights.keys()
    assert np.array_equal(before, picture(made))
    made.unload()


def test_strengths_act_and_strength_zero_is_the_base(runner: DiffusionRunner, make: Make) -> None:
    base, lora = picture(runner), make()
    full, half = picture(runner, lora), picture(runner, replace(lora, strength=0.5))
    assert np.abs(full - base).mean() > 1
    assert np.abs(half - full).mean() > 0.5
    assert np.array_equal(base, picture(runner, replace(lora, strength=0.0)))
    assert np.array_equal(full, picture(runner, lora))
    twice = (replace(lora, strength=0.75), replace(lora, strength=0.25))
    assert np.array_equal(full, picture(runner, *twice))


def test_a_strength_is_exactly_that_multiple_of_the_adapter(runner: DiffusionRunner, make: Make) -> None:
    def double(tensors: dict[str, Any]) -> None:
        for key in tensors:
            if "lora_B" in key:
                tensors[key] = 2 * tensors[key]

    assert np.array_equal(picture(runner, make(5, 2.0)), picture(runner, make(5, 1.0, double)))


def test_an_adapter_is_switched_only_when_the_set_or_a_strength_changes(kind: Kind, make: Make) -> None:
    made = create("cpu", 1)
    made.load(SPEC, no_beat)
    made.adapters = kind(made)
    one, two = make(1), make(2)
    sequence = [(), (one,), (one,), (one, two), (one, two), (replace(one, strength=0.5), two), (two,), (), (), (one,)]
    for loras in sequence:
        picture(made, *loras)
    assert (made.adapters.switches, made.adapters.loads, made.adapters.reads) == (6, 2, 2)
    seconds = run(made, planned(loras=(one,)))[0].seconds
    assert "adapters" not in seconds
    assert "adapters" in run(made, planned())[0].seconds
    made.unload()


def test_the_order_of_the_list_is_kept(runner: DiffusionRunner, make: Make) -> None:
    one, two = make(1, 0.5), make(2, 0.25)
    picture(runner, two, one)
    assert [strength for _, strength in runner.adapters.applied] == [0.25, 0.5]


def test_alpha_in_the_header_scales_the_adapter(runner: DiffusionRunner, make: Make, tmp_path: Path) -> None:
    plain = make(1, 0.5)
    settings = {"transformer.lora_alpha": 2, "transformer.r": 4, "transformer.alpha_pattern": {}}
    path = tmp_path / "alpha.safetensors"
    save_file(load_file(plain.path), path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    assert np.array_equal(picture(runner, plain), picture(runner, Lora(str(path), 1.0)))


def zero(tensors: dict[str, Any]) -> None:
    for key in tensors:
        if "lora_B" in key:
            tensors[key] = torch.zeros_like(tensors[key])


def poison(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def widow(tensors: dict[str, Any]) -> None:
    del tensors["transformer.layers.0.attention.to_q.lora_B.weight"]


def clash(tensors: dict[str, Any]) -> None:
    tensors["transformer.layers.0.attention.to_q.lora_A.weight"] = torch.ones_like(
        tensors["transformer.layers.0.attention.to_q.lora_A.weight"]
    )[:3]


def widen(tensors: dict[str, Any]) -> None:
    for key in tensors:
        if "lora_A" in key:
            tensors[key] = torch.ones(4, 2 * tensors[key].shape[1])


def scale(tensors: dict[str, Any]) -> None:
    tensors["transformer.layers.0.attention.to_q.dora_scale"] = torch.ones(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (zero, "changes nothing"),
        (poison, "contains NaN or infinity in 'transformer."),
        (widow, "but not 'transformer.layers.0.attention.to_q.lora_B.weight'"),
        (clash, "does not fit the model"),
        (widen, "does not fit the model"),
        (dict.clear, "is empty; it changes nothing"),
        (scale, "is a DoRA, which is not served"),
    ],
)
def test_files_that_do_nothing_or_harm_are_refused(
    runner: DiffusionRunner, make: Make, change: Any, message: str
) -> None:
    base = picture(runner)
    assert message in refused(runner, make(9, change=change))
    assert runner.resident >= {"adapters:-"}
    assert np.array_equal(base, picture(runner))


@pytest.mark.parametrize("prefix", ["", "foo.", "base_model.model.", "unet.", "transformer.elsewhere."])
def test_foreign_keys_are_refused_with_an_example(runner: DiffusionRunner, make: Make, prefix: str) -> None:
    base = picture(runner)
    message = refused(runner, make(1), make(2, prefix=prefix))
    assert "for another model" in message or "does not fit the model" in message
    assert "attention" in message
    assert np.array_equal(base, picture(runner))


def test_keys_that_fit_in_part_are_used_with_a_warning(
    runner: DiffusionRunner, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def add(tensors: dict[str, Any]) -> None:
        for factor in "AB":
            source = tensors[f"transformer.layers.0.attention.to_q.lora_{factor}.weight"]
            tensors[f"transformer.layers.77.attention.to_q.lora_{factor}.weight"] = source.clone()

    with caplog.at_level(logging.WARNING, logger="imagemill"):
        picture(runner, make(3, change=add))
    assert "only 12 of its 13 modules are in this model" in caplog.text


def test_a_file_that_changed_or_went_since_planning_is_refused(runner: DiffusionRunner, make: Make) -> None:
    changed, gone = make(21), make(22)
    make_lora(Path(changed.path), seed=23)
    assert "has changed since the run was planned" in refused(runner, changed)
    Path(gone.path).unlink()
    assert "is not there any more" in refused(runner, gone)


def test_a_file_that_is_no_safetensors_file_is_refused(runner: DiffusionRunner, tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    path.write_text("<html>not found</html>")
    assert "no readable safetensors file" in refused(runner, Lora(str(path)))


def test_parsed_files_and_loaded_adapters_stay_within_their_bounds(make: Make) -> None:
    made = create("cpu", 1)
    made.load(SPEC, no_beat)
    made.adapters = Adapters(max_files=8, max_bytes=2 * Path(make().path).stat().st_size)
    for seed in range(4):
        picture(made, make(seed))
        assert len(made.adapters._parsed) <= 2
        assert len(made.adapters._loaded) <= 2
        assert len(made._pipe.get_list_adapters()["transformer"]) == len(made.adapters._loaded)
    picture(made, *(make(seed, 0.2) for seed in range(4)))
    assert len(made.adapters.applied) == 4
    made.unload()


def test_what_is_read_ahead_is_not_read_again(runner: DiffusionRunner, kind: Kind, make: Make) -> None:
    one, two = make(31), make(32)
    alone = picture(runner, one, two)
    runner.adapters.clear(runner._pipe)
    runner.adapters = kind(runner)
    runner.adapters.prefetch((one, replace(two, strength=0.0)))
    runner.adapters.prefetch((one, two, two))
    assert np.array_equal(alone, picture(runner, one, two))
    assert (runner.adapters.reads, runner.adapters.loads) == (2, 2)


def test_a_fault_met_ahead_is_told_to_the_task_that_needs_the_file(runner: DiffusionRunner, make: Make) -> None:
    base, gone = picture(runner), make(41)
    Path(gone.path).unlink()
    runner.adapters.prefetch((gone, make(9, change=poison)))
    assert np.array_equal(base, picture(runner))
    assert "is not there any more" in refused(runner, gone)
    make_lora(Path(gone.path), seed=41)
    assert not np.array_equal(base, picture(runner, gone))


def test_clearing_ends_the_thread_that_reads_ahead(runner: DiffusionRunner, make: Make) -> None:
    runner.adapters.prefetch([make(seed) for seed in range(50, 56)])
    assert any(thread.name.startswith("adapters") for thread in threading.enumerate())
    runner.adapters.clear(runner._pipe)
    assert not any(thread.name.startswith("adapters") for thread in threading.enumerate())
    lora = make(57)
    runner.adapters.prefetch([lora])
    assert runner.adapters.apply(runner._pipe, [lora])
    runner.adapters.clear(runner._pipe)
    assert runner.adapters.applied == ()
