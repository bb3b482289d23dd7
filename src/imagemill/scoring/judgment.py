"""The judgment of one edit: a score, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

Status: TypeAlias = Literal["ok", "parse_failed", "refused", "error", "missing_image", "edit_failed"]
"""`parse_failed`: the judge answered, but not with one clear score. `refused`: it declined. `error`: it gave no answer.
`missing_image`: a picture it needs is not there. `edit_failed`: there is no edit to judge."""

STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True, slots=True)
class Judgment:
    """What one judge says of one edit. A score exists exactly when the status is `ok`; so do sub-scores.

    `scores` are the sub-scores by name (`semantic_consistency`), empty for a judge that gives a single number. `text` is
    the judge's raw answer, `reason` its own words for the score, `message` one line that says why there is no score.
    `tokens` counts what the judge generated, `seconds` the time it took. Raises ValueError for anything else: an unknown
    status, a score without `ok`, `ok` without a score, a score that is not finite.
    """

    item: str
    category: str
    status: Status
    score: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    reason: str = ""
    tokens: int = 0
    seconds: float = 0.0
    message: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"{self.item}: {self.status!r} is not one of {', '.join(STATUSES)}")
        if (self.score is not None) != (self.status == "ok"):
            raise ValueError(f"{self.item}: the status is {self.status}, the score {self.score}")
        if self.scores and self.status != "ok":
            raise ValueError(f"{self.item}: the status is {self.status}, yet there are sub-scores")
        for value in (self.score, *self.scores.values()):
            if value is not None and (isinstance(value, bool) or not math.isfinite(value)):
                raise ValueError(f"{self.item}: {value} is no score")

    @property
    def ok(self) -> bool:
        """True when there is a score."""
        return self.status == "ok"

    def as_json(self) -> dict[str, Any]:
        """Every field by name, in order; `Judgment(**row)` gives the judgment back."""
        row: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        return row | {"scores": dict(self.scores)}
