"""What NVML says of the GPUs while a row runs: how busy they are, and how much memory is in use, by all processes together.

NVML's utilisation is the share of a short window in which at least one kernel ran: it tells an idle GPU from a working one,
not how well a kernel uses it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

PERIOD = 0.05
"""Seconds between samples. NVML renews its figure a few times a second."""

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Sample:
    """One GPU at one moment: `moment` is `time.time()`, `busy` a share, `used` bytes."""

    moment: float
    gpu: int
    busy: float
    used: int


@dataclass
class Meter:
    """Samples the first `gpus` visible GPUs on a thread between entering and leaving; without NVML there are no samples."""

    gpus: int
    samples: list[Sample] = field(default_factory=list)

    def __enter__(self) -> Meter:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nvml", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import pynvml

        handles = _handles(pynvml, self.gpus)
        while not self._over.wait(PERIOD):
            for gpu, handle in enumerate(handles):
                now = time.time()
                busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                self.samples.append(Sample(now, gpu, busy, int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)))
            if not handles:
                return


def _handles(pynvml: Any, count: int) -> list[Any]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    there = range(pynvml.nvmlDeviceGetCount())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    chosen = [int(name) for name in visible.split(",") if name.isdecimal() and int(name) in there] or list(there)
    return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in chosen[:count]]


def idle_share(samples: Sequence[Sample], first: float, last: float) -> float | None:
    """The share of the time between two moments in which the GPUs ran no kernel, their mean; None without a sample."""
    busy = [sample.busy for sample in samples if first <= sample.moment <= last]
    return 1 - sum(busy) / len(busy) if busy else None


def peak_gib(samples: Sequence[Sample]) -> float | None:
    """The most memory in use on one GPU."""
    return max((sample.used for sample in samples), default=0) / GIB or None
