"""The engine's settings of the two stages: the model that edits, then the judge, on the same devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imagemill import crew, devices
from imagemill.config import JudgeSettings, Settings, merge
from imagemill.errors import ConfigError
from imagemill.plan import DEFAULT_SEED
from imagemill.records import ModelSpec
from imagemill.scoring.settings import EvalSettings


def editing(settings: EvalSettings) -> Settings:
    """Of the first stage."""
    edit = settings.edit
    return _merged(
        settings,
        "edits",
        {
            "model": edit.model,
            "dtype": edit.dtype,
            "steps": edit.steps,
            "true_cfg_scale": edit.true_cfg_scale,
            "guidance": edit.guidance_scale,
            "negative_prompt": edit.negative_prompt,
            "seed": seed(settings),
            "schedule": edit.schedule,
            "size": edit.size,
            "compile": edit.compile,
            "precision": edit.precision,
            "attention": edit.attention,
            # What shared a batch with an item would change the last bit of its edit, and a run that goes on batches anew.
            "batch_size": 1,
            # Without the task inside, whose paths are those of one machine, the same pixels are the same bytes everywhere.
            "output.metadata": False,
        },
    )


def editor(stage: Settings) -> ModelSpec:
    """The model of the first stage. Raises `InputError` for one that is not known, or that edits no pictures."""
    found = crew.find_models(stage).get(None)
    if "images" not in found.planned.family.fields:
        raise ConfigError(
            f"edit.model: {stage.model!r} edits no pictures; name one that does (--edit-model; `imagemill models` lists them)"
        )
    return found.spec


def judging(settings: EvalSettings) -> Settings:
    """Of the second stage."""
    judge = settings.judge
    model = f"judge:{judge.kind}" + (f":{judge.model}" if judge.model else "")
    shared = {f"judge.{name}": getattr(judge, name) for name in JudgeSettings.model_fields if hasattr(judge, name)}
    return _merged(settings, "judgments", {"model": model, "dtype": judge.dtype, **shared})


def seed(settings: EvalSettings) -> int:
    """The seed of every item that has none of its own: one for all, so that an edit hangs on no other item."""
    return DEFAULT_SEED if settings.edit.seed is None else settings.edit.seed


def _merged(settings: EvalSettings, stage: str, own: dict[str, Any]) -> Settings:
    edit = settings.edit
    on_gpu = devices.kind(edit.device, edit.gpus, edit.device_ids) == "cuda"
    shared = {
        "devices.device": edit.device,
        "devices.gpus": edit.gpus if edit.gpus != "auto" else None,
        "devices.gpu_ids": edit.device_ids or None,
        "devices.workers": edit.workers,
        # A single worker would work inside this process, which keeps the context of a GPU it has once used.
        "devices.isolate": edit.isolate or on_gpu,
        "logging.level": settings.log_level,
        "logging.folder": str(Path(settings.log_dir) / stage) if settings.log_dir else None,
    }
    return merge(Settings(), {**shared, **own})
