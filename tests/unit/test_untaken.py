"""Options that no model of a run takes are named."""

from __future__ import annotations

from typing import Any

import pytest

from imagemill import models
from imagemill.config import Settings, merge
from imagemill.remarks import untaken


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
