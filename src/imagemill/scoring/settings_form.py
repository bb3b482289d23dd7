"""The settings of `imagemill eval` as people write them: the YAML file in imagemill's own form, and the options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from imagemill.config.settings import Attention, Count, DeviceSettings, LoggingSettings, Precision, Scale, Switch
from imagemill.config.values import Size, as_schedule
from imagemill.config.wording import shown
from imagemill.plan import MAX_SEED, MAX_STEPS
from imagemill.scoring.benchmarks import ALIASES, LANGUAGES
from imagemill.scoring.rubrics import BRACED, PLACEHOLDERS, TWICE_BRACED
from imagemill.scoring.settings_wording import nearest

KINDS = ("vlm", "openai", "reference", "preservation", "fake")
"""Judges, one file each; the last three need no model, and `fake` is for tests of the machinery."""

Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
Steps: TypeAlias = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Seed: TypeAlias = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Section(BaseModel):
    """A part of a settings file: every key is known, no value is taken for another kind."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def as_names(value: Any) -> Any:
    """One name or a list of them, each once."""
    values = [value] if isinstance(value, str) else [] if value is None else value
    return tuple(dict.fromkeys(values)) if isinstance(values, list | tuple) and all(map(_hashable, values)) else values


def _hashable(value: Any) -> bool:
    return isinstance(value, str | int | float | None)


Names: TypeAlias = Annotated[tuple[Text, ...], BeforeValidator(as_names)]


def _as_language(value: Any) -> Any:
    name = ALIASES.get(value, value) if isinstance(value, str) else value
    if name not in LANGUAGES:
        raise ValueError(f"{shown(value)} is not one of {', '.join(LANGUAGES)}")
    return name


def as_template(value: Any) -> Any:
    """A template whose placeholders are those that a rubric fills in; other braces stay braces."""
    if not isinstance(value, str):
        return value
    if twice := TWICE_BRACED.search(value):
        raise ValueError(f"{twice.group()} is not filled in; write {{{twice[1]}}}")
    for name in BRACED.findall(value):
        if name not in PLACEHOLDERS:
            close = nearest(name, PLACEHOLDERS)
            hint = f"did you mean {{{close}}}?" if close else f"write {{{{{name}}}}} for plain braces"
            raise ValueError(f"{{{name}}} is not one of {', '.join(f'{{{known}}}' for known in PLACEHOLDERS)}; {hint}")
    return value


def as_judge(value: Any) -> Any:
    """`reference`, `vlm:MODEL`, `openai:MODEL` or a model's name as the fields of a judge; all else as it is."""
    if not isinstance(value, str):
        return value
    kind, colon, model = value.partition(":")
    if kind in KINDS:
        return {"kind": kind, "model": model} if colon else {"kind": kind}
    return {"kind": "vlm", "model": value} if "/" in value or value.startswith((".", "~")) else {"kind": value}


class EditForm(Section):
    """The model that edits, and how; `None` is the model's own default. `compile`, `precision` and `attention` are as in
    `imagemill run`."""

    model: Text
    dtype: Dtype = "auto"
    compile: Switch = "auto"
    precision: Precision = "bf16"
    attention: Attention = "auto"
    steps: Steps | None = None
    true_cfg_scale: Scale | None = None
    guidance_scale: Scale | None = None
    negative_prompt: str | None = None
    seed: Seed | None = None
    schedule: Annotated[str, BeforeValidator(lambda value: str(as_schedule(value)))] = "dynamic"
    size: Size | None = None


class JudgeForm(Section):
    """What scores the edits. `batch_size` of None is found from the free memory; `pixels` is the most that a picture has
    when the judge sees it; `concurrency` counts the requests under way at once."""

    kind: Literal["vlm", "openai", "reference", "preservation", "fake"]
    model: Text | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_new_tokens: Count = 512
    compare_with_original: bool = True
    base_url: Text | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    pixels: Annotated[int, Field(ge=3136, le=100_000_000)] = 1_048_576
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _agree(self) -> JudgeForm:
        if self.kind in ("vlm", "openai") and self.model is None:
            raise ValueError(f"{self.kind} needs a model; write its name as {self.kind}:MODEL, or as judge.model")
        if self.kind not in ("vlm", "openai") and self.model is not None:
            raise ValueError(f"{self.kind} takes no model; remove {shown(self.model)}")
        if (self.kind == "openai") != (self.base_url is not None):
            needs = (
                "needs a base_url, such as http://localhost:8000/v1" if self.base_url is None else "takes no base_url"
            )
            raise ValueError(f"{self.kind} {needs}")
        if self.base_url is not None and not re.match(r"https?://[^/@\s]+(/|$)", self.base_url):
            raise ValueError("base_url is no address such as http://localhost:8000/v1 (a key does not belong in it)")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env is the name of an environment variable, not the key itself")
        return self


class PromptForm(Section):
    """What the judge is told of one category."""

    system: Annotated[str, BeforeValidator(as_template)] = ""
    user: Annotated[Text, BeforeValidator(as_template)]


class EvalForm(Section):
    """All settings. `rubric` of None is `prompts` where there are some, else `default`."""

    bench: Text
    lang: Annotated[str, BeforeValidator(_as_language)] = "en"
    categories: Names = ()
    limit: Count | None = None
    out: Text = "eval-out"
    edit: EditForm
    judge: Annotated[JudgeForm, BeforeValidator(as_judge)]
    devices: DeviceSettings = DeviceSettings()
    rubric: Literal["default", "viescore", "prompts"] | None = None
    prompts: Mapping[Text, PromptForm] = Field(default_factory=dict)
    min_coverage: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.98
    controls: bool = False
    save_images: bool = True
    allow_urls: bool = False
    logging: LoggingSettings = LoggingSettings()

    @model_validator(mode="after")
    def _agree(self) -> EvalForm:
        if self.rubric == "prompts" and not self.prompts:
            raise ValueError("rubric prompts needs prompts; write prompts: {CATEGORY: {user: ...}}")
        return self
