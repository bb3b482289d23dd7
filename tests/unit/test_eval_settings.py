"""Settings of an evaluation: both forms of the file, options above it, and every mistake with its place and mend."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from imagemill.config import merge, settings_from
from imagemill.errors import ConfigError
from imagemill.scoring.settings import EditModel, EvalSettings, Judge, load_eval_settings, override
from imagemill.scoring.settings_data import OPTIONS
from imagemill.scoring.settings_form import EvalForm, as_judge
from imagemill.scoring.settings_wording import keys

ROOT = Path(__file__).parents[2]

OWN = """
bench: data/bench.jsonl
lang: cn
categories: [物理, 环境]
limit: 10
out: results
edit: {model: qwen-image-edit, dtype: bfloat16, steps: 40, true_cfg_scale: 4, guidance_scale: 1.5,
       negative_prompt: " ", seed: 7, schedule: "window:2", size: 512x768}
judge: {kind: openai, model: gpt, batch_size: 4, max_new_tokens: 100, compare_with_original: false,
        base_url: "http://localhost:8000/v1", api_key_env: MY_KEY, concurrency: 3, pixels: 250000, dtype: float16}
devices: {device: cuda, gpu_ids: [0, 2], workers: 2, isolate: true}
rubric: viescore
prompts: {物理: {system: strict, user: "{edit_instruction}"}}
min_coverage: 0.5
controls: true
save_images: false
logging: {level: debug, folder: logs}
"""

OLD = """
benchmark: {data_path: data/bench.json, categories: [物理]}
diffusion_model:
  type: multi_gpu_qwen_image_edit
  params: {model_name: Qwen/Qwen-Image-Edit-2509, device_ids: [0, 1, 2, 3, 4, 5], dtype: torch.bfloat16,
           num_inference_steps: 50, true_cfg_scale: 4.0, negative_prompt: " ", seed: 42, enable_batch_sync: true}
reward_model:
  type: qwen3_vl
  params: {model_name: Qwen/Qwen3-VL-30B, use_batch_inference: true, batch_size: 8, max_new_tokens: 256,
           compare_with_original: false}
prompts:
  物理: {system_prompt: strict, user_prompt_template: "{original_description} -> {edit_instruction}"}
evaluation: {metrics: [mean, std], output_dir: ../results, save_generated_images: false}
logging: {level: INFO, log_dir: logs}
"""

SMALL = "bench: b.jsonl\nedit: {model: tiny-edit}\njudge: reference\n"
OLD_SMALL = "benchmark: {data_path: b}\ndiffusion_model: {type: flux_kontext}\nreward_model: {type: reference}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run" / "eval.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def loaded(tmp_path: Path, text: str, **options: Any) -> EvalSettings:
    return load_eval_settings(write(tmp_path, text), **options)


def refusal(tmp_path: Path, text: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text, **options)
    return str(caught.value).replace(str(tmp_path / "run" / "eval.yaml"), "eval.yaml")


def changed(text: str, section: str, **values: Any) -> str:
    """The YAML with these values in a section (`a.b`), or without those that are None."""
    data = yaml.safe_load(text)
    target = data
    for name in filter(None, section.split(".")):
        target = target.setdefault(name, {})
    target.update(values)
    return yaml.safe_dump({key: value for key, value in data.items() if value is not None}, allow_unicode=True)


# --- the two forms ----------------------------------------------------------------------------------------------------


def test_every_setting_of_the_own_form_arrives(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert loaded(tmp_path, OWN) == EvalSettings(
        bench=str(run / "data/bench.jsonl"),
        lang="zh",
        categories=("物理", "环境"),
        limit=10,
        out=str(run / "results"),
        edit=EditModel(
            model="qwen-image-edit", device_ids=(0, 2), device="cuda", workers=2, isolate=True, dtype="bfloat16",
            steps=40, true_cfg_scale=4.0, guidance_scale=1.5, negative_prompt=" ", seed=7, schedule="window:2",
            size=(512, 768),
        ),
        judge=Judge(
            kind="openai", model="gpt", batch_size=4, max_new_tokens=100, compare_with_original=False,
            base_url="http://localhost:8000/v1", api_key_env="MY_KEY", concurrency=3, pixels=250_000, dtype="float16",
        ),
        rubric="viescore",
        prompts={"物理": ("strict", "{edit_instruction}")},
        min_coverage=0.5,
        controls=True,
        save_images=False,
        log_level="debug",
        log_dir=str(run / "logs"),
    )  # fmt: skip


def test_every_setting_of_the_older_form_arrives(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert loaded(tmp_path, OLD) == EvalSettings(
        bench=str(run / "data/bench.json"),
        categories=("物理",),
        out=str(tmp_path / "results"),
        edit=EditModel(
            model="Qwen/Qwen-Image-Edit-2509", device_ids=(0, 1, 2, 3, 4, 5), dtype="bfloat16", steps=50,
            true_cfg_scale=4.0, negative_prompt=" ", seed=42, schedule="lockstep",
        ),
        judge=Judge(
            kind="vlm", model="Qwen/Qwen3-VL-30B", batch_size=8, max_new_tokens=256, compare_with_original=False,
        ),
        rubric="prompts",
        prompts={"物理": ("strict", "{original_description} -> {edit_instruction}")},
        save_images=False,
        log_dir=str(run / "logs"),
    )  # fmt: skip


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    settings = loaded(tmp_path, SMALL)
    assert settings == EvalSettings(
        bench=str(tmp_path / "run/b.jsonl"),
        out=os.path.abspath("eval-out"),
        edit=EditModel("tiny-edit"),
        judge=Judge("reference"),
    )
    assert (settings.min_coverage, settings.rubric, settings.lang, settings.log_dir) == (0.98, "default", "en", None)


def test_the_records_and_the_form_have_the_same_defaults() -> None:
    form = EvalForm.model_validate({"bench": "b", "edit": {"model": "m"}, "judge": "reference"})
    assert override(bench="b", edit_model="m", judge="reference") == EvalSettings(
        os.path.abspath("b"), os.path.abspath(form.out), EditModel("m"), Judge("reference")
    )


@pytest.mark.parametrize(
    ("kind", "sync", "model", "schedule"),
    [
        ("qwen_image_edit", None, "qwen-image-edit", "dynamic"),
        ("qwen_image_edit", True, "qwen-image-edit", "lockstep"),
        ("multi_gpu_qwen_image_edit", None, "qwen-image-edit", "lockstep"),
        ("multi_gpu_qwen_image_edit", False, "qwen-image-edit", "dynamic"),
        ("flux_kontext", None, "flux.1-kontext-dev", "dynamic"),
    ],
)
def test_a_type_of_diffusion_model_is_a_model_and_a_schedule(
    tmp_path: Path, kind: str, sync: bool | None, model: str, schedule: str
) -> None:
    params = {} if sync is None else {"enable_batch_sync": sync}
    edit = loaded(tmp_path, changed(OLD_SMALL, "diffusion_model", type=kind, params=params)).edit
    assert (edit.model, edit.schedule, edit.device_ids, edit.gpus) == (model, schedule, (), "auto")


@pytest.mark.parametrize(
    ("kind", "params", "judge"),
    [
        ("qwen3_vl", {}, Judge("vlm", "Qwen/Qwen3-VL-8B-Instruct")),
        ("qwen2_5_vl", {}, Judge("vlm", "Qwen/Qwen2.5-VL-7B-Instruct")),
        ("qwen2_5_vl", {"use_batch_inference": False}, Judge("vlm", "Qwen/Qwen2.5-VL-7B-Instruct", 1)),
        ("qwen3_vl", {"use_batch_inference": False, "batch_size": 8, "model_name": "a/b"}, Judge("vlm", "a/b", 1)),
        ("preservation", {}, Judge("preservation")),
    ],
)
def test_a_type_of_reward_model_is_a_judge(tmp_path: Path, kind: str, params: dict[str, Any], judge: Judge) -> None:
    assert loaded(tmp_path, changed(OLD_SMALL, "reward_model", type=kind, params=params)).judge == judge


@pytest.mark.parametrize(("level", "meant"), [("DEBUG", "debug"), ("Warn", "warning"), ("error", "error")])
def test_levels_of_the_older_form_may_be_in_capitals(tmp_path: Path, level: str, meant: str) -> None:
    assert loaded(tmp_path, changed(OLD_SMALL, "logging", level=level)).log_level == meant


@pytest.mark.parametrize(("text", "meant"), [("bf16", "bfloat16"), ("torch.float16", "float16"), ("fp32", "float32")])
def test_dtypes_of_the_older_form_have_many_names(tmp_path: Path, text: str, meant: str) -> None:
    assert loaded(tmp_path, changed(OLD_SMALL, "diffusion_model.params", dtype=text)).edit.dtype == meant


def test_the_example_is_an_older_file_that_runs_without_a_gpu() -> None:
    path = ROOT / "examples/config_multi_gpu.yaml"
    settings = load_eval_settings(path)
    assert settings.bench == str(ROOT / "examples/bench_tiny")
    assert (settings.edit.model, settings.edit.schedule, settings.edit.device_ids) == ("tiny-edit", "lockstep", ())
    assert settings.judge == Judge("reference")
    assert set(settings.prompts) == {"background", "color", "geometry", "object", "tone"}
    assert settings.out == str(ROOT / "outputs/eval_tiny")


def test_the_commented_lines_of_the_example_are_settings_too(tmp_path: Path) -> None:
    text = (ROOT / "examples/config_multi_gpu.yaml").read_text("utf-8")
    text = text.replace("  type: reference ", "  # was: ").replace("  # type: qwen3_vl", "  type: qwen3_vl")
    for line in text.splitlines():
        plain = line.replace("# ", "", 1)
        if line.lstrip().startswith(("# params", "#   ", "# device_ids", "# dtype", "# num", "# true", "# neg")):
            text = text.replace(line, plain)
    settings = loaded(tmp_path, text)
    assert settings.edit.device_ids == (0, 1, 2, 3, 4, 5)
    assert (settings.edit.steps, settings.edit.true_cfg_scale, settings.edit.negative_prompt) == (50, 4.0, " ")
    assert settings.judge == Judge("vlm", "Qwen/Qwen3-VL-8B-Instruct", 4)


# --- judges and models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("reference", {"kind": "reference"}),
        ("vlm:Qwen/Qwen3-VL-8B-Instruct", {"kind": "vlm", "model": "Qwen/Qwen3-VL-8B-Instruct"}),
        ("Qwen/Qwen3-VL-8B-Instruct", {"kind": "vlm", "model": "Qwen/Qwen3-VL-8B-Instruct"}),
        ("./judge", {"kind": "vlm", "model": "./judge"}),
        ("openai:gpt-5:mini", {"kind": "openai", "model": "gpt-5:mini"}),
    ],
)
def test_a_judge_may_be_written_in_one_word(text: str, meant: dict[str, str]) -> None:
    assert as_judge(text) == meant


def test_folders_of_models_are_relative_to_the_file_and_names_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "models/edit").mkdir(parents=True)
    text = changed(SMALL, "", edit={"model": "models/edit"}, judge="./models/judge")
    settings = loaded(tmp_path, text)
    assert (settings.edit.model, settings.judge.model) == (str(run / "models/edit"), str(run / "models/judge"))
    named = loaded(tmp_path, changed(SMALL, "", edit={"model": "Qwen/Edit"}, judge="vlm:Qwen/VL"))
    assert (named.edit.model, named.judge.model) == ("Qwen/Edit", "Qwen/VL")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "values", "text"),
    [
        ("", {"categorys": []}, "categorys: is not a known key; did you mean categories?"),
        ("", {"true_cfg_scale": 1}, "true_cfg_scale: is not a known key; did you mean edit.true_cfg_scale?"),
        ("", {"bench": ""}, "bench: is empty; write one or remove it"),
        ("", {"bench": 3}, "bench: 3 is not text"),
        ("", {"limit": 0}, "limit: 0 is out of range; it must be >= 1"),
        ("", {"lang": "fr"}, "lang: 'fr' is not one of en, zh, intersection, zh-intersection"),
        ("", {"categories": [3]}, "categories[0]: 3 is not text"),
        ("", {"min_coverage": 98}, "min_coverage: 98 is out of range; it must be <= 1"),
        ("", {"rubric": "vie"}, "rubric: 'vie' is not one of default, viescore, prompts"),
        ("", {"controls": "yes"}, "controls: 'yes' is not true or false"),
        ("", {"edit": 3}, "edit: 3 is not an object"),
        ("", {"judge": "referenc"}, "judge.kind: 'referenc' is not one of vlm, openai, reference, preservation"),
        ("", {"judge": "vlm"}, "judge: vlm needs a model; write its name as vlm:MODEL, or as judge.model"),
        ("edit", {"step": 3}, "edit.step: is not a known key; did you mean edit.steps?"),
        ("edit", {"gpu_ids": [0]}, "edit.gpu_ids: is not a known key; did you mean devices.gpu_ids?"),
        ("edit", {"steps": 0}, "edit.steps: 0 is out of range; it must be >= 1"),
        ("edit", {"seed": True}, "edit.seed: true is not a whole number"),
        ("edit", {"size": "big"}, "edit.size: 'big' is not a size; write WIDTHxHEIGHT, such as 1024x1024"),
        ("edit", {"dtype": "int8"}, "edit.dtype: 'int8' is not one of auto, bfloat16, float16, float32"),
        ("edit", {"schedule": "sync"}, "edit.schedule: 'sync' is not one of dynamic, static, lockstep, window:K"),
        ("devices", {"gpu_ids": [1, 1]}, "devices: gpu_ids names a GPU twice: [1, 1]; name each once"),
        ("prompts.a", {"user": "{edit_instructon}"}, "prompts.a.user: {edit_instructon} is not one of"),
        (
            "prompts.a",
            {"user": "a", "sytem": ""},
            "prompts.a.sytem: is not a known key; did you mean prompts.a.system?",
        ),
        ("prompts.a", {"system": "a"}, "prompts.a.user: is missing; write one"),
        ("logging", {"level": "loud"}, "logging.level: 'loud' is not one of debug, info, warning, error"),
    ],
)
def test_a_mistake_names_file_field_value_and_mend(
    tmp_path: Path, section: str, values: dict[str, Any], text: str
) -> None:
    found = refusal(tmp_path, changed(SMALL, section, **values))
    assert found.startswith(f"eval.yaml: {text}")
    assert "\n" not in found


@pytest.mark.parametrize(
    ("judge", "text"),
    [
        ({"kind": "reference", "model": "a"}, "reference takes no model; remove 'a'"),
        ({"kind": "openai", "model": "a"}, "openai needs a base_url, such as http://localhost:8000/v1"),
        ({"kind": "vlm", "model": "a", "base_url": "http://a"}, "vlm takes no base_url"),
        ({"kind": "openai", "model": "a", "base_url": "localhost"}, "base_url is no address such as http://localhost"),
        ({"kind": "openai", "model": "a", "base_url": "https://me:key@a/v1"}, "base_url is no address such as"),
    ],
)
def test_a_judge_that_does_not_fit_together_is_refused(tmp_path: Path, judge: dict[str, Any], text: str) -> None:
    assert refusal(tmp_path, changed(SMALL, "", judge=judge)).startswith(f"eval.yaml: judge: {text}")


def test_a_key_in_place_of_its_variable_is_refused_and_not_shown(tmp_path: Path) -> None:
    judge = {"kind": "openai", "model": "a", "base_url": "http://a", "api_key_env": "sk-secret"}
    found = refusal(tmp_path, changed(SMALL, "", judge=judge))
    assert found == "eval.yaml: judge: api_key_env is the name of an environment variable, not the key itself"


@pytest.mark.parametrize(
    ("section", "values", "text"),
    [
        ("", {"benchmrk": 1}, "benchmrk: is not a known key; did you mean benchmark?"),
        ("benchmark", {"category": []}, "benchmark.category: is not a known key; did you mean benchmark.categories?"),
        ("diffusion_model", {"type": "sdxl"}, "diffusion_model.type: 'sdxl' is not one of qwen_image_edit, multi_gpu_qwen"),
        (
            "diffusion_model.params", {"num_steps": 1},
            "diffusion_model.params.num_steps: is not a known key; did you mean diffusion_model.params.num_inference_steps?",
        ),
        ("diffusion_model.params", {"device_ids": 0}, "diffusion_model.params.device_ids: 0 is not a list"),
        ("diffusion_model.params", {"dtype": "int8"}, "diffusion_model.params.dtype: 'int8' is not one of auto, bfloat16"),
        ("reward_model", {"type": "gpt"}, "reward_model.type: 'gpt' is not one of qwen3_vl, qwen2_5_vl, reference, pres"),
        ("reward_model.params", {"model_name": "a"}, "reward_model: reference takes no model; remove params.model_name"),
        ("reward_model.params", {"batch_size": 0}, "reward_model.params.batch_size: 0 is out of range; it must be >= 1"),
        (
            "prompts.物理", {"user_prompt_template": "{edit_instruct}"},
            "prompts.物理.user_prompt_template: {edit_instruct} is not one of {original_description}, {edit_instruction}; "
            "did you mean {edit_instruction}?",
        ),
        ("prompts.a", {"user_prompt_template": "{score}"}, "prompts.a.user_prompt_template: {score} is not one of {orig"),
        ("prompts.a", {"user_prompt_template": "{{edit_instruction}}"}, "prompts.a.user_prompt_template: {{edit_ins"),
        ("evaluation", {"output": "a"}, "evaluation.output: is not a known key; did you mean evaluation.output_dir?"),
        ("logging", {"level": "LOUD"}, "logging.level: 'loud' is not one of debug, info, warning, error"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_older_form_is_worded_in_its_own_keys(
    tmp_path: Path, section: str, values: dict[str, Any], text: str
) -> None:
    found = refusal(tmp_path, changed(OLD_SMALL, section, **values))
    assert found.startswith(f"eval.yaml: {text}")
    assert "\n" not in found


def test_braces_of_json_in_a_prompt_are_no_placeholders(tmp_path: Path) -> None:
    for template in ('{"score": 1}', "{{score}}", 'a {edit_instruction} {"a": {"b": 2}}', "{ }"):
        text = changed(OLD_SMALL, "prompts.a", user_prompt_template=template)
        assert loaded(tmp_path, text).prompts == {"a": ("", template)}


def test_what_is_needed_is_asked_for_in_both_forms_words(tmp_path: Path) -> None:
    assert refusal(tmp_path, "limit: 3").splitlines() == [
        "eval.yaml: bench: is missing; name the benchmark's file or folder (in the older form benchmark.data_path)",
        "eval.yaml: edit.model: is missing; name the model that edits, or give --edit-model "
        "(in the older form diffusion_model.type)",
        "eval.yaml: judge.kind: is missing; write judge: vlm:MODEL, openai:MODEL, reference or preservation, "
        "or give --judge (in the older form reward_model.type)",
    ]
    assert len(refusal(tmp_path, "evaluation: {metrics: [mean]}").splitlines()) == 3


def test_prompts_are_needed_for_the_rubric_of_that_name(tmp_path: Path) -> None:
    assert refusal(tmp_path, SMALL + "rubric: prompts\n") == (
        "eval.yaml: rubric prompts needs prompts; write prompts: {CATEGORY: {user: ...}}"
    )


def test_a_file_of_both_forms_or_of_none_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, SMALL + "benchmark: {data_path: a}\n") == (
        "eval.yaml: bench: is a key of imagemill's own form beside benchmark of the older one; keep one"
    )
    for text in ("", "[1]", "text"):
        assert refusal(tmp_path, text) == "eval.yaml: holds no settings; write lines such as 'bench: bench.jsonl'"
    assert refusal(tmp_path, "a: [").startswith("eval.yaml, line 1, column ")
    with pytest.raises(ConfigError, match="there is no such file"):
        load_eval_settings(tmp_path / "no.yaml")


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_stand_above_a_file_of_either_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in (OWN, OLD):
        base = loaded(tmp_path, text)
        found = loaded(
            tmp_path, text, bench="b", out="o", categories=["a"], limit=3, gpus=2, edit_model="tiny-edit",
            judge="preservation", controls=True, log_dir="l", workers=None,
        )  # fmt: skip
        assert found == replace(
            base,
            bench=str(tmp_path / "b"),
            out=str(tmp_path / "o"),
            categories=("a",),
            limit=3,
            controls=True,
            log_dir=str(tmp_path / "l"),
            edit=replace(base.edit, model="tiny-edit", gpus=2, device_ids=()),
            judge=replace(base.judge, kind="preservation", model=None, base_url=None),
        )


def test_options_give_what_the_file_leaves_out(tmp_path: Path) -> None:
    found = loaded(tmp_path, "benchmark: {data_path: b}\n", edit_model="m", judge="reference")
    assert (found.edit.model, found.judge.kind, found.bench) == ("m", "reference", str(tmp_path / "run/b"))


def test_settings_may_come_from_options_alone() -> None:
    found = override(bench="b", edit_model="m", judge="openai:gpt", base_url="http://a/v1", gpu_ids=[1])
    assert found.judge == Judge("openai", "gpt", base_url="http://a/v1")
    assert (found.bench, found.edit.device_ids) == (os.path.abspath("b"), (1,))
    with pytest.raises(ConfigError) as caught:
        override(bench="b", judge="reference")
    assert str(caught.value).startswith("edit.model: is missing; name the model that edits, or give --edit-model")


def test_overriding_with_nothing_changes_nothing(tmp_path: Path) -> None:
    for text in (OWN, OLD, SMALL, OLD_SMALL):
        settings = loaded(tmp_path, text)
        assert override(settings) == override(settings, limit=None) == settings


def test_a_judge_of_the_same_kind_keeps_what_is_not_named(tmp_path: Path) -> None:
    settings = loaded(tmp_path, OWN)
    assert override(settings, judge="openai:other").judge == replace(settings.judge, model="other")
    assert override(settings, judge_model="other").judge == replace(settings.judge, model="other")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"judge": "vlm"}, "--judge: vlm needs a model; write its name as vlm:MODEL, or as judge.model"),
        ({"judge": "no"}, "--judge: 'no' is not one of vlm, openai, reference, preservation, fake"),
        ({"limit": 0}, "--limit: 0 is out of range; it must be >= 1"),
        ({"min_coverage": 2.0}, "--min-coverage: 2.0 is out of range; it must be <= 1"),
        ({"gpus": 0}, "--gpus: 0 is no number of GPUs; write auto or a whole number from 1"),
        ({"size": "x"}, "--size: 'x' is not a size; write WIDTHxHEIGHT, such as 1024x1024"),
        ({"steps": 0}, "--steps: 0 is out of range; it must be >= 1"),
        ({"edit_modle": "a"}, "edit_modle: is no setting of an evaluation; did you mean edit_model?"),
    ],
)
def test_a_mistake_in_an_option_names_the_option(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    assert refusal(tmp_path, SMALL, **options) == text
    with pytest.raises(ConfigError) as caught:
        override(loaded(tmp_path, SMALL), **options)
    assert str(caught.value) == text


def test_every_key_has_an_option_and_every_record_field_a_key() -> None:
    known = set(keys(EvalForm))
    assert set(OPTIONS.values()) <= known
    sections = {"edit", "devices", "logging", "prompts"}
    unreachable = {key for key in known - set(OPTIONS.values()) - sections if not key.startswith("prompts.")}
    assert unreachable == {"judge.kind"}
    of_edit = {name.partition(".")[2] for name in known if name.startswith(("edit.", "devices."))}
    assert {field.name for field in fields(EditModel)} == (of_edit - {"gpu_ids"}) | {"device_ids"}
    assert {f"judge.{field.name}" for field in fields(Judge)} == {key for key in known if key.startswith("judge.")}


def test_the_devices_and_the_schedule_are_what_a_run_takes(tmp_path: Path) -> None:
    edit = loaded(tmp_path, OWN).edit
    run = merge(settings_from(None, {}), {"schedule": edit.schedule, "devices.gpu_ids": edit.device_ids})
    assert str(run.schedule) == "window:2"
