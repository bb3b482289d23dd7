"""The picture of a task depends on the task alone: not on the policy, the number of workers, or where they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import imagemill
from imagemill.config import merge

POLICIES = ("dynamic", "static", "lockstep", "window:2")
CREWS: dict[str, dict[str, Any]] = {
    "inline": {"workers": 1},
    "one_process": {"workers": 1, "isolate": True},
    "two_processes": {"workers": 2},
}
COUNT = 64
WORDS = ("a cat", "two dogs on a beach", "巴黎的一条街", "an old stone bridge over a river at night, oil painting")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, make_lora: Callable[..., Path]) -> list[dict[str, Any]]:
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
            task["loras"] = [{"path": adapters[number // 8 % 2], "strength": 1.0 if number < 32 else 0.5}]
        if number % 32 == 8:
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
    pixels_of: Callable[[Path], dict[str, str]],
) -> dict[str, str]:
    """The pixels of the first configuration, which the others must equal; no two pictures are alike."""
    folder = tmp_path_factory.mktemp("golden")
    outcomes = list(inline.run(tasks, folder))
    assert [outcome.message for outcome in outcomes if not outcome.ok] == []
    found = pixels_of(folder)
    assert sorted(found) == [f"t{number:02}.png" for number in range(COUNT)]
    assert len(set(found.values())) == COUNT
    return found


@pytest.fixture(scope="module", params=CREWS)
def crew(request: pytest.FixtureRequest) -> Iterator[imagemill.Engine]:
    """An engine that keeps its workers for all policies."""
    if request.param == "inline":
        yield request.getfixturevalue("inline")
        return
    with imagemill.Engine("tiny", device="cpu", steps=2, **CREWS[request.param]) as engine:
        yield engine


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_and_crew_gives_the_same_pixels(
    policy: str,
    crew: imagemill.Engine,
    tasks: list[dict[str, Any]],
    golden: dict[str, str],
    tmp_path: Path,
    pixels_of: Callable[[Path], dict[str, str]],
) -> None:
    crew.settings = merge(crew.settings, {"schedule": policy})
    outcomes = list(crew.run(tasks, tmp_path))
    assert [outcome.task.id for outcome in outcomes] == [task["id"] for task in tasks]
    assert [outcome.message for outcome in outcomes if not outcome.ok] == []
    assert pixels_of(tmp_path) == golden
    # Both work. With the default policy a worker that is late to load may find little or nothing left to do.
    if crew.settings.devices.workers == 2 and policy != "dynamic":
        assert {outcome.worker for outcome in outcomes} == {0, 1}


def test_the_order_of_the_source_does_not_matter_where_seeds_are_given(
    inline: imagemill.Engine,
    tasks: list[dict[str, Any]],
    golden: dict[str, str],
    tmp_path: Path,
    pixels_of: Callable[[Path], dict[str, str]],
) -> None:
    assert all(outcome.ok for outcome in inline.run(tasks[:24][::-1], tmp_path))
    assert pixels_of(tmp_path) == {name: digest for name, digest in golden.items() if name < "t24"}
