"""The answers of judges: real shapes that are read, real shapes that are not, and what never happens."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.scoring.answers import Answer, declines, parse_answer
from imagemill.scoring.scale import TEN, Scale

HUNDRED, UNIT, FIVE, SIGNED = Scale(0, 100), Scale(0, 1), Scale(1, 5), Scale(-5, 5)
PARTS = ("editing_success", "over_editing")

READ = [
    # a number alone
    ("8", 8),
    ("8.5", 8.5),
    ("4.", 4),
    (" 0 \n", 0),
    ("**8**", 8),
    ("`7`", 7),
    ("[8]", 8),
    ("10", 10),
    ("８．５", 8.5),
    ("8 points", 8),
    ("8分", 8),
    ("8。", 8),
    # with the scale's end
    ("8/10", 8),
    ("8.5/10", 8.5),
    ("8.5 / 10.", 8.5),
    ("8,5/10", 8.5),
    ("**8.5**/10", 8.5),
    ("8／10", 8),
    ("8 out of 10", 8),
    ("8 (out of 10)", 8),
    ("8分（满分10分）", 8),
    ("8/10 - the shadow is missing.", 8),
    ("8/10 The shadow is missing.", 8),
    ("Score: 8 of 10", 8),
    ("On a 10-point scale: 8/10.", 8),
    ("按10分制，评分：8", 8),
    ("It deserves an 8/10.", 8),
    ("The edit is not perfect, 7/10.", 7),
    # a label
    ("Score: 8.5", 8.5),
    ("score = 8", 8),
    ("Score -> 8", 8),
    ("Score – 8", 8),
    ("Score 8", 8),
    ("SCORE:8", 8),
    ("**Score:** 7", 7),
    ("**Score: 7/10**", 7),
    ("**Score**: 7", 7),
    ("### Score: 7\n- 2 objects are missing\n- 1 is new", 7),
    ("### Score\n7", 7),
    ("Score:\n**8/10**\n\nThe sky is right.", 8),
    ("Score (0-10): 8", 8),
    ("Score 0-10: 8", 8),
    ("Score (out of 10): 8", 8),
    ("Score: 8,5", 8.5),
    ("Score: [8]", 8),
    ("Score: 8. Two of the 3 lamps are lit.", 8),
    ("Score: 8\nReason: covers 2/3 of the frame.", 8),
    ("Reason: good light, 3 shadows.\nScore: 6", 6),
    ("Rating: 8/10 stars", 8),
    ("Score: 8 points", 8),
    ("Final Score: **8.0**", 8),
    ("| Score | 8 |", 8),
    ("<score>8</score>", 8),
    ("<answer>7</answer>", 7),
    (r"\boxed{8}", 8),
    (r"The answer is $\boxed{8.5}$", 8.5),
    ("评分：8", 8),
    ("评分：８．５", 8.5),
    ("得分: 7.5分", 7.5),
    ("**评分**：8/10", 8),
    ("评分（0-10）：8", 8),
    ("评分：8，2处瑕疵", 8),
    ("评分：8分，整体不错", 8),
    ("综合评分：8.0", 8),
    ("评分为8分", 8),
    ("评分是 7.5", 7.5),
    ("我给这张图打8分。", 8),
    ("满分10分，得8分", 8),
    ("理由：光线正确。\n得分8分", 8),
    # a sentence
    ("The score is 8.", 8),
    ("I would rate this edit an 8 because the light is right.", 8),
    ("I'd give it a 7/10.", 7),
    ("I would give this edit a score of 8.5.", 8.5),
    ("On a scale of 0 to 10, I'd rate this edit 8.", 8),
    ("The lamp is lit.\n\n8", 8),
    ("8\n\nThe lamp is lit, and 2 others are new.", 8),
    # several numbers, one of which is named as the whole
    ("Success score: 9\nPreservation score: 7\nFinal score: 8", 8),
    ("Overall: 8/10 (success: 9/10, preservation: 7/10)", 8),
    ("Score: 8\n\nSo the score is 8/10.", 8),
    # JSON
    ('{"score": 8.5, "reason": "good"}', 8.5),
    ('{"reason": "only 2/3 of it, 5/10 for light", "score": 7}', 7),
    ('{"Score": 8}', 8),
    ('{"score": "8.5"}', 8.5),
    ('{"score": "8/10"}', 8),
    ('{"score": "７分"}', 7),
    ('{"score": [8], "reasoning": "good"}', 8),
    ('{"score": 8, "max_score": 10}', 8),
    ('{"overall_score": 8, "accuracy": 9, "quality": 7}', 8),
    ('{"result": {"score": 8}, "id": 3}', 8),
    ('[{"score": 8}]', 8),
    ('{"评分": 8, "理由": "好"}', 8),
    ('```json\n{"score": 8}\n```', 8),
    ('```\n{\n  "score": 8.0,\n  "reason": "a\nb"\n}\n```\nThat is all.', 8),
    ('Here is my judgment of the 2 pictures: {"score": 8, "reason": "fine"} as asked.', 8),
    ('The success is 9/10, the rest 7/10.\n{"score": 8}', 8),
    ('||V^=^V||\n{"score": [6], "reasoning": "x"}\n||V^=^V||', 6),
    ('{{"score": 8, "reason": "braces as in the template"}}', 8),
    ('{"score": 8} {"score": 8.0}', 8),
    ('{"score"：8，"reason"："好"}', 8),
    ("{“score”: 8, “reason”: “good”}", 8),
    # nearly JSON
    ("{'score': 8, 'reason': 'it\\'s good'}", 8),
    ('{"score": 8, "reason": "the "new" lamp"}', 8),
    ('{"score": 8,}', 8),
    ("{score: 8}", 8),
    (r"{\"score\": 8, \"reason\": \"good\"}", 8),
    ('{"score": 8.5, "reason": "The light comes fr', 8.5),
    # thinking
    ("<think>maybe 3/10, or 4</think>8", 8),
    ('<think>Score: 3</think>\n\n```json\n{"score": 8}\n```', 8),
    ("Score: 3, no.\n</think>\n\nScore: 8", 8),
    ("<|begin_of_box|>8<|end_of_box|>", 8),
    ("I can't see any change between the two. Score: 0", 0),
]

NOT_READ = [
    ("", "empty"),
    ("   \n", "empty"),
    ("The edit is good.", "no score"),
    ("★★★★☆", "no score"),
    ("Score: eight", "no score"),
    ("Score: N/A", "no score"),
    ("Score:", "no score"),
    ("评分：八分", "no score"),
    # several
    ("7-8", "range"),
    ("Score: 7-8", "range"),
    ("Score: 7–8/10", "range"),
    ("Score: 7 to 8", "range"),
    ("Score: 7 or eight", "range"),
    ("between 7 and 8 out of 10", "range"),
    ("评分：7到8分", "range"),
    ("评分：7~8", "range"),
    ("Score: 8 ± 0.5", "range"),
    ("Score: 8 5", "several"),
    ("Score: 8 1/2", "several"),
    ("Score: 8, 7", "several"),
    ("8 and 7", "no score"),
    ("Score: 8\nScore: 7", "different scores: 7, 8"),
    ("Success: 9/10. Preservation: 7/10.", "different scores: 7, 9"),
    ("Score: 8\n\nI would give it 6/10.", "different scores: 6, 8"),
    ("8\n\nGood.\n\n7", "different scores"),
    ('{"score": 8} {"score": 7}', "different scores"),
    ('[{"score": 8}, {"score": 7}]', "different scores"),
    ('{"score": 8, "score": 7}', "twice"),
    ('{"score": 8, "overall": 7}', "different scores"),
    ('{"score": [8, 7]}', "in the place of one score"),
    ('Score: 8\n{"score": 7}', "different scores: 7 in JSON, 8 beside it"),
    # not on the scale
    ("11", "out of the scale"),
    ("Score: 85", "out of the scale"),
    ("Score: -3", "out of the scale"),
    ("-3", "out of the scale"),
    ('{"score": -1}', "out of the scale"),
    ('{"score": 10.5}', "out of the scale"),
    ('{"score": NaN}', "nan is out"),
    ('{"score": Infinity}', "inf is out"),
    ('{"score": 1e999}', "inf is out"),
    ("8/100", "/100"),
    ("Score: 4/5", "/5"),
    ("Score: 8 out of 12", "out of 12"),
    ('{"score": "8/100"}', "/100"),
    ('{"score": 8, "max_score": 100}', "max_score is 100"),
    ("On a scale of 1 to 5, I'd rate it 4.", "another scale"),
    ("Score: 4 out of five", "another scale"),
    ("Score: 4 (of 5)", "of 5"),
    ("Rating: 4 stars", "another scale"),
    ("Rating: 4 stars out of 5", "another scale"),
    ("评分：4星", "another scale"),
    ("On a 5-point scale: Score: 4", "another scale"),
    ("按五分制，评分：4", "another scale"),
    ("85%", "percentage"),
    ("Score: 85%", "percentage"),
    # not one number
    ("Score: 8½", "not one number"),
    ("Score: 8²", "not one number"),
    ("评分：8分半", "not one number"),
    ("评分：8百", "not one number"),
    ("Score: 8+", "not one number"),
    ("Score: 8x", "not one number"),
    ("Score: 8e0", "not one number"),
    ("Score: 8.5.1", "not one number"),
    ("Score: 8,500", "not one number"),
    ('{"score": 8,5}', "not one number"),
    ("2024/10/10", "not one number"),
    ("Score: 8 / 10 / 9", "several"),
    ("评分：8分之一", "not one number"),
    # not a score
    ("9/10 of the background is kept.", "no score"),
    ("8 out of 10 lamps are lit.", "no score"),
    ("9/10的背景没有变化。", "no score"),
    ("Maximum score: 10", "no score"),
    ("A perfect score of 10 needs better light.", "no score"),
    ("Confidence: 9/10", "no score"),
    ("Answer: 2 lamps are lit.", "no score"),
    ("得8分钟的光", "not one number"),
    ("Score: ~8", "no score"),
    ("about 8/10", "no plain statement"),
    ("I can see 3 lamps.", "no score"),
    ("I would rate this lower since 2 lamps are missing", "no score"),
    ("I give it 2 thumbs up", "no score"),
    ("This is not a 10/10.", "no plain statement"),
    ("I can't give it more than 6/10.", "no plain statement"),
    ("The score would be 10 if the light were right.", "no score"),
    ("1.\nThe light is right.\n2.\nThe lamp is lit.", "no score"),
    ("Score:\n1. Good light\n2. Bad lamp", "no score"),
    ("Score: 0-10", "no score"),
    ('{"score": true}', "true is no score"),
    ('{"score": null}', "no score"),
    ('{"score": "high"}', "is no number"),
    ('{"score": {"light": 8, "lamp": 7}}', "no score"),
    ('{"light": 8, "lamp": 7}', "no score"),
    ('{"score": <number>, "reason": "..."}', "no score"),
    ('{"quality_score": 8', "no score"),
    # cut off
    ('{"score": 8', "cut off"),
    ('{"reason": "good", "score": 8.', "cut off"),
    ("<think>Let me look. Score: 8", "ends inside its thinking"),
]

REFUSED = [
    "I'm sorry, but I can't assist with that request.",
    "I’m sorry, I can’t help with identifying people in images.",
    "I cannot evaluate these pictures.",
    "I'm unable to view images.",
    "Unfortunately I am not able to rate this from 0 to 10.",
    "I won't be able to provide a score.",
    "As an AI model, I can't see the two images you mention.",
    "Sorry.",
    "抱歉，我无法对这张图片进行评分。",
    "无法评估。",
    "对不起，我不能提供帮助。",
    "作为一个语言模型，我无法查看图片。",
    '{"score": null, "reason": "I cannot evaluate this image."}',
    '{"score": "N/A", "reason": "无法判断"}',
    "<think>Should I? 3/10.</think>I can't help with that.",
]


def score(answer: Answer) -> float | None:
    return answer.scores.get("score")


def test_the_table_holds_the_shapes_that_were_promised() -> None:
    texts = [text for text, _ in READ] + [text for text, _ in NOT_READ] + REFUSED
    assert len(texts) == len(set(texts)) >= 60


@pytest.mark.parametrize(("text", "value"), READ)
def test_a_clear_score_is_read(text: str, value: float) -> None:
    answer = parse_answer(text)
    assert (answer.status, dict(answer.scores), answer.problem) == ("ok", {"score": value}, "")


@pytest.mark.parametrize(("text", "problem"), NOT_READ)
def test_what_is_not_one_clear_score_is_none_and_says_why(text: str, problem: str) -> None:
    answer = parse_answer(text)
    assert (answer.status, dict(answer.scores)) == ("parse_failed", {})
    assert problem in answer.problem
    assert "\n" not in answer.problem


@pytest.mark.parametrize("text", REFUSED)
def test_an_answer_that_declines_is_a_refusal(text: str) -> None:
    answer = parse_answer(text)
    assert (answer.status, dict(answer.scores)) == ("refused", {})


@pytest.mark.parametrize(
    "text",
    [
        "I can't see any change.",
        "The lamp cannot be told from the wall.",
        "背包无法辨认。",
        "It will not help the eye.",
    ],
)
def test_words_about_the_picture_are_no_refusal(text: str) -> None:
    assert parse_answer(text).status == "parse_failed"


def test_a_refusal_is_known_by_its_words_alone() -> None:
    assert declines("I cannot assist with this.")
    assert not declines("The edit is good.")


@pytest.mark.parametrize(
    ("text", "scale", "value"),
    [
        ("85%", HUNDRED, 85),
        ("Score: 85 %", HUNDRED, 85),
        ("Score: 85 percent", HUNDRED, 85),
        ("85/100", HUNDRED, 85),
        ("Score: 85,5", HUNDRED, 85.5),
        ("Score: .85", UNIT, 0.85),
        ("0.85/1", UNIT, 0.85),
        ("4/5", FIVE, 4),
        ("Score (1-5): 4", FIVE, 4),
        ("Score: -3", SIGNED, -3),
        ("Score: −3.5", SIGNED, -3.5),
        ('{"score": -3}', SIGNED, -3),
    ],
)
def test_other_scales_are_read_by_their_own_ends(text: str, scale: Scale, value: float) -> None:
    assert score(parse_answer(text, scale)) == value


@pytest.mark.parametrize(("text", "scale"), [("8/10", HUNDRED), ("85%", UNIT), ("0", FIVE), ("6", SIGNED)])
def test_other_scales_refuse_what_is_not_theirs(text: str, scale: Scale) -> None:
    assert parse_answer(text, scale).status == "parse_failed"


# --- several scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"score": [8, 7], "reasoning": "good"}',
        '{"score": ["8", "7/10"], "reasoning": "good"}',
        '```json\n{"reasoning": "x", "score": [8.0, 7.0]}\n```',
        '||V^=^V||\n{\n"score" : [8, 7],\n"reasoning" : "good"\n}\n||V^=^V||',
        '{"score": [8, 7], "reasoning": "the "new" lamp',
        "{'score': [8, 7], 'reasoning': 'good'}",
        '{"editing_success": 8, "over_editing": 7, "reasoning": "good"}',
        '{"score": {"editing success": 8, "Over-editing": 7}}',
        '{"score1": 8, "score2": 7}',
        '{"score_1": 8, "score_2": 7}',
        "[8, 7]",
        "output score = [8, 7]",
        "Score: [8/10, 7/10]",
        "Editing success: 8\nOver-editing: 7",
        "**Editing Success Score:** 8/10\n**Over-editing:** 7/10\nGood.",
        "score1 = 8, score2 = 7",
        "<think>[1, 2]</think>[8, 7]",
    ],
)
def test_the_scores_of_several_parts_are_read(text: str) -> None:
    answer = parse_answer(text, TEN, PARTS)
    assert (answer.status, dict(answer.scores)) == ("ok", {"editing_success": 8, "over_editing": 7})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"score": [8], "reasoning": "x"}', "1 scores where 2"),
        ('{"score": [8, 7, 6]}', "3 scores where 2"),
        ('{"score": 8}', "one score where 2"),
        ('{"score": [8, 70]}', "out of the scale"),
        ('{"score": [8, null]}', "null"),
        ('{"score": [8, true]}', "true is no score"),
        ('{"score": [8, NaN]}', "nan"),
        ('{"score": [8, 7]} {"score": [8, 6]}', "different scores"),
        ('{"editing_success": 8}', "no scores"),
        ("[8, 7] and [7, 8]", "different scores"),
        ("[8, 7, 6]", "3 scores where 2"),
        ("Editing success: 8", "no score"),
        ("Editing success: 8\nOver-editing: 6-7", "range"),
        ("8, 7", "no scores"),
        ("8", "no scores"),
        ("Score: 8", "no scores"),
        ('{"score": [8, 7', "no scores"),
    ],
)
def test_a_part_without_a_clear_score_leaves_all_without(text: str, problem: str) -> None:
    answer = parse_answer(text, TEN, PARTS)
    assert (answer.status, dict(answer.scores)) == ("parse_failed", {})
    assert problem in answer.problem


# --- the reason -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"score": 8, "reason": "good light"}', "good light"),
        ('{"score": [8], "reasoning": " good "}', "good"),
        ('{"评分": 8, "理由": "光线正确，很好。"}', "光线正确，很好。"),
        ("Score: 8\nReason: good light", "good light"),
        ("理由：光线正确\n评分：8", "光线正确\n评分：8"),
        ('{"score": 8.5, "reason": "The light com', "The light com"),
        ("I'd give it a 7/10.", "I'd give it a 7/10."),
        ("8/10", ""),
        ('{"score": 8}', ""),
        ("The light.", "The light."),
    ],
)
def test_the_judges_own_words_are_kept(text: str, reason: str) -> None:
    assert parse_answer(text).reason == reason


# --- what never happens -----------------------------------------------------------------------------------------------

FORMATS = [
    "{}",
    "{}/10",
    "{} / 10",
    "{} out of 10",
    "Score: {}",
    "**Score:** {}",
    "Score: {}/10. The light is right.",
    "评分：{}",
    "得分: {}分",
    "The light is right.\n\nScore: {}",
    '{{"score": {}, "reason": "x"}}',
    '{{"score": "{}"}}',
    '```json\n{{"score": {}}}\n```',
    "{{'score': {}, 'reason': 'x'}}",
    "<think>7 or 8?</think>{}",
    "I would rate this edit {}.",
]
SCORES = st.one_of(st.integers(0, 10), st.decimals(0, 10, places=1), st.decimals(0, 10, places=3), st.just("10.0"))


@given(value=SCORES, shape=st.sampled_from(FORMATS))
def test_every_score_reads_back_from_every_shape(value: object, shape: str) -> None:
    assert score(parse_answer(shape.format(value))) == float(str(value))


@given(value=st.decimals(0, 10, places=2), wide=st.booleans())
def test_a_decimal_comma_and_full_width_digits_read_back(value: object, wide: bool) -> None:
    text = str(value)
    text = text.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)}) if wide else text.replace(".", ",")
    assert score(parse_answer(f"Score: {text}")) == float(str(value))


@given(text=st.text(st.characters(exclude_categories=["Nd"]), max_size=200))
def test_text_without_digits_never_gives_a_score(text: str) -> None:
    assert parse_answer(text).status != "ok"
    assert parse_answer(text, TEN, PARTS).status != "ok"


PIECES = st.sampled_from(
    [
        "Score",
        ":",
        " ",
        "8",
        "7.5",
        "/",
        "10",
        "-",
        "{",
        "}",
        '"score"',
        "[",
        "]",
        ",",
        "\n",
        "评分：",
        "分",
        "%",
        "½",
        "not ",
        "\\",
    ]
)


@given(pieces=st.lists(PIECES | st.text(max_size=3), max_size=25), parts=st.sampled_from([("score",), PARTS]))
def test_whatever_is_read_stands_in_the_text_and_on_the_scale(pieces: list[str], parts: tuple[str, ...]) -> None:
    text = "".join(pieces)
    answer = parse_answer(text, TEN, parts)
    assert bool(answer.scores) == (answer.status == "ok") != bool(answer.problem)
    for value in answer.scores.values():
        assert math.isfinite(value)
        assert 0 <= value <= 10
        assert str(int(value)) in "".join(str(int(char)) if char.isdecimal() else char for char in text)


@given(
    first=st.integers(0, 10),
    second=st.integers(0, 10),
    shape=st.sampled_from(["Score: {}\nScore: {}", "{}/10 or {}/10", "{}-{}"]),
)
def test_two_scores_are_one_only_if_they_are_equal(first: int, second: int, shape: str) -> None:
    assert score(parse_answer(shape.format(first, second))) in (None, *([first] if first == second else []))


@given(value=st.floats(allow_nan=True, allow_infinity=True))
def test_a_json_number_is_read_exactly_or_not_at_all(value: float) -> None:
    answer = parse_answer(json.dumps({"score": value}))
    assert score(answer) == (value if 0 <= value <= 10 else None)


@pytest.mark.parametrize(
    "text", ["[" * 40_000, '{"a":' * 8_000, "<think>" * 7_000, "8/" * 20_000, "Score: " * 7_000, "9" * 49_000]
)
def test_a_judge_that_stammers_is_no_defect(text: str) -> None:
    assert parse_answer(text).status == "parse_failed"


def test_an_answer_without_end_is_not_read() -> None:
    assert "more than 50,000" in parse_answer("Score: 8 " + "x" * 50_000).problem
    assert score(parse_answer("<think>" + "x" * 60_000 + "</think>Score: 8")) == 8


def test_a_status_and_scores_that_disagree_are_a_defect() -> None:
    with pytest.raises(ValueError, match="the status is ok"):
        Answer("ok")
    with pytest.raises(ValueError, match="the status is refused"):
        Answer("refused", {"score": 8})


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (0, math.inf), (math.nan, 1)])
def test_a_scale_has_two_ends_in_order(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="is none"):
        Scale(low, high)


# --- cut off by the limit of tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 8, "reasoning": "the colours of', 8.0),
        ('```json\n{\n  "score": 8.5,\n  "reasoning": "the col', 8.5),
        ('{"score": 7, "reasoning": "fine"}\nMoreover, the', 7.0),
        ("Score: 8\nReason: the sky is blue and the", 8.0),
        ("**Score:** 6/10\n\nThe edit keeps the", 6.0),
    ],
)
def test_of_an_answer_that_was_cut_off_a_score_that_has_an_end_counts(text: str, score: float) -> None:
    assert parse_answer(text, cut=True).scores == {"score": score}


@pytest.mark.parametrize(
    "text",
    [
        "At first glance I would rate this 8/10. However, looking closer, the",
        "At first glance I would rate this 8/10.\nHowever, looking closer, the",
        "Score: 1",
        "The edit is good.\nScore: 1",
        '{"score": 1',
        '{"reasoning": "the sky", "score": 1',
        "8",
        "I cannot see much of",
        "<think>The sky",
        "",
    ],
)
def test_what_may_have_gone_on_is_no_score_and_the_mend_is_told(text: str) -> None:
    answer = parse_answer(text, cut=True)
    assert (answer.status, dict(answer.scores)) == ("parse_failed", {})
    assert "raise max_new_tokens" in answer.problem


def test_two_scores_that_are_cut_off_are_none() -> None:
    parts = ("consistency", "quality")
    assert parse_answer("Consistency: 8\nQuality: 7\nThe", TEN, parts, cut=True).scores == dict(
        zip(parts, (8, 7), strict=True)
    )
    assert parse_answer("Consistency: 8\nQuality: 1", TEN, parts, cut=True).status == "parse_failed"
