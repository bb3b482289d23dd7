"""The engine: wires source, ledger, scheduler, workers and report together. The library's API.

with imagemill.Engine(model="z-image-turbo", gpus=4) as engine:
    for outcome in engine.run("prompts.jsonl", out="pictures"):
        print(outcome.task.id, outcome.path or outcome.message)
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from imagemill import config, devices, models, progress, sources
from imagemill.config import Settings
from imagemill.errors import ImagemillError, InputError, NoWorkersError
from imagemill.executors import Executor, inline, processes
from imagemill.intake import Admission, Intake, Models
from imagemill.ledger import FILE_NAME, Comparison, Ledger
from imagemill.policies import Worker
from imagemill.progress import Progress
from imagemill.publish import OutputFolder
from imagemill.records import Outcome, PlannedTask, SinkSpec, Task, WorkerSpec
from imagemill.run import Run
from imagemill.runners.fake import LABEL_VARIABLE
from imagemill.schedule import Limits, Scheduler
from imagemill.version import __version__

DEFAULT_MODEL = "tiny"
CHUNK = 256
"""Tasks of an iterator that are taken in together."""

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "pillow")
log = logging.getLogger("imagemill.driver")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How one run treats its source and what it finds in the folder.

    `retry` are kinds of failures to try again. `overwrite` lets new tasks replace foreign files. `ledger` is where the
    ledger lies if not in the output folder; the run then takes no lock and writes no report.
    """

    limit: int | None = None
    skip_bad: bool = False
    retry: tuple[str, ...] = ()
    rerun_changed: bool = False
    overwrite: bool = False
    ledger: Path | None = None
    prompt_column: str | None = None


@dataclass(frozen=True, slots=True)
class RunReport:
    """What became of a run. `resumed` of the `done` were made by earlier runs; `pending` were not reached."""

    folder: Path
    done: int
    failed: int
    pending: int
    resumed: int
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    status: str
    message: str = ""
    exit_code: int = 0
    left_out: tuple[str, ...] = ()


@dataclass(slots=True)
class Crew:
    """The workers that an engine keeps between runs."""

    executor: Executor
    specs: dict[int, WorkerSpec]
    left_out: tuple[str, ...]
    workers: dict[int, Worker] = field(default_factory=dict)


class Engine:
    """Runs tasks on every device it was given and keeps the workers, with their models, between runs.

    Use it as a context manager: leaving the block ends every process and frees all device memory. Settings are those of
    the YAML file; `settings` are its dotted keys with `_` for `.`, or the short names of `imagemill.run`.
    Raises `InputError` (or one below it) for mistakes, before anything starts.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        gpus: int | str | None = None,
        gpu_ids: Sequence[int] | None = None,
        workers: int | None = None,
        device: str | None = None,
        isolate: bool | None = None,
        schedule: str | None = None,
        config: str | os.PathLike[str] | Settings | None = None,
        show: Progress | None = None,
        **settings: Any,
    ) -> None:
        given = {"model": model, "gpus": gpus, "gpu_ids": gpu_ids, "workers": workers, "device": device}
        self.settings = make_settings(config, {**given, "isolate": isolate, "schedule": schedule, **settings})
        self.report: RunReport | None = None
        self._progress = show or progress.Silent()
        self._crew: Crew | None = None
        self._run: Run | None = None
        self._closed = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker process and free all device memory. The engine cannot be used afterwards."""
        self._closed = True
        if self._crew is not None:
            self._crew.executor.close()
            self._crew = None

    def drain(self) -> bool:
        """Let the current run end what is in flight and stop; False if none is under way.

        Safe from other threads and from signal handlers, as `cancel` is.
        """
        run = self._run
        if run is not None:
            run.drain()
        return run is not None

    def cancel(self) -> bool:
        """Stop the current run at once; False if none is under way."""
        run = self._run
        if run is not None:
            run.cancel()
        return run is not None

    def run(
        self,
        source: str | os.PathLike[str] | Iterable[Task | Mapping[str, Any] | str],
        out: str | os.PathLike[str] | None = None,
        options: RunOptions | None = None,
    ) -> Iterator[Outcome]:
        """Run a task file, or tasks, and hand back each outcome in task order as soon as it and all before it ended.

        The same call with the same folder does what is left. A list or file is checked whole before anything starts; an
        iterator is read as it is needed. Afterwards `report` says how the run went.
        Raises `InputError`, `ChangedTasksError`, `FolderInUseError` before the start; `OutputError` and
        `NoWorkersError` when the run cannot go on.
        """
        if self._closed:
            raise InputError("this engine is closed; make a new one")
        if self._run is not None:
            raise InputError("this engine runs already; end that run, or make a second engine")
        options = options or RunOptions()
        folder = Path(out) if out is not None else self.default_folder(source)
        lazy = not isinstance(source, (str, os.PathLike, Sequence))
        return self._outcomes(self._rows(source, options), folder, options, lazy=lazy)

    def default_folder(self, source: object) -> Path:
        """Where pictures go when nobody said: the configured folder, else `outputs/` and the source's name."""
        if "folder" in self.settings.output.model_fields_set:
            return Path(self.settings.output.folder)
        stem = Path(source).stem if isinstance(source, (str, os.PathLike)) and str(source) != "-" else ""
        return Path("outputs") / stem

    def _rows(self, source: Any, options: RunOptions) -> Iterator[sources.Row]:
        if isinstance(source, (str, os.PathLike)):
            return sources.open_source(source, prompt_column=options.prompt_column)
        return sources.from_iterable(source)

    # --- one run ----------------------------------------------------------------------------------------------------

    def _outcomes(
        self, rows: Iterator[sources.Row], path: Path, options: RunOptions, *, lazy: bool
    ) -> Iterator[Outcome]:
        with ExitStack() as stack:
            folder = OutputFolder(path, exclusive=options.ledger is None)
            stack.callback(folder.close)
            ledger = Ledger(options.ledger or path / FILE_NAME, folder=path.resolve())
            stack.callback(ledger.close)
            stack.callback(ledger.abandon)
            book = find_models(self.settings)
            intake = Intake(self.settings, book, ledger, folder, overwrite=options.overwrite)
            started = time.time()
            if lazy:
                admission = Admission()
                book.get(None)
                ledger.begin_run(started, self._settings_record(), machine())
                feed = _read_as_needed(rows, intake, admission, ledger, options)
                to_do = None
            else:
                admission = intake.stage(rows, limit=options.limit)
                intake.check(admission, skip_bad=options.skip_bad, rerun_changed=options.rerun_changed)
                ledger.begin_run(started, self._settings_record(), machine())
                intake.accept(admission, retry=options.retry)
                feed, to_do = ledger.work(), ledger.counts().get("pending", 0)
            stack.enter_context(LogFiles(self._log_folder(path), self.settings.logging.level))
            log.info("run %d in %s: %s tasks to do", ledger.run, path, "an unknown number of" if lazy else to_do)
            yield from self._work(feed, book, ledger, folder, admission, options, to_do)

    def _work(
        self,
        feed: Iterator[tuple[PlannedTask, Outcome | None]],
        book: Models,
        ledger: Ledger,
        folder: OutputFolder,
        admission: Admission,
        options: RunOptions,
        to_do: int | None,
    ) -> Iterator[Outcome]:
        """Run what is to do, then close the books: the ledger's run, the report of this call."""
        begun = time.monotonic()
        status, message, run = "died", "", None
        try:
            if to_do != 0:
                run = self._run = self._start(feed, book, ledger, folder, to_do)
                yield from run.outcomes()
                if run.error:
                    raise run.error
                status, message = (run.halt.reason, run.halt.message) if run.halt else ("cancelled", "")
            else:
                status = "done"
                yield from self._settled(feed, ledger)
        except ImagemillError as error:
            status, message = type(error).__name__, str(error)
            raise
        except (GeneratorExit, KeyboardInterrupt):
            status = "cancelled"
            raise
        finally:
            if run is not None and self._crew is not None:
                self._crew.workers = run.scheduler.board.workers
            self._run = None
            self._progress.end()
            ledger.end_run(time.time(), status, self._stats(run))
            self.report = self._report(ledger, folder, admission, status, message, time.monotonic() - begun)
        if status == "no_workers":
            raise NoWorkersError(f"no worker is left: {message}; what is done is kept, the same command goes on")
        if status == "bad_model":
            raise InputError(f"the model does not load: {message}")

    def _settled(self, feed: Iterator[tuple[PlannedTask, Outcome | None]], ledger: Ledger) -> Iterator[Outcome]:
        """Nothing is to do: no worker starts."""
        self._progress.begin(sum(ledger.counts().values()), {})
        for _, outcome in feed:
            if outcome is not None:
                self._progress.settled(outcome)
                yield outcome

    def _start(
        self,
        feed: Iterator[tuple[PlannedTask, Outcome | None]],
        book: Models,
        ledger: Ledger,
        folder: OutputFolder,
        to_do: int | None,
    ) -> Run:
        used = book.used()
        if self._crew is None:
            self._crew = self._hire(used, folder.path, to_do)
        crew, settings = self._crew, self.settings
        total = sum(ledger.counts().values()) if to_do is not None else None
        labels = {number: spec.label for number, spec in crew.specs.items()}
        limits = Limits(
            **settings.limits.model_dump(),
            batch={f"model:{model.spec.name}": min(settings.batch_size, family_batch(model)) for model in used},
        )
        output = settings.output
        self._progress.begin(total, labels)
        workers = {str(number): {"label": label} for number, label in labels.items()}
        ledger.note_stats({"policy": str(settings.schedule), "workers": workers})
        return Run(
            feed=feed,
            scheduler=Scheduler(labels, settings.schedule.name, settings.schedule.k, limits, crew.workers),
            executor=crew.executor,
            specs=crew.specs,
            models={model.spec.name: model.spec for model in used},
            sink=SinkSpec(output.sink, str(folder.path.resolve()), output.format, output.metadata),
            ledger=ledger,
            folder=folder,
            progress=self._progress,
            started=time.time(),
        )

    def _hire(self, used: Sequence[models.Model], path: Path, to_do: int | None) -> Crew:
        """Choose devices that hold the model and make the executor; the scheduler starts the workers."""
        asked, settings = self.settings.devices, self.settings
        choice = devices.choose(
            device=asked.device,
            gpus=asked.gpus,
            gpu_ids=asked.gpu_ids or None,
            workers=asked.workers,
            need=max(model.spec.memory for model in used),
            tasks=to_do,
        )
        for line in (*(f"left out: {line}" for line in choice.left_out), *choice.warnings):
            log.warning(line)
            self._progress.note(line)
        alone = len(choice.devices) == 1 and not asked.isolate
        if alone and choice.devices[0].inline_device.startswith("cuda"):
            # The device's number counts as nvidia-smi does only so, and only before CUDA starts.
            os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        folder = self._log_folder(path)
        specs = {
            number: WorkerSpec(
                worker=number,
                device=device.inline_device if alone else device.torch_device,
                label=device.label,
                model=used[0].spec,
                environment={**device.environment, LABEL_VARIABLE: device.label},
                log="" if alone else str(folder / f"worker-{number}.log"),
                log_level=settings.logging.level,
            )
            for number, device in enumerate(choice.devices)
        }
        executor: Executor = inline.create() if alone else processes.create()
        return Crew(executor, specs, choice.left_out)

    # --- the books --------------------------------------------------------------------------------------------------

    def _report(
        self, ledger: Ledger, folder: OutputFolder, admission: Admission, status: str, message: str, seconds: float
    ) -> RunReport:
        counts = ledger.counts()
        done, failed, pending = (counts.get(state, 0) for state in ("done", "failed", "pending"))
        return RunReport(
            folder=folder.path,
            done=done,
            failed=failed,
            pending=pending,
            resumed=ledger.resumed(),
            skipped=tuple(admission.skipped),
            seconds=seconds,
            status=status,
            message=message,
            exit_code=0 if status == "done" and not failed and not pending else 1,
            left_out=self._crew.left_out if self._crew else (),
        )

    def _stats(self, run: Run | None) -> dict[str, Any]:
        policy = str(self.settings.schedule)
        return {"policy": policy, **(run.stats() if run is not None else {})}

    def _settings_record(self) -> dict[str, Any]:
        return {"imagemill": __version__, **self.settings.model_dump(mode="json")}

    def _log_folder(self, path: Path) -> Path:
        given = self.settings.logging.folder
        return Path(given) if given else path / "logs"


def find_models(settings: Settings) -> Models:
    """The models of a run. Their precision is part of their revision: bfloat16 on GPUs, float32 on the CPU."""
    asked = settings.devices
    dtype = "bfloat16" if devices.kind(asked.device, asked.gpus, asked.gpu_ids) == "cuda" else "float32"
    return Models(partial(models.resolve, dtype=dtype), settings.model or DEFAULT_MODEL)


def family_batch(model: models.Model) -> int:
    """How many tasks the model's family can run at once."""
    return int(getattr(model.planned.family, "max_batch", 1))


def _read_as_needed(
    rows: Iterator[sources.Row], intake: Intake, total: Admission, ledger: Ledger, options: RunOptions
) -> Iterator[tuple[PlannedTask, Outcome | None]]:
    """Take an iterator in by chunks; each chunk is checked before its first task starts."""
    rows = islice(rows, options.limit)
    while chunk := list(islice(rows, CHUNK)):
        admission = intake.stage(chunk, first=total.tasks)
        intake.check(admission, skip_bad=options.skip_bad, rerun_changed=options.rerun_changed)
        intake.accept(admission, retry=options.retry)
        first = total.tasks
        total.tasks += admission.tasks
        total.skipped += admission.skipped
        yield from ledger.work(first)


SHORT_NAMES = {
    "gpus": "devices.gpus",
    "gpu_ids": "devices.gpu_ids",
    "workers": "devices.workers",
    "device": "devices.device",
    "isolate": "devices.isolate",
    "guidance_scale": "guidance",
    "format": "output.format",
    "sink": "output.sink",
    "metadata": "output.metadata",
    "load_timeout": "limits.load_timeout",
    "task_timeout": "limits.task_timeout",
    "parallel_loads": "limits.parallel_loads",
    "max_attempts": "limits.max_attempts",
    "read_ahead": "limits.read_ahead",
    "log_level": "logging.level",
    "log_folder": "logging.folder",
}
"""Python's keyword arguments and the keys of the YAML file they stand for; other keys are the same in both."""


def make_settings(given: str | os.PathLike[str] | Settings | None, overrides: Mapping[str, Any]) -> Settings:
    """Settings from a file or an object, with keyword arguments above them. Raises `ConfigError`."""
    base = given if isinstance(given, Settings) else config.load_settings(given) if given is not None else Settings()
    keys = {SHORT_NAMES.get(name, name): value for name, value in overrides.items()}
    return config.merge(base, keys, {key: name for name, key in SHORT_NAMES.items()})


def machine() -> dict[str, Any]:
    """What the ledger says of the machine: system, processors, Python and the libraries that make pictures."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "python": sys.version.split()[0],
        "imagemill": __version__,
        **versions,
    }


class LogFiles:
    """Driver and inline worker write to their own files while the block lasts; nothing is printed."""

    def __init__(self, folder: Path, level: str) -> None:
        self.folder = folder
        self.level = level.upper()
        self._handlers: list[tuple[logging.Logger, logging.Handler]] = []

    def __enter__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, file in (("imagemill.driver", "driver.log"), ("imagemill.worker", "worker-0.log")):
            logger = logging.getLogger(name)
            handler = logging.FileHandler(self.folder / file, encoding="utf-8", delay=True)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logger.addHandler(handler)
            logger.setLevel(self.level)
            logger.propagate = False
            self._handlers.append((logger, handler))

    def __exit__(self, *_: object) -> None:
        for logger, handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
            logger.propagate = True


def run(
    source: str | os.PathLike[str] | Iterable[Task | Mapping[str, Any] | str],
    out: str | os.PathLike[str] | None = None,
    *,
    options: RunOptions | None = None,
    **settings: Any,
) -> RunReport:
    """Run a source to its end and write the report; the call behind `imagemill run`.

    `settings` are those of `Engine`. Returns what became of the tasks; failures of tasks are counted, not raised.
    """
    from imagemill.report import write_reports

    with Engine(**settings) as engine:
        folder = Path(out) if out is not None else engine.default_folder(source)
        for _ in engine.run(source, folder, options):
            pass
        report = engine.report
    write_reports(folder)
    if report is None:
        raise RuntimeError("the run ended without a report")
    return report
