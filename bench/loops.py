"""What people write themselves: a diffusers loop, the same compiled, and accelerate over all GPUs. The baselines.

    python bench/loops.py --model FOLDER --job TASKS.jsonl OUT [--job …] --marks FILE [--compile] [--split] [--device cuda]

One prompt at a time, each picture saved as PNG with Pillow's defaults. `--split` is one process of several that share the
tasks through accelerate's `split_between_processes`; `spawn_split` starts them. Several jobs run one after another with
the model loaded once. Each process writes its marks: `time.time()` of every stage of its start and of every job.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

RECOMPILES = 64
"""Shapes of one block that may be compiled; torch's own limit of 8 would end in eager mode, or in an error."""

WARM_UP_STEPS = 2
Row = Mapping[str, Any]
Share = Callable[[Sequence[Row]], AbstractContextManager[Sequence[Row]]]


class Loop:
    """A pipeline and the adapter that is on it."""

    def __init__(self, folder: Path, device: str) -> None:
        import torch
        from diffusers import DiffusionPipeline

        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.pipe = DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
        self.pipe.to(device)
        self._lora: str | None = None

    def compile(self, backend: str, warm_up: Sequence[Row]) -> None:
        """Compile the repeated blocks and the VAE's decoder as diffusers' documentation says, and run a short, a middling
        and a long prompt of the tasks, so that no shape is compiled later."""
        import torch

        torch._dynamo.config.recompile_limit = RECOMPILES
        self.pipe.transformer.compile_repeated_blocks(backend=backend)
        if all(matrix.ndim <= 4 for matrix in self.pipe.vae.parameters()):
            self.pipe.vae.to(memory_format=torch.channels_last)
        self.pipe.vae.decoder = torch.compile(self.pipe.vae.decoder, backend=backend)
        by_length = sorted(warm_up, key=lambda row: len(row["prompt"]))
        for row in (by_length[0], by_length[-1], by_length[len(by_length) // 2]):
            self.picture({**row, "steps": WARM_UP_STEPS})

    def picture(self, row: Row) -> Any:
        """The picture of a task, by one whole call of the pipeline."""
        import torch

        self._put_on(row.get("lora_path"))
        call = {key: row[key] for key in ("width", "height", "guidance_scale", "true_cfg_scale") if key in row}
        call["num_inference_steps"] = row["steps"]
        if "negative_prompt" in row:
            call["negative_prompt"] = row["negative_prompt"]
        if "image" in row:
            from PIL import Image

            call["image"] = Image.open(row["image"]).convert("RGB")
        generator = torch.Generator("cpu").manual_seed(row["seed"])
        return self.pipe(prompt=row["prompt"], generator=generator, **call).images[0]

    def _put_on(self, path: str | None) -> None:
        if path == self._lora:
            return
        if self._lora is not None:
            self.pipe.unload_lora_weights()
        if path is not None:
            self.pipe.load_lora_weights(path)
        self._lora = path


def work(loop: Loop, rows: Sequence[Row], out: Path) -> list[float]:
    """Make and save the pictures of the rows, one after another; when each was written."""
    written = []
    for row in rows:
        path = out / f"{row['id']}.png"
        loop.picture(row).save(path)
        written.append(path.stat().st_mtime)
    return written


def alone(rows: Sequence[Row]) -> AbstractContextManager[Sequence[Row]]:
    """All rows are this process's."""
    return nullcontext(rows)


# --- several processes ------------------------------------------------------------------------------------------------


def spawn_split(
    command: Sequence[str], processes: int, env: Mapping[str, str], log: Any
) -> list[subprocess.Popen[bytes]]:
    """Start the processes of one `--split` loop with the environment that `accelerate launch` gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
    return started


def main() -> None:
    """Load, do every job, write the marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--job", nargs=2, action="append", required=True, metavar=("TASKS", "OUT"))
    parser.add_argument("--marks", type=Path, required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    marks: dict[str, Any] = {"started": time.time(), "rank": int(os.environ.get("RANK", "0"))}
    import diffusers
    import torch

    marks["imported"] = time.time()
    marks["diffusers"], marks["torch"] = diffusers.__version__, torch.__version__
    device, share, meet = _join(options.device) if options.split else (options.device, alone, _nobody)
    loop = Loop(options.model, device)
    marks["loaded"] = time.time()
    jobs = [
        ([json.loads(line) for line in Path(tasks).read_text("utf-8").splitlines()], Path(out))
        for tasks, out in options.job
    ]
    if options.compile:
        loop.compile(options.backend, jobs[0][0])
        marks["warmed"] = time.time()
    marks["jobs"] = []
    for rows, out in jobs:
        out.mkdir(parents=True, exist_ok=True)
        meet()
        begun = time.time()
        with share(rows) as own:
            written = work(loop, own, out)
        marks["jobs"].append({"out": str(out), "begun": begun, "ended": time.time(), "written": written})
    if device.startswith("cuda"):
        marks["allocated"] = torch.cuda.max_memory_allocated()
    place = options.marks.with_suffix(f".{marks['rank']}.json")
    place.write_text(json.dumps(marks))
    if options.split and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.destroy_process_group()


def _nobody() -> None:
    """There is nobody to wait for."""


def _join(device: str) -> tuple[str, Share, Callable[[], None]]:
    """This process's device, its share of tasks, and how to wait for the others, by accelerate."""
    from accelerate import PartialState

    state = PartialState(cpu=not device.startswith("cuda"))

    def share(rows: Sequence[Row]) -> AbstractContextManager[Sequence[Row]]:
        return state.split_between_processes(list(rows))  # type: ignore[no-any-return]

    return str(state.device), share, state.wait_for_everyone


if __name__ == "__main__":
    main()
