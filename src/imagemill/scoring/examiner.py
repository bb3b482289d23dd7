"""The judge as evaluation sees it: what it asks about an item, which pictures it is shown, how its answers are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from imagemill.errors import ConfigError
from imagemill.scoring.item import Item
from imagemill.scoring.measures import HEADLINE, Measure
from imagemill.scoring.questions import default_rubric, viescore
from imagemill.scoring.rubrics import Question, Rubric, Verdict, from_prompts
from imagemill.scoring.scale import Scale
from imagemill.scoring.settings import EvalSettings

NUMBERS = ("reference", "preservation")
"""Judges that compute figures and are asked nothing."""


class Examiner(Protocol):
    """What turns items and edits into questions, and answers into verdicts."""

    @property
    def scale(self) -> Scale:
        """The ends of the score."""

    @property
    def headline(self) -> str:
        """What the score is called."""

    def can_judge(self, item: Item) -> bool:
        """False for an item that lacks a picture which the judge needs."""

    def questions(self, item: Item) -> tuple[Question, ...]:
        """What is asked about each edit of the item."""

    def prompt(self, item: Item, question: Question) -> tuple[str, str]:
        """System and user prompt."""

    def images(self, item: Item, edit: str, question: Question) -> tuple[str, ...]:
        """The paths of the pictures that go with the question, in order."""

    def read(self, item: Item, texts: Sequence[str], cut: Sequence[bool] = ()) -> Verdict:
        """What the raw answers to `questions(item)` say; `cut` tells those that the limit of tokens has ended."""

    def as_json(self) -> dict[str, Any]:
        """For the report's manifest."""


@dataclass(frozen=True)
class RubricExaminer:
    """A model that answers in words. `rubrics` are by category; with `both` false it never sees the source."""

    rubrics: Mapping[str, Rubric]
    both: bool = True
    headline: str = "score"

    @property
    def scale(self) -> Scale:
        """Of all rubrics alike."""
        return next(iter(self.rubrics.values())).scale

    def can_judge(self, item: Item) -> bool:
        """A model needs the edit alone."""
        return True

    def questions(self, item: Item) -> tuple[Question, ...]:
        """Those of the category's rubric."""
        return self.rubrics[item.category].questions

    def prompt(self, item: Item, question: Question) -> tuple[str, str]:
        """The filled templates; the item's own questions stand behind those that see both pictures."""
        system, user = question.filled(item.source_caption, item.instruction)
        if item.questions and question.images == "both":
            points = "\n".join(f"- {text}" for text in item.questions)
            user = f"{user}\n\nCheck these points about the edited picture and let them count:\n{points}"
        return system, user

    def images(self, item: Item, edit: str, question: Question) -> tuple[str, ...]:
        """Source and edit, or the edit alone."""
        return (item.image, edit) if self.both and question.images == "both" else (edit,)

    def read(self, item: Item, texts: Sequence[str], cut: Sequence[bool] = ()) -> Verdict:
        """By the category's rubric."""
        return self.rubrics[item.category].read(texts, cut)

    def as_json(self) -> dict[str, Any]:
        """The rubric's name and its revision by category."""
        return {
            "rubric": next(iter(self.rubrics.values())).name,
            "rubric_revisions": {category: rubric.revision for category, rubric in self.rubrics.items()},
            "sees_source": self.both,
        }


@dataclass(frozen=True)
class MeasureExaminer:
    """A judge without a model: `reference` compares with the target, `preservation` with the source."""

    measure: Measure
    headline: str = HEADLINE

    @property
    def scale(self) -> Scale:
        """That of the headline."""
        return self.measure.scale

    def can_judge(self, item: Item) -> bool:
        """`reference` needs a target."""
        return bool(item.target) or self.measure.name != "reference"

    def questions(self, item: Item) -> tuple[Question, ...]:
        """One, the measure itself."""
        return (Question(self.measure.name, "", self.measure.name),)

    def prompt(self, item: Item, question: Question) -> tuple[str, str]:
        """Nothing is asked in words."""
        return "", question.user

    def images(self, item: Item, edit: str, question: Question) -> tuple[str, ...]:
        """The edit, what it is compared with, and the mask where there is one."""
        other = item.target if self.measure.name == "reference" else item.image
        return (edit, other, item.mask) if item.mask else (edit, other)

    def read(self, item: Item, texts: Sequence[str], cut: Sequence[bool] = ()) -> Verdict:
        """The figures."""
        return self.measure.read(texts)

    def as_json(self) -> dict[str, Any]:
        """That no rubric is used."""
        return {"rubric": None, "rubric_revisions": {}, "sees_source": self.measure.name == "preservation"}


def examiner(settings: EvalSettings, items: Iterable[Item]) -> Examiner:
    """What the settings mean for these items. Raises `ConfigError` for prompts that leave a category out, and for a
    rubric that asks about a source picture which the judge is not shown."""
    kind, both = settings.judge.kind, settings.judge.compare_with_original
    if kind in NUMBERS:
        return MeasureExaminer(Measure(kind))
    categories = list(dict.fromkeys(item.category for item in items))
    if settings.rubric == "prompts":
        return RubricExaminer(_from_prompts(settings, categories), both)
    if not both:
        raise ConfigError(
            f"judge.compare_with_original: false goes with prompts of your own; the rubric {settings.rubric} speaks of "
            "the source picture: write prompts, or leave it true"
        )
    shared = viescore() if settings.rubric == "viescore" else None
    return RubricExaminer({category: shared or default_rubric(category) for category in categories})


def _from_prompts(settings: EvalSettings, categories: Sequence[str]) -> dict[str, Rubric]:
    missing = [category for category in categories if category not in settings.prompts]
    if missing:
        raise ConfigError(
            f"prompts: has none for the category {missing[0]!r}; write prompts.{missing[0]}, leave the category out with "
            "--categories, or give --rubric default"
        )
    return from_prompts({category: settings.prompts[category] for category in categories})
