"""How a changed task is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.changes import LONG, differences

LORA = {"path": "/models/ink.safetensors", "strength": 1.0, "digest": "aa"}


def test_each_field_is_named_with_both_values_and_what_does_not_matter_is_left_out() -> None:
    old = {"id": "a", "prompt": "cat", "seed": 1, "metadata": {"n": 1}}
    new = {"id": "b", "prompt": "dog", "seed": 1, "metadata": {"n": 2}, "steps": 4}
    assert differences(old, new) == ["prompt: 'cat' -> 'dog'", "steps: None -> 4"]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"strength": 0.5}, "loras[1].strength: 1.0 -> 0.5"),
        ({"digest": "bb"}, "loras[1]: the content of /models/ink.safetensors has changed"),
        ({"path": "/models/oil.safetensors"}, "loras[1].path: '/models/ink.safetensors' -> '/models/oil.safetensors'"),
    ],
)
def test_of_adapters_only_what_differs_is_named(changed: dict[str, object], line: str) -> None:
    assert differences({"loras": [LORA, LORA]}, {"loras": [LORA, LORA | changed]}) == [line]


def test_an_adapter_more_is_shown_whole() -> None:
    (line,) = differences({"loras": []}, {"loras": [LORA]})
    assert line.startswith("loras: [] -> [{'path': '/models/ink.safetensors'")


def test_long_values_are_cut_to_where_they_differ() -> None:
    (line,) = differences({"prompt": "a harbour, " * 40 + "at dawn"}, {"prompt": "a harbour, " * 40 + "at dusk"})
    before, after = line.removeprefix("prompt: ").split(" -> ")
    assert before.startswith("...")
    assert (before[-8:], after[-8:]) == ("at dawn'", "at dusk'")
    (line,) = differences({"prompt": "x" * 500}, {"prompt": "y"})
    assert len(line) < 120


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=200), lambda inner: st.lists(inner, max_size=3), max_leaves=6
)


@given(st.dictionaries(st.sampled_from(["prompt", "loras", "size"]), VALUES), VALUES)
def test_a_line_for_whatever_differs_and_none_for_what_does_not(old: dict[str, object], value: object) -> None:
    new = old | {"prompt": value}
    lines = differences(old, new)
    assert bool(lines) == (old.get("prompt") != value)
    assert all(line.startswith("prompt") and len(line) < 2 * LONG + 40 for line in lines)
    assert not differences(old, old)
