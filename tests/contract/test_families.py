"""What every family promises, over all that are found."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest

from imagemill.errors import BadModel
from imagemill.families import Family, families, family, family_for
from imagemill.plan import OPTIONAL_FIELDS, Defaults, PlannedModel, problems, resolve
from imagemill.records import Lora, Task

ALL = sorted(families().items())
UNBOUND = ("fake", "judge")
"""Families whose tasks may have any shape."""

SERVED = [(chosen, pipeline) for _, chosen in ALL for pipeline in chosen.pipelines]


def task_of(chosen: Family, **changes: object) -> Task:
    defaults = chosen.defaults
    task = Task(
        id="a",
        prompt="a cat",
        width=defaults.width or 512,
        height=defaults.height or 512,
        steps=defaults.steps,
        guidance_scale=defaults.guidance_scale,
        true_cfg_scale=defaults.true_cfg_scale,
        negative_prompt=defaults.negative_prompt,
        seed=1,
    )
    return replace(task, **changes)  # type: ignore[arg-type]


def test_the_expected_families_are_found() -> None:
    made = {"z_image", "generic", "flux", "qwen_image", "sdxl", "sd3", "fake", "judge"}
    assert made | {"flux2", "flux_kontext", "qwen_edit"} <= set(families())


def test_no_module_of_families_or_runners_imports_torch() -> None:
    code = """
import sys
from importlib import import_module
from pkgutil import iter_modules
for package in ("families", "runners"):
    for module in iter_modules(import_module(f"imagemill.{package}").__path__):
        import_module(f"imagemill.{package}.{module.name}")
from imagemill.families import families, family_for
from imagemill.records import Task
for family in families().values():
    family.group(Task("a", "p")), family.cost(Task("a", "p"))
print(sorted({"torch", "diffusers", "transformers", "peft"} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "chosen"), ALL)
def test_a_family_has_every_part_of_the_protocol_and_cannot_be_changed(name: str, chosen: Family) -> None:
    assert chosen.name == name
    assert isinstance(chosen.pipelines, tuple)
    assert isinstance(chosen.defaults, Defaults)
    assert chosen.fields <= {*OPTIONAL_FIELDS, "prompt_only", "answer"}
    assert chosen.multiple >= 1
    assert chosen.max_batch >= 1
    assert chosen.max_edit_batch >= 1
    assert (chosen.max_images > 0) == ("images" in chosen.fields)
    for stage in ("reference_sizes", "encode", "denoise", "decode"):
        wanted = list(inspect.signature(getattr(Family, stage)).parameters)[1:]
        assert list(inspect.signature(getattr(chosen, stage)).parameters) == wanted
    with pytest.raises(FrozenInstanceError):
        chosen.name = "other"


@pytest.mark.parametrize(("name", "chosen"), ALL)
def test_defaults_make_a_task_that_can_be_run(name: str, chosen: Family) -> None:
    size = {} if chosen.defaults.width else {"width": 512, "height": 512}
    model = PlannedModel("m", "r", chosen, chosen.defaults)
    if name == "judge":
        size = {}
    edits = "images" in chosen.fields and "prompt_only" not in chosen.fields
    task = Task(id="a", prompt="a cat", images=("a.png",) * edits, **size)  # type: ignore[arg-type]
    task = resolve(task, 0, Defaults(), model, "png")
    assert problems(task, chosen) == []
    for field in ("guidance_scale", "true_cfg_scale", "negative_prompt"):
        assert getattr(chosen.defaults, field) is None or field in chosen.fields


@pytest.mark.parametrize(("name", "chosen"), ALL)
def test_group_and_cost_are_pure_and_tell_shapes_apart(name: str, chosen: Family) -> None:
    task = task_of(chosen)
    assert chosen.group(task) == chosen.group(replace(task, id="b", prompt="a dog", seed=9))
    assert chosen.cost(task) == chosen.cost(replace(task, id="b", prompt="a dog", seed=9)) > 0
    if name == "judge":
        return  # what it judges may have any shape
    assert chosen.group(task) != chosen.group(replace(task, width=task.width + chosen.multiple))  # type: ignore[operator]
    assert chosen.group(task) != chosen.group(replace(task, steps=3))
    if "guidance_scale" in chosen.fields and name != "fake":
        assert chosen.group(task) != chosen.group(replace(task, guidance_scale=2.25))


@pytest.mark.parametrize(("name", "chosen"), [(name, chosen) for name, chosen in ALL if chosen.max_images])
def test_pictures_are_brought_to_sizes_that_the_model_takes(name: str, chosen: Family) -> None:
    task = task_of(chosen, width=512, height=256)
    many = [(4000, 3000), (31, 57), (5, 900)][: chosen.max_images]
    sizes = chosen.reference_sizes(task, many)
    assert len(sizes) == len(many)
    assert chosen.reference_sizes(task, []) == ()
    assert sizes == chosen.reference_sizes(task, many)
    if name not in UNBOUND:
        assert sizes[0] == (512, 256)
        assert all(side % chosen.multiple == 0 for size in sizes for side in size)
        assert all(width * height <= 1.2 * 512 * 256 for width, height in sizes)


@pytest.mark.parametrize("name", ["flux2", "flux_kontext", "qwen_edit"])
def test_a_picture_that_a_transformer_sees_has_a_megapixel_at_most(name: str) -> None:
    chosen = family(name)
    ((width, height),) = chosen.reference_sizes(task_of(chosen, width=2048, height=1024), [(9000, 9000)])
    assert (width, height) == (1456, 720)
    assert chosen.cost(task_of(chosen, images=("a",))) > chosen.cost(task_of(chosen))
    assert chosen.group(task_of(chosen, images=("a",))) != chosen.group(task_of(chosen, images=("a", "b")))


@pytest.mark.parametrize(("name", "chosen"), [(name, chosen) for name, chosen in ALL if name not in UNBOUND])
def test_cost_grows_with_steps_and_pixels(name: str, chosen: Family) -> None:
    task = task_of(chosen, width=512, height=512, steps=8)
    assert chosen.cost(replace(task, steps=16)) > 1.5 * chosen.cost(task)
    assert chosen.cost(replace(task, width=1024, height=1024)) > 2 * chosen.cost(task)


def test_the_cost_of_z_image_meets_the_measured_seconds() -> None:
    chosen = family("z_image")
    turbo = task_of(chosen)
    assert chosen.cost(turbo) == pytest.approx(0.056 + 8 * 0.157 + 0.091)
    assert chosen.cost(replace(turbo, guidance_scale=1.0)) > 1.9 * chosen.cost(turbo) - 0.1
    assert chosen.cost(replace(turbo, loras=(Lora("x"),))) > chosen.cost(turbo)
    assert chosen.cost(replace(turbo, loras=(Lora("x", 0.0),))) == chosen.cost(turbo)


def test_the_cost_of_a_judgment_grows_with_its_pictures_and_its_text() -> None:
    chosen = family("judge")
    one = Task("a", "how good?", images=("a.png",))
    assert chosen.cost(one) < chosen.cost(replace(one, images=("a.png", "b.png")))
    assert chosen.cost(one) < chosen.cost(replace(one, system_prompt="x" * 1000))


def test_the_cost_of_a_fake_task_is_its_delay() -> None:
    chosen = family("fake")
    assert chosen.cost(task_of(chosen, metadata={"fake": {"delay": 2}})) == pytest.approx(2.001)
    assert chosen.cost(task_of(chosen, metadata={"fake": "odd"})) == pytest.approx(0.001)


def test_classes_find_their_family_and_unknown_ones_the_generic() -> None:
    assert family_for("ZImagePipeline").name == "z_image"
    assert family_for("FluxPipeline").name == "flux"
    assert family_for("SanaPipeline").name == "generic"
    with pytest.raises(BadModel, match="no family 'nope'; known: "):
        family("nope")


def test_no_pipeline_is_served_by_two_families() -> None:
    names = [pipeline for _, pipeline in SERVED]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("chosen", "pipeline"), SERVED)
def test_the_installed_pipelines_take_the_fields_of_their_family(chosen: Family, pipeline: str) -> None:
    import diffusers

    kind = getattr(diffusers, pipeline)
    parameters = inspect.signature(kind.__call__).parameters
    named = {"image" if field == "images" else field for field in chosen.fields}
    assert named - {"loras", "prompt_only"} <= set(parameters)
    assert hasattr(kind, "load_lora_weights") == ("loras" in chosen.fields)
    assert {"callback_on_step_end", "generator", "output_type"} <= set(parameters)
