"""The embedded model for tests: where it is, tasks for it, and their pictures as arrays of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from imagemill.records import Lora, ModelSpec, PlannedTask, Task, Ticket
from imagemill.runners import Result
from imagemill.runners.diffusion import DiffusionRunner, create
from orders import order_of
from random_lora import make_lora

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "src" / "imagemill" / "assets" / "tiny"
SPEC = ModelSpec(name="tiny", folder=str(TINY))
Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.int16]]
LONG = "一张背包的照片, " + "a very long list of things in a garden, " * 12


def no_beat(stage: str, seq: int, step: int, steps: int) -> None:
    """A beat that nobody hears."""


def loaded(spec: ModelSpec = SPEC) -> Iterator[DiffusionRunner]:
    """The body of a fixture: a runner with the model loaded, on one thread."""
    threads = torch.get_num_threads()
    made = create("cpu", 1)
    made.load(spec, no_beat)
    yield made
    made.unload()
    torch.set_num_threads(threads)


def planned(seq: int = 1, prompt: str = "a cat on a mat", **changes: Any) -> PlannedTask:
    fields = {
        "width": 64,
        "height": 64,
        "steps": 2,
        "guidance_scale": 0.0,
        "seed": 100 + seq,
        "model": "tiny",
    } | changes
    return PlannedTask(Task(str(seq), prompt, **fields), "0" * 64, Ticket(seq))


def run(runner: DiffusionRunner, *members: PlannedTask, beat: Any = no_beat, model: ModelSpec = SPEC) -> list[Result]:
    return [result.landed() for result in runner.run(order_of(*members, model=model), beat)]


def pixels(result: Result) -> Pixels:
    assert result.error is None, result.error
    assert result.image is not None
    return np.asarray(result.image).astype(np.int16)


def picture(runner: DiffusionRunner, *loras: Lora, **changes: Any) -> Pixels:
    return pixels(run(runner, planned(loras=loras, **changes))[0])


def write_lora(
    folder: Path,
    seed: int = 1,
    strength: float = 1.0,
    change: Callable[[dict[str, Any]], Any] | None = None,
    **how: Any,
) -> Lora:
    """An adapter for the embedded model in a file of its own, as a planned task holds it; `change` alters its tensors."""
    path = make_lora(folder / f"{seed}-{len(list(folder.iterdir()))}.safetensors", seed, **how)
    if change:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    return Lora(str(path), strength, sha256(path.read_bytes()).hexdigest())


def by_whole_call(pipe: Any, task: Task) -> Pixels:
    """The picture that the pipeline itself makes of the task, all stages in one call."""
    with torch.inference_mode():
        image = pipe(
            task.prompt,
            negative_prompt=task.negative_prompt,
            height=task.height,
            width=task.width,
            num_inference_steps=task.steps,
            guidance_scale=task.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(task.seed or 0),
        ).images[0]
    return np.asarray(image).astype(np.int16)
