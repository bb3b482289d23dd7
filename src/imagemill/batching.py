"""How many tasks share a forward pass: by their shape, by what the family takes, and by the device.

Measured on one H100: a batch of 4 at 512x512 keeps the matrix units 44 % busy against 39 % for one picture; at 1024x1024 one
picture fills the GPU as well as eight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast

from imagemill import judges
from imagemill.config import Settings
from imagemill.models import Model
from imagemill.plan import answers

LARGEST = 512 * 512
"""Pixels of a picture above which a batch gains nothing."""

PIXELS = 1024 * 1024
"""Pixels of a whole batch: as many as one picture for which a model's need of memory is stated."""

BYTES_A_PIXEL = 3072
"""Of device memory while pictures are made: the 3 GiB that a need of memory allows beside the weights, over `PIXELS`."""

Limit: TypeAlias = Callable[[Sequence[str]], int]
"""From the needs of a task to how many alike may share its batch."""


class Takes(Protocol):
    """What is asked of a family."""

    fields: frozenset[str]
    max_batch: int
    max_edit_batch: int


def batch_for(width: int, height: int, family: Takes, on_cuda: bool, free_bytes: int | None = None) -> int:
    """The batch size for pictures of this size: 1 on the CPU and above 512x512, else as many as make 1024x1024 pixels.

    Never more than the family takes, nor than `free_bytes` hold beside the weights (None: not known). A power of two, so
    that few shapes are compiled.
    """
    pixels = width * height
    if not on_cuda or pixels > LARGEST:
        return 1
    room = PIXELS // pixels
    if free_bytes is not None:
        room = min(room, free_bytes // (BYTES_A_PIXEL * pixels))
    fitting = max(1, min(room, largest(family)))
    return 1 << (fitting.bit_length() - 1)


def largest(family: Takes) -> int:
    """How many tasks the family takes at once; one that only edits takes as many edits."""
    only_edits = "images" in family.fields and "prompt_only" not in family.fields
    return min(family.max_batch, family.max_edit_batch) if only_edits else family.max_batch


@dataclass(frozen=True, slots=True)
class Rule:
    """The bound for the tasks of one model: `asked` of None goes by shape."""

    family: Takes
    asked: int | None
    on_cuda: bool
    free: int | None

    def at(self, size: tuple[int, int] | None) -> int:
        """For pictures of this size; None for answers."""
        if self.asked is not None:
            return min(self.asked, largest(self.family))
        return batch_for(*size, self.family, self.on_cuda, self.free) if size else 1


def limit(
    settings: Settings, used: Sequence[Model], on_cuda: bool, free: int | None = None, share: int = judges.MAX_BATCH
) -> Limit:
    """The scheduler's bound for a run of these models; `free` are the bytes of the device that has the fewest, `share` is
    how many of the tasks are a worker's part."""
    rules = {f"model:{model.spec.name}": rule(settings, model, on_cuda, free, share) for model in used}

    def most(needs: Sequence[str]) -> int:
        found = rules.get(needs[0]) if needs else None
        return found.at(size_of(needs)) if found else 1

    return most


def rule(
    settings: Settings, model: Model, on_cuda: bool, free: int | None = None, share: int = judges.MAX_BATCH
) -> Rule:
    """The bound for one model of a run."""
    family, spec = model.planned.family, model.spec
    asked: int | None = settings.batch_size if settings.batch_size != "auto" else None
    if answers(family):
        asked = judges.batch(spec, settings.judge, on_cuda, share)
        asked = 1 if settings.exact and spec.runner == "judge_vlm" else asked
    elif settings.exact:
        asked = 1
    # What a model needs counts the pixels of one batch in; what the device has above that is room for more.
    rest = free - spec.memory + PIXELS * BYTES_A_PIXEL if free is not None and spec.memory else None
    return Rule(cast(Takes, family), asked, on_cuda, rest)


def size_of(needs: Sequence[str]) -> tuple[int, int] | None:
    """Width and height in pixels of what a task makes, as `plan.shape_need` wrote them; None for an answer."""
    for need in needs:
        kind, _, shape = need.partition(":")
        if kind == "shape" and shape != "answer":
            width, _, height = shape.partition("x")
            return int(width), int(height)
    return None


def sizes(shapes: Mapping[tuple[str, ...], int]) -> tuple[tuple[int, int], ...]:
    """The sizes among these needs, the most frequent first; the value of each needs is its number of tasks."""
    counted: dict[tuple[int, int], int] = {}
    for needs, number in shapes.items():
        size = size_of(needs)
        if size is not None:
            counted[size] = counted.get(size, 0) + number
    return tuple(sorted(counted, key=lambda size: (-counted[size], size)))
