"""Judges without a model: PSNR, SSIM and L1 against a picture, as a verdict.

The headline score is SSIM, from 0 to 1: it has two ends, which bounds need, and decibels have none. A negative SSIM (a
picture turned into its negative) counts as 0; the figure itself stays among the sub-scores, with every other figure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from imagemill.scoring.rubrics import Verdict
from imagemill.scoring.scale import Scale

HEADLINE = "ssim"
UNIT = Scale(0.0, 1.0)

UNITS = {"psnr": "dB", "ssim": "", "l1": ""}
"""Of figures by the word before the first underscore: what stands behind them in a table."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What reads the answers of `reference` and `preservation`: JSON objects of figures."""

    name: str
    scale: Scale = UNIT

    def read(self, texts: Sequence[str]) -> Verdict:
        """The verdict of the one answer. Figures that are null or infinite (equal pictures have no PSNR) are left out."""
        try:
            found = json.loads(texts[0])
        except ValueError:
            return Verdict("parse_failed", message="the answer is no JSON")
        figures = {
            name: float(value)
            for name, value in (found.items() if isinstance(found, dict) else ())
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        if HEADLINE not in figures:
            return Verdict("parse_failed", message=f"the answer holds no {HEADLINE}")
        score = min(max(figures[HEADLINE], self.scale.low), self.scale.high)
        return Verdict("ok", score, figures)
