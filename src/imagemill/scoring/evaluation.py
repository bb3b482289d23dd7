"""An evaluation from end to end: all edits, then the edit model leaves, the judge comes, all scores, the report.

    report = evaluate(load_eval_settings("config.yaml"))
    print(report.coverage, report.page)

Two stages, two runs of the engine, each with a folder and a ledger of its own: OUT/edits and OUT/judgments. Each model is
loaded once a worker, whatever the number of categories. The same call in the same folder does what is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from imagemill import crew, judges, progress, sources
from imagemill.config import Settings
from imagemill.downloads import FOLDER, Downloads
from imagemill.engine import Engine
from imagemill.errors import InputError, LedgerError, TaskFileError
from imagemill.folder_kinds import EDITS, JUDGMENTS, refuse_run
from imagemill.forecast import forecast
from imagemill.inputs import Inputs
from imagemill.intake import SKIP_BAD
from imagemill.ledger import REPAIR
from imagemill.progress import Progress
from imagemill.publish import OutputFolder
from imagemill.records import ModelSpec, Outcome
from imagemill.report import write_reports
from imagemill.scoring import stage_settings
from imagemill.scoring.ask import Ask, asks
from imagemill.scoring.benchmarks import read_benchmark, unknown_fields
from imagemill.scoring.books import earlier
from imagemill.scoring.controls import CONTROLS
from imagemill.scoring.examiner import NUMBERS, Examiner, examiner
from imagemill.scoring.item import Item
from imagemill.scoring.report import Facts, Reports, write_eval_reports
from imagemill.scoring.settings import EvalSettings
from imagemill.scoring.settlement import Edits, settle, unreadable
from imagemill.sitting import RunOptions

SOURCES = "sources"
"""Where, inside the output folder, pictures lie that were inside the benchmark's file."""

MEND = "mend the items, or choose others (--categories)"
"""What there is to do about items that make no task."""

Rejudge: TypeAlias = Literal["failed", "all"]
Shows: TypeAlias = Callable[[str, str], Progress]
"""Makes the display of a stage from its name and what one task of it gives."""


@dataclass(frozen=True, slots=True)
class EvalReport:
    """What became of an evaluation.

    `stopped` says that it was asked to end early: nothing was reported then, and the same call goes on. `failed_edits`
    count edits that failed though their source reads. `summary` is the content of report.json.
    """

    folder: Path
    items: int
    scored: int = 0
    failed_edits: int = 0
    coverage: float = 0.0
    min_coverage: float = 0.0
    stopped: bool = False
    page: Path | None = None
    summary: Mapping[str, Any] | None = None

    @property
    def exit_code(self) -> int:
        """0 when every edit is there and enough of them have a score."""
        return 1 if self.stopped or self.failed_edits or self.coverage < self.min_coverage else 0


def evaluate(
    settings: EvalSettings, *, rejudge: Rejudge | None = None, options: RunOptions | None = None, quiet: bool = True
) -> EvalReport:
    """Edit and judge what is left of a benchmark, write the report, and say what became of it.

    `rejudge` asks the judge again about what has no score, or about everything. `options` are those of the first stage
    (`retry`, `rerun_changed`). Raises `InputError` and its kinds for mistakes, before the stage that they concern starts;
    what ends a run of the engine ends this too.
    """
    return Evaluation(settings, rejudge=rejudge, options=options, shows=displays(quiet=quiet)).run()


def displays(*, quiet: bool) -> Shows:
    """Displays on standard error, or none."""
    return lambda stage, unit: progress.create(quiet=quiet, stage=stage, unit=unit)


class Evaluation:
    """One evaluation; `drain` and `cancel` end it early, as they end a run of the engine."""

    def __init__(
        self,
        settings: EvalSettings,
        *,
        rejudge: Rejudge | None = None,
        options: RunOptions | None = None,
        shows: Shows | None = None,
    ) -> None:
        self.settings = settings
        self.folder = Path(settings.out)
        self._rejudge = rejudge
        self._options = options or RunOptions()
        self._shows = shows or displays(quiet=True)
        self._engine: Engine | None = None
        self._stopping = False

    def drain(self) -> bool:
        """Let the stage end what is in flight and begin no other; False when no stage is under way."""
        self._stopping = self._engine is not None and self._engine.drain()
        return self._stopping

    def cancel(self) -> bool:
        """Stop the stage at once; False when no stage is under way."""
        self._stopping = self._engine is not None and self._engine.cancel()
        return self._stopping

    def run(self) -> EvalReport:
        """Both stages and the report. Raises as `evaluate` does."""
        lock = OutputFolder(self.folder)
        try:
            lock.refuse_links([SOURCES])
            refuse_run(self.folder)
            return self._run()
        except LedgerError as error:
            what, mend, _ = str(error).partition(REPAIR)
            # Neither edits nor answers hold their task, as pictures of a run do.
            raise LedgerError(f"{what}; move its folder away, and that stage is done anew" if mend else what) from error
        finally:
            lock.close()

    def _run(self) -> EvalReport:
        items = items_of(self.settings, self.folder / SOURCES)
        judge = examiner(self.settings, items)
        check(items, judge)
        stages = stage_settings.editing(self.settings), stage_settings.judging(self.settings)
        # Both before the start: a judge that cannot be had is told before hours of editing.
        editor, judged_by = stage_settings.editor(stages[0]), crew.find_models(stages[1]).get(None).spec
        silent = self._silence(judged_by, items)
        without = without_target(items, judge)
        edits = self._edit(items, stages[0], [*idle_words(self.settings, items), *([without] if without else [])])
        if edits is None or self._stopping:
            return EvalReport(self.folder, len(items), stopped=True)
        asked = list(self._asks(items, edits, judge))
        if silent and self._wants_answers(asked, stages[1]):
            raise silent
        answered = self._judge(asked, stages[1], items, edits, judge)
        if answered is None:
            return EvalReport(self.folder, len(items), stopped=True)
        settled = settle(items, edits, asked, answered, judge, self._controls)
        reports = write_eval_reports(self.folder, settled, self._facts(judge, editor, judged_by))
        if not self.settings.save_images:
            for outcome in edits.outcomes.values():
                if outcome.path:
                    Path(outcome.path).unlink(missing_ok=True)
        return self._report(reports, edits, len(items))

    @property
    def _controls(self) -> Sequence[str]:
        return CONTROLS if self.settings.controls else ()

    def _facts(self, judge: Examiner, editor: ModelSpec, judged_by: ModelSpec) -> Facts:
        return Facts(self.settings, judge, editor, judged_by, self.folder / EDITS, self.folder / JUDGMENTS)

    def _report(self, reports: Reports, edits: Edits, items: int) -> EvalReport:
        overall = reports.summary["overall"]
        return EvalReport(
            self.folder,
            items,
            scored=overall["ok"],
            failed_edits=edits.failed,
            coverage=overall["ok"] / items,
            min_coverage=self.settings.min_coverage,
            page=reports.page,
            summary=reports.summary,
        )

    def _silence(self, judge: ModelSpec, items: Sequence[Item]) -> InputError | None:
        """Why the judge's endpoint cannot be asked; None where it can, or is none. Raises it where there is much to do before
        anybody knows whether it must be."""
        try:
            judges.check_endpoint(judge)
        except InputError as error:
            known = earlier(self.folder / EDITS)
            gone = missing(items)
            if self._rejudge or any(item.id not in known and item.id not in gone for item in items):
                raise
            return error
        return None

    def _wants_answers(self, asked: Sequence[Ask], settings: Settings) -> bool:
        """Whether the second stage would ask anything."""
        rows, options = sources.from_iterable([ask.task for ask in asked]), RunOptions(rerun_changed=True)
        return bool(asked) and forecast(self.settings.bench, self.folder / JUDGMENTS, settings, options, rows).to_do > 0

    # --- the stages -------------------------------------------------------------------------------------------------

    def _edit(self, items: Sequence[Item], settings: Settings, lines: Iterable[str]) -> Edits | None:
        """All edits; None when the stage was stopped. The lines are shown before the first."""
        gone = missing(items)
        rows = edit_rows([item for item in items if item.id not in gone], stage_settings.seed(self.settings))
        show = self._shows(EDITS, "picture")
        for line in lines:
            show.note(line)
        outcomes = self._stage(rows, EDITS, settings, self._options, show)
        if outcomes is None:
            return None
        by_id = {item.id: item for item in items}
        for name, outcome in outcomes.items():
            if outcome.kind == "bad_task" and (why := unreadable((by_id[name].image, *by_id[name].images))):
                gone[name] = why
        return Edits(outcomes, gone)

    def _asks(self, items: Sequence[Item], edits: Edits, judge: Examiner) -> Iterable[Ask]:
        paths = {item.id: path for item in items if (path := edits.path(item.id)) is not None}
        gone = frozenset(edits.unreadable)
        return asks(items, paths, judge, controls=self.settings.controls, unreadable=gone)

    def _judge(
        self, asked: Sequence[Ask], settings: Settings, items: Sequence[Item], edits: Edits, judge: Examiner
    ) -> Mapping[str, Outcome] | None:
        """The answers by task; None when the stage was stopped. Changed questions and edits are judged anew."""
        show = self._shows("judging", "judgment")
        show.note(f"the edit model has left; judging with {settings.model}")
        again: tuple[str, ...] = ()
        if self._rejudge == "all":
            again = tuple(ask.id for ask in asked)
        elif self._rejudge == "failed":
            known = earlier(self.folder / JUDGMENTS)
            found = settle(items, edits, asked, known, judge, self._controls)
            poor = {(one.item.id, control) for one in found for control, own in one.judged() if not own.ok}
            again = tuple(ask.id for ask in asked if (ask.item, ask.control) in poor)
        options = RunOptions(rerun_changed=True, again=again)
        return self._stage([ask.task for ask in asked], JUDGMENTS, settings, options, show)

    def _stage(
        self, rows: Sequence[Mapping[str, Any]], name: str, settings: Settings, options: RunOptions, show: Progress
    ) -> dict[str, Outcome] | None:
        """The outcomes of one run of the engine by task; None when it was stopped. Its workers have left when it returns."""
        if not rows:
            return {}
        folder = self.folder / name
        found: dict[str, Outcome] = {}
        with Engine(config=settings, show=show, keep=False) as engine:
            self._engine = engine
            try:
                for outcome in engine.run(rows, folder, options):
                    found[outcome.task.id] = outcome
            except TaskFileError as error:
                raise by_item(error, rows) from error
            finally:
                self._engine = None
            report = engine.report
        write_reports(folder)
        return found if report is not None and report.status == "done" else None


def by_item(error: TaskFileError, rows: Sequence[Mapping[str, Any]]) -> TaskFileError:
    """The refusal of rows with the items' ids in place of their numbers, and with what there is to do about it here."""

    def item(found: re.Match[str]) -> str:
        return f"item {rows[int(found[1]) - 1]['id']}: "

    lines = [re.sub(r"^task (\d+): ", item, line) for line in error.problems]
    return TaskFileError(lines, error.total, error.hint.replace(SKIP_BAD, MEND))


# --- what is edited ---------------------------------------------------------------------------------------------------


def items_of(settings: EvalSettings, cache: Path) -> list[Item]:
    """The chosen items of the benchmark; pictures inside its file, and fetched ones, lie in `cache`. Raises `InputError`."""
    downloads = Downloads(cache / FOLDER)
    try:
        return read_benchmark(
            settings.bench,
            lang=settings.lang,
            categories=settings.categories,
            limit=settings.limit,
            cache=cache,
            fetch=(lambda address: downloads.image(address).path) if settings.allow_urls else None,
        )
    finally:
        downloads.close()


def check(items: Sequence[Item], judge: Examiner) -> None:
    """Raises `InputError` when the judge can judge none of the items."""
    if not any(judge.can_judge(item) for item in items):
        raise InputError(
            "the judge reference compares edits with targets, and no item has one; take another judge "
            "(preservation compares with the source)"
        )


def idle_words(settings: EvalSettings, items: Sequence[Item]) -> tuple[str, ...]:
    """A line for each thing in the benchmark or the settings that will not do what its user hoped."""
    kind, rubric = settings.judge.kind, settings.rubric
    unasked = kind in NUMBERS and rubric == "viescore"
    line = f"the rubric {rubric} changes nothing: the judge {kind} measures pictures and asks nobody"
    return (*unknown_fields(settings.bench, items), *([line] if unasked else []))


def without_target(items: Sequence[Item], judge: Examiner) -> str:
    """What is to be said of items that the judge cannot judge; empty where there are none."""
    count = sum(not judge.can_judge(item) for item in items)
    return f"{count} of {len(items)} items name no target and will have no score" if count else ""


def missing(items: Iterable[Item]) -> dict[str, str]:
    """The items whose source is gone or empty, each with the reason."""
    inputs = Inputs()
    found: dict[str, str] = {}
    for item in items:
        for path in (item.image, *item.images):
            try:
                inputs.image(path)
            except InputError as error:
                found.setdefault(item.id, str(error).replace(path, Path(path).name))
    return found


def edit_rows(items: Iterable[Item], seed: int) -> list[dict[str, Any]]:
    """The items as tasks of the engine; `seed` is for those without one of their own."""
    return [
        {
            "id": item.id,
            "prompt": item.instruction,
            "images": [item.image, *item.images],
            "seed": seed if item.seed is None else item.seed,
            "metadata": {**item.metadata, "category": item.category},
        }
        for item in items
    ]
