"""The workers that an engine keeps between runs: which devices, which executor, what the scheduler knows of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from imagemill import batching, devices, host_memory, judges, models, tuning_choice
from imagemill.config import Settings
from imagemill.devices import Choice, Device
from imagemill.executors import Executor, inline, processes
from imagemill.intake import Models
from imagemill.records import LABEL_VARIABLE, ModelSpec, WorkerSpec
from imagemill.runners import compile_cache
from imagemill.runners.adapter_cost import NEIGHBOURS_VARIABLE
from imagemill.schedule import Limits
from imagemill.spread import spread
from imagemill.staging import Shape
from imagemill.worker_state import Worker

DEFAULT_MODEL = "tiny"


@dataclass(slots=True)
class Crew:
    """The executor with its workers' specs; `workers` is their state at the end of the last run.

    `early` says that the processes were started before the tasks were known, and have loaded nothing yet.
    """

    executor: Executor
    specs: dict[int, WorkerSpec]
    choice: Choice
    workers: dict[int, Worker] = field(default_factory=dict)
    early: bool = False
    tuned: dict[str, tuning_choice.Choice] = field(default_factory=dict)

    @property
    def labels(self) -> dict[int, str]:
        """The names of the devices by worker."""
        return {number: spec.label for number, spec in self.specs.items()}

    def start_early(self) -> None:
        """Start the processes, which import what their model needs; they load once the scheduler says so."""
        self.executor.start(list(self.specs.values()))
        self.workers = {number: Worker(number, spec.label, "waiting") for number, spec in self.specs.items()}
        self.early = True

    def settle(self, first: ModelSpec, tuned: dict[str, tuning_choice.Choice]) -> None:
        """The tasks are known: this is the model that every worker loads first."""
        self.specs = {number: replace(spec, model=first) for number, spec in self.specs.items()}
        self.tuned, self.early = tuned, False


def find_models(settings: Settings) -> Models:
    """The models of a run. Their precision is part of their revision: bfloat16 on GPUs, float32 on the CPU, unless asked."""
    asked = settings.devices
    cuda = devices.kind(asked.device, asked.gpus, asked.gpu_ids) == "cuda"
    tuning_choice.check(settings, cuda)
    dtype = ("bfloat16" if cuda else "float32") if settings.dtype == "auto" else settings.dtype
    find = partial(
        models.resolve,
        dtype=dtype,
        precision=settings.precision,
        attention=settings.attention,
        judge=settings.judge,
    )
    return Models(find, settings.model or DEFAULT_MODEL)


def check(settings: Settings) -> None:
    """Raises `InputError` for what no task can mend: GPUs where there are none, a model's name that means none."""
    find_models(settings)
    models.check_name(settings.model or DEFAULT_MODEL)


def choose(settings: Settings, used: Sequence[models.Model], tasks: int | None) -> Choice:
    """The devices that the settings ask for and that hold every model; the CPU for judges without a model of their own.

    Raises `InputError`.
    """
    asked, specs = settings.devices, [model.spec for model in used]
    if judges.on_cpu(specs):
        return devices.choose(device="cpu", workers=1 if judges.asks_endpoint(specs) else asked.workers, tasks=tasks)
    need = max(spec.memory for spec in specs)
    return _together(settings, specs, need, tasks) or devices.choose(
        device=asked.device,
        gpus=asked.gpus,
        gpu_ids=asked.gpu_ids or None,
        workers=asked.workers,
        need=need,
        tasks=tasks,
    )


def _together(settings: Settings, specs: Sequence[ModelSpec], need: int, tasks: int | None) -> Choice | None:
    """Several GPUs a worker for a judge that none of those asked for can take alone; None where that is not the case."""
    asked = settings.devices
    if not judges.spreads(specs) or devices.kind(asked.device, asked.gpus, asked.gpu_ids) == "cpu":
        return None
    found = devices.gpus()
    if max(asked.gpu_ids, default=-1) >= len(found):
        return None  # `devices.choose` says which is not there
    count = asked.gpus if isinstance(asked.gpus, int) else None
    return spread([found[place] for place in asked.gpu_ids] or found[:count], need, asked.workers, tasks)


def hire(choice: Choice, settings: Settings, first: ModelSpec, log_folder: Path, *, apart: bool = False) -> Crew:
    """Make the executor and the specs; the scheduler starts the workers. A single one works inside this process, unless it is
    to be `apart`."""
    alone = works_inside(choice, settings) and not apart
    if alone and choice.devices[0].inline_device.startswith("cuda"):
        # The device's number counts as nvidia-smi does only so, and only before CUDA starts.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    cache = compile_cache.environment() if first.tuning.compile else {}
    shared = {**cache, NEIGHBOURS_VARIABLE: str(len(choice.devices))}
    specs = {
        number: WorkerSpec(
            worker=number,
            device=device.inline_device if alone else device.torch_device,
            label=device.label,
            model=first,
            environment={**shared, **device.environment, LABEL_VARIABLE: device.label},
            log="" if alone else str(log_folder / f"worker-{number}.log"),
            log_level=settings.logging.level,
            ahead=device.torch_device.startswith("cuda"),
        )
        for number, device in enumerate(choice.devices)
    }
    return Crew(inline.create() if alone else processes.create(), specs, choice)


def works_inside(choice: Choice, settings: Settings) -> bool:
    """Whether the worker can work inside this process: it is the only one, and no process of its own is asked for."""
    return len(choice.devices) == 1 and bool(choice.devices[0].inline_device) and not settings.devices.isolate


def tune(
    settings: Settings, book: Models, shapes: Iterable[Shape] | None, total: int | None, kept: bool = False
) -> dict[str, tuning_choice.Choice]:
    """Choose how the models are made fast, by the whole run of `total` tasks, and tell the book; `kept` as for `choices`."""
    whole = choose(settings, book.used(), None if total is None else max(1, total)).devices
    cuda, free = on_cuda(whole), min(device.free for device in whole)
    found = tuning_choice.choices(settings, book.used(), shapes, len(whole), cuda, free, whole[0].name, kept)
    book.tune({name: one.tuning for name, one in found.items()})
    return found


def on_cuda(found: Sequence[Device]) -> bool:
    """Whether these are GPUs."""
    return found[0].torch_device.startswith("cuda")


def limits(settings: Settings, used: Sequence[models.Model], choice: Choice, tasks: int | None = None) -> Limits:
    """The scheduler's bounds; no batch is larger than the family of its model takes. On the CPU, where each worker holds the
    weights in main memory and needs all cores to load them, `auto` is one load at a time. `tasks` are all that wait."""
    free = min(device.free for device in choice.devices)
    most = batching.limit(settings, used, on_cuda(choice.devices), free, share(len(choice.devices), tasks))
    wanted, largest = settings.limits.parallel_loads, max((model.spec.memory for model in used), default=0)
    at_once = wanted if wanted != "auto" else None if on_cuda(choice.devices) else 1
    loads = host_memory.parallel_loads(at_once, host_memory.free(), largest, len(choice.devices))
    return Limits(**settings.limits.model_dump(exclude={"parallel_loads"}), parallel_loads=loads, batch=most)


def share(workers: int, tasks: int | None) -> int:
    """How many of the tasks a worker may be handed at once without taking them from the others: it may have two batches,
    one at work and one ahead."""
    if tasks is None:
        return judges.MAX_BATCH if workers > 1 else judges.MAX_GPU_BATCH
    return max(1, -(-tasks // (workers if workers == 1 else 2 * workers)))
