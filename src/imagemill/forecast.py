"""What a run of a source would do: the dry run behind `imagemill plan`. It starts no worker and changes nothing on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from imagemill import batching, crew, devices, estimate, judges, models, sources, tuning_choice
from imagemill.config import Settings
from imagemill.devices import Choice
from imagemill.engine import Engine
from imagemill.estimate import Estimate, Group
from imagemill.folder_kinds import refuse_evaluation
from imagemill.intake import Admission, Intake
from imagemill.ledger import FILE_NAME, Ledger
from imagemill.publish import OutputFolder
from imagemill.records import PlannedTask
from imagemill.remarks import remarks
from imagemill.sitting import RunOptions
from imagemill.staging import Comparison, Shape


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA file that the run would use: `tasks` name it, `bytes` long, of this rank."""

    path: str
    digest: str
    bytes: int
    rank: int
    tasks: int


@dataclass(frozen=True, slots=True)
class Tuned:
    """How a diffusion model is made fast; `batches` are its most frequent sizes, each with the largest batch."""

    model: str
    choice: tuning_choice.Choice
    batches: tuple[tuple[tuple[int, int], int], ...]


@dataclass(frozen=True, slots=True)
class Forecast:
    """Everything `imagemill plan` says. `to_do` counts tasks; `groups` are those alike, the largest group first. `unit` is
    what a task gives: `picture`, `judgment`, or `task` where some give this and some that.

    `unreadable` are pictures to edit whose header does not read: the tasks that name them will fail. `remarks` say which
    options change nothing and which sizes a model was not trained at.
    """

    source: str
    folder: Path
    comparison: Comparison
    admission: Admission
    to_do: int
    damaged: int
    models: tuple[models.Model, ...]
    groups: tuple[Group, ...]
    adapters: tuple[Adapter, ...]
    unreadable: tuple[str, ...]
    choice: Choice
    estimate: Estimate
    schedule: str
    unit: str = "picture"
    tuned: tuple[Tuned, ...] = ()
    remarks: tuple[str, ...] = ()


def forecast(
    source: str, out: Path | None, settings: Settings, options: RunOptions, rows: Iterable[sources.Row] | None = None
) -> Forecast:
    """Read and check all that a run would: rows, LoRA headers, paths, models, devices, the folder's ledger.

    With `rows` these are the tasks, and `source` is only their name. Raises what the run would raise before it starts.
    """
    folder = out if out is not None else Engine(config=settings).default_folder(source)
    refuse_evaluation(folder)
    known = folder / FILE_NAME
    ledger = Ledger(known, read_only=True) if known.is_file() else Ledger(Path(":memory:"), folder=folder)
    try:
        book = crew.find_models(settings)
        intake = Intake(settings, book, ledger, OutputFolder(folder, exclusive=False, create=False), dry=True)
        if rows is None:
            rows = sources.open_source(source, prompt_column=options.prompt_column)
        admission = intake.stage(rows, limit=options.limit)
        comparison = intake.check(admission, skip_bad=options.skip_bad, rerun_changed=options.rerun_changed)
        damaged = frozenset(intake.damaged())
        to_do = comparison.to_do(options.retry) + len(damaged)
        used = book.used()
        choice = crew.choose(settings, used, max(1, to_do))
        shapes = tuple(ledger.staging.shapes())
        tuned = _tuned(settings, used, shapes, comparison.total)
        families = {f"model:{model.spec.name}": model.planned.family.name for model in used}
        figures = estimate.estimate(
            (planned.ticket for planned in _work(ledger, options, damaged)),
            workers=len(choice.devices),
            pace=estimate.pace(
                folder, families, choice.devices[0].name, {f"model:{one.model}": one.choice.tuning for one in tuned}
            ),
            policy=settings.schedule.name,
            lead=settings.schedule.k or 1,
            limits=crew.limits(settings, used, choice, to_do),
            most=len(devices.gpus()) if choice.devices[0].torch_device.startswith("cuda") else os.cpu_count(),
        )
        return Forecast(
            source=source,
            folder=folder,
            comparison=comparison,
            admission=admission,
            to_do=to_do,
            damaged=len(damaged),
            models=used,
            groups=estimate.groups(_work(ledger, options, damaged)),
            adapters=_adapters(intake, ledger),
            unreadable=_unreadable(intake, ledger),
            choice=choice,
            estimate=figures,
            schedule=str(settings.schedule),
            unit=judges.product((model.spec.name for model in used), "task"),
            tuned=tuned,
            remarks=remarks(settings, used, shapes, intake.slips),
        )
    finally:
        ledger.staging.abandon()
        ledger.close()


def _tuned(
    settings: Settings, used: tuple[models.Model, ...], shapes: tuple[Shape, ...], total: int
) -> tuple[Tuned, ...]:
    """The tuning of each diffusion model, and how many of its pictures run together; by the whole run, not by what is left."""
    whole = crew.choose(settings, used, max(1, total)).devices
    on_cuda, free = whole[0].torch_device.startswith("cuda"), min(device.free for device in whole)
    found = tuning_choice.choices(settings, used, shapes, len(whole), on_cuda, free, whole[0].name)
    rules = {model.spec.name: batching.rule(settings, model, on_cuda, free) for model in used}
    return tuple(
        Tuned(name, choice, tuple((size, rules[name].at(size)) for size in choice.tuning.sizes))
        for name, choice in found.items()
    )


def _work(ledger: Ledger, options: RunOptions, damaged: frozenset[str]) -> Iterator[PlannedTask]:
    """What the run would do: all that is not done or damaged, and the failures it was asked to try again."""
    for planned, state, kind in ledger.staging.tasks():
        again = planned.task.id in damaged or (state == "failed" and kind in options.retry)
        if again or state in ("new", "pending", "changed"):
            yield planned


def _adapters(intake: Intake, ledger: Ledger) -> tuple[Adapter, ...]:
    counts: dict[str, int] = {}
    for planned, _, _ in ledger.staging.tasks():
        for lora in planned.task.loras:
            counts[lora.path] = counts.get(lora.path, 0) + 1
    files = {path: intake.inputs.lora(path) for path in counts}
    return tuple(
        Adapter(path, files[path].digest, files[path].bytes, files[path].rank, counts[path]) for path in counts
    )


def _unreadable(intake: Intake, ledger: Ledger) -> tuple[str, ...]:
    paths = dict.fromkeys(path for planned, _, _ in ledger.staging.tasks() for path in planned.task.images)
    return tuple(path for path in paths if intake.inputs.image(path).size is None)
