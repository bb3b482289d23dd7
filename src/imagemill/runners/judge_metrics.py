"""The runner behind `judge:reference` and `judge:preservation`: an edit compared with another picture, in figures.

The answer is a JSON object: `psnr` (dB, at most 100), `ssim` (-1 to 1), `l1` (0 to 1); with a mask also `psnr_masked`,
`ssim_masked`, `l1_masked` over what is white in it and `psnr_outside`, `ssim_outside`, `l1_outside` over the rest (a mask
that is all black or all white leaves the empty side out); `resized` says whether the other picture, or the mask, had
another size and was brought to the edit's by LANCZOS (a mask by its nearest pixel).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from imagemill.errors import BadTask
from imagemill.records import Answer, ModelSpec, PlannedTask, WorkOrder
from imagemill.runners import Beat, Result, Untold, references
from imagemill.runners.judge_inputs import one_by_one

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

GREY = 128
"""From this level on, a pixel of a mask is white."""

DIGITS = 6


class MetricsRunner(Untold):
    """A `Runner` that compares two pictures. `against` names the second one in messages."""

    def __init__(self, against: str) -> None:
        self._against = against
        self._spec: ModelSpec | None = None

    def prepare(self, spec: ModelSpec) -> None:
        """There is nothing to import ahead."""

    def load(self, spec: ModelSpec, beat: Beat) -> None:
        """There is nothing to load."""
        self._spec = spec

    def run(self, order: WorkOrder, beat: Beat) -> Iterator[Result]:
        """One result a task. Raises `ValueError` for another judge's order."""
        return one_by_one(order, self._spec, beat, lambda planned: self._judge(planned, order.model))

    def _judge(self, planned: PlannedTask, model: ModelSpec) -> Answer:
        images = references.read(planned, model)
        if len(images) not in (2, 3):
            raise BadTask(f"names {len(images)} pictures; give the edit, the {self._against} and perhaps a mask")
        return Answer(json.dumps(compare(*images)), 0)

    def unload(self) -> None:
        """Forget the judge."""
        self._spec = None

    @property
    def resident(self) -> frozenset[str]:
        """The judge."""
        return frozenset({f"model:{self._spec.name}"}) if self._spec else frozenset()

    def memory(self) -> tuple[int, int]:
        """No device memory is used."""
        return 0, 0


def compare(edit: Image, other: Image, mask: Image | None = None) -> dict[str, float | bool]:
    """Every figure by name; see the module's text."""
    import numpy as np
    from PIL import Image

    from imagemill.runners import similarity

    resized = any(picture.size != edit.size for picture in (other, mask) if picture is not None)
    one = similarity.levels(edit)
    two = similarity.levels(fit(other, edit.size, Image.Resampling.LANCZOS))
    parts: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.bool_]] | None] = {"": None}
    if mask is not None:
        white = np.asarray(fit(mask, edit.size, Image.Resampling.NEAREST).convert("L")) >= GREY
        parts |= {suffix: side for suffix, side in (("_masked", white), ("_outside", ~white)) if side.any()}
    index = similarity.ssim_map(one, two)
    figures: dict[str, float | bool] = {}
    for suffix, where in parts.items():
        figures[f"psnr{suffix}"] = round(similarity.psnr(one, two, where), DIGITS)
        figures[f"ssim{suffix}"] = round(float(index.mean() if where is None else index[where].mean()), DIGITS)
        figures[f"l1{suffix}"] = round(similarity.l1(one, two, where), DIGITS)
    return figures | {"resized": resized}


def fit(picture: Image, size: tuple[int, int], resampling: Resampling) -> Image:
    """The picture at exactly this size."""
    return picture if picture.size == size else picture.resize(size, resampling)
