"""The reports: rebuilt from the ledger alone, complete, bounded, and safe to show around."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imagemill.errors import InputError, LedgerError, OutputError
from imagemill.ledger import Attempt, Ledger
from imagemill.records import Failure, Kind, Lora, PlannedTask, Receipt, Settle, Task, Ticket
from imagemill.report import figures, gallery, write_reports
from imagemill.report.lanes import WIDTH, Lane, Strip
from imagemill.report.results import results, snapshot

START = 1_772_352_000.0
NAMES = ("results.jsonl", "report.json", "report.md", "report.html")


class Page(HTMLParser):
    """What a browser would see: the tags, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._silent = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._silent else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def a_task(number: int, **changes: Any) -> Task:
    task = Task(
        id=f"t{number:04}",
        prompt=f"a cat, number {number}",
        model="tiny",
        width=64,
        height=48,
        steps=2,
        guidance_scale=0.0,
        seed=42 + number,
        output_path=f"pictures/t{number:04}.png",
    )
    return replace(task, **changes)


def begin(ledger: Ledger, tasks: Sequence[Task], started: float = START, **settings: Any) -> None:
    ledger.staging.begin()
    for seq, task in enumerate(tasks):
        assert ledger.staging.add(PlannedTask(task, f"{seq:064}", Ticket(seq)), f"tasks.jsonl:{seq + 1}") is None
    ledger.begin_run(started, settings, {"host": "here"})
    ledger.staging.apply(ledger.run)


def do(ledger: Ledger, task: Task, seq: int, *, worker: int = 0, at: float = 1.0, **receipt: Any) -> None:
    fields: dict[str, Any] = {"bytes": 10, "sha256": "a" * 64, "path": task.output_path, "seconds": {"denoise": 1.0}}
    settle = Settle(seq, 1, worker, receipt=Receipt(seq, 1, 64, 48, **(fields | receipt)))
    attempt = Attempt(task.id, 1, worker, START + at, START + at + 1, None, "", 1)
    ledger.settle([(task.id, settle)], [attempt], START + at + 1)


def fail(ledger: Ledger, task: Task, seq: int, kind: Kind, message: str, *, worker: int = 0, at: float = 1.0) -> None:
    settle = Settle(seq, 1, worker, failure=Failure(seq, 1, kind, message))
    attempt = Attempt(task.id, 1, worker, START + at, START + at + 1, kind, message, 1)
    ledger.settle([(task.id, settle)], [attempt], START + at + 1)


def draw(folder: Path, task: Task) -> None:
    file = folder / (task.output_path or "")
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), (10 * len(task.id), 80, 90)).save(file)


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """Four done (one flagged, one with an adapter), one failed, one pending, one row skipped; two workers."""
    tasks = [a_task(n) for n in range(6)]
    tasks[1] = replace(tasks[1], loras=(Lora("loras/ink.safetensors", 0.8, "ab"),), metadata={"Category": "Animals"})
    ledger = Ledger(tmp_path / "ledger.sqlite")
    begin(ledger, tasks, schedule="lockstep")
    ledger.skip("tweets.json:3", "the tweet has no scene_hint")
    ledger.span(0, "load", START, START + 1)
    ledger.span(1, "lost", START + 1, START + 5, "exit code -9")
    for seq in range(4):
        draw(tmp_path, tasks[seq])
        flags = ("black",) if seq == 3 else ()
        do(ledger, tasks[seq], seq, worker=seq % 2, at=1 + seq // 2, flags=flags)
    fail(ledger, tasks[4], 4, "oom", "CUDA out of memory, even alone", at=3)
    stats = {"workers": {"0": {"label": "GPU 0", "idle": 6.5, "held": 2.0}}, "policy": "lockstep"}
    ledger.end_run(START + 10, "drained", stats)
    ledger.close()
    return tmp_path


def test_totals_kinds_and_groups_are_counted(a_run: Path) -> None:
    summary = write_reports(a_run).summary
    assert summary["tasks"] == {"total": 6, "done": 4, "failed": 1, "pending": 1}
    assert summary["failed_by_kind"] == {"oom": 1}
    assert summary["skipped"] == {
        "total": 1,
        "rows": [{"place": "tweets.json:3", "reason": "the tweet has no scene_hint"}],
    }
    assert summary["models"] == [
        {"name": "tiny", "tasks": 6, "done": 4, "failed": 1, "pending": 1, "mean_seconds": 1.0}
    ]
    assert [(g["name"], g["tasks"], g["strengths"]) for g in summary["adapters"]] == [
        ("loras/ink.safetensors", 1, [0.8, 0.8])
    ]
    assert [(g["name"], g["tasks"]) for g in summary["shapes"]] == [("64x48", 6)]
    assert summary["flags"] == {
        "total": 1,
        "counts": {"black": 1},
        "rows": [{"id": "t0003", "flags": ["black"], "path": "pictures/t0003.png"}],
    }


def test_a_run_and_its_workers_have_their_times(a_run: Path) -> None:
    (run,) = write_reports(a_run).summary["runs"]
    assert (run["status"], run["seconds"], run["pictures"], run["failed_attempts"]) == ("drained", 10.0, 4, 1)
    assert run["pictures_per_second"] == 0.4
    assert run["steady_pictures_per_second"] == round(4 / 3, 4)
    assert run["started"] == "2026-03-01T08:00:00.000Z"
    assert run["lost"] == [{"worker": 1, "label": "worker 1", "after_seconds": 5.0, "reason": "exit code -9"}]
    first, second = run["workers"]
    assert (first["label"], first["pictures"], first["failed_attempts"]) == ("GPU 0", 2, 1)
    assert (first["busy_seconds"], first["load_seconds"]) == (3.0, 1.0)
    assert (first["idle_seconds"], first["held_seconds"]) == (6.5, 2.0)
    assert (second["label"], second["idle_seconds"], second["held_seconds"]) == ("worker 1", 8.0, None)


def test_results_hold_every_task_in_order_with_all_that_is_known(a_run: Path) -> None:
    lines = [json.loads(line) for line in write_reports(a_run).results.read_text("utf-8").splitlines()]
    assert [(line["id"], line["state"]) for line in lines] == [
        *((f"t{n:04}", "done") for n in range(4)),
        ("t0004", "failed"),
        ("t0005", "pending"),
    ]
    done = lines[1]
    assert done["path"] == "pictures/t0001.png"
    assert done["loras"] == [{"path": "loras/ink.safetensors", "strength": 0.8, "digest": "ab"}]
    assert (done["seed"], done["worker"], done["sha256"], done["batch_size"]) == (43, 1, "a" * 64, 1)
    assert done["metadata"] == {"Category": "Animals"}
    assert (lines[4]["kind"], lines[4]["message"]) == ("oom", "CUDA out of memory, even alone")
    assert lines[5]["kind"] is lines[5]["worker"] is lines[5]["sha256"] is None


def test_only_what_is_done_has_a_path(a_run: Path) -> None:
    lines = [json.loads(line) for line in write_reports(a_run).results.read_text("utf-8").splitlines()]
    paths = {line["id"]: line["path"] for line in lines if line["state"] == "done"}
    assert paths == {f"t{seq:04}": f"pictures/t{seq:04}.png" for seq in range(4)}
    assert [(line["state"], line["path"]) for line in lines[4:]] == [("failed", None), ("pending", None)]


def test_a_rebuild_from_the_same_ledger_gives_identical_bytes(a_run: Path) -> None:
    write_reports(a_run)
    first = {name: (a_run / name).read_bytes() for name in NAMES}
    for name in NAMES:
        (a_run / name).unlink()
    write_reports(a_run)
    assert {name: (a_run / name).read_bytes() for name in NAMES} == first
    assert not list(a_run.glob(".imagemill*"))


def test_the_page_and_the_text_say_why_a_task_failed(a_run: Path) -> None:
    reports = write_reports(a_run)
    for text in (Page(reports.page.read_text("utf-8")).text, reports.markdown.read_text("utf-8")):
        assert "CUDA out of memory, even alone" in text
        assert "the tweet has no scene" in text
        assert "t0004" in text


def test_the_page_shows_pictures_with_prompt_seed_and_adapter(a_run: Path) -> None:
    page = Page(write_reports(a_run).page.read_text("utf-8"))
    assert len(page.all("figure")) == 4
    assert all(str(image["src"]).startswith("data:image/webp;base64,") for image in page.all("img"))
    assert "a cat, number 1" in page.text
    assert "seed 43" in page.text
    assert "ink @ 0.8" in re.sub(r"\s+", " ", page.text)


def test_the_page_asks_for_nothing_from_the_network(a_run: Path) -> None:
    text = write_reports(a_run).page.read_text("utf-8")
    page = Page(text)
    assert not page.all("link")
    assert "http://" not in text
    assert "https://" not in text
    assert all(script.get("src") is None for script in page.all("script"))
    assert all(str(link["href"]).startswith(("#", "./")) for link in page.all("a"))


def test_a_missing_and_a_broken_picture_have_a_clear_place(a_run: Path) -> None:
    (a_run / "pictures/t0000.png").unlink()
    (a_run / "pictures/t0002.png").write_bytes((a_run / "pictures/t0002.png").read_bytes()[:40])
    (a_run / "pictures/t0003.png").write_bytes(b"no picture")
    page = Page(write_reports(a_run).page.read_text("utf-8"))
    assert len(page.all("img")) == 1
    assert page.text.count("not on disk") == 1
    assert page.text.count("does not decode") == 2


def test_a_picture_outside_the_folder_is_not_taken_in(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    (folder / "t.png").symlink_to(tmp_path / "private.png")
    task = a_task(0, output_path="t.png")
    ledger = Ledger(folder / "ledger.sqlite")
    begin(ledger, [task])
    do(ledger, task, 0)
    ledger.close()
    page = Page(write_reports(folder).page.read_text("utf-8"))
    assert not page.all("img")
    assert "outside the folder" in page.text


PROMPTS = (
    "</script><script>alert('x')</script>",
    '"><img src=x onerror=alert(1)> & <b>bold</b>',
    "江南水乡的清晨，薄雾笼罩着石桥",
    "منظر طبيعي لجبال عند غروب الشمس",
    "🦊🍁 a fox 👩‍👩‍👧‍👦",
    "{{ 7 * 7 }} {% raw %}",
)


def test_prompts_in_any_script_are_shown_as_they_are(tmp_path: Path) -> None:
    tasks = [a_task(n, id=f"{prompt} {n}", prompt=prompt) for n, prompt in enumerate(PROMPTS)]
    ledger = Ledger(tmp_path / "ledger.sqlite")
    begin(ledger, tasks)
    for seq, task in enumerate(tasks):
        if seq % 2:
            do(ledger, task, seq)
        else:
            fail(ledger, task, seq, "bad_task", f"refused | {task.prompt}\nsecond line")
    ledger.close()
    reports = write_reports(tmp_path)
    page = Page(reports.page.read_text("utf-8"))
    assert all(prompt in page.text for prompt in PROMPTS)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    rows = [line for line in reports.markdown.read_text("utf-8").splitlines() if "refused" in line]
    assert len(rows) == 3
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert "<script>" not in re.sub(r"\\.", "", "".join(rows))


def test_a_picture_named_like_a_scheme_is_linked_as_a_file(tmp_path: Path) -> None:
    task = a_task(0, output_path="javascript:alert(1) #?.png")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    begin(ledger, [task])
    do(ledger, task, 0)
    draw(tmp_path, task)
    ledger.close()
    links = [link["href"] for link in Page(write_reports(tmp_path).page.read_text("utf-8")).all("a")]
    assert "./javascript%3Aalert%281%29%20%23%3F.png" in links


def test_a_run_that_died_is_reported_up_to_its_last_sign_of_life(tmp_path: Path) -> None:
    tasks = [a_task(n) for n in range(3)]
    ledger = Ledger(tmp_path / "ledger.sqlite")
    begin(ledger, tasks)
    do(ledger, tasks[0], 0, at=3)
    ledger.close()
    (run,) = write_reports(tmp_path).summary["runs"]
    assert (run["status"], run["ended"], run["seconds"]) == ("running", None, 4.0)
    assert "going on, or killed" in (tmp_path / "report.html").read_text("utf-8")

    ledger = Ledger(tmp_path / "ledger.sqlite")
    begin(ledger, tasks, START + 100)
    ledger.close()
    summary = write_reports(tmp_path).summary
    assert [run["status"] for run in summary["runs"]] == ["died", "running"]
    assert summary["tasks"]["done"] == 1
    assert summary["pictures_per_second"] == 0.25


def test_a_task_to_be_done_again_does_not_carry_its_old_failure(tmp_path: Path) -> None:
    task = a_task(0)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    begin(ledger, [task])
    fail(ledger, task, 0, "oom", "no memory")
    ledger.staging.begin()
    ledger.staging.add(PlannedTask(task, f"{0:064}", Ticket(0)), "tasks.jsonl:1")
    ledger.begin_run(START + 50, {}, {})
    ledger.staging.apply(ledger.run, retry=["oom"])
    ledger.close()
    reports = write_reports(tmp_path)
    (line,) = reports.results.read_text("utf-8").splitlines()
    assert (json.loads(line)["state"], json.loads(line)["message"]) == ("pending", None)
    assert reports.summary["failures"] == {"total": 0, "rows": []}


def test_rows_skipped_by_every_resumed_run_count_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for number in range(3):
        begin(ledger, [a_task(0)], START + 100 * number)
        ledger.skip("tasks.jsonl:9", "is empty")
        if number == 0:
            ledger.skip("tasks.jsonl:10", "is empty; mended since")
    ledger.close()
    assert write_reports(tmp_path).summary["skipped"]["rows"] == [{"place": "tasks.jsonl:9", "reason": "is empty"}]


def test_reports_can_be_made_while_a_run_writes(a_run: Path) -> None:
    writer = Ledger(a_run / "ledger.sqlite")
    task = a_task(7)
    begin(writer, [a_task(n) for n in range(6)] + [task], START + 100)
    before = write_reports(a_run).summary["tasks"]["done"]
    do(writer, task, 6, at=101)
    assert write_reports(a_run).summary["tasks"]["done"] == before + 1
    writer.close()


def test_a_report_shows_one_moment_of_a_run_that_goes_on(a_run: Path) -> None:
    writer = Ledger(a_run / "ledger.sqlite")
    reader = Ledger(a_run / "ledger.sqlite", read_only=True)
    with snapshot(reader):
        writer.begin_run(START + 100, {}, {})
        do(writer, a_task(5), 5, at=101)
        assert [line["state"] for line in results(reader)].count("done") == 4
        assert next(iter(reader.rows("SELECT count(*) AS runs FROM runs")))["runs"] == 1
    assert [line["state"] for line in results(reader)].count("done") == 5
    reader.close()
    writer.close()


def test_a_long_run_keeps_its_page_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.effect_noise((512, 512), 200).convert("RGB")
    noise.save(tmp_path / "noise.png")
    assert len(gallery.thumbnail(tmp_path / "noise.png")) <= gallery.MAX_THUMBNAIL
    monkeypatch.setattr(gallery, "thumbnail", lambda file: bytes(gallery.MAX_THUMBNAIL))
    prompt = "龙" * 30_000
    tasks = [a_task(n, prompt=prompt if n % 25 == 0 else "short") for n in range(5000)]
    ledger = Ledger(tmp_path / "ledger.sqlite")
    begin(ledger, tasks)
    done = [
        (task.id, Settle(n, 1, n % 64, receipt=Receipt(n, 1, 64, 48, path="x.png"))) for n, task in enumerate(tasks)
    ]
    tried = [
        Attempt(task.id, 1, n % 64, START + n / 64, START + (n + 50) / 64, None, "", 1) for n, task in enumerate(tasks)
    ]
    failed = [
        (task.id, Settle(n, 1, 0, failure=Failure(n, 1, "bad_task", "too long " * 100)))
        for n, task in enumerate(tasks)
        if n % 5 == 1
    ]
    ledger.settle([*done, *failed], tried, START)
    ledger.close()
    reports = write_reports(tmp_path)
    page = Page(reports.page.read_text("utf-8"))
    assert len(page.all("figure")) == gallery.SHOWN
    assert "200 of 4,000 shown" in page.text
    assert reports.page.stat().st_size < 10_000_000
    assert len(reports.summary["failures"]["rows"]) == reports.summary["failures"]["total"] == 1000
    with reports.results.open(encoding="utf-8") as lines:
        assert sum(1 for _ in lines) == 5000


def test_a_run_without_files_says_so(tmp_path: Path) -> None:
    task = a_task(0)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    begin(ledger, [task])
    do(ledger, task, 0, path="", sha256="", bytes=0)
    ledger.close()
    reports = write_reports(tmp_path)
    assert json.loads(reports.results.read_text("utf-8"))["path"] is None
    assert "kept no picture files" in Page(reports.page.read_text("utf-8")).text


@pytest.mark.parametrize(
    ("models", "made", "gallery"),
    [
        (("judge:vlm", "judge:vlm"), "judgments", False),
        (("tiny", "judge:vlm"), "results", True),
        (("tiny", "tiny"), "pictures", True),
    ],
)
def test_a_report_calls_what_was_made_by_its_name(
    tmp_path: Path, models: tuple[str, str], made: str, gallery: bool
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    tasks = [a_task(number, model=model) for number, model in enumerate(models)]
    begin(ledger, tasks)
    for seq, task in enumerate(tasks):
        do(ledger, task, seq)
    ledger.end_run(START + 4, "done", {})
    ledger.close()
    write_reports(tmp_path)
    text, seen = (tmp_path / "report.md").read_text("utf-8"), Page((tmp_path / "report.html").read_text("utf-8"))
    assert f"{made} a second" in text
    assert f"2 {made}" in seen.text
    assert ({"id": "pictures"} in seen.all("section")) is gallery
    assert ("pictures" in (text + seen.text).lower()) is gallery


def test_a_ledger_without_any_run_gives_reports(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")  # still open, as of a driver that reads its source
    assert write_reports(tmp_path).summary["tasks"]["total"] == 0
    ledger.close()


def test_a_folder_that_is_no_output_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_reports(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no ledger\.sqlite; give the --out folder of a run"):
        write_reports(tmp_path)
    (tmp_path / "ledger.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(LedgerError):
        write_reports(tmp_path)


def test_reports_that_cannot_be_written_leave_the_old_ones(a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(a_run)
    old = (a_run / "results.jsonl").read_bytes()
    ledger = Ledger(a_run / "ledger.sqlite")
    ledger.begin_run(START + 20, {}, {})
    do(ledger, a_task(5), 5, at=21)
    ledger.close()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_reports(a_run)
    assert (a_run / "results.jsonl").read_bytes() == old
    assert not list(a_run.glob(".imagemill*"))


def test_a_strip_keeps_few_blocks_however_many_batches_it_had() -> None:
    strip = Strip()
    for number in range(100_000):
        strip.add(number / 100, (number + 0.4) / 100)
    assert len(strip.blocks) == 1
    lane = Lane(0, "GPU 0", START, 1000.0)
    for number in range(500):
        lane.batch(START + 2 * number, START + 2 * number + 0.1, number % 2 == 0, 1)
    assert all(len(found.blocks) <= WIDTH / 2 for found in lane.strips.values())
    assert lane.busy == pytest.approx(50)


def test_wide_batches_side_by_side_stay_apart() -> None:
    strip = Strip()
    for number in range(10):
        strip.add(number * 100, number * 100 + 100)
    assert len(strip.blocks) == 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((None, "–"), (0.0, "0 ms"), (0.085, "85 ms"), (0.9996, "1.0 s"), (4.24, "4.2 s"), (9.96, "10 s")),
        *((59.4, "59 s"), (59.6, "1 m 00 s"), (133, "2 m 13 s"), (3599.7, "1 h 00 m"), (3900, "1 h 05 m")),
        *((86399, "1 d 0 h"), (273_600, "3 d 4 h")),
    ],
)
def test_durations_read_as_people_say_them(seconds: float | None, text: str) -> None:
    assert figures.duration(seconds) == text


def test_rates_keep_three_digits_that_count() -> None:
    assert [figures.rate(value) for value in (None, 0.03124, 2.4149, 99.96, 1530.2)] == [
        *("–", "0.0312", "2.41", "100", "1,530")
    ]


# --- what the workers changed -----------------------------------------------------------------------------------------

TUNING = {
    "tiny": {"compiled": True, "why": "as asked", "precision": "bf16", "attention": "auto", "sizes": ["64x48"],
             "batch_size": 4},
}  # fmt: skip


def with_notes(folder: Path, notes: Sequence[str], tuning: Any = None) -> None:
    tasks = [a_task(0)]
    ledger = Ledger(folder / "ledger.sqlite")
    begin(ledger, tasks)
    do(ledger, tasks[0], 0)
    for number, note in enumerate(notes):
        ledger.span(0, "note", START + number, START + number, note)
    stats = {"workers": {"0": {"label": "GPU 0", "idle": 0.0, "held": 0.0}}}
    ledger.end_run(START + 10, "done", stats | ({"tuning": tuning} if tuning else {}))
    ledger.close()


def test_notes_of_workers_and_the_tuning_stand_in_all_reports(tmp_path: Path) -> None:
    note = "out of memory at 64x48; <b>now</b> decodes in tiles"
    with_notes(tmp_path, ["compiled 1 size in 21 s", note], TUNING)
    reports = write_reports(tmp_path)
    (run,) = reports.summary["runs"]
    assert run["notes"] == [
        {"worker": 0, "label": "GPU 0", "after_seconds": 0.0, "note": "compiled 1 size in 21 s"},
        {"worker": 0, "label": "GPU 0", "after_seconds": 1.0, "note": note},
    ]
    assert run["tuning"] == TUNING
    text = reports.markdown.read_text("utf-8")
    line = "tiny: compiled for 64x48 (as asked), precision bf16, attention auto, batches of up to 4"
    assert "## What the workers changed" in text
    assert line in text
    assert "now\\</b\\> decodes in tiles" in text
    page = Page(reports.page.read_text("utf-8"))
    assert "What the workers changed" in page.text
    assert line.removeprefix("tiny: ") in page.text
    assert note in page.text


def test_notes_are_no_work_and_no_loading(tmp_path: Path) -> None:
    with_notes(tmp_path, ["a", "b"])
    (lane,) = write_reports(tmp_path).summary["runs"][0]["workers"]
    assert (lane["pictures"], lane["busy_seconds"], lane["load_seconds"], lane["losses"]) == (1, 1.0, 0, 0)


def test_a_run_in_which_nothing_was_changed_has_no_such_section(a_run: Path) -> None:
    reports = write_reports(a_run)
    assert "What the workers changed" not in reports.markdown.read_text("utf-8")
    assert 'id="changes"' not in reports.page.read_text("utf-8")


def test_very_many_notes_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import imagemill.report.runs as module

    monkeypatch.setattr(module, "NOTES", 3)
    with_notes(tmp_path, [f"note {number}" for number in range(9)])
    assert [one["note"] for one in write_reports(tmp_path).summary["runs"][0]["notes"]] == [
        "note 0",
        "note 1",
        "note 2",
    ]
