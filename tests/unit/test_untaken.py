"""Options that no model of a run takes are named."""

from __future__ import annotations

from typing import Any

import pytest

from imagemill import models
from imagemill.config import Settings, merge
from imagemill.guidance import guidance
from imagemill.remarks import unguided, untaken
from imagemill.staging import Shape


@pytest.mark.parametrize(
    ("names", "given", "said"),
    [
        (["tiny"], {"guidance": 2.0, "negative_prompt": "x"}, []),
        (["tiny"], {"true_cfg_scale": 3.0}, ["true_cfg_scale changes nothing: tiny does not take it"]),
        (
            ["tiny-edit", "tiny"],
            {"true_cfg_scale": 3.0},
            ["true_cfg_scale changes nothing: tiny-edit, tiny do not take it"],
        ),
        (["tiny-edit", "tiny"], {"negative_prompt": "x"}, []),
        (["tiny-edit"], {"negative_prompt": "x"}, ["negative_prompt changes nothing: tiny-edit does not take it"]),
        ([], {"true_cfg_scale": 3.0}, []),
    ],
)
def test_an_option_is_named_where_no_model_takes_it(names: list[str], given: dict[str, Any], said: list[str]) -> None:
    assert list(untaken(merge(Settings(), given), [models.resolve(name) for name in names])) == said


@pytest.mark.parametrize(
    ("scale", "negative", "idle"), [(0.0, "blurry", True), (2.0, "blurry", False), (0.0, None, False)]
)
def test_a_negative_prompt_without_guidance_is_named(scale: float, negative: str | None, idle: bool) -> None:
    kinds = (guidance(scale, None, negative), guidance(2.0, None, "blurry"))
    shapes = [Shape("model:tiny", "shape:128x128", 3, 1.0, kinds), Shape("model:other", "shape:8x8", 1, 1.0)]
    line = "negative prompts change nothing in tasks of tiny without guidance; give them a guidance_scale"
    assert unguided([models.resolve("tiny")], shapes) == ((line,) if idle else ())
