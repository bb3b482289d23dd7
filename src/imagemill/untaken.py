"""Options of a run that change nothing, because no model of it takes them."""

from __future__ import annotations

from collections.abc import Sequence

from imagemill.config import Settings
from imagemill.models import Model


def remarks(settings: Settings, used: Sequence[Model]) -> tuple[str, ...]:
    """A line for each such option; in a task the same field is an error."""
    given = {
        "guidance": ("guidance_scale", settings.guidance),
        "true_cfg_scale": ("true_cfg_scale", settings.true_cfg_scale),
        "negative_prompt": ("negative_prompt", settings.negative_prompt),
    }
    names = ", ".join(model.spec.name for model in used)
    return tuple(
        f"{option} changes nothing: {names} {'do' if len(used) > 1 else 'does'} not take it"
        for option, (field, value) in given.items()
        if value is not None and used and not any(field in model.planned.family.fields for model in used)
    )
