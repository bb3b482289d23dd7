"""The sizes that a small model was trained at: what it makes at others is no picture of its prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from imagemill.models import Model
from imagemill.staging import Shape

NAMED = 3
"""How many of the other sizes a line names."""


def remarks(used: Sequence[Model], shapes: Iterable[Shape]) -> tuple[str, ...]:
    """A line for each model whose staged tasks ask for sizes (width x height in pixels) that it was not trained at."""
    staged = list(shapes)
    return tuple(line for model in used if (line := _remark(model, staged)))


def _remark(model: Model, staged: Sequence[Shape]) -> str:
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
