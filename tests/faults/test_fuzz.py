"""Whatever the parsers are given, they read it or say no in the project's own words: no other exception, no hang, no flood.

`make fuzz` sets `IMAGEMILL_FUZZ`, the number of inputs for each parser; without it a few hundred.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from imagemill import wire
from imagemill.config import load_settings
from imagemill.errors import BadTask, InputError
from imagemill.inputs import read_lora
from imagemill.records import Lora, Task
from imagemill.runners import lora_file
from imagemill.scoring.answers import parse_answer
from imagemill.scoring.scale import TEN
from imagemill.sources import READERS, Row

QUICK = 300
RUNS = int(os.environ.get("IMAGEMILL_FUZZ", QUICK))
SECONDS = 20.0
"""No input of a few kilobytes may take longer: far more than any takes, far less than a hang."""

fuzz = settings(
    max_examples=RUNS,
    deadline=SECONDS * 1000,
    derandomize=RUNS <= QUICK,
    suppress_health_check=list(HealthCheck),
    database=None,
)

# --- what goes in -----------------------------------------------------------------------------------------------------

any_text = st.text(st.characters(), max_size=60)
words = st.sampled_from(
    [
        *(
            "prompt",
            "id",
            "images",
            "loras",
            "lora_path",
            "lora_strength",
            "size",
            "width",
            "seed",
            "steps",
            "metadata",
        ),
        *("output_path", "num_images", "model", "tasks", "tweets", "persona", "name", "image_generation", "scene_hint"),
        *(
            "guidance_scale",
            "negative_prompt",
            "path",
            "strength",
            "nan",
            "1e999",
            "../x",
            "http://x",
            "a\0b",
            "\ud800",
        ),
    ]
)
numbers = st.one_of(st.integers(), st.integers(-(10**40), 10**40), st.floats())
leaves = st.one_of(st.none(), st.booleans(), numbers, words, any_text)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | any_text, inner, max_size=5),
    max_leaves=12,
)
rows = st.dictionaries(words | any_text, values, max_size=6)


@st.composite
def mutated(draw: Any, whole: st.SearchStrategy[bytes]) -> bytes:
    """Whole input with a few bytes changed, cut out, doubled or put in."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 16))
        match draw(st.integers(0, 4)):
            case 0:
                data[place : place + 1] = draw(st.binary(max_size=2))
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = data[place : place + length] * draw(st.integers(1, 50))
            case 3:
                data[place:place] = draw(st.binary(max_size=16))
            case _:
                del data[place:]
    return bytes(data)


def as_json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except ValueError:  # digits without end
        return b"[" + b"9" * 5000 + b"]"


def as_csv(table: list[list[Any]]) -> bytes:
    return "\n".join(",".join(str(cell)[:200] for cell in row) for row in table).encode("utf-8", "surrogatepass")


cells = st.lists(st.lists(words | any_text | st.integers(), min_size=1, max_size=4), max_size=5)
FILES: dict[str, st.SearchStrategy[bytes]] = {
    ".json": (st.lists(rows | values, max_size=4) | st.fixed_dictionaries({"tasks": values}) | rows | values).map(
        as_json
    ),
    ".jsonl": st.lists(rows | values, max_size=4).map(lambda some: b"\n".join(map(as_json, some))),
    ".csv": cells.map(as_csv) | cells.map(lambda table: as_csv([["prompt", "seed", "loras"], *table])),
    ".tsv": cells.map(lambda table: as_csv([["prompt", "id"], *table]).replace(b",", b"\t")),
}


def read(suffix: str, data: bytes, base: Path | None = None) -> list[Row]:
    return list(READERS[suffix](io.BytesIO(data), f"tasks{suffix}", None, base))


def sound(found: list[Row]) -> None:
    """A row is a task, or says in one line each why it is none; a task can be written down."""
    for row in found:
        assert (row.task is None) == bool(row.problems or row.skipped)
        for problem in row.problems:
            assert problem.message
        if row.task is not None:
            assert isinstance(row.task, Task)
            with suppress(ValueError):  # half surrogates are refused by the plan, which comes next
                wire.to_json(row.task)


# --- task files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FILES)
@fuzz
@given(data=st.data())
def test_a_task_file_of_any_bytes_is_read_or_refused(suffix: str, data: st.DataObject) -> None:
    content = data.draw(mutated(FILES[suffix]) | st.binary(max_size=300))
    with suppress(InputError):
        sound(read(suffix, content))


def as_parquet(table: list[dict[str, str | int | None]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table), out)
    return out.getvalue()


PARQUET = as_parquet([{"prompt": f"prompt {number}", "seed": number, "id": None} for number in range(20)])


@settings(fuzz, max_examples=RUNS if RUNS > QUICK else max(1, RUNS // 4))
@given(content=mutated(st.just(PARQUET)))
def test_a_damaged_parquet_file_is_read_or_refused(content: bytes) -> None:
    with suppress(InputError):
        sound(read(".parquet", content))


def test_text_in_a_parquet_file_that_is_not_utf_8_is_refused_with_its_column() -> None:
    column = pa.array([b"a", b"caf\xe9"], pa.binary()).view(pa.string())
    out = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b"], "note": column}), out)
    with pytest.raises(InputError, match=r"^tasks.parquet, after row 0: 'note': holds text that is not UTF-8"):
        read(".parquet", out.getvalue())


# --- settings ---------------------------------------------------------------------------------------------------------

KEYS = (
    "model",
    "size",
    "steps",
    "loras",
    "schedule",
    "devices",
    "output",
    "limits",
    "judge",
    "logging",
    "seed",
    "exact",
)
YAML = (
    "model: tiny\nsize: 64x64\nsteps: 4\nloras: [{path: a, strength: 1.0}]\nschedule: window:3\n"
    "devices: {gpus: auto, gpu_ids: [0, 1]}\noutput: {folder: out}\nlimits: {task_timeout: 1.5}\n"
)
MARKS = (
    "&a ",
    "*a",
    "<<: ",
    "!!python/object:os.system ",
    "!!binary ",
    "? ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    "|\n",
    ">",
    "\t",
    "---\n",
    "%YAML 9\n",
    "!!timestamp ",
    "2001-99-99",
    "0x_",
    "1:99:99",
    "!!set ",
    "!!float nan",
    "\x85",
    "\ufeff",
)


@fuzz
@given(
    data=st.data(),
    some=st.dictionaries(st.sampled_from(KEYS) | any_text, values, max_size=5),
)
def test_settings_of_any_bytes_are_read_or_refused(
    data: st.DataObject, some: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    pieces = st.lists(st.sampled_from(MARKS) | st.sampled_from(KEYS) | any_text, max_size=12).map(
        lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
    )
    whole = st.just(YAML.encode()) | pieces | st.just(as_json(some))
    path = _folder(tmp_path_factory) / "settings.yaml"
    path.write_bytes(data.draw(mutated(whole)))
    with suppress(InputError):
        load_settings(path)


@pytest.mark.parametrize("value", ["!!timestamp ", "!!int ''", "!!float ''", "!!bool perhaps"])
def test_a_value_that_is_none_of_its_tag_is_refused_with_its_place(value: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"exact: true\nsteps: {value}\n")
    with pytest.raises(InputError, match=r"settings.yaml, line 2, column 8: .* leave the !!"):
        load_settings(path)


def _folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all inputs of a test."""
    base: Path = factory.getbasetemp() / "fuzz"
    base.mkdir(exist_ok=True)
    return base


# --- safetensors ------------------------------------------------------------------------------------------------------

offsets = st.lists(st.integers(-5, 300) | st.integers(-(2**70), 2**70), max_size=3)
shapes = st.lists(st.integers(-3, 9) | st.integers(0, 2**66), max_size=4)
types = st.sampled_from(
    ["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "X", ""]
)
keys = st.sampled_from(
    [
        "q.lora_A.weight",
        "q.lora_B.weight",
        "q.lora_down.weight",
        "q.alpha",
        "q.lokr_w1",
        "__metadata__",
        "q.lora_A.bias",
    ]
)
tensors = st.fixed_dictionaries({"dtype": types | values, "shape": shapes | values, "data_offsets": offsets | values})
headers = st.dictionaries(keys | any_text, tensors | values, max_size=4).map(as_json)


def _whole() -> bytes:
    import numpy as np

    pair = {"q.lora_A.weight": np.ones((2, 3), np.float32), "q.lora_B.weight": np.ones((4, 2), np.float16)}
    adapter = {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"q": 2}}
    return bytes(save(pair, {lora_file.METADATA_KEY: json.dumps(adapter)}))


@st.composite
def safetensors_files(draw: Any) -> bytes:
    header = draw(headers)
    length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1) | st.integers(0, 400))
    return struct.pack("<Q", length) + header + draw(st.binary(max_size=64))


@fuzz
@given(content=safetensors_files() | mutated(st.just(_whole())))
def test_an_adapter_of_any_bytes_is_read_or_refused_by_driver_and_worker(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = _folder(tmp_path_factory) / "a.safetensors"
    path.write_bytes(content)
    with suppress(InputError):
        read_lora(str(path))
    with suppress(BadTask):
        lora_file.read(Lora(str(path)))


# --- frames -----------------------------------------------------------------------------------------------------------

WHOLE_FRAMES = [
    wire.frame(wire.Leave()),
    wire.frame(wire.LoadModel()),
    wire.frame(wire.WorkerBeat(1, 2, 3, 4, "denoise", 5)),
]
bodies = st.tuples(st.sampled_from([*wire.MESSAGES, "X", ""]), (values | rows).map(as_json)).map(
    lambda pair: pair[0].encode() + b" " + pair[1]
)


@fuzz
@given(
    content=mutated(st.lists(st.sampled_from(WHOLE_FRAMES), max_size=3).map(b"".join))
    | st.lists(bodies.map(lambda body: struct.pack(">I", len(body)) + body), max_size=3).map(b"".join)
    | st.binary(max_size=200),
    size=st.integers(1, 64),
)
def test_a_pipe_with_any_bytes_gives_messages_or_a_frame_error(content: bytes, size: int) -> None:
    reader = wire.FrameReader()
    with suppress(wire.FrameError):
        for start in range(0, len(content), size):
            for message in reader.feed(content[start : start + size]):
                assert type(message) in wire.MESSAGES.values()


# --- a judge's answers ------------------------------------------------------------------------------------------------

pieces = st.sampled_from(
    [
        *(
            "Score",
            "score:",
            "8",
            "/10",
            "out of",
            "ten",
            "<think>",
            "</think>",
            "```json",
            "```",
            "{",
            "}",
            "[",
            "]",
            '"',
            ",",
        ),
        *(
            '"score"',
            ":",
            "8.5",
            "8,5",
            "-1",
            "1e9",
            "NaN",
            "**",
            "#",
            "|",
            "\n",
            " ",
            "overall",
            "reason",
            "8-9",
            "８",
            "八",
            "½",
        ),
        *("I cannot", "%", "\u2028", "\u202e", "\ud800", "\0", "9" * 400, "(" * 50, "<" * 50, "_" * 50),
    ]
)


@fuzz
@given(
    text=st.lists(pieces | any_text, max_size=30).map("".join)
    | values.map(as_json).map(lambda data: data.decode("utf-8", "replace")),
    parts=st.sampled_from([("score",), ("semantics", "quality"), ("a", "b", "c")]),
)
def test_an_answer_of_any_text_gives_a_score_on_the_scale_or_says_why_not(text: str, parts: tuple[str, ...]) -> None:
    answer = parse_answer(text, TEN, parts)
    if answer.status == "ok":
        assert all(TEN.low <= value <= TEN.high for value in answer.scores.values())
    else:
        assert answer.problem or answer.status == "refused"
        assert not answer.scores


# --- hangs and floods: what is small on disk and endless in memory or time --------------------------------------------

BOMBS = {
    "laughs": (
        "yaml",
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)),
    ),
    "laughs_in_steps": (
        "yaml",
        "x0: &x0 [y,y,y,y,y,y,y,y,y]\n"
        + "".join(f"x{n + 1}: &x{n + 1} [{','.join([f'*x{n}'] * 9)}]\n" for n in range(12))
        + "steps: *x12\n",
    ),
    "merges": (
        "yaml",
        "x0: &x0 {a: 1}\n" + "".join(f"x{n + 1}: &x{n + 1} {{<<: [{','.join([f'*x{n}'] * 9)}]}}\n" for n in range(9)),
    ),
    "round": ("yaml", "a: &a [*a]\nsteps: *a\n"),
    "deep_yaml": ("yaml", "[" * 5000),
    "deep_blocks": ("yaml", "".join(" " * n + "a:\n" for n in range(1200))),
    "digits": ("yaml", "steps: " + "9" * 100_000),
    "sexagesimal": ("yaml", "steps: " + "1" + ":59" * 20_000),
    "deep_json": ("json", "[" * 1_000_000),
    "deep_objects": ("json", '{"a":' * 200_000),
    "deep_rows": ("jsonl", ('{"prompt": "a", "x": ' + "[" * 900 + "]" * 900 + "}\n") * 20),
    "wide": ("csv", "prompt" + "," * 300_000 + "\n"),
    "open_quote": ("csv", 'prompt\n"' + "a\n" * 500_000),
    "many_keys": ("jsonl", json.dumps({"prompt": "a", **{f"k{n}": n for n in range(50_000)}}) + "\n"),
    "long_names": ("csv", "prompt," + "x" * 1_000_000 + "\na,b,c\n"),
}
READ = """
import resource, sys
from pathlib import Path
from imagemill.config import load_settings
from imagemill.errors import InputError
from imagemill.sources import open_source
megabytes = 2**20
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]) * megabytes,) * 2)
path = Path(sys.argv[1])
try:
    if path.suffix == ".yaml":
        load_settings(path)
    else:
        rows = list(open_source(path))
        for problem in (problem for row in rows for problem in row.problems):
            assert len(problem.message) < 20_000, len(problem.message)
except InputError as error:
    assert len(str(error)) < 20_000, len(str(error))
print("read")
"""
LIMIT = 1500
"""MiB of address space for the whole process; Python with numpy and pyarrow takes a third of it before it reads."""


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_small_and_endless_is_refused_within_bounds(name: str, tmp_path: Path) -> None:
    suffix, text = BOMBS[name]
    path = tmp_path / f"bomb.{suffix}"
    path.write_text(text, "utf-8")
    assert path.stat().st_size < 4 * 2**20
    command = [sys.executable, "-c", READ, str(path), str(LIMIT)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (ended.returncode, ended.stdout) == (0, "read\n"), ended.stderr[-2000:]
