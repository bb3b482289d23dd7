"""From the rows of a source to the work of a run: resolve, check, fingerprint, stage in the ledger, compare.

Nothing of the output folder changes before `Intake.accept`, but for pictures that were fetched into their hidden folder; a
bad row, a changed task or a damaged ledger stops before.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from imagemill import canvas, plan
from imagemill.config import Settings
from imagemill.config.wording import shown
from imagemill.downloads import FOLDER, Downloads
from imagemill.errors import ChangedTasksError, ConfigError, InputError, TaskFileError
from imagemill.inputs import ImageFile, Inputs, is_web_address
from imagemill.ledger import Ledger
from imagemill.models import Model
from imagemill.plan import Defaults, Problem
from imagemill.publish import OutputFolder
from imagemill.records import Task, Tuning
from imagemill.sources import Row
from imagemill.staging import SHOWN, Comparison

SKIP_BAD = "mend the rows, or leave them out (--skip-bad)"
"""What there is to do about bad rows; a caller that has no such option puts its own words in this place."""


AHEAD = 32
"""Rows whose pictures are being fetched before their turn."""


@dataclass(slots=True)
class Admission:
    """What a source gave: how many tasks, which rows were left out and why. `mistakes` are the first kinds of them."""

    tasks: int = 0
    rows: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    bad_rows: int = 0
    mistakes: set[tuple[str, ...]] = field(default_factory=set)

    def refuse(self, place: str, found: Sequence[Problem]) -> None:
        """Book a row that is left out because of these problems."""
        self.bad_rows += 1
        self.skipped.append((place, "; ".join(map(str, found))))
        if len(self.mistakes) < 2:
            self.mistakes.add(tuple(str(problem).partition(";")[0] for problem in found))
        if len(self.bad) < SHOWN:
            self.bad += [f"{place}: {problem}" for problem in found][: SHOWN - len(self.bad)]

    def alike(self) -> list[str]:
        """What is wrong, told once, where it is the same in each of several rows: an option's mistake, most often."""
        if self.bad_rows < 2 or self.bad_rows < self.rows or len(self.mistakes) > 1:
            return []
        first = self.bad[: len(next(iter(self.mistakes)))]
        return [f"{line} (the same in all {self.rows} rows)" for line in first]


class Models:
    """The models of a run, each looked up once."""

    def __init__(self, find: Callable[[str], Model], default: str) -> None:
        self._find = find
        self.default = default
        self._found: dict[str, Model | InputError] = {}

    def get(self, name: str | None) -> Model:
        """The model of that name, the run's own for None. Raises `InputError`."""
        name = name or self.default
        if name not in self._found:
            try:
                self._found[name] = self._find(name)
            except InputError as error:
                self._found[name] = error
        found = self._found[name]
        if isinstance(found, InputError):
            raise found
        return found

    def tune(self, tunings: Mapping[str, Tuning]) -> None:
        """Give the models of these names, which were found before, their tuning."""
        for name, found in self._found.items():
            if isinstance(found, Model) and found.spec.name in tunings:
                self._found[name] = replace(found, spec=replace(found.spec, tuning=tunings[found.spec.name]))

    def used(self) -> tuple[Model, ...]:
        """Every model that was found, in the order of first use."""
        return tuple(found for found in self._found.values() if isinstance(found, Model))


class Intake:
    """Takes rows into the ledger's staging area.

    `overwrite` lets a new task replace a file that no run of the folder made, though none that a task reads. With `dry` no
    picture that is fetched is kept.
    """

    def __init__(
        self,
        settings: Settings,
        models: Models,
        ledger: Ledger,
        folder: OutputFolder,
        *,
        overwrite: bool = False,
        dry: bool = False,
    ) -> None:
        self.models = models
        self._overwrite = overwrite
        self._sources: set[str] = set()
        self.slips: dict[str, None] = {}
        self._downloads = Downloads(folder.path / FOLDER, keep=not dry) if settings.allow_urls else None
        self.folder = folder
        self._ledger = ledger
        self.inputs = Inputs()
        self._format = settings.output.format
        self._keeps_files = settings.output.sink == "files"
        width, height = settings.size or (None, None)
        self._defaults = Defaults(
            width=width,
            height=height,
            steps=settings.steps,
            guidance_scale=settings.guidance,
            true_cfg_scale=settings.true_cfg_scale,
            negative_prompt=settings.negative_prompt,
            seed=settings.seed,
            loras=settings.loras,
        )

    def stage(self, rows: Iterable[Row], *, first: int = 0, limit: int | None = None) -> Admission:
        """Stage every row, up to `limit` tasks' rows; problems are collected, not raised."""
        self._ledger.staging.begin()
        try:
            return self._stage(rows, first, limit)
        except BaseException:
            self._ledger.staging.abandon()
            raise
        finally:
            if self._downloads is not None:
                self._downloads.close()

    def _stage(self, rows: Iterable[Row], first: int, limit: int | None) -> Admission:
        admission = Admission()
        for lora in self._defaults.loras:
            self.inputs.lora(lora.path)  # the run's own: no row is to blame for it
        seq = first
        for row in self._fetching(rows, limit, self._downloads) if self._downloads is not None else rows:
            if limit is not None and admission.rows >= limit:
                break
            if row.skipped:
                admission.skipped.append((row.place, row.skipped))
                continue
            admission.rows += 1
            found = list(row.problems)
            self.slips.update(dict.fromkeys(row.slips))
            if row.task is not None and not found:
                seq, found = self._stage_task(row.task, row, seq)
            if found:
                admission.refuse(row.place, found)
        admission.tasks = seq - first
        return admission

    def _fetching(self, rows: Iterable[Row], limit: int | None, downloads: Downloads) -> Iterator[Row]:
        """The rows, up to `limit` that count; some of them are read ahead, so that their pictures come meanwhile."""
        waiting: deque[Row] = deque()
        count = 0
        for row in rows:
            if row.task is not None and not row.problems:
                downloads.ahead(filter(is_web_address, row.task.images))
            waiting.append(row)
            count += not row.skipped
            if count == limit:
                break
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _stage_task(self, task: Task, row: Row, seq: int) -> tuple[int, list[Problem]]:
        """Stage the one or more pictures of a row, all or none; returns the next number and what is wrong."""
        first = seq
        found: list[Problem] = []
        if task.model is None:
            model = self.models.get(None)  # the run's own: no row is to blame for it
        else:
            with _as_problem(found, "model"):
                model = self.models.get(task.model)
            if found:
                return seq, found
        pictures = self._pictures(task, found)
        task = task if found else replace(task, images=tuple(picture.path for picture in pictures))
        source = pictures[0].size if pictures else None
        task = plan.resolve(task, row.index, self._defaults, model.planned, self._format, source)
        task = self._with_digests(task, found)
        found += plan.problems(
            task, model.planned.family, only_edits=model.known is not None and model.known.only_edits
        )
        if found:
            return seq, found
        for one in plan.expand(task):
            planned = plan.planned(one, seq, model.planned, [picture.digest for picture in pictures])
            path = one.output_path or ""
            if not self.folder.holds(path):
                self._ledger.staging.take_back(first)
                return first, [
                    Problem("output_path", f"{path!r} leads out of the output folder through a link; remove the link")
                ]
            conflict = self._ledger.staging.add(planned, row.place)
            if conflict:
                self._ledger.staging.take_back(first)
                return first, [conflict]
            seq += 1
        return seq, []

    def _pictures(self, task: Task, found: list[Problem]) -> list[ImageFile]:
        pictures = []
        for number, path in enumerate(task.images):
            with _as_problem(found, f"images[{number}]"):
                pictures.append(self._picture(path))
        return pictures

    def _picture(self, path: str) -> ImageFile:
        """The picture of that path or address. Raises `InputError`."""
        if not is_web_address(path):
            self._reads(path)
            return self.inputs.image(path)
        if self._downloads is None:
            raise InputError(
                f"{shown(path)} is a URL, which is fetched only if that is allowed: give --allow-urls (in Python and YAML "
                "allow_urls), or download it and name the file"
            )
        picture = self._downloads.image(path)
        self.inputs.remember(picture)
        return picture

    def _reads(self, path: str) -> None:
        """Remember a file that a task reads, where pictures could take its place."""
        if self._overwrite:
            self._sources.add(os.path.realpath(path))

    def _with_digests(self, task: Task, found: list[Problem]) -> Task:
        loras = list(task.loras)
        for number, lora in enumerate(loras):
            with _as_problem(found, f"loras[{number}].path"):
                self._reads(lora.path)
                loras[number] = replace(lora, digest=self.inputs.lora(lora.path).digest)
                if loras[number].digest in [other.digest for other in loras[:number]]:
                    raise InputError(f"{lora.path}: is there twice; give it once, with the strength you want in all")
        return replace(task, loras=tuple(loras)) if loras else task

    def check(self, admission: Admission, *, skip_bad: bool, rerun_changed: bool, part: bool = False) -> Comparison:
        """Compare what is staged with the folder. Raises `TaskFileError` or `ChangedTasksError`; then nothing starts, and
        what was staged is forgotten, so that a run that is under way can still be settled.

        A `part` of a source may hold no task; a whole one without any is refused.
        """
        try:
            if admission.tasks == 0 and not part and (skip_bad or not admission.bad_rows):
                raise InputError(f"the source holds no task that could run: {_why_none(admission)}")
            if admission.bad_rows:
                self._refuse_size()
            if admission.bad_rows and not skip_bad:
                if not part and (lines := admission.alike()):
                    raise TaskFileError(lines, len(lines), "nothing was started")
                start = "the run ends here, what is done is kept" if part else "nothing was started"
                raise TaskFileError(admission.bad, admission.bad_rows, f"{start}; {SKIP_BAD}")
            return self._compare(rerun_changed=rerun_changed)
        except BaseException:
            self._ledger.staging.abandon()
            raise

    def _refuse_size(self) -> None:
        """Raises `ConfigError` for a size of the run that a model cannot make: no row is to blame for it."""
        width, height = self._defaults.width or 0, self._defaults.height or 0
        if width * height > plan.MAX_PIXELS:
            raise ConfigError(f"size: {width}x{height}: {plan.TOO_LARGE}")
        for model in self.models.used():
            unit, name = model.planned.family.multiple, model.planned.family.name
            if width % unit or height % unit:
                near = "x".join(str(canvas.to_multiple(side, unit)) for side in (width, height))
                raise ConfigError(
                    f"size: {width}x{height}: {name} takes multiples of {unit}; write {near}, for example"
                )

    def _compare(self, *, rerun_changed: bool) -> Comparison:
        self._ledger.staging.recall(self.folder.damaged, files=self._keeps_files)
        comparison = self._ledger.staging.compare()
        foreign = self._foreign_files()
        conflicts = self._ledger.staging.conflicts(self._ledger.run) + [line for _, line in foreign]
        if conflicts:
            mend = "choose another output_path, or give another --out"
            if self._ledger.is_new and self._has_own([path for path, _ in foreign[:SHOWN]]):
                mend = (
                    "they are pictures of imagemill, but the folder's ledger is gone: "
                    f"`imagemill repair {self.folder.path}` rebuilds it from them; or give another --out"
                )
            raise TaskFileError(conflicts[:SHOWN], len(conflicts), mend)
        if comparison.changed and not rerun_changed:
            raise ChangedTasksError(comparison.differences, comparison.changed)
        return comparison

    def _has_own(self, paths: Iterable[str]) -> bool:
        """Whether one of these files is a picture that carries its task."""
        from imagemill import repair

        return any(repair.look(self.folder.path, path).task is not None for path in paths)

    def _foreign_files(self) -> list[tuple[str, str]]:
        """New tasks at whose place a file stands that no run of this folder made, which would be overwritten: path, message."""
        if not self._keeps_files:
            return []
        new = self._ledger.staging.new()
        if self._overwrite:
            why = "is one of the files that the tasks read"
            taken = [(place, path) for place, path in new if os.path.realpath(self.folder.path / path) in self._sources]
        else:
            why = "a file that is no picture of this folder's runs stands there"
            taken = [(place, path) for place, path in new if self.folder.occupied(path)]
        return [(path, f"{place}: output_path {path!r}: {why}") for place, path in taken]

    def damaged(self) -> list[str]:
        """The ids of staged tasks the folder holds as done whose pictures are gone, altered, or were never kept."""
        if not self._keeps_files:
            return []
        return [*self.folder.damaged(self._ledger.staging.done()), *self._ledger.staging.unkept()]

    def again(self, asked: Iterable[str], retry: Iterable[str]) -> list[str]:
        """The ids of staged tasks to do once more: those `damaged`, and of those asked for the ones that are settled and
        that the kinds of failures to `retry` do not bring back anyhow."""
        found, wanted, kinds = dict.fromkeys(self.damaged()), frozenset(asked), frozenset(retry)
        if wanted:
            settled = self._ledger.staging.settled()
            found |= {name: None for name, kind in settled if name in wanted and kind not in kinds}
        return list(found)

    def accept(self, admission: Admission, *, retry: Iterable[str], again: Iterable[str]) -> None:
        """Make what is staged the work of the ledger's run."""
        for place, reason in admission.skipped:
            self._ledger.skip(place, reason)
        self._ledger.staging.apply(self._ledger.run, retry=tuple(retry), again=again)


def _why_none(admission: Admission) -> str:
    """Why a source gave no task."""
    if not admission.skipped:
        return 'it is empty; write a row such as {"prompt": "an owl"}'
    place, reason = admission.skipped[0]
    more = f" (and {len(admission.skipped) - 1} more like it)" if len(admission.skipped) > 1 else ""
    return f"{place}: {reason}{more}"


@contextmanager
def _as_problem(found: list[Problem], name: str) -> Iterator[None]:
    """A user's mistake inside the block becomes a problem of the row's field."""
    try:
        yield
    except InputError as error:
        found.append(Problem(name, str(error)))
