"""The pictures that tasks edit, as a worker takes them in: read, checked against the plan, brought to size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagemill import source_image
from imagemill.errors import BadTask, TaskError
from imagemill.families import Family, Pictures, Size
from imagemill.plan import fingerprint
from imagemill.records import ModelSpec, PlannedTask
from imagemill.runners import Result

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Member:
    """A task of a batch with its pictures, ready for the family's `encode`."""

    planned: PlannedTask
    pictures: Pictures = ()

    @property
    def shapes(self) -> tuple[Size, ...]:
        """The pictures' sizes: tasks share a batch only when these are equal."""
        return tuple(picture.size for picture in self.pictures)


def take_in(tasks: Iterable[PlannedTask], family: Family, model: ModelSpec) -> Iterator[Member | Result]:
    """Each task with its pictures, or the result that says why they cannot be edited: that costs this task alone."""
    for planned in tasks:
        try:
            pictures = read(planned, model)
        except TaskError as error:
            yield Result(planned.ticket.seq, error=error)
            continue
        sizes = family.reference_sizes(planned.task, [picture.size for picture in pictures])
        fitted = [
            source_image.fit(picture, *size, family.multiple) for picture, size in zip(pictures, sizes, strict=True)
        ]
        yield Member(planned, fitted)


def read(planned: PlannedTask, model: ModelSpec) -> list[Image]:
    """The pictures of a task, upright in RGB.

    Raises `BadTask` for one that cannot be edited, and when their bytes are not those the task was planned with: its
    fingerprint would then promise another picture.
    """
    found = [source_image.read(path) for path in planned.task.images]
    if found and fingerprint(planned.task, model.revision, [digest for _, digest in found]) != planned.fingerprint:
        raise BadTask("a picture it edits has changed since the run was planned; run it again with --rerun-changed")
    return [picture for picture, _ in found]


def by_shapes(members: Iterable[Member], family: Family) -> list[list[Member]]:
    """The members in batches of equal shapes, none larger than the family takes, in the order of their first."""
    batches: dict[tuple[Size, ...], list[list[Member]]] = {}
    for member in members:
        alike = batches.setdefault(member.shapes, [[]])
        if member.pictures and len(alike[-1]) >= family.max_edit_batch:
            alike.append([])
        alike[-1].append(member)
    return [batch for alike in batches.values() for batch in alike]
