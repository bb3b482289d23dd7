"""Sources: whatever a user has becomes tasks, exactly, or says with its place why not."""

from __future__ import annotations

import csv
import datetime
import io
import itertools
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.errors import InputError
from imagemill.records import Lora, Task
from imagemill.sources import Row, from_iterable, open_source, row_from_mapping
from imagemill.wire import task_from_json, to_json

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")

PROMPTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60).filter(
    lambda text: bool(text.strip())
)


def rows_of(path: Path, content: str | bytes, **options: Any) -> list[Row]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(open_source(path, **options))


def tasks_of(rows: list[Row]) -> list[Task]:
    assert [row.problems for row in rows if row.problems] == []
    return [row.task for row in rows if row.task is not None]


def task(**columns: Any) -> Task:
    (made,) = tasks_of([row_from_mapping({"prompt": "a cat", **columns}, 0, "here")])
    return made


def problem(**columns: Any) -> tuple[str, str]:
    row = row_from_mapping({"prompt": "a cat", **columns}, 0, "here")
    assert row.task is None
    (found,) = row.problems
    return found.field, found.message


# --- exactness --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(PROMPTS, min_size=1, max_size=5))
def test_every_prompt_survives_jsonl_json_csv_and_parquet_unchanged(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "a.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
    (folder / "b.jsonl").write_bytes(
        b"".join(json.dumps({"prompt": p}, ensure_ascii=False).encode() + b"\r\n" for p in prompts)
    )
    (folder / "a.json").write_text(json.dumps(prompts), encoding="utf-8")
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "n"], *([p, "1"] for p in prompts)])
    with (folder / "quoted.tsv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, "excel-tab", quoting=csv.QUOTE_ALL).writerows([["prompt", "n"], *([p, "1"] for p in prompts)])
    pq.write_table(pa.table({"prompt": prompts}), folder / "a.parquet")
    for name in ("a.jsonl", "b.jsonl", "a.json", "a.csv", "quoted.tsv", "a.parquet"):
        assert [t.prompt for t in tasks_of(list(open_source(folder / name)))] == prompts, name


@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(PROMPTS.filter(lambda p: not set(p) & set("\t\r\n")), min_size=1, max_size=5))
def test_a_tsv_that_a_csv_library_wrote_gives_the_prompts_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, "excel-tab").writerows([["prompt", "n"], *([p, "1"] for p in prompts)])
    assert [t.prompt for t in tasks_of(list(open_source(path)))] == prompts


def test_quotes_in_a_plain_tsv_are_plain_characters(tmp_path: Path) -> None:
    cells = ['"G I G G L E" painted in graffiti', '"PEACE"', 'a 5" nail', '"', "'tis"]
    rows = rows_of(tmp_path / "a.tsv", "prompt\tn\n" + "".join(f"{cell}\t1\n" for cell in cells))
    assert [t.prompt for t in tasks_of(rows)] == cells


@needs_data
@pytest.mark.parametrize("column", ["Prompt", None])
def test_parti_prompts_are_1632_exact_rows(column: str | None) -> None:
    path = DATA / "prompts" / "parti_prompts.tsv"
    rows = list(open_source(path, prompt_column=column))
    expected = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[1:] if line]
    assert len(rows) == 1632
    assert [t.prompt for t in tasks_of(rows)] == [cells[0] for cells in expected]
    assert [t.metadata["Note"] for t in tasks_of(rows)] == [cells[3] for cells in expected]
    assert [row.index for row in rows] == list(range(1632))
    assert rows[0].place == f"{path}, line 2"


@needs_data
@pytest.mark.parametrize(
    ("name", "column", "count"),
    [
        ("prompts/geneval.jsonl", None, 553),
        ("edit/bench_270.jsonl", "instruction", 270),
        ("edit/bench_270_b64.json", "edit_instruction_en", 270),
        ("persona_tweets.json", None, 16),
    ],
)
def test_the_shared_benchmarks_read_whole(name: str, column: str | None, count: int) -> None:
    tasks = tasks_of(list(open_source(DATA / name, prompt_column=column)))
    assert len(tasks) == count
    assert all(Path(image).is_file() for t in tasks for image in t.images)


# --- rows and their places --------------------------------------------------------------------------------------------


def test_bom_crlf_and_empty_lines_are_no_matter(tmp_path: Path) -> None:
    header = "\ufeff"
    contents = {
        "a.jsonl": header + '{"prompt": "a"}\r\n\r\n  \r\n{"prompt": "b"}',
        "a.csv": header + "prompt,seed\r\na,1\r\n\r\n   \r\nb,2\r\n",
        "a.tsv": header + "prompt\tseed\r\na\t1\r\n\r\nb\t2",
        "a.json": header + '["a",\r\n "b"]\r\n',
    }
    for name, content in contents.items():
        rows = rows_of(tmp_path / name, content)
        assert [t.prompt for t in tasks_of(rows)] == ["a", "b"], name
        assert [row.index for row in rows] == [0, 1], name


def test_places_are_physical_lines_items_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    assert [r.place for r in rows_of(Path("a.jsonl"), '"a"\n\n"b"\n')] == ["a.jsonl, line 1", "a.jsonl, line 3"]
    rows = rows_of(Path("sub", "a.csv"), 'prompt,seed\n"a\nb",1\n\nc,2\n')
    assert [r.place for r in rows] == ["sub/a.csv, line 2", "sub/a.csv, line 5"]
    assert [r.place for r in rows_of(Path("a.json"), '["a"]')] == ["a.json, item 1"]
    pq.write_table(pa.table({"prompt": ["a", "b"]}), "a.parquet")
    assert [r.place for r in open_source("a.parquet")] == ["a.parquet, row 1", "a.parquet, row 2"]
    assert [r.place for r in open_source("-", stdin=io.BytesIO(b'\n"a"'))] == ["<stdin>, line 2"]
    assert [r.place for r in from_iterable(["a"])] == ["task 1"]


def test_bad_and_skipped_rows_keep_their_index_so_that_seeds_do_not_move(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n')
    assert [row.index for row in rows] == [0, 1, 2]
    assert rows[1].task is None
    assert rows[1].problems[0].field == ""
    assert "does not read as JSON at column 12:" in rows[1].problems[0].message
    assert rows[2].task is not None
    assert rows[2].task.id == "000003"


def test_a_source_is_read_lazily() -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readline(self, size: int | None = -1, /) -> bytes:
            return b'{"prompt": "a"}\n'

    rows = open_source("-", stdin=Endless())  # type: ignore[arg-type]
    assert [row.index for row in itertools.islice(rows, 3)] == [0, 1, 2]


def test_an_empty_source_has_no_rows(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl", "a.csv", "a.tsv"):
        assert rows_of(tmp_path / name, "") == [], name
        assert rows_of(tmp_path / name, "\n\n") == [], name
    assert rows_of(tmp_path / "a.csv", "prompt\n") == []
    assert rows_of(tmp_path / "a.json", "[]") == []


@pytest.mark.parametrize("content", ["a,1,extra\n", "a\n"])
def test_a_table_row_with_other_columns_than_the_header_is_a_bad_row(tmp_path: Path, content: str) -> None:
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        text = f"prompt,seed\n{content}b,2\n".replace(",", separator)
        bad, good = rows_of(tmp_path / name, text)
        assert bad.task is None
        assert "columns where the header has 2" in bad.problems[0].message
        assert good.task is not None
        assert good.task.seed == 2


def test_quotes_that_do_not_fit_cost_one_csv_row(tmp_path: Path) -> None:
    bad, good = rows_of(tmp_path / "a.csv", 'prompt,seed\n"a "cat" here",1\nb,2\n')
    assert bad.task is None
    assert bad.problems[0].field == ""
    assert good.task is not None
    assert good.place == f"{tmp_path}/a.csv, line 3"


def test_a_csv_quote_that_never_closes_is_named_by_its_row(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.csv, line 3: a quote opens in this row and never closes"):
        rows_of(tmp_path / "a.csv", 'prompt,seed\na,1\n"b,2\nc,3\n')


def test_a_cell_longer_than_the_csv_default_of_128_kib_reads(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path / "a.csv", f"prompt,note\na,{'x' * 300_000}\n")
    assert tasks_of([row])[0].metadata == {"note": "x" * 300_000}


# --- refusals of a whole source ---------------------------------------------------------------------------------------


def test_missing_files_folders_and_unknown_suffixes_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        open_source(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        open_source(tmp_path)
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "a").write_text("a cat")
    with pytest.raises(InputError, match=r"/a: its name has no suffix that tells its type; known: \.json, "):
        open_source(tmp_path / "a")
    (tmp_path / "a.yaml").write_text("steps: 8")
    with pytest.raises(
        InputError, match=r"'\.yaml' are not read; .*; settings go to --config, those of an evaluation to"
    ):
        open_source(tmp_path / "a.yaml")
    with pytest.raises(InputError, match=r"'\.txt' are not read; known: \.json, \.jsonl, \.ndjson, \.csv, \.tsv"):
        open_source(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_bytes_that_are_not_utf8_are_named_by_line_and_byte(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(InputError, match=rf"a\.{suffix}, line 2, byte 3: 0xe9 is not UTF-8"):
        rows_of(tmp_path / f"a.{suffix}", b"prompt\nab\xe9\n" if suffix != "jsonl" else b'"a"\nab\xe9\n')


def test_utf16_is_named(tmp_path: Path) -> None:
    for suffix in ("jsonl", "json", "csv"):
        with pytest.raises(InputError, match="is UTF-16"):
            rows_of(tmp_path / f"a.{suffix}", "prompt\na\n".encode("utf-16"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "a"},\n {"prompt" "b"}]', "line 2, column 12"),
        ('{"prompt": "a"}', "holds no tasks"),
        ("3", "holds no tasks"),
        ('{"tasks": {}}', "holds no tasks"),
        ('{"tasks": [], "steps": 3}', "'steps' is not known beside 'tasks'"),
        ('[{"prompt": "a", "prompt": "b"}]', "names 'prompt' twice"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"prompt": "a", "seed": ' + "9" * 5000 + "}]", "thousands of digits"),
    ],
)
def test_json_that_is_no_source_says_where_and_why(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows_of(tmp_path / "a.json", content)


def test_a_json_object_with_tasks_and_lists_of_prompts_read(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.json", '{"tasks": [{"prompt": "a"}, "b", 3]}')
    assert [row.task.prompt for row in rows if row.task] == ["a", "b"]
    assert rows[2].problems


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_a_table_without_the_prompt_column_lists_its_columns(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": ["a"], "n": [1]}), path)
    else:
        path.write_text("text,n\na,1\n".replace(",", "," if suffix == "csv" else "\t"))
    with pytest.raises(InputError, match="no column 'prompt'; name one of its columns with --prompt-column: text, n"):
        list(open_source(path))
    with pytest.raises(InputError, match="no column 'caption'"):
        list(open_source(path, prompt_column="caption"))
    assert [t.prompt for t in tasks_of(list(open_source(path, prompt_column="text")))] == ["a"]


def test_a_csv_with_semicolons_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="separated by ';'"):
        rows_of(tmp_path / "a.csv", "prompt;seed\na;1\n")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'seed' is there twice"):
        rows_of(tmp_path / "a.csv", "prompt,seed,seed\na,1,2\n")


def test_a_damaged_parquet_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not read as Parquet"):
        rows_of(tmp_path / "a.parquet", b"PAR1 this is none PAR1")


# --- the prompt column ------------------------------------------------------------------------------------------------


def test_a_column_that_differs_from_prompt_in_case_only_is_taken_when_it_is_the_only_one() -> None:
    assert tasks_of([row_from_mapping({"Prompt": "a", "Note": ""}, 0, "x")])[0] == Task(
        "000001", "a", metadata={"Note": ""}
    )
    assert row_from_mapping({"Prompt": "a", "PROMPT": "b"}, 0, "x").task is None
    (chosen,) = tasks_of([row_from_mapping({"Prompt": "a", "prompt": "b"}, 0, "x")])
    assert (chosen.prompt, chosen.metadata) == ("b", {"Prompt": "a"})


def test_the_case_of_a_column_does_not_matter_where_no_other_has_its_name(tmp_path: Path) -> None:
    (made,) = tasks_of(rows_of(tmp_path / "a.csv", "Prompt,Seed,ID,Lora_Strength,LORA\na,3,z,0.5,b.safetensors\n"))
    assert (made.prompt, made.seed, made.id, made.loras[0].strength, made.metadata) == ("a", 3, "z", 0.5, {})
    (made,) = tasks_of([row_from_mapping({"prompt": "a", "seed": 1, "Seed": 2}, 0, "x")])
    assert (made.seed, made.metadata) == (1, {"Seed": 2})
    row = row_from_mapping({"prompt": "a", "Seed": 1, "SEED": 2}, 0, "x")
    assert [(problem.field, problem.message) for problem in row.problems] == [
        ("SEED", "means the same as Seed; keep one of them")
    ]


@pytest.mark.parametrize(
    "column", ["stepps", "Step", "negativ_prompt", "hight", "seeds", "outputpath", "num_inference_step"]
)
def test_a_column_that_is_nearly_a_known_one_is_a_slip(column: str) -> None:
    row = row_from_mapping({"prompt": "a", column: 3}, 0, "x")
    assert (row.slips, row.problems) == ((column,), ())
    assert row.task is not None
    assert row.task.metadata == {column: 3}


@pytest.mark.parametrize(
    "column",
    [
        "category",
        "source",
        "weight",
        "tags",
        "lang",
        "text",
        "note",
        "title",
        "index",
        "height_cm",
        "tweet_id",
        "style",
    ],
)
def test_other_columns_are_no_slips(column: str) -> None:
    assert row_from_mapping({"prompt": "a", column: 3, "metadata": {"stepps": 1}}, 0, "x").slips == ()


def test_with_a_prompt_column_the_column_prompt_is_metadata() -> None:
    row = row_from_mapping({"prompt": "old", "caption": "new"}, 0, "x", prompt_column="caption")
    (made,) = tasks_of([row])
    assert (made.prompt, made.metadata) == ("new", {"prompt": "old"})


def test_a_row_without_prompt_says_which_columns_are_there() -> None:
    row = row_from_mapping({"text": "a", "n": 1}, 0, "x")
    assert [found.field for found in row.problems] == ["prompt"]
    assert "the columns here are text, n; name the one to read with --prompt-column" in row.problems[0].message
    row = row_from_mapping({"text": "a"}, 0, "x", prompt_column="caption")
    assert [found.field for found in row.problems] == ["caption"]


@pytest.mark.parametrize("prompt", ["", "  \n", None])
def test_an_empty_prompt_is_refused(prompt: str | None) -> None:
    assert problem(prompt=prompt) == ("prompt", "is empty; write one")


# --- fields -----------------------------------------------------------------------------------------------------------


def test_every_field_arrives(tmp_path: Path) -> None:
    made = task(
        id="x", negative_prompt="", images=["i.png"], model="tiny", width=64, height=32, steps=2, guidance_scale=1,
        true_cfg_scale=2.5, seed=7, loras=[{"path": "l.safetensors", "strength": 0.5}, "m.safetensors:2"],
        output_path="a/b.png", num_images=3, tag=["t", {"n": None}], system_prompt="be fair",
    )  # fmt: skip
    here = Path.cwd()
    assert made == Task(
        "x", "a cat", "", (str(here / "i.png"),), "tiny", 64, 32, 2, 1.0, 2.5, 7,
        (Lora(str(here / "l.safetensors"), 0.5), Lora(str(here / "m.safetensors"), 2.0)),
        "a/b.png", 3, {"tag": ["t", {"n": None}]}, "be fair",
    )  # fmt: skip
    assert task_from_json(to_json(made)) == made
    assert tasks_of(list(from_iterable([made]))) == [made]


def test_aliases_are_understood() -> None:
    made = task(image="i.png", size="64x32", num_inference_steps=2, guidance=1.5, lora_path="l", lora_strength=0.5)
    assert (made.width, made.height, made.steps, made.guidance_scale) == (64, 32, 2, 1.5)
    assert made.images == (os.path.abspath("i.png"),)
    assert made.loras == (Lora(os.path.abspath("l"), 0.5),)
    assert task(lora="l:0.5").loras == task(lora={"path": "l", "strength": 0.5}).loras == made.loras


@pytest.mark.parametrize("lora", ["l", Path("l"), ["l"], {"path": "l"}, [{"path": "l"}]])
def test_a_strength_beside_the_one_lora_is_its_strength(lora: Any) -> None:
    assert task(lora=lora, lora_strength=0.5).loras == (Lora(os.path.abspath("l"), 0.5),)
    assert task(loras=lora, lora_strength=None).loras == (Lora(os.path.abspath("l"), 1.0),)
    assert task(lora=lora, lora_path="", lora_strength=0.5).loras == (Lora(os.path.abspath("l"), 1.0),)


@pytest.mark.parametrize(
    "columns",
    [
        {"steps": 1, "num_inference_steps": 1},
        {"guidance": 1, "guidance_scale": 1},
        {"image": "a", "images": ["a"]},
        {"lora": "a", "loras": ["a"]},
        {"lora_path": "a", "loras": ["a"]},
        {"size": "8x8", "width": 8},
    ],
)
def test_a_field_under_two_names_is_refused(columns: dict[str, Any]) -> None:
    assert "means the same as" in problem(**columns)[1]


@pytest.mark.parametrize(
    ("columns", "field", "message"),
    [
        ({"steps": True}, "steps", "true is not a whole number"),
        ({"steps": "8"}, "steps", "'8' is not a whole number"),
        ({"num_inference_steps": 1.5}, "num_inference_steps", "1.5 is not a whole number"),
        ({"seed": 2**63}, "seed", "9223372036854775808 does not fit in 64 bit; write a smaller number"),
        ({"seed": 10**6000}, "seed", "bits does not fit in 64 bit"),
        ({"guidance_scale": 10**400}, "guidance_scale", "does not fit in 64 bit"),
        ({"guidance": float("nan")}, "guidance", "nan is not a finite number"),
        ({"true_cfg_scale": float("inf")}, "true_cfg_scale", "inf is not a finite number"),
        ({"guidance_scale": False}, "guidance_scale", "false is not a number"),
        ({"prompt": 3}, "prompt", "3 is not text"),
        ({"id": 1.5}, "id", "1.5 is not text"),
        ({"images": 3}, "images", "3 is no path; write one, or a list of paths"),
        ({"image": {"bytes": 1}}, "image", "an object is no path; write one, or a list of paths"),
        ({"images": ["a", 3]}, "images[1]", "3 is not text"),
        ({"size": "64"}, "size", "'64' is not a size; write WIDTHxHEIGHT, such as 1024x1024"),
        ({"size": 64}, "size", "64 is not a size"),
        ({"size": "0x64"}, "size", "'0x64' is not a size"),
        ({"size": f"16x{'9' * 10}"}, "size", "'16x9999999999' is over the limit of 67,108,864 pixels (8192x8192)"),
        ({"size": f"{'9' * 5000}x16"}, "size", "is over the limit of 67,108,864 pixels"),
        ({"loras": [{"path": "a", "weight": 1}]}, "loras[0].weight", "is not known"),
        ({"loras": [{"strength": 1}]}, "loras[0].path", "is missing"),
        ({"loras": [{"path": "a", "strength": float("nan")}]}, "loras[0].strength", "nan is not a finite number"),
        ({"lora_path": "a", "lora_strength": "x"}, "loras[0].strength", "'x' is not a number"),
        ({"lora_strength": 0.5}, "lora_strength", "is there without lora or lora_path; name the file"),
        ({"loras": [], "lora_strength": 0.5}, "lora_strength", "is there without lora or lora_path"),
        ({"lora": ["a", "b"], "lora_strength": 0.5}, "lora_strength", "is one strength for 2 adapters"),
        ({"lora": "a:0.5", "lora_strength": 0.5}, "lora_strength", "is there beside a strength in loras; keep one"),
        ({"lora": {"path": "a", "strength": 1}, "lora_strength": 1}, "lora_strength", "is there beside a strength"),
        ({"lora": [Lora("a", 1.0)], "lora_strength": 1}, "lora_strength", "is there beside a strength"),
        ({"lora": "a", "lora_strength": "x"}, "lora[0].strength", "'x' is not a number"),
        ({"lora": 3, "lora_strength": 1}, "lora[0]", "3 is not"),
        ({"lora_path": "https://x.org/a.safetensors"}, "loras[0]", "is a URL; only local files"),
        ({"images": ["s3://bucket/a.png"]}, "images[0]", "is a URL"),
        ({"images": ["a\0b"]}, "images[0]", "no file name can hold"),
        ({"model": "a\0b"}, "model", "no name can hold"),
        ({"score": float("nan")}, "score", "nan is no JSON number"),
        ({"big": 2**64}, "big", "does not fit in 64 bit"),
        ({"half": "\ud800"}, "half", "half of a surrogate pair"),
        ({"deep": {"a": [object()]}}, "deep.a[0]", "is of the type object, which JSON cannot hold"),
        ({"metadata": {"tag": 1}, "tag": 2}, "metadata.tag", "is there as the column tag too"),
    ],
)
def test_a_bad_value_is_named_by_the_users_own_field(columns: dict[str, Any], field: str, message: str) -> None:
    found = problem(**columns)
    assert found[0] == field
    assert message in found[1]


def test_all_problems_of_a_row_are_told_together() -> None:
    row = row_from_mapping({"steps": "x", "size": "y", "seed": 1.5}, 0, "here")
    assert {found.field for found in row.problems} == {"prompt", "size", "steps", "seed"}


def test_null_means_not_given_and_whole_floats_are_whole_numbers() -> None:
    assert task(seed=None, steps=None, loras=None, lora_path=None, lora_strength=0.5, note=None) == Task(
        "000001", "a cat", metadata={"note": None}
    )
    assert (task(seed=42.0).seed, task(id=17).id) == (42, "17")


def test_metadata_becomes_json(tmp_path: Path) -> None:
    made = task(
        when=datetime.datetime(2024, 1, 2, 3), day=datetime.date(2024, 1, 2), price=Decimal("1.50"), raw=b"1234",
        where=Path("a/b"), pair=(1, 2), count=np.int64(3), share=np.float32(0.5), metadata={"own": 1},
    )  # fmt: skip
    assert made.metadata == {
        "own": 1, "when": "2024-01-02T03:00:00", "day": "2024-01-02", "price": "1.50",
        "raw": "<4 bytes left out: JSON holds no bytes>", "where": "a/b", "pair": [1, 2], "count": 3, "share": 0.5,
    }  # fmt: skip
    assert json.loads(to_json(made))["metadata"] == made.metadata


def test_cells_of_a_table_are_read_by_their_column(tmp_path: Path) -> None:
    header = "id,prompt,seed,steps,guidance_scale,loras,images,lora_strength,lora_path,note"
    content = f'{header}\n7,a,,8.0,1e0,"[{{""path"": ""l"", ""strength"": 2}}]",i.png,0.5,,\n'
    (made,) = tasks_of(rows_of(tmp_path / "a.csv", content))
    assert (made.id, made.seed, made.steps, made.guidance_scale) == ("7", None, 8, 1.0)
    assert made.loras == (Lora(str(tmp_path / "l"), 2.0),)
    assert made.images == (str(tmp_path / "i.png"),)
    assert made.metadata == {"note": ""}


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("seed", "abc", "'abc' is not a whole number"),
        ("seed", "true", "'true' is not a whole number"),
        ("seed", "9" * 30, "does not fit in 64 bit"),
        ("seed", "9" * 6000, "is not a whole number"),
        ("seed", "1_000", "'1_000' is not a whole number"),
        ("guidance", "nan", "nan is not a finite number"),
        ("guidance", "1e999", "inf is not a finite number"),
        ("loras", "[1", "does not read as JSON"),
        ("size", "8by8", "is not a size"),
    ],
)
def test_a_cell_that_does_not_read_is_named_by_line_and_field(
    tmp_path: Path, column: str, cell: str, message: str
) -> None:
    (row,) = rows_of(tmp_path / "a.tsv", f"prompt\t{column}\na\t{cell}\n")
    assert row.place == f"{tmp_path}/a.tsv, line 2"
    assert [found.field for found in row.problems] == [column]
    assert message in row.problems[0].message


def test_parquet_types_arrive(tmp_path: Path) -> None:
    when = pa.array([1_700_000_000_000_000_001], pa.timestamp("ns"))
    far = pa.array([4_000_000], pa.date32())
    table = {"prompt": ["a"], "seed": [3], "steps": [4.0], "when": when, "far": far, "raw": [b"abc"]}
    table["nested"] = [{"a": [1]}]
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (made,) = tasks_of(list(open_source(tmp_path / "a.parquet")))
    assert (made.seed, made.steps) == (3, 4)
    assert made.metadata["when"].startswith("2023-11-14 22:13:20.000000001")
    assert made.metadata["far"].startswith("12921-")
    assert made.metadata["nested"] == {"a": [1]}
    assert "3 bytes left out" in made.metadata["raw"]


def test_jsonl_lines_with_nan_or_a_key_twice_are_bad_rows(tmp_path: Path) -> None:
    content = '{"prompt": "a", "seed": NaN}\n{"prompt": "a", "prompt": "b"}\n[1]\n{"prompt": "a", "steps": 1e999}\n'
    rows = rows_of(tmp_path / "a.jsonl", content + '{"prompt": "a", "seed": ' + "9" * 5000 + "}\n" + "[" * 99_999)
    assert [row.problems[0].field for row in rows] == ["seed", "", "", "steps", "", ""]


# --- paths ------------------------------------------------------------------------------------------------------------


def test_relative_paths_are_beside_the_source_then_here_then_beside_it_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    beside.mkdir()
    here.mkdir()
    for path in (beside / "both", here / "both", here / "only_here"):
        path.touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    names = ["both", "only_here", "nowhere", str(here / "both"), "~/x"]
    (made,) = tasks_of(rows_of(beside / "a.jsonl", json.dumps({"prompt": "a", "loras": names})))
    expected = [beside / "both", here / "only_here", beside / "nowhere", here / "both", here / "x"]
    assert [lora.path for lora in made.loras] == [str(path) for path in expected]


# --- tweet batches ----------------------------------------------------------------------------------------------------


def batch(tweets: list[Any], **persona: Any) -> str:
    return json.dumps({"persona": {"name": "Harbour Notes", **persona}, "tweets": tweets})


def tweet(hint: Any, **more: Any) -> dict[str, Any]:
    return {"text": "a note", "image_generation": {"scene_hint": hint, **more}}


def test_a_tweet_batch_names_files_by_persona_and_place_and_leaves_the_seed_to_the_run(tmp_path: Path) -> None:
    content = batch([tweet("a"), tweet("b")], lora={"model_path": "l.safetensors"})
    one, two = tasks_of(rows_of(tmp_path / "t.json", content))
    assert (one.id, one.output_path, one.seed) == ("Harbour_Notes_01", "Harbour_Notes_01", None)
    assert two.id == "Harbour_Notes_02"
    assert one.loras == (Lora(str(tmp_path / "l.safetensors"), 1.0),)
    assert one.metadata == {"persona": "Harbour Notes", "text": "a note"}


def test_numbers_of_tweets_are_as_wide_as_the_count(tmp_path: Path) -> None:
    tasks = tasks_of(rows_of(tmp_path / "t.json", batch([tweet("a")] * 100)))
    assert (tasks[0].id, tasks[99].id) == ("Harbour_Notes_001", "Harbour_Notes_100")


@pytest.mark.parametrize("missing", [{}, {"image_generation": None}, tweet(" "), tweet(None)])
def test_a_tweet_without_a_hint_is_skipped_by_its_place(tmp_path: Path, missing: dict[str, Any]) -> None:
    rows = rows_of(tmp_path / "t.json", batch([tweet("a"), missing, tweet("c")]))
    assert rows[1] == Row(1, f"{tmp_path}/t.json, tweet 2", None, skipped="tweet 2 has no image_generation.scene_hint")
    assert rows[2].task is not None
    assert rows[2].task.id == "Harbour_Notes_03"


@pytest.mark.parametrize("lora", [None, {}, "", " ", {"model_path": None, "strength": 1.0}, {"model_path": ""}])
def test_a_persona_without_a_lora_file_has_none(tmp_path: Path, lora: Any) -> None:
    assert tasks_of(rows_of(tmp_path / "t.json", batch([tweet("a")], lora=lora)))[0].loras == ()


@pytest.mark.parametrize(
    ("persona", "message"),
    [
        ({"name": None}, r"persona\.name: null is not text"),
        ({"name": "?!"}, r"persona\.name: has no letter or digit"),
        ({"lora": {"model_path": "a", "strength": "x"}}, r"persona\.lora\.strength: 'x' is not a number"),
        ({"lora": {"strength": 1.0}}, r"persona\.lora: has a strength without a model_path"),
        ({"lora": {"path": "a"}}, r"persona\.lora\.path: is not known"),
        ({"lora": "a"}, r"""persona\.lora: 'a' is not an object; write {"model_path": "FILE", "strength": 0\.8}"""),
        ({"lora": []}, r"persona\.lora: a list is not an object; write "),
    ],
)
def test_a_persona_that_does_not_read_is_refused(tmp_path: Path, persona: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows_of(tmp_path / "t.json", batch([tweet("a")], **persona))


def test_a_bad_tweet_is_a_bad_row_and_its_own_settings_are_read(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "t.json", batch([3, tweet(5), tweet("a", steps="x"), tweet("a", steps=4, seed=9)]))
    assert [[found.field for found in row.problems] for row in rows] == [["tweets[0]"], ["scene_hint"], ["steps"], []]
    assert rows[3].task is not None
    assert (rows[3].task.steps, rows[3].task.seed) == (4, 9)


def test_a_persona_in_any_script_names_files(tmp_path: Path) -> None:
    (made,) = tasks_of(rows_of(tmp_path / "t.json", batch([tweet("a")], name=" 港口/笔记 v1.5 ")))
    assert made.id == "港口_笔记_v1_5_01"


# --- Python -----------------------------------------------------------------------------------------------------------


def test_prompts_mappings_and_tasks_from_python_are_rows() -> None:
    rows = list(from_iterable(["a", {"prompt": "b", "seed": 3}, Task("x", "c", loras=(Lora("l", 0.5),)), 3]))  # type: ignore[list-item]
    assert [row.task.prompt for row in rows if row.task] == ["a", "b", "c"]
    assert rows[2].task is not None
    assert rows[2].task.loras == (Lora(os.path.abspath("l"), 0.5),)
    assert rows[3].problems[0].message == "3 is no task; give a prompt, a dict or a Task"


def test_a_task_from_python_is_checked_as_strictly_as_a_row() -> None:
    (row,) = from_iterable([Task("x", "a", steps="8")])  # type: ignore[arg-type]
    assert [found.field for found in row.problems] == ["steps"]


def test_reading_tasks_imports_neither_torch_nor_what_is_not_needed() -> None:
    code = (
        "import sys, imagemill.sources, imagemill.inputs, imagemill.config;"
        "print(sorted({'torch', 'pyarrow', 'yaml', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- pictures to edit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet", "mappings"])
def test_pictures_are_found_beside_the_file_whatever_its_form(tmp_path: Path, form: str) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    rows: list[dict[str, Any]] = [{"prompt": "p", "images": ["a.png", "b.png"]}, {"prompt": "q", "images": ["a.png"]}]
    path = tmp_path / f"tasks.{form}"
    if form == "mappings":
        found = from_iterable([{**row, "images": [tmp_path / name for name in row["images"]]} for row in rows])
    else:
        if form == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif form == "csv":
            path.write_text('prompt,image\np,"[""a.png"", ""b.png""]"\nq,a.png\n')
        elif form == "tsv":
            path.write_text('prompt\timages\np\t["a.png", "b.png"]\nq\ta.png\n')
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        found = open_source(path)
    made = [row.task.images for row in found if row.task]
    assert made == [(str(tmp_path / "a.png"), str(tmp_path / "b.png")), (str(tmp_path / "a.png"),)]


def test_a_picture_from_memory_wants_a_folder_to_be_kept_in(tmp_path: Path) -> None:
    from PIL import Image

    task = {"prompt": "p", "images": [Image.new("L", (2, 2)), "a.png"]}
    (row,) = from_iterable([task])
    assert [problem.field for problem in row.problems] == ["images"]
    assert "no folder to keep it in" in row.problems[0].message
    (row,) = from_iterable([task], tmp_path / "kept")
    assert row.task
    assert Path(row.task.images[0]).parent == tmp_path / "kept"
    assert row.task.images[1] == os.path.abspath("a.png")
    assert task["images"][1] == "a.png"
