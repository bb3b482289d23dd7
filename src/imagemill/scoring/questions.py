"""The rubrics that come with imagemill: VIEScore for editing, and a single question by category."""

from __future__ import annotations

from imagemill.scoring.rubrics import Question, Rubric

# --- VIEScore ---------------------------------------------------------------------------------------------------------
# The scheme is that of VIEScore (Ku et al., arXiv 2312.14867; code at https://github.com/TIGER-AI-Lab/VIEScore, MIT), task
# `tie`: semantic consistency with the parts editing success and over-editing, perceptual quality with the parts
# naturalness and artifacts, each from 0 to 10. The words are ours, so figures are not those of the paper's prompts.

_VIESCORE_SYSTEM = """\
You are an experienced visual artist and a strict, fair judge of edited pictures. Every picture you are shown was made \
or edited by a computer program, people in it included. Judge only what can be seen.
Answer with one JSON object and nothing else:
{"score": [<first score>, <second score>], "reasoning": "<one or two short sentences>"}"""

_VIESCORE_CONSISTENCY = """\
You see two pictures. The first is the source, the second is an edit of it. How well was the instruction carried out? \
An edit may have failed altogether, so that both pictures look the same.

Give two scores from 0 to 10; use the whole range.
First score, editing success: 0 means that the second picture shows nothing of what the instruction asks for, 10 that it \
shows exactly that.
Second score, over-editing: 0 means that the second picture has nothing left of the first, 10 that it changes no more than \
the instruction needs.

Instruction: {edit_instruction}"""

_VIESCORE_QUALITY = """\
You see one picture. How good is it as a picture, whatever it was meant to show?

Give two scores from 0 to 10; use the whole range.
First score, naturalness: 0 means that the scene looks wrong as a whole (impossible distances, shadows or light), 10 that \
it looks like a real one.
Second score, artifacts: 0 means that much of the picture is spoilt (distortion, watermarks, scratches, blurred faces, \
malformed bodies, parts that do not belong together), 10 that nothing is."""


def viescore() -> Rubric:
    """VIEScore for text-guided editing: two questions an item, O = √(min SC · min PQ), 0 to 10."""
    consistency = ("editing_success", "over_editing")
    quality = ("naturalness", "artifacts")
    return Rubric(
        "viescore",
        (
            Question("semantic_consistency", _VIESCORE_SYSTEM, _VIESCORE_CONSISTENCY, "both", consistency),
            Question("perceptual_quality", _VIESCORE_SYSTEM, _VIESCORE_QUALITY, "edit", quality),
        ),
    )


# --- one question by category -----------------------------------------------------------------------------------------

_SYSTEM = """\
You judge edits of pictures. The first picture is the source, the second is the edit. Compare them with care before you \
score, judge only what can be seen, and say so in the reason where the two look the same.
Score from 0 to 10; decimals are allowed, and the whole range is meant to be used:
0: nothing of the instruction was carried out, or the picture is destroyed.
3: an attempt can be seen, but the main point is missing or wrong.
5: the main point is there, with clear faults or unwanted changes.
8: carried out, with small faults.
10: carried out fully, all else kept, and the picture looks real."""

_USER = """\
Instruction: {edit_instruction}

Weigh three things: whether the edit shows what the instruction asks for, whether all that it does not mention is kept, \
and whether the picture is free of visible faults. %s
Answer with one JSON object and nothing else:
{"reason": "<one or two short sentences>", "score": <number from 0 to 10>}"""

_PHYSICS = "Above all: do light, shadow, reflection, gravity and material behave as they would in the world?"
_ENVIRONMENT = (
    "Above all: does the new setting reach the whole scene (light, weather, ground), with its subject unchanged?"
)
_SOCIAL = "Above all: do people, signs, customs and roles in the edit make sense as the instruction means them?"
_REFERENCE = "Above all: is exactly the thing changed that the instruction points at, and no other like it?"
_CAUSAL = (
    "Above all: does the edit show what would follow from the cause that the instruction names, and does it follow?"
)
_GENERAL = "The instruction counts most."

_EMPHASIS = {
    "物理": _PHYSICS,
    "physics": _PHYSICS,
    "physical": _PHYSICS,
    "环境": _ENVIRONMENT,
    "environment": _ENVIRONMENT,
    "社会": _SOCIAL,
    "social": _SOCIAL,
    "指代": _REFERENCE,
    "reference": _REFERENCE,
    "referential": _REFERENCE,
    "因果": _CAUSAL,
    "causal": _CAUSAL,
}


def default_rubric(category: str) -> Rubric:
    """One question, 0 to 10, with what counts most in a category; a category that is not known gets a general one."""
    emphasis = _EMPHASIS.get(category.strip().casefold(), _GENERAL)
    return Rubric("default", (Question("score", _SYSTEM, _USER % emphasis),))
