"""Z-Image's own steps: bit for bit those of the pipeline's call, and launched without a word from the device."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from tiny_model import TINY, write_lora
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imagemill.errors import BadTask
from imagemill.families import z_image
from imagemill.records import Task
from imagemill.runners import Cancelled, streams, text_cache
from imagemill.runners.shelf import Shelf
from imagemill.runners.z_image_steps import Prepared

FAMILY = z_image.FAMILY
SHORT = ("a cat on a mat", "two dogs", "the sea at night", "x")
LONG = "a very long list of things in a garden, " * 3
"""Two buckets of tokens; twice as much is four."""

MIXED = ("a cat on a mat", LONG, "two dogs", LONG + LONG)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def embedded_model() -> Any:
    pipe = ZImagePipeline.from_pretrained(TINY, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_model(dtype: torch.dtype = torch.float32) -> Any:
    """Other sides than the embedded model's: two refiner layers, other channels and axes, a shift that goes by size."""
    parts = embedded_model().components
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=3, n_refiner_layers=2, n_heads=3, n_kv_heads=3,
        cap_feat_dim=parts["text_encoder"].config.hidden_size,
        t_scale=1000.0, axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    ).eval()  # fmt: skip
    with torch.no_grad():
        for pad in (transformer.x_pad_token, transformer.cap_pad_token):
            pad.normal_()
    made = ZImagePipeline(
        **parts
        | {
            "transformer": transformer,
            "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=1.0),
        }
    )
    made.text_encoder.to(dtype)
    made.transformer.to(dtype)
    made.set_progress_bar_config(disable=True)
    return made


MODELS: dict[str, Callable[[], Any]] = {
    "embedded": embedded_model,
    "random": random_model,
    "bfloat16": lambda: random_model(torch.bfloat16),
}


@pytest.fixture(scope="module", params=["embedded", "random", pytest.param("bfloat16", marks=pytest.mark.slow)])
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.fixture
def pipe() -> Any:
    return embedded_model()


def tasks_of(prompts: Sequence[str] = SHORT[:1], **changes: Any) -> list[Task]:
    same = {"width": 64, "height": 64, "steps": 2, "guidance_scale": 0.0} | changes
    return [Task(str(number), prompt, seed=number, **same) for number, prompt in enumerate(prompts)]


def staged(pipe: Any, tasks: Sequence[Task], kind: type = Prepared) -> torch.Tensor:
    with torch.inference_mode():
        conditioning = FAMILY.encode(pipe, tasks, [()] * len(tasks))
        assert isinstance(conditioning, kind)
        return FAMILY.denoise(pipe, tasks, conditioning, lambda step, steps: None)


def whole(pipe: Any, tasks: Sequence[Task]) -> torch.Tensor:
    """By the pipeline's own call, from the same embeddings and noise."""
    first, device = tasks[0], torch.device("cpu")
    with torch.inference_mode():
        negative = [task.negative_prompt or "" for task in tasks]
        (latents,) = pipe(
            prompt_embeds=z_image.embed(pipe, [task.prompt for task in tasks], device),
            negative_prompt_embeds=z_image.embed(pipe, negative, device) if first.guidance_scale else [],
            latents=z_image.noise(pipe, tasks),
            height=first.height,
            width=first.width,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance_scale,
            output_type="latent",
            return_dict=False,
        )
    result: torch.Tensor = latents
    return result


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (72, 48), (8, 8)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(
    "guidance", [{"guidance_scale": 0.0}, {"guidance_scale": 1.0}, {"guidance_scale": 4.0, "negative_prompt": "dark"}],
    ids=["0", "1", "4 with a negative prompt"],
)  # fmt: skip
@pytest.mark.parametrize("prompts", [SHORT[:1], SHORT, MIXED], ids=["one", "four of one bucket", "four of several"])
def test_the_steps_are_bit_for_bit_those_of_the_pipeline(
    any_pipe: Any, prompts: Sequence[str], guidance: dict[str, Any], size: tuple[int, int]
) -> None:
    tasks = tasks_of(prompts, width=size[0], height=size[1], **guidance)
    made = staged(any_pipe, tasks)
    assert made.dtype == torch.float32
    assert made.std() > 0.1
    assert torch.equal(made, whole(any_pipe, tasks))


def test_negative_prompts_of_a_batch_may_differ_in_length(pipe: Any) -> None:
    tasks = [
        replace(task, negative_prompt=negative)
        for task, negative in zip(tasks_of(SHORT, guidance_scale=3.0), ("dark", LONG, "", "blur"), strict=True)
    ]
    made = staged(pipe, tasks)
    assert torch.equal(made, whole(pipe, tasks))
    assert not torch.equal(made, staged(pipe, [replace(task, negative_prompt="dark") for task in tasks]))


def test_only_captions_of_different_buckets_are_masked(pipe: Any) -> None:
    with torch.inference_mode():
        equal, mixed = (FAMILY.encode(pipe, tasks_of(prompts), [()] * 4) for prompts in (SHORT, MIXED))
    assert isinstance(equal, Prepared)
    assert isinstance(mixed, Prepared)
    assert [places.mask is None for places in (equal.caption, equal.picture, equal.joint)] == [True] * 3
    assert [places.mask is None for places in (mixed.caption, mixed.picture, mixed.joint)] == [False, True, False]


def test_with_an_adapter_on_the_steps_are_those_of_the_pipeline(pipe: Any, tmp_path: Path) -> None:
    tasks = tasks_of(MIXED, guidance_scale=2.0)
    bare = staged(pipe, tasks)
    pipe.load_lora_weights(write_lora(tmp_path).path, adapter_name="look")
    pipe.set_adapters(["look"], [0.6])
    made = staged(pipe, tasks)
    assert torch.equal(made, whole(pipe, tasks))
    assert (made - bare).abs().max() > 0.01


class PairRotary(ZSingleStreamAttnProcessor):
    """Takes frequencies as pairs of real numbers."""

    real_rotary = True
    shapes: list[tuple[int, ...]] = []  # noqa: RUF012

    def __call__(self, *given: Any, freqs_cis: Any = None, **named: Any) -> Any:
        self.shapes.append(tuple(freqs_cis.shape))
        return super().__call__(*given, freqs_cis=torch.view_as_complex(freqs_cis), **named)


def test_processors_with_a_real_rotary_get_pairs_of_real_numbers(pipe: Any) -> None:
    tasks = tasks_of(MIXED)
    expected = staged(pipe, tasks)
    PairRotary.shapes.clear()
    transformer = pipe.transformer
    for block in [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]:
        block.attention.set_processor(PairRotary())
    assert torch.equal(staged(pipe, tasks), expected)
    half = transformer.config.dim // transformer.config.n_heads // 2
    assert {(rows, *rest) for rows, _, *rest in PairRotary.shapes} == {(4, half, 2)}


# --- no more than the steps need --------------------------------------------------------------------------------------


def test_captions_are_refined_once_and_every_block_is_called_as_a_module(pipe: Any) -> None:
    called: dict[str, int] = {}
    transformer = pipe.transformer
    for name in ("context_refiner", "noise_refiner", "layers", "all_final_layer"):
        parts = getattr(transformer, name)
        for part in parts.values() if name == "all_final_layer" else parts:
            part.register_forward_hook(lambda *call, name=name: called.update({name: called.get(name, 0) + 1}))
    staged(pipe, tasks_of(steps=5))
    counts = {"context_refiner": 1, "noise_refiner": 5, "layers": 5, "all_final_layer": 5}
    blocks = {name: 1 if name == "all_final_layer" else len(getattr(transformer, name)) for name in counts}
    assert called == {name: counts[name] * blocks[name] for name in counts}


def test_every_step_is_told_and_may_stop_the_batch(pipe: Any) -> None:
    tasks, told = tasks_of(steps=4), []
    with torch.inference_mode():
        conditioning = FAMILY.encode(pipe, tasks, [()])
        FAMILY.denoise(pipe, tasks, conditioning, lambda *step: told.append(step))
        assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]

        def stop(step: int, steps: int) -> None:
            raise Cancelled

        with pytest.raises(Cancelled):
            FAMILY.denoise(pipe, tasks, conditioning, stop)


def test_the_same_conditioning_gives_the_same_latents_again(pipe: Any) -> None:
    tasks = tasks_of(MIXED, guidance_scale=2.0)
    with torch.inference_mode():
        conditioning = FAMILY.encode(pipe, tasks, [()] * 4)
        first, second = (FAMILY.denoise(pipe, tasks, conditioning, lambda *step: None) for _ in range(2))
    assert torch.equal(first, second)


def test_a_size_that_the_model_cannot_make_is_refused_before_anything_is_encoded(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "encode_prompt", None)
    with pytest.raises(BadTask, match="multiples of 8"):
        FAMILY.encode(pipe, tasks_of(width=60), [()])


# --- no host round trip -----------------------------------------------------------------------------------------------


class RoundTrip(AssertionError):
    """The host asked the device for something, or sent it something."""


class OnDeviceOnly(TorchDispatchMode):
    """Lets no operation touch a tensor that is elsewhere than on the device of that type, nor read a value of one."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "lift_fresh", "unique")
        name = func._schema.name.removeprefix("aten::")
        if name in reads or (
            name in ("index", "index_put_") and "bool" in str([i.dtype for i in args[1] if i is not None])
        ):
            raise RoundTrip(name)
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type != self.device for tensor in tensors):
            raise RoundTrip(name)
        return made


@contextmanager
def no_round_trip(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside the block torch's ways between host and device raise."""

    def refuse(name: str) -> Callable[..., Any]:
        def refused(*given: Any, **named: Any) -> Any:
            raise RoundTrip(name)

        return refused

    plain = torch.Tensor.to

    def to(tensor: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        if "device" in named or any(isinstance(one, str | torch.device | torch.Tensor) for one in given):
            raise RoundTrip("to")
        return plain(tensor, *given, **named)

    with monkeypatch.context() as patched:
        for name in ("tensor", "as_tensor", "from_numpy", "asarray"):
            patched.setattr(torch, name, refuse(name))
        for name in (
            "cpu",
            "cuda",
            "item",
            "tolist",
            "numpy",
            "nonzero",
            "pin_memory",
            "__bool__",
            "__float__",
            "__int__",
        ):
            patched.setattr(torch.Tensor, name, refuse(name))
        patched.setattr(torch.Tensor, "to", to)
        with OnDeviceOnly(device):
            yield


def moved(value: Any, device: str) -> Any:
    """A copy of the dataclass or tensor with every tensor on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: moved(getattr(value, one.name), device) for one in fields(value)})
    return value


@pytest.mark.parametrize("guidance", [0.0, 4.0])
@pytest.mark.parametrize("prompts", [SHORT, MIXED], ids=["one bucket", "several"])
@pytest.mark.parametrize("width", [64, 72])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_steps_make_no_host_round_trip(
    pipe: Any, device: str, width: int, prompts: Sequence[str], guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On `meta`, where tensors have no values, whatever the host makes is on another device than the model."""
    tasks = tasks_of(prompts, width=width, guidance_scale=guidance)
    with torch.inference_mode():
        conditioning = moved(FAMILY.encode(pipe, tasks, [()] * 4), device)
        pipe.transformer.to(device)
        with no_round_trip(device, monkeypatch):
            latents = FAMILY.denoise(pipe, tasks, conditioning, lambda *step: None)
    assert latents.shape == (4, pipe.transformer.in_channels, 16, width // 4)
    assert latents.device.type == device


@pytest.mark.parametrize(
    "trip",
    [
        lambda: torch.tensor([1.0], device="meta"),
        lambda: torch.ones(2) * torch.ones(2),
        lambda: torch.ones(2, device="meta").to("cpu"),
        lambda: torch.ones(2, device="meta")[torch.ones(2, dtype=torch.bool, device="meta")],
        lambda: 1 if torch.ones((), device="meta") else 0,
    ],
)
def test_the_guard_of_the_test_above_notices_round_trips(
    trip: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RoundTrip), no_round_trip("meta", monkeypatch):
        trip()


def test_the_guard_notices_those_of_the_pipeline_s_own_call(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked(pipe)
    with torch.inference_mode():
        conditioning = FAMILY.encode(pipe, tasks_of(), [()])
        with pytest.raises(RoundTrip), no_round_trip("cpu", monkeypatch):
            FAMILY.denoise(pipe, tasks_of(), conditioning, lambda *step: None)


def test_decoding_makes_no_host_round_trip(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.vae.to("meta")
    with torch.inference_mode(), no_round_trip("meta", monkeypatch):
        latents = torch.zeros(2, pipe.transformer.in_channels, 16, 16, device="meta")
        pictures = FAMILY.decode(pipe, tasks_of(SHORT[:2]), latents)
    assert pictures.shape == (2, 3, 64, 64)


# --- parts that are not known -----------------------------------------------------------------------------------------


class OtherTransformer(ZImageTransformer2DModel):
    pass


class OtherScheduler(FlowMatchEulerDiscreteScheduler):
    pass


def other_transformer(pipe: Any) -> None:
    pipe.transformer.__class__ = OtherTransformer


def other_scheduler(pipe: Any) -> None:
    pipe.scheduler = OtherScheduler.from_config(pipe.scheduler.config)


def inverted(pipe: Any) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, invert_sigmas=True)


def hooked(pipe: Any) -> None:
    pipe.transformer.register_forward_hook(lambda *call: None)


def replaced(pipe: Any) -> None:
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *given, **named: forward(*given, **named)


@pytest.mark.parametrize("change", [other_transformer, other_scheduler, inverted, hooked, replaced])
def test_for_parts_that_are_not_known_the_pipeline_s_own_call_does_the_steps(
    pipe: Any, change: Callable[[Any], None]
) -> None:
    change(pipe)
    tasks = tasks_of(MIXED, guidance_scale=2.0)
    told: list[tuple[int, int]] = []
    with torch.inference_mode():
        conditioning = FAMILY.encode(pipe, tasks, [()] * 4)
        assert isinstance(conditioning, z_image.WholeCall)
        made = FAMILY.denoise(pipe, tasks, conditioning, lambda *step: told.append(step))
    assert told == [(1, 2), (2, 2)]
    assert torch.equal(made, whole(pipe, tasks))


def test_a_random_solver_is_left_to_the_pipeline(pipe: Any) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    assert staged(pipe, tasks_of(), z_image.WholeCall).isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"shift_terminal": 0.02},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift": 6.0},
    ],
)
def test_the_scheduler_s_own_timesteps_are_taken(pipe: Any, settings: dict[str, Any]) -> None:
    tasks = tasks_of(steps=4)
    usual = staged(pipe, tasks)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **settings)
    made = staged(pipe, tasks)
    assert torch.equal(made, whole(pipe, tasks))
    assert not torch.equal(made, usual)


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of every call of the text encoder."""
    calls: list[list[str]] = []
    plain = pipe.encode_prompt

    def encode_prompt(prompt: list[str], **how: Any) -> Any:
        calls.append(list(prompt))
        return plain(prompt, **how)

    monkeypatch.setattr(pipe, "encode_prompt", encode_prompt)
    return calls


def test_prompts_of_a_batch_are_encoded_together_each_once_and_never_again(pipe: Any, encoded: list[list[str]]) -> None:
    staged(pipe, tasks_of(("a", "b", "a"), guidance_scale=2.0))
    assert encoded == [["a", "b"], [""]]
    staged(pipe, tasks_of(("b", "c"), guidance_scale=2.0, width=96))
    assert encoded == [["a", "b"], [""], ["c"]]


def test_a_kept_embedding_makes_the_same_latents(pipe: Any, encoded: list[list[str]]) -> None:
    tasks = tasks_of(guidance_scale=2.0, negative_prompt="dark")
    first = staged(pipe, tasks)
    assert torch.equal(staged(pipe, tasks), first)
    assert len(encoded) == 2
    text_cache.shelf_of(pipe).clear()
    assert torch.equal(staged(pipe, tasks), first)
    assert len(encoded) == 4


def test_longer_prompts_beside_it_do_not_change_what_a_prompt_means(pipe: Any) -> None:
    device = torch.device("cpu")
    with torch.inference_mode():
        together = z_image.encode_prompts(pipe, list(MIXED), device)
        for prompt, embedding in zip(MIXED, together, strict=True):
            (alone,) = z_image.encode_prompts(pipe, [prompt], device)
            assert alone.shape == embedding.shape
            assert torch.allclose(alone, embedding, atol=1e-5)


def test_the_kept_embeddings_are_bounded_by_bytes_and_the_oldest_goes(
    pipe: Any, encoded: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    size = z_image.embed(pipe, ["a"], device)[0].nbytes
    monkeypatch.setitem(text_cache._shelves, pipe, Shelf(99, 2 * size))
    for prompt in ("a", "b", "a", "c", "a", "b"):
        z_image.embed(pipe, [prompt], device)
    assert encoded[1:] == [["a"], ["b"], ["c"], ["b"]]
    found = z_image.embed(pipe, ["d", "e", "f"], device)
    assert len(found) == 3
    assert len(text_cache.shelf_of(pipe)) == 2


def test_embeddings_go_with_their_pipeline(pipe: Any) -> None:
    other = copy.copy(pipe)
    (embedding,) = z_image.embed(other, ["a"], torch.device("cpu"))
    kept = weakref.ref(embedding)
    assert len(text_cache.shelf_of(pipe)) == 0
    del embedding, other
    gc.collect()
    assert kept() is None


def test_an_embedding_on_another_device_is_made_anew(pipe: Any, encoded: list[list[str]]) -> None:
    z_image.embed(pipe, ["a"], torch.device("cpu"))
    shelf = text_cache.shelf_of(pipe)
    kept = shelf.get(text_cache.key("a"))
    assert kept is not None
    shelf.put(text_cache.key("a"), kept.to("meta"), kept.nbytes)
    (made,) = z_image.embed(pipe, ["a"], torch.device("cpu"))
    assert torch.equal(made, kept)


def test_a_prompt_that_is_cut_is_told_in_our_words_alone(
    pipe: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a cat", LONG * 30]
    given = list(prompts)
    (_, long) = z_image.embed(pipe, prompts, torch.device("cpu"))
    assert prompts == given
    assert len(long) == z_image.MAX_TOKENS
    assert [record.name for record in caplog.records] == ["imagemill.families.z_image"]
    assert "only the first 512 are read" in caplog.text
    assert capfd.readouterr().err == ""


def test_on_the_host_a_tensor_is_sent_as_it_is() -> None:
    tensor = torch.ones(2)
    assert streams.sent(tensor, torch.device("cpu")) is tensor
