"""The measured matrix ceiling of a GPU: a product of two random 8192² matrices in bfloat16.

    python bench/ceiling.py [--device cuda] [--side 8192]

Prints JSON: operations a second, and the device's name. The median of 30 products after 10 to warm up, each timed with
device events; random numbers, since products of zeros run faster than real ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

WARM_UP = 10
PRODUCTS = 30


def measure(device: str, side: int) -> float:
    """Operations a second: 2·side³ over the median time."""
    import torch

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    for _ in range(WARM_UP):
        torch.mm(left, right, out=out)
    return 2 * side**3 / statistics.median(_seconds(device, lambda: torch.mm(left, right, out=out)))


def _seconds(device: str, product: Callable[[], object]) -> list[float]:
    import torch

    if not device.startswith("cuda"):
        times = []
        for _ in range(PRODUCTS):
            begun = time.perf_counter()
            product()
            times.append(time.perf_counter() - begun)
        return times
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(PRODUCTS)]
    for begin, end in pairs:
        begin.record()
        product()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, default=8192)
    options = parser.parse_args()
    import torch

    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(json.dumps({"operations_per_second": measure(options.device, options.side), "gpu": name}))


if __name__ == "__main__":
    main()
