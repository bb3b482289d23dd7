"""The pure parts of an evaluation: what is asked, how answers and figures are read, what an item comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imagemill import cli_eval
from imagemill.cli import app
from imagemill.cli_eval import FLAGS, with_lists
from imagemill.errors import ConfigError
from imagemill.records import Answer, Kind, Outcome, Receipt, Task
from imagemill.scoring import controls, stage_settings
from imagemill.scoring.ask import Ask, asks
from imagemill.scoring.evaluation import EvalReport
from imagemill.scoring.examiner import Examiner, examiner
from imagemill.scoring.item import Item
from imagemill.scoring.measures import Measure
from imagemill.scoring.report import words
from imagemill.scoring.report.chart import rows as chart_rows
from imagemill.scoring.settings import EvalSettings, override
from imagemill.scoring.settlement import Edits, Settled, settle


def an_item(name: str = "a", **changes: Any) -> Item:
    made = Item(name, "物理", f"edit {name}", f"/in/{name}.png", source=f"{name}.png", source_caption="a cat")
    return replace(made, **changes)


def settings(judge: str = "fake", **options: Any) -> EvalSettings:
    return override(bench="b.jsonl", edit_model="fake", judge=judge, device="cpu", **options)


# --- controls ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40))
def test_shuffled_edits_are_never_an_items_own_and_of_no_source_of_its_own_where_that_can_be(groups: list[int]) -> None:
    items = [an_item(f"i{number}", source=f"s{group}") for number, group in enumerate(groups)]
    found = controls.shuffled(items)
    assert sorted(found) == sorted(found.values()) == sorted(item.id for item in items)
    assert all(mine != other for mine, other in found.items())
    if max(map(groups.count, groups)) <= len(groups) // 2:
        source = controls.sources(items)
        assert all(source[mine] != source[other] for mine, other in found.items())


def test_shuffling_is_seeded_and_a_single_item_has_no_other() -> None:
    items = [an_item(f"i{number}") for number in range(9)]
    assert controls.shuffled(items) == controls.shuffled(items)
    assert controls.shuffled(items) != controls.shuffled(items, seed=1)
    assert controls.shuffled(items[:1]) == {}


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score", "scores"),
    [
        ('{"psnr": 20.5, "ssim": 0.8, "l1": 0.1, "resized": true}', 0.8, {"psnr": 20.5, "ssim": 0.8, "l1": 0.1}),
        ('{"psnr": null, "ssim": 1.0, "l1": 0.0}', 1.0, {"ssim": 1.0, "l1": 0.0}),
        ('{"psnr": 3, "ssim": -0.2, "l1": 0.9}', 0.0, {"psnr": 3.0, "ssim": -0.2, "l1": 0.9}),
    ],
)
def test_ssim_is_the_score_and_every_figure_is_kept(text: str, score: float, scores: dict[str, float]) -> None:
    verdict = Measure("reference").read([text])
    assert (verdict.status, verdict.score, verdict.scores) == ("ok", score, scores)


@pytest.mark.parametrize("text", ["", "no figures", "[1]", '{"psnr": 3}', '{"ssim": NaN}', '{"ssim": "0.8"}'])
def test_figures_without_ssim_are_no_score(text: str) -> None:
    assert Measure("preservation").read([text]).status == "parse_failed"


# --- what is asked ----------------------------------------------------------------------------------------------------


def tasks_of(config: EvalSettings, *items: Item, **more: Any) -> dict[str, Mapping[str, Any]]:
    edits = {item.id: f"/out/{item.id}.png" for item in items}
    found = asks(items, edits, examiner(config, items), controls=config.controls, unreadable=frozenset(), **more)
    return {ask.id: ask.task for ask in found}


def test_a_measuring_judge_gets_the_edit_what_it_is_compared_with_and_the_mask() -> None:
    item = an_item(target="/in/t.png", mask="/in/m.png")
    assert tasks_of(settings("reference"), item)["a"]["images"] == ["/out/a.png", "/in/t.png", "/in/m.png"]
    assert tasks_of(settings("preservation"), item)["a"]["images"] == ["/out/a.png", "/in/a.png", "/in/m.png"]
    assert tasks_of(settings("preservation"), an_item())["a"]["images"] == ["/out/a.png", "/in/a.png"]
    assert tasks_of(settings("reference"), an_item()) == {}


def test_an_items_id_is_never_taken_for_the_control_of_another_item() -> None:
    items = [an_item(name) for name in ("a", "a@source", "a@@source", "a@shuffled", "a@")]
    for rubric in ("default", "viescore"):
        config = settings(controls=True, rubric=rubric)
        count = len(items) * 3 * len(examiner(config, items).questions(items[0]))
        assert len(tasks_of(config, *items)) == count


def test_a_model_gets_source_and_edit_and_the_items_own_questions() -> None:
    task = tasks_of(settings(), an_item(questions=("Is it red?",)))["a"]
    assert task["images"] == ["/in/a.png", "/out/a.png"]
    assert "edit a" in task["prompt"]
    assert task["prompt"].endswith("- Is it red?")
    assert task["system_prompt"]
    assert "seed" not in task


def test_controls_ask_the_same_question_about_another_picture() -> None:
    found = tasks_of(settings(controls=True), an_item("a"), an_item("b"))
    assert found["a@source"]["images"] == ["/in/a.png", "/in/a.png"]
    assert found["a@shuffled"]["images"] == ["/in/a.png", "/out/b.png"]
    assert found["a@source"]["prompt"] == found["a@shuffled"]["prompt"] == found["a"]["prompt"]


def test_long_names_stay_names_of_tasks_and_differ() -> None:
    found = tasks_of(settings(controls=True, rubric="viescore"), an_item("x" * 200), an_item("y" * 200))
    assert len(found) == 12
    assert all(len(name) <= 200 for name in found)


def test_prompts_need_every_category_and_a_judge_that_sees_no_source_needs_prompts() -> None:
    own = replace(settings(), rubric="prompts", prompts={"环境": ("", "{edit_instruction}")})
    with pytest.raises(ConfigError, match="has none for the category '物理'"):
        examiner(own, [an_item()])
    with pytest.raises(ConfigError, match="goes with prompts of your own"):
        examiner(settings(compare_with_original=False), [an_item()])
    blind = replace(own, judge=replace(own.judge, compare_with_original=False), prompts={"物理": ("", "How good?")})
    assert tasks_of(blind, an_item())["a"]["images"] == ["/out/a.png"]


def test_items_without_a_seed_share_one_whatever_stands_around_them() -> None:
    assert stage_settings.seed(settings()) == 42
    assert stage_settings.editing(settings(seed=7)).seed == 7
    assert stage_settings.judging(settings("openai:m", base_url="http://h/v1")).model == "judge:openai:m"
    assert stage_settings.editing(settings(workers=3, schedule="lockstep")).devices.workers == 3


# --- what an item comes to --------------------------------------------------------------------------------------------


def edited(*items: Item) -> Edits:
    outcomes = {
        item.id: Outcome(
            Task(item.id, "p"),
            0,
            "done",
            path=f"/out/{item.id}.png",
            receipt=Receipt(0, 1, 8, 8, path=f"{item.id}.png"),
        )
        for item in items
    }
    return Edits(outcomes, {})


def answered(text: str = "", kind: Kind | None = None) -> Outcome:
    if kind:
        return Outcome(Task("t", "p"), 0, "failed", kind=kind, message="why")
    return Outcome(Task("t", "p"), 0, "done", elapsed=1.5, receipt=Receipt(0, 1, 0, 0, answer=Answer(text, 3)))


def settled(judge: Examiner, item: Item, edits: Edits, *outcomes: Outcome) -> Settled:
    found = [
        Ask(f"{item.id}.{question.name}", item.id, "", question.name, {}) for question in judge.questions(item)
    ] * bool(outcomes)
    by_id = {ask.id: outcome for ask, outcome in zip(found, outcomes, strict=True)}
    (one,) = settle([item], edits, found, by_id, judge, ())
    return one


def test_every_status_comes_from_what_happened() -> None:
    item, judge = an_item(), examiner(settings(), [an_item()])
    failed = Edits({"a": Outcome(Task("a", "p"), 0, "failed", kind="oom", message="full")}, {})
    found = {
        "ok": settled(judge, item, edited(item), answered("Score: 7")),
        "parse_failed": settled(judge, item, edited(item), answered("7 or 8")),
        "refused": settled(judge, item, edited(item), answered("I cannot assist with that.")),
        "error": settled(judge, item, edited(item), answered(kind="timeout")),
        "missing_image": settled(judge, item, Edits({}, {"a": "the picture is gone"})),
        "edit_failed": settled(judge, item, failed),
    }
    assert {status: one.judgment.status for status, one in found.items()} == {status: status for status in found}
    assert [one.judgment.score for one in found.values()] == [7.0, None, None, None, None, None]
    assert found["error"].judgment.message == "timeout: why"
    assert found["edit_failed"].judgment.message == "oom: full"
    ok = found["ok"].judgment
    assert (ok.text, ok.tokens, ok.seconds) == ("Score: 7", 3, 1.5)


def test_two_questions_are_one_judgment_and_one_that_fails_leaves_none() -> None:
    item = an_item()
    judge = examiner(settings(rubric="viescore"), [item])
    both = settled(judge, item, edited(item), answered('{"score": [9, 4]}'), answered('{"score": [9, 9]}'))
    assert both.judgment.score == 6.0
    assert both.judgment.tokens == 6
    assert "[perceptual_quality]" in both.judgment.text
    half = settled(judge, item, edited(item), answered('{"score": [9, 4]}'), answered(kind="transient"))
    assert (half.judgment.status, half.judgment.score) == ("error", None)
    assert len(half.answers) == 1


def test_a_judge_that_fails_over_a_target_that_does_not_read_is_a_missing_image(tmp_path: Path) -> None:
    (tmp_path / "t.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "m.png")
    item = an_item(target=str(tmp_path / "t.png"), mask=str(tmp_path / "m.png"))
    judge = examiner(settings("reference"), [item])
    one = settled(judge, item, edited(item), answered(kind="bad_task"))
    assert one.judgment.status == "missing_image"
    assert str(tmp_path) not in one.judgment.message
    whole = replace(item, target=item.mask)
    assert settled(judge, whole, edited(item), answered(kind="bad_task")).judgment.status == "error"


# --- words, chart, arguments ------------------------------------------------------------------------------------------


def test_a_share_below_all_is_never_called_all() -> None:
    assert [words.share(value) for value in (1.0, 0.99999, 0.5, 0.975, None)] == [
        "100 %",
        "99.9 %",
        "50 %",
        "97.5 %",
        "–",
    ]


@pytest.mark.parametrize(
    ("sources", "interval", "told"),
    [(1, None, False), (2, (0.1, 0.2), True), (9, (0.1, 0.2), True), (10, (0.1, 0.2), False)],
)
def test_an_interval_over_few_source_pictures_is_called_narrow(
    sources: int, interval: tuple[float, float] | None, told: bool
) -> None:
    summary = {"manifest": {"benchmark": {"sources": sources}}, "overall": {"interval": interval}}
    line = f"All items come from {sources} source pictures; the interval over so few is narrower than it should be."
    assert words.few_sources(summary) == (line if told else "")


def test_the_chart_puts_scores_at_their_share_of_the_scale() -> None:
    group = {"name": "all", "mean": 5.0, "interval": [4.0, 6.0], "bounds": [2.5, 7.5]}
    empty = {"name": "none", "mean": None, "interval": None, "bounds": [0.0, 10.0]}
    summary = {
        "scale": [0.0, 10.0],
        "categories": [empty],
        "overall": group,
        "controls": {"source": {"categories": [empty], "overall": group}},
    }
    none, whole = chart_rows(summary)
    assert (whole.mean, whole.interval, whole.bounds, whole.controls) == (50, (40, 60), (25, 75), (("source", 50),))
    assert (none.mean, none.interval, none.bounds, none.controls) == (None, None, (0, 100), ())


def test_the_last_words_give_the_usual_reason_in_one_line_of_bounded_length() -> None:
    refused = "bad_task: the endpoint refuses with 401:\nno key" + "x" * 300
    rows = [
        {"status": "error", "message": refused, "text": ""},
        {"status": "parse_failed", "message": "", "text": "I like turtles."},
        {"status": "error", "message": refused, "text": ""},
        {"status": "edit_failed", "message": "oom: no room", "text": ""},
    ]
    figures = {
        **{"edits": {"done": 3}, "unscored": {"rows": rows}, "scale": [0, 10], "headline": "score", "macro_mean": None},
        "overall": {"statuses": {"error": 2, "parse_failed": 1, "edit_failed": 1}, "mean": None, "interval": None},
    }
    report = EvalReport(Path("out"), 4, failed_edits=1, min_coverage=0.98, page=Path("p"), summary=figures)
    _, failed, coverage, why, *_ = cli_eval.summary(report)
    assert failed == "1 edits failed: oom: no room; the report tells of each, --retry-failed tries them again"
    assert coverage.startswith("coverage is below 98 % (2 error, 1 parse_failed, 1 edit_failed)")
    assert why.startswith(
        "the judge's answers without a score, mostly: bad_task: the endpoint refuses with 401: no keyxxx"
    )
    assert why.endswith("x…")
    assert len(why) < 260


def test_categories_may_stand_in_a_row() -> None:
    given_ = ["eval", "b.jsonl", "--categories", "物理", "环境", "--limit", "4"]
    assert with_lists(given_) == ["eval", "b.jsonl", "--categories", "物理", "--categories", "环境", "--limit", "4"]
    assert with_lists(["run", "--categories", "a", "b"]) == ["run", "--categories", "a", "b"]
    assert with_lists([]) == []


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("--categories a b.jsonl", "--categories a b.jsonl"),
        ("--categories a b bench --limit 4", "--categories a --categories b bench --limit 4"),
        ("--limit 4 --categories a bench", "--limit 4 --categories a bench"),
        ("--categories a --categories b bench", "--categories a --categories b bench"),
        ("--controls --categories a bench", "--controls --categories a bench"),
        ("--categories a", "--categories a"),
        ("bench --categories a b", "bench --categories a --categories b"),
        ("--categories a b --limit 4 bench", "--categories a --categories b --limit 4 bench"),
        ("--categories a b --limit=4 bench", "--categories a --categories b --limit=4 bench"),
        ("--quiet bench --categories a b", "--quiet bench --categories a --categories b"),
        ("--retry-failed=oom bench --categories a b", "--retry-failed=oom bench --categories a --categories b"),
        ("--categories a b -- bench", "--categories a --categories b -- bench"),
    ],
)
def test_the_benchmark_may_stand_before_and_after_the_categories(line: str, meant: str) -> None:
    assert with_lists(["eval", *line.split()]) == ["eval", *meant.split()]


def test_every_option_of_eval_that_takes_no_value_is_known_as_one() -> None:
    command = typer.main.get_command(app).commands["eval"]  # type: ignore[attr-defined]
    flags = {name for one in command.params if one.param_type_name == "option" and one.is_flag
             for name in (*one.opts, *one.secondary_opts)}  # fmt: skip
    assert flags | {"--retry-failed", "--help", "-h"} == set(FLAGS)
