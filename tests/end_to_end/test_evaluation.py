"""`imagemill eval` and `imagemill compare`: two stages, no invented number, and a report that a resume does not change."""

from __future__ import annotations

import html
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command import Ended, until
from workplace import Workplace

FILES = ("judgments.jsonl", "report.json", "report.md", "report.html")
CATEGORIES = ("物理", "环境", "object <b>")
EVAL = ("eval", "items.jsonl", "--edit-model", "fake", "--out", "out", "--device", "cpu")
FAKE = (*EVAL, "--judge", "fake")


def draw(path: Path, seed: int = 0) -> str:
    fields = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(fields).resize((64, 48), Image.Resampling.NEAREST).save(path)
    return path.name


def bench(place: Workplace, count: int = 9, scripts: Callable[[int], dict[str, Any]] = lambda number: {}) -> None:
    """Items in three categories from four sources. The script of an item is for the model that edits and for the judge."""
    names = [draw(place.folder / f"source{seed}.png", seed) for seed in range(4)]
    rows = [
        {
            "id": f"e{number}",
            "category": CATEGORIES[number % 3],
            "instruction": f"make it {number}",
            "image": names[number % 4],
            "fake": {"answer": f"Score: {number % 11}", **scripts(number)},
        }
        for number in range(count)
    ]
    place.tasks(rows, "items.jsonl")


def report(place: Workplace, out: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place.folder / out / "report.json").read_text("utf-8"))
    return found


def judgments(place: Workplace, out: str = "out") -> dict[str, dict[str, Any]]:
    lines = (place.folder / out / "judgments.jsonl").read_text("utf-8").splitlines()
    return {row["item"]: row for row in map(json.loads, lines)}


def statuses(place: Workplace, out: str = "out") -> dict[str, str]:
    return {item: row["status"] for item, row in judgments(place, out).items()}


def timeless(folder: Path) -> dict[str, str]:
    """The four reports without what hangs on the clock: the places that docs/evaluation.md names."""
    found = {name: (folder / name).read_text("utf-8") for name in FILES}
    summary = json.loads(found["report.json"])
    del summary["timing"]
    found["report.json"] = json.dumps(summary, ensure_ascii=False)
    found["report.md"] = found["report.md"].partition("## Timing")[0]
    found["report.html"] = re.sub(r'<section id="timing">.*?</section>', "", found["report.html"], flags=re.DOTALL)
    found["judgments.jsonl"] = re.sub(r'"seconds":[0-9.e-]+', "", found["judgments.jsonl"])
    return found


def done(place: Workplace, stage: str) -> int:
    """How many tasks of a stage are done by now."""
    ledger = f"out/{stage}"
    if not (place.folder / ledger / "ledger.sqlite").exists():
        return 0
    return int(place.ledger("SELECT count(*) FROM sqlite_master WHERE name = 'tasks'", ledger)[0][0]) and int(
        place.ledger("SELECT count(*) FROM tasks WHERE state = 'done'", ledger)[0][0]
    )


# --- two stages -------------------------------------------------------------------------------------------------------


def test_all_edits_come_before_all_judgments_and_each_model_is_loaded_once_a_worker(place: Workplace) -> None:
    bench(place, 12)
    # in lockstep nothing starts before both workers are there
    ended = place(*FAKE, "--workers", "2", "--schedule", "lockstep")
    assert ended.code == 0, ended.text
    found = report(place)
    assert [found["timing"][name]["loads"] for name in ("edits", "judgments")] == [2, 2]
    assert found["timing"]["loads"] == 4
    (last,) = place.ledger("SELECT max(ended) FROM attempts", "out/edits")
    (first,) = place.ledger("SELECT min(started) FROM spans", "out/judgments")
    assert last[0] < first[0]
    assert [one["name"] for one in found["categories"]] == list(CATEGORIES)
    assert (found["overall"]["count"], found["overall"]["ok"], found["coverage"]) == (12, 12, 1.0)
    assert found["overall"]["mean"] == pytest.approx(sum(number % 11 for number in range(12)) / 12, abs=1e-6)
    assert all(
        f'title="{html.escape(name)}"' in (place.folder / "out" / "report.html").read_text("utf-8")
        for name in CATEGORIES
    )
    assert [line for line in ended.err.splitlines() if line.startswith(("edits 12/12 done", "judging 12/12 done"))]
    assert "the edit model has left" in ended.err


def test_a_line_an_item_tells_all_of_its_judgment(place: Workplace) -> None:
    bench(place, 3)
    assert place(*FAKE).code == 0
    row = judgments(place)["e2"]
    assert (row["status"], row["score"], row["text"], row["tokens"], row["category"]) == (
        *("ok", 2.0, "Score: 2", 2),
        CATEGORIES[2],
    )
    assert row["answers"][0]["text"] == "Score: 2"
    assert row["edit"] == "edits/e2.png"
    assert (place.folder / "out" / row["edit"]).is_file()
    assert row["source"] == "source2.png"


def test_the_page_stands_alone_and_shows_chinese_categories(place: Workplace) -> None:
    bench(place)
    assert place(*FAKE, "--controls").code == 0
    page = (place.folder / "out" / "report.html").read_text("utf-8")
    assert not re.search(r'(?:src|href)="(?!data:|\./|#)', page)
    assert "物理" in page
    assert "object &lt;b&gt;" in page
    assert "object <b>" not in page
    assert page.count("<figure>") == 18
    text = (place.folder / "out" / "report.md").read_text("utf-8")
    assert "物理" in text
    few = "All items come from 4 source pictures; the interval over so few is narrower than it should be."
    assert few in page
    assert few in text


def test_the_figures_of_a_measuring_judge_are_columns_and_ssim_the_score(place: Workplace) -> None:
    bench(place)
    assert place(*EVAL, "--judge", "preservation", "--workers", "2", "--controls").code == 0
    found = report(place)
    assert (found["headline"], found["scale"]) == ("ssim", [0.0, 1.0])
    assert set(found["overall"]["sub_scores"]) == {"psnr", "ssim", "l1"}
    assert found["controls"]["source"]["overall"]["mean"] == 1.0
    assert all(set(row["scores"]) == {"psnr", "ssim", "l1"} for row in judgments(place).values())


def test_controls_are_judged_in_the_same_run_and_stand_beside_the_scores(place: Workplace) -> None:
    bench(place)
    assert place(*FAKE, "--controls").code == 0
    assert place.ledger("SELECT run, count(*) FROM tasks GROUP BY run", "out/judgments") == [(1, 27)]
    found = report(place)
    counts = {name: figures["overall"]["count"] for name, figures in found["controls"].items()}
    assert counts == {"source": 9, "shuffled": 9}
    assert all(row["controls"]["shuffled"]["status"] == "ok" for row in judgments(place).values())
    tasks = {row["id"]: row["images"] for row in place.results("out/judgments")}
    assert tasks["e0@source"][0] == tasks["e0@source"][1] == tasks["e0"][0]
    assert tasks["e0@shuffled"][1] != tasks["e0"][1]
    # without them, nothing that was judged is judged anew
    assert place(*FAKE).code == 0
    assert set(place.attempts("out/judgments").values()) == {1}
    assert report(place)["controls"] == {}


# --- killed and resumed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(shared_place: Workplace) -> dict[str, str]:
    """The reports of an evaluation that nothing interrupted."""
    bench(shared_place, 12, lambda number: {"delay": 0.2})
    assert shared_place(*FAKE, "--workers", "2", "--controls").code == 0
    return timeless(shared_place.folder / "out")


@pytest.mark.parametrize("stage", ["edits", "judgments"])
def test_killed_in_either_stage_the_same_command_does_what_is_left_and_the_report_is_the_same(
    stage: str, place: Workplace, unbroken: dict[str, str]
) -> None:
    bench(place, 12, lambda number: {"delay": 0.2})
    started = place.start(*FAKE, "--workers", "2", "--controls")
    until(lambda: done(place, stage) >= 3)
    started.process.kill()
    until(lambda: not started.children())
    assert done(place, stage) < 12
    ended = place(*FAKE, "--workers", "2", "--controls")
    assert ended.code == 0, ended.text
    assert place.attempts("out/edits") == {f"e{number}": 1 for number in range(12)}
    assert set(place.attempts("out/judgments").values()) == {1}
    assert len(place.attempts("out/judgments")) == 36
    assert timeless(place.folder / "out") == unbroken
    assert len(report(place)["timing"][stage]["runs"]) == 2


def test_the_same_command_again_starts_no_worker_and_writes_the_same(place: Workplace) -> None:
    bench(place)
    assert place(*FAKE).code == 0
    before = timeless(place.folder / "out")
    assert place(*FAKE).code == 0
    assert timeless(place.folder / "out") == before
    assert report(place)["timing"]["loads"] == 2


@pytest.mark.parametrize("stage", ["edits", "judgments"])
def test_a_first_ctrl_c_ends_what_is_in_flight_and_the_command_goes_on_later(stage: str, place: Workplace) -> None:
    bench(place, 9, lambda number: {"delay": 0.2})
    started = place.start(*FAKE, "--workers", "2")
    until(lambda: done(place, stage) >= 2)
    started.signal(signal.SIGINT)
    ended = started.wait()
    assert ended.code == 130, ended.text
    assert "the same command goes on" in ended.out
    assert not (place.folder / "out" / "report.json").exists()
    assert place(*FAKE, "--workers", "2").code == 0
    assert set(place.attempts(f"out/{stage}").values()) == {1}


def test_a_ctrl_c_while_the_last_edits_are_in_flight_begins_no_judging(place: Workplace) -> None:
    bench(place, 2, lambda number: {"delay": 4.0 if number else 0.1})
    started = place.start(*FAKE, "--workers", "2", "--schedule", "lockstep")
    until(lambda: done(place, "edits") == 1)
    started.signal(signal.SIGINT)
    ended = started.wait()
    assert ended.code == 130, ended.text
    assert "the same command goes on" in ended.out
    assert done(place, "edits") == 2
    assert not (place.folder / "out" / "judgments").exists()
    assert place(*FAKE, "--workers", "2").code == 0


@pytest.mark.parametrize("stage", ["edits", "judgments"])
def test_a_damaged_ledger_names_a_mend_that_works(stage: str, place: Workplace) -> None:
    bench(place, 2)
    assert place(*FAKE).code == 0
    before = timeless(place.folder / "out")
    ledger = place.folder / "out" / stage / "ledger.sqlite"
    ledger.write_bytes(ledger.read_bytes()[:5000])
    ended = place(*FAKE)
    assert ended.code == 2, ended.text
    (line,) = ended.err.strip().splitlines()[-1:]
    assert f"{stage}/ledger.sqlite: the ledger does not read" in line
    assert line.endswith("; move its folder away, and that stage is done anew")
    ledger.parent.rename(place.folder / "away")
    assert place(*FAKE).code == 0
    assert timeless(place.folder / "out") == before


# --- the other command's folder ---------------------------------------------------------------------------------------


def test_runs_and_evaluations_do_not_replace_each_others_reports(place: Workplace) -> None:
    bench(place, 2)
    place.tasks([{"prompt": "a"}], "tasks.jsonl")
    run = ("run", "tasks.jsonl", "--model", "fake", "--device", "cpu", "--out")
    assert place(*FAKE).code == 0
    assert place(*run, "run").code == 0
    before = {name: files(place.folder / name) for name in ("out", "run")}
    text = "out: holds an evaluation, whose report a run would replace; give the run another --out"
    for command in ((*run, "out"), ("plan", *run[1:], "out")):
        ended = place(*command)
        assert (ended.code, ended.err.strip()) == (2, f"imagemill: {text}"), ended.text
    text = "/run: holds a run, whose report an evaluation would replace; give the evaluation another --out"
    evaluation = [*FAKE[: FAKE.index("--out")], *FAKE[FAKE.index("--out") + 2 :], "--out", "run"]
    for more in ((), ("--dry-run",)):
        ended = place(*evaluation, *more)
        assert ended.code == 2, ended.text
        assert ended.err.strip().endswith(text)
    assert {name: files(place.folder / name) for name in ("out", "run")} == before


def files(folder: Path) -> dict[str, bytes]:
    """Its reports, and the names of all else."""
    found = {path: path.read_bytes() if path.suffix in (".json", ".md", ".html") else b"" for path in folder.rglob("*")}
    return {str(path): content for path, content in found.items() if not path.is_dir()}


def test_edits_that_are_not_kept_are_shown_and_not_linked(place: Workplace) -> None:
    bench(place, 3)
    place.write("c.yaml", "bench: items.jsonl\nedit: {model: fake}\njudge: {kind: fake}\nsave_images: false\n")
    ended = place("eval", "c.yaml", "--device", "cpu", "--out", "out")
    assert ended.code == 0, ended.text
    assert list((place.folder / "out" / "edits").glob("*.png")) == []
    assert {row["edit"] for row in judgments(place).values()} == {None}
    page = (place.folder / "out" / "report.html").read_text("utf-8")
    assert "./edits/e" not in page
    assert page.count('alt="edit of e') == 6


# --- no invented score ------------------------------------------------------------------------------------------------


def nonsense(number: int) -> dict[str, Any]:
    return {"answer": "I like turtles." if number % 3 == 2 else f"Score: {6 + 2 * (number % 3)}"}


def test_nonsense_on_every_third_item_gives_two_thirds_of_coverage_and_a_mean_over_the_rest(place: Workplace) -> None:
    bench(place, 9, nonsense)
    ended = place(*FAKE)
    assert ended.code == 1
    assert "coverage is below 98 % (3 parse_failed)" in ended.out
    assert "the judge's answers without a score: no score found" in ended.out.splitlines()
    found = report(place)
    assert found["coverage"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["overall"]["mean"] == 7.0
    assert found["overall"]["bounds"] == [pytest.approx(14 / 3, abs=1e-6), pytest.approx(8.0)]
    assert found["macro_mean"] is None  # one category has no score at all
    assert found["overall"]["statuses"] == {"ok": 6, "parse_failed": 3}
    rows = judgments(place)
    assert (rows["e2"]["score"], rows["e2"]["text"]) == (None, "I like turtles.")
    assert place(*FAKE, "--min-coverage", "0.6").code == 0


def test_an_edit_that_fails_and_a_source_that_does_not_read_have_no_score(place: Workplace) -> None:
    bench(place, 6, lambda number: {"fail": "bad_task"} if number == 1 else {})
    (place.folder / "source2.png").write_bytes((place.folder / "source2.png").read_bytes()[:100])
    (place.folder / "source3.png").write_bytes(b"")
    ended = place(*FAKE, "--controls")
    assert ended.code == 1
    assert "1 edits failed: bad_task: scripted: bad_task in attempt 1; the report tells of each" in ended.out
    assert "without a score" not in ended.out
    assert statuses(place) == {
        **{"e0": "ok", "e1": "edit_failed", "e2": "missing_image"},
        **{"e3": "missing_image", "e4": "ok", "e5": "ok"},
    }
    rows = judgments(place)
    assert "source2.png is damaged or cut off" in rows["e2"]["message"]
    assert "source3.png: is an empty file" in rows["e3"]["message"]
    assert "scripted: bad_task" in rows["e1"]["message"]
    bench(place, 6)
    ended = place(*FAKE, "--controls", "--retry-failed", "--rerun-changed")
    assert ended.code == 0, ended.text
    assert set(statuses(place).values()) == {"ok"}


def test_what_the_judge_declines_is_refused(place: Workplace) -> None:
    bench(place, 3, lambda number: {"answer": "I'm sorry, I can't assist with that."} if number == 0 else {})
    ended = place(*FAKE)
    assert ended.code == 1
    assert "--rejudge failed asks the judge again" in ended.out
    assert statuses(place)["e0"] == "refused"


def test_an_item_without_a_target_is_a_missing_image_for_the_judge_reference(place: Workplace) -> None:
    bench(place, 3)
    rows = [json.loads(line) for line in (place.folder / "items.jsonl").read_text("utf-8").splitlines()]
    named = {"e0": "target", "e1": "targets", "e2": "target"}
    place.tasks([{**row, named[row["id"]]: "source0.png"} for row in rows], "items.jsonl")
    slip = "the column targets is not known and becomes metadata; did you mean target?"
    idle = "the rubric viescore changes nothing: the judge reference measures pictures and asks nobody"
    planned = place(*EVAL, "--judge", "reference", "--rubric", "viescore", "--dry-run")
    assert f"warning: {slip}\nwarning: {idle}\n" in planned.out
    ended = place(*EVAL, "--judge", "reference", "--rubric", "viescore")
    assert slip in ended.err
    assert idle in ended.err
    assert ended.code == 1
    assert "1 of 3 items name no target and will have no score" in ended.err
    assert "(1 missing_image); the report says why" in ended.out
    assert statuses(place) == {"e0": "ok", "e1": "missing_image", "e2": "ok"}
    bench(place, 3)
    ended = place(*EVAL, "--judge", "reference")
    assert ended.code == 2
    assert "no item has one" in ended.err


# --- what is done anew ------------------------------------------------------------------------------------------------


def config(place: Workplace, question: str) -> tuple[str, ...]:
    """The command with a settings file whose prompts ask this."""
    prompts = "".join(f'  "{name}": {{user: "{question} {{edit_instruction}}"}}\n' for name in CATEGORIES)
    place.write(
        "eval.yaml",
        f"bench: items.jsonl\nout: out\nedit: {{model: fake}}\njudge: fake\ndevices: {{device: cpu}}\nprompts:\n{prompts}",
    )
    return ("eval", "eval.yaml")


def test_another_rubric_judges_again_and_edits_nothing(place: Workplace) -> None:
    bench(place)
    command = config(place, "How good is")
    assert place(*command).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in (place.folder / "out" / "edits").glob("*.png")}
    command = config(place, "How bad is")
    assert place(*command).code == 0
    assert {path.name: path.stat().st_mtime_ns for path in (place.folder / "out" / "edits").glob("*.png")} == before
    assert set(place.attempts("out/edits").values()) == {1}
    assert set(place.attempts("out/judgments").values()) == {2}
    assert place.results("out/judgments")[0]["prompt"].startswith("How bad is make it 0")


def test_viescore_asks_two_questions_an_item(place: Workplace) -> None:
    bench(place, 4, lambda number: {"answer": '{"score": [9, 4], "reasoning": "fine"}'})
    assert place(*FAKE, "--rubric", "viescore").code == 0
    row = judgments(place)["e0"]
    assert row["score"] == 4.0
    assert row["scores"]["semantic_consistency"] == row["scores"]["perceptual_quality"] == 4.0
    assert [answer["question"] for answer in row["answers"]] == ["semantic_consistency", "perceptual_quality"]
    images = {one["id"]: len(one["images"]) for one in place.results("out/judgments")}
    assert (images["e0.semantic_consistency"], images["e0.perceptual_quality"]) == (2, 1)


def test_an_answer_that_was_cut_off_is_no_score_and_the_mend_is_told(place: Workplace) -> None:
    bench(place, 2, lambda number: {"answer": "Score: 1", "cut": number == 1})
    ended = place(*FAKE)
    assert ended.code == 1, ended.text
    assert statuses(place) == {"e0": "ok", "e1": "parse_failed"}
    assert "raise max_new_tokens" in ended.out
    assert judgments(place)["e1"]["text"] == "Score: 1"


def test_rejudge_failed_asks_again_about_what_has_no_score_alone(place: Workplace) -> None:
    bench(place, 9, nonsense)
    assert place(*FAKE).code == 1
    bench(place, 9)  # the judge would answer now, but nobody asks it
    assert place(*FAKE).code == 1
    assert set(place.attempts("out/judgments").values()) == {1}
    ended = place(*FAKE, "--rejudge", "failed")
    assert ended.code == 0, ended.text
    assert place.attempts("out/judgments") == {f"e{n}": 2 if n % 3 == 2 else 1 for n in range(9)}
    assert place(*FAKE, "--rejudge", "all").code == 0
    assert place.attempts("out/judgments") == {f"e{n}": 3 if n % 3 == 2 else 2 for n in range(9)}
    assert set(place.attempts("out/edits").values()) == {1}


def test_rejudge_all_that_the_judge_fails_in_costs_no_score(place: Workplace) -> None:
    bench(place, 6)
    assert place(*FAKE).code == 0
    bench(place, 6, lambda number: {"fail": "bad_task"} if number < 4 else {"answer": "Score: 7"})
    assert place(*FAKE, "--rejudge", "all").code == 1
    assert list(statuses(place).values()).count("ok") == 2
    ended = place(*FAKE)
    assert ended.code == 0, ended.text
    scores = {item: row["score"] for item, row in judgments(place).items()}
    assert scores == {**{f"e{number}": float(number) for number in range(4)}, "e4": 7.0, "e5": 7.0}


def test_other_edits_are_asked_for_and_judged_anew(place: Workplace) -> None:
    bench(place, 4)
    assert place(*FAKE).code == 0
    before = {item: row["sha256"] for item, row in judgments(place).items()}
    ended = place(*FAKE, "--seed", "7")
    assert ended.code == 2
    assert "4 tasks changed" in ended.err
    assert "--rerun-changed" in ended.err
    assert place(*FAKE, "--seed", "7", "--rerun-changed").code == 0
    assert not set(before.values()) & {row["sha256"] for row in judgments(place).values()}
    assert set(place.attempts("out/judgments").values()) == {2}


def test_a_larger_limit_goes_on_from_a_smaller_one(place: Workplace) -> None:
    bench(place)
    assert place(*FAKE, "--limit", "4").code == 0
    assert place(*FAKE, "--categories", "环境", "物理").code == 0
    assert set(statuses(place)) == {"e0", "e1", "e3", "e4", "e6", "e7"}
    assert place(*FAKE).code == 0
    assert set(place.attempts("out/edits").values()) == set(place.attempts("out/judgments").values()) == {1}


# --- compare ----------------------------------------------------------------------------------------------------------


def test_compare_gives_the_paired_difference_with_its_interval(place: Workplace) -> None:
    bench(place, 8, lambda number: {"answer": f"Score: {number % 3 + 2}"})
    assert place(*FAKE).code == 0
    bench(place, 8, lambda number: {"answer": "none" if number == 7 else f"Score: {number % 3 + 4}"})
    assert place(*(part if part != "out" else "other" for part in FAKE)).code == 1
    ended = place("compare", "out", "other")
    assert ended.code == 0, ended.text
    assert "B scores higher: the interval does not hold 0." in ended.out
    assert "warning" not in ended.out
    found = json.loads(place("compare", "out", "other", "--json").out)
    assert found["overall"]["pairs"] == 7
    assert (found["overall"]["mean"], found["overall"]["interval"]) == (2.0, [2.0, 2.0])
    assert found["overall"]["left_out"] == {"without_score_in_second": 1}
    assert {one["name"] for one in found["categories"]} == set(CATEGORIES)


def test_compare_warns_when_only_one_judge_saw_the_sources_and_not_of_categories_left_out(place: Workplace) -> None:
    bench(place)
    prompts = {name: {"user": "how well?"} for name in CATEGORIES}
    for out, both in (("one", True), ("other", False)):
        judge = {"kind": "fake", "compare_with_original": both}
        settings = {"bench": "items.jsonl", "edit": {"model": "fake"}, "judge": judge, "prompts": prompts}
        (place.folder / f"{out}.yaml").write_text(json.dumps(settings), "utf-8")
        assert place("eval", f"{out}.yaml", "--device", "cpu", "--out", out).code == 0
    ended = place("compare", "one", "other")
    assert ended.out.count("warning") == 1
    assert "warning: one judge saw the sources, the other did not" in ended.out
    assert place("eval", "one.yaml", "--device", "cpu", "--out", "part", "--categories", CATEGORIES[0]).code == 0
    ended = place("compare", "one", "part")
    assert "the rubrics differ" not in ended.out
    assert "warning: the items differ" in ended.out


def test_compare_warns_when_a_picture_of_the_benchmark_has_changed(place: Workplace) -> None:
    bench(place)
    assert place(*FAKE).code == 0
    (place.folder / "source1.png").write_bytes((place.folder / "source0.png").read_bytes())
    assert place(*(part if part != "out" else "other" for part in FAKE)).code == 0
    assert "warning: the items differ, or what they say or show" in place("compare", "out", "other").out


def test_compare_refuses_what_is_no_evaluation_and_unlike_scores(place: Workplace) -> None:
    bench(place, 4)
    assert place(*FAKE).code == 0
    assert place(*(part if part != "out" else "other" for part in (*EVAL, "--judge", "preservation"))).code == 0
    rows = [json.loads(line) for line in (place.folder / "items.jsonl").read_text().splitlines()]
    place.tasks([row | {"target": row["image"]} for row in rows], "pairs.jsonl")
    pairs = {"items.jsonl": "pairs.jsonl", "out": "target"}
    assert place(*(pairs.get(part, part) for part in (*EVAL, "--judge", "reference"))).code == 0
    shutil.copytree(place.folder / "out", place.folder / "empty")
    (place.folder / "empty" / "report.json").write_text("{}")
    for arguments, text in (
        (("out", "nowhere"), "holds no finished evaluation"),
        (("out", "other"), "the scores are not of one kind"),
        (("target", "other"), "the scores are not of one kind (judge:reference and judge:preservation)"),
        (("empty", "other"), "report.json is no evaluation's: it has no title"),
    ):
        ended = place("compare", *arguments)
        assert (ended.code, len(ended.err.splitlines())) == (2, 1)
        assert text in ended.err


# --- before anything starts -------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(place: Workplace) -> None:
    bench(place)
    before = set(place.folder.iterdir())
    ended = place(*FAKE, "--controls", "--dry-run")
    assert ended.code == 0, ended.text
    assert "9 items in 3 categories, from 4 source pictures" in ended.out
    assert "9 pictures, 9 to do" in ended.out
    assert "9 of the edits and 18 of the controls" in ended.out
    assert set(place.folder.iterdir()) == before


BAD: tuple[tuple[Sequence[str], str], ...] = (
    (("eval", "nowhere.jsonl", "--edit-model", "fake", "--judge", "fake"), "there is no such benchmark"),
    (("eval", "items.jsonl", "--judge", "fake"), "edit.model: is missing"),
    (("eval", "items.jsonl", "--edit-model", "fake"), "judge.kind: is missing"),
    ((*FAKE, "--judge", "referance"), "--judge"),
    ((*FAKE, "--categories", "物理学"), "has no category '物理学'; did you mean '物理'?"),
    ((*FAKE, "--rejudge", "some"), "--rejudge: 'some' is neither failed nor all"),
    ((*FAKE, "--min-coverage", "2"), "--min-coverage"),
    ((*FAKE, "--rubric", "prompts"), "rubric prompts needs prompts"),
    ((*FAKE, "--gpus", "many"), "--gpus: 'many' is neither a number nor auto"),
    ((*FAKE, "--edit-model", "fakes"), "did you mean"),
    ((*FAKE, "--lang", "zh"), "instruction_zh"),
    (("eval", "missing.yaml"), "there is no such file"),
    (("eval", "bad.yaml"), "bad.yaml: judges: is not a known key; did you mean judge?"),
    (("eval", "broken.jsonl", "--edit-model", "fake", "--judge", "fake"), "broken.jsonl, line 2: "),
    (
        ("eval", "items.jsonl", "--edit-model", "tiny", "--judge", "fake"),
        "edit.model: 'tiny' edits no pictures; name one that",
    ),
    (
        ("eval", "items.jsonl", "--edit-model", "tiny", "--judge", "fake", "--dry-run"),
        "edit.model: 'tiny' edits no pictures",
    ),
)


@pytest.fixture(scope="module")
def refusals(shared_place: Workplace) -> list[Ended]:
    """What was said of each mistake."""
    bench(shared_place)
    shared_place.write("bad.yaml", "bench: items.jsonl\njudges: fake\nedit: {model: fake}\njudge: fake\n")
    shared_place.write(
        "broken.jsonl", '{"id": "a", "category": "c", "instruction": "i", "image": "source0.png"}\n{"id": 1\n'
    )
    return shared_place.forked(arguments for arguments, _ in BAD)


@pytest.mark.parametrize("number", range(len(BAD)), ids=[text[:24] for _, text in BAD])
def test_a_mistake_is_one_line_and_starts_nothing(number: int, refusals: list[Ended]) -> None:
    ended = refusals[number]
    assert ended.code == 2, ended.text
    assert BAD[number][1] in ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) <= 2


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_items_that_make_no_task_are_named_with_a_mend_that_eval_has(more: Sequence[str], place: Workplace) -> None:
    bench(place, 3)
    rows = [json.loads(line) for line in (place.folder / "items.jsonl").read_text().splitlines()]
    bad = [row | {"instruction": f"make it {row['id']}\0"} for row in rows[:2]]
    command = ("eval", "items.jsonl", "--edit-model", "fake", "--judge", "fake", "--device", "cpu", "--out", "out")
    place.tasks([*bad, *rows[2:]], "items.jsonl")
    ended = place(*command, *more)
    assert ended.code == 2, ended.text
    first, second, hint = ended.err.splitlines()
    assert "item e0: prompt: contains a NUL character; remove it" in first
    assert second.startswith("item e1: prompt: ")
    assert hint == "nothing was started; mend the items, or choose others (--categories)"
    place.tasks(bad, "items.jsonl")
    ended = place(*command, *more)
    assert ended.code == 2, ended.text
    only, hint = ended.err.splitlines()
    assert only.endswith("item e0: prompt: contains a NUL character; remove it (the same in all 2 rows)")
    assert hint == "nothing was started"


def test_the_benchmark_may_be_named_after_the_categories(place: Workplace) -> None:
    bench(place)
    command = ("eval", "--edit-model", "fake", "--judge", "fake", "--device", "cpu", "--dry-run")
    ended = place(*command, "--categories", CATEGORIES[0], CATEGORIES[1], "items.jsonl")
    assert ended.code == 0, ended.text
    assert "6 items in 2 categories" in ended.out


# --- real files -------------------------------------------------------------------------------------------------------


def test_the_shared_benchmark_ends_in_five_categories_named_in_chinese(place: Workplace, data: Path) -> None:
    command = ("eval", data / "edit/bench_270_b64.json", "--edit-model", "tiny-edit", "--judge", "preservation")
    ended = place(*command, "--device", "cpu", "--workers", "2", "--limit", "5", "--steps", "2", "--out", "out")
    assert ended.code == 0, ended.text
    found = report(place)
    assert {one["name"]: one["ok"] for one in found["categories"]} == dict.fromkeys(
        ["物理", "环境", "社会", "指代", "因果"], 1
    )
    assert found["timing"]["edits"]["loads"] == 2


@pytest.mark.slow
def test_the_embedded_models_edits_score_above_both_controls(place: Workplace, root: Path) -> None:
    command = ("eval", root / "examples/bench_tiny", "--edit-model", "tiny-edit", "--judge", "reference", "--controls")
    ended = place(*command, "--device", "cpu", "--limit", "10", "--out", "out")
    assert ended.code == 0, ended.text
    found = report(place)
    means = {name: figures["overall"]["mean"] for name, figures in found["controls"].items()}
    assert found["overall"]["mean"] > means["source"] + 0.05
    assert found["overall"]["mean"] > means["shuffled"] + 0.3


def test_the_older_systems_file_runs_through_the_older_command(place: Workplace, root: Path) -> None:
    text = (root / "examples/config_multi_gpu.yaml").read_text("utf-8")
    text = text.replace("model_name: tiny-edit", "model_name: fake").replace(
        "bench_tiny ", f"{root}/examples/bench_tiny "
    )
    place.write("config.yaml", text.replace("../outputs", "outputs"))
    command = [sys.executable, str(root / "examples/main.py"), "--config", "config.yaml"]
    ended = subprocess.run(
        command, cwd=place.folder, env=place.environment(), capture_output=True, text=True, check=False, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    assert (place.folder / "outputs/eval_tiny/report.html").is_file()
    assert "50 scored" in ended.stdout
