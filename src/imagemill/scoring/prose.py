"""Scores in an answer's prose: `Score: 8.5`, `8.5/10`, `评分：8`, a line that is a number alone. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from imagemill.scoring.numerals import (
    BLOB,
    DASHES,
    NUMBER,
    UNIT,
    Missing,
    Reading,
    Unclear,
    agreed,
    read_score,
    read_whole,
)
from imagemill.scoring.scale import Scale

FINAL = (
    r"(?:final|overall|total)[ _-]*(?:score|rating|grade|answer)|overall|"
    r"(?:最终|综合|总体|总)的?(?:评分|得分|分数|打分|分|评价)|\\boxed"
)
PLAIN = r"scores?|rating|grade|评分|得分|分数|打分"
QUOTES = r"[\"'“”\\]*"
SCOPE = r"(?:\([^()\n]{0,60}\)[ \t]*)?"
COLON = rf"[ \t]*{QUOTES}[ \t]*{SCOPE}{QUOTES}[ \t]*(?::=|=>|->|[:=|>]|(?<=boxed)(?=\{{)|[ \t][{DASHES}][ \t])[ \t]*"
LABELLED = re.compile(
    rf"(?<![A-Za-z_])(?:(?P<final>{FINAL})|{PLAIN})(?P<after>{COLON})[\"'“\[(<{{]*[ \t]*(?=[-.0-9])", re.IGNORECASE
)
SPOKEN = re.compile(
    rf"(?<![A-Za-z_])(?:{PLAIN})(?:[ \t]+(?:of|is)[ \t]+|[ \t]*[为是][ \t]*)(?:an?[ \t]+)?(?=[-.0-9])"
    r"|\b(?:rate|rated|give|gave|assign|award|score)(?:[ \t]+(?:it|this|that|the|an?|at|as|edit|edited|image|picture|"
    r"result|output|version|one|score|rating|of))*[ \t]+(?=[-.0-9])"
    r"|(?:打|给|得|评)(?:出|为|分)?了?[ \t]*(?=[0-9][0-9.]*[ \t]*分)"
    rf"|^[^\w\n]*(?:{PLAIN})[ \t]+(?=[-.0-9])",
    re.IGNORECASE | re.MULTILINE,
)
ENDS_SPOKEN = re.compile(
    r"(?-i:[ \t]+[A-Z])|[ \t]+(?:stars?\b|(?!的)[\u4e00-\u9fff])|[ \t]*(?:$|[\n.,;:!?)\]\"'，。]|-|–|—|"
    r"(?:because|since|for|as|due|given|on|overall|based|but|which)\b)",
    re.IGNORECASE,
)
"""After a number in a sentence: that it stands for itself, and counts nothing."""

FRACTION = re.compile(
    rf"(?<![\w./,:~<>≈≤≥±+$#-]){BLOB.pattern}(?={UNIT}?[ \t]*(?:/|\(?[ \t]*out\s+of\b)[ \t]*(?:a\s+\w+\s+(?:of\s+)?)?[0-9])"
)
HEDGED = re.compile(
    r"(?:\b(?:not|cannot|never)\b|n't\b|不(?!错)|未|无法)[^.,:;!?\n]{0,40}$"
    r"|(?:\b(?:no|than|least|most|almost|nearly|about|around|below|above|under|over|approximately|roughly)\s+(?:an?\s+)?"
    r"|低于|高于|至少|最多|接近|大约|约)$",
    re.IGNORECASE,
)
"""Before a number: that it is denied, a bound, or only near. Such a number is no score."""

ANOTHER = re.compile(
    r"(?:\b(?:max(?:imum)?|min(?:imum)?|possible|highest|lowest|perfect|passing|average|previous|confidence)|最高|最低|满|置信度)"
    r"[ \t_:=-]*(?:score|rating|level)?[ \t_:=-]*$",
    re.IGNORECASE,
)
"""Before a number or its label: that it is a score of something else."""

OTHER_SCALE = re.compile(r"\b([0-9]{1,4})[ -]?point scale|([0-9]{1,4}|[五十百])分制", re.IGNORECASE)

RANGE_BEFORE = re.compile(rf"{NUMBER}[ \t]*(?:[{DASHES}]|\bto\b|\bor\b|\band\b|至|到|或|、|,)[ \t]*$", re.IGNORECASE)
BARE = re.compile(
    rf"-?[.0-9][0-9., /%{DASHES}]*(?:(?:分|points?|pts|\(?(?:out of|满分|共)|to|or|至|到|或|percent)[ ]*[0-9.]*)*[.!]?",
    re.IGNORECASE,
)
ENDS_IN_LABEL = re.compile(rf"(?:{FINAL}|{PLAIN})[ \t]*{SCOPE}[:=]?[ \t]*$", re.IGNORECASE)
LIST = re.compile(r"\[([-0-9.,/ \t\n]*[0-9][ \t\n]*)\]")


class Finding(NamedTuple):
    """A score that stands in the text, or the reason why what stands there is none.

    `final` is named as such by the judge, `stated` carries a label or stands alone on its line, `fraction` is neither.
    """

    rank: Literal["final", "stated", "fraction"]
    value: float | None
    problem: str = ""


def find_score(text: str, scale: Scale) -> float:
    """The one score of a normalised text. What the judge calls final or overall goes before its other scores.

    Raises Missing where there is none, Unclear where there are several or none is clear.
    """
    text = _without_scale(_without_markup(text), scale)
    findings = [*_labelled(text, scale), *_spoken(text, scale), *_bare_lines(text, scale), *_fractions(text, scale)]
    final = [one for one in findings if one.rank == "final"]
    stated = [one for one in findings if one.rank == "stated"]
    fractions = [one for one in findings if one.rank == "fraction"]
    chosen = final or (stated + [one for one in fractions if one.value is not None] if stated else fractions)
    return _settled(chosen)


def find_scores(text: str, scale: Scale, parts: Sequence[str]) -> dict[str, float]:
    """The score of each of several parts: a list `[8, 7]`, or a label for each. Raises as `find_score`."""
    text = _without_scale(_without_markup(text), scale)
    stated = [_from_list(match[1], scale, parts) for match in LIST.finditer(text)]
    labels = [[_label(part) for part in parts], [rf"score[ _]?{place}" for place in range(1, len(parts) + 1)]]
    for names in labels:
        found = [list(_after(_part_pattern(name), text, scale)) for name in names]
        if any(found):
            stated.append([_settled(one) for one in found])
    if not stated:
        raise Missing("no scores found")
    return {part: agreed([values[place] for values in stated]) for place, part in enumerate(parts)}


def line_scores(text: str, scale: Scale) -> list[float]:
    """The clear scores of a normalised text's lines that begin with a label; what else stands there is passed over."""
    text = _without_scale(_without_markup(text), scale)
    at_start = re.compile(rf"^[^\w\n]*{LABELLED.pattern}", re.IGNORECASE | re.MULTILINE)
    return [one.value for one in _after(at_start, text, scale) if one.value is not None]


def _settled(findings: Sequence[Finding]) -> float:
    for one in findings:
        if one.value is None:
            raise Unclear(one.problem)
    return agreed([one.value for one in findings if one.value is not None])


def _without_markup(text: str) -> str:
    text = re.sub(r"(?<![0-9])[*`$]+|[*`$]+(?![0-9])|__", "", text)
    return re.sub(r"^[ \t]*#+[ \t]+", "", text, flags=re.MULTILINE)


def _without_scale(text: str, scale: Scale) -> str:
    """The text without mentions of the scale itself. Raises Unclear where it names a scale with another high end."""
    for match in re.finditer(rf"scale\s+(?:of|from)\s+{NUMBER}\s*(?:to|[{DASHES}])\s*({NUMBER})", text, re.IGNORECASE):
        if float(match[1]) != scale.high:
            raise Unclear(f"another scale: {match.group()}")
    for match in OTHER_SCALE.finditer(text):
        high = match[1] or {"五": "5", "十": "10", "百": "100"}.get(match[2], match[2])
        if float(high) != scale.high:
            raise Unclear(f"another scale: {match.group()}")
    text = re.sub(rf"scale\s+(?:of|from)\s+{NUMBER}\s*(?:to|[{DASHES}])\s*{NUMBER}", "scale", text, flags=re.IGNORECASE)
    low, high = (rf"{re.escape(f'{end:g}')}(?:\.0+)?" for end in (scale.low, scale.high))
    return re.sub(rf"(?<![\w.-]){low}[ \t]*(?:to|and|至|到|[{DASHES}])[ \t]*{high}(?:[ \t]*分)?(?![\w./])", "", text)


def _read(rank: Literal["final", "stated", "fraction"], text: str, start: int, scale: Scale, *, comma: bool) -> Finding:
    try:
        reading = read_score(text, start, scale, comma=comma)
        if reading is None:
            return Finding(rank, None, "no number after its label")
        _check_cut(text, reading)
    except Unclear as problem:
        return Finding(rank, None, str(problem))
    return Finding(rank, reading.value)


def _check_cut(text: str, reading: Reading) -> None:
    if not text[reading.end :].strip(" .\n") and text.count("{") > text.count("}"):
        raise Unclear("the answer is cut off in its number")


def _after(pattern: re.Pattern[str], text: str, scale: Scale) -> Iterator[Finding]:
    for match in pattern.finditer(text):
        if ANOTHER.search(text, max(0, match.start() - 40), match.start()):
            continue
        comma = not re.search(r"[\"']", match["after"])
        yield _read("final" if match.groupdict().get("final") else "stated", text, match.end(), scale, comma=comma)


def _labelled(text: str, scale: Scale) -> Iterator[Finding]:
    return _after(LABELLED, text, scale)


def _spoken(text: str, scale: Scale) -> Iterator[Finding]:
    """Scores in a sentence: `a score of 8`, `I would rate this edit an 8`. A number of things (`2 objects`) is none."""
    for match in SPOKEN.finditer(text):
        try:
            reading = read_score(text, match.end(), scale)
        except Unclear as problem:
            yield Finding("stated", None, str(problem))
            continue
        if reading is None or not (reading.marked or ENDS_SPOKEN.match(text, reading.end)):
            continue
        if HEDGED.search(text, max(0, match.start() - 80), match.start()):
            yield Finding("stated", None, f"no plain statement: {text[match.start() : reading.end]}")
        else:
            yield Finding("stated", reading.value)


def _fractions(text: str, scale: Scale) -> Iterator[Finding]:
    for match in FRACTION.finditer(text):
        before = text[max(0, match.start() - 80) : match.start()]
        if ANOTHER.search(before) or _counts(text, match.start(), scale):
            continue
        if RANGE_BEFORE.search(before):
            yield Finding("fraction", None, f"a range that ends in {match.group()}")
        elif HEDGED.search(before):
            yield Finding("fraction", None, f"no plain statement of {match.group()}")
        else:
            yield _read("fraction", text, match.start(), scale, comma=True)


def _counts(text: str, start: int, scale: Scale) -> bool:
    """True for a fraction of things (`9/10 of the sky`), which is no score."""
    try:
        reading = read_score(text, start, scale)
    except Unclear:
        return False
    return reading is None or not ENDS_SPOKEN.match(text, reading.end)


def _bare_lines(text: str, scale: Scale) -> Iterator[Finding]:
    """The first line, the last, and those under a label, where they are numbers alone.

    `4.` is a score if it is the whole answer; a line of several is the number of a list.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for place, line in enumerate(lines):
        plain = line.strip(" \t\"'“”[](){}<>|")
        asked = place in (0, len(lines) - 1) or ENDS_IN_LABEL.search(lines[place - 1])
        if not asked or not BARE.fullmatch(plain) or (len(lines) > 1 and plain.endswith(".")):
            continue
        try:
            yield Finding("stated", read_whole(plain, scale))
        except Unclear as problem:
            yield Finding("stated", None, str(problem))


def _label(part: str) -> str:
    return r"[\s_-]*".join(re.escape(word) for word in re.split(r"[\s_-]+", part))


def _part_pattern(name: str) -> re.Pattern[str]:
    score = r"(?:[ \t_-]*(?:score|rating))?"
    return re.compile(rf"(?<![A-Za-z]){name}{score}(?P<after>{COLON})[\"'“\[(<{{]*[ \t]*(?=[-.0-9])", re.IGNORECASE)


def _from_list(inner: str, scale: Scale, parts: Sequence[str]) -> list[float]:
    values = [value.strip() for value in inner.split(",")]
    if len(values) != len(parts):
        raise Unclear(f"{len(values)} scores where {len(parts)} are asked for: {', '.join(parts)}")
    return [read_whole(value, scale) for value in values]
