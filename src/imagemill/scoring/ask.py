"""What the judge is asked: each question about each edit, and about each control, as a task of the engine. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imagemill.plan import MAX_NAME, file_stem
from imagemill.scoring.controls import shuffled
from imagemill.scoring.examiner import Examiner
from imagemill.scoring.item import Item
from imagemill.scoring.rubrics import Question


@dataclass(frozen=True, slots=True)
class Ask:
    """One question about one picture. `item` is whose instruction, source and target are asked about; `control` is empty
    for the item's own edit, else the name of the control whose picture stands in its place."""

    id: str
    item: str
    control: str
    question: str
    task: Mapping[str, Any]


def asks(
    items: Sequence[Item], edits: Mapping[str, str], examiner: Examiner, *, controls: bool, unreadable: frozenset[str]
) -> Iterator[Ask]:
    """Every question, item by item. `edits` are the paths of the edited pictures by item: one without is not asked about.

    The control `source` needs no edit, but a source that reads (`unreadable` are the items without); `shuffled` needs the
    edit of the other item.
    """
    others = shuffled(items) if controls else {}
    for item in items:
        if item.id in unreadable:
            continue
        pictures = {"": edits.get(item.id)}
        if controls:
            pictures |= {"source": item.image, "shuffled": edits.get(others.get(item.id, ""))}
        for control, picture in pictures.items():
            if picture is None or not examiner.can_judge(item):
                continue
            for question in examiner.questions(item):
                yield _ask(item, control, picture, question, examiner)


def _ask(item: Item, control: str, picture: str, question: Question, examiner: Examiner) -> Ask:
    # Doubled, so that an item called a@source is not taken for the control of the item a.
    name = item.id.replace("@", "@@") + (f"@{control}" if control else "")
    name += f".{question.name}" if len(examiner.questions(item)) > 1 else ""
    name = name if len(name) <= MAX_NAME else file_stem(name)
    system, user = examiner.prompt(item, question)
    task = {
        "id": name,
        "prompt": user,
        "system_prompt": system or None,
        "images": list(examiner.images(item, picture, question)),
        "metadata": {**item.metadata, "item": item.id, "category": item.category, "control": control},
    }
    return Ask(name, item.id, control, question.name, task)
