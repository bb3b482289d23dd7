"""Row 18: a prompt comes back to the letter, from task file to ledger, picture, results and page; or a limit says no."""

from __future__ import annotations

import csv
import html
import io
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checks import done_is_true, no_temporary_files
from PIL import Image

from imagemill.cli import main
from imagemill.plan import MAX_PROMPT

PROMPTS = {
    "emoji": "a cat 🐈‍⬛ with 👩‍👩‍👧‍👦 and 🏴󠁧󠁢󠁳󠁣󠁴󠁿 under 🇺🇳",
    "right_to_left": "قطة سوداء على سجادة, חתול שחור, \u202eback to front\u202c\u200f",
    "combining": "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́ and e\u0301 is not \u00e9",
    "chinese": "一只黑猫，背景是水墨山水；「标题」",
    "astral": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010fffd \U000f0000",
    "lines": "first\nsecond\r\nthird\rfourth\ttab",
    "odd_lines": "a\u2028b\u2029c\u0085d\x0be\x0cf",
    "controls": "bell \x07 escape \x1b[31mred\x1b[0m delete \x7f c1 \x9b and \x01\x02",
    "noncharacters": "\ufffe \uffff \ufdd0 \ufeff and \ufffd",
    "spaces": "  around \u00a0\u3000 it  ",
    "markup": "<script>alert(1)</script><!-- --><![CDATA[ ]]> &amp; &#60; \"'` </script></style>",
    "formats": "{0} {prompt} %s %(x)s ${HOME} `id` $(id) \\n \\u0041 \\",
    "webui": "a, Steps: 9, Seed: 1\nNegative prompt: none\nSteps: 20, Size: 1x1",
    "formula": "=cmd|' /C calc'!A0",
    "json": '{"prompt": "x", "id": "y"}',
    "null_word": "null",
    "csv": 'a "quoted", ""cell""; with\nlines',
    "one": "x",
    "surrogate_words": "\\ud800 and \\udfff as text",
    "at_the_limit": "長" * MAX_PROMPT,
}


def results(place: Any) -> list[dict[str, Any]]:
    """The lines of results.jsonl; only LF ends a line of JSON, and some prompts hold what Python takes for an end too."""
    text = (place.folder / "out" / "results.jsonl").read_bytes().decode()
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "tasks.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8", newline=""
    )
    return "tasks.jsonl"


def ascii_json(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "tasks.json").write_text(json.dumps(rows), "ascii")
    return "tasks.json"


def comma(folder: Path, rows: list[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["id", "prompt"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    (folder / "tasks.csv").write_bytes(text.getvalue().encode())
    return "tasks.csv"


def parquet(folder: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), folder / "tasks.parquet")
    return "tasks.parquet"


@pytest.mark.parametrize("write", [jsonl, ascii_json, comma, parquet])
def test_a_prompt_of_any_kind_comes_back_to_the_letter(write: Any, place: Any) -> None:
    source = write(place.folder, [{"id": name, "prompt": prompt} for name, prompt in PROMPTS.items()])
    ended = place.fake(source, "out", "--size", "16x16", "--workers", "1", "--isolate")
    assert ended.code == 0, ended.text
    assert len(done_is_true(place.folder / "out")) == len(PROMPTS)
    no_temporary_files(place.folder / "out")
    ledger = {name: json.loads(task)["prompt"] for name, task in place.ledger("SELECT id, task FROM tasks")}
    assert ledger == PROMPTS
    assert {one["id"]: one["prompt"] for one in results(place)} == PROMPTS
    for name, prompt in PROMPTS.items():
        with Image.open(place.folder / "out" / f"{name}.png") as image:
            image.load()
            assert json.loads(image.text["imagemill"])["task"]["prompt"] == prompt
            if "\r" not in prompt:
                assert image.text["parameters"].startswith(prompt)
    page = (place.folder / "out" / "report.html").read_bytes().decode()
    for prompt in (PROMPTS["emoji"], PROMPTS["chinese"], PROMPTS["combining"], PROMPTS["markup"], PROMPTS["webui"]):
        assert html.escape(prompt).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page
    assert PROMPTS["markup"] not in page
    assert "\x1b" not in ended.text


@pytest.mark.parametrize("name", ["out.jpg", "out.webp"])
def test_the_other_formats_keep_it_too(name: str, place: Any) -> None:
    kept = {name: prompt for name, prompt in PROMPTS.items() if name != "at_the_limit"}
    source = jsonl(place.folder, [{"id": name, "prompt": prompt} for name, prompt in kept.items()])
    suffix = name.rpartition(".")[2]
    ended = place.fake(source, "out", "--size", "16x16", "--format", suffix)
    assert ended.code == 0, ended.text
    for one, prompt in kept.items():
        with Image.open(place.folder / "out" / f"{one}.{suffix}") as image:
            assert json.loads(image.getexif()[0x010E])["task"]["prompt"] == prompt


def test_a_second_run_knows_every_prompt_again(place: Any) -> None:
    source = jsonl(place.folder, [{"id": name, "prompt": prompt} for name, prompt in PROMPTS.items()])
    assert place.fake(source, "out", "--size", "16x16").code == 0
    again = place.fake(source, "out", "--size", "16x16")
    assert again.code == 0, again.text
    assert "(0 in this run" in again.out


LIMITS = {
    "long": ("x" * (MAX_PROMPT + 1), "100,001 characters; at most 100,000"),
    "ten_megabytes": ("x" * 10_000_000, "10,000,000 characters; at most 100,000"),
    "ten_megabytes_of_emoji": ("🐈" * 2_500_000, "2,500,000 characters; at most 100,000"),
    "nul": ("a\0b", "NUL character"),
    "high": ("a\ud800b", "half of a surrogate pair"),
    "low": ("a\udfffb", "half of a surrogate pair"),
    "wrong_order": ("a\udc08\ud83db", "half of a surrogate pair"),
    "blank": (" \n\t\u3000", "is empty"),
}


NAME = "x" * 300
"""Longer than a file's name can be."""


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "tasks.jsonl", "--model", NAME),
        ("run", "tasks.jsonl", "--model", f"./{NAME}"),
        ("run", "tasks.jsonl", "--model", "fake", "--lora", NAME),
        ("run", "tasks.jsonl", "--model", "fake", "--out", NAME),
        ("run", f"{NAME}.jsonl", "--model", "fake"),
        ("run", "adapters.jsonl", "--model", "fake"),
        ("report", NAME),
        ("repair", NAME),
        ("eval", NAME, "--edit-model", "fake", "--judge", "reference"),
        ("compare", NAME, NAME),
    ],
    ids=["model", "folder", "lora", "out", "source", "row", "report", "repair", "eval", "compare"],
)
def test_a_name_longer_than_any_file_has_is_refused_in_a_line(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["imagemill", *arguments])
    Path("tasks.jsonl").write_text('{"prompt": "a"}\n')
    Path("adapters.jsonl").write_text(json.dumps({"prompt": "a", "lora_path": NAME}) + "\n")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "xxx" in capsys.readouterr().err.splitlines()[0]
    assert not list(tmp_path.glob("*/*.png"))


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_what_no_file_can_hold_and_what_is_too_long_is_refused_in_a_short_line(field: str, place: Any) -> None:
    limits = LIMITS if field == "prompt" else {name: one for name, one in LIMITS.items() if name != "blank"}
    rows = [{"id": name, "prompt": "a", field: text} for name, (text, _) in limits.items()]
    place.write("tasks.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    ended = place.fake("tasks.jsonl")
    assert ended.code == 2, ended.text[:2000]
    assert len(ended.text) < 10_000
    assert "Traceback" not in ended.err
    for number, (_, message) in enumerate(limits.values(), 1):
        assert f"line {number}: {field}: " in ended.err
        assert message in ended.err
    assert not list((place.folder / "out").rglob("*.png"))


def test_ten_megabytes_in_a_table_and_in_other_columns_are_told_or_kept(place: Any) -> None:
    text = "x" * 10_000_000
    place.write("tasks.csv", f'id,prompt\na,"{text}"\n')
    ended = place.fake("tasks.csv")
    assert ended.code == 2
    assert "at most 100,000" in ended.err
    assert len(ended.text) < 10_000
    place.write("name.jsonl", json.dumps({"prompt": "a", "id": text}) + "\n")
    ended = place.fake("name.jsonl")
    assert ended.code == 2
    assert len(ended.text) < 10_000
    place.write("path.jsonl", json.dumps({"prompt": "a", "output_path": text + ".png"}) + "\n")
    ended = place.fake("path.jsonl")
    assert ended.code == 2
    assert len(ended.text) < 10_000
    place.write("model.jsonl", json.dumps({"prompt": "a", "model": text}) + "\n")
    ended = place.fake("model.jsonl")
    assert ended.code == 2
    assert len(ended.text) < 10_000


def test_a_file_name_made_of_any_id_is_one_that_any_system_takes(place: Any) -> None:
    ids = [name for name in PROMPTS.values() if len(name) <= 200]
    source = jsonl(place.folder, [{"id": name, "prompt": "a"} for name in ids])
    ended = place.fake(source, "out", "--size", "16x16")
    assert ended.code == 0, ended.text
    assert [one["id"] for one in results(place)] == ids
    names = [path.name for path in (place.folder / "out").glob("*.png")]
    assert len(names) == len(ids)
    assert all(not {unicodedata.category(mark) for mark in name} & {"Cc", "Cs", "Zl"} for name in names)
