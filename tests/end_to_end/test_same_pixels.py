"""The picture of a task depends on the task alone: not on the policy, the number of workers, or where they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import imagemill
from imagemill.config import merge
from random_lora import make_lora
from workplace import pixels

POLICIES = ("dynamic", "static", "lockstep", "window:2")
CREWS: dict[str, dict[str, Any]] = {
    "inline": {"workers": 1},
    "one_process": {"workers": 1, "isolate": True},
    "two_processes": {"workers": 2},
}
QUICK = {
    "inline": ("dynamic", "window:2"),
    "one_process": ("dynamic", "lockstep"),
    "two_processes": POLICIES,
}
PAIRS = [
    pytest.param(crew, policy, marks=() if policy in QUICK[crew] else pytest.mark.slow, id=f"{crew}-{policy}")
    for crew in CREWS
    for policy in POLICIES
]
COUNT = 24
WORDS = ("a cat", "two dogs on a beach", "巴黎的一条街", "an old stone bridge over a river at night, oil painting")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Prompts of several lengths, two shapes, and two adapters at several strengths, well mixed."""
    folder = tmp_path_factory.mktemp("loras")
    adapters = [str(make_lora(folder / f"{seed}.safetensors", seed=seed)) for seed in (1, 2)]
    made: list[dict[str, Any]] = []
    for number in range(COUNT):
        task: dict[str, Any] = {
            "id": f"t{number:02}",
            "prompt": f"{WORDS[number % 4]}, number {number}",
            "seed": number,
        }
        task["size"] = "96x64" if number % 7 == 3 else "64x64"
        if number % 8 == 1:
            task["loras"] = [{"path": adapters[number // 8 % 2], "strength": 1.0 if number < COUNT // 2 else 0.5}]
        if number % 16 == 8:
            task["loras"] = [{"path": path, "strength": 0.7} for path in adapters]
        made.append(task)
    return made


@pytest.fixture(scope="module")
def inline() -> Iterator[imagemill.Engine]:
    with imagemill.Engine("tiny", device="cpu", steps=2, **CREWS["inline"]) as engine:
        yield engine


@pytest.fixture(scope="module")
def golden(
    inline: imagemill.Engine,
    tasks: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """The pixels of the first configuration, which the others must equal; no two pictures are alike."""
    folder = tmp_path_factory.mktemp("golden")
    outcomes = list(inline.run(tasks, folder))
    assert [outcome.message for outcome in outcomes if not outcome.ok] == []
    found = pixels(folder)
    assert sorted(found) == [f"t{number:02}.png" for number in range(COUNT)]
    assert len(set(found.values())) == COUNT
    return found


@pytest.fixture(scope="module")
def engine_of(inline: imagemill.Engine) -> Iterator[Callable[[str], imagemill.Engine]]:
    """Gives the engine of a crew, which keeps its workers until another crew is asked for."""
    with ExitStack() as open_:
        now = {"inline": inline}

        def engine(crew: str) -> imagemill.Engine:
            if crew not in now:
                open_.close()
                made = imagemill.Engine("tiny", device="cpu", steps=2, **CREWS[crew])
                now.clear()
                now.update({"inline": inline, crew: open_.enter_context(made)})
            return now[crew]

        yield engine


@pytest.mark.parametrize(("crew", "policy"), PAIRS)
def test_every_policy_and_crew_gives_the_same_pixels(
    crew: str,
    policy: str,
    engine_of: Callable[[str], imagemill.Engine],
    tasks: list[dict[str, Any]],
    golden: dict[str, str],
    tmp_path: Path,
) -> None:
    engine = engine_of(crew)
    engine.settings = merge(engine.settings, {"schedule": policy})
    outcomes = list(engine.run(tasks, tmp_path))
    assert [outcome.task.id for outcome in outcomes] == [task["id"] for task in tasks]
    assert [outcome.message for outcome in outcomes if not outcome.ok] == []
    assert pixels(tmp_path) == golden
    # Both work. With the default policy a worker that is late to load may find little or nothing left to do.
    if engine.settings.devices.workers == 2 and policy != "dynamic":
        assert {outcome.worker for outcome in outcomes} == {0, 1}


def test_the_order_of_the_source_does_not_matter_where_seeds_are_given(
    inline: imagemill.Engine,
    tasks: list[dict[str, Any]],
    golden: dict[str, str],
    tmp_path: Path,
) -> None:
    assert all(outcome.ok for outcome in inline.run(tasks[:12][::-1], tmp_path))
    assert pixels(tmp_path) == {name: digest for name, digest in golden.items() if name < "t12"}
