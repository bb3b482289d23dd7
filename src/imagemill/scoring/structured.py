"""Scores in JSON, wherever it stands in an answer: alone, fenced, or inside prose. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from imagemill.scoring.numerals import Missing, Unclear, agreed, checked, read_whole
from imagemill.scoring.scale import Scale

SCORE_KEYS = frozenset(
    (
        *("score", "scores", "rating", "overall", "overall_score", "overall_rating"),
        *("final_score", "final_rating", "total_score"),
        *("评分", "得分", "分数", "打分", "总分", "总评分", "最终评分", "最终得分", "综合评分", "综合得分", "总体评分"),
    )
)
HIGH_KEYS = frozenset(("max", "max_score", "maximum", "maximum_score", "out_of", "满分"))
REASON_KEYS = frozenset(
    (
        *("reason", "reasoning", "reasons", "rationale", "explanation", "justification", "comment", "comments"),
        *("理由", "原因", "解释", "说明", "评价", "评语"),
    )
)

MOST_FAILED = 200
"""Openings that begin no JSON, after which no more are tried: each may cost the length of the text."""


def objects(text: str) -> tuple[list[Any], str]:
    """The JSON objects of a text (or lists of objects), in order, and the text outside of them.

    What does not decode stays outside. Raises Unclear for an object that gives one key two different values.
    """
    decoder = json.JSONDecoder(parse_int=float, object_pairs_hook=_object, strict=False)
    found, outside, position, failed = list[Any](), "", 0, 0
    for start in (match.start() for match in re.finditer(r"[{\[]", text)):
        if start < position or failed == MOST_FAILED:
            continue
        try:
            value, end = decoder.raw_decode(text, start)
        except Unclear:
            raise
        except (ValueError, RecursionError):
            failed += 1
            continue
        if isinstance(value, dict) or any(isinstance(part, dict) for part in value):
            found.append(value)
            outside += text[position:start] + "\n"
            position = end
    return found, outside + text[position:]


def scores_of(found: Sequence[Any], scale: Scale, parts: Sequence[str]) -> dict[str, float] | None:
    """The score of each part in decoded JSON, or None where it has none. The outermost objects with a score count.

    Raises Unclear for different scores, a wrong number of them, and values that are no scores; Missing for text
    without a number in the place of a score.
    """
    level = _objects_in(found)
    while level:
        own = [scores for one in level if (scores := _own(one, scale, parts)) is not None]
        if own:
            return {part: agreed([scores[part] for scores in own]) for part in parts}
        level = [child for one in level for child in _objects_in(one.values())]
    return None


def reason_of(found: Sequence[Any]) -> str:
    """The judge's words for its score: the first text under a key such as `reason`, or empty."""
    level = _objects_in(found)
    while level:
        for one in level:
            for key, value in one.items():
                if _name(key) in REASON_KEYS and isinstance(value, str) and value.strip():
                    return value.strip()
        level = [child for one in level for child in _objects_in(one.values())]
    return ""


def _objects_in(values: Any) -> list[dict[str, Any]]:
    """The objects among the values, and those in lists among them."""
    found = []
    for value in values:
        if isinstance(value, dict):
            found.append(value)
        elif isinstance(value, list):
            found += [part for part in value if isinstance(part, dict)]
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made and made[key] != value:
            raise Unclear(f"the key {key[:40]!r} stands twice, with different values")
        made[key] = value
    return made


def _name(key: str) -> str:
    return re.sub(r"[\s_-]+", "_", key.strip()).casefold()


def _own(one: dict[str, Any], scale: Scale, parts: Sequence[str]) -> dict[str, float] | None:
    """The scores that this object itself states."""
    fields = {_name(key): value for key, value in one.items()}
    for key in HIGH_KEYS & fields.keys():
        high = fields[key]
        if isinstance(high, float) and high != scale.high:
            raise Unclear(f"{key} is {high:g}, where the scale is {scale}")
    if len(parts) > 1:
        return _several(fields, scale, parts)
    keys = (SCORE_KEYS | {_name(parts[0])}) & fields.keys()
    values = [fields[key] for key in sorted(keys) if fields[key] is not None and not isinstance(fields[key], dict)]
    return {parts[0]: agreed([_number(value, scale) for value in values])} if values else None


def _several(fields: dict[str, Any], scale: Scale, parts: Sequence[str]) -> dict[str, float] | None:
    """Several scores: under the names of the parts, as `score1`, `score2` …, or in a list under a key such as `score`."""
    stated = []
    for names in ([_name(part) for part in parts], *_numbered(len(parts))):
        if fields.keys() >= set(names):
            stated.append([_number(fields[name], scale) for name in names])
    for key in sorted(SCORE_KEYS & fields.keys()):
        value = fields[key]
        if isinstance(value, dict):
            inner = _several({_name(name): part for name, part in value.items()}, scale, parts)
            stated += [[inner[part] for part in parts]] if inner else []
        elif isinstance(value, list):
            stated.append(_listed(value, scale, parts))
        elif value is not None and not stated:
            raise Unclear(f"one score where {len(parts)} are asked for: {', '.join(parts)}")
    if not stated:
        return None
    return {part: agreed([values[place] for values in stated]) for place, part in enumerate(parts)}


def _numbered(count: int) -> list[list[str]]:
    return [[f"score{gap}{place}" for place in range(1, count + 1)] for gap in ("", "_")]


def _listed(values: list[Any], scale: Scale, parts: Sequence[str]) -> list[float]:
    if len(values) != len(parts):
        raise Unclear(f"{len(values)} scores where {len(parts)} are asked for: {', '.join(parts)}")
    return [_number(value, scale) for value in values]


def _number(value: Any, scale: Scale) -> float:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool):
        raise Unclear(f"{str(value).lower()} is no score")
    if isinstance(value, float):
        return checked(value, scale)
    if isinstance(value, str):
        return read_whole(value, scale)
    if value is None:
        raise Missing("the score is null")
    raise Unclear("a list or an object in the place of one score")
