"""Weights on their way to a device: complete, in order, and by the loaders of both libraries."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import TINY

from imagemill import devices
from imagemill.runners import loading, upload
from imagemill.runners.upload import Upload, swift

HOST = torch.device("cpu")


class Late:
    """A way to the CPU that copies as late as a GPU may: when the buffer is wanted again, or all is waited for."""

    def __init__(self, device: torch.device = HOST) -> None:
        self.device = device
        self.buffers: list[LateBuffer] = []
        self.bytes = 0

    def buffer(self, size: int) -> LateBuffer:
        self.buffers.append(LateBuffer(size, self))
        return self.buffers[-1]

    def arrived(self) -> None:
        for buffer in self.buffers:
            buffer.free()


class LateBuffer:
    def __init__(self, size: int, way: Late) -> None:
        self.memory = torch.zeros(size, dtype=torch.uint8)
        self._way = way
        self._under_way: tuple[int, torch.Tensor] | None = None

    def free(self) -> None:
        if self._under_way:
            size, target = self._under_way
            target.copy_(self.memory[:size])
            self._under_way = None

    def send(self, size: int, target: torch.Tensor) -> None:
        assert self._under_way is None
        assert target.numel() == size <= self.memory.numel()
        self._way.bytes += size
        self._under_way = (size, target)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 64 * 3, 64 * 7 + 5])
def test_every_byte_arrives_whatever_the_size(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    tensors = [torch.randint(0, 100, (size,), generator=generator).to(dtype) for _ in range(5)]
    with Upload(Late(), chunk=64, least=1):
        moved = [tensor.to("cpu") for tensor in tensors]
    assert all(map(same, moved, tensors))
    assert not any(one is other for one, other in zip(moved, tensors, strict=True))


def test_shapes_are_kept_and_no_more_buffers_are_taken_than_the_few() -> None:
    way, tensor = Late(), torch.arange(6000.0).view(10, 20, 30)
    with Upload(way, chunk=100, least=1):
        moved = tensor.to(device="cpu", dtype=None, non_blocking=True)
    assert same(moved, tensor)
    assert way.bytes == tensor.nbytes
    assert len(way.buffers) == upload.BUFFERS


def test_a_change_of_precision_on_the_way_is_made() -> None:
    way, tensor = Late(), torch.rand(1000)
    with Upload(way, chunk=256, least=1):
        moved = tensor.to(device="cpu", dtype=torch.bfloat16)
    assert same(moved, tensor.bfloat16())
    assert way.bytes == 2000


@pytest.mark.parametrize(
    "move",
    [
        lambda: torch.rand(7).to("cpu"),
        lambda: torch.rand(64, 2).T.to("cpu"),
        lambda: torch.nn.Parameter(torch.rand(64)).to("cpu"),
        lambda: torch.rand(64, requires_grad=True).to("cpu"),
        lambda: torch.rand(64).to("meta"),
        lambda: torch.rand(64).to(torch.bfloat16),
        lambda: torch.rand(64).to(dtype=torch.bfloat16),
        lambda: torch.rand(64).to(torch.rand(1)),
        lambda: torch.rand(64).to("cpu", torch.bfloat16),
        lambda: torch.rand(64).to("cpu", copy=True),
        lambda: torch.rand(64, device="meta").to("meta"),
        lambda: torch.rand(64).cpu(),
    ],
)
def test_all_else_goes_as_ever(move: Any) -> None:
    way = Late()
    torch.manual_seed(1)
    with Upload(way, chunk=64, least=64):
        moved = move()
    torch.manual_seed(1)
    other = move()
    assert (way.bytes, way.buffers) == (0, [])
    assert moved.is_meta == other.is_meta
    assert moved.is_meta or same(moved, other)


def test_a_machine_without_pinned_memory_loads_as_ever_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(Late):
        def buffer(self, size: int) -> LateBuffer:
            if self.buffers:
                raise RuntimeError("CUDA error: out of memory")
            return super().buffer(size)

    way, tensor = Refusing(), torch.rand(1000)
    with caplog.at_level(logging.WARNING), Upload(way, least=1):
        assert tensor.to("cpu") is tensor
        assert tensor.to("cpu") is tensor
    assert way.bytes == 0
    assert [record.getMessage() for record in caplog.records] == [
        "no pinned memory, so the weights load more slowly: CUDA error: out of memory"
    ]


def test_what_was_sent_has_arrived_also_when_loading_fails() -> None:
    way, tensor, moved = Late(), torch.rand(1000), []

    def fail() -> None:
        with Upload(way, chunk=64, least=1):
            moved.append(tensor.to("cpu"))
            raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        fail()
    assert same(moved[0], tensor)


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_the_weights_of_both_libraries_go_this_way(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way = Late()
    monkeypatch.setattr(upload, "share", lambda: 2)
    monkeypatch.setattr(upload, "Pinned", lambda device: way)
    monkeypatch.setattr(upload, "Upload", lambda way: Upload(way, chunk=4096, least=1))
    kind = loading.weights_class(loading.read_index(TINY)[part])
    (file,) = loading.weight_files(TINY / part)
    stored = load_file(file)
    with swift("cuda:0"):
        model, account = kind.from_pretrained(
            str(TINY / part),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            device_map={"": "cpu"},
        )
    held = model.state_dict()
    assert not account["missing_keys"]
    assert all(torch.equal(held[key], tensor.float()) for key, tensor in stored.items())
    assert way.bytes >= sum(4 * tensor.numel() for tensor in stored.values())


def test_several_threads_and_one_weight_after_another_only_while_a_gpu_s_worker_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "processors", lambda: 9)
    monkeypatch.setattr(devices, "installed", lambda: 2)
    monkeypatch.delenv(upload.IN_TURN, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with swift("cpu"):
            assert (torch.get_num_threads(), os.environ.get(upload.IN_TURN)) == (1, None)
        with swift("cuda:0"):
            assert (torch.get_num_threads(), os.environ.get(upload.IN_TURN)) == (4, "1")
        assert (torch.get_num_threads(), os.environ.get(upload.IN_TURN)) == (1, None)
        monkeypatch.setenv(upload.IN_TURN, "0")
        with swift("cuda:0"):
            pass
        assert os.environ[upload.IN_TURN] == "0"
        monkeypatch.setattr(devices, "installed", lambda: 8)
        with swift("cuda:0"):
            assert (torch.get_num_threads(), os.environ[upload.IN_TURN]) == (1, "0")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("processors", "gpus", "threads"),
    [(16, 1, 8), (128, 8, 8), (32, 8, 4), (16, 8, 2), (8, 8, 1), (2, 0, 2), (2, 8, 0)],
)
def test_a_gpu_has_its_share_of_the_processors(
    processors: int, gpus: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "processors", lambda: processors)
    monkeypatch.setattr(devices, "installed", lambda: gpus)
    assert upload.share() == threads
