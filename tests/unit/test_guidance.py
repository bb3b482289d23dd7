"""Which tasks have classifier-free guidance, as each family's own estimate tells."""

from __future__ import annotations

import pytest

from imagemill.families import family
from imagemill.guidance import Guidance, guidance


@pytest.mark.parametrize(
    ("name", "fields", "runs"),
    [
        ("z_image", (0.0, None, None), False),
        ("z_image", (None, None, "dull"), False),
        ("z_image", (0.3, None, None), True),
        ("sdxl", (1.0, None, "dull"), False),
        ("sd3", (1.5, None, None), True),
        ("qwen_image", (None, 4.0, " "), True),
        ("qwen_image", (None, 4.0, None), False),
        ("qwen_image", (None, 1.0, " "), False),
        ("flux", (3.5, 1.0, None), False),
        ("flux", (3.5, 1.1, "dull"), True),
    ],
)
def test_each_family_says_when_guidance_runs(
    name: str, fields: tuple[float | None, float | None, str | None], runs: bool
) -> None:
    assert guidance(*fields).runs(family(name)) is runs


def test_scales_are_few_however_many_the_tasks_name() -> None:
    scales = [number / 7 for number in range(7000)]
    assert {guidance(scale, None, None) for scale in scales} == {Guidance(0.0), Guidance(1.0), Guidance(2.0)}
