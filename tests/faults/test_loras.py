"""Row 9: an adapter that cannot be used is refused before any device works for it, each with its own reason."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import after
from safetensors.torch import save, save_file

from imagemill import inputs
from imagemill.errors import BadTask, InputError
from imagemill.inputs import MAX_RANK, read_lora
from imagemill.records import Lora
from imagemill.runners import lora_file
from random_lora import make_lora

NAN, INFINITY = float("nan"), float("inf")


def pair(
    rank: int = 4, stem: str = "transformer.layers.0.attention.to_q", kind: torch.dtype = torch.float32
) -> dict[str, Any]:
    return {
        f"{stem}.lora_A.weight": torch.full((rank, 8), 0.5).to(kind),
        f"{stem}.lora_B.weight": torch.full((6, rank), 0.5).to(kind),
    }


def with_header(header: Any, length: int | None = None, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def zipped() -> bytes:
    out = io.BytesIO()
    torch.save(pair(), out)
    assert zipfile.is_zipfile(out)
    return out.getvalue()


def poisoned(value: float, kind: torch.dtype = torch.float32) -> bytes:
    tensors = pair(kind=torch.float32)
    next(reversed(tensors.values()))[-1, -1] = value
    return bytes(save({key: tensor.to(kind) for key, tensor in tensors.items()}))


def beyond_the_end() -> bytes:
    whole = bytes(save(pair()))
    return whole[:-1]


FILES: dict[str, tuple[Callable[[], bytes] | None, str]] = {
    "missing": (None, "there is no such LoRA file"),
    "empty": (lambda: b"", "is an empty file"),
    "short": (lambda: b"1234", "only 4 bytes long"),
    "page": (lambda: b"<!DOCTYPE html><html>404</html>", "is no safetensors file"),
    "cut_in_header": (lambda: bytes(save(pair()))[:60], "is cut off inside its header"),
    "cut_in_numbers": (beyond_the_end, "is damaged or cut off"),
    "pickle_zip": (zipped, "is a pickle, and pickle files can run code"),
    "pickle_raw": (lambda: pickle.dumps({"a": b"x" * 100}, protocol=2), "is a pickle, and pickle files can run code"),
    "header_of_10_gb": (lambda: with_header({}, 10 * 2**30), "claims a header of 10,737,418,240 bytes"),
    "tensor_of_10_gb": (
        lambda: with_header(
            {"a.lora_A.weight": {"dtype": "F32", "shape": [2**20, 2560], "data_offsets": [0, 10 * 2**30]}}
        ),
        "is damaged or cut off",
    ),
    "overlapping": (
        lambda: with_header(
            {
                key: {"dtype": "U8", "shape": [2, 2], "data_offsets": [0, 4]}
                for key in ("a.lora_A.weight", "a.lora_B.weight")
            },
            body=b"\0" * 4,
        ),
        "is damaged or cut off",
    ),
    "no_lora": (lambda: bytes(save({"layers.0.attention.to_q.weight": torch.ones(8, 8)})), "holds no LoRA"),
    "half_a_pair": (lambda: bytes(save(dict([next(iter(pair().items()))]))), "is there without"),
    "unfitting": (
        lambda: bytes(save({**pair(), "transformer.layers.0.attention.to_q.lora_B.weight": torch.ones(6, 5)})),
        "do not fit: shapes",
    ),
    "nan": (lambda: poisoned(NAN), "holds NaN or infinity in 'transformer.layers.0.attention.to_q.lora_B.weight'"),
    "infinity": (lambda: poisoned(-INFINITY, torch.bfloat16), "holds NaN or infinity"),
    "rank_too_large": (lambda: bytes(save(pair(MAX_RANK + 1))), f"has the rank 1,025; at most {MAX_RANK:,}"),
    "endless_name": (lambda: bytes(save(pair(stem="a" * 5000))), "names a tensor with 5,014 characters"),
}


def test_every_bad_file_is_refused_with_its_own_reason_and_nothing_starts(place: Any) -> None:
    """One task a file: all reasons in one refusal, and neither worker nor picture."""
    for name, (content, _) in FILES.items():
        if content is not None:
            place.write(f"{name}.safetensors", content())
    place.tasks([{"id": name, "prompt": "a", "loras": [f"{name}.safetensors"]} for name in FILES])
    ended = place("run", "tasks.jsonl", "--out", "out", "--model", "tiny")
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.err
    lines = {line.partition(".safetensors:")[0].rpartition("/")[2]: line for line in ended.err.splitlines()}
    for name, (_, reason) in FILES.items():
        assert reason in lines[name], lines[name]
    assert len(FILES) == 18
    assert not list((place.folder / "out").rglob("*.png"))
    assert not (place.folder / "out" / "logs").exists()


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16", "float8_e5m2"])
def test_numbers_that_are_none_are_found_in_every_type(kind: str, value: float, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(poisoned(value, getattr(torch, kind)))
    with pytest.raises(InputError, match="holds NaN or infinity"):
        read_lora(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"])
def test_the_largest_numbers_of_every_type_are_taken(kind: str, tmp_path: Path) -> None:
    dtype = getattr(torch, kind)
    most = torch.finfo(dtype).max
    tensors = {key: torch.full(tensor.shape, most, dtype=torch.float64).to(dtype) for key, tensor in pair().items()}
    save_file(tensors, str(tmp_path / "a.safetensors"), metadata={"dtype": "F32", "data_offsets": "no"})
    assert read_lora(str(tmp_path / "a.safetensors")).rank == 4


def test_nan_is_found_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "CHUNK", 16)
    path = tmp_path / "a.safetensors"
    for key, tensor in pair().items():
        for place in range(tensor.numel()):
            tensors = pair()
            tensors[key].view(-1)[place] = NAN
            save_file(tensors, str(path))
            with pytest.raises(InputError, match=key.replace(".", r"\.")):
                read_lora(str(path))


def test_a_link_that_leads_round_and_a_device_are_refused(tmp_path: Path) -> None:
    os.symlink(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    os.symlink(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    os.symlink("/dev/zero", tmp_path / "c.safetensors")
    for name in "abc":
        with pytest.raises(InputError, match=r"cannot be read|is no regular file"):
            read_lora(str(tmp_path / f"{name}.safetensors"))


def test_a_sparse_file_of_terabytes_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 10 * 2**30) + b"{")
        file.truncate(2**40)
    with pytest.raises(InputError, match="claims a header of 10,737,418,240 bytes"):
        read_lora(str(path))


def test_adapters_of_another_model_fail_alone_and_before_a_picture(place: Any) -> None:
    """What only the model can tell: the worker refuses it on the CPU, and the others are made."""
    make_lora(place.folder / "good.safetensors", seed=1)
    make_lora(place.folder / "foreign.safetensors", seed=2, prefix="unet.elsewhere.")
    wide = {f"transformer.layers.0.attention.to_q.lora_{one}.weight": torch.ones(4, 4) for one in "AB"}
    save_file(wide, str(place.folder / "wide.safetensors"))
    names = ("good", "foreign", "wide")
    place.tasks(
        [{"id": name, "prompt": "a", "steps": 1, "size": "64x64", "lora": f"{name}.safetensors"} for name in names]
    )
    ended = place("run", "tasks.jsonl", "--out", "out", "--model", "tiny", "--device", "cpu")
    assert after(place, ended) == {"foreign": "failed", "good": "done", "wide": "failed"}
    failed = {one["id"]: one for one in place.results() if one["state"] == "failed"}
    assert {one["kind"] for one in failed.values()} == {"bad_task"}
    assert "for another model" in failed["foreign"]["message"]
    assert "does not fit the model" in failed["wide"]["message"]
    assert {one["attempts"] for one in failed.values()} == {1}


# --- what a worker reads of a file's settings -------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "explodes": {"transformer.alpha_pattern": {"(a+)+b": 1}},
    "explodes_too": {"transformer.alpha_pattern": {"a*a*a*a*a*a*b": 1}},
    "looks_back": {"transformer.alpha_pattern": {r"(a)\1": 1}},
    "endless": {"transformer.alpha_pattern": {"a" * 10_000: 1}},
    "no_pattern": {"transformer.alpha_pattern": {"(": 1}},
    "no_mapping": {"transformer.alpha_pattern": 7},
    "no_number": {"transformer.lora_alpha": "many"},
    "nan": {"transformer.lora_alpha": NAN},
    "infinity": {"transformer.lora_alpha": "1e999"},
    "a_list": {"transformer.lora_alpha": [1]},
    "huge": {"transformer.lora_alpha": 10**400},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_adapter_settings_that_do_not_read_are_the_tasks_fault(name: str, tmp_path: Path) -> None:
    tensors = pair(stem="transformer." + "a" * 40)
    path = tmp_path / "a.safetensors"
    save_file(tensors, str(path), metadata={lora_file.METADATA_KEY: json.dumps(SETTINGS[name])})
    with pytest.raises(BadTask, match="settings that do not read"):
        lora_file.read(Lora(str(path)))


def test_adapter_settings_nested_without_end_are_the_tasks_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(pair(), str(path), metadata={lora_file.METADATA_KEY: '{"a":' * 100_000})
    with pytest.raises(BadTask, match="settings that do not read"):
        lora_file.read(Lora(str(path)))


@pytest.mark.parametrize(
    "pattern", ["attention.to_q", r"layers\.0\.attention\.to_q", r"layers\.\d+\.attention\.to_q", "to_q"]
)
def test_patterns_as_trainers_write_them_are_followed(pattern: str, tmp_path: Path) -> None:
    settings = {"transformer.alpha_pattern": {pattern: 8}, "transformer.lora_alpha": 4}
    path = tmp_path / "a.safetensors"
    save_file(pair(), str(path), metadata={lora_file.METADATA_KEY: json.dumps(settings)})
    second = lora_file.read(Lora(str(path))).tensors["transformer.layers.0.attention.to_q.lora_B.weight"]
    assert np.allclose(second.numpy(), 0.5 * 8 / 4)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_a_file_in_eight_bits_reads_or_is_the_tasks_fault(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(pair(kind=getattr(torch, kind)), str(path))
    assert lora_file.read(Lora(str(path))).bytes
    poisoned_file = tmp_path / "b.safetensors"
    poisoned_file.write_bytes(poisoned(NAN, getattr(torch, kind)))
    with pytest.raises(BadTask, match="NaN"):
        lora_file.read(Lora(str(poisoned_file)))
