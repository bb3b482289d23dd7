"""Rubrics: templates, the built-in questions, and how answers become one score."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.errors import ConfigError
from imagemill.scoring.answers import Answer
from imagemill.scoring.questions import default_rubric, viescore
from imagemill.scoring.rubrics import Question, Rubric, from_prompts
from imagemill.scoring.scale import Scale

CATEGORIES = ("物理", "环境", "社会", "指代", "因果")


def a_question(user: str, system: str = "") -> Question:
    return Question("score", system, user)


def consistency(first: float, second: float) -> Answer:
    return Answer("ok", {"editing_success": first, "over_editing": second}, "moved")


def quality(first: float, second: float) -> Answer:
    return Answer("ok", {"naturalness": first, "artifacts": second}, "sharp")


# --- templates --------------------------------------------------------------------------------------------------------


def test_known_placeholders_are_filled_in_both_prompts() -> None:
    question = a_question("Do {edit_instruction}, again {edit_instruction}.", "Of {original_description}")
    assert question.filled("a cat", "turn it") == ("Of a cat", "Do turn it, again turn it.")


@pytest.mark.parametrize(
    "example",
    ['{"score": 8}', '{"a": {"score": <n>}}', "{ }", "{", "}", "{{", '{"a": [{}]}', "{0}", "{edit_instruction"],
)
def test_braces_of_examples_stay_as_they_are(example: str) -> None:
    assert a_question(f"{example} and {{edit_instruction}} {{").filled("", "turn") == ("", f"{example} and turn {{")


def test_doubled_braces_of_a_format_template_become_single_ones() -> None:
    question = a_question('{edit_instruction}: {{"score": 8}}', 'Answer {{"a": {{"b": 1}}}}')
    assert question.filled("", "turn") == ('Answer {"a": {"b": 1}}', 'turn: {"score": 8}')


def test_a_placeholder_inside_an_example_is_filled_in() -> None:
    assert a_question('{"a": {"do": "{edit_instruction}", "x": {edit_instruction}}}').filled("", "turn")[1] == (
        '{"a": {"do": "turn", "x": turn}}'
    )


@pytest.mark.parametrize("template", ["{edit_instruction}", '{edit_instruction} {"score": 1}'])
@given(text=st.text())
def test_what_is_filled_in_is_not_read_as_a_template(template: str, text: str) -> None:
    for value in (text, "{original_description}", "{edit_instruction}", "{{x}}", "\\1"):
        assert a_question(template).filled("cat", value)[1].startswith(value)


def test_a_configurations_prompts_are_one_question_a_category() -> None:
    rubrics = from_prompts({"物理": ("be strict", "{edit_instruction}"), "环境": ("", "x")}, Scale(0, 5))
    assert list(rubrics) == ["物理", "环境"]
    assert rubrics["物理"].questions == (Question("score", "be strict", "{edit_instruction}"),)
    assert rubrics["物理"].scale == Scale(0, 5)
    assert rubrics["物理"].sub_scores == ()


@pytest.mark.parametrize(
    ("system", "user", "message"),
    [
        (
            "",
            "{edit_instructon}",
            "prompts.物理.user_prompt_template: {edit_instructon} is not known; did you mean {edit_instr",
        ),
        (
            "{description}",
            "",
            "prompts.物理.system_prompt: {description} is not known; did you mean {original_description}?",
        ),
        ("", '{"score": {score}}', "{score} is not known"),
        ("", "{编辑}", "{编辑} is not known"),
        ("", "{{edit_instruction}}", "{{edit_instruction}} is not filled in; write {edit_instruction}"),
    ],
)
def test_an_unknown_placeholder_is_named_with_its_place_and_the_nearest(system: str, user: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_prompts({"物理": (system, user)})
    assert message in str(caught.value)


# --- revisions --------------------------------------------------------------------------------------------------------


def test_every_part_of_a_rubric_changes_its_revision_and_nothing_else_does() -> None:
    question = Question("score", "system", "user")
    rubric = Rubric("mine", (question,))
    others = [
        Rubric("yours", (question,)),
        Rubric("mine", (question,), Scale(0, 5)),
        Rubric("mine", (question, replace(question, name="more"))),
        *(
            Rubric("mine", (replace(question, **change),))
            for change in ({"name": "n"}, {"system": "s"}, {"user": "u"}, {"images": "edit"}, {"parts": ("a", "b")})
        ),
    ]
    revisions = {one.revision for one in (rubric, *others)}
    assert len(revisions) == len(others) + 1
    assert rubric.revision == Rubric("mine", (Question("score", "system", "user"),), Scale(0, 10)).revision
    assert all(len(revision) == 64 and int(revision, 16) >= 0 for revision in revisions)


def test_a_rubric_without_questions_or_with_equal_names_is_a_defect() -> None:
    one = Question("a", "", "", parts=("x", "y"))
    for questions in ((), (one, replace(one, name="b")), (a_question(""), a_question(""))):
        with pytest.raises(ValueError, match="names that differ"):
            Rubric("mine", questions)
    with pytest.raises(ValueError, match="below 0"):
        Rubric("mine", (a_question(""), Question("other", "", "")), Scale(-1, 1))


# --- the built-in rubrics ---------------------------------------------------------------------------------------------


def test_viescore_asks_two_questions_of_two_parts() -> None:
    rubric = viescore()
    assert [(question.name, question.images, question.parts) for question in rubric.questions] == [
        ("semantic_consistency", "both", ("editing_success", "over_editing")),
        ("perceptual_quality", "edit", ("naturalness", "artifacts")),
    ]
    assert rubric.scale == Scale(0, 10)
    system, user = rubric.questions[0].filled("", "turn the cat")
    assert "turn the cat" in user
    assert '{"score": [' in system


@given(values=st.tuples(*[st.floats(0, 10)] * 4))
def test_viescore_is_the_root_of_the_product_of_the_lowest(values: tuple[float, ...]) -> None:
    verdict = viescore().combine([consistency(*values[:2]), quality(*values[2:])])
    assert verdict.status == "ok"
    assert verdict.score == pytest.approx(math.sqrt(min(values[:2]) * min(values[2:])))
    assert 0 <= verdict.score <= 10
    assert verdict.scores["semantic_consistency"] == min(values[:2])
    assert verdict.scores["perceptual_quality"] == min(values[2:])


def test_a_verdict_names_every_sub_score_and_reason() -> None:
    verdict = viescore().combine([consistency(8, 9), quality(2, 7)])
    assert verdict.score == 4
    assert list(verdict.scores.items()) == [
        ("semantic_consistency", 8),
        ("editing_success", 8),
        ("over_editing", 9),
        ("perceptual_quality", 2),
        ("naturalness", 2),
        ("artifacts", 7),
    ]
    assert tuple(verdict.scores) == viescore().sub_scores
    assert verdict.reason == "semantic_consistency: moved\nperceptual_quality: sharp"


def test_raw_answers_are_read_by_the_parts_of_their_question() -> None:
    good, bad = '{"score": [9, 9], "reasoning": "fine"}', '{"score": [4, 5]}'
    assert viescore().read([good, bad]).score == 6
    verdict = viescore().read([good, '{"score": 4}'])
    assert (verdict.status, verdict.score, dict(verdict.scores)) == ("parse_failed", None, {})
    assert verdict.message.startswith("perceptual_quality: one score where 2 are asked for")
    assert verdict.reason == "semantic_consistency: fine"


def test_one_refusal_among_the_answers_is_a_refusal() -> None:
    verdict = viescore().read(["no number", "I cannot assist with this."])
    assert (verdict.status, verdict.score) == ("refused", None)
    assert "semantic_consistency: no scores found" in verdict.message


def test_an_answer_that_is_missing_is_a_defect() -> None:
    with pytest.raises(ValueError, match="zip"):
        viescore().read(["[8, 8]"])


@pytest.mark.parametrize("category", [*CATEGORIES, "physics", "anything"])
def test_the_default_rubric_asks_for_one_score_from_0_to_10(category: str) -> None:
    rubric = default_rubric(category)
    (question,) = rubric.questions
    assert (question.parts, question.images, rubric.scale) == (("score",), "both", Scale(0, 10))
    _, user = question.filled("", "turn the cat")
    assert "Instruction: turn the cat" in user
    assert '{"reason": ' in user
    assert "%" not in user
    assert rubric.read(['{"reason": "good", "score": 7.5}']).score == 7.5


def test_the_default_rubric_knows_the_categories_of_the_benchmark() -> None:
    revisions = {default_rubric(category).revision for category in (*CATEGORIES, "anything")}
    assert len(revisions) == 6
    assert default_rubric(" Physics").revision == default_rubric("物理").revision


@pytest.mark.parametrize("rubric", [viescore(), default_rubric("物理"), default_rubric("x")], ids=lambda one: one.name)
def test_the_example_in_a_prompt_is_no_answer(rubric: Rubric) -> None:
    """A judge that repeats its prompt has said nothing."""
    for question in rubric.questions:
        prompt = "\n".join(question.filled("", "turn"))
        texts = [prompt] * len(rubric.questions)
        assert rubric.read(texts).status != "ok"


def test_single_answers_keep_their_score_and_no_sub_scores() -> None:
    verdict = default_rubric("x").read([json.dumps({"score": 8.5, "reason": "fine"})])
    assert (verdict.score, dict(verdict.scores), verdict.reason, verdict.message) == (8.5, {}, "fine", "")
