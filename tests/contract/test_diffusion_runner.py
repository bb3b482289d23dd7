"""The diffusion runner on the embedded model and on a pipeline of the generic family: the right pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import LONG, by_whole_call, loaded, picture, pixels, planned, run, write_lora

from imagemill.families import family
from imagemill.records import ModelSpec
from imagemill.runners import Cancelled
from imagemill.runners.diffusion import DiffusionRunner, adapts_text, all_finite, finish, to_levels


@pytest.fixture(scope="module")
def runner() -> Iterator[DiffusionRunner]:
    yield from loaded()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompt": LONG},
        {"prompt": LONG * 6},
        {"guidance_scale": 3.0},
        {"guidance_scale": 1.0, "negative_prompt": "blurry, dark"},
        {"width": 128, "height": 96, "steps": 3},
    ],
)
def test_the_stages_give_the_pixels_of_one_whole_call(runner: DiffusionRunner, changes: dict[str, Any]) -> None:
    member = planned(**changes)
    whole = by_whole_call(runner._pipe, member.task)
    assert np.array_equal(pixels(run(runner, member)[0]), whole)
    assert whole.std() > 10


def test_pictures_vary_with_seed_and_prompt(runner: DiffusionRunner) -> None:
    first = picture(runner)
    assert np.abs(first - picture(runner, seed=7)).mean() > 5
    assert np.abs(first - picture(runner, prompt="a castle by the sea")).mean() > 0.5
    assert np.array_equal(first, picture(runner))


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_a_batch_of_four_is_at_most_one_level_from_singles(runner: DiffusionRunner, guidance: float) -> None:
    prompts = ("a cat", LONG, "two dogs in the park", "x")
    members = [planned(seq, prompt, guidance_scale=guidance) for seq, prompt in enumerate(prompts)]
    together = run(runner, *members)
    assert [result.seq for result in together] == [0, 1, 2, 3]
    assert {result.batch_size for result in together} == {4}
    for member, result in zip(members, together, strict=True):
        assert np.abs(pixels(result) - pixels(run(runner, member)[0])).max() <= 1


def test_eight_steps_are_eight_forward_passes(runner: DiffusionRunner) -> None:
    calls = []
    handle = runner._pipe.transformer.layers[0].register_forward_hook(lambda *call: calls.append(1))
    run(runner, planned(steps=family("z_image").defaults.steps))
    handle.remove()
    assert len(calls) == 8


def test_beats_name_the_stage_and_every_step(runner: DiffusionRunner) -> None:
    beats: list[tuple[Any, ...]] = []
    (result,) = run(runner, planned(5, steps=3), beat=lambda *beat: beats.append(beat))
    steps = [("denoise", 5, step, 3) for step in (1, 2, 3)]
    assert beats == [("encode", 5, 0, 3), *steps, ("decode", 5, 3, 3)]
    assert set(result.seconds) == {"encode", "denoise", "decode"}
    assert min(result.seconds.values()) > 0


def test_text_comes_before_a_change_of_adapters_that_cannot_change_it(
    runner: DiffusionRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = write_lora(tmp_path)
    (result,) = run(runner, planned(loras=(lora,)))
    assert list(result.seconds) == ["encode", "adapters", "denoise", "decode"]
    monkeypatch.setattr(runner, "_adapts_text", True)
    (result,) = run(runner, planned())
    assert list(result.seconds) == ["adapters", "encode", "denoise", "decode"]


def test_what_adapters_can_change_is_asked_of_the_pipeline() -> None:
    from diffusers import FluxPipeline, StableDiffusionXLPipeline, ZImagePipeline

    assert [adapts_text(kind) for kind in (ZImagePipeline, FluxPipeline, StableDiffusionXLPipeline)] == [
        False,
        True,
        True,
    ]
    assert adapts_text(object())


def test_a_cancel_out_of_a_step_reaches_the_caller_and_leaves_a_working_runner(runner: DiffusionRunner) -> None:
    before = picture(runner)

    def beat(stage: str, seq: int, step: int, steps: int) -> None:
        if stage == "denoise":
            raise Cancelled

    with pytest.raises(Cancelled):
        run(runner, planned(), beat=beat)
    assert np.array_equal(before, picture(runner))


def test_resident_names_model_adapters_and_shape(runner: DiffusionRunner, tmp_path: Path) -> None:
    lora = write_lora(tmp_path, strength=0.5)
    picture(runner, lora)
    assert runner.resident == {"model:tiny", f"adapters:{lora.digest}@0.5", "shape:64x64"}
    picture(runner, width=80)
    assert runner.resident == {"model:tiny", "adapters:-", "shape:80x64"}


def test_memory_says_bytes_now_and_at_the_peak(runner: DiffusionRunner) -> None:
    now, peak = runner.memory()
    assert 50 * 2**20 < now <= peak


def test_nan_and_a_wrong_size_are_bad_outputs() -> None:
    task = planned().task
    good = torch.full((2, 3, 64, 64), 0.5)
    good[1, 1, 2, 3] = float("nan")
    assert all_finite(good).tolist() == [True, False]
    first, second = to_levels(good)
    assert np.asarray(finish(first, True, task))[0, 0, 0] == 128
    assert str(finish(second, False, task)) == "the picture contains NaN"
    assert "the picture is 32x64 with 3 channels" in str(finish(first[:, :32], True, task))


def test_nan_in_one_picture_of_a_batch_costs_that_picture(
    runner: DiffusionRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = runner._pipe.vae.decode
    calls = []

    def broken(latent: Any, **options: Any) -> Any:
        calls.append(1)
        (decoded,) = decode(latent, **options)
        return (decoded * float("nan") if len(calls) == 2 else decoded,)

    monkeypatch.setattr(runner._pipe.vae, "decode", broken)
    results = run(runner, *map(planned, range(3)))
    assert [result.error.kind if result.error else None for result in results] == [None, "bad_output", None]


def test_a_size_that_the_model_cannot_make_is_a_bad_task(runner: DiffusionRunner) -> None:
    results = run(runner, planned(1, width=60), planned(2, width=60))
    assert [result.seq for result in results] == [1, 2]
    assert all("multiples of 8" in str(result.error) for result in results)


def test_tasks_that_do_not_belong_together_are_a_defect_of_the_sender(runner: DiffusionRunner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot share a batch"):
        run(runner, planned(1), planned(2, steps=3))
    with pytest.raises(ValueError, match="cannot share a batch"):
        run(runner, planned(1), planned(2, loras=(write_lora(tmp_path),)))
    with pytest.raises(ValueError, match="loaded is 'tiny'"):
        run(runner, planned(), model=ModelSpec("other", ""))


# --- the generic family -----------------------------------------------------------------------------------------------


def build_stable_diffusion(folder: Path) -> Path:
    """A Stable Diffusion pipeline of a few thousand weights, with a tokenizer of single letters."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=77
    )
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=32,
        bos_token_id=pieces.index("<|startoftext|>"), eos_token_id=pieces.index("<|endoftext|>"), pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16), latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def generic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionRunner]:
    folder = build_stable_diffusion(tmp_path_factory.mktemp("sd"))
    yield from loaded(ModelSpec("tiny", str(folder)))


def test_the_generic_family_makes_the_picture_of_the_pipeline_s_own_call(generic: DiffusionRunner) -> None:
    beats: list[tuple[Any, ...]] = []
    member = planned(3, guidance_scale=5.0, negative_prompt="dark", steps=3)
    (result,) = run(generic, member, beat=lambda *beat: beats.append(beat))
    assert np.array_equal(pixels(result), by_whole_call(generic._pipe, member.task))
    assert [beat for beat in beats if beat[0] == "denoise"] == [("denoise", 3, step, 3) for step in (1, 2, 3)]


def test_a_generic_batch_is_at_most_one_level_from_singles(generic: DiffusionRunner) -> None:
    members = [planned(seq, prompt, guidance_scale=5.0) for seq, prompt in enumerate(("a cat", "a dog", "the sea"))]
    for member, result in zip(members, run(generic, *members), strict=True):
        assert np.abs(pixels(result) - pixels(run(generic, member)[0])).max() <= 1


def test_a_field_that_the_generic_pipeline_does_not_take_is_refused(generic: DiffusionRunner) -> None:
    results = run(generic, planned(1, true_cfg_scale=4.0), planned(2, true_cfg_scale=4.0))
    assert [str(result.error) for result in results] == [
        "StableDiffusionPipeline does not take true_cfg_scale; remove it"
    ] * 2
    (result,) = run(generic, planned(width=60))
    assert result.error
    assert result.error.kind == "bad_task"
    assert "60" in str(result.error)
