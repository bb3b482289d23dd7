"""One run of an engine in one folder: from the lock to the closed books."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from imagemill import crew, downloads, former, sources, tuning_choice
from imagemill.config import Settings
from imagemill.crashpoints import crash_point
from imagemill.crew import Crew
from imagemill.devices import Choice
from imagemill.errors import ImagemillError, InputError, NoWorkersError, OutputError
from imagemill.folder_kinds import refuse_evaluation
from imagemill.intake import Admission, Intake, Models
from imagemill.ledger import FILE_NAME, Ledger
from imagemill.logfiles import DRIVER, LogFiles
from imagemill.loop import Run
from imagemill.progress import Progress
from imagemill.publish import OutputFolder
from imagemill.records import Outcome, PlannedTask, SinkSpec
from imagemill.remarks import remarks
from imagemill.roster import Roster
from imagemill.schedule import Scheduler
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
    """What became of a run. `resumed` of the `done` were made by earlier runs; `pending` were not reached. `usual_failure` is
    the reason of most failures, and of how many; `older` a line on pictures of what the tasks were before that stand in the
    folder beside the new ones, if there are any."""

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
    usual_failure: tuple[str, int] = ("", 0)
    older: str = ""


@dataclass(slots=True)
class Books:
    """What a run reads and writes while its folder is open; `admission` is what its source gave."""

    ledger: Ledger
    folder: OutputFolder
    models: Models
    admission: Admission = field(default_factory=Admission)


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of a run in order, and who does it: `to_do` tasks (None: not known), devices to hire (None: nobody is
    missing), how each model is made fast."""

    feed: Feed
    to_do: int | None
    choice: Choice | None
    tuned: dict[str, tuning_choice.Choice]


class Sitting:
    """One run. `run` is there while workers work for it, `report` once it has ended."""

    def __init__(self, settings: Settings, show: Progress, roster: Roster, path: Path, options: RunOptions) -> None:
        self.run: Run | None = None
        self.report: RunReport | None = None
        self._settings = settings
        self._progress = show
        self._roster = roster
        self._path = path
        self._options = options
        self._wall = 0.0

    def outcomes(self, rows: Iterator[sources.Row], *, lazy: bool) -> Generator[Outcome]:
        """Each outcome in task order; `lazy` rows are taken in as they are needed. However it ends, the books are closed."""
        options, path = self._options, self._path
        with ExitStack() as stack:
            folder = OutputFolder(path, exclusive=options.ledger is None)
            stack.callback(crash_point, "after-unlock")
            stack.callback(folder.close)
            stack.callback(crash_point, "after-ledger-close")
            folder.refuse_links(self._written())
            if options.ledger is None:
                refuse_evaluation(path)
            ledger = Ledger(options.ledger or path / FILE_NAME, folder=path.resolve())
            stack.callback(ledger.close)
            stack.callback(crash_point, "before-ledger-close")
            stack.callback(ledger.staging.abandon)
            died = ledger.died()
            books = Books(ledger, folder, crew.find_models(self._settings))
            intake = Intake(self._settings, books.models, ledger, folder, overwrite=options.overwrite)
            if lazy:
                plan = self._plan_as_needed(rows, books, intake)
            else:
                if self._settings.preload:
                    self._roster.start_early(books.models, self._logs, died=died)
                plan = self._plan_whole(rows, books, intake)
            stack.enter_context(LogFiles(self._logs, self._settings.logging.level))
            amount = "an unknown number of" if plan.to_do is None else plan.to_do
            log.info("run %d in %s: %s tasks to do", ledger.run, path, amount)
            if plan.choice is not None:
                self._roster.hire(plan.choice, books.models, self._logs, died=died)
            hired = self._roster.crew
            if hired is not None and plan.to_do != 0 and (plan.choice is not None or hired.early):
                hired.settle(books.models.used()[0].spec, plan.tuned)
            yield from self._work(books, plan)

    def _plan_as_needed(self, rows: Iterator[sources.Row], books: Books, intake: Intake) -> Plan:
        """The work of an iterator: nothing is known of its tasks but the model that they mostly need."""
        books.models.get(None)
        choice = self._roster.choose(books.models, None)
        tuned = self._roster.tune(books.models, choice, None, None)
        self._begin(books)
        chunk = min(CHUNK, max(1, self._settings.limits.read_ahead // 4))
        feed = _read_as_needed(rows, intake, books.admission, books.ledger, self._options, chunk)
        return Plan(feed, None, choice, tuned)

    def _plan_whole(self, rows: Iterator[sources.Row], books: Books, intake: Intake) -> Plan:
        """The work of a source that is checked whole. Raises `InputError` before anything is written."""
        options, ledger = self._options, books.ledger
        books.admission = intake.stage(rows, limit=options.limit)
        comparison = intake.check(books.admission, skip_bad=options.skip_bad, rerun_changed=options.rerun_changed)
        again = intake.again(options.again, options.retry)
        to_do = comparison.to_do(options.retry) + len(again)
        choice = self._roster.choose(books.models, to_do)
        shapes = tuple(ledger.staging.shapes()) if to_do else ()
        for line in remarks(self._settings, books.models.used(), shapes, intake.slips) if to_do else ():
            self._progress.note(line)
        tuned = self._roster.tune(books.models, choice, shapes, comparison.total)
        self._begin(books)
        crash_point("before-accept")
        intake.accept(books.admission, retry=options.retry, again=again)
        crash_point("after-accept")
        return Plan(ledger.work(), to_do, choice, tuned)

    def _begin(self, books: Books) -> None:
        """A new run in the ledger; what a run that died left half-written is removed."""
        crash_point("before-sweep")
        books.folder.sweep(books.ledger.open_folders())
        books.folder.sweep_reports()
        self._wall = time.time() - time.monotonic()
        crash_point("before-begin-run")
        settings = {"imagemill": __version__, **self._settings.model_dump(mode="json")}
        books.ledger.begin_run(self._now(), settings, machine())
        crash_point("after-begin-run")

    def _now(self) -> float:
        """Seconds since the epoch by one reading of the clock a run: one that is set meanwhile changes no duration."""
        return self._wall + time.monotonic()

    def _work(self, books: Books, plan: Plan) -> Iterator[Outcome]:
        """Run what is to do, then close the books: the ledger's run, the report of this call."""
        begun = time.monotonic()
        status, message, run = "died", "", None
        hired = self._roster.crew
        try:
            if plan.to_do != 0 and hired is not None:
                with ExitStack() as stack:
                    trace = self._trace(hired)
                    stack.callback(trace.close if trace is not None else lambda: None)
                    run = self.run = self._start(hired, books, plan, trace)
                    yield from run.outcomes()
                if run.error:
                    raise run.error
                status, message = (run.halt.reason, run.halt.message) if run.halt else ("cancelled", "")
            else:
                status = "done"
                yield from self._settled(books, plan)
        except ImagemillError as error:
            status, message = type(error).__name__, str(error)
            raise
        except (GeneratorExit, KeyboardInterrupt):
            status = "done" if run is not None and run.halt is not None and run.halt.reason == "done" else "cancelled"
            raise
        finally:
            if run is not None and self._roster.crew is not None:
                self._roster.crew.workers = run.scheduler.board.workers
            self.run = None
            self._progress.end()
            self.report = self._report(books, status, message, time.monotonic() - begun)
            self._end_run(books.ledger, run, status)
        if status == "no_workers":
            raise NoWorkersError(f"no worker is left: {message}; what is done is kept, the same command goes on")
        if status == "bad_model":
            raise InputError(f"the model does not load: {message}")

    def _start(self, hired: Crew, books: Books, plan: Plan, trace: TraceFile | None) -> Run:
        """The loop over the workers, ready to be read."""
        settings, output, ledger = self._settings, self._settings.output, books.ledger
        counts = ledger.counts() if plan.to_do is not None else None
        self._progress.begin(None if counts is None else sum(counts.values()), hired.labels)
        workers = {str(number): {"label": label} for number, label in hired.labels.items()}
        ledger.note_stats({"policy": str(settings.schedule), "workers": workers, **self._tuning()})
        waiting = None if counts is None else sum(counts.values()) - counts.get("done", 0)
        bounds = crew.limits(settings, books.models.used(), hired.choice, waiting)
        return Run(
            feed=plan.feed,
            scheduler=Scheduler(hired.labels, settings.schedule.name, settings.schedule.k or 1, bounds, hired.workers),
            executor=hired.executor,
            specs=hired.specs,
            models=books.models,
            sink=SinkSpec(output.sink, str(self._path.resolve()), output.format, output.metadata),
            ledger=ledger,
            folder=books.folder,
            progress=self._progress,
            started=self._now(),
            trace=trace,
        )

    def _settled(self, books: Books, plan: Plan) -> Iterator[Outcome]:
        """Nothing is to do: no worker starts."""
        self._progress.begin(sum(books.ledger.counts().values()), {})
        for _, outcome in plan.feed:
            if outcome is not None:
                self._progress.settled(outcome)
                yield outcome

    def _end_run(self, ledger: Ledger, run: Run | None, status: str) -> None:
        """Write the run's end. A ledger that cannot be written hides no other cause."""
        stats = {"policy": str(self._settings.schedule), **self._tuning(), **(run.stats() if run is not None else {})}
        try:
            crash_point("before-end-run")
            ledger.end_run(self._now(), status, stats)
            crash_point("after-end-run")
        except OutputError:
            if status == "done":
                raise
            log.exception("the end of the run could not be written")

    def _report(self, books: Books, status: str, message: str, seconds: float) -> RunReport:
        counts = books.ledger.counts()
        done, failed, pending = (counts.get(state, 0) for state in ("done", "failed", "pending"))
        return RunReport(
            folder=self._path,
            done=done,
            failed=failed,
            pending=pending,
            resumed=books.ledger.resumed(),
            skipped=tuple(books.admission.skipped),
            seconds=seconds,
            status=status,
            message=message,
            exit_code=0 if status == "done" and not failed and not pending else 1,
            left_out=self._roster.crew.choice.left_out if self._roster.crew else (),
            usual_failure=books.ledger.usual_failure() if failed else ("", 0),
            older=former.line(self._path, filter(books.folder.occupied, books.ledger.older())),
        )

    def _tuning(self) -> dict[str, Any]:
        hired = self._roster.crew
        return {"tuning": tuning_choice.as_stats(hired.tuned)} if hired is not None else {}

    def _trace(self, hired: Crew) -> TraceFile | None:
        """The open trace; its clock starts now."""
        return TraceFile(self._path / FILE, hired.labels, time.monotonic()) if self._settings.trace else None

    @property
    def _logs(self) -> Path:
        given = self._settings.logging.folder
        return Path(given) if given else self._path / "logs"

    def _written(self) -> list[str]:
        """What a run writes into its folder under names that are not those of tasks."""
        names = [KEPT, downloads.FOLDER, *([FILE] if self._settings.trace else ())]
        logs, whole = self._logs.absolute(), self._path.absolute()
        return [*names, str(logs.relative_to(whole))] if logs.is_relative_to(whole) else names


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
