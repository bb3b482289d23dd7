"""Quantised weights on the CPU: torchao's float8 weights without the float8 product, which needs a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from tiny_model import SPEC, no_beat, picture, write_lora
from torch._dynamo.utils import counters
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow

from imagemill.errors import BadModel
from imagemill.records import ModelSpec, Tuning
from imagemill.runners import diffusion, precision, tuning
from imagemill.runners.adapters import adapter_layers
from imagemill.runners.diffusion import DiffusionRunner, create
from imagemill.runners.merged import Merged


@pytest.fixture
def runner() -> Iterator[DiffusionRunner]:
    threads = torch.get_num_threads()
    made = create("cpu", 1)
    made.load(ModelSpec(name="tiny", folder=SPEC.folder, dtype="bfloat16"), no_beat)
    yield made
    made.unload()
    torch.set_num_threads(threads)


def test_fp8_is_refused_on_the_cpu_before_anything_changes(runner: DiffusionRunner) -> None:
    assert runner._family is not None
    with pytest.raises(BadModel, match="precision fp8 needs a GPU, and the model is on cpu; use bf16"):
        tuning.tune(runner._pipe, runner._family, Tuning(precision="fp8"), "cpu", no_beat)
    assert not any(precision.is_quantised(layer) for layer in precision.candidates(runner._pipe.transformer))


def test_fp8_is_refused_on_a_gpu_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(BadModel, match=r"capability 8.9 or later; NVIDIA A100 has 8.0; use bf16"):
        precision.refuse_without_float8("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    precision.refuse_without_float8("cuda:0")


def test_fp8_without_torchao_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(BadModel, match=r"needs torchao: pip install 'imagemill\[fp8\]'"):
        precision.refuse_without_float8("cuda:0")


def test_float8_is_dynamic_with_a_scale_for_each_row() -> None:
    config = precision.float8_config()
    assert [type(one) for one in config.granularity] == [PerRow, PerRow]
    assert (config.activation_dtype, config.weight_dtype) == (torch.float8_e4m3fn, torch.float8_e4m3fn)


def test_rows_of_zeros_stay_zeros_and_make_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded captions in a batch are such rows of inputs; a pruned output is one of weights."""
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    model = torch.nn.ModuleDict({"block": ZImageTransformerBlock(0, 64, 4, 4, 1e-5, qk_norm=True)}).to(torch.bfloat16)
    model._repeated_blocks = ["ZImageTransformerBlock"]
    layer = model["block"].attention.to_q
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    x[1] = 0
    with torch.no_grad():
        layer.weight[5] = 0
        expected = layer(x)
        precision.quantise(model)
        assert precision.is_quantised(layer)
        found = layer(x)
        precision.set_weight(layer, torch.zeros(64, 64, dtype=torch.bfloat16))
        emptied = layer(x)
    assert found[1].abs().max() == 0
    assert found[:, 5].abs().max() < 1e-9
    assert torch.allclose(found.float(), expected.float(), atol=0.1)
    assert emptied.abs().max() < 1e-9


def test_only_large_linear_layers_of_repeated_blocks_are_quantised(runner: DiffusionRunner) -> None:
    model = runner._pipe.transformer
    assert precision.quantise(model, Float8WeightOnlyConfig()) == len(precision.candidates(model))
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    done = {name for name, module in linear.items() if precision.is_quantised(module)}
    assert done == {
        name
        for name, module in linear.items()
        if re.fullmatch(r"(noise_refiner|context_refiner|layers)\.\d+\.(attention|feed_forward)\..*", name)
        and module.in_features % 16 == module.out_features % 16 == 0
    }
    assert len(done) >= 4 * len(model.layers)


def test_a_model_with_nothing_to_quantise_is_refused() -> None:
    with pytest.raises(BadModel, match="Linear has no linear layers that compute in fp8"):
        precision.quantise(torch.nn.Linear(16, 16), Float8WeightOnlyConfig())


@pytest.mark.parametrize("config", [Float8WeightOnlyConfig(), Int8WeightOnlyConfig()], ids=["float8", "int8"])
def test_a_weight_that_is_set_is_the_one_that_quantising_would_have_given(runner: DiffusionRunner, config: Any) -> None:
    layer = runner._pipe.transformer.layers[0].attention.to_q
    precision.quantise(runner._pipe.transformer, config)
    before, storage = layer.weight, layer.weight.qdata.data_ptr()
    torch.manual_seed(3)
    wanted = torch.randn(layer.weight.shape)
    precision.set_weight(layer, wanted)
    assert layer.weight is before
    assert layer.weight.qdata.data_ptr() == storage
    assert torch.equal(layer.weight.dequantize(), precision.requantised(layer, wanted.bfloat16()).dequantize())
    assert (layer.weight.dequantize() - wanted).abs().max() < 0.2
    assert layer.weight.dtype == torch.bfloat16


def test_a_plain_weight_is_set_in_place() -> None:
    layer = torch.nn.Linear(16, 32, bias=False)
    before, wanted = layer.weight, torch.randn(32, 16)
    precision.set_weight(layer, wanted)
    assert layer.weight is before
    assert torch.equal(layer.weight, wanted)


def test_a_weight_of_another_shape_or_kind_is_no_replacement(runner: DiffusionRunner) -> None:
    attention = runner._pipe.transformer.layers[0].attention
    precision.quantise(runner._pipe.transformer, Float8WeightOnlyConfig())
    small = precision.requantised(attention.to_q, torch.randn(32, attention.to_q.in_features).bfloat16())
    with pytest.raises(ValueError, match=r"qdata is \(32, "):
        precision.overwrite(attention.to_q.weight, small)
    with pytest.raises(ValueError, match="Tensor does not go into Float8Tensor"):
        precision.overwrite(attention.to_q.weight, torch.randn(attention.to_q.weight.shape))


def test_compiled_code_computes_with_a_weight_that_is_set_later(runner: DiffusionRunner) -> None:
    torch._dynamo.reset()
    counters.clear()
    layer = runner._pipe.transformer.layers[0].attention.to_q
    precision.quantise(runner._pipe.transformer, Float8WeightOnlyConfig())
    fast = torch.compile(lambda x: torch.nn.functional.silu(layer(x)), backend="aot_eager", fullgraph=True)
    x = torch.randn(8, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        before = fast(x)
        precision.set_weight(layer, torch.randn(layer.weight.shape))
        after = fast(x)
        assert not torch.equal(before, after)
        assert torch.allclose(after, torch.nn.functional.silu(layer(x)), rtol=2**-6, atol=2**-6)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_adapters_merge_into_quantised_weights_from_the_weights_held_before(
    runner: DiffusionRunner, tmp_path: Any
) -> None:
    model = runner._pipe.transformer
    runner.adapters = Merged(runner._pipe)
    runner.adapters.hold(runner._pipe)
    precision.quantise(model, Float8WeightOnlyConfig())
    layer = model.layers[0].attention.to_q
    rounded, bare = layer.weight.dequantize(), picture(runner)
    lora = write_lora(tmp_path)
    assert not np.array_equal(picture(runner, lora), bare)
    assert not torch.equal(layer.weight.dequantize(), rounded)
    assert np.array_equal(picture(runner), bare)
    assert torch.equal(layer.weight.dequantize(), rounded)


@pytest.mark.parametrize("adapters", [True, False])
def test_fp8_holds_the_weights_it_had_only_where_the_run_names_adapters(
    adapters: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    rounding = precision.quantise
    monkeypatch.setattr(precision, "refuse_without_float8", lambda device: None)
    monkeypatch.setattr(precision, "quantise", lambda model: rounding(model, Float8WeightOnlyConfig()))
    monkeypatch.setattr(diffusion, "choose", lambda device, pipe: Merged(pipe))
    made, threads = create("cpu", 1), torch.get_num_threads()
    wanted = Tuning(precision="fp8", attention="native", adapters=adapters)
    made.load(ModelSpec(name="tiny", folder=SPEC.folder, dtype="bfloat16", tuning=wanted), no_beat)
    layer = made._pipe.transformer.layers[0].attention.to_q
    assert precision.is_quantised(layer)
    assert isinstance(made.adapters, Merged)
    assert made.adapters._base.has("layers.0.attention.to_q", layer) is adapters
    # One that comes all the same, to an engine that was kept, is put on as layers.
    bare, lora = picture(made), write_lora(tmp_path)
    worn = picture(made, lora)
    assert not np.array_equal(worn, bare)
    assert any(True for _ in adapter_layers(made._pipe)) is not adapters
    assert np.array_equal(picture(made), bare)
    assert np.array_equal(picture(made, lora), worn)
    made.unload()
    torch.set_num_threads(threads)
