"""One score as a judge writes it: `8`, `8.5/10`, `8,5`, `7分`; and what looks like one and is none. Pure."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from imagemill.scoring.scale import Scale

NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
"""A number with a decimal point at most. ASCII digits alone: `normalise` has made them of the full-width ones."""

BLOB = re.compile(r"-?(?:[0-9]+(?:[.,][0-9]+)*|\.[0-9]+)")
UNIT = r"[ \t]*(?:分|points?\b|pts\b)"

WORDS = r"zero|one|two|three|four|five|six|seven|eight|nine|ten|[零一二两三四五六七八九十]"
DASHES = r"\-‐‑‒–—―~∼〜"
"""Signs of a range, for a class of a pattern."""

_PLAIN = re.compile(rf"-?{NUMBER}")
_COMMA = re.compile(r"-?[0-9]+,[0-9]{1,2}")
_OUT_OF = re.compile(
    rf"(?:{UNIT})?[ \t]*[(\[]?[ \t]*(?:/|\b(?:out\s+)?of\b(?:\s+(?:a|the|possible|total|maximum|of)\b)*|"
    rf"(?:满分|共)(?:为|是)?\s*:?)"
    rf"[ \t]*(?P<high>{BLOB.pattern})(?:{UNIT})?",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"[ \t]*(?:%|percent\b|per cent\b)", re.IGNORECASE)
_UNIT = re.compile(UNIT, re.IGNORECASE)
_RANGE = re.compile(
    rf"[ \t]*(?:[{DASHES}]+|\.\.+|…|±|\+/-|\bto\b|\bor\b|至|到|或)[ \t]*(?:[0-9.]*[0-9]|(?:{WORDS})(?![a-z]))",
    re.IGNORECASE,
)
_SECOND = re.compile(rf"[ \t]*(?:[,;&|、]|\band\b|和)[ \t]*{NUMBER}[ \t]*(?:$|[\]\n.,;|)]|分)", re.IGNORECASE)
_OTHER_END = re.compile(
    rf"[ \t]*\(?(?:/|out[ \t]+of|of)[ \t]*(?:{WORDS})(?![a-z])|[ \t]*(?:-[ \t]*)?(?:stars?\b|颗?星)", re.IGNORECASE
)
"""What may follow a number and name an end of the scale in words: `4 out of five`, `4 stars`."""

_GOES_ON = re.compile(r"[ \t]+[0-9/]")
_TOUCHING = re.compile(r"</|<br|<\||[.,;:!?)\]}>\"'|\\](?![0-9])|\s|$")
_CONTINUES = "半点多余几之钟十百千万亿"
"""Chinese characters that make another number of the one before them: 8分半 is 8.5, 8分之一 is 1/8."""

_WIDE = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_WIDE |= {0xFF0C: ", ", 0x3002: ". ", 0x2212: "-", 0x2236: ":"} | dict.fromkeys(
    (0x3000, 0xA0, 0x200B, 0x2060, 0xFEFF), " "
)


class Unclear(ValueError):
    """What stands where a score should be is not one clear score. The message says why, in one line."""


class Missing(Unclear):
    """There is no score at all."""


class Reading(NamedTuple):
    """A score, where its text ends, and whether a unit or denominator marked it as a score."""

    value: float
    end: int
    marked: bool


def normalise(text: str) -> str:
    """The text with ASCII in place of full-width characters and special spaces.

    A full-width comma or full stop gets a space after it: it ends a clause and is never a decimal sign.
    """
    return text.translate(_WIDE)


def read_score(text: str, start: int, scale: Scale, *, comma: bool = True) -> Reading | None:
    """The score at `start` of a normalised text, or None where no number stands.

    A decimal comma (`8,5`) is taken if `comma` says so. Raises Unclear for a number that is not one clear score on the
    scale: out of range, another denominator, a percentage of a scale that is not 0 to 100, a range, several numbers, or
    a number that goes on (`8½`, `8x`, `1.2.3`).
    """
    found = BLOB.match(text, start)
    if not found:
        return None
    value, end, marked = _value(found.group(), comma=comma), found.end(), False
    if outer := _OUT_OF.match(text, end):
        if _value(outer["high"], comma=False) != scale.high:
            raise Unclear(f"{outer.group().strip()} after {found.group()}, where the scale is {scale}")
        end, marked = outer.end(), True
    elif percent := _PERCENT.match(text, end):
        if not scale.is_percent:
            raise Unclear(f"a percentage, {found.group()} %, where the scale is {scale}")
        end, marked = percent.end(), True
    elif unit := _UNIT.match(text, end):
        end, marked = unit.end(), True
    if not outer and _OTHER_END.match(text, end):
        raise Unclear(f"another scale: {text[start : end + 16].strip()}")
    _check_end(text, found.start(), end)
    if value not in scale:
        raise Unclear(f"{value:g} is out of the scale, {scale}")
    return Reading(value, end, marked)


def read_whole(text: str, scale: Scale) -> float:
    """The score that the whole text is: `"8"`, `"8.5/10"`, `"7分"`. Raises Missing without a digit, else Unclear."""
    plain = normalise(text).strip()
    if not re.search("[0-9]", plain):
        raise Missing(f"{text[:60]!r} is no number")
    reading = read_score(plain, 0, scale)
    if reading is None or plain[reading.end :].strip(" .)]"):
        raise Unclear(f"{text[:60]!r} is not one number")
    return reading.value


def checked(value: float, scale: Scale) -> float:
    """The value, if it is finite and on the scale. Raises Unclear."""
    if value not in scale:
        raise Unclear(f"{value:g} is out of the scale, {scale}")
    return float(value)


def agreed(values: list[float]) -> float:
    """The one value that all are. Raises Missing for none, Unclear for several that differ."""
    distinct = sorted(set(values))
    if not distinct:
        raise Missing("no score found")
    if len(distinct) > 1:
        raise Unclear(f"different scores: {', '.join(f'{value:g}' for value in distinct)}")
    return distinct[0]


def _value(blob: str, *, comma: bool) -> float:
    if _PLAIN.fullmatch(blob):
        return float(blob)
    if comma and _COMMA.fullmatch(blob):
        return float(blob.replace(",", "."))
    raise Unclear(f"{blob[:40]} is not one number")


def _check_end(text: str, start: int, end: int) -> None:
    shown = text[start : end + 12].strip()
    if _RANGE.match(text, end):
        raise Unclear(f"a range: {shown}")
    if _SECOND.match(text, end) or _GOES_ON.match(text, end):
        raise Unclear(f"several numbers: {shown}")
    if not _TOUCHING.match(text, end) and not _separates(text[end]):
        raise Unclear(f"not one number: {shown}")


def _separates(char: str) -> bool:
    """True for scripts and signs that may stand beside a number without being part of it."""
    if char.isascii() or char in _CONTINUES:
        return False
    kind = unicodedata.category(char)
    return kind[0] == "P" or kind == "So" or (kind == "Lo" and ord(char) >= 0x2E80)
