"""What every judge shares: a task's pictures within the pixel budget, and the loop that costs a bad task itself alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from imagemill.errors import TaskError
from imagemill.records import Answer, ModelSpec, PlannedTask, WorkOrder
from imagemill.runners import Beat, Result, references
from imagemill.runners.fake import check_loaded

if TYPE_CHECKING:
    from PIL.Image import Image


def pictures(planned: PlannedTask, model: ModelSpec) -> list[Image]:
    """The task's pictures, upright in RGB, none over the `pixels` of the model's options.

    Raises `BadTask` for one that cannot be read, or that has changed since the run was planned.
    """
    most = int(model.options["pixels"])
    return [within(picture, most) for picture in references.read(planned, model)]


def within(picture: Image, pixels: int) -> Image:
    """The picture with at most that many pixels in its own aspect, by LANCZOS; a smaller one as it is."""
    from PIL import Image

    if picture.width * picture.height <= pixels:
        return picture
    scale = math.sqrt(pixels / (picture.width * picture.height))
    size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def one_by_one(
    order: WorkOrder, loaded: ModelSpec | None, beat: Beat, judge: Callable[[PlannedTask], Answer]
) -> Iterator[Result]:
    """One result a task, each judged alone. Raises `ValueError` when the order is for a judge that is not loaded."""
    check_loaded(loaded, order)
    for place, planned in enumerate(order.tasks):
        seq, size = planned.ticket.seq, len(order.tasks)
        beat("judge", seq, place, size)
        started = time.monotonic()
        try:
            answer = judge(planned)
        except TaskError as error:
            yield Result(seq, error=error)
            continue
        yield Result(seq, answer=answer, seconds={"judge": time.monotonic() - started})
