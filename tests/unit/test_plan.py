"""Plan: a task as the user wrote it becomes a task of which everything is known, or the reasons why not."""

from __future__ import annotations

import dataclasses
import string
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from imagemill import plan
from imagemill.plan import DEFAULT_SEED, MAX_SEED, OPTIONAL_FIELDS, Defaults, PlannedModel
from imagemill.records import Lora, Task

stable = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Everything:
    """A family that takes every field."""

    name: str = "everything"
    fields: frozenset[str] = frozenset({*OPTIONAL_FIELDS, "prompt_only"})
    multiple: int = 16
    max_images: int = 2

    def group(self, task: Task) -> str:
        return f"{task.steps}"

    def cost(self, task: Task) -> float:
        return float(task.steps or 0)


def model(family: Any = None, **defaults: Any) -> PlannedModel:
    return PlannedModel("m", "revision 1", family or Everything(), Defaults(**defaults))


def resolved(index: int = 0, run: Defaults | None = None, on: PlannedModel | None = None, **fields: Any) -> Task:
    return plan.resolve(Task(**{"id": "a", "prompt": "p", **fields}), index, run or Defaults(), on or model(), "png")


WHOLE = Task(
    id="a",
    prompt="a cat",
    negative_prompt="rain",
    images=("in.png",),
    model="m",
    width=64,
    height=32,
    steps=4,
    guidance_scale=1.5,
    true_cfg_scale=2.5,
    seed=7,
    loras=(Lora("x.safetensors", 0.5, "d1"), Lora("y.safetensors", 1.0, "d2")),
    output_path="a.png",
    system_prompt="be fair",
)


# --- resolving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["width", "height", "steps", "guidance_scale", "true_cfg_scale", "negative_prompt"])
def test_the_task_goes_before_the_run_and_the_run_before_the_model(name: str) -> None:
    values = ("x", "y", "z") if name == "negative_prompt" else (16, 32, 48)
    task, run, own = ({name: value} for value in values)
    assert getattr(resolved(on=model(**own)), name) == values[2]
    assert getattr(resolved(run=Defaults(**run), on=model(**own)), name) == values[1]
    assert getattr(resolved(run=Defaults(**run), on=model(**own), **task), name) == values[0]
    assert getattr(resolved(), name) is None


@pytest.mark.parametrize("name", ["guidance_scale", "true_cfg_scale"])
def test_a_zero_is_a_value_and_not_an_open_field(name: str) -> None:
    assert getattr(resolved(run=Defaults(**{name: 3.0}), **{name: 0.0}), name) == 0.0


@pytest.mark.parametrize("name", ["guidance_scale", "true_cfg_scale", "negative_prompt"])
def test_a_default_that_the_family_does_not_take_is_not_filled_in_but_a_tasks_own_is_refused(name: str) -> None:
    bare = model(Everything(fields=frozenset({"prompt_only"})), width=16, height=16, steps=1)
    value: Any = "x" if name == "negative_prompt" else 3.0
    open_field = resolved(run=Defaults(**{name: value}), on=bare)
    assert getattr(open_field, name) is None
    assert plan.problems(open_field, bare.family) == []
    (problem,) = plan.problems(resolved(on=bare, **{name: value}), bare.family)
    assert problem.field == name


def test_the_runs_loras_are_for_tasks_that_name_none() -> None:
    run, own = (Lora("run.safetensors"),), (Lora("own.safetensors"),)
    assert resolved(run=Defaults(loras=run)).loras == run
    assert resolved(run=Defaults(loras=run), loras=own).loras == own


def test_seeds_count_up_by_place_unless_the_task_has_one() -> None:
    assert [resolved(index).seed for index in (0, 1, 5)] == [DEFAULT_SEED + index for index in (0, 1, 5)]
    assert [resolved(index, Defaults(seed=0)).seed for index in (0, 3)] == [0, 3]
    assert resolved(9, Defaults(seed=5), seed=0).seed == 0


def test_a_resolved_task_stays_as_it_is_when_resolved_again() -> None:
    once = resolved(3, Defaults(width=32), model(height=48, steps=9, guidance_scale=1.0))
    assert plan.resolve(once, 8, Defaults(seed=1, width=16), model(), "jpg") == once


def test_several_images_count_ids_seeds_and_paths_up() -> None:
    first, second = plan.expand(replace(WHOLE, num_images=2, output_path="x/a.b.png"))
    assert (first.id, first.seed, first.output_path) == ("a_1", 7, "x/a.b_1.png")
    assert (second.id, second.seed, second.output_path) == ("a_2", 8, "x/a.b_2.png")
    assert first.num_images == second.num_images == 1
    assert plan.expand(WHOLE) == (WHOLE,)


# --- paths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "path"),
    [
        (None, "a.png"),
        ("x/b.jpg", "x/b.jpg"),
        ("x/b", "x/b.png"),
        ("x//b.png", "x/b.png"),
        ("./x/./b.png", "x/b.png"),
        ("x/../b.png", "x/../b.png"),
    ],
)
def test_the_path_is_the_tasks_own_or_its_id_in_its_plainest_form(given: str | None, path: str) -> None:
    assert resolved(output_path=given).output_path == path


names = st.text(min_size=1, max_size=200).filter(lambda name: not any("\ud800" <= char <= "\udfff" for char in name))


@stable
@example("...", "---")
@example("a/b", "a_b")
@example("a" * 200, "a" * 199)
@example("é" * 100, "é" * 99)
@example("..", ".")
@given(names, names)
def test_a_file_stem_is_safe_and_two_names_never_share_one(one: str, two: str) -> None:
    stem = plan.file_stem(one)
    assert stem
    assert stem[0] not in ".-"
    assert not set(stem) & set('/\\\0\n\r\t :*?"<>|')
    assert len(stem.encode()) <= 130
    assert PurePosixPath(stem + ".png").parts == (stem + ".png",)
    assume(one != two)
    assert stem != plan.file_stem(two)


@stable
@given(st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=120))
def test_a_plain_name_is_its_own_file_stem(name: str) -> None:
    assume(name[0] not in ".-")
    assert plan.file_stem(name) == name


# --- fingerprints -------------------------------------------------------------------------------------------------------

OTHER: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(),
    "system_prompt": st.none() | st.text(),
    "negative_prompt": st.none() | st.text(),
    "width": st.integers(1, 8192),
    "height": st.integers(1, 8192),
    "steps": st.integers(1, 1000),
    "guidance_scale": st.none() | st.floats(0, 1000),
    "true_cfg_scale": st.none() | st.floats(0, 1000),
    "seed": st.integers(0, MAX_SEED),
    "loras": st.lists(st.builds(Lora, st.just("p"), st.floats(-9, 9), st.sampled_from("abc")), max_size=3).map(tuple),
}
WITHOUT_EFFECT = {
    "id": st.text(),
    "output_path": st.text(),
    "metadata": st.dictionaries(st.text(), st.integers()),
    "images": st.just(("elsewhere.png",)),  # the bytes count, and they are handed in as digests
    "model": st.text(),  # its revision counts, and it is handed in
    "num_images": st.just(1),
}


def test_every_field_of_a_task_is_known_to_matter_or_not() -> None:
    assert {field.name for field in dataclasses.fields(Task)} == OTHER.keys() | WITHOUT_EFFECT.keys()


@pytest.mark.parametrize("name", OTHER)
@settings(stable, max_examples=40)
@given(data=st.data())
def test_the_fingerprint_changes_with_any_field_that_determines_the_picture(name: str, data: st.DataObject) -> None:
    value = data.draw(OTHER[name])
    assume(value != getattr(WHOLE, name))
    assert plan.fingerprint(replace(WHOLE, **{name: value}), "r", ["i"]) != plan.fingerprint(WHOLE, "r", ["i"])


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
@settings(stable, max_examples=20)
@given(data=st.data())
def test_the_fingerprint_does_not_change_with_what_the_picture_does_not_depend_on(
    name: str, data: st.DataObject
) -> None:
    other = replace(WHOLE, **{name: data.draw(WITHOUT_EFFECT[name])})
    assert plan.fingerprint(other, "r", ["i"]) == plan.fingerprint(WHOLE, "r", ["i"])


def test_the_fingerprint_changes_with_model_revision_input_bytes_and_semantics(monkeypatch: pytest.MonkeyPatch) -> None:
    prints = [
        plan.fingerprint(WHOLE, "r", ["i"]),
        plan.fingerprint(WHOLE, "s", ["i"]),
        plan.fingerprint(WHOLE, "r", ["j"]),
        plan.fingerprint(WHOLE, "r", []),
        plan.fingerprint(WHOLE, "r", ["i", "i"]),
    ]
    monkeypatch.setattr(plan, "SEMANTICS_VERSION", plan.SEMANTICS_VERSION + 1)
    prints.append(plan.fingerprint(WHOLE, "r", ["i"]))
    assert len(set(prints)) == len(prints)


def test_a_lora_counts_by_its_content_and_strength_not_by_where_it_lies() -> None:
    moved = replace(WHOLE, loras=tuple(replace(lora, path=f"moved/{lora.path}") for lora in WHOLE.loras))
    assert plan.fingerprint(moved, "r") == plan.fingerprint(WHOLE, "r")
    turned = replace(WHOLE, loras=WHOLE.loras[::-1])
    assert plan.fingerprint(turned, "r") != plan.fingerprint(WHOLE, "r")


def test_a_whole_number_and_the_same_decimal_are_the_same_value() -> None:
    one, two = (replace(WHOLE, guidance_scale=value, loras=(Lora("x", value, "d"),)) for value in (2, 2.0))
    assert plan.fingerprint(one, "r") == plan.fingerprint(two, "r")


def test_fingerprints_stay_what_they_were() -> None:
    """A change here makes every picture of every folder again: it needs a new SEMANTICS_VERSION, not a new digest."""
    assert plan.fingerprint(replace(WHOLE, system_prompt=None), "r", ["i"]) == FROZEN


FROZEN = "764d740866c7f2b66367fb144f6e0d32866d3d6c7a299d69256c0ec91a61f3a5"


# --- needs --------------------------------------------------------------------------------------------------------------


def test_needs_are_model_adapters_and_shape_in_the_order_of_what_they_cost() -> None:
    assert plan.needs(WHOLE) == ("model:m", "adapters:d1@0.5,d2@1.0", "shape:64x32")
    assert plan.needs(replace(WHOLE, loras=()))[1] == "adapters:-"


def test_an_adapter_at_strength_0_is_no_need() -> None:
    loras = (Lora("x", 0.0, "d1"), Lora("y", 1.0, "d2"))
    assert plan.adapters_need(loras) == plan.adapters_need(loras[1:])


def test_a_planned_task_carries_its_place_group_cost_and_fingerprint() -> None:
    planned = plan.planned(WHOLE, 5, model(), ["i"])
    assert planned.task is WHOLE
    assert (planned.ticket.seq, planned.ticket.group, planned.ticket.cost) == (5, "4", 4.0)
    assert planned.ticket.needs == plan.needs(WHOLE)
    assert planned.fingerprint == plan.fingerprint(WHOLE, "revision 1", ["i"])


# --- problems -----------------------------------------------------------------------------------------------------------


def fields_of(task: Task, family: Any = None) -> list[str]:
    return [problem.field for problem in plan.problems(task, family or Everything())]


def test_a_whole_task_has_no_problems() -> None:
    assert plan.problems(WHOLE, Everything()) == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x" * 100_001}, "prompt"),
        ({"negative_prompt": "\0"}, "negative_prompt"),
        ({"id": ""}, "id"),
        ({"id": "x" * 201}, "id"),
        ({"width": 0}, "width"),
        ({"width": -16}, "width"),
        ({"height": 100}, "height"),
        ({"width": None}, "width"),
        ({"width": 16 * 10_000, "height": 16 * 10_000}, "width"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"steps": None}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"seed": MAX_SEED, "num_images": 2}, "seed"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 10_001}, "num_images"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"true_cfg_scale": float("inf")}, "true_cfg_scale"),
        ({"loras": (Lora("x", float("nan")),)}, "loras[0].strength"),
        ({"loras": (Lora("x"), Lora("y", 101.0))}, "loras[1].strength"),
        ({"output_path": "../a.png"}, "output_path"),
        ({"output_path": "/a.png"}, "output_path"),
        ({"output_path": "C:a.png"}, "output_path"),
        ({"output_path": "a\\b.png"}, "output_path"),
        ({"output_path": "a\0.png"}, "output_path"),
        ({"output_path": "\udcff.png"}, "output_path"),
        ({"output_path": "a.txt"}, "output_path"),
        ({"output_path": ".imagemill/a.png"}, "output_path"),
        ({"output_path": "x" * 252 + ".png"}, "output_path"),
        ({"output_path": "x" * 250 + ".png", "num_images": 10}, "output_path"),
        ({"output_path": "x/" * 1100 + "a.png"}, "output_path"),
    ],
)
def test_each_mistake_is_named_by_its_field_with_a_message(changes: dict[str, Any], field: str) -> None:
    (problem,) = plan.problems(replace(WHOLE, **changes), Everything())
    assert problem.field == field
    assert problem.message
    assert "\n" not in problem.message


def test_the_ends_of_every_range_are_taken() -> None:
    task = replace(
        WHOLE, seed=MAX_SEED - 1, num_images=2, steps=1000, guidance_scale=0.0, output_path="x" * 249 + ".png"
    )
    assert plan.problems(task, Everything()) == []


def test_all_mistakes_of_a_task_are_named_together() -> None:
    task = replace(WHOLE, prompt="", steps=0, seed=-1, output_path="../a.png")
    assert sorted(fields_of(task)) == ["output_path", "prompt", "seed", "steps"]


@pytest.mark.parametrize("name", OPTIONAL_FIELDS)
def test_a_field_that_the_family_does_not_take_is_refused_and_never_dropped(name: str) -> None:
    family = Everything(fields=frozenset({*OPTIONAL_FIELDS, "prompt_only"} - {name}))
    assert fields_of(WHOLE, family) == [name]


def test_a_model_that_edits_wants_a_picture_unless_it_also_takes_a_prompt_alone() -> None:
    task = replace(WHOLE, images=())
    assert fields_of(task) == []
    assert fields_of(task, Everything(fields=frozenset(OPTIONAL_FIELDS))) == ["images"]


# --- judges -------------------------------------------------------------------------------------------------------------


JUDGE = Everything(name="judge", fields=frozenset({"images", "system_prompt", "prompt_only", "answer"}))


def judged(**fields: Any) -> Task:
    run = Defaults(width=64, height=64, steps=3, seed=5, negative_prompt="rain", loras=(Lora("x"),))
    return resolved(3, run, model(JUDGE, width=16), **fields)


def test_a_judges_task_has_no_size_no_steps_and_no_seed_whatever_the_run_says_and_wherever_it_stands() -> None:
    task = judged(images=("a.png", "b.png"), system_prompt="be fair")
    assert (task.width, task.height, task.steps, task.seed, task.negative_prompt, task.loras) == (*(None,) * 5, ())
    assert plan.problems(task, JUDGE) == []
    assert plan.planned(task, 4, model(JUDGE), ["d"]).ticket.needs == ("model:m", "adapters:-", "shape:answer")
    assert task.output_path == "a.answer"


@pytest.mark.parametrize(
    "field",
    [
        *({"width": 64}, {"height": 64}, {"steps": 3}, {"seed": 1}, {"num_images": 2}, {"output_path": "a.png"}),
        *({"negative_prompt": "rain"}, {"guidance_scale": 1.0}, {"true_cfg_scale": 1.0}, {"loras": (Lora("x"),)}),
    ],
)
def test_a_field_of_pictures_is_refused_in_a_judges_task(field: dict[str, Any]) -> None:
    assert fields_of(judged(**field), JUDGE) == [*field]
