"""Weights on their way to a GPU: several threads copy them into pinned memory, and from there the GPU takes them.

Left to itself the driver stages what is not pinned on one thread, whatever the number of threads that ask it: 6.5 GiB/s on
an H100. Pinned memory that is filled by four or eight threads reaches 14 to 26. Loaders of diffusers and transformers know
nothing of it: while an `Upload` is entered, their `tensor.to("cuda:0")` goes this way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from imagemill import devices

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CHUNK = 32 * 2**20
"""Bytes of a pinned buffer; `BUFFERS` of them are all the memory that an upload takes, whatever the model."""
BUFFERS = 3

LEAST = 2**20
"""Bytes; what is smaller is left to the driver."""

THREADS = 8
"""That fill the buffers, or cast weights which a folder holds in another precision; more only wait for main memory."""

FEW = 2
"""With fewer threads than this the driver alone is faster."""

IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"
"""With it transformers moves its weights on the thread that called it, where alone an `Upload` is entered."""


@contextmanager
def swift(device: str) -> Iterator[None]:
    """Inside the block the loaders' weights go swiftly to the device, by a GPU's share of the processors. On the CPU, or
    where that share is too small, nothing changes.

    At its end all of them have arrived. Raises what the device raises.
    """
    count = share() if device.startswith("cuda") else 0
    if count < FEW:
        yield
        return
    with threads(count), in_turn(), Upload(Pinned(exact(device))):
        yield


def share() -> int:
    """The processors of one GPU of this machine, at most `THREADS`: the other GPUs' workers may be loading as well."""
    return min(THREADS, devices.processors() // max(1, devices.installed()))


def exact(device: str | int | torch.device) -> torch.device:
    """The device with its number: `cuda` is the current one."""
    import torch

    named = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(named) == "cuda" else named


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block torch works on the CPU with so many threads, on a GPU's worker, which otherwise leaves it to others."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(before, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def in_turn() -> Iterator[None]:
    """Inside the block transformers moves one weight after another."""
    before = os.environ.get(IN_TURN)
    os.environ[IN_TURN] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[IN_TURN]
        else:
            os.environ[IN_TURN] = before


class Buffer(Protocol):
    """A place in host memory that a device copies from."""

    memory: torch.Tensor

    def free(self) -> None:
        """Wait until the device has taken what was sent."""

    def send(self, size: int, target: torch.Tensor) -> None:
        """Begin to copy the first `size` bytes to the target on the device."""


class Way(Protocol):
    """How to one device."""

    device: torch.device

    def buffer(self, size: int) -> Buffer:
        """A new buffer of that many bytes. Raises `RuntimeError` when the machine gives no such memory."""

    def arrived(self) -> None:
        """Wait for all that was sent."""


class Pinned:
    """The way to a GPU, in the order of its current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def buffer(self, size: int) -> PinnedBuffer:
        """Pinned memory, with an event that tells when it may be filled again."""
        return PinnedBuffer(size, self.device)

    def arrived(self) -> None:
        """Wait for the stream."""
        import torch

        torch.cuda.current_stream(self.device).synchronize()


class PinnedBuffer:
    """A buffer of a GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        import torch

        self.memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._stream = torch.cuda.current_stream(device)
        self._taken = torch.cuda.Event()

    def free(self) -> None:
        """An event that was never recorded has happened."""
        self._taken.synchronize()

    def send(self, size: int, target: torch.Tensor) -> None:
        """The event comes behind the copy."""
        target.copy_(self.memory[:size], non_blocking=True)
        self._taken.record(self._stream)


class Upload:
    """While it is entered, large tensors that this thread moves to the way's device go through buffers; all else as ever.

    Where the machine gives no pinned memory everything goes as ever.
    """

    def __init__(self, way: Way, *, chunk: int = CHUNK, least: int = LEAST) -> None:
        self._way = way
        self._chunk = chunk
        self._least = least
        self._buffers: list[Buffer] = []
        self._turn = 0
        self._refused = False
        self._mode = _mode(self._move)

    def __enter__(self) -> None:
        self._mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        if self._buffers:
            self._way.arrived()
            self._buffers.clear()

    def _move(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """The tensor on the device, if it goes this way."""
        if not self._goes_here(args, kwargs) or not self._ready():
            return None
        return self._carry(args[0].to(kwargs.get("dtype") or args[0].dtype))

    def _goes_here(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """True for `.to(device)` and `.to(device=…, dtype=…)` of a plain, large tensor in host memory."""
        import torch

        tensor, device = args[0], args[1] if len(args) > 1 else kwargs.get("device")
        if len(args) > 2 or not kwargs.keys() <= {"device", "dtype", "non_blocking"}:
            return False
        if type(tensor) is not torch.Tensor or tensor.requires_grad or tensor.device.type != "cpu":
            return False
        if not tensor.is_contiguous() or tensor.nbytes < self._least:
            return False
        return isinstance(device, (str, int, torch.device)) and exact(device) == self._way.device

    def _ready(self) -> bool:
        if not self._buffers and not self._refused:
            try:
                self._buffers = [self._way.buffer(self._chunk) for _ in range(BUFFERS)]
            except RuntimeError as error:
                self._refused = True
                log.warning("no pinned memory, so the weights load more slowly: %s", error)
        return not self._refused

    def _carry(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        moved = torch.empty_like(tensor, device=self._way.device)
        source, target = (whole.view(-1).view(torch.uint8) for whole in (tensor, moved))
        for begin in range(0, source.numel(), self._chunk):
            part = source[begin : begin + self._chunk]
            buffer = self._buffers[self._turn]
            self._turn = (self._turn + 1) % len(self._buffers)
            buffer.free()
            buffer.memory[: part.numel()].copy_(part)
            buffer.send(part.numel(), target[begin : begin + part.numel()])
        return moved


def _mode(move: Callable[[Sequence[Any], Mapping[str, Any]], torch.Tensor | None]) -> Any:
    """A mode of torch that asks `move` first, with the arguments of every `Tensor.to`; what gives None is done as ever."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Moves(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Any,
            args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            kwargs = kwargs or {}
            moved = move(args, kwargs) if func is torch.Tensor.to else None
            return func(*args, **kwargs) if moved is None else moved

    return Moves()
