"""The settings of an evaluation, resolved: what is edited, by which model, what scores it and how.

They come from a YAML file in imagemill's own form or in that of the system it replaces, from options, or from both; an
option stands above the file. Every key is known or refused, and an error names file, field, value and mend in one line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from imagemill.config.file import read_yaml as read_yaml
from imagemill.errors import ConfigError
from imagemill.scoring import old_settings
from imagemill.scoring.settings_data import OPTIONS, chosen, local, merged
from imagemill.scoring.settings_form import EvalForm
from imagemill.scoring.settings_wording import validated

JudgeKind: TypeAlias = Literal["vlm", "openai", "reference", "preservation", "fake"]
Rubric: TypeAlias = Literal["default", "viescore", "prompts"]
Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]

MISSING = {
    "bench": "name the benchmark's file or folder (in the older form benchmark.data_path)",
    "edit.model": "name the model that edits, or give --edit-model (in the older form diffusion_model.type)",
    "judge.kind": "write judge: vlm:MODEL, openai:MODEL, reference or preservation, or give --judge "
    "(in the older form reward_model.type)",
}


@dataclass(frozen=True, slots=True)
class EditModel:
    """The model that edits, and the devices of both stages. None is the model's own default.

    `device_ids` are the numbers that nvidia-smi shows, and empty where `gpus` counts them; `schedule` is a policy as a
    user writes it (`dynamic`, `lockstep`, `window:3`); `size` is width and height in pixels, None for the source's aspect.
    `compile`, `precision` and `attention` are as in a run's settings.
    """

    model: str
    gpus: int | Literal["auto"] = "auto"
    device_ids: tuple[int, ...] = ()
    device: Literal["auto", "cuda", "cpu"] = "auto"
    workers: int | None = None
    isolate: bool = False
    dtype: Dtype = "auto"
    steps: int | None = None
    true_cfg_scale: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    schedule: str = "dynamic"
    size: tuple[int, int] | None = None
    compile: Literal["auto", "on", "off"] = "auto"
    precision: Literal["bf16", "fp8"] = "bf16"
    attention: str = "auto"


@dataclass(frozen=True, slots=True)
class Judge:
    """What scores the edits.

    `batch_size` of None is found from the free memory. `pixels` is the most that a picture has when the judge sees it.
    `api_key_env` names the environment variable of the key; the key itself stands in no settings.
    """

    kind: JudgeKind
    model: str | None = None
    batch_size: int | None = None
    max_new_tokens: int = 512
    compare_with_original: bool = True
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    pixels: int = 1_048_576
    dtype: Dtype = "auto"


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """All settings of an evaluation; paths are absolute.

    `prompts` are (system, user) by category, for the rubric of that name. `min_coverage` is the share of items that need
    a score for exit code 0. `allow_urls` has pictures fetched that the benchmark names by an address of the web.
    `log_dir` of None is inside `out`.
    """

    bench: str
    out: str
    edit: EditModel
    judge: Judge
    lang: str = "en"
    categories: tuple[str, ...] = ()
    limit: int | None = None
    rubric: Rubric = "default"
    prompts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    min_coverage: float = 0.98
    controls: bool = False
    save_images: bool = True
    allow_urls: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_dir: str | None = None


def load_eval_settings(path: str | os.PathLike[str], **options: Any) -> EvalSettings:
    """The settings of a YAML file of either form, with the options that are not None above it.

    Paths in the file are relative to its folder, those of options to the current one. Raises `ConfigError`, one line for
    each mistake.
    """
    place = Path(path)
    data = read_yaml(place)
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"{place}: holds no settings; write lines such as 'bench: bench.jsonl'")
    prefix = f"{place}: "
    old = [key for key in old_settings.TOP if key in data]
    own = [key for key in EvalForm.model_fields if key in data and key not in old_settings.OldForm.model_fields]
    if old and own:
        raise ConfigError(
            f"{prefix}{own[0]}: is a key of imagemill's own form beside {old[0]} of the older one; keep one"
        )
    form = old_settings.translated(data, prefix) if old else data
    return _resolved(local(form, place.parent), options, prefix)


def override(settings: EvalSettings | None = None, **options: Any) -> EvalSettings:
    """The settings with the options (`OPTIONS`) that are not None put in; without settings those of the options alone.

    Another judge takes the place of the whole old one as far as models and addresses go, a choice of GPUs that of the
    other kind of choice. Raises `ConfigError` with the names of options.
    """
    return _resolved(_as_form(settings) if settings else {}, options, "")


def _resolved(form: Mapping[Any, Any], options: Mapping[str, Any], prefix: str) -> EvalSettings:
    given = chosen(options)
    names = {OPTIONS[name]: f"--{name.replace('_', '-')}" for name in given}
    if "judge" in given:
        names = {"judge.kind": "--judge", "judge.model": "--judge", **names}
    return _settings(validated(EvalForm, merged(form, given), prefix, names, MISSING))


# --- between form and settings ----------------------------------------------------------------------------------------


def _settings(form: EvalForm) -> EvalSettings:
    devices = form.devices
    edit = EditModel(
        gpus=devices.gpus,
        device_ids=devices.gpu_ids,
        device=devices.device,
        workers=devices.workers,
        isolate=devices.isolate,
        **dict(form.edit),
    )
    prompts = {name: (prompt.system, prompt.user) for name, prompt in form.prompts.items()}
    return EvalSettings(
        bench=form.bench,
        out=os.path.abspath(form.out),
        edit=edit,
        judge=Judge(**dict(form.judge)),
        lang=form.lang,
        categories=form.categories,
        limit=form.limit,
        rubric=form.rubric or ("prompts" if prompts else "default"),
        prompts=prompts,
        min_coverage=form.min_coverage,
        controls=form.controls,
        save_images=form.save_images,
        allow_urls=form.allow_urls,
        log_level=form.logging.level,
        log_dir=form.logging.folder,
    )


def _as_form(settings: EvalSettings) -> dict[str, Any]:
    edit, judge = settings.edit, settings.judge
    devices = {"gpus": edit.gpus, "gpu_ids": edit.device_ids}
    devices |= {name: getattr(edit, name) for name in ("device", "workers", "isolate")}
    names = (
        "model",
        "dtype",
        "steps",
        "true_cfg_scale",
        "guidance_scale",
        "negative_prompt",
        "seed",
        "schedule",
        "size",
        "compile",
        "precision",
        "attention",
    )
    top = (
        "bench",
        "out",
        "lang",
        "categories",
        "limit",
        "rubric",
        "min_coverage",
        "controls",
        "save_images",
        "allow_urls",
    )
    return {
        **{name: getattr(settings, name) for name in top},
        "edit": {name: getattr(edit, name) for name in names},
        "judge": {name: getattr(judge, name) for name in Judge.__slots__},
        "devices": devices,
        "prompts": {name: {"system": system, "user": user} for name, (system, user) in settings.prompts.items()},
        "logging": {"level": settings.log_level, "folder": settings.log_dir},
    }
