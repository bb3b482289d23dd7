"""What of a run will not do what its user hoped: said once, before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from imagemill.config import Settings
from imagemill.guidance import Guidance
from imagemill.models import Model
from imagemill.sources.columns import FIELDS, meant
from imagemill.staging import Shape

NAMED = 3
"""How many of the sizes that a model was not trained at a line names, and how many columns have a line."""


def remarks(
    settings: Settings, used: Sequence[Model], shapes: Iterable[Shape], slips: Iterable[str] = ()
) -> tuple[str, ...]:
    """A line for each; `shapes` are those of the staged tasks, `slips` their columns that are nearly known ones."""
    staged = list(shapes)
    return (*untaken(settings, used), *unguided(used, staged), *untrained(used, staged), *unknown(slips))


def unknown(slips: Iterable[str], known: tuple[str, ...] = tuple(FIELDS)) -> tuple[str, ...]:
    """A line for each column that became metadata and is nearly a known one."""
    named = list(slips)
    lines = [
        f"the column {name} is not known and becomes metadata; did you mean {meant(name, known)}?"
        for name in named[:NAMED]
    ]
    return (*lines, *([f"... and {len(named) - NAMED} more such columns"] if len(named) > NAMED else []))


def untaken(settings: Settings, used: Sequence[Model]) -> tuple[str, ...]:
    """A line for each option that no model of the run takes; in a task the same field is an error."""
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


def unguided(used: Sequence[Model], staged: Sequence[Shape]) -> tuple[str, ...]:
    """A line for each model with tasks whose negative prompt changes nothing, since guidance is off in them."""
    return tuple(
        f"negative prompts change nothing in tasks of {model.spec.name} without guidance; give them a guidance_scale"
        + (" or true_cfg_scale" if "true_cfg_scale" in model.planned.family.fields else "")
        for model in used
        if model.planned.defaults.negative_prompt is None
        and any(kind.negative and not kind.runs(model.planned.family) for kind in _kinds(model, staged))
    )


def _kinds(model: Model, staged: Sequence[Shape]) -> set[Guidance]:
    return {kind for one in staged if one.model == f"model:{model.spec.name}" for kind in one.guidance}


def untrained(used: Sequence[Model], shapes: Iterable[Shape]) -> tuple[str, ...]:
    """A line for each model whose staged tasks ask for sizes (width x height in pixels) that it was not trained at."""
    staged = list(shapes)
    return tuple(line for model in used if (line := _untrained(model, staged)))


def _untrained(model: Model, staged: Sequence[Shape]) -> str:
    """Empty where the model takes any size, or every task has one of its own."""
    sizes = [f"{width}x{height}" for width, height in model.known.sizes] if model.known else []
    own = [one.shape.removeprefix("shape:") for one in staged if one.model == f"model:{model.spec.name}"]
    others = [size for size in own if size not in sizes]
    if not sizes or not others:
        return ""
    more = f" and {len(others) - NAMED} other sizes" if len(others) > NAMED else ""
    return (
        f"{model.spec.name} was trained at {', '.join(sizes)} alone; "
        f"pictures of {', '.join(others[:NAMED])}{more} will look wrong"
    )
