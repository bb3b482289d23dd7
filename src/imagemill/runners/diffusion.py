"""The runner that hosts a diffusers pipeline: load, then encode, denoise and decode each batch."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadModel, BadOutput, BadTask, OutOfMemory, TaskError, classify
from imagemill.families import Family
from imagemill.plan import adapters_need
from imagemill.records import Lora, ModelSpec, PlannedTask, Span, Task, WorkOrder
from imagemill.runners import Beat, Result, importing
from imagemill.runners.adapters import Adapters, choose
from imagemill.runners.early import Early
from imagemill.runners.ladder import Ladder, release
from imagemill.runners.merged import Merged
from imagemill.runners.references import Member, by_shapes
from imagemill.runners.streams import HostLane, Lane, Stages, lane

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
        self.adapters: Adapters | Merged = Adapters()
        self._ladder: Ladder | None = None
        self._flying: Landing | None = None
        self._spec: ModelSpec | None = None
        self._pipe: Any = None
        self._family: Family | None = None
        self._lane: Lane = HostLane()
        self._early: Early | None = None
        self._adapts_text = False
        self._need = adapters_need(())
        self._shape = ""
        self._imported: tuple[Span, ...] = ()
        self._spans: tuple[Span, ...] = ()
        self._notes: list[str] = []

    def prepare(self, spec: ModelSpec) -> None:
        """Import torch, diffusers and the classes of the model's components."""
        self._imported = importing.import_for(spec, self.device)

    def load(self, spec: ModelSpec, beat: Beat) -> None:
        """Load the model; beats with the stage `load` and seq -1. Raises `BadModel` when the folder can never load."""
        import torch

        from imagemill.runners import loading, tuning

        self.unload()
        quiet()
        torch.set_num_threads(self.threads)
        started = time.monotonic()
        try:
            loaded = loading.load(spec, self.device, beat)
            self._pipe, self._family = loaded.pipe, loaded.family
            spans = [*self._imported, *loaded.spans]
            self._lane = lane(self.device)
            self._ladder = Ladder(loaded.pipe, self.device, staged=is_staged(loaded.family))
            self._adapts_text = adapts_text(loaded.pipe)
            pays = is_staged(loaded.family) and not self._adapts_text
            self._early = Early(loaded.pipe, loaded.family, spec, self._lane, self._tell, pays=pays)
            self.adapters = choose(self.device, loaded.pipe)
            if spec.tuning.precision == "fp8" and spec.tuning.adapters:
                self.adapters.hold(loaded.pipe)
            self._notes += tuning.tune(loaded.pipe, loaded.family, spec.tuning, self.device, beat, spans=spans)
            self._spans = tuple(spans)
        except BaseException:
            self.unload()
            raise
        self._spec = spec
        log.info("loaded %s in %.1f s; %s", spec.name, time.monotonic() - started, describe(self.device))

    def run(self, order: WorkOrder, beat: Beat) -> Iterator[Result]:
        """One result a task. All tasks share model, adapters and group; those whose pictures differ in shape run apart.

        A refusal that meets a batch of several is tried again one task at a time, so that only the culprit fails.
        Raises `ValueError` when the tasks do not belong together or the order is for another model: the sender's defect.
        """
        if self._spec is None or self._family is None or self._early is None:
            raise BadModel(f"no model is loaded on {self.device}")
        if order.model.name != self._spec.name:
            raise ValueError(f"the order is for model {order.model.name!r}; loaded is {self._spec.name!r}")
        first = order.tasks[0].task
        for task in (planned.task for planned in order.tasks):
            same_adapters = adapters_need(task.loras) == adapters_need(first.loras)
            if not same_adapters or self._family.group(task) != self._family.group(first):
                raise ValueError(f"tasks {first.id!r} and {task.id!r} cannot share a batch")
        members: list[Member] = []
        for found in self._early.begin(order):
            if isinstance(found, Result):
                yield found
            else:
                members.append(found)
        batches = by_shapes(members, self._family)
        if batches:
            self._early.until(batches[-1][-1])
        for alike in batches:
            yield from self._run(self._family, alike, beat)

    def _run(self, family: Family, members: Sequence[Member], beat: Beat) -> Iterator[Result]:
        try:
            results = self._fitting(family, members, beat)
        except (BadTask, BadOutput) as error:
            if len(members) == 1:
                results = [Result(members[0].planned.ticket.seq, error=error)]
            else:
                for member in members:
                    yield from self._run(family, [member], beat)
                return
        yield from results

    def _fitting(self, family: Family, members: Sequence[Member], beat: Beat) -> list[Result]:
        """As `_batch`; out of memory, it waits for what is under way, and a batch of one then gives way step by step."""
        size = (members[0].planned.task.width or 0, members[0].planned.task.height or 0)
        assert self._ladder is not None and self._early is not None, "a model is loaded"
        while True:
            try:
                return self._batch(family, members, self._ladder, self._early, beat)
            except Exception as error:
                if not isinstance(classify(error), OutOfMemory):
                    raise
                if self._land_last() or self._early.give_up():
                    release(error, self.device)
                    continue
                note = self._ladder.step_down(error, size) if len(members) == 1 else None
                if note is None:
                    raise
                self._tell(note)

    def _tell(self, note: str) -> None:
        log.warning(note)
        self._notes.append(note)

    def _land_last(self) -> bool:
        """Wait for the pictures that are still on their way, which hold memory; False when there were none."""
        flying, self._flying = self._flying, None
        return flying is not None and flying.land()

    def _batch(
        self, family: Family, members: Sequence[Member], ladder: Ladder, early: Early, beat: Beat
    ) -> list[Result]:
        """Launch all stages of a batch; its pictures are on their way when this returns."""
        import torch

        tasks = [member.planned.task for member in members]
        seq, count, steps = members[0].planned.ticket.seq, len(members), tasks[0].steps or 0
        lane, stages, size = self._lane, Stages(), (tasks[0].width or 0, tasks[0].height or 0)

        def on_step(step: int, steps: int) -> None:
            early.left(steps - step, members)
            beat("denoise", seq, step, steps)
            early.advance()

        if self._adapts_text:
            with ladder.denoising(size):
                self._apply(tasks[0].loras, stages)
        with torch.inference_mode():
            beat("encode", seq, 0, steps)
            if encoded := early.claim(members):
                conditioning, stages = encoded
            else:
                with ladder.encoding(size), lane.ahead(), lane.stage(stages, "encode"):
                    conditioning = family.encode(self._pipe, tasks, [member.pictures for member in members])
        if not self._adapts_text:
            # Text first: a change of adapters is so many launches that the device would run dry before the text's.
            with ladder.denoising(size):
                self._apply(tasks[0].loras, stages)
        self._shape = f"shape:{size[0]}x{size[1]}"
        with torch.inference_mode():
            with ladder.denoising(size), lane.stage(stages, "denoise"):
                latents = family.denoise(self._pipe, tasks, conditioning, on_step)
            beat("decode", seq, steps, steps)
            with ladder.decoding(size), lane.stage(stages, "decode"):
                pictures = family.decode(self._pipe, tasks, latents)
                if len(pictures) != count:
                    raise BadOutput(f"{len(pictures)} pictures came out for {count} tasks")
                levels, finite = lane.leave(to_levels(pictures)), lane.leave(all_finite(pictures))
        # What the side stream made must not be freed before the main stream has used it.
        held = (conditioning, latents, pictures)
        landing = self._flying = Landing(lane, stages, count, seq, levels, finite, ladder.marks(size), held)
        return [
            Result(member.planned.ticket.seq, arrive=partial(landing.result, place, member.planned))
            for place, member in enumerate(members)
        ]

    def expect(self, loras: Sequence[Lora]) -> None:
        """Read adapters that may be needed next, on a thread."""
        self.adapters.prefetch(loras)

    @property
    def wants_next(self) -> bool:
        """In the last steps, where the next order's encoding can be launched between them."""
        return self._early is not None and self._early.wanted

    def follow(self, order: WorkOrder) -> None:
        """Begin with the text of the next order and the pictures that it edits."""
        if self._early is not None and self._spec is not None and order.model.name == self._spec.name:
            self._early.follow(order)

    def _apply(self, loras: Sequence[Lora], stages: Stages) -> None:
        import torch

        self._need = adapters_need(())
        with torch.no_grad(), self._lane.stage(stages, "adapters"):
            changed = self.adapters.apply(self._pipe, loras)
        if not changed:
            stages.marks.pop()
        self._need = adapters_need(loras)

    def unload(self) -> None:
        """Drop the pipeline and its adapters, and give the device's cached memory back."""
        import torch

        self._land_last()
        self.adapters.close()
        if self._early is not None:
            self._early.close()
        self._spec = self._pipe = self._family = self._ladder = self._early = None
        self.adapters = Adapters()
        self._lane = HostLane()
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

    def spans(self) -> tuple[Span, ...]:
        """The parts of importing, loading and warming up."""
        return self._spans

    def notes(self) -> tuple[str, ...]:
        """What was chosen for this device, and what running out of memory changed."""
        notes, self._notes = tuple(self._notes), []
        return notes


class Landing:
    """The pictures of a batch between the device and the savers, who ask for them on threads of their own.

    `levels` (batch, height, width, 3) and `finite` (batch) lie in host memory once the batch has landed; `held` is what
    must live until then.
    """

    def __init__(
        self,
        lane: Lane,
        stages: Stages,
        count: int,
        seq: int,
        levels: torch.Tensor,
        finite: torch.Tensor,
        marks: tuple[str, ...],
        held: Any,
    ) -> None:
        self._lane = lane
        self._token = lane.depart()
        self._stages = stages
        self._count = count
        self._seq = seq
        self._levels = levels
        self._finite = finite
        self._marks = marks
        self._held = held
        self._lock = threading.Lock()
        self._untold: tuple[Span, ...] = ()
        self._seconds: dict[str, float] = {}

    def land(self) -> bool:
        """Wait until the batch is there, and let go of what it held; False when that was done before."""
        with self._lock:
            if self._held is None:
                return False
            self._lane.arrived(self._token)
            self._held = None
            times = self._lane.times(self._stages, self._token)
            self._untold = tuple(Span(name, start, seconds, seq=self._seq) for name, start, seconds in times)
            for span in self._untold:  # a stage may have been done in pieces
                self._seconds[span.stage] = self._seconds.get(span.stage, 0.0) + span.seconds / self._count
            return True

    def result(self, place: int, planned: PlannedTask) -> Result:
        """The result of one member; waits until it is there. The first that is asked for tells the stages."""
        self.land()
        with self._lock:
            spans, self._untold = self._untold, ()
        seq, made = planned.ticket.seq, finish(self._levels[place], bool(self._finite[place]), planned.task)
        shared = Result(seq, seconds=self._seconds, batch_size=self._count, spans=spans, marks=self._marks)
        return replace(shared, error=made) if isinstance(made, TaskError) else replace(shared, image=made)


def is_staged(family: Family) -> bool:
    """Whether the family's stages are really apart: the pipelines of some make a picture in one call."""
    from imagemill.families.generic import TextToImage

    return getattr(type(family), "denoise", None) is not TextToImage.denoise


def adapts_text(pipe: Any) -> bool:
    """Whether an adapter can change what the pipeline's text encoders make of a prompt; one that does not say may."""
    return any(name.startswith("text_encoder") for name in getattr(pipe, "_lora_loadable_modules", ("text_encoder",)))


def to_levels(pictures: torch.Tensor) -> torch.Tensor:
    """Float pictures (batch, channels, height, width) in [0, 1] as bytes (batch, height, width, channels).

    Rounds as diffusers does for PIL output.
    """
    import torch

    return (pictures.float().permute(0, 2, 3, 1) * 255).round().clamp(0, 255).to(torch.uint8).contiguous()


def all_finite(pictures: torch.Tensor) -> torch.Tensor:
    """For each picture whether it has no NaN and no infinity: the cast to bytes would make them black."""
    import torch

    finite: torch.Tensor = torch.isfinite(pictures).flatten(1).all(1)
    return finite


def finish(levels: torch.Tensor, finite: bool, task: Task) -> Image | BadOutput:
    """Bytes (height, width, 3) in host memory as a picture, or why it is none."""
    from PIL import Image

    if not finite:
        return BadOutput("the picture contains NaN")
    height, width, channels = levels.shape
    if channels != 3 or (width, height) != (task.width, task.height):
        asked = f"{task.width}x{task.height} with 3 channels"
        return BadOutput(f"the picture is {width}x{height} with {channels} channels; the task asks for {asked}")
    return Image.fromarray(levels.numpy())


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
