"""Contact sheets: source, edit and target side by side with the instruction, the score and the judge's reason."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from imagemill import source_image
from imagemill.errors import TaskError
from imagemill.report.figures import cut
from imagemill.report.gallery import data_uri, webp
from imagemill.scoring.examiner import Examiner
from imagemill.scoring.report.data import SHEET_SEED
from imagemill.scoring.report.words import STATUS, figure, score
from imagemill.scoring.settlement import Settled

SHOWN = 20
"""Items on each of the two sheets."""

SIDE = 224
"""The longer side of a thumbnail in pixels."""

MAX_BYTES = 16_000
MAX_TEXT = 600


@dataclass(frozen=True, slots=True)
class Picture:
    """One of a card's pictures; without a thumbnail it does not read."""

    label: str
    thumbnail: str
    link: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """One item. `score` is empty where there is none; `status` then says why."""

    id: str
    category: str
    instruction: str
    score: str
    status: str
    figures: tuple[str, ...]
    reason: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """A named choice of items."""

    name: str
    title: str
    note: str
    cards: tuple[Card, ...]


def sheets(folder: Path, settled: Sequence[Settled], examiner: Examiner) -> list[Sheet]:
    """The worst by score, and a random choice among all items that have an edit. The same items give the same choice."""
    scored = sorted(
        (one for one in settled if one.judgment.score is not None),
        key=lambda one: (one.judgment.score or 0.0, one.item.id),
    )
    edited = [one for one in settled if one.edit]
    chosen = random.Random(SHEET_SEED).sample(range(len(edited)), min(SHOWN, len(edited)))
    worst, some = scored[:SHOWN], [edited[number] for number in sorted(chosen)]
    return [
        Sheet(name, title, f"{len(of)} of {total} items, {how}", tuple(_card(folder, one, examiner) for one in of))
        for name, title, of, total, how in (
            ("worst", "The lowest scores", worst, len(scored), "the lowest score first"),
            (
                "random",
                "A random choice",
                some,
                len(edited),
                "drawn from all that have an edit, in the benchmark's order",
            ),
        )
        if of
    ]


def without_links(sheet: Sheet) -> Sheet:
    """The sheet without a way to files that are not kept."""
    bare = (
        replace(card, pictures=tuple(replace(picture, link="") for picture in card.pictures)) for card in sheet.cards
    )
    return replace(sheet, cards=tuple(bare))


def _card(folder: Path, one: Settled, examiner: Examiner) -> Card:
    judgment, scale = one.judgment, (examiner.scale.low, examiner.scale.high)
    said = judgment.reason if judgment.ok else judgment.message or judgment.text
    return Card(
        id=one.item.id,
        category=one.item.category,
        instruction=cut(one.item.instruction, MAX_TEXT),
        score="" if judgment.score is None else score(judgment.score, scale),
        status=STATUS[judgment.status],
        figures=tuple(f"{name.replace('_', ' ')} {figure(name, value)}" for name, value in judgment.scores.items()),
        reason=cut(said, MAX_TEXT),
        pictures=tuple(_pictures(folder, one)),
    )


def _pictures(folder: Path, one: Settled) -> Iterator[Picture]:
    yield Picture("source", _thumbnail(one.item.image))
    if one.edit:
        yield Picture("edit", _thumbnail(str(folder / one.edit)), "./" + quote(one.edit))
    else:
        yield Picture("edit", "")
    if one.item.target:
        yield Picture("target", _thumbnail(one.item.target))


def _thumbnail(path: str) -> str:
    """A data URI; empty for a picture that does not read."""
    try:
        return data_uri(webp(source_image.thumbnail(path, SIDE), MAX_BYTES))
    except TaskError:
        return ""
