"""Benchmarks: every format gives the same kind of items, and a bad row ends in one line with place and mend."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imagemill.errors import InputError, OutputError
from imagemill.scoring.benchmarks import LANGUAGES, formats, read_benchmark, select, unknown_fields
from imagemill.scoring.item import Item

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data/edit"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")


def png(color: str = "red", form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(out, form)
    return out.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    return put(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def as_json(path: Path, data: Any) -> Path:
    return put(path, json.dumps(data, ensure_ascii=False, indent=1).encode())


def read(path: Path, **options: Any) -> list[Item]:
    folder = path if path.is_dir() else path.parent
    return read_benchmark(path, **{"cache": folder / "cache", **options})


def refusals(path: Path, **options: Any) -> list[str]:
    """What is said of every bad row."""
    with pytest.raises(InputError) as caught:
        read(path, **options)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def refusal(path: Path, **options: Any) -> str:
    """What is said of a benchmark with one thing wrong."""
    (line,) = refusals(path, **options)
    return line


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- imagemill's own --------------------------------------------------------------------------------------------------

ROW = {"id": "a", "category": "物理", "instruction": "make it blue", "instruction_zh": "变蓝", "image": "images/a.png"}


def own(tmp_path: Path, *rows: Mapping[str, Any], name: str = "bench.jsonl") -> Path:
    for picture in ("a", "b", "c"):
        put(tmp_path / f"images/{picture}.png", png())
    return jsonl(tmp_path / name, rows or [ROW])


def test_a_row_of_jsonl_arrives_whole(tmp_path: Path) -> None:
    more = {
        "source_caption": "a cube", "seed": 7, "images": ["images/b.png"], "target": "images/c.png",
        "mask": "images/b.png", "questions": ["Is it blue?"], "license": "MIT", "difficulty": "easy",
    }  # fmt: skip
    path = own(tmp_path, {**ROW, **more}, {**ROW, "id": 2, "seed": None, "target": "", "metadata": {"a": 1}})
    images = tmp_path / "images"
    assert read(path) == [
        Item(
            id="a", category="物理", instruction="make it blue", image=str(images / "a.png"),
            images=(str(images / "b.png"),), source_caption="a cube", target=str(images / "c.png"),
            mask=str(images / "b.png"), seed=7, questions=("Is it blue?",), source="images/a.png",
            metadata={"license": "MIT", "difficulty": "easy"},
        ),
        Item("2", "物理", "make it blue", str(images / "a.png"), source="images/a.png", metadata={"metadata": {"a": 1}}),
    ]  # fmt: skip
    assert not (tmp_path / "cache").exists()


def test_a_field_that_is_nearly_a_known_one_is_told_once(tmp_path: Path) -> None:
    path = own(tmp_path, {**ROW, "trget": "images/b.png", "author": "x"}, {**ROW, "id": "b", "trget": 1, "Masks": "y"})
    found = read(path)
    assert found[0].metadata == {"trget": "images/b.png", "author": "x"}
    assert unknown_fields(path, found) == (
        "the column trget is not known and becomes metadata; did you mean target?",
        "the column Masks is not known and becomes metadata; did you mean mask?",
    )


def test_every_bad_row_is_named_the_first_twenty_in_full(tmp_path: Path) -> None:
    rows = [{**ROW, "id": str(number), "instruction": "" if number % 2 else "do"} for number in range(50)]
    lines = refusals(own(tmp_path, *rows))
    assert lines[0] == "bench.jsonl, line 2: instruction: is empty; write one"
    assert lines[19] == "bench.jsonl, line 40: instruction: is empty; write one"
    assert lines[20:] == ["... and 5 more"]


def test_what_all_rows_have_alike_is_one_line(tmp_path: Path) -> None:
    rows = [{key: value for key, value in ROW.items() if key != "instruction_zh"} | {"id": name} for name in "abc"]
    assert refusals(own(tmp_path, *rows), lang="zh") == [
        "bench.jsonl, line 1: instruction_zh: is missing; write the instruction in Chinese, or read the benchmark with "
        "--lang en (so it is in all 3 rows)"
    ]


def test_every_picture_that_is_not_there_is_named_of_the_chosen_items(tmp_path: Path) -> None:
    rows = [{**ROW, "id": name, "category": name, "image": f"images/{name}.png"} for name in ("a", "b", "x", "y", "z")]
    path = own(tmp_path, *rows)
    assert [line.split(";")[0] for line in refusals(path, categories=["a", "x", "y"])] == [
        "bench.jsonl, line 3: image: there is no picture images/x.png under " + str(tmp_path),
        "bench.jsonl, line 4: image: there is no picture images/y.png under " + str(tmp_path),
    ]
    assert [item.id for item in read(path, categories=["a", "b"])] == ["a", "b"]


def test_an_address_without_a_picture_ends_the_reading(tmp_path: Path) -> None:
    asked: list[str] = []

    def fetch(address: str) -> str:
        asked.append(address)
        raise InputError(f"{address} does not answer")

    rows = [{**ROW, "id": name, "image": f"https://example.com/{name}.png"} for name in "abc"]
    (line,) = refusals(own(tmp_path, *rows), fetch=fetch)
    assert line == "bench.jsonl, line 1: image: https://example.com/a.png does not answer"
    assert asked == ["https://example.com/a.png"]


def test_chinese_is_read_when_asked_for(tmp_path: Path) -> None:
    path = own(tmp_path, {**ROW, "source_caption": "a cube"})
    for name in ("zh", "cn"):
        assert [(item.instruction, item.source_caption) for item in read(path, lang=name)] == [("变蓝", "a cube")]
    plain = own(tmp_path, {key: value for key, value in ROW.items() if key != "instruction_zh"})
    assert refusal(plain, lang="zh") == (
        "bench.jsonl, line 1: instruction_zh: is missing; "
        "write the instruction in Chinese, or read the benchmark with --lang en"
    )


def test_a_folder_with_a_benchmark_stands_for_it(tmp_path: Path) -> None:
    own(tmp_path)
    assert [item.id for item in read(tmp_path)] == ["a"]


def test_parquet_holds_paths_bytes_or_pictures_of_the_library_datasets(tmp_path: Path) -> None:
    own(tmp_path)
    paths = {"id": ["a"], "category": ["x"], "instruction": ["i"], "image": ["images/a.png"], "seed": [3]}
    pq.write_table(pa.table(paths), tmp_path / "paths.parquet")
    assert read(tmp_path / "paths.parquet")[0] == Item(
        "a", "x", "i", str(tmp_path / "images/a.png"), seed=3, source="images/a.png"
    )
    pictures = [{"bytes": png("blue"), "path": "b.png"}, {"bytes": png("green"), "path": None}]
    inside = {
        "id": ["a", "b"], "category": ["x", "x"], "instruction": ["i", "j"], "image": pictures, "mask": [png(), None],
        "images": [[png("white")], []], "target": [None, "images/a.png"],
    }  # fmt: skip
    pq.write_table(pa.table(inside), tmp_path / "inside.parquet")
    first, second = read(tmp_path / "inside.parquet")
    assert first.image == str(tmp_path / f"cache/{sha(png('blue'))}.png")
    assert first.source == f"{sha(png('blue'))}.png"
    assert Path(first.mask).read_bytes() == png()
    assert [Path(one).read_bytes() for one in first.images] == [png("white")]
    assert (second.mask, second.images, second.target) == ("", (), str(tmp_path / "images/a.png"))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"id": None}, "id: is missing; write one"),
        ({"id": " "}, "id: is empty; write one"),
        ({"category": 3}, "category: 3 is not text; write it in quotes"),
        ({"instruction": ""}, "instruction: is empty; write one"),
        ({"instruction": "\ud800"}, "instruction: contains half of a surrogate pair; remove it"),
        ({"image": None}, "image: is missing; name the picture's file"),
        ({"image": 3}, "image: 3 is no picture; name the picture's file"),
        ({"image": "no.png"}, "image: there is no picture no.png under FOLDER; put it there"),
        (
            {"image": "http://a/b.png"},
            "image: 'http://a/b.png' is a URL; only local files are read: download it, or give --allow-urls",
        ),
        ({"image": "a\0.png"}, "image: contains a character no file name can hold; remove it"),
        ({"images": "a.png"}, "images: 'a.png' is not a list; write [...]"),
        ({"images": ["images/a.png", "no.png"]}, "images[1]: there is no picture no.png under FOLDER; put it there"),
        ({"target": "no.png"}, "target: there is no picture no.png under FOLDER; put it there"),
        ({"seed": -1}, "seed: -1 is no seed; write a whole number from 0 to 2^63 - 1"),
        ({"seed": True}, "seed: true is no seed; write a whole number from 0 to 2^63 - 1"),
        ({"seed": "7"}, "seed: '7' is no seed; write a whole number from 0 to 2^63 - 1"),
        ({"questions": ["a", ""]}, "questions[1]: '' is not text; write one"),
    ],
)
def test_a_bad_field_is_one_line_with_row_field_and_mend(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    rows = [{**ROW, "id": "0"}, {**ROW, **row}]
    path = put(own(tmp_path), "\n\n".join(map(json.dumps, rows)).encode())
    assert refusal(path) == f"bench.jsonl, line 3: {text}".replace("FOLDER", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"id": ', "bench.jsonl, line 1: does not read as JSON at column 8: Expecting value; mend or remove"),
        (b'"prompt"', 'bench.jsonl, line 1: is no JSON object; write {"instruction": "..."}'),
        (b'{"id": "a", "id": "b"}', "bench.jsonl, line 1: names 'id' twice in one object"),
        (b'{"a": "\xff"}', "bench.jsonl, line 1, byte 8: 0xff is not UTF-8; save the file as UTF-8"),
        (b"", "bench.jsonl: holds no item in the language 'en'; check the file, or choose another language"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(tmp_path: Path, content: bytes, text: str) -> None:
    assert refusal(put(tmp_path / "bench.jsonl", content)).startswith(text)


def test_a_damaged_parquet_file_says_so(tmp_path: Path) -> None:
    own(tmp_path)
    path = tmp_path / "bench.parquet"
    pq.write_table(pa.table({name: [value] * 3 for name, value in ROW.items()}), path)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    assert refusal(put(path, bytes(content))).startswith("bench.parquet, after row 0: does not read as Parquet: ")


def test_an_id_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    assert refusal(own(tmp_path, ROW, {**ROW, "image": "images/b.png"})) == (
        "bench.jsonl: the id 'a' is there 2 times; give each item its own"
    )


# --- what is read at all ----------------------------------------------------------------------------------------------


def test_what_is_no_benchmark_is_refused_with_what_is_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.jsonl") == (
        "no.jsonl: there is no such benchmark; check the path (only local files are read)"
    )
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "prompts.parquet")
    for path in (
        put(tmp_path / "a.csv", b"id"),
        as_json(tmp_path / "a.json", {"tasks": []}),
        as_json(tmp_path / "b.json", ["a"]),
        put(tmp_path / "torn.parquet", b"PAR1"),
        tmp_path / "prompts.parquet",
        put(tmp_path / "empty/notes.txt", b"").parent,
    ):
        assert "is no benchmark that imagemill reads; it reads " in refusal(path)
        assert all(found.name in refusal(path) for found in formats().values())


def test_every_file_of_the_folder_is_a_format() -> None:
    assert set(formats()) == {"own", "base64_list", "gedit", "imgedit", "rise"}
    for found in formats().values():
        assert set(found.languages) <= set(LANGUAGES)
        assert "en" in found.languages
    assert len({found.name for found in formats().values()}) == len(formats())


def test_a_language_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = own(tmp_path)
    assert refusal(path, lang="fr").startswith("'fr' is no language of a benchmark; known: en, zh, intersection")
    assert refusal(path, lang="intersection") == (
        "bench.jsonl: has no language 'intersection'; imagemill's JSONL and Parquet is read in en, zh"
    )


# --- categories and limit ---------------------------------------------------------------------------------------------


def items(categories: str) -> list[Item]:
    return [Item(str(number), name, "i", "") for number, name in enumerate(categories)]


def ids(chosen: list[Item]) -> str:
    return " ".join(item.id for item in chosen)


def test_a_limit_takes_one_of_each_category_in_turn() -> None:
    every = items("aaabbc")
    assert ids(select(every)) == "0 1 2 3 4 5"
    assert [ids(select(every, limit=limit)) for limit in range(1, 8)] == [
        "0", "0 3", "0 3 5", "0 1 3 5", "0 1 3 4 5", "0 1 2 3 4 5", "0 1 2 3 4 5",
    ]  # fmt: skip


def test_a_limit_counts_within_the_chosen_categories() -> None:
    assert ids(select(items("abcabc"), ["c", "a"], 3)) == "0 2 3"
    assert ids(select(items("abcabc"), ["b"])) == "1 4"


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(InputError, match=r"^limit: -?\d is out of range; it must be >= 1$"):
        select(items("ab"), limit=limit)


def test_an_unknown_category_is_answered_with_those_there(tmp_path: Path) -> None:
    path = own(tmp_path, ROW, {**ROW, "id": "b", "category": "环境"}, {**ROW, "id": "c", "category": "环境"})
    assert [item.id for item in read(path, categories=["环境"])] == ["b", "c"]
    assert refusal(path, categories=["环境", "环"]) == (
        "bench.jsonl: has no category '环'; did you mean '环境'? its categories are 物理 (1), 环境 (2)"
    )
    assert refusal(path, categories=["style"]).endswith("'style'; its categories are 物理 (1), 环境 (2)")


def test_pictures_of_items_that_are_not_chosen_are_not_asked_for(tmp_path: Path) -> None:
    path = own(tmp_path, ROW, {**ROW, "id": "b", "category": "环境", "image": "no.png"})
    assert [item.id for item in read(path, categories=["物理"])] == ["a"]
    assert [item.id for item in read(path, limit=1)] == ["a"]


# --- base64 -----------------------------------------------------------------------------------------------------------


def b64_rows() -> list[dict[str, Any]]:
    return [
        {
            "subset": subset, "original_description": "一只杯子", "edit_instruction": "变蓝",
            "original_description_en": "A cup.", "edit_instruction_en": "Make it blue.",
            "src_img_b64": base64.b64encode(picture).decode(), "rationale_short": "原因",
            "rationale_short_en": "because", "tags": ["cup"], "difficulty": "easy",
            "original_image_path": f"images/{number:05d}_cup.png", "seed": 42,
        }
        for number, (subset, picture) in enumerate([("物理", png()), ("环境", png("blue", "JPEG")), ("物理", png())])
    ]  # fmt: skip


def test_a_base64_list_is_read_in_english_and_in_chinese(tmp_path: Path) -> None:
    path = as_json(tmp_path / "b.json", b64_rows())
    first, second, third = read(path)
    assert first == Item(
        "00000_cup", "物理", "Make it blue.", str(tmp_path / f"cache/{sha(png())}.png"), source_caption="A cup.",
        seed=42, source=f"{sha(png())}.png",
        metadata={
            "tags": ["cup"], "difficulty": "easy", "original_image_path": "images/00000_cup.png",
            "rationale_short": "because",
        },
    )  # fmt: skip
    assert (second.category, Path(second.image).suffix, Path(second.image).read_bytes()) == (
        "环境", ".jpg", png("blue", "JPEG"),
    )  # fmt: skip
    assert (third.image, third.source, third.id) == (first.image, first.source, "00002_cup")
    chinese = read(path, lang="zh")[0]
    assert (chinese.id, chinese.instruction, chinese.source_caption) == ("00000_cup", "变蓝", "一只杯子")
    assert chinese.metadata["rationale_short"] == "原因"


def test_a_picture_is_written_once_and_mended_when_it_was_cut_off(tmp_path: Path) -> None:
    path = as_json(tmp_path / "b.json", b64_rows())
    place = Path(read(path)[0].image)
    assert sorted(one.suffix for one in place.parent.iterdir()) == [".jpg", ".png"]
    before = place.stat()
    assert Path(read(path)[0].image).stat() == before
    place.write_bytes(b"cut")
    read(path)
    assert place.read_bytes() == png()


def test_only_pictures_of_chosen_items_are_decoded(tmp_path: Path) -> None:
    rows = b64_rows()
    rows[1]["src_img_b64"] = "no base64!"
    path = as_json(tmp_path / "b.json", rows)
    assert [item.id for item in read(path, categories=["物理"])] == ["00000_cup", "00002_cup"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("stems", [["a/x.png", "b/x.png", "x.jpg"], ["x.png", "x.png", "x.png"]])
def test_ids_of_rows_of_one_picture_are_numbered(tmp_path: Path, stems: list[str]) -> None:
    rows = [{**row, "original_image_path": stem} for row, stem in zip(b64_rows(), stems, strict=True)]
    path = as_json(tmp_path / "b.json", rows)
    assert [item.id for item in read(path)] == ["00000_x", "00001_x", "00002_x"]
    assert [item.id for item in read(path, categories=["环境"])] == ["00001_x"]


def test_ids_are_numbers_where_no_path_is_given(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "original_image_path"} for row in b64_rows()]
    assert [item.id for item in read(as_json(tmp_path / "b.json", rows))] == ["00000", "00001", "00002"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"src_img_b64": "%%"}, "src_img_b64: does not read as base64 ("),
        (
            {"src_img_b64": "aGVsbG8="},
            "src_img_b64: holds no picture (PNG, JPEG, WebP, ...); put the picture's file th",
        ),
        ({"src_img_b64": None}, "src_img_b64: is missing; write the picture's file in base64"),
        ({"edit_instruction_en": None}, "edit_instruction_en: is missing; write one, or read the other with --lang zh"),
        ({"edit_instruction_en": ""}, "edit_instruction_en: is empty; write one, or read the other with --lang zh"),
        ({"subset": 1}, "subset: 1 is not text; write it in quotes"),
        ({"seed": 1.5}, "seed: 1.5 is no seed; write a whole number from 0 to 2^63 - 1"),
    ],
)
def test_a_bad_row_of_base64_is_one_line(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    rows = b64_rows()
    rows[1] |= change
    assert refusal(as_json(tmp_path / "b.json", rows)).startswith(f"b.json, item 2: {text}")


def test_a_data_url_is_base64_too(tmp_path: Path) -> None:
    rows = b64_rows()
    rows[0]["src_img_b64"] = "data:image/png;base64," + rows[0]["src_img_b64"]
    assert Path(read(as_json(tmp_path / "b.json", rows))[0].image).read_bytes() == png()


def test_a_cache_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    path = as_json(tmp_path / "b.json", b64_rows())
    with pytest.raises(OutputError, match="cannot take the pictures of the benchmark"):
        read(path, cache=put(tmp_path / "file", b"") / "cache")


def test_torn_json_names_line_and_column(tmp_path: Path) -> None:
    torn = put(tmp_path / "b.json", b'[{"src_img_b64": "a"},\n {"subset"')
    assert refusal(torn).startswith("b.json: does not read as JSON at line 2, column 11: ")
    foreign = put(tmp_path / "b.json", b'[{"src_img_b64": "a"},\n "\xe9"]')
    assert refusal(foreign) == "b.json, line 2, byte 3: 0xe9 is not UTF-8; save the file as UTF-8"


# --- GEdit-Bench ------------------------------------------------------------------------------------------------------

KEYS = [("color_alter", "k1", "en", True), ("color_alter", "k1", "cn", True), ("text_change", "k2", "en", False)]


def gedit_rows(pictures: bool = True) -> list[dict[str, Any]]:
    rows = []
    for task, key, language, exists in KEYS:
        row = {"task_type": task, "key": key, "instruction": f"{key} {language}", "instruction_language": language}
        if pictures:
            row |= {name: {"bytes": png(color), "path": f"{key}.png"} for name, color in SOURCES.items()}
        rows.append({**row, "Intersection_exist": exists})
    return rows


SOURCES = {"input_image": "red", "input_image_raw": "blue"}


def gedit_ids(path: Path) -> dict[str, list[str]]:
    found = {}
    for name in LANGUAGES:
        try:
            found[name] = [item.id for item in read(path, lang=name)]
        except InputError as error:
            found[name] = [str(error).partition(": ")[2]]
    return found


ENGLISH = ["color_alter_en_k1", "text_change_en_k2"]
EACH = {
    "en": ENGLISH, "zh": ["color_alter_cn_k1"], "intersection": ENGLISH[:1], "zh-intersection": ["color_alter_cn_k1"],
}  # fmt: skip


def test_gedit_is_read_from_the_parquet_folder_of_the_hub(tmp_path: Path) -> None:
    rows = gedit_rows()
    (tmp_path / "data").mkdir()
    for number in range(2):
        shard = tmp_path / f"data/train-0000{number}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(rows[number * 2 :][:2]), shard)
    assert gedit_ids(tmp_path) == EACH
    assert gedit_ids(tmp_path / "data") == EACH
    assert read(tmp_path, lang="cn-intersection") == [
        Item(
            "color_alter_cn_k1", "color_alter", "k1 cn", str(tmp_path / f"cache/{sha(png())}.png"), source=sha(png()),
            metadata={"key": "k1", "instruction_language": "cn", "Intersection_exist": True},
        )
    ]  # fmt: skip
    assert [item.category for item in read(tmp_path, categories=["text_change"])] == ["text_change"]


def test_gedit_takes_the_raw_picture_where_there_is_no_other(tmp_path: Path) -> None:
    rows = [{**row, "input_image": None} for row in gedit_rows()]
    path = tmp_path / "gedit.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert Path(read(path)[0].image).read_bytes() == png("blue")


def test_gedit_is_read_from_what_the_library_datasets_saved(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(gedit_rows())
    (tmp_path / "train").mkdir()
    with pa.ipc.new_stream(str(tmp_path / "train/data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    assert gedit_ids(tmp_path) == EACH
    assert Path(read(tmp_path)[0].image).read_bytes() == png()


@pytest.mark.parametrize("name", ["info.jsonl", "data.json"])
@pytest.mark.parametrize("layout", ["fullset/{task}/{language}/{key}_SRCIMG.png", "{key}_SRCIMG.png", "raw/{key}.png"])
def test_gedit_is_read_from_an_exported_folder(tmp_path: Path, name: str, layout: str) -> None:
    rows = gedit_rows(pictures=False)
    for row, (task, key, language, _) in zip(rows, KEYS, strict=True):
        place = layout.format(task=task, key=key, language=language)
        put(tmp_path / place, png("green"))
        if layout.startswith("raw"):
            row["input_image"] = place
        else:
            put(tmp_path / f"fullset/{task}/{language}/{key}.png", png("white"))
    path = jsonl(tmp_path / name, rows) if name.endswith("l") else as_json(tmp_path / name, rows)
    assert gedit_ids(tmp_path) == gedit_ids(path) == EACH
    first = read(tmp_path)[0]
    assert Path(first.image).read_bytes() == png("green")
    assert Path(first.image).is_relative_to(tmp_path)
    assert first.source == sha(png("green"))


def test_gedit_is_read_from_the_mapping_of_other_evaluations(tmp_path: Path) -> None:
    rows = {}
    for task, key, language, _ in KEYS:
        place = f"fullset/{task}/{language}/{key}.png"
        put(tmp_path / place, png("white"))
        rows[f"{key}{language}"] = {"prompt": "do", "id": place, "edit_type": task}
    put(tmp_path / "fullset/color_alter/en/k1_SRCIMG.png", png("green"))
    path = as_json(tmp_path / "gedit_edit.json", rows)
    for place in (path, tmp_path):
        first, second = read(place)
        assert [first.id, second.id] == ENGLISH
        assert (Path(first.image).name, Path(second.image).name) == ("k1_SRCIMG.png", "k2.png")
    assert "Intersection_exist: is missing; read all rows with --lang en or zh" in refusal(path, lang="intersection")
    rows["k1en"]["id"] = "k1.png"
    assert refusal(as_json(path, rows)).startswith(
        "gedit_edit.json, item 'k1en': id: 'k1.png' is no path such as fulls"
    )


def test_gedit_without_instructions_or_with_bad_rows_says_so(tmp_path: Path) -> None:
    put(tmp_path / "bench/fullset/color_alter/en/k1_SRCIMG.png", png())
    assert refusal(tmp_path / "bench") == (
        "bench: has pictures in fullset/ but no instructions; put the benchmark's rows beside them as info.jsonl, "
        "or give the folder of its Parquet files"
    )
    rows = gedit_rows(pictures=False)
    path = jsonl(tmp_path / "info.jsonl", rows)
    first, second = refusals(path)
    missing = "input_image: there is no picture fullset"
    assert first.startswith(f"info.jsonl, line 1: {missing}/color_alter/en/k1_SRCIMG.png under ")
    assert second.startswith(f"info.jsonl, line 3: {missing}/")
    rows[1]["instruction_language"] = "fr"
    assert refusal(jsonl(path, rows)) == (
        "info.jsonl, line 2: instruction_language: 'fr' is no language of GEdit-Bench; write en or cn"
    )
    rows[1]["instruction_language"], rows[0]["Intersection_exist"] = "cn", "yes"
    assert "Intersection_exist: 'yes' is not true or false" in refusal(jsonl(path, rows), lang="intersection")


# --- ImgEdit-Bench and RISEBench --------------------------------------------------------------------------------------

EDITS = {
    "1082": {"id": "animal/1.jpg", "prompt": "Make it smooth.", "edit_type": "adjust"},
    "1068": {"id": "animal/1.jpg", "prompt": "Make it dark.", "edit_type": "adjust"},
    "673": {"id": "style/2.jpg", "prompt": "Paint it.", "edit_type": "style"},
}


@pytest.mark.parametrize(
    ("file", "pictures", "given"),
    [
        ("basic_edit.json", ".", "basic_edit.json"),
        ("basic_edit.json", "original_images", "."),
        ("basic_edit.json", "Benchmark/singleturn", "basic_edit.json"),
        ("Benchmark/Basic/basic_edit.json", "Benchmark/singleturn", "Benchmark"),
        ("Benchmark/singleturn/singleturn.json", "Benchmark/singleturn", "Benchmark"),
        ("Benchmark/Basic/basic_edit.json", "singleturn", "Benchmark/Basic/basic_edit.json"),
    ],
)
def test_imgedit_finds_its_pictures(tmp_path: Path, file: str, pictures: str, given: str) -> None:
    as_json(tmp_path / file, EDITS)
    for name in ("animal/1.jpg", "style/2.jpg"):
        put(tmp_path / pictures / name, png(form="JPEG"))
    found = read(tmp_path / given)
    assert [(item.id, item.category, item.instruction, item.source) for item in found] == [
        (key, row["edit_type"], row["prompt"], row["id"]) for key, row in EDITS.items()
    ]
    assert found[2].image == str((tmp_path / pictures / "style/2.jpg").resolve())


def test_imgedit_refuses_what_is_no_single_edit(tmp_path: Path) -> None:
    put(tmp_path / "animal/1.jpg", png(form="JPEG"))
    path = as_json(tmp_path / "basic_edit.json", EDITS)
    assert refusal(path).startswith("basic_edit.json, item '673': id: there is no picture style/2.jpg under ")
    hard = {key: {name: row[name] for name in ("id", "prompt")} for key, row in EDITS.items()}
    assert refusal(as_json(path, hard)).startswith(
        "basic_edit.json, item '1082': edit_type: is missing; write one; only"
    )
    assert "has no language 'zh'" in refusal(path, lang="zh")


RISE = [
    {
        "index": "temporal_reasoning_1", "category": "temporal_reasoning", "instruction": "A year later.",
        "image": "temporal_reasoning_images/1.png", "reference": "Rotten.", "reasoning_img": None, "subtask": "life",
    },
    {
        "index": "logical_reasoning_1", "category": "logical_reasoning", "instruction": "Draw the path.",
        "image": "logical_reasoning_images/1.png", "reference_img": "logical_reasoning_images/1_ref.png",
    },
    {
        "index": "causal_reasoning_6", "category": "causal_reasoning", "instruction": "Pour it.",
        "instruction_chinese": "倒", "image": ["causal/6_1.png", "causal/6_2.png"], "reference_txt": "Poured.",
        "reference_txt_chinese": "倒了", "multi_img": "True",
    },
]  # fmt: skip


def rise(folder: Path, name: str = "data_total.json", pictures: str = ".") -> Path:
    for place in ("temporal_reasoning_images/1", "logical_reasoning_images/1", "logical_reasoning_images/1_ref"):
        put(folder / pictures / f"{place}.png", png())
    for number in (1, 2):
        put(folder / pictures / f"causal/6_{number}.png", png())
    return as_json(folder / name, RISE)


@pytest.mark.parametrize("given", ["data_total.json", "."])
def test_rise_keeps_references_in_words_and_in_pictures(tmp_path: Path, given: str) -> None:
    rise(tmp_path)
    first, second, third = read(tmp_path / given)
    assert first == Item(
        "temporal_reasoning_1", "temporal_reasoning", "A year later.",
        str(tmp_path / "temporal_reasoning_images/1.png"), source="temporal_reasoning_images/1.png",
        metadata={"reference": "Rotten.", "subtask": "life"},
    )  # fmt: skip
    assert (second.target, second.metadata) == (str(tmp_path / "logical_reasoning_images/1_ref.png"), {})
    assert (third.image, third.images) == (
        str(tmp_path / "causal/6_1.png"), (str(tmp_path / "causal/6_2.png"),),
    )  # fmt: skip
    assert third.metadata == {"reference": "Poured.", "multi_img": "True"}


def test_rise_of_the_hub_has_its_pictures_in_data(tmp_path: Path) -> None:
    rise(tmp_path, "datav2_total_w_subtask.json", "data")
    assert read(tmp_path)[0].image == str(tmp_path / "data/temporal_reasoning_images/1.png")


def test_rise_in_chinese_and_with_several_turns(tmp_path: Path) -> None:
    path = rise(tmp_path)
    first, second = refusals(path, lang="zh")
    for number, line in ((1, first), (2, second)):
        assert f"item {number}: instruction_chinese: is missing; write the instruction in Chinese" in line
    (chinese,) = read(as_json(path, RISE[2:]), lang="zh")
    assert (chinese.instruction, chinese.metadata["reference"]) == ("倒", "倒了")
    as_json(path, [RISE[0], {**RISE[1], "instruction": ["One.", "Two."]}])
    assert refusal(path) == (
        "data_total.json, item 2: instruction: is a list of turns; only edits of one turn are read: take the row out"
    )


# --- what comes with the project --------------------------------------------------------------------------------------


def test_the_tiny_benchmark_has_a_target_and_a_mask_for_each_edit() -> None:
    found = read(ROOT / "examples/bench_tiny", limit=10)
    assert Counter(item.category for item in found) == dict.fromkeys(
        ("background", "color", "object", "geometry", "tone"), 2
    )
    assert all(Path(path).is_file() for item in found for path in (item.image, item.target, item.mask))


@needs_shared
def test_the_shared_benchmark_is_the_same_in_both_of_its_files(tmp_path: Path) -> None:
    for lang in ("en", "zh"):
        lines = read_benchmark(SHARED / "bench_270.jsonl", lang=lang, cache=tmp_path)
        inside = read_benchmark(SHARED / "bench_270_b64.json", lang=lang, cache=tmp_path)
        assert len(lines) == 270
        for one, other in zip(lines, inside, strict=True):
            assert (one.id, one.category, one.instruction, one.seed) == (
                other.id, other.category, other.instruction, other.seed,
            )  # fmt: skip
            assert sha(Path(one.image).read_bytes()) == Path(other.image).stem
        assert Counter(item.category for item in lines) == {"物理": 60, "环境": 60, "社会": 60, "指代": 60, "因果": 30}
        assert len({item.source for item in lines}) == len({item.source for item in inside}) == 30
    assert len(list(tmp_path.iterdir())) == 30


@needs_shared
def test_a_part_of_the_shared_benchmark_is_spread_over_its_categories(tmp_path: Path) -> None:
    found = read_benchmark(SHARED / "bench_270_b64.json", limit=40, cache=tmp_path)
    assert set(Counter(item.category for item in found).values()) == {8}
    chosen = read_benchmark(SHARED / "bench_270_b64.json", categories=["物理", "环境"], limit=3, cache=tmp_path)
    assert [item.category for item in chosen] == ["物理", "物理", "环境"]
