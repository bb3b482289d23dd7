"""The ends of a judge's scale."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """The scores a judge may give, both ends included. Raises ValueError unless both are finite and low < high."""

    low: float = 0.0
    high: float = 10.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a scale from {self.low} to {self.high} is none")

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"

    @property
    def is_percent(self) -> bool:
        """True for 0 to 100, the one scale on which a percentage is a score."""
        return (self.low, self.high) == (0, 100)


TEN = Scale()
"""0 to 10, the scale of VIEScore and of the default rubric."""
