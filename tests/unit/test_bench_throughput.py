"""The parts of `bench/throughput.py` that need no GPU: figures, tables, rows, options, traces, counted operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import engines  # noqa: E402
import meter  # noqa: E402
import models  # noqa: E402
import operations  # noqa: E402
import parti  # noqa: E402
import scaling  # noqa: E402
import scaling_simulated  # noqa: E402
import scorecard  # noqa: E402
import throughput  # noqa: E402
import traces  # noqa: E402
from arguments import arguments_of  # noqa: E402

FORM = [
    "row",
    "model",
    "size",
    "gpus",
    "images_per_second",
    "ratio_to_diffusers_loop",
    "share_of_ceiling",
    "first_image_s",
    "peak_gib",
    "gpu_idle_share",
    "commit",
    "gpu",
]


def figures(row: str, rate: float | None, machine: str = "m", **other: Any) -> scorecard.Entry:
    given = {"model": "z-image", "size": 1024, "gpus": 1} | other
    return scorecard.entry(row=row, images_per_second=rate, details={"machine": machine}, **given)


# --- figures and tables -----------------------------------------------------------------------------------------------


def test_every_entry_has_the_form_of_the_published_figures(tmp_path: Path) -> None:
    scorecard.add(tmp_path / "f.json", figures("a", 0.5))
    (one,) = json.loads((tmp_path / "f.json").read_text())
    assert list(one)[: len(FORM)] == FORM
    with pytest.raises(KeyError, match="no such figure: speed"):
        scorecard.entry(row="a", speed=1)


def test_figures_are_appended_and_compared_with_the_loop_of_the_same_machine_and_size(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    for one in (
        figures("d", 1.0),
        figures("a", 0.5),
        figures("d", 4.0, size=512),
        figures("d", 2.0, gpus=2),
        figures("d", 1.0, machine="other"),
        figures("e", None),
    ):
        entries = scorecard.add(path, one)
    assert [one["ratio_to_diffusers_loop"] for one in entries] == [2.0, 1.0, None, 4.0, None, None]
    assert scorecard.read(path) == entries


def test_a_later_loop_takes_no_ratio_away_and_changes_none(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    for one, tasks in (
        (figures("a", 0.5), 48),
        (figures("d", 1.0), 48),
        (figures("a", None), 48),
        (figures("a", 0.4), 8),
    ):
        one["details"]["tasks"] = tasks
        entries = scorecard.add(path, one)
    assert [one["ratio_to_diffusers_loop"] for one in entries] == [1.0, 2.0, None, 1.0]
    last = figures("d", 1.0)
    last["details"]["tasks"] = 8
    assert scorecard.add(path, last)[-1]["ratio_to_diffusers_loop"] == 2.5


def test_a_file_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('[{"row": "a"}]')
    with pytest.raises(ValueError, match="entry 0 lacks model"):
        scorecard.read(tmp_path / "f.json")


def test_the_table_shows_figures_and_says_why_there_are_none() -> None:
    text = scorecard.table(
        [
            figures("a", 0.5917) | {"share_of_ceiling": 0.364, "first_image_s": 21.5, "gpu_idle_share": 0.05},
            figures("e", None) | {"note": "not available: no --precision fp8 | here"},
        ]
    )
    lines = text.splitlines()
    assert lines[2] == (
        "| (a) diffusers loop, one process | z-image | 1024² | 1 | 0.592 | – | 36.4% | 21.5 s | – | 5.0% |  |"
    )
    assert lines[3].endswith("| – | – | – | – | – | – | not available: no --precision fp8 \\| here |")
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_a_speed_up_is_over_one_gpu_with_the_same_tasks() -> None:
    base = {"engine": "imagemill", "load": "equal", "policy": "dynamic", "start": "warm", "machine": "m", "model": "z"}
    runs = [(1, 16, 16.0), (4, 16, 4.1), (4, 64, 16.0), (4, 16, None)]
    entries = scaling.rated([base | {"gpus": g, "tasks": t, "seconds": s} for g, t, s in runs])
    assert [one["speed_up"] for one in entries] == [1.0, 3.902, None, None]
    assert "| imagemill | 4 | 16 | warm | equal | dynamic | 4.1 | 3.902 | 3.90 |  |" in scaling.table(entries)


# --- what is run ------------------------------------------------------------------------------------------------------


def test_rows_are_picked_by_their_letters(capsys: pytest.CaptureFixture[str]) -> None:
    options = arguments_of("", ["--rows", "a, d,f", "--gpus", "1,2", "--commit", "x"])
    assert (options.rows, options.gpus, options.tasks) == (["a", "d", "f"], [1, 2], 48)
    for wrong in (["--rows", "a,x"], ["--gpus", "0"], ["--tasks", "4,8"]):
        with pytest.raises(SystemExit):
            arguments_of("", wrong)
    assert "there is no row x" in capsys.readouterr().err


def test_a_scaling_run_uses_one_gpu_once_a_load_and_each_policy_on_several() -> None:
    options = arguments_of("", ["--scaling", "--tasks", "4,16", "--gpus", "4,1", "--loads", "equal", "--commit", "x"])
    assert [(run.gpus, run.engine, run.policy, run.jobs) for run in scaling.runs(options)] == [
        (1, "imagemill", "dynamic", (4, 4, 16)),
        (1, "accelerate", "split", (4, 4, 16)),
        (4, "imagemill", "dynamic", (4, 4, 16)),
        (4, "imagemill", "lockstep", (4, 4, 16)),
        (4, "accelerate", "split", (4, 4, 16)),
    ]


def test_a_row_is_compiled_and_traced_as_it_says() -> None:
    assert engines.options_for(compiled=True, precision="fp8", traced=True) == [
        "--compile",
        "--precision",
        "fp8",
        "--trace",
    ]
    assert engines.options_for(compiled=False, precision="bf16", traced=False) == [
        "--no-compile",
        "--precision",
        "bf16",
    ]


def test_the_prompts_are_48_different_ones_and_their_licence_is_named() -> None:
    found = parti.prompts(50)
    assert len(set(found)) == 48
    assert found[48:] == found[:2]
    assert "Apache License, Version 2.0" in parti.PROMPTS.read_text("utf-8").splitlines()[1]
    lengths = sorted(map(len, found))
    assert lengths[0] < 10
    assert lengths[-1] > 150


def test_mixed_tasks_have_sizes_that_the_models_take() -> None:
    sizes = {(row["width"], row["height"]) for row in parti.mixed(parti.rows(10, 1024, 8), 1024)}
    assert sizes == {(1024, 1024), (768, 1024), (512, 1024), (1024, 768)}


def test_loras_are_for_the_layers_of_blocks_and_not_for_what_modulates_them(torch: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "transformer").mkdir()
    shapes = {
        "layers.0.attention.to_q": (6, 4),
        "layers.10.feed_forward.w1": (9, 4),
        "layers.0.adaLN_modulation.0": (8, 4),
        "layers.0.attention.norm_q": (4,),
        "cap_embedder.1": (4, 4),
        "t_embedder.mlp.0": (4, 4),
    }
    weights = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    save_file(weights | {"layers.0.attention.to_q.bias": torch.zeros(6)}, tmp_path / "transformer" / "w.safetensors")
    first, second = (load_file(path) for path in models.loras(tmp_path / "loras", tmp_path, 2, rank=2))
    assert {name: tuple(matrix.shape) for name, matrix in first.items()} == {
        "transformer.layers.0.attention.to_q.lora_A.weight": (2, 4),
        "transformer.layers.0.attention.to_q.lora_B.weight": (6, 2),
        "transformer.layers.10.feed_forward.w1.lora_A.weight": (2, 4),
        "transformer.layers.10.feed_forward.w1.lora_B.weight": (9, 2),
    }
    assert all((matrix != second[name]).any() for name, matrix in first.items())


def test_fp8_without_torchao_is_not_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(throughput, "find_spec", lambda name: None)
    bench = throughput.Bench(SimpleNamespace(tasks=1, device="cuda"), tmp_path, {}, 0.0)
    with pytest.raises(engines.Unavailable, match="torchao"):
        throughput.run_row(bench, "e", 1, {"plain": tmp_path})


# --- steady state and idle time ---------------------------------------------------------------------------------------


def test_the_rate_counts_from_the_first_batch_of_the_last_worker() -> None:
    assert engines.Measured(0.0, [10.0, 11.0, 12.0]).images_per_second == 1.0
    two = engines.Measured(0.0, [10.0, 11.0, 12.0, 12.5, 13.0], openings=[10.0, 12.5])
    assert two.images_per_second == 2.0
    assert engines.Measured(0.0, [10.0]).images_per_second is None


def test_what_was_computed_before_the_first_batch_was_written_does_not_count(tmp_path: Path) -> None:
    """A batch of four a second; its pictures are written one after another."""
    moments = {
        f"{worker}-{number}.png": 10.0 + number // 4 + number % 4 / 100 for worker in (0, 1) for number in range(48)
    }
    lines = [json.dumps({"worker": int(path[0]), "path": path, "batch_size": 4}) for path in moments]
    for workers in (1, 2):
        (tmp_path / "results.jsonl").write_text("\n".join(lines[: 48 * workers]))
        opened = engines.openings(tmp_path / "results.jsonl", moments)
        assert opened == [10.03] * workers
        written = sorted(list(moments.values())[: 48 * workers])
        rate = engines.Measured(0.0, written, openings=opened).images_per_second
        assert rate == pytest.approx(4.0 * workers)


def test_the_clock_waits_for_the_first_batch_of_a_worker_that_began_late(tmp_path: Path) -> None:
    """Twelve batches of four, one a second; the second worker has its first 2.5 s later, a batch of three."""
    rows = [(0, f"0-{number}.png", 10.0 + number // 4 + number % 4 / 100, 4) for number in range(48)]
    rows += [(1, f"1-{number}.png", 12.51 + number / 100, 3) for number in range(3)]
    rows += [(1, f"1-{number}.png", 12.5 + (number + 1) // 4 + (number + 1) % 4 / 100, 4) for number in range(3, 35)]
    lines = [json.dumps({"worker": worker, "path": path, "batch_size": size}) for worker, path, _, size in rows]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    opened = engines.openings(tmp_path / "results.jsonl", {path: moment for _, path, moment, _ in rows})
    assert opened == [10.03, 12.53]
    written = sorted(moment for _, _, moment, _ in rows if moment < 20.54)
    assert engines.Measured(0.0, written, openings=opened).images_per_second == pytest.approx(8.0)


def test_a_first_batch_of_which_a_picture_was_made_again_elsewhere_ends_with_what_is_left_of_it(tmp_path: Path) -> None:
    lines = [json.dumps({"worker": 0, "path": f"{number}.png", "batch_size": 4}) for number in range(3)]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    assert engines.openings(tmp_path / "results.jsonl", {"0.png": 1.0, "1.png": 1.1, "2.png": 1.2}) == [1.2]


def test_idle_time_is_taken_between_the_first_and_the_last_picture() -> None:
    samples = [meter.Sample(moment, 0, busy, 2**30) for moment, busy in ((0, 0.0), (5, 1.0), (6, 0.5), (9, 0.0))]
    assert meter.idle_share(samples, 4, 7) == 0.25
    assert meter.idle_share(samples, 7, 8) is None
    assert meter.peak_gib(samples) == 1.0
    assert meter.peak_gib([]) is None


def test_a_trace_tells_the_gpus_idle_time() -> None:
    def event(name: str, begin: int, length: int, pid: int = 1, **other: Any) -> dict[str, Any]:
        return {"ph": "X", "name": name, "ts": begin, "dur": length, "pid": pid, **other}

    one = [event("decode", 0, 10), event("denoise", 20, 30), event("encode", 45, 10), event("decode", 90, 20)]
    one += [event("png", 0, 500), {"ph": "M", "name": "process_name", "pid": 1}]
    assert traces.idle(one) == pytest.approx((10 + 35) / 100)
    assert traces.idle(one[:1]) is None
    marked = [event("vae decode", 0, 10, cat="gpu"), event("vae decode", 10, 10, cat="gpu"), event("denoise", 0, 1)]
    assert traces.idle(marked) == 0.0


# --- operations -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch() -> Any:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


def test_the_formula_of_z_image_is_what_torch_counts(torch: Any) -> None:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(**models.SMALL_Z_IMAGE).eval()
    latents, text = torch.randn(16, 1, 32, 24), torch.randn(70, 48)
    counted = operations.counted(lambda: model([latents], torch.tensor([0.5]), [text]))
    assert counted == operations.z_image_forward(model.config, 192, 256, 70)


def test_the_formula_of_qwen_image_is_what_torch_counts(torch: Any) -> None:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=48, axes_dims_rope=(8, 4, 4)
    ).eval()
    call = {
        "hidden_states": torch.randn(1, 96, 64),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 33, 48),
        "img_shapes": [[(1, 8, 6), (1, 8, 6)]],
    }
    assert operations.counted(lambda: model(**call)) == operations.qwen_image_forward(model.config, 96, 33)


def test_the_formulas_of_the_text_encoders_are_what_torch_counts(torch: Any) -> None:
    from transformers import Qwen3Config, Qwen3Model

    encoder = Qwen3Model(Qwen3Config(**models.SMALL_QWEN3)).eval()
    tokens = torch.ones(1, 64, dtype=torch.long)
    assert operations.counted(lambda: encoder(tokens)) == operations.decoder_forward(encoder.config.to_dict(), 64)
    both = models._qwen2_5_vl(models.marked_tokenizer(), small=True).eval().model
    text, vision = both.language_model, both.visual
    assert operations.counted(lambda: text(tokens)) == operations.decoder_forward(text.config.to_dict(), 64)
    patches, grid = torch.randn(22 * 26, 3 * 2 * 14**2), torch.tensor([[1, 22, 26]])
    counted = operations.counted(lambda: vision(patches, grid_thw=grid))
    assert counted == operations.vision_forward(vision.config.to_dict(), 22, 26)


def test_an_autoencoder_is_counted_exactly_at_any_size(torch: Any, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    shape = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape | {"_class_name": "AutoencoderKL"}))
    decode, encode = operations.autoencoder(tmp_path)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(shape)
    assert decode(1024**2) == pytest.approx(
        operations.counted(lambda: vae.decode(torch.empty(1, 16, 128, 128, device="meta")))
    )
    assert decode(1024**2) == pytest.approx(10.5e12, rel=0.01), "../shared/FACTS.md"
    assert encode(256**2) == pytest.approx(
        operations.counted(lambda: vae.encode(torch.empty(1, 3, 256, 256, device="meta")))
    )


def test_full_sizes_agree_with_the_operations_counted_on_a_gpu() -> None:
    z_image = {"dim": 3840, "all_patch_size": [2], "in_channels": 16, "n_heads": 30, "n_kv_heads": 30, "n_layers": 30}
    z_image |= {"n_refiner_layers": 2, "cap_feat_dim": 2560}
    assert operations.z_image_forward(z_image, 1024, 1024, 128) == pytest.approx(56.6e12, rel=0.01)
    qwen = {"num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 64, "num_layers": 60}
    qwen |= {"joint_attention_dim": 3584, "patch_size": 2, "out_channels": 16}
    assert operations.qwen_image_forward(qwen, 8192, 600) == pytest.approx(176.5e12, rel=0.001)


# --- the whole script on a CPU ----------------------------------------------------------------------------------------


def bench(tmp_path: Path, *arguments: str, seconds: float = 600) -> list[dict[str, Any]]:
    out = tmp_path / "f.json"
    command = [sys.executable, str(ROOT / "bench" / "throughput.py"), "--small", "--device", "cpu", "--commit", "x"]
    command += ["--work", str(tmp_path / "work"), "--out", str(out), "--steps", "2", "--backend", "eager", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "size"), [("z-image", "64"), ("qwen-image-edit", "128")])
def test_every_row_runs_with_a_tiny_model(model: str, size: str, tmp_path: Path) -> None:
    found = bench(tmp_path, "--rows", "a,b,c,d,e,f,w", "--model", model, "--size", size, "--tasks", "3")
    assert [one["row"] for one in found] == list("abcdefw")
    assert not [one["note"] for one in found if "failed" in one["note"]]
    for one in found:
        if one["row"] in "abcdf":
            assert one["images_per_second"] > 0
            assert one["share_of_ceiling"] > 0
            assert one["ratio_to_diffusers_loop"] is not None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_edits_run_with_a_tiny_model_and_a_row_that_fails_ends_no_other(tmp_path: Path) -> None:
    found = bench(
        tmp_path,
        "--model",
        "qwen-image-edit",
        "--rows",
        "d,a",
        "--size",
        "128",
        "--tasks",
        "2",
        "--imagemill=--nonsense",
    )
    assert "failed: ended with exit code 2" in found[0]["note"]
    assert found[1]["images_per_second"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scaling_and_the_judge_run_with_tiny_models(tmp_path: Path) -> None:
    arguments = ["--tasks", "2,3", "--gpus", "1,2", "--loads", "mixed", "--policies", "lockstep", "--size", "64"]
    found = bench(tmp_path, "--scaling", *arguments)
    assert len(found) == 12
    assert all(one["speed_up"] for one in found)
    (tmp_path / "f.json").unlink()
    judged = bench(tmp_path, "--judge", "--size", "128", "--tasks", "3", "--tokens", "4")
    assert [one["row"] for one in judged] == ["judge-single", "judge-batched"]
    assert "times one at a time" in judged[1]["note"]


def test_simulated_scaling_stays_below_the_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    scaling_simulated.main(["--gpus", "2,4", "--tasks", "4,16"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["load", "tasks", "policy", "2 GPUs warm", "2 GPUs cold", "4 GPUs warm", "4 GPUs cold"]
    found = {tuple(cells[:3]): [float(cell) for cell in cells[3:]] for cells in lines[2:]}
    assert set(found) == {
        (load, count, policy)
        for load in ("equal", "mixed")
        for count in ("4", "16")
        for policy in ("dynamic", "lockstep")
    }
    for two, two_cold, four, four_cold in found.values():
        assert 1 < two_cold < two <= 2
        assert two_cold < four_cold < four <= 4
    assert found["mixed", "16", "dynamic"][2] > found["mixed", "16", "lockstep"][2]
