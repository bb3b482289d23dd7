"""Sinks: where a worker puts pictures. Each is one file, found by its name.

A sink writes a temporary file in the target folder, checks that it decodes to the picture it was given, makes it
durable, and gives back what a receipt needs. It never renames: the driver does, once it knows that the attempt counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol

from imagemill.errors import BadTask
from imagemill.records import PlannedTask, SinkSpec

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Stored:
    """A picture that is safe under its temporary name. Paths are relative to the sink's folder."""

    temporary: str
    path: str
    bytes: int
    sha256: str


class Sink(Protocol):
    """Keeps pictures. Built by `create(spec)`."""

    def store(self, image: Image, planned: PlannedTask, attempt: int, facts: Mapping[str, Any]) -> Stored:
        """Write the picture. `facts` (batch size, versions) go into its metadata beside the task.

        Raises `BadOutput` when the written file does not read back, `OSError` when the disk refuses.
        """


def create(spec: SinkSpec) -> Sink:
    """The sink that the spec names by its file in this folder."""
    if spec.kind not in [module.name for module in iter_modules(__path__)]:
        raise BadTask(f"there is no sink {spec.kind!r}")
    sink: Sink = import_module(f"imagemill.sinks.{spec.kind}").create(spec)
    return sink
