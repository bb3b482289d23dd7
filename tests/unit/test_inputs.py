"""Inputs: every LoRA file and picture is checked by header and digest before any worker starts."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from imagemill import inputs
from imagemill.errors import InputError
from imagemill.inputs import Inputs, digest_file, local_path, lora_path, read_lora


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)


def pair(stem: str, first: str = "lora_A", second: str = "lora_B", rank: int = 4) -> dict[str, np.ndarray]:
    return {f"{stem}.{first}.weight": zeros(rank, 8), f"{stem}.{second}.weight": zeros(6, rank)}


def saved(path: Path, tensors: dict[str, np.ndarray]) -> str:
    save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize(
    ("tensors", "rank", "name"),
    [
        (pair("transformer.layers.0.to_q"), 4, "diffusers"),
        (pair("base_model.model.to_q", rank=8) | pair("base_model.model.to_k"), 8, "peft"),
        (pair("diffusion_model.layers.0.q"), 4, "comfyui"),
        (pair("lora_unet_q", "lora_down", "lora_up") | {"lora_unet_q.alpha": zeros()}, 4, "kohya"),
        ({"q.lora_A.default.weight": zeros(2, 8), "q.lora_B.default.weight": zeros(8, 2)}, 2, "peft"),
        ({"unet.q_lora.down.weight": zeros(3, 8), "unet.q_lora.up.weight": zeros(8, 3)}, 3, "diffusers"),
        ({"lora_unet_q.lokr_w1": zeros(4, 4), "lora_unet_q.lokr_w2": zeros(4, 4)}, 0, "lokr"),
        ({"q.lokr_w1": zeros(4, 4), "q.lokr_w2_a": zeros(8, 2), "q.lokr_w2_b": zeros(2, 8)}, 2, "lokr"),
        (pair("q") | {"q.lora_B.bias": zeros(6)}, 4, "peft"),
    ],
)
def test_a_lora_of_every_convention_reads_with_rank_and_digest(
    tmp_path: Path, tensors: dict[str, np.ndarray], rank: int, name: str
) -> None:
    path = saved(tmp_path / "a.safetensors", tensors)
    lora = read_lora(path)
    content = Path(path).read_bytes()
    assert (lora.rank, lora.format, lora.tensors, lora.bytes) == (rank, name, len(tensors), len(content))
    assert lora.digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"q.lora_A.weight": zeros(4, 8)}, r"'q\.lora_A\.weight' is there without 'q\.lora_B\.weight'"),
        (pair("k") | {"q.lora_B.weight": zeros(8, 4)}, r"'q\.lora_B\.weight' is there without 'q\.lora_A\.weight'"),
        ({"q.lora_up.weight": zeros(8, 4)}, r"without 'q\.lora_down\.weight'"),
        ({"q.lokr_w1": zeros(4, 4), "q.lokr_w2_a": zeros(8, 2)}, r"without 'q\.lokr_w2_b'"),
        ({"q.weight": zeros(8, 8)}, r"holds no LoRA.*first tensor is 'q\.weight'"),
        ({"q.hada_w1_a": zeros(8, 8)}, "holds no LoRA"),
        ({"q.lora_A.weight": zeros(4, 8), "q.lora_B.weight": zeros(8, 2)}, "do not fit: shapes"),
        ({"q.lora_A.weight": zeros(0, 8), "q.lora_B.weight": zeros(8, 0)}, "do not fit: shapes"),
        ({}, "holds no tensors"),
    ],
)
def test_a_file_that_is_no_whole_lora_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_lora(saved(tmp_path / "a.safetensors", tensors))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"PK\x03\x04 more of it", "pickle files can run code; convert it to safetensors"),
        ("a.ckpt", b"anything at all", "pickle files can run code"),
        ("renamed.safetensors", b"PK\x03\x04" + b"\0" * 60, "is a pickle"),
        ("old.safetensors", b"\x80\x02}q\x00(X\x01\x00\x00" + b"\0" * 60, "is a pickle"),
        ("a.safetensors", b"", "is an empty file"),
        ("a.safetensors", b"1234", "only 4 bytes long"),
        ("a.safetensors", b"<html>not found</html>", "is no safetensors file"),
        ("a.safetensors", struct.pack("<Q", 500) + b'{"a": {', "is cut off inside its header"),
        ("a.safetensors", struct.pack("<Q", 2**40) + b'{"a": {', r"claims a header of 1,099,511,627,776 bytes"),
        ("a.safetensors", struct.pack("<Q", 8) + b"{ broken" + b"\0" * 8, "is damaged or cut off"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_without_loading_it(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_lora(str(tmp_path / name))


def test_a_cut_off_file_is_refused_at_every_length(tmp_path: Path) -> None:
    whole = Path(saved(tmp_path / "a.safetensors", pair("q"))).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_lora(str(cut))


def test_tensors_that_reach_beyond_the_file_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"q.lora_A.weight": {"dtype": "F16", "shape": [4, 8], "data_offsets": [0, 64]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 10)
    with pytest.raises(InputError, match="is damaged or cut off"):
        read_lora(str(tmp_path / "a.safetensors"))


def test_missing_files_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_lora, Inputs().lora, Inputs().image):
        with pytest.raises(InputError, match="there is no such"):
            read(str(tmp_path / "none"))
        with pytest.raises(InputError, match="is a folder"):
            read(str(tmp_path))
        with pytest.raises(InputError, match="is no regular file"):
            read(str(tmp_path / "pipe"))
        with pytest.raises(InputError, match="cannot be read"):
            read("a\0b")


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.safetensors", pair("q"))
    calls = []

    def counted(name: str) -> inputs.LoraFile:
        calls.append(name)
        return read_lora(name)

    monkeypatch.setattr(inputs, "read_lora", counted)
    known = Inputs()
    first = known.lora(path)
    assert known.lora(path) is first
    assert len(calls) == 1
    saved(Path(path), pair("q", rank=8))
    assert known.lora(path).rank == 8
    assert known.lora(path).digest != first.digest
    assert len(calls) == 2


def test_a_bad_file_is_read_once_and_refused_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.safetensors", {"q.weight": zeros(2, 2)})
    calls = []

    def counted(name: str) -> inputs.LoraFile:
        calls.append(name)
        return read_lora(name)

    monkeypatch.setattr(inputs, "read_lora", counted)
    known = Inputs()
    for _ in range(3):
        with pytest.raises(InputError, match="holds no LoRA"):
            known.lora(path)
    assert len(calls) == 1


def test_a_picture_is_known_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"bytes of a picture")
    assert Inputs().image(str(tmp_path / "a.png")).digest == hashlib.sha256(b"bytes of a picture").hexdigest()
    assert digest_file(tmp_path / "a.png") == hashlib.sha256(b"bytes of a picture").hexdigest()
    with pytest.raises(InputError, match="cannot be read"):
        digest_file(tmp_path / "none.png")


def test_local_paths_are_absolute_and_urls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path("a/../b") == str(tmp_path / "b")
    assert local_path("b", tmp_path / "base") == str(tmp_path / "base" / "b")
    (tmp_path / "b").touch()
    assert local_path("b", tmp_path / "base") == str(tmp_path / "b")
    for bad in ("https://x/y", "s3://x/y", "file:///x", "", " ", "a\0", "\ud800"):
        with pytest.raises(InputError):
            local_path(bad)


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of embedded adapters with one of them."""
    folder = tmp_path / "embedded"
    folder.mkdir()
    save_file(pair("transformer.layers.0.to_q"), folder / "crayon.safetensors")
    monkeypatch.setattr(inputs, "LORAS", folder)
    return folder


def test_an_embedded_adapter_is_found_by_its_name(embedded: Path, tmp_path: Path) -> None:
    assert lora_path("crayon", tmp_path) == str(embedded / "crayon.safetensors")
    assert lora_path("crayon") == str(embedded / "crayon.safetensors")


def test_a_file_goes_before_an_embedded_adapter_of_its_name(embedded: Path, tmp_path: Path) -> None:
    (tmp_path / "crayon").write_bytes(b"mine")
    assert lora_path("crayon", tmp_path) == str(tmp_path / "crayon")


@pytest.mark.parametrize("text", ["./crayon", "crayon.safetensors", "loras/crayon", "cray"])
def test_only_the_bare_name_means_an_embedded_adapter(text: str, embedded: Path, tmp_path: Path) -> None:
    assert Path(lora_path(text, tmp_path)).parent != embedded
