"""One item of an editing benchmark: a source picture and what is to be done to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Item:
    """What is edited and what the edit is judged by, whatever file it came from.

    `image` is the absolute path of the source picture, `images` those of further references, `target` and `mask` absolute
    paths or empty. `questions` are asked about the edited picture. `source` is the same for all items of one source
    picture (its path in the benchmark, or the sha256 of its bytes): statistics draw clusters by it. `seed` of None means
    the run's own. `metadata` holds what else the row said, as JSON's values.
    """

    id: str
    category: str
    instruction: str
    image: str
    images: tuple[str, ...] = ()
    source_caption: str = ""
    target: str = ""
    mask: str = ""
    seed: int | None = None
    questions: tuple[str, ...] = ()
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
