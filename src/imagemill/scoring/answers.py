"""The answer of a judge, read: a score on the scale, or the reason why there is none. Never a guess. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from imagemill.scoring.numerals import Missing, Unclear, normalise
from imagemill.scoring.prose import find_score, find_scores, line_scores
from imagemill.scoring.scale import TEN, Scale
from imagemill.scoring.structured import objects, reason_of, scores_of

LONGEST = 50_000
"""Characters of an answer, without its thinking, that are read at most."""

CUT = "the answer was cut off by the limit of tokens before a clear score; raise max_new_tokens"
"""What is said of such an answer."""

SINGLE = ("score",)
"""The parts of a question that asks for one score."""

THOUGHT = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
ENDED = re.compile(r'\n|(?<=["\w\]}],)\s*(?=")')
SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>")
REASON = re.compile(
    r"(?:reason(?:ing)?|rationale|explanation|justification|理由|原因|解释)[*_\"']*\s*[:：][*_]*\s*[\"']?(.+)",
    re.I | re.S,
)
DECLINES = re.compile(
    r"\b(?:can(?:no|')?t|can not|unable to|not able to|won't be able to|\bi (?:won't|will not)|"
    r"decline to|refuse to)\s+"
    r"(?:\w+\s+){0,2}?(?:assist|help|comply|provide|evaluate|rate|score|judge|assess|give|view|analy[sz]e|access|process|"
    r"identify|fulfil+|discuss|engage|complete|answer|respond|compare|(?:see|open)\s+(?:the|any|these|those|your)\s+"
    r"(?:\w+\s+)?(?:image|picture|photo)s?\b(?!\s*['’]))"
    r"|^\W*(?:i(?:'| a)m\s+)?(?:so\s+)?sorry\b"
    r"|(?:无法|不能|没办法|不便|难以|拒绝)(?:对|为|给|根据|就)?[^，。,.\n]{0,12}?"
    r"(?:评估|评分|打分|评价|提供|查看|看到图|判断|协助|帮助|完成|处理|回答|回复|给出|满足|分析|讨论|访问)"
    r"|^\W*(?:很|非常)?(?:抱歉|对不起)",
    re.IGNORECASE,
)
"""That the judge declines, in the words models use. What it cannot see in a picture (`I can't see a change`) is none."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge's text says. `scores` by part exist exactly when the status is `ok`.

    `reason` is the judge's own words for its score, `problem` one line that says why there is none.
    """

    status: Literal["ok", "parse_failed", "refused"]
    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    problem: str = ""

    def __post_init__(self) -> None:
        if bool(self.scores) != (self.status == "ok"):
            raise ValueError(f"the status is {self.status}, the scores {dict(self.scores)}")


def parse_answer(text: str, scale: Scale = TEN, parts: Sequence[str] = SINGLE, *, cut: bool = False) -> Answer:
    """Read a judge's raw text: the score of each of `parts`, on `scale`.

    Taken are JSON (alone, fenced, inside prose), `Score: 8.5`, `8.5/10`, `4.`, `评分：8`, a number alone on the first or
    last line, decimal commas, full-width digits; thinking blocks are left out. `parse_failed` is everything that does
    not say one clear score: several that differ, ranges, fractions of another denominator, percentages (unless the scale
    is 0 to 100), what is out of range, no score at all. `refused` is an answer without any score that declines.

    JSON goes before the prose around it, unless a line there begins with a label (`Score: 7`) and says another score.

    Of an answer that was `cut` off by the limit of tokens, JSON that is closed counts, and what begins with a label and has an
    end (a line, an entry of JSON): of all else nobody knows how it would have gone on.
    """
    try:
        visible = _visible(text)
        found, outside = _json(visible)
        if cut:
            outside = _labelled_lines(outside, scale, parts)
    except Unclear as problem:
        return Answer("parse_failed", problem=f"{problem}; {CUT}" if cut else str(problem))
    reason = reason_of(found) or _reason(outside)
    try:
        scores = _scores(visible, found, outside, scale, parts)
    except Missing as problem:
        if cut:
            return Answer("parse_failed", reason=reason, problem=CUT)
        status: Literal["refused", "parse_failed"] = "refused" if declines(visible) else "parse_failed"
        return Answer(status, reason=reason, problem="the judge declines" if status == "refused" else str(problem))
    except Unclear as problem:
        return Answer("parse_failed", reason=reason, problem=str(problem))
    return Answer("ok", scores, reason)


def declines(text: str) -> bool:
    """True for words with which models decline to answer, in English or Chinese."""
    return DECLINES.search(text.replace("’", "'").strip()) is not None


def _visible(text: str) -> str:
    """The answer itself: without thinking and special tokens."""
    text = SPECIAL.sub(" ", _without_thoughts(text))
    text = "\n".join(ANSWER.findall(text)) or text
    if len(text) > LONGEST:
        raise Unclear(f"the answer has {len(text):,} characters, more than {LONGEST:,}")
    return text.strip()


def _without_thoughts(text: str) -> str:
    kept, thinking, position = list[str](), False, 0
    for tag in THOUGHT.finditer(text):
        if tag[1]:
            kept = kept if thinking else []  # the chat template had opened it, so all before was thinking
            thinking, position = False, tag.end()
        elif not thinking:
            kept.append(text[position : tag.start()])
            thinking = True
    if thinking:
        raise Unclear("the answer ends inside its thinking")
    return "".join(kept) + text[position:]


def _labelled_lines(text: str, scale: Scale, parts: Sequence[str]) -> str:
    """The lines and entries of JSON that have an end; where one score is asked for, those of them that begin with its label."""
    lines = [f"{line}\n" for line in ENDED.split(text)[:-1]]
    return "".join(line for line in lines if len(parts) > 1 or line_scores(normalise(line), scale))


def _json(text: str) -> tuple[list[object], str]:
    """JSON as it stands, else with full-width signs taken as ASCII; and the text outside of it."""
    found, outside = objects(text)
    if not found:
        found, ascii_outside = objects(normalise(text))
        outside = ascii_outside if found else outside
    return found, outside


def _scores(text: str, found: list[object], outside: str, scale: Scale, parts: Sequence[str]) -> dict[str, float]:
    if not text:
        raise Missing("the answer is empty")
    outside = normalise(outside)
    scores = scores_of(found, scale, parts)
    if scores is None and len(parts) > 1:
        return find_scores(outside, scale, parts)
    if scores is None:
        return {parts[0]: find_score(outside, scale)}
    if len(parts) == 1:
        for other in line_scores(outside, scale):
            if other != scores[parts[0]]:
                raise Unclear(f"different scores: {scores[parts[0]]:g} in JSON, {other:g} beside it")
    return scores


def _reason(text: str) -> str:
    """What follows `Reason:`, else the answer itself where it is more than a number."""
    labelled = REASON.search(text)
    words = labelled[1].strip(" \t\n\"'}") if labelled else text.strip()
    return words if re.search(r"[^\W\d_]{2}", words) else ""
