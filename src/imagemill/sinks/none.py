"""The sink that keeps nothing: for measuring, and for runs whose pictures nobody wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from imagemill.records import PlannedTask, SinkSpec
from imagemill.sinks import Stored

if TYPE_CHECKING:
    from PIL.Image import Image


class NoSink:
    """Takes pictures and drops them."""

    def store(self, image: Image, planned: PlannedTask, attempt: int, facts: Mapping[str, Any]) -> Stored:
        """Keep nothing; the receipt has no path."""
        return Stored(temporary="", path="", bytes=0, sha256="")


def create(spec: SinkSpec) -> NoSink:
    """The sink for a worker."""
    return NoSink()
