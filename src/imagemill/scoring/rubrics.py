"""Rubrics: what a judge is asked about an edit, and how its answers become one score. Pure."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Literal

from imagemill.errors import ConfigError
from imagemill.scoring.answers import SINGLE, Answer, parse_answer
from imagemill.scoring.scale import TEN, Scale

PLACEHOLDERS = ("original_description", "edit_instruction")
"""What a template may name: the caption of the source picture, and the instruction of the edit."""

COMBINATION = "geometric mean of the questions' lowest scores"
"""How answers become a score; part of every rubric's revision."""

BRACED = re.compile(r"(?<!\{)\{([^\W\d]\w*)\}")
TWICE_BRACED = re.compile(rf"\{{\{{({'|'.join(PLACEHOLDERS)})\}}\}}")


@dataclass(frozen=True, slots=True)
class Question:
    """One question to a judge. `images` are shown before the text: the source and the edit, or the edit alone.

    `parts` name the scores it asks for, in the order of the answer's list. `system` and `user` may hold placeholders.
    """

    name: str
    system: str
    user: str
    images: Literal["both", "edit"] = "both"
    parts: tuple[str, ...] = SINGLE

    def filled(self, original_description: str, edit_instruction: str) -> tuple[str, str]:
        """System and user prompt of one item. Only placeholders change: braces of JSON stay as they are.

        Where every brace of a template is doubled or a placeholder's, it was written for `str.format`, and doubled braces
        become single ones.
        """
        values = dict(zip(PLACEHOLDERS, (original_description, edit_instruction), strict=True))
        return _filled(self.system, values), _filled(self.user, values)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rubric makes of the answers to its questions: the fields of a judgment that hang on them."""

    status: Literal["ok", "parse_failed", "refused"]
    score: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Rubric:
    """The questions of one judgment, all on one scale.

    Raises ValueError without questions, for equal names among questions and parts, and for several questions on a
    scale that goes below 0, where no geometric mean exists.
    """

    name: str
    questions: tuple[Question, ...]
    scale: Scale = TEN

    def __post_init__(self) -> None:
        names = [*self.sub_scores] or list(SINGLE)
        if not self.questions or len(set(names)) < len(names):
            raise ValueError(f"{self.name}: a rubric needs questions, and names that differ")
        if len(self.questions) > 1 and self.scale.low < 0:
            raise ValueError(f"{self.name}: several questions need a scale that does not go below 0")

    @cached_property
    def revision(self) -> str:
        """sha256 (hex) over all of the rubric: a judgment made under another revision is made again."""
        ends = {"scale": [float(self.scale.low), float(self.scale.high)]}
        content = asdict(self) | ends | {"combination": COMBINATION}
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @property
    def sub_scores(self) -> tuple[str, ...]:
        """The names under which a judgment keeps sub-scores; none where one question asks for one score."""
        names = []
        for question in self.questions:
            if len(self.questions) > 1:
                names.append(question.name)
            if len(question.parts) > 1:
                names += question.parts
        return tuple(names)

    def read(self, texts: Sequence[str], cut: Sequence[bool] = ()) -> Verdict:
        """The verdict of raw answers, one of each question in order; `cut` says which the limit of tokens has ended."""
        known = zip(self.questions, texts, cut or [False] * len(texts), strict=True)
        return self.combine([parse_answer(text, self.scale, question.parts, cut=off) for question, text, off in known])

    def combine(self, answers: Sequence[Answer]) -> Verdict:
        """The verdict of answers, one of each question in order. One answer without scores leaves all without.

        A question counts with its lowest score, several questions with the geometric mean of theirs. For VIEScore that
        is O = √(min SC · min PQ) (arXiv 2312.14867).
        """
        pairs = list(zip(self.questions, answers, strict=True))
        reason = "\n".join(self._labelled(question, answer.reason) for question, answer in pairs if answer.reason)
        failed = [(question, answer) for question, answer in pairs if answer.status != "ok"]
        if failed:
            refused = any(answer.status == "refused" for _, answer in failed)
            message = "; ".join(self._labelled(question, answer.problem) for question, answer in failed)
            return Verdict("refused" if refused else "parse_failed", reason=reason, message=message)
        lowest = [min(answer.scores[part] for part in question.parts) for question, answer in pairs]
        known = {name: value for _, answer in pairs for name, value in answer.scores.items()}
        known |= {question.name: value for question, value in zip(self.questions, lowest, strict=True)}
        score = lowest[0] if len(lowest) == 1 else math.prod(lowest) ** (1 / len(lowest))
        return Verdict("ok", score, {name: known[name] for name in self.sub_scores}, reason)

    def _labelled(self, question: Question, text: str) -> str:
        return f"{question.name}: {text}" if len(self.questions) > 1 else text


def from_prompts(
    prompts: Mapping[str, tuple[str, str]], scale: Scale = TEN, place: str = "prompts"
) -> dict[str, Rubric]:
    """The rubric of each category from a configuration's system and user prompt.

    Raises ConfigError for an unknown placeholder, with its field's path under `place` and the nearest known one.
    """
    rubrics = {}
    for category, (system, user) in prompts.items():
        _check(system, f"{place}.{category}.system_prompt")
        _check(user, f"{place}.{category}.user_prompt_template")
        rubrics[category] = Rubric("config", (Question("score", system, user),), scale)
    return rubrics


def _filled(template: str, values: Mapping[str, str]) -> str:
    if _is_format(template):
        return template.format(**values)
    return BRACED.sub(lambda match: values.get(match[1], match[0]), template)


def _is_format(template: str) -> bool:
    """True for a `str.format` template of known placeholders alone."""
    try:
        fields = [field[1:] for field in string.Formatter().parse(template)]
    except ValueError:
        return False
    return all(name is None or (name in PLACEHOLDERS and not form and not kind) for name, form, kind in fields)


def _check(template: str, path: str) -> None:
    if twice := TWICE_BRACED.search(template):
        raise ConfigError(f"{path}: {twice.group()} is not filled in; write {{{twice[1]}}}")
    for name in BRACED.findall(template):
        if name not in PLACEHOLDERS:
            near = difflib.get_close_matches(name, PLACEHOLDERS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{path}: {{{name}}} is not known; did you mean {{{near}}}?")
