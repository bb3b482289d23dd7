"""Merged adapters: the same pictures as layers, the same weights afterwards, and layers where merging cannot say it."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_editors
import torch
from safetensors.torch import load_file, save_file
from tiny_model import SPEC, Pixels, loaded, no_beat, picture, write_lora

from imagemill import crew, devices
from imagemill.config import Settings
from imagemill.errors import BadTask
from imagemill.records import Lora
from imagemill.runners.adapter_cost import HEADROOM, NEIGHBOURS_VARIABLE, adapter_mode, break_even
from imagemill.runners.adapters import Adapters, adapter_layers, choose
from imagemill.runners.ahead import Ahead
from imagemill.runners.diffusion import DiffusionRunner, create
from imagemill.runners.kept_base import KeptBase, Pinned, merge
from imagemill.runners.lora_factors import NotMergeable, Part, converted, fitted, packed, unpacked
from imagemill.runners.merged import Merged, mergeable_bytes
from imagemill.runners.shelf import Shelf

Make = Callable[..., Lora]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def runner() -> Iterator[DiffusionRunner]:
    yield from loaded()


@pytest.fixture
def merging(runner: DiffusionRunner) -> Iterator[DiffusionRunner]:
    runner.adapters = adapters = Merged(runner._pipe)
    yield runner
    adapters.clear(runner._pipe)
    runner.adapters = Adapters()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(write_lora, tmp_path)


def weights(runner: DiffusionRunner) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in runner._pipe.transformer.named_parameters()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_layers(*loras: Lora) -> Pixels:
    """The picture that PEFT's layers make, in a model of its own."""
    made = create("cpu", 1)
    made.load(SPEC, no_beat)
    shown = picture(made, *loras)
    made.unload()
    return shown


def added_by_peft(pipe: Any, *loras: Lora) -> Weights:
    """The weights with the adapters added as PEFT computes them; the pipeline is as before afterwards."""
    adapters = Adapters()
    adapters.apply(pipe, loras)
    named = pipe.transformer.named_parameters()
    total = {name.replace(".base_layer", ""): one.detach().clone() for name, one in named if ".lora_" not in name}
    for name, module in pipe.transformer.named_modules():
        for adapter in module.active_adapters if hasattr(module, "get_delta_weight") else ():
            if adapter in module.scaling:
                total[f"{name}.weight"] += module.get_delta_weight(adapter).detach()
    adapters.clear(pipe)
    return total


def assert_close(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6, msg=name)


def assert_as_layers(runner: DiffusionRunner, *loras: Lora) -> None:
    runner.adapters.apply(runner._pipe, ())
    expected = added_by_peft(runner._pipe, *loras)
    shown = picture(runner, *loras)
    assert not any(True for _ in adapter_layers(runner._pipe))
    assert_close(weights(runner), expected)
    assert np.abs(shown - by_layers(*loras)).max() <= 1


@pytest.mark.parametrize("strengths", [(1.0,), (-0.7,), (0.8, 0.3), (0.2, 1.1, -0.4)])
def test_merged_weights_and_pictures_equal_those_of_layers(
    merging: DiffusionRunner, make: Make, strengths: tuple[float, ...]
) -> None:
    base = picture(merging)
    loras = [make(seed, strength, rank=2 + 2 * seed) for seed, strength in enumerate(strengths, 1)]
    assert_as_layers(merging, *loras)
    assert np.abs(picture(merging, *loras) - base).mean() > 0.5


def renamed(tensors: dict[str, Any], rename: Callable[[str], str], alpha: float | None = None) -> None:
    """Give every key of a diffusers file another name, and each module an alpha."""
    for key in list(tensors):
        module, _, factor = key.removeprefix("transformer.").partition(".lora_")
        tensors[rename(f"{module}.lora_{factor}")] = tensors.pop(key)
        if alpha is not None:
            tensors[rename(f"{module}.alpha")] = torch.tensor(alpha)


def as_kohya(key: str) -> str:
    module, dot, rest = (
        key.replace("lora_A", "lora_down")
        .replace("lora_B", "lora_up")
        .partition(".alpha" if key.endswith(".alpha") else ".lora")
    )
    return f"lora_unet_{module.replace('.', '_')}{dot}{rest}"


@pytest.mark.parametrize(
    "change",
    [
        partial(renamed, rename=lambda key: f"diffusion_model.{key}"),
        partial(renamed, rename=lambda key: f"diffusion_model.{key}", alpha=2.0),
        partial(renamed, rename=as_kohya, alpha=1.0),
        partial(renamed, rename=as_kohya, alpha=32.0),
        partial(renamed, rename=lambda key: f"transformer.{key}".replace("_A", ".down").replace("_B", ".up")),
    ],
    ids=["comfy", "comfy alpha", "kohya", "kohya large alpha", "old diffusers"],
)
def test_every_format_that_diffusers_converts_merges_to_the_same(
    merging: DiffusionRunner, make: Make, change: Any
) -> None:
    assert_as_layers(merging, make(5, 0.9, change))


def test_factors_of_sixteen_bits_are_added_in_float32(merging: DiffusionRunner, make: Make) -> None:
    def halve(tensors: dict[str, Any]) -> None:
        for key in tensors:
            tensors[key] = tensors[key].bfloat16()

    lora = make(6, 0.5, halve)
    before = weights(merging)["layers.0.attention.to_q.weight"]
    picture(merging, lora)
    up, down = (load_file(lora.path)[f"transformer.layers.0.attention.to_q.lora_{one}.weight"].float() for one in "BA")
    after = weights(merging)["layers.0.attention.to_q.weight"]
    torch.testing.assert_close(after, before + 0.5 * up @ down, rtol=1e-5, atol=1e-6)


def test_fifty_switches_give_every_weight_back_bit_by_bit(merging: DiffusionRunner, make: Make) -> None:
    before, pipe = weights(merging), merging._pipe
    places = {name: tensor.data_ptr() for name, tensor in pipe.transformer.named_parameters()}
    loras = [make(seed, gain=0.3) for seed in range(5)]
    for turn in range(50):
        strength = 0.1 + turn / 25
        chosen = [replace(loras[turn % 5], strength=strength), replace(loras[(turn + 2) % 5], strength=-strength)]
        assert merging.adapters.apply(pipe, chosen[: 1 + turn % 2])
        assert not same(weights(merging), before)
    once = [replace(loras[3], strength=0.75)]
    merging.adapters.apply(pipe, once)
    last = weights(merging)
    assert merging.adapters.apply(pipe, ())
    assert same(weights(merging), before)
    merging.adapters.apply(pipe, once)
    assert same(weights(merging), last)
    merging.adapters.clear(pipe)
    assert same(weights(merging), before)
    assert {name: tensor.data_ptr() for name, tensor in pipe.transformer.named_parameters()} == places


def test_models_of_sixteen_bits_come_back_bit_by_bit_too(make: Make) -> None:
    made = create("cpu", 1)
    made.load(replace(SPEC, dtype="bfloat16"), no_beat)
    made.adapters = Merged(made._pipe)
    before, lora = weights(made), make(1)
    for strength in (0.3, 0.7, 1.3):
        made.adapters.apply(made._pipe, [replace(lora, strength=strength)])
    name = "layers.1.feed_forward.w2"
    up, down = (load_file(lora.path)[f"transformer.{name}.lora_{one}.weight"] for one in "BA")
    exact = before[f"{name}.weight"].float() + 1.3 * up @ down
    torch.testing.assert_close(weights(made)[f"{name}.weight"].float(), exact, rtol=2**-8, atol=1e-6)
    made.adapters.apply(made._pipe, ())
    assert same(weights(made), before)
    made.unload()


def test_only_what_an_adapter_touches_is_copied(merging: DiffusionRunner, make: Make) -> None:
    def first_block(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if ".layers.0." not in key]:
            del tensors[key]

    picture(merging, make(1, change=first_block))
    assert len(merging.adapters._base._kept) == 6
    picture(merging, make(2))
    assert len(merging.adapters._base._kept) == 12


def test_a_compiled_model_is_not_compiled_again_by_switches(merging: DiffusionRunner, make: Make) -> None:
    compiled = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph

    torch._dynamo.reset()
    block = merging._pipe.transformer.layers[0].feed_forward
    fast, given = torch.compile(block, backend=backend), torch.ones(1, 3, block.w1.in_features)
    with torch.no_grad():
        base = fast(given)
        seen = []
        for seed in range(3):
            merging.adapters.apply(merging._pipe, [make(seed)])
            seen.append(fast(given))
        merging.adapters.apply(merging._pipe, ())
        assert torch.equal(fast(given), base)
    assert compiled == 1
    assert not any(torch.equal(one, base) for one in seen)


def with_bias(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if "lora_B" in key]:
        tensors[key.replace("weight", "bias")] = torch.full((len(tensors[key]),), 0.5)


def with_magnitude(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if "lora_B" in key]:
        tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.full((len(tensors[key]),), 2.0)


def lokr(tensors: dict[str, Any]) -> None:
    shapes = {key.split(".lora_B")[0]: len(tensors[key]) for key in tensors if "lora_B" in key and "to_q" in key}
    tensors.clear()
    for module, outputs in shapes.items():
        tensors[f"{module}.lokr_w1"] = 0.1 * torch.eye(2)
        tensors[f"{module}.lokr_w2"] = torch.linspace(-1, 1, outputs * outputs // 4).reshape(outputs // 2, -1)


@pytest.mark.parametrize("change", [with_bias, with_magnitude, lokr])
def test_what_cannot_be_merged_is_put_on_as_layers(
    merging: DiffusionRunner, make: Make, caplog: pytest.LogCaptureFixture, change: Any
) -> None:
    before, plain, odd = weights(merging), make(1), make(2, 0.8, change)
    base, alone = picture(merging), picture(merging, plain)
    with caplog.at_level(logging.INFO, logger="imagemill"):
        shown = picture(merging, odd)
    assert "is put on as layers, not merged" in caplog.text
    assert np.array_equal(shown, by_layers(odd))
    assert not np.array_equal(shown, base)
    if change is not lokr:  # PEFT has no model with both kinds
        assert np.array_equal(picture(merging, plain, odd), by_layers(plain, odd))
    assert np.array_equal(picture(merging, plain), alone)
    assert np.array_equal(picture(merging), base)
    assert same(weights(merging), before)


def test_a_refusal_leaves_no_layers_and_the_base(merging: DiffusionRunner, make: Make) -> None:
    def clash(tensors: dict[str, Any]) -> None:
        key = "transformer.layers.0.attention.to_q.lora_A.weight"
        tensors[key] = torch.ones_like(tensors[key])[:3]

    before = weights(merging)
    merging.adapters.apply(merging._pipe, [make(1)])
    with pytest.raises(BadTask, match="does not fit the model"):
        merging.adapters.apply(merging._pipe, [make(1), make(2, change=clash)])
    assert same(weights(merging), before)
    assert merging.adapters.applied == ()


def test_a_fault_in_the_middle_of_a_merge_leaves_the_base(
    merging: DiffusionRunner, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = weights(merging), 0

    def full(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return merge(*arguments)

    monkeypatch.setattr("imagemill.runners.merged.merge", full)
    with pytest.raises(torch.OutOfMemoryError):
        merging.adapters.apply(merging._pipe, [make(1)])
    assert same(weights(merging), before)
    assert merging.adapters.apply(merging._pipe, [make(1)])


def test_switching_back_brings_nothing_to_the_device_again(merging: DiffusionRunner, make: Make) -> None:
    one, two = make(1), make(2)
    for loras in ((one,), (two,), (one,), (one, two), ()):
        merging.adapters.apply(merging._pipe, loras)
    assert (merging.adapters.reads, merging.adapters.loads, merging.adapters.switches) == (2, 2, 5)


class Rounded(torch.Tensor):
    """Stands for a weight of a kind that torchao makes: the same numbers, another class."""


def test_adapters_of_a_quantised_model_merge_into_the_weights_it_had_before(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_weight(linear: Any, weight: torch.Tensor) -> None:
        linear.weight = torch.nn.Parameter(weight.bfloat16().float().as_subclass(Rounded), requires_grad=False)

    precision = ModuleType("imagemill.runners.precision")
    precision.set_weight = set_weight  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, precision.__name__, precision)
    made = create("cpu", 1)
    made.load(SPEC, no_beat)
    made.adapters, original, lora = Merged(made._pipe), weights(made), make(1, 0.01)
    linear = made._pipe.transformer.layers[0].attention.to_q
    made.adapters.hold(made._pipe)
    set_weight(linear, linear.weight.detach())
    rounded = linear.weight.detach().clone()
    made.adapters.apply(made._pipe, [lora])
    up, down = (load_file(lora.path)[f"transformer.layers.0.attention.to_q.lora_{one}.weight"] for one in "BA")
    expected = original["layers.0.attention.to_q.weight"] + 0.01 * up @ down
    assert torch.equal(linear.weight.detach().as_subclass(torch.Tensor), expected.bfloat16().float())
    made.adapters.apply(made._pipe, ())
    assert torch.equal(linear.weight, rounded)
    made.unload()


def test_a_quantised_weight_whose_original_is_not_held_gets_layers(make: Make) -> None:
    made = create("cpu", 1)
    made.load(SPEC, no_beat)
    made.adapters = Merged(made._pipe)
    linear = made._pipe.transformer.layers[0].attention.to_q
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Rounded), requires_grad=False)
    assert not made.adapters._base.has("layers.0.attention.to_q", linear)
    made.adapters.apply(made._pipe, [make(1)])
    assert any(True for _ in adapter_layers(made._pipe))
    made.unload()


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_merges_as_peft_does(kernel: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(6, 8, kernel, padding=kernel // 2))
    base = model[0].weight.detach().clone()
    given = torch.randn(2, 6, 9, 9)
    layered = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=["0"]), model, "one")
    down, up = layered[0].lora_A["one"].weight, layered[0].lora_B["one"].weight
    torch.nn.init.normal_(up)
    part = fitted("0", {"A": down.detach(), "B": up.detach()}, tuple(base.shape))
    total = merge(base, [(part.down, part.up, 1.0)], base.device)
    bias = layered[0].base_layer.bias
    expected = layered(given)
    torch.testing.assert_close(torch.conv2d(given, total, bias, padding=kernel // 2), expected, rtol=1e-5, atol=1e-5)


def test_alphas_that_diffusers_keeps_apart_are_left_to_layers() -> None:
    from diffusers import FluxPipeline

    name = "transformer.single_transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    assert set(converted(tensors, FluxPipeline, "transformer")) == {key.removeprefix("transformer.") for key in tensors}
    with pytest.raises(NotMergeable, match="alphas"):
        converted(tensors | {f"{name}.alpha": torch.tensor(1.0)}, FluxPipeline, "transformer")
    with pytest.raises(NotMergeable, match="is not of the transformer"):
        converted(tensors | {"text_encoder.x.lora_A.weight": torch.ones(2, 8)}, FluxPipeline, "transformer")


def test_the_way_is_chosen_by_device_and_room_alone() -> None:
    gib = 2**30
    assert adapter_mode("cpu", gib, 0, 64 * gib) == "layers"
    assert adapter_mode("cuda:0", 12 * gib, 12 * gib + HEADROOM, 0) == "merged"
    assert adapter_mode("cuda:0", 12 * gib, 12 * gib + HEADROOM - 1, 24 * gib) == "merged_from_host"
    assert adapter_mode("cuda:0", 12 * gib, HEADROOM, 23 * gib) == "layers"
    assert adapter_mode("cuda:0", 12 * gib, 80 * gib, 24 * gib, forwards=3) == "layers"
    assert adapter_mode("cuda:0", 12 * gib, HEADROOM, 24 * gib, forwards=16) == "layers"
    assert adapter_mode("cpu", gib, 0, 0, force="merged") == "merged"
    # 41 GiB of weights, no room for them on the device, 100 GiB of main memory free
    assert adapter_mode("cuda:0", 41 * gib, HEADROOM, 100 * gib) == "merged_from_host"
    assert adapter_mode("cuda:0", 41 * gib, HEADROOM, 100 * gib, neighbours=4) == "layers"
    assert adapter_mode("cuda:0", 41 * gib, HEADROOM, 328 * gib, neighbours=4) == "merged_from_host"
    assert adapter_mode("cuda:0", 41 * gib, 41 * gib + HEADROOM, 100 * gib, neighbours=4) == "merged"
    assert 0 == break_even("layers") < break_even("merged") < 8 < break_even("merged_from_host") < 32


def test_choose_takes_layers_on_the_cpu_unless_forced(runner: DiffusionRunner) -> None:
    assert isinstance(choose("cpu", runner._pipe), Adapters)
    assert isinstance(choose("cpu", runner._pipe, force="merged"), Merged)


@pytest.mark.parametrize(("neighbours", "kind"), [(None, Merged), ("2", Merged), ("3", Adapters)])
def test_workers_of_one_host_share_what_is_free_of_its_memory(
    runner: DiffusionRunner, monkeypatch: pytest.MonkeyPatch, neighbours: str | None, kind: type
) -> None:
    free = 4 * mergeable_bytes(runner._pipe)
    monkeypatch.setattr("imagemill.devices.host_memory", lambda: (free, free))
    monkeypatch.setattr("imagemill.runners.merged.device_free", lambda device: 0)
    monkeypatch.delenv(NEIGHBOURS_VARIABLE, raising=False)
    if neighbours:
        monkeypatch.setenv(NEIGHBOURS_VARIABLE, neighbours)
    assert type(choose("cuda:0", runner._pipe)) is kind


@pytest.mark.parametrize("workers", [1, 3])
def test_every_worker_of_a_run_is_told_how_many_there_are(workers: int, tmp_path: Path) -> None:
    hired = crew.hire(devices.choose(device="cpu", workers=workers), Settings(), SPEC, tmp_path)
    told = [spec.environment[NEIGHBOURS_VARIABLE] for spec in hired.specs.values()]
    hired.executor.close()
    assert told == [str(workers)] * workers


def test_a_base_of_which_only_one_module_was_asked_for_restores_that_one() -> None:
    linear = torch.nn.Linear(3, 2)
    kept, before = KeptBase(on_device=True), linear.weight.detach().clone()
    with torch.no_grad():
        kept.of("one", linear)
        linear.weight += 1
        kept.restore("one", linear)
    assert torch.equal(linear.weight, before)
    assert kept.bytes == 0


def test_a_shelf_drops_the_least_recently_used_and_keeps_the_last() -> None:
    shelf: Shelf[str] = Shelf(max_items=3, max_bytes=100)
    for name in "abc":
        shelf.put(name, name.upper(), 30)
    assert shelf.get("a") == "A"
    shelf.put("d", "D", 30)
    assert [shelf.get(name) for name in "abcd"] == ["A", None, "C", "D"]
    shelf.put("e", "E", 500)
    assert (len(shelf), shelf.get("e"), shelf.evictions) == (1, "E", 4)


def test_no_more_than_its_bound_is_made_ahead_and_none_twice() -> None:
    begun, go, made = threading.Event(), threading.Event(), []

    def work(lora: Lora) -> str:
        made.append(lora.digest)
        begun.set()
        assert lora.digest != "a" or go.wait(60)
        return lora.digest.upper()

    ahead = Ahead(work, most=2)
    a, b, c = (Lora(f"{name}.safetensors", 1.0, name) for name in "abc")
    for lora in (a, a, b, c):
        ahead.start(lora)
    assert begun.wait(60)
    assert (ahead.take(c), ahead.take(b)) == ("C", "B")
    go.set()
    ahead.stop()
    assert made == ["a", "c", "b"]


def test_factors_of_any_type_come_out_of_a_buffer_as_they_went_in() -> None:
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    parts = [
        Part(f"m{n}", torch.randn(n, 7).to(kinds[n % 4]), torch.randn(5, n).to(kinds[-n % 4])) for n in range(1, 9)
    ]
    out = unpacked(packed(parts, pinned=False).clone(), parts)
    assert [part.module for part in out] == [part.module for part in parts]
    assert all(
        torch.equal(one.down, two.down) and torch.equal(one.up, two.up) for one, two in zip(out, parts, strict=True)
    )


def test_blocks_of_host_memory_hold_copies_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagemill.runners.kept_base.CHUNK", 1024)
    weights = [torch.randn(rows, 9).to(kind) for rows in (3, 20, 50) for kind in (torch.float32, torch.bfloat16)]
    pinned = Pinned()
    copies = [pinned.copy(weight) for weight in weights]
    originals = [weight.clone() for weight in weights]
    for weight in weights:
        weight.zero_()
    assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(copies, originals, strict=True))


def test_a_pipeline_that_takes_no_adapters_says_so(merging: DiffusionRunner, make: Make) -> None:
    class Bare:
        components: ClassVar[dict[str, Any]] = {}
        transformer = merging._pipe.transformer

    adapters = Merged(Bare())
    adapters.prefetch([make(1)])
    with pytest.raises(BadTask, match="Bare takes no LoRA; remove"):
        adapters.apply(Bare(), [make(1)])
    adapters.close()


@pytest.mark.gpu
@pytest.mark.parametrize("on_device", [True, False])
def test_on_a_gpu_switches_never_wait_for_the_device_and_the_base_comes_back(make: Make, on_device: bool) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(SPEC.folder, dtype=torch.bfloat16).to("cuda:0")
    before = {name: tensor.detach().clone() for name, tensor in pipe.transformer.named_parameters()}
    adapters, loras = Merged(pipe, on_device=on_device), [make(seed) for seed in range(4)]
    adapters.prefetch(loras[:2])
    name = "layers.1.feed_forward.w2"
    torch.cuda.set_sync_debug_mode("error")
    try:
        for turn in range(50):
            adapters.apply(pipe, [replace(loras[turn % 4], strength=0.3 + turn / 50), loras[(turn + 1) % 4]])
        adapters.apply(pipe, [replace(loras[2], strength=0.5)])
        merged = pipe.transformer.get_submodule(name).weight.detach().clone()
        adapters.apply(pipe, ())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert adapters.loads == 4
    assert (adapters.base_bytes > 0) == on_device
    assert same(dict(pipe.transformer.named_parameters()), before)
    up, down = (load_file(loras[2].path)[f"transformer.{name}.lora_{one}.weight"].cuda() for one in "BA")
    exact = before[f"{name}.weight"].float() + 0.5 * up @ down
    torch.testing.assert_close(merged.float(), exact, rtol=2**-8, atol=1e-5)
    adapters.clear(pipe)


def lora_for(model: torch.nn.Module, place: Path, seed: int) -> Lora:
    """An adapter of rank 3 for every linear layer of the model's blocks, where FLUX has two kinds of them."""
    torch.manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name:
            outputs, inputs = module.weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = 0.1 * torch.randn(3, inputs)
            tensors[f"transformer.{name}.lora_B.weight"] = 0.1 * torch.randn(outputs, 3)
    save_file(tensors, place)
    return Lora(str(place), 0.7, sha256(place.read_bytes()).hexdigest())


@pytest.mark.parametrize("build", [tiny_editors.qwen, tiny_editors.kontext, tiny_editors.klein])
def test_other_families_merge_as_peft_does(build: Callable[[Path], Path], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(build(tmp_path / "model"))
    loras = [lora_for(pipe.transformer, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    before = {name: tensor.detach().clone() for name, tensor in pipe.transformer.named_parameters()}
    with torch.no_grad():
        expected = added_by_peft(pipe, *loras)
        merging = Merged(pipe)
        merging.apply(pipe, loras)
        assert_close(dict(pipe.transformer.named_parameters()), expected)
        assert not any(True for _ in adapter_layers(pipe))
        merging.clear(pipe)
    assert same(dict(pipe.transformer.named_parameters()), before)
