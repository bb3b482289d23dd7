"""Of each item what it came to: the judgment that its edit and the judge's answers give, with its controls. Never a guess."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imagemill import source_image
from imagemill.errors import TaskError
from imagemill.records import Outcome
from imagemill.scoring.ask import Ask
from imagemill.scoring.examiner import Examiner
from imagemill.scoring.item import Item
from imagemill.scoring.judgment import Judgment, Status


@dataclass(frozen=True, slots=True)
class Settled:
    """An item with its judgment. `edit` is its picture's path relative to the output folder, empty without one.

    `answers` are the judge's raw answers by question, `controls` the judgments of what stood in the edit's place.
    """

    item: Item
    judgment: Judgment
    edit: str = ""
    sha256: str = ""
    answers: tuple[Mapping[str, Any], ...] = ()
    controls: Mapping[str, Judgment] = field(default_factory=dict)

    def judged(self) -> Iterator[tuple[str, Judgment]]:
        """Every judgment by the control's name; that of the item's own edit comes first, with none."""
        yield "", self.judgment
        yield from self.controls.items()

    def as_json(self) -> dict[str, Any]:
        """The item's line of judgments.jsonl; every `seconds` in it is a time, nothing else is."""
        row: dict[str, Any] = {
            **self.judgment.as_json(),
            "answers": [dict(answer) for answer in self.answers],
            "instruction": self.item.instruction,
            "source": self.item.source,
            "edit": self.edit or None,
            "sha256": self.sha256 or None,
        }
        if self.controls:
            row["controls"] = {name: one.as_json() for name, one in self.controls.items()}
        return row


@dataclass(frozen=True, slots=True)
class Edits:
    """How the first stage ended: outcomes by item, and the items whose source does not read, each with the reason."""

    outcomes: Mapping[str, Outcome]
    unreadable: Mapping[str, str]

    def path(self, item: str) -> str | None:
        """The edited picture of an item, or None."""
        found = self.outcomes.get(item)
        return found.path if found is not None and found.ok else None

    @property
    def failed(self) -> int:
        """Edits that failed though their source reads."""
        return sum(not one.ok and name not in self.unreadable for name, one in self.outcomes.items())


def settle(
    items: Sequence[Item],
    edits: Edits,
    asked: Iterable[Ask],
    answered: Mapping[str, Outcome],
    examiner: Examiner,
    controls: Sequence[str],
) -> list[Settled]:
    """Every item's judgment, in order; each item has one, whatever became of its edit. `asked` are in the items' order."""
    groups: dict[tuple[str, str], list[Ask]] = {}
    for ask in asked:
        groups.setdefault((ask.item, ask.control), []).append(ask)
    settled = []
    for item in items:
        outcomes = {
            control: [(ask, answered.get(ask.id)) for ask in groups.get((item.id, control), ())]
            for control in ("", *controls)
        }
        missing = _without_edit(item, edits) or _without_picture(item, examiner)
        own = missing or _judged(item, outcomes[""], examiner)
        receipt = made.receipt if (made := edits.outcomes.get(item.id)) is not None else None
        settled.append(
            Settled(
                item,
                own,
                edit=f"edits/{receipt.path}" if receipt is not None and edits.path(item.id) else "",
                sha256=receipt.sha256 if receipt is not None else "",
                answers=tuple(_answers(outcomes[""])),
                controls={name: _control(item, name, outcomes[name], edits, examiner) for name in controls},
            )
        )
    return settled


def _without_edit(item: Item, edits: Edits) -> Judgment | None:
    """The judgment of an item that has no edit; None for one that has."""
    if item.id in edits.unreadable:
        return _none(item, "missing_image", edits.unreadable[item.id])
    outcome = edits.outcomes.get(item.id)
    if outcome is None:
        return _none(item, "edit_failed", "the edit was not reached")
    return None if outcome.ok else _none(item, "edit_failed", f"{outcome.kind}: {outcome.message}")


def _without_picture(item: Item, examiner: Examiner) -> Judgment | None:
    return (
        None if examiner.can_judge(item) else _none(item, "missing_image", "the item names no target to compare with")
    )


def _control(
    item: Item, name: str, outcomes: Sequence[tuple[Ask, Outcome | None]], edits: Edits, examiner: Examiner
) -> Judgment:
    missing = _without_picture(item, examiner)
    if item.id in edits.unreadable:
        missing = _none(item, "missing_image", edits.unreadable[item.id])
    elif not outcomes:
        missing = missing or _none(item, "edit_failed", "there is no edit of another item to judge in its place")
    return missing or _judged(item, outcomes, examiner)


def _judged(item: Item, outcomes: Sequence[tuple[Ask, Outcome | None]], examiner: Examiner) -> Judgment:
    answers = [outcome.answer for _, outcome in outcomes if outcome is not None and outcome.answer is not None]
    texts = [answer.text for answer in answers]
    cost: dict[str, Any] = {
        "text": texts[0] if len(outcomes) == 1 and texts else _joined(outcomes),
        "tokens": sum(one.answer.tokens for _, one in outcomes if one is not None and one.answer is not None),
        "seconds": round(sum(one.elapsed for _, one in outcomes if one is not None), 6),
    }
    failed = [(ask, one) for ask, one in outcomes if one is None or one.answer is None]
    if failed or not outcomes:
        reasons = (f"{one.kind}: {one.message}" if one is not None else "not reached" for _, one in failed)
        gone = unreadable((item.target, item.mask)) if any(_is_bad(one) for _, one in failed) else ""
        return _none(item, "missing_image" if gone else "error", gone or "; ".join(dict.fromkeys(reasons)), **cost)
    verdict = examiner.read(item, texts, [answer.cut for answer in answers])
    return Judgment(
        item.id,
        item.category,
        verdict.status,
        verdict.score,
        verdict.scores,
        reason=verdict.reason,
        message=verdict.message,
        **cost,
    )


def _is_bad(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.kind == "bad_task"


def _joined(outcomes: Sequence[tuple[Ask, Outcome | None]]) -> str:
    parts = ((ask.question, one.answer) for ask, one in outcomes if one is not None)
    return "\n\n".join(f"[{name}]\n{answer.text}" for name, answer in parts if answer is not None)


def _answers(outcomes: Sequence[tuple[Ask, Outcome | None]]) -> Iterable[Mapping[str, Any]]:
    for ask, one in outcomes:
        if one is not None and one.answer is not None:
            yield {
                "question": ask.question,
                "text": one.answer.text,
                "tokens": one.answer.tokens,
                "seconds": round(one.elapsed, 6),
            }


def _none(item: Item, status: Status, message: str, **cost: Any) -> Judgment:
    return Judgment(item.id, item.category, status, message=message, **cost)


def unreadable(paths: Iterable[str]) -> str:
    """Why the first of the pictures that does not read does not; empty when all do. Empty paths are none."""
    for path in filter(None, paths):
        try:
            source_image.read(path)
        except TaskError as error:
            return str(error).replace(path, os.path.basename(path))
    return ""
