"""The YAML file of the system that imagemill replaces, as settings of imagemill's own form.

`benchmark`, `diffusion_model`, `reward_model`, `prompts`, `evaluation`, `logging`: every key of it is known. Two things
are new in it: a `type` of `reward_model` may also be `reference` or `preservation`, which need no model, and `params` of
`diffusion_model` take a `guidance_scale`, which FLUX.1 Kontext reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from imagemill.config.settings import Count, Scale
from imagemill.config.values import as_tuple
from imagemill.scoring.settings_form import Dtype, Names, Section, Seed, Steps, Text, as_template
from imagemill.scoring.settings_wording import validated

EDITORS = {
    "qwen_image_edit": "qwen-image-edit",
    "multi_gpu_qwen_image_edit": "qwen-image-edit",
    "flux_kontext": "flux.1-kontext-dev",
}
"""Types of `diffusion_model`, and the model that each means without a `params.model_name`."""

VLMS = {"qwen3_vl": "Qwen/Qwen3-VL-8B-Instruct", "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct"}
"""Types of `reward_model` that are vision-language models, likewise."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

TOP = ("benchmark", "diffusion_model", "reward_model", "evaluation")
"""Keys that only the older form has."""


def _as_dtype(value: Any) -> Any:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return DTYPES.get(name, name) if isinstance(name, str) else name


def _as_level(value: Any) -> Any:
    name = value.lower() if isinstance(value, str) else value
    return "warning" if name == "warn" else name


class _Benchmark(Section):
    data_path: Text | None = None
    categories: Names = ()


class _EditParams(Section):
    model_name: Text | None = None
    device_ids: Annotated[tuple[Annotated[int, Field(ge=0, le=4095)], ...], BeforeValidator(as_tuple)] = ()
    dtype: Annotated[Dtype, BeforeValidator(_as_dtype)] = "auto"
    num_inference_steps: Steps | None = None
    true_cfg_scale: Scale | None = None
    guidance_scale: Scale | None = None
    negative_prompt: str | None = None
    seed: Seed | None = None
    enable_batch_sync: bool | None = None


class _DiffusionModel(Section):
    type: Literal["qwen_image_edit", "multi_gpu_qwen_image_edit", "flux_kontext"]
    params: _EditParams = _EditParams()


class _JudgeParams(Section):
    model_name: Text | None = None
    use_batch_inference: bool = True
    batch_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_new_tokens: Count | None = None
    compare_with_original: bool = True


class _RewardModel(Section):
    type: Literal["qwen3_vl", "qwen2_5_vl", "reference", "preservation"]
    params: _JudgeParams = _JudgeParams()

    @model_validator(mode="after")
    def _agree(self) -> _RewardModel:
        if self.type not in VLMS and self.params.model_name is not None:
            raise ValueError(f"{self.type} takes no model; remove params.model_name")
        return self


class _Prompt(Section):
    system_prompt: Annotated[str, BeforeValidator(as_template)] = ""
    user_prompt_template: Annotated[Text, BeforeValidator(as_template)]


class _Evaluation(Section):
    metrics: Names = ()
    output_dir: Text | None = None
    save_generated_images: bool = True


class _Logging(Section):
    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_as_level)] = "info"
    log_dir: Text | None = None


class OldForm(Section):
    """The older file. What it leaves out may be given as options."""

    benchmark: _Benchmark = _Benchmark()
    diffusion_model: _DiffusionModel | None = None
    reward_model: _RewardModel | None = None
    prompts: Mapping[Text, _Prompt] = Field(default_factory=dict)
    evaluation: _Evaluation = _Evaluation()
    logging: _Logging = _Logging()


def translated(data: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    """The data of an older file in imagemill's own form. Raises `ConfigError`.

    `evaluation.metrics` is taken and has no effect: a report always holds all of them.
    """
    old = validated(OldForm, data, prefix)
    found = {
        "bench": old.benchmark.data_path,
        "categories": old.benchmark.categories,
        "out": old.evaluation.output_dir,
        "save_images": old.evaluation.save_generated_images,
        "prompts": {
            name: {"system": prompt.system_prompt, "user": prompt.user_prompt_template}
            for name, prompt in old.prompts.items()
        },
        "logging": _given(level=old.logging.level, folder=old.logging.log_dir),
        "edit": _editor(old.diffusion_model) if old.diffusion_model else None,
        "devices": {"gpu_ids": old.diffusion_model.params.device_ids} if old.diffusion_model else None,
        "judge": _judge(old.reward_model) if old.reward_model else None,
    }
    return _given(**found)


def _editor(old: _DiffusionModel) -> dict[str, Any]:
    """Batch synchronisation is what the type with several GPUs does unless it is told otherwise."""
    params, sync = old.params, old.params.enable_batch_sync
    in_step = old.type == "multi_gpu_qwen_image_edit" if sync is None else sync
    return _given(
        model=params.model_name or EDITORS[old.type],
        dtype=params.dtype,
        steps=params.num_inference_steps,
        true_cfg_scale=params.true_cfg_scale,
        guidance_scale=params.guidance_scale,
        negative_prompt=params.negative_prompt,
        seed=params.seed,
        schedule="lockstep" if in_step else "dynamic",
    )


def _judge(old: _RewardModel) -> dict[str, Any]:
    params = old.params
    return _given(
        kind="vlm" if old.type in VLMS else old.type,
        model=params.model_name or VLMS.get(old.type),
        batch_size=params.batch_size if params.use_batch_inference else 1,
        max_new_tokens=params.max_new_tokens,
        compare_with_original=params.compare_with_original,
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
