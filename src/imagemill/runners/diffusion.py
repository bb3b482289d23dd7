"""The runner that hosts a diffusers pipeline: load, then encode, denoise and decode each batch."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadModel, BadOutput, BadTask, TaskError
from imagemill.families import Family
from imagemill.plan import adapters_need
from imagemill.records import Lora, ModelSpec, Task, WorkOrder
from imagemill.runners import Beat, Result
from imagemill.runners.adapters import Adapters
from imagemill.runners.references import Member, by_shapes, take_in

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

log = logging.getLogger(__name__)


def create(device: str, threads: int) -> DiffusionRunner:
    """The runner for a torch device; `threads` is how many CPU threads torch may use."""
    return DiffusionRunner(device, threads)


class DiffusionRunner:
    """A `Runner` for one diffusers pipeline on one device."""

    def __init__(self, device: str, threads: int = 1) -> None:
        self.device = device
        self.threads = threads
        self.adapters = Adapters()
        self._spec: ModelSpec | None = None
        self._pipe: Any = None
        self._family: Family | None = None
        self._need = adapters_need(())
        self._shape = ""

    def prepare(self, spec: ModelSpec) -> None:
        """Import torch, diffusers and the classes of the model's components."""
        from imagemill.runners import loading

        loading.import_classes(spec)

    def load(self, spec: ModelSpec, beat: Beat) -> None:
        """Load the model; beats with the stage `load` and seq -1. Raises `BadModel` when the folder can never load."""
        import torch

        from imagemill.runners import loading

        self.unload()
        quiet()
        torch.set_num_threads(self.threads)
        started = time.monotonic()
        try:
            self._pipe, self._family = loading.load(spec, self.device, beat)
        except BaseException:
            self.unload()
            raise
        self._spec = spec
        log.info("loaded %s on %s in %.1f s", spec.name, describe(self.device), time.monotonic() - started)

    def run(self, order: WorkOrder, beat: Beat) -> Iterator[Result]:
        """One result a task. All tasks share model, adapters and group; those whose pictures differ in shape run apart.

        A refusal that meets a batch of several is tried again one task at a time, so that only the culprit fails.
        Raises `ValueError` when the tasks do not belong together or the order is for another model: the sender's defect.
        """
        if self._spec is None or self._family is None:
            raise BadModel(f"no model is loaded on {self.device}")
        if order.model.name != self._spec.name:
            raise ValueError(f"the order is for model {order.model.name!r}; loaded is {self._spec.name!r}")
        first = order.tasks[0].task
        for task in (planned.task for planned in order.tasks):
            same_adapters = adapters_need(task.loras) == adapters_need(first.loras)
            if not same_adapters or self._family.group(task) != self._family.group(first):
                raise ValueError(f"tasks {first.id!r} and {task.id!r} cannot share a batch")
        members: list[Member] = []
        for found in take_in(order.tasks, self._family, self._spec):
            if isinstance(found, Result):
                yield found
            else:
                members.append(found)
        for alike in by_shapes(members, self._family):
            yield from self._run(self._family, alike, beat)

    def _run(self, family: Family, members: Sequence[Member], beat: Beat) -> Iterator[Result]:
        try:
            results = self._batch(family, members, beat)
        except (BadTask, BadOutput) as error:
            if len(members) == 1:
                results = [Result(members[0].planned.ticket.seq, error=error)]
            else:
                for member in members:
                    yield from self._run(family, [member], beat)
                return
        yield from results

    def _batch(self, family: Family, members: Sequence[Member], beat: Beat) -> list[Result]:
        import torch

        tasks = [member.planned.task for member in members]
        seq, size, steps = members[0].planned.ticket.seq, len(members), tasks[0].steps or 0
        watch = Stopwatch(self.device, size)
        self._apply(tasks[0].loras, watch)
        with torch.inference_mode():
            beat("encode", seq, 0, steps)
            with watch.stage("encode"):
                conditioning = family.encode(self._pipe, tasks, [member.pictures for member in members])
            with watch.stage("denoise"):
                latents = family.denoise(
                    self._pipe, tasks, conditioning, lambda step, steps: beat("denoise", seq, step, steps)
                )
            beat("decode", seq, steps, steps)
            with watch.stage("decode"):
                pictures = family.decode(self._pipe, tasks, latents)
                if len(pictures) != size:
                    raise BadOutput(f"{len(pictures)} pictures came out for {size} tasks")
                made = [finish(picture, task) for picture, task in zip(pictures, tasks, strict=True)]
        self._shape = f"shape:{tasks[0].width}x{tasks[0].height}"
        return [
            Result(member.planned.ticket.seq, error=one, seconds=watch.seconds, batch_size=size)
            if isinstance(one, TaskError)
            else Result(member.planned.ticket.seq, image=one, seconds=watch.seconds, batch_size=size)
            for member, one in zip(members, made, strict=True)
        ]

    def _apply(self, loras: Sequence[Lora], watch: Stopwatch) -> None:
        import torch

        self._need = adapters_need(())
        with torch.no_grad(), watch.stage("adapters"):
            changed = self.adapters.apply(self._pipe, loras)
        if not changed:
            del watch.seconds["adapters"]
        self._need = adapters_need(loras)

    def unload(self) -> None:
        """Drop the pipeline and its adapters, and give the device's cached memory back."""
        import torch

        self._spec = self._pipe = self._family = None
        self.adapters = Adapters()
        self._need, self._shape = adapters_need(()), ""
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    @property
    def resident(self) -> frozenset[str]:
        """The loaded model, the applied adapters, the shape of the last batch."""
        if self._spec is None:
            return frozenset()
        return frozenset({f"model:{self._spec.name}", self._need, *filter(None, (self._shape,))})

    def memory(self) -> tuple[int, int]:
        """Bytes now, and at the peak since the last call. On the CPU: of the process, its peak since it started."""
        if not self.device.startswith("cuda"):
            return process_memory()
        import torch

        if not torch.cuda.is_initialized():
            return 0, 0
        now, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return now, peak


class Stopwatch:
    """Seconds a stage took, divided by the size of the batch; waits for the GPU at the end of each stage."""

    def __init__(self, device: str, size: int) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._size = size

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block under this name."""
        started = time.monotonic()
        yield
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self._device)
        self.seconds[name] = (time.monotonic() - started) / self._size


def finish(picture: torch.Tensor, task: Task) -> Image | BadOutput:
    """A float tensor (3, height, width) in [0, 1] as a picture, or why it is none.

    Rounds as diffusers does for PIL output. NaN is looked for before the cast, which would make it black.
    """
    import torch
    from PIL import Image

    if not torch.isfinite(picture).all():
        return BadOutput("the picture contains NaN")
    channels, height, width = picture.shape
    if channels != 3 or (width, height) != (task.width, task.height):
        asked = f"{task.width}x{task.height} with 3 channels"
        return BadOutput(f"the picture is {width}x{height} with {channels} channels; the task asks for {asked}")
    levels = (picture.float().permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.cpu().contiguous().numpy())


def describe(device: str) -> str:
    """The device for the log: `cuda:0 is an NVIDIA H100, 1 device is visible`."""
    if not device.startswith("cuda"):
        return device
    import torch

    count = torch.cuda.device_count()
    return f"{device} is {torch.cuda.get_device_name(device)}, {count} device{' is' if count == 1 else 's are'} visible"


def process_memory() -> tuple[int, int]:
    """Bytes of memory that the process holds now, and held at its peak."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak, peak
    now = int(status.read_text("ascii").split()[1]) * resource.getpagesize()
    return now, max(now, peak)


def quiet() -> None:
    """No progress bars of the libraries on the worker's output."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
