"""What tuning does to a loaded pipeline, on the CPU: compiled code, its falling back, attention back ends.

Most tests stop before code is generated (torch's back ends `eager` and `aot_eager`): graphs, guards and shapes are those
of the real compiler. The slow one generates.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock, ZSingleStreamAttnProcessor
from tiny_editors import qwen
from tiny_model import LONG, SPEC, by_whole_call, no_beat, picture, pixels, planned, run, write_lora
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from imagemill import plan
from imagemill.config.values import ATTENTION
from imagemill.errors import BadModel, BadTask, OutOfMemory, WorkerGone
from imagemill.families import family
from imagemill.guidance import guidance
from imagemill.records import ModelSpec, Span, Task, Tuning
from imagemill.runners import attention, compiled, real_rotary, tuning, vision_windows, warm_up
from imagemill.runners.adapters import Adapters
from imagemill.runners.diffusion import DiffusionRunner, create
from imagemill.runners.merged import Merged
from imagemill.runners.warm_up import Round

CAPTIONS = ("a cat", "a cat on a mat " * 6, LONG)
SMALL = Tuning(compile=True, sizes=((64, 64),))
FALLS_BACK = {"blocks": "the blocks of ZImageTransformer2DModel", "decoder": "the decoder of AutoencoderKL"}


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiled code and no back end is left for other tests, and none comes from an earlier run."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compile"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "compile" / "triton"))
    monkeypatch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    monkeypatch.setenv("TORCHINDUCTOR_AUTOGRAD_CACHE", "1")
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256, specialize_float=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def runner() -> Iterator[DiffusionRunner]:
    threads = torch.get_num_threads()
    made = create("cpu", 1)
    made.load(SPEC, no_beat)
    yield made
    made.unload()
    torch.set_num_threads(threads)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def tune(runner: DiffusionRunner, wanted: Tuning = SMALL, **how: Any) -> list[str]:
    assert runner._family is not None
    return tuning.tune(runner._pipe, runner._family, wanted, "cpu", no_beat, **{"backend": "eager"} | how)


def blocks(runner: DiffusionRunner) -> list[Any]:
    model = runner._pipe.transformer
    return [*model.noise_refiner, *model.context_refiner, *model.layers]


def close(found: Any, expected: Any) -> None:
    """Within the bound for compiled against eager: single levels, at few places."""
    difference = np.abs(found - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.001


# --- nothing asked ----------------------------------------------------------------------------------------------------


def test_on_the_cpu_a_default_tuning_changes_nothing(runner: DiffusionRunner) -> None:
    before = picture(runner)
    assert tune(runner, Tuning()) == []
    assert all(type(block.attention.processor) is ZSingleStreamAttnProcessor for block in blocks(runner))
    assert all(block._compiled_call_impl is None for block in blocks(runner))
    assert np.array_equal(picture(runner), before)


# --- real-valued rotary positions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_real_rotary_positions_give_the_same_bits_as_complex_ones_at_the_head_width_of_z_image(
    dtype: torch.dtype, masked: bool
) -> None:
    torch.manual_seed(1)
    module = ZImageTransformerBlock(0, 256, 2, 2, 1e-5, qk_norm=True).attention.to(dtype)
    x = torch.randn(2, 96, 256, dtype=dtype)
    angles = 20 * torch.randn(2, 96, 64)
    freqs = torch.polar(torch.ones_like(angles), angles)
    mask = torch.arange(96).expand(2, 96) < torch.tensor([[96], [64]]) if masked else None
    with torch.no_grad():
        expected = module(x, attention_mask=mask, freqs_cis=freqs)
        module.set_processor(real_rotary.RealRotaryProcessor())
        assert torch.equal(module(x, attention_mask=mask, freqs_cis=torch.view_as_real(freqs)), expected)
        assert torch.equal(module(x, attention_mask=mask, freqs_cis=freqs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_real_rotary_positions_give_the_same_bits_as_complex_ones_at_the_head_width_of_qwen_image(
    dtype: torch.dtype, masked: bool
) -> None:
    torch.manual_seed(1)
    model = wide_qwen(dtype)
    call = qwen_call(dtype, masked)
    with torch.no_grad():
        (expected,) = model(**call)
        assert real_rotary.put_on(model) == len(model.transformer_blocks)
        assert {type(block.attn.processor) for block in model.transformer_blocks} == {
            real_rotary.RealRotaryQwenProcessor
        }
        (found,) = model(**call)
    assert torch.equal(found, expected)
    assert not any(one.is_complex() for one in model.pos_embed([(1, 4, 4)], device=found.device, max_txt_seq_len=3))


def test_one_compile_serves_all_instructions_of_qwen_image() -> None:
    model = wide_qwen(torch.float32)
    calls = [qwen_call(torch.float32, masked=False, words=words) for words in (7, 12, 40)]
    with torch.inference_mode():
        expected = [model(**call)[0] for call in calls]
        assert tuning.blocks_of(model, True, "aot_eager") is not None
        before = graphs()
        found = [model(**call)[0] for call in calls]
    assert graphs() - before == 1
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def wide_qwen(dtype: torch.dtype) -> Any:
    """A Qwen-Image model of two blocks with heads as wide as the real one's."""
    torch.manual_seed(2)
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(16, 56, 56),
    ).to(dtype)


def qwen_call(dtype: torch.dtype, masked: bool, words: int = 7) -> dict[str, Any]:
    """Arguments for two rows of one size, with an edited picture behind them."""
    torch.manual_seed(3)
    mask = torch.arange(words).expand(2, words) < torch.tensor([[words], [words - 3]])
    return {
        "hidden_states": torch.randn(2, 32, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, words, 32, dtype=dtype),
        "encoder_hidden_states_mask": mask if masked else None,
        "timestep": torch.tensor([0.5, 0.5], dtype=dtype),
        "img_shapes": [[(1, 4, 4), (1, 4, 4)]] * 2,
        "return_dict": False,
    }


def test_real_rotary_positions_make_the_same_pictures_in_stages_and_in_a_whole_call(runner: DiffusionRunner) -> None:
    task = planned(guidance_scale=2.0, negative_prompt="a dog " * 30)
    (before,) = run(runner, task)
    whole = by_whole_call(runner._pipe, task.task)
    assert real_rotary.put_on(runner._pipe.transformer) == len(blocks(runner))
    (after,) = run(runner, task)
    close(pixels(after), pixels(before))
    close(by_whole_call(runner._pipe, task.task), whole)


def test_a_back_end_reaches_real_rotary_attention_whichever_comes_first(runner: DiffusionRunner) -> None:
    model = runner._pipe.transformer
    model.set_attention_backend("_native_math")
    real_rotary.put_on(model)
    assert {block.attention.processor._attention_backend for block in blocks(runner)} == {
        AttentionBackendName._NATIVE_MATH
    }
    model.set_attention_backend("native")
    assert {block.attention.processor._attention_backend for block in blocks(runner)} == {AttentionBackendName.NATIVE}


# --- compiled ---------------------------------------------------------------------------------------------------------


def test_one_compile_serves_all_captions_and_sizes_of_the_blocks(runner: DiffusionRunner) -> None:
    expected = [picture(runner, prompt=caption) for caption in CAPTIONS]
    lines = tune(runner, backend="aot_eager")
    assert lines[:2] == [f"{part}: compiled" for part in FALLS_BACK.values()]
    warm = graphs()
    for caption, before in zip(CAPTIONS, expected, strict=True):
        close(picture(runner, prompt=caption), before)
    assert graphs() == warm
    decoder = runner._pipe.vae.decoder
    decoder._compiled_call_impl = None
    picture(runner, width=96, height=128)
    assert graphs() == warm


def test_no_block_is_traced_twice(runner: DiffusionRunner) -> None:
    traced: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    tune(runner, backend=counting)
    assert len(traced) == graphs() > 0


def test_batches_and_guidance_meet_graphs_of_the_warm_up(runner: DiffusionRunner) -> None:
    pair = [planned(1, "a cat"), planned(2, LONG)]
    expected = [pixels(result) for result in run(runner, *pair)]
    tune(runner, replace(SMALL, batch=2))
    warm = graphs()
    for result, before in zip(run(runner, *pair), expected, strict=True):
        close(pixels(result), before)
    run(runner, *(planned(seq, "a dog") for seq in range(3)))
    picture(runner, guidance_scale=2.0, negative_prompt=LONG)
    assert graphs() == warm


@pytest.mark.parametrize("guided", [(True,), pytest.param((False, True), marks=pytest.mark.slow)], ids=["all", "some"])
def test_the_first_task_with_guidance_meets_graphs_of_the_warm_up(
    runner: DiffusionRunner, guided: tuple[bool, ...]
) -> None:
    given: list[dict[str, Any]] = [{"guidance_scale": 0.5}, {"guidance_scale": 4.0, "negative_prompt": LONG}]
    given += [{}, {"prompt": LONG}] if False in guided else []
    expected = [picture(runner, **fields) for fields in given]
    tune(runner, replace(SMALL, guided=guided))
    warm = graphs()
    for fields, before in zip(given, expected, strict=True):
        close(picture(runner, **fields), before)
    assert graphs() == warm
    if False not in guided:
        picture(runner)
        assert graphs() > warm


@pytest.mark.slow
def test_static_shapes_compile_each_caption_length_apart_within_the_raised_limit(runner: DiffusionRunner) -> None:
    expected = picture(runner, prompt=LONG)
    tune(runner, dynamic=False)
    warm = graphs()
    close(picture(runner, prompt=LONG), expected)
    assert graphs() > warm


def test_every_round_of_the_warm_up_is_a_sign_of_life(runner: DiffusionRunner) -> None:
    heard: list[tuple[str, int, int, int]] = []
    assert runner._family is not None
    tuning.tune(runner._pipe, runner._family, SMALL, "cpu", lambda *beat: heard.append(beat), backend="eager")
    rounds = len(warm_up.rounds(SMALL, runner._family, True))
    assert {place for _, _, place, _ in heard} == set(range(rounds + 1))
    assert {(stage, seq, total) for stage, seq, _, total in heard} == {("compile", -1, rounds)}


def test_every_part_of_the_warm_up_has_its_span(runner: DiffusionRunner) -> None:
    spans: list[Span] = []
    assert runner._family is not None
    tuning.tune(runner._pipe, runner._family, SMALL, "cpu", no_beat, spans=spans, backend="eager")
    stages = [span.stage for span in spans]
    assert stages[0] == "choose attention"
    for stage in ("encode", "denoise", "decode"):
        assert any(name.startswith(f"warm up {stage} 1 at") for name in stages)
    assert sum(name.startswith("warm up encode text") for name in stages) == len(warm_up.STATIC_LENGTHS) - 1
    assert all(before.start + before.seconds <= after.start for before, after in pairwise(spans))


def test_an_editor_is_warmed_up_with_made_up_pictures(tmp_path: Path) -> None:
    made = create("cpu", 1)
    made.load(ModelSpec(name="editor", folder=str(qwen(tmp_path / "editor"))), no_beat)
    lines = tune(made, Tuning(compile=True, sizes=((64, 64),)))
    assert [line for line in lines if "not warmed up" in line] == []
    assert lines[:2] == ["AutoencoderKLQwenImage: not compiled", "the blocks of QwenImageTransformer2DModel: compiled"]
    assert made._pipe.text_encoder.config.vision_config._attn_implementation == vision_windows.NAME
    made.unload()


@pytest.mark.slow
def test_generated_code_makes_the_same_pictures(runner: DiffusionRunner) -> None:
    expected = [picture(runner, prompt=caption) for caption in CAPTIONS]
    lines = tune(runner, backend="inductor")
    assert lines[:2] == [f"{part}: compiled" for part in FALLS_BACK.values()]
    for caption, before in zip(CAPTIONS, expected, strict=True):
        close(picture(runner, prompt=caption), before)


ANOTHER_PROCESS = """
from test_tuning import SMALL, close, tune
from tiny_model import SPEC, no_beat, picture
from imagemill.runners.diffusion import create
runner = create("cpu", 1)
runner.load(SPEC, no_beat)
before = picture(runner)
print(*tune(runner, SMALL, backend="inductor"), sep="\\n")
close(picture(runner), before)
"""


@pytest.mark.slow
def test_a_torn_cache_costs_another_process_no_picture(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [here, here.parent / "support"]))}
    for keep in (None, 100):
        kept = [path for path in (tmp_path / "compile").rglob("*") if path.is_file()]
        for path in kept if keep is not None else ():
            path.write_bytes(path.read_bytes()[:keep])
        ended = subprocess.run(
            [sys.executable, "-c", ANOTHER_PROCESS], env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert len([line for line in ended.stdout.splitlines() if line.startswith(tuple(FALLS_BACK.values()))]) == 2
        assert kept or keep is None


# --- what does not compile --------------------------------------------------------------------------------------------


def failing_after(good: int, error: Exception) -> Any:
    """A back end that compiles so many graphs and refuses the next."""
    made = []

    def compile_graph(module: Any, inputs: Any, **how: Any) -> Any:
        made.append(module)
        if len(made) > good:
            raise error
        return module

    return compile_graph


def test_a_compile_that_fails_is_undone_and_reported_and_pictures_are_made_in_eager_mode(
    runner: DiffusionRunner,
) -> None:
    before = picture(runner, prompt=LONG)
    lines = tune(runner, backend=failing_after(0, RuntimeError("no compiler here")))
    for line, part in zip(lines, FALLS_BACK.values(), strict=False):
        assert line.startswith(f"{part}: eager, it did not compile: RuntimeError: no compiler here")
    assert all(block._compiled_call_impl is None for block in blocks(runner))
    assert runner._pipe.vae.decoder.conv_in.weight.is_contiguous()
    close(picture(runner, prompt=LONG), before)


def test_a_shape_that_fails_to_compile_in_the_middle_of_a_run_costs_no_picture(runner: DiffusionRunner) -> None:
    task = planned(guidance_scale=2.0)
    (before,) = run(runner, task)
    backend = failing_after(3, RuntimeError("too odd"))
    lines = tune(runner, backend=backend)
    assert lines[:2] == [f"{part}: compiled" for part in FALLS_BACK.values()]
    (after,) = run(runner, task)  # two rows, which need a graph of their own
    close(pixels(after), pixels(before))
    assert all(block._compiled_call_impl is None for block in blocks(runner))


def test_running_out_of_memory_while_compiling_is_no_failed_compile(runner: DiffusionRunner) -> None:
    part = compiled.compile_blocks(
        runner._pipe.transformer, True, failing_after(0, torch.OutOfMemoryError("CUDA out of memory"))
    )
    assert part is not None
    with pytest.raises(Exception, match="out of memory"):
        runner._family.denoise(  # type: ignore[union-attr]
            runner._pipe,
            [planned().task],
            runner._family.encode(runner._pipe, [planned().task], [()]),  # type: ignore[union-attr]
            lambda step, steps: None,
        )
    assert part.failure == ""
    assert all(block._compiled_call_impl is not None for block in blocks(runner))


def test_a_fault_of_the_model_itself_is_not_taken_for_a_failed_compile() -> None:
    assert not compiled.is_compilers(ValueError("a bad shape"))
    assert compiled.is_compilers(torch._dynamo.exc.FailOnRecompileLimitHit("full"))
    assert compiled.is_compilers(torch._dynamo.exc.Unsupported("a graph break"))


class Refusing:
    """The family of the embedded model, with an `encode` that raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(family("z_image"), name)

    def encode(self, pipe: Any, tasks: Any, pictures: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [OutOfMemory("no room"), BadTask("no such step"), IndexError("one step is too few")])
def test_a_made_up_task_that_fails_is_a_line_and_no_failed_load(runner: DiffusionRunner, error: Exception) -> None:
    lines = warm_up.warm_up(runner._pipe, Refusing(error), [Round((64, 64), (3,))], "cpu", no_beat, [])  # type: ignore[arg-type]
    assert len(lines) == 1
    assert lines[0].startswith("not warmed up: 1 at 64x64: ")
    assert str(error) in lines[0]


def test_a_broken_device_ends_the_warm_up(runner: DiffusionRunner) -> None:
    broken = Refusing(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        warm_up.warm_up(runner._pipe, broken, [Round((64, 64), (3,))], "cpu", no_beat, [])  # type: ignore[arg-type]
    assert issubclass(WorkerGone, Exception)


def test_the_rounds_meet_every_size_with_one_and_with_the_largest_batch() -> None:
    z_image = family("z_image")
    found = warm_up.rounds(Tuning(sizes=((64, 64), (96, 64)), batch=100), z_image, True)
    assert {(one.size, len(one.words)) for one in found} == {
        (size, count) for size in ((64, 64), (96, 64)) for count in (1, z_image.max_batch)
    }
    assert any(len(set(one.words)) == 2 for one in found)
    assert {one.size for one in warm_up.rounds(Tuning(), z_image, True)} == {(1024, 1024)}
    assert len(warm_up.rounds(Tuning(), z_image, False)) == len(warm_up.STATIC_LENGTHS)


@pytest.mark.parametrize("name", ["flux", "flux2", "flux_kontext", "qwen_edit", "qwen_image", "sd3", "sdxl", "z_image"])
def test_the_rounds_meet_guidance_as_the_tasks_have_it(name: str) -> None:
    kind = family(name)
    for guided in ((True,), (False,), (False, True)):
        found = warm_up.rounds(Tuning(sizes=((64, 64), (96, 64)), batch=2, guided=guided), kind, True)
        made = [(one.size, task) for one in found if not one.only_text for task in warm_up.made_up(one, kind)]
        runs = {
            (size, guidance(task.guidance_scale, task.true_cfg_scale, task.negative_prompt).runs(kind))
            for size, task in made
        }
        assert runs == {(size, wanted) for size in ((64, 64), (96, 64)) for wanted in guided}
        assert all(plan.problems(replace(task, output_path="a.png"), kind) == [] for _, task in made)
    (usual,) = warm_up.made_up(Round((64, 64), (3,)), kind)
    for field in {"guidance_scale", "true_cfg_scale", "negative_prompt"} & kind.fields:
        assert getattr(usual, field) == getattr(kind.defaults, field)


# --- adapters on compiled blocks --------------------------------------------------------------------------------------


def test_adapters_as_layers_run_in_eager_mode_and_leave_compiled_blocks_behind(
    runner: DiffusionRunner, tmp_path: Path
) -> None:
    lora = write_lora(tmp_path)
    expected, bare = picture(runner, lora), picture(runner)
    runner.adapters.clear(runner._pipe)
    tune(runner)
    warm = graphs()
    close(picture(runner, lora), expected)
    assert graphs() == warm
    runner.adapters.clear(runner._pipe)
    close(picture(runner), bare)
    assert graphs() == warm
    assert isinstance(runner.adapters, Adapters)


def test_merged_adapters_change_the_pictures_of_compiled_blocks_without_another_compile(
    runner: DiffusionRunner, tmp_path: Path
) -> None:
    runner.adapters = Merged(runner._pipe)
    loras = [write_lora(tmp_path, seed) for seed in (1, 2)]
    expected = [picture(runner, lora) for lora in loras]
    assert not np.array_equal(*expected)
    bare = picture(runner)
    tune(runner)
    warm = graphs()
    for lora, before in zip(loras, expected, strict=True):
        close(picture(runner, lora), before)
    close(picture(runner), bare)
    assert graphs() == warm


# --- attention --------------------------------------------------------------------------------------------------------


def test_an_attention_back_end_that_is_asked_for_is_set_on_every_block(runner: DiffusionRunner) -> None:
    before = picture(runner)
    assert tune(runner, Tuning(attention="_native_math")) == ["attention by _native_math, as asked"]
    assert {block.attention.processor._attention_backend for block in blocks(runner)} == {
        AttentionBackendName._NATIVE_MATH
    }
    close(picture(runner), before)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fastest", "diffusers knows no such back end"),
        ("_flash_3_hub", "it would have to be downloaded"),
        ("_flash_3", "missing package"),
        ("_native_cudnn", ""),
    ],
)
def test_an_attention_back_end_that_does_not_work_here_is_refused_with_those_that_do(
    runner: DiffusionRunner, name: str, reason: str
) -> None:
    with pytest.raises(BadModel, match=f"attention {name}: ") as refused:
        tune(runner, Tuning(attention=name))
    message = str(refused.value)
    assert reason in message
    usable = message.split("; here work ")[1].split(", ")
    assert {"auto", "native", "_native_math"} <= set(usable)
    assert name not in usable
    assert len(message.splitlines()) == 1


def test_a_model_without_a_choice_of_attention_refuses_one() -> None:
    assert attention.set_up(torch.nn.Linear(2, 2), Tuning(), "cuda") == [
        "attention as it is: Linear has no choice of attention back ends"
    ]
    with pytest.raises(BadModel, match="attention flash: Linear has no choice"):
        attention.set_up(torch.nn.Linear(2, 2), Tuning(attention="flash"), "cuda")


def test_the_load_is_that_of_the_model_at_its_largest_picture(runner: DiffusionRunner) -> None:
    config = runner._pipe.transformer.config
    found = attention.load_of(runner._pipe.transformer, [(512, 512), (1024, 1024)])
    assert found == attention.Load(config.n_heads, config.dim // config.n_heads, tokens=4096)


@pytest.mark.parametrize(
    ("times", "name"),
    [
        ({"native": 1.0, "_flash_3": 0.5, "flash": 0.7}, "_flash_3"),
        ({"native": 1.0, "_native_cudnn": 0.98}, "native"),
        ({"native": 1.0, "_native_cudnn": 0.96}, "_native_cudnn"),
        ({"native": 0.5, "flash": 0.7}, "native"),
        ({}, "native"),
    ],
)
def test_the_fastest_back_end_is_taken_and_a_tie_stays_with_torch(times: dict[str, float], name: str) -> None:
    assert attention.fastest(times) == name


def test_results_agree_within_rounding_and_no_further() -> None:
    torch.manual_seed(0)
    exact = torch.randn(1, 64, 2, 32)
    assert attention.agrees(exact.bfloat16(), exact)
    assert not attention.agrees(exact * 1.05, exact)
    assert not attention.agrees(exact.roll(1, 1), exact)


def test_a_fast_back_end_without_masks_leaves_calls_with_one_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fast(query: Any, key: Any, value: Any, attn_mask: Any = None, scale: Any = None) -> Any:
        assert attn_mask is None
        calls.append(query)
        return query

    flash = AttentionBackendName.FLASH
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setitem(registry._backends, flash, fast)
    monkeypatch.setitem(registry._supported_arg_names, flash, {"query", "key", "value", "attn_mask", "scale"})
    for _ in range(2):
        attention.make_masks_native("flash")
    query, key, value = torch.randn(3, 1, 32, 2, 16)
    mask = (torch.arange(32) < 20)[None, None, None]
    assert dispatch_attention_fn(query, key, value, backend=flash) is query
    masked = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=flash)
    assert torch.equal(masked, dispatch_attention_fn(query, key, value, attn_mask=mask, backend="native"))
    assert len(calls) == 1


def test_made_up_tasks_take_one_step_with_the_familys_own_guidance() -> None:
    (task,) = warm_up.made_up(Round((64, 32), (2,)), family("qwen_edit"))
    assert isinstance(task, Task)
    assert (task.width, task.height, task.steps, task.true_cfg_scale) == (64, 32, 1, 4.0)
    assert (task.prompt, task.negative_prompt, len(task.images)) == ("picture picture", " ", 1)
    assert [one.size for one in warm_up.blank_pictures(task, family("qwen_edit"))] == [(64, 32)]


def test_the_names_that_settings_take_are_those_of_diffusers() -> None:
    assert set(ATTENTION) == set(attention.names())
