"""Controls: what the judge says where the right score is known to be low. Pure.

`source` shows it the unedited source picture in the place of the edit; `shuffled` shows it the edit of another item. A
judge that scores these as high as the edits tells nothing of the edits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from imagemill.scoring.item import Item

CONTROLS = ("source", "shuffled")
SEED = 0


def shuffled(items: Sequence[Item], seed: int = SEED) -> dict[str, str]:
    """Of each item the other item whose edit it is judged with: a seeded derangement, empty for a single item.

    No item gets an edit of its own source picture, unless one picture has more than half of the items. The choice hangs
    on the items alone, not on which of their edits succeed, so a resumed run asks the same.
    """
    if len(items) < 2:
        return {}
    chance = random.Random(seed)
    members: dict[str, list[str]] = {}
    for item in items:
        members.setdefault(_cluster(item), []).append(item.id)
    groups = list(members.values())
    chance.shuffle(groups)
    for group in groups:
        chance.shuffle(group)
    # In a ring where each cluster lies in one piece, a step as long as the longest piece leaves every piece.
    ring = [name for group in groups for name in group]
    step = min(max(map(len, groups)), len(ring) // 2)
    return {name: ring[(place + step) % len(ring)] for place, name in enumerate(ring)}


def sources(items: Sequence[Item]) -> Mapping[str, str]:
    """The source picture of each item by its id: the clusters of the statistics."""
    return {item.id: _cluster(item) for item in items}


def _cluster(item: Item) -> str:
    return item.source or item.image
