"""The figures over judgments: worked examples, nothing made up for what is missing, the same in any order."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.scoring.bootstrap import FEW, interval, mean_of, resampled_means
from imagemill.scoring.difference import compare
from imagemill.scoring.judgment import STATUSES, Judgment
from imagemill.scoring.scale import TEN
from imagemill.scoring.statistics import summarise

FAILED = [status for status in STATUSES if status != "ok"]


def ok(item: str, score: float, category: str = "a", **more: Any) -> Judgment:
    return Judgment(item, category, "ok", score, **more)


def failed(item: str, category: str = "a", status: Any = "parse_failed") -> Judgment:
    return Judgment(item, category, status)


def each_its_own(judgments: Sequence[Judgment]) -> dict[str, str]:
    return {one.item: one.item for one in judgments}


def by_picture(judgments: Sequence[Judgment]) -> dict[str, str]:
    """Items named `3/x` are edits of the picture `3`."""
    return {one.item: one.item.partition("/")[0] for one in judgments}


@st.composite
def runs(draw: st.DrawFn) -> list[Judgment]:
    made = []
    for number in range(draw(st.integers(0, 12))):
        item = f"{draw(st.integers(0, 4))}/{number}"
        category = draw(st.sampled_from("abc"))
        score = draw(st.none() | st.floats(0, 10))
        status = draw(st.sampled_from(FAILED))
        made.append(failed(item, category, status) if score is None else ok(item, score, category))
    return made


def without_nan(value: Any) -> bool:
    if isinstance(value, dict):
        return all(without_nan(part) for part in value.values())
    if isinstance(value, list):
        return all(without_nan(part) for part in value)
    return not isinstance(value, float) or math.isfinite(value)


# --- a judgment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", FAILED)
def test_a_judgment_without_ok_has_no_score(status: Any) -> None:
    assert not Judgment("i", "a", status).ok
    with pytest.raises(ValueError, match="i: the status is"):
        Judgment("i", "a", status, 0.0)
    with pytest.raises(ValueError, match="yet there are sub-scores"):
        Judgment("i", "a", status, scores={"x": 1})


@pytest.mark.parametrize("score", [None, math.nan, math.inf, True])
def test_an_ok_judgment_has_a_finite_score(score: Any) -> None:
    with pytest.raises(ValueError, match=r"^i: "):
        Judgment("i", "a", "ok", score)


def test_an_unknown_status_is_a_defect() -> None:
    with pytest.raises(ValueError, match="'fine' is not one of ok, parse_failed"):
        Judgment("i", "a", "fine", 1)  # type: ignore[arg-type]


def test_a_judgment_goes_through_json_and_back() -> None:
    judgment = ok("i", 8.5, "物理", scores={"x": 8.0}, text='{"score": 8.5}', reason="good", tokens=12, seconds=0.5)
    assert Judgment(**json.loads(json.dumps(judgment.as_json()))) == judgment
    assert list(judgment.as_json())[:4] == ["item", "category", "status", "score"]


# --- a summary --------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_worked_example() -> None:
    run = [ok("1", 2), ok("2", 4), ok("3", 9), failed("4"), failed("5", status="refused")]
    group = summarise(run, TEN, each_its_own(run)).overall
    assert (group.count, group.ok, group.coverage) == (5, 3, 0.6)
    assert (group.mean, group.median, group.minimum, group.maximum) == (5, 4, 2, 9)
    assert group.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert group.bounds == (3, 7)
    assert group.statuses == {"ok": 3, "parse_failed": 1, "refused": 1}
    assert group.interval is not None
    assert group.interval[0] < 5 < group.interval[1]


def test_micro_and_macro_mean_of_a_worked_example() -> None:
    run = [ok("1", 1, "a"), ok("2", 2, "a"), ok("3", 3, "a"), ok("4", 10, "b")]
    summary = summarise(run, TEN, each_its_own(run))
    assert (summary.micro_mean, summary.macro_mean) == (4, 6)
    assert [(group.name, group.mean) for group in summary.categories] == [("a", 2), ("b", 10)]


def test_a_category_without_a_score_has_no_mean_and_leaves_no_macro_mean() -> None:
    run = [ok("1", 8, "a"), failed("2", "b"), failed("3", "b", "edit_failed")]
    summary = summarise(run, TEN, each_its_own(run))
    group = summary.categories[1]
    assert (group.count, group.ok, group.coverage, group.bounds) == (2, 0, 0, (0, 10))
    assert (group.mean, group.std, group.median, group.minimum, group.maximum, group.interval) == (None,) * 6
    assert (summary.micro_mean, summary.macro_mean) == (8, None)


def test_no_judgments_give_no_figures() -> None:
    summary = summarise([], TEN, {}, categories=["物理"])
    assert (summary.micro_mean, summary.macro_mean) == (None, None)
    assert [(group.name, group.count, group.coverage, group.bounds) for group in summary.categories] == [
        ("物理", 0, None, None)
    ]
    assert summarise([], TEN, {}).categories == ()
    assert summarise([], TEN, {}).macro_mean is None


def test_one_score_has_no_spread() -> None:
    group = summarise([ok("1", 8)], TEN, {"1": "x"}).overall
    assert (group.mean, group.std, group.median, group.interval, group.bounds) == (8, None, 8, None, (8, 8))


def test_categories_keep_the_order_asked_for() -> None:
    run = [ok(name, 5, name) for name in "dbca"]
    names = [group.name for group in summarise(run, TEN, each_its_own(run), categories=["c", "e", "a"]).categories]
    assert names == ["c", "e", "a", "b", "d"]


def test_sub_scores_are_means_of_what_all_have() -> None:
    run = [ok("1", 8, scores={"x": 8, "y": 9}), ok("2", 4, scores={"x": 4}), failed("3")]
    assert summarise(run, TEN, each_its_own(run)).overall.sub_scores == {"x": 6}


def test_a_scale_without_ends_gives_no_bounds() -> None:
    run = [ok("1", 31.5), ok("2", 28.5), failed("3")]
    group = summarise(run, None, each_its_own(run)).overall
    assert (group.mean, group.bounds) == (30, None)


@pytest.mark.parametrize(
    ("run", "sources", "message"),
    [
        ([ok("1", 8), ok("1", 8)], {"1": "x"}, "1: judged twice"),
        ([ok("1", 8)], {}, "1: its source picture is not named"),
        ([ok("1", 11)], {"1": "x"}, "1: 11 is out of the scale, 0 to 10"),
    ],
)
def test_judgments_that_do_not_belong_together_are_a_defect(
    run: list[Judgment], sources: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        summarise(run, TEN, sources)


@settings(deadline=None)
@given(run=runs())
def test_figures_are_in_order_and_never_nan(run: list[Judgment]) -> None:
    summary = summarise(run, TEN, by_picture(run), draws=200)
    assert without_nan(summary.as_json())
    json.dumps(summary.as_json(), allow_nan=False)
    for group in (summary.overall, *summary.categories):
        assert sum(group.statuses.values()) == group.count >= group.ok
        if group.bounds:
            assert 0 <= group.bounds[0] <= group.bounds[1] <= 10
        if group.mean is not None and group.bounds:
            assert group.bounds[0] <= group.mean <= group.bounds[1]
            assert group.minimum <= group.mean <= group.maximum  # type: ignore[operator]
        if group.interval:
            assert group.minimum <= group.interval[0] <= group.interval[1] <= group.maximum  # type: ignore[operator]


@settings(deadline=None)
@given(run=runs(), chance=st.randoms())
def test_the_order_of_judgments_changes_nothing(run: list[Judgment], chance: random.Random) -> None:
    shuffled = run[:]
    chance.shuffle(shuffled)
    assert summarise(run, TEN, by_picture(run), draws=100) == summarise(shuffled, TEN, by_picture(run), draws=100)


def test_a_category_does_not_change_the_interval_of_another() -> None:
    run = [ok(f"{number}/{category}", number, category) for number in range(9) for category in "ab"]
    alone = [one for one in run if one.category == "a"]
    (both, _), (single,) = (summarise(one, TEN, by_picture(run)).categories for one in (run, alone))
    assert both == single


def test_the_report_of_a_run_is_the_same_byte_for_byte() -> None:
    run = [ok(f"{number % 30}/{number}", number % 11, "abcde"[number % 5]) for number in range(270)]
    first, second = (json.dumps(summarise(run, TEN, by_picture(run)).as_json()) for _ in range(2))
    assert first == second


# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_of_two_clusters_is_known() -> None:
    """Of the draws a quarter is twice the first cluster, a quarter twice the second, half is one of each."""
    pairs = [("x", 2.0), ("x", 4.0), ("y", 9.0)]
    means = resampled_means(pairs)
    assert means is not None
    assert sorted({round(float(mean), 9) for mean in means}) == [3, 5, 9]
    assert float((means < 3.5).mean()) == pytest.approx(0.25, abs=0.02)
    assert interval(pairs) == (pytest.approx(3), pytest.approx(9))


def test_many_independent_values_have_the_interval_of_the_normal_distribution() -> None:
    values = [float(number % 10) for number in range(400)]
    low, high = interval([(place, value) for place, value in enumerate(values)]) or (0, 0)
    half = 1.96 * math.sqrt(8.25) / math.sqrt(400)
    assert (low, high) == (pytest.approx(4.5 - half, abs=0.03), pytest.approx(4.5 + half, abs=0.03))


def test_edits_of_one_picture_are_no_independent_draws() -> None:
    values = [(number % 10, float(number % 10)) for number in range(100)]
    clustered = interval(values)
    free = interval([(place, value) for place, (_, value) in enumerate(values)])
    assert clustered is not None
    assert free is not None
    assert clustered[1] - clustered[0] > 2 * (free[1] - free[0])


@pytest.mark.parametrize("pairs", [[], [("x", 1.0)], [("x", 1.0), ("x", 9.0)]])
def test_fewer_than_two_pictures_have_no_interval(pairs: list[tuple[str, float]]) -> None:
    assert interval(pairs) is None
    assert resampled_means(pairs) is None


def test_equal_values_have_an_interval_without_width() -> None:
    assert interval([(place, 0.1) for place in range(7)]) == (0.1, 0.1)


PAIRS = st.lists(st.tuples(st.integers(0, 6), st.floats(0, 10)), max_size=30)


@settings(deadline=None)
@given(pairs=PAIRS, seed=st.integers(0, 3))
def test_the_interval_holds_the_mean_of_its_resamples(pairs: list[tuple[int, float]], seed: int) -> None:
    means, found = resampled_means(pairs, 500, seed), interval(pairs, 500, seed)
    assert (means is None) == (found is None) == (len({cluster for cluster, _ in pairs}) < 2)
    if means is not None and found is not None:
        assert found[0] - 1e-9 <= float(means.mean()) <= found[1] + 1e-9


@settings(deadline=None)
@given(pairs=PAIRS, chance=st.randoms())
def test_an_interval_hangs_on_the_seed_alone(pairs: list[tuple[int, float]], chance: random.Random) -> None:
    shuffled = pairs[:]
    chance.shuffle(shuffled)
    assert interval(pairs, 100) == interval(shuffled, 100) == interval([(f"p{one}", x) for one, x in pairs], 100)


def test_the_interval_of_few_clusters_covers_the_mean_less_often_than_it_says() -> None:
    chance = random.Random(1)

    def covered(clusters: int, trials: int = 200) -> float:
        found = [
            interval(((number, chance.gauss(0, 1)) for number in range(clusters)), 400) or (1, 1) for _ in range(trials)
        ]
        return sum(low <= 0 <= high for low, high in found) / trials

    assert covered(3) < 0.85
    assert covered(4 * FEW) > 0.9


def test_another_seed_draws_another_sample() -> None:
    pairs = [(place, float(place % 7)) for place in range(40)]
    assert interval(pairs, 100, seed=1) != interval(pairs, 100, seed=2)


def test_the_stream_of_draws_is_frozen() -> None:
    """A report made today has the intervals of one made years ago."""
    means = resampled_means([(place, float(place * place)) for place in range(5)], 4, 7)
    assert means is not None
    assert [round(float(mean), 6) for mean in means] == [10.2, 2.0, 6.4, 10.8]


def test_more_clusters_than_fit_in_one_piece_are_drawn_in_several() -> None:
    means = resampled_means([(place, float(place % 2)) for place in range(30_000)], 50)
    assert means is not None
    assert means.shape == (50,)
    assert 0.4 < float(means.min()) <= float(means.max()) < 0.6


def test_a_mean_lies_between_its_ends() -> None:
    assert mean_of([]) is None
    assert mean_of([0.1] * 3) == 0.1
    assert mean_of([1, 2]) == 1.5


# --- two runs ---------------------------------------------------------------------------------------------------------


def test_the_difference_of_a_worked_example() -> None:
    first = [ok("1", 4), ok("2", 6), ok("3", 5, "b"), failed("4"), ok("5", 9), failed("6"), ok("7", 1)]
    second = [ok("1", 7), ok("2", 5), ok("3", 5, "b"), ok("4", 8), failed("5"), failed("6"), ok("8", 2)]
    found = compare(first, second, each_its_own([*first, *second])).overall
    assert (found.pairs, found.first_mean, found.second_mean) == (3, 5, pytest.approx(17 / 3))
    assert found.mean == pytest.approx(2 / 3)
    assert (found.higher, found.equal, found.lower) == (1, 1, 1)
    assert found.left_out == {
        "only_in_first": 1,
        "only_in_second": 1,
        "without_score_in_first": 1,
        "without_score_in_second": 1,
        "without_score_in_both": 1,
    }
    assert found.interval is not None
    assert found.interval[0] < 2 / 3 < found.interval[1]


def test_differences_are_also_by_category() -> None:
    first, second = [ok("1", 4), ok("2", 6, "b")], [ok("1", 7), failed("2", "b")]
    found = compare(first, second, each_its_own(first)).categories
    assert [(one.name, one.pairs, one.mean, one.interval) for one in found] == [("a", 1, 3, None), ("b", 0, None, None)]


def test_runs_without_a_common_item_have_no_difference() -> None:
    first, second = [ok("1", 4)], [ok("2", 4)]
    found = compare(first, second, {"1": "x", "2": "x"}).overall
    assert (found.pairs, found.mean, found.first_mean, found.second_mean, found.interval) == (0, None, None, None, None)
    assert compare([], [], {}).overall.pairs == 0


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([ok("1", 4), ok("1", 4)], [], "1: judged twice"),
        ([ok("1", 4, "a")], [ok("1", 4, "b")], "1: a in the first run, b in the second"),
        ([ok("9", 4)], [], "9: its source picture is not named"),
    ],
)
def test_runs_that_do_not_belong_together_are_a_defect(
    first: list[Judgment], second: list[Judgment], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(first, second, {"1": "x"})


@settings(deadline=None)
@given(first=runs(), second=runs())
def test_a_comparison_turns_its_sign_with_its_runs(first: list[Judgment], second: list[Judgment]) -> None:
    first, second = ([one for one in run if one.category == "a"] for run in (first, second))
    sources = by_picture([*first, *second])
    there, back = compare(first, second, sources, draws=100).overall, compare(second, first, sources, draws=100).overall
    assert there.pairs + sum(there.left_out.values()) == len({one.item for one in (*first, *second)})
    assert there.pairs == back.pairs == there.higher + there.equal + there.lower
    assert (there.higher, there.lower) == (back.lower, back.higher)
    assert there.mean == (None if back.mean is None else pytest.approx(-back.mean))
    assert without_nan(there.as_json())


@settings(deadline=None)
@given(run=runs())
def test_a_run_does_not_differ_from_itself(run: list[Judgment]) -> None:
    found = compare(run, run[::-1], by_picture(run), draws=100).overall
    assert found.pairs == sum(one.ok for one in run) == found.equal
    assert found.mean in (0, None)
    assert found.interval in ((0, 0), None)
