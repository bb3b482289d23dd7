"""The content of an evaluation's report.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from imagemill.errors import InputError
from imagemill.inputs import digest_file
from imagemill.records import ModelSpec
from imagemill.scoring import bootstrap, controls, stage_settings
from imagemill.scoring.books import stage_times
from imagemill.scoring.examiner import Examiner
from imagemill.scoring.judgment import Judgment
from imagemill.scoring.settings import EvalSettings
from imagemill.scoring.settlement import Settled
from imagemill.scoring.statistics import summarise
from imagemill.version import machine

FORMAT = 1
LISTED = 1000
"""How many items without a score report.json names; judgments.jsonl has all."""

SHEET_SEED = 0
"""Of the choice of random items for the contact sheet."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a report says beside the judgments: the settings, the judge, the models, the folders of the two stages."""

    settings: EvalSettings
    examiner: Examiner
    editor: ModelSpec
    judge: ModelSpec
    edits: Path
    judgments: Path


def title(facts: Facts) -> str:
    """`bench.jsonl · tiny-edit · judged by preservation`."""
    judge = facts.judge.name.removeprefix("judge:")
    kind, colon, model = judge.partition(":")
    return f"{_name(facts.settings.bench)} · {_model(facts.editor.name)} · judged by {kind}{colon}{_model(model)}"


def write_up(settled: Sequence[Settled], facts: Facts) -> dict[str, Any]:
    """The content of report.json. Scores are on the judge's scale, `timing` holds all that hangs on the clock."""
    items = [one.item for one in settled]
    scale, clusters = facts.examiner.scale, controls.sources(items)
    order = list(dict.fromkeys(item.category for item in items))

    def figures(judgments: Sequence[Judgment]) -> dict[str, Any]:
        return summarise(judgments, scale, clusters, categories=order).as_json()

    own = figures([one.judgment for one in settled])
    poor = [one.judgment for one in settled if not one.judgment.ok]
    names = list(settled[0].controls)
    coverage = own["overall"]["ok"] / len(settled)
    statuses = own["overall"]["statuses"]
    return {
        "format": FORMAT,
        "title": title(facts),
        "headline": facts.examiner.headline,
        "scale": [scale.low, scale.high],
        "items": len(settled),
        "scored": own["overall"]["ok"],
        "coverage": round(coverage, 6),
        "min_coverage": facts.settings.min_coverage,
        "covered": coverage >= facts.settings.min_coverage,
        "edits": {
            "done": sum(bool(one.edit) for one in settled),
            "failed": statuses.get("edit_failed", 0),
        },
        "tokens": sum(judgment.tokens for one in settled for _, judgment in one.judged()),
        **own,
        "controls": {name: figures([one.controls[name] for one in settled]) for name in names},
        "unscored": {"total": len(poor), "rows": [_poor(one) for one in poor[:LISTED]]},
        "manifest": _manifest(settled, facts, len(set(clusters.values()))),
        "timing": _timing(settled, facts),
    }


def _poor(judgment: Judgment) -> dict[str, Any]:
    return {name: getattr(judgment, name) for name in ("item", "category", "status", "message", "text")}


def _manifest(settled: Sequence[Settled], facts: Facts, clusters: int) -> dict[str, Any]:
    settings, asked = facts.settings, facts.examiner.as_json()
    edit, judge = asdict(settings.edit), asdict(settings.judge)
    devices = {name: edit.pop(name) for name in ("gpus", "device_ids", "device", "workers", "isolate")}
    return {
        "benchmark": {
            "name": _name(settings.bench),
            "items": len(settled),
            "items_sha256": _digest(settled),
            "sources": clusters,
            "lang": settings.lang,
            "categories": list(settings.categories),
            "limit": settings.limit,
        },
        "edit": {**edit, **_spec(facts.editor)},
        "judge": {**(judge if asked["rubric"] else {"kind": judge["kind"]}), **_spec(facts.judge), **asked},
        "prompts": {name: list(texts) for name, texts in settings.prompts.items()},
        "devices": devices,
        "controls": settings.controls,
        "seeds": {
            "edit": stage_settings.seed(settings),
            "bootstrap": bootstrap.SEED,
            "shuffled": controls.SEED,
            "sheet": SHEET_SEED,
        },
        "interval": {"level": bootstrap.LEVEL, "draws": bootstrap.DRAWS, "drawn": "source pictures"},
        "machine": machine(),
    }


def _spec(spec: ModelSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"model": _model(spec.name), "revision": spec.revision, "dtype": spec.dtype}
    return found | ({"options": dict(spec.options)} if spec.options else {})


def _timing(settled: Sequence[Settled], facts: Facts) -> dict[str, Any]:
    edits, judgments = stage_times(facts.edits), stage_times(facts.judgments)
    return {
        "loads": edits["loads"] + judgments["loads"],
        "seconds": round(edits["seconds"] + judgments["seconds"], 3),
        "judge_seconds": round(sum(judgment.seconds for one in settled for _, judgment in one.judged()), 3),
        "edits": edits,
        "judgments": judgments,
    }


def _digest(settled: Sequence[Settled]) -> str:
    """sha256 over what the items say and show: two runs with the same one had the same questions in the same order."""
    rows = [
        [
            *(one.id, one.category, one.instruction, one.source_caption, one.source, one.seed, list(one.questions)),
            *(_content(path) for path in (one.image, *one.images, one.target, one.mask)),
        ]
        for one in (row.item for row in settled)
    ]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def _content(path: str) -> str:
    """The sha256 of a picture's file; empty where there is none, or none any more."""
    try:
        return digest_file(path) if path else ""
    except InputError:
        return ""


def _name(bench: str) -> str:
    """The benchmark's file or folder, without the folders of one person's machine above it."""
    place = PurePath(bench)
    return f"{place.parent.name}/{place.name}" if place.stem == "bench" and place.parent.name else place.name


def _model(name: str) -> str:
    return PurePath(name).name if PurePath(name).is_absolute() else name


def sub_scores(summary: Mapping[str, Any]) -> list[str]:
    """The names of the sub-scores that a summary has, of all categories."""
    groups = [summary["overall"], *summary["categories"]]
    return sorted({name for group in groups for name in group["sub_scores"]})
