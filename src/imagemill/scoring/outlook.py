"""What an evaluation would do: the dry run behind `imagemill eval --dry-run`. It starts no worker and keeps no file."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from imagemill import crew, sources
from imagemill.errors import TaskFileError
from imagemill.folder_kinds import EDITS, refuse_run
from imagemill.forecast import forecast
from imagemill.listing import columns, forecast_text, gib
from imagemill.scoring import stage_settings
from imagemill.scoring.controls import CONTROLS
from imagemill.scoring.evaluation import by_item, check, edit_rows, idle_words, items_of, missing, without_target
from imagemill.scoring.examiner import Examiner, examiner
from imagemill.scoring.item import Item
from imagemill.scoring.settings import EvalSettings
from imagemill.sitting import RunOptions


def outlook(settings: EvalSettings, options: RunOptions) -> str:
    """The plan of both stages as text. Raises what the evaluation would raise before it starts."""
    refuse_run(Path(settings.out))
    with tempfile.TemporaryDirectory(prefix="imagemill-") as cache:
        items = items_of(settings, Path(cache))
        judge = examiner(settings, items)
        check(items, judge)
        gone = missing(items)
        rows = edit_rows([item for item in items if item.id not in gone], stage_settings.seed(settings))
        slips = (f"warning: {line}" for line in idle_words(settings, items))
        parts = ["\n".join([_items(settings, items, gone), *slips])]
        if rows:
            editing = stage_settings.editing(settings)
            stage_settings.editor(editing)
            read = sources.from_iterable(rows)
            try:
                plan = forecast(settings.bench, Path(settings.out) / EDITS, editing, options, read)
            except TaskFileError as error:
                raise by_item(error, rows) from error
            parts.append(f"Stage 1, the edits, by {editing.model}\n{forecast_text(plan)}")
        return "\n\n".join([*parts, _judging(settings, items, judge)])


def _items(settings: EvalSettings, items: Sequence[Item], gone: dict[str, str]) -> str:
    counts = Counter(item.category for item in items)
    lines = [
        f"{settings.bench}: {len(items)} items in {len(counts)} categories, from {_sources(items)} source pictures"
    ]
    lines.append(columns([(f"  {name}", str(count)) for name, count in counts.items()]))
    return "\n".join([*lines, *(f"  {item}: missing_image: {why}" for item, why in list(gone.items())[:20])])


def _sources(items: Sequence[Item]) -> int:
    return len({item.source or item.image for item in items})


def _judging(settings: EvalSettings, items: Sequence[Item], judge: Examiner) -> str:
    stage = stage_settings.judging(settings)
    book = crew.find_models(stage)
    spec = book.get(None).spec
    count = sum(len(judge.questions(item)) for item in items if judge.can_judge(item))
    controls = len(CONTROLS) if settings.controls else 0
    choice = crew.choose(stage, book.used(), count)
    lines = [f"Stage 2, the judgments, by {spec.name}: {count} of the edits"]
    lines[0] += f" and {count * controls} of the controls, at most" if controls else ", at most"
    lines += [f"  {without}"] if (without := without_target(items, judge)) else []
    lines.append(f"  score: {judge.headline}, {judge.scale}")
    lines.append(f"  memory needed by a worker: {gib(spec.memory) if spec.memory else 'next to none'}")
    lines.append(f"  workers: {', '.join(device.label for device in choice.devices)}")
    return "\n".join([*lines, *(f"warning: {line}" for line in choice.warnings)])
