"""The engine: wires source, ledger, scheduler, workers and report together. The library's API.

with imagemill.Engine(model="z-image-turbo", gpus=4) as engine:
    for outcome in engine.run("prompts.jsonl", out="pictures"):
        print(outcome.task.id, outcome.path or outcome.message)
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import GEN_CLOSED, GEN_SUSPENDED, getgeneratorstate
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from imagemill import crew, downloads, progress, sources, trained_sizes, tuning_choice, untaken
from imagemill.config import Settings, settings_from
from imagemill.crashpoints import crash_point
from imagemill.crew import Crew
from imagemill.devices import Choice
from imagemill.errors import ImagemillError, InputError, NoWorkersError, OutputError
from imagemill.intake import Admission, Intake, Models
from imagemill.ledger import FILE_NAME, Ledger
from imagemill.logfiles import DRIVER, LogFiles
from imagemill.loop import Run
from imagemill.progress import Progress
from imagemill.publish import OutputFolder
from imagemill.records import Outcome, PlannedTask, SinkSpec, Task
from imagemill.schedule import Scheduler
from imagemill.staging import Shape
from imagemill.trace import FILE_NAME as FILE
from imagemill.trace import TraceFile
from imagemill.version import __version__, machine

CHUNK = 256
"""Tasks of an iterator that are taken in together, at most."""

KEPT = ".imagemill-sources"
"""Where, inside the output folder, pictures to edit lie that were handed over in memory."""

Feed = Iterator[tuple[PlannedTask, Outcome | None]]
"""The work of a run in order; a task that an earlier run settled comes with its outcome."""

log = logging.getLogger(DRIVER)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How one run treats its source and what it finds in the folder.

    `retry` are kinds of failures to try again. `overwrite` lets new tasks replace foreign files. `ledger` is where the
    ledger lies if not in the output folder; the run then takes no lock and writes no report. `again` are ids of settled
    tasks to do once more; others among them are no mistake.
    """

    limit: int | None = None
    skip_bad: bool = False
    retry: tuple[str, ...] = ()
    rerun_changed: bool = False
    overwrite: bool = False
    ledger: Path | None = None
    prompt_column: str | None = None
    again: tuple[str, ...] = ()


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


class Engine:
    """Runs tasks on every device it was given and keeps the workers, with their models, between runs.

    With `keep=False`, for a single run, no more devices are taken than that run has tasks. Use the engine from one
    thread that outlives it: the kernel ends worker processes with the thread that started them.

    Use it as a context manager: leaving the block ends every process and frees all device memory. Settings are those of
    the YAML file; `settings` are its dotted keys, or the short names of `imagemill.run`.
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
        keep: bool = True,
        **settings: Any,
    ) -> None:
        given = {"model": model, "gpus": gpus, "gpu_ids": gpu_ids, "workers": workers, "device": device}
        self.settings = settings_from(config, {**given, "isolate": isolate, "schedule": schedule, **settings})
        self.report: RunReport | None = None
        self._progress = show or progress.Silent()
        self._keep = keep
        self._crew: Crew | None = None
        self._run: Run | None = None
        # Weak: a loop that is left early drops its iterator, and that ends the run.
        self._stream: Callable[[], Generator[Outcome] | None] = lambda: None
        self._closed = False
        self._wall = 0.0

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker process and free all device memory; a run that is still open is stopped at once.

        The engine cannot be used afterwards.
        """
        self._closed = True
        try:
            stream = self._stream()
            if stream is not None:
                stream.close()
        finally:
            self._dismiss()

    def _dismiss(self) -> None:
        """End the workers."""
        if self._crew is not None:
            for number, worker in self._crew.workers.items():
                if worker.state in ("waiting", "loading"):
                    # It would hear that it may leave only once it has loaded.
                    self._crew.executor.kill(number)
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
        """Stop the current run at once, as soon as somebody asks for its next outcome; False if none is under way."""
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
        if isinstance(source, Mapping) or not isinstance(source, (str, os.PathLike, Iterable)):
            raise InputError("the tasks are no list: give a file's path, or a list of tasks, dicts or prompts")
        self._end_last_run()
        options = options or RunOptions()
        folder = Path(out) if out is not None else self.default_folder(source)
        lazy = not isinstance(source, (str, os.PathLike, Sequence))
        stream = self._outcomes(self._rows(source, options, folder), folder, options, lazy=lazy)
        self._stream = weakref.ref(stream)
        return stream

    def _end_last_run(self) -> None:
        """Close a run that has ended but was not read to its end. Raises `InputError` when it is still going on."""
        stream = self._stream()
        if stream is None or getgeneratorstate(stream) == GEN_CLOSED:
            return
        over = self._run is not None and self._run.halt is not None
        if getgeneratorstate(stream) != GEN_SUSPENDED or not over:
            raise InputError("this engine runs already; read that run to its end or close it, or make a second engine")
        stream.close()

    def default_folder(self, source: object) -> Path:
        """Where pictures go when nobody said: the configured folder, else `outputs/` and the source's name."""
        if "folder" in self.settings.output.model_fields_set:
            return Path(self.settings.output.folder)
        stem = Path(source).stem if isinstance(source, (str, os.PathLike)) and str(source) != "-" else ""
        return Path("outputs") / stem

    def _rows(self, source: Any, options: RunOptions, folder: Path) -> Iterator[sources.Row]:
        if isinstance(source, (str, os.PathLike)):
            return sources.open_source(source, prompt_column=options.prompt_column)
        return sources.from_iterable(source, folder / KEPT)

    # --- one run ----------------------------------------------------------------------------------------------------

    def _outcomes(
        self, rows: Iterator[sources.Row], path: Path, options: RunOptions, *, lazy: bool
    ) -> Generator[Outcome]:
        with ExitStack() as stack:
            folder = OutputFolder(path, exclusive=options.ledger is None)
            stack.callback(crash_point, "after-unlock")
            stack.callback(folder.close)
            stack.callback(crash_point, "after-ledger-close")
            folder.refuse_links(self._written(path))
            ledger = Ledger(options.ledger or path / FILE_NAME, folder=path.resolve())
            stack.callback(ledger.close)
            stack.callback(crash_point, "before-ledger-close")
            stack.callback(ledger.staging.abandon)
            died = ledger.died()
            book = crew.find_models(self.settings)
            intake = Intake(self.settings, book, ledger, folder, overwrite=options.overwrite)
            if lazy:
                admission, to_do = Admission(), None
                book.get(None)
                choice = self._choose(book, to_do)
                tuned = self._tune(book, choice, None, None)
                self._begin(ledger, folder)
                chunk = min(CHUNK, max(1, self.settings.limits.read_ahead // 4))
                feed = _read_as_needed(rows, intake, admission, ledger, options, chunk)
            else:
                if self.settings.preload:
                    self._start_early(book, path, died)
                admission = intake.stage(rows, limit=options.limit)
                comparison = intake.check(admission, skip_bad=options.skip_bad, rerun_changed=options.rerun_changed)
                again = intake.again(options.again, options.retry)
                to_do = comparison.to_do(options.retry) + len(again)
                choice = self._choose(book, to_do)
                shapes = tuple(ledger.staging.shapes()) if to_do else ()
                if to_do:
                    self._remark(book, shapes)
                tuned = self._tune(book, choice, shapes, comparison.total)
                self._begin(ledger, folder)
                crash_point("before-accept")
                intake.accept(admission, retry=options.retry, again=again)
                crash_point("after-accept")
                feed = ledger.work()
            stack.enter_context(LogFiles(self._log_folder(path), self.settings.logging.level))
            log.info(
                "run %d in %s: %s tasks to do", ledger.run, path, "an unknown number of" if to_do is None else to_do
            )
            if choice is not None:
                self._crew = self._hire(choice, book, path, died)
            if self._crew is not None and to_do != 0 and (choice is not None or self._crew.early):
                self._crew.settle(book.used()[0].spec, tuned)
            yield from self._work(feed, book, ledger, folder, admission, to_do)

    def _begin(self, ledger: Ledger, folder: OutputFolder) -> None:
        """A new run in the ledger; what a run that died left half-written is removed."""
        crash_point("before-sweep")
        folder.sweep(ledger.open_folders())
        folder.sweep_reports()
        self._wall = time.time() - time.monotonic()
        crash_point("before-begin-run")
        ledger.begin_run(self._now(), {"imagemill": __version__, **self.settings.model_dump(mode="json")}, machine())
        crash_point("after-begin-run")

    def _now(self) -> float:
        """Seconds since the epoch by one reading of the clock a run: one that is set meanwhile changes no duration."""
        return self._wall + time.monotonic()

    def _choose(self, book: Models, to_do: int | None) -> Choice | None:
        """The devices for the workers; None where nothing is to do or the workers are there already."""
        if to_do == 0 or self._crew is not None:
            return None
        choice = crew.choose(self.settings, book.used(), None if self._keep else to_do)
        for line in (*(f"left out: {line}" for line in choice.left_out), *choice.warnings):
            self._progress.note(line)
        return choice

    def _remark(self, book: Models, shapes: Iterable[Shape]) -> None:
        """Say what of the run will not do what its user hoped."""
        for line in (*untaken.remarks(self.settings, book.used()), *trained_sizes.remarks(book.used(), shapes)):
            self._progress.note(line)

    def _hire(self, choice: Choice, book: Models, path: Path, died: bool) -> Crew:
        """The workers. After a run that died even a single one gets a process of its own: should one of the tasks crash it
        again, it is that task that ends, and not the run."""
        apart = died and crew.works_inside(choice, self.settings)
        if apart:
            self._progress.note(
                "the last run in this folder died; its worker now has a process of its own, as with --isolate"
            )
        return crew.hire(choice, self.settings, book.used()[0].spec, self._log_folder(path), apart=apart)

    def _start_early(self, book: Models, path: Path, died: bool) -> None:
        """Start the workers of the run's own model while its tasks are still read and checked."""
        if self._crew is None:
            book.get(None)
            choice = self._choose(book, None)
            assert choice is not None, "nothing is known of the tasks yet"
            self._crew = self._hire(choice, book, path, died)
            self._crew.start_early()

    def _tune(
        self, book: Models, choice: Choice | None, shapes: Iterable[Shape] | None, total: int | None
    ) -> dict[str, tuning_choice.Choice]:
        """How the models are made fast, by the whole run; workers that are there keep what they were loaded with."""
        if self._crew is None and choice is None:
            return {}
        if self._crew is None or self._crew.early:
            return crew.tune(self.settings, book, shapes, total, kept=self._keep)
        book.tune({name: one.tuning for name, one in self._crew.tuned.items()})
        return self._crew.tuned

    def _work(
        self, feed: Feed, book: Models, ledger: Ledger, folder: OutputFolder, admission: Admission, to_do: int | None
    ) -> Iterator[Outcome]:
        """Run what is to do, then close the books: the ledger's run, the report of this call."""
        begun = time.monotonic()
        status, message, run = "died", "", None
        try:
            if to_do != 0 and self._crew is not None:
                with ExitStack() as stack:
                    trace = self._trace(folder.path, self._crew)
                    stack.callback(trace.close if trace is not None else lambda: None)
                    run = self._run = self._start(
                        self._crew, feed, book, ledger, folder, known=to_do is not None, trace=trace
                    )
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
            status = "done" if run is not None and run.halt is not None and run.halt.reason == "done" else "cancelled"
            raise
        finally:
            if run is not None and self._crew is not None:
                self._crew.workers = run.scheduler.board.workers
            self._run = None
            self._progress.end()
            self.report = self._report(ledger, folder, admission, status, message, time.monotonic() - begun)
            self._end_run(ledger, run, status)
        if status == "no_workers":
            raise NoWorkersError(f"no worker is left: {message}; what is done is kept, the same command goes on")
        if status == "bad_model":
            raise InputError(f"the model does not load: {message}")

    def _end_run(self, ledger: Ledger, run: Run | None, status: str) -> None:
        """Write the run's end. A ledger that cannot be written hides no other cause."""
        stats = {"policy": str(self.settings.schedule), **self._tuning(), **(run.stats() if run is not None else {})}
        try:
            crash_point("before-end-run")
            ledger.end_run(self._now(), status, stats)
            crash_point("after-end-run")
        except OutputError:
            if status == "done":
                raise
            log.exception("the end of the run could not be written")

    def _settled(self, feed: Feed, ledger: Ledger) -> Iterator[Outcome]:
        """Nothing is to do: no worker starts."""
        self._progress.begin(sum(ledger.counts().values()), {})
        for _, outcome in feed:
            if outcome is not None:
                self._progress.settled(outcome)
                yield outcome

    def _start(
        self,
        hired: Crew,
        feed: Feed,
        book: Models,
        ledger: Ledger,
        folder: OutputFolder,
        *,
        known: bool,
        trace: TraceFile | None,
    ) -> Run:
        settings, output, used = self.settings, self.settings.output, book.used()
        counts = ledger.counts() if known else None
        self._progress.begin(None if counts is None else sum(counts.values()), hired.labels)
        workers = {str(number): {"label": label} for number, label in hired.labels.items()}
        ledger.note_stats({"policy": str(settings.schedule), "workers": workers, **self._tuning()})
        waiting = None if counts is None else sum(counts.values()) - counts.get("done", 0)
        bounds = crew.limits(settings, used, hired.choice, waiting)
        return Run(
            feed=feed,
            scheduler=Scheduler(hired.labels, settings.schedule.name, settings.schedule.k or 1, bounds, hired.workers),
            executor=hired.executor,
            specs=hired.specs,
            models=book,
            sink=SinkSpec(output.sink, str(folder.path.resolve()), output.format, output.metadata),
            ledger=ledger,
            folder=folder,
            progress=self._progress,
            started=self._now(),
            trace=trace,
        )

    def _tuning(self) -> dict[str, Any]:
        return {"tuning": tuning_choice.as_stats(self._crew.tuned)} if self._crew is not None else {}

    def _trace(self, path: Path, hired: Crew) -> TraceFile | None:
        """The open trace; its clock starts now."""
        return TraceFile(path / FILE, hired.labels, time.monotonic()) if self.settings.trace else None

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
            left_out=self._crew.choice.left_out if self._crew else (),
        )

    def _written(self, path: Path) -> list[str]:
        """What a run writes into its folder under names that are not those of tasks."""
        names = [KEPT, downloads.FOLDER, *([FILE] if self.settings.trace else ())]
        logs, whole = self._log_folder(path).absolute(), path.absolute()
        return [*names, str(logs.relative_to(whole))] if logs.is_relative_to(whole) else names

    def _log_folder(self, path: Path) -> Path:
        given = self.settings.logging.folder
        return Path(given) if given else path / "logs"


def _read_as_needed(
    rows: Iterator[sources.Row], intake: Intake, total: Admission, ledger: Ledger, options: RunOptions, size: int
) -> Feed:
    """Take an iterator in by chunks; each chunk is checked before its first task starts."""
    rows = islice(rows, options.limit)
    while chunk := list(islice(rows, size)):
        admission = intake.stage(chunk, first=total.tasks)
        intake.check(admission, skip_bad=options.skip_bad, rerun_changed=options.rerun_changed, part=True)
        intake.accept(admission, retry=options.retry, again=intake.again(options.again, options.retry))
        first = total.tasks
        total.tasks += admission.tasks
        total.skipped += admission.skipped
        yield from ledger.work(first)
