"""What the engine itself costs: tasks a second with the `fake` model, which makes a 16x16 picture in no time.

    python bench/overhead.py [--tasks 20000] [--workers 2]

Prints a line for each sink, with the driver's memory, and how long `import imagemill` and `imagemill --help` take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DRIVER = """
import json, re, sys, time
from imagemill.engine import Engine
source, out, workers, sink = sys.argv[1:5]
with Engine(model="fake", workers=int(workers), device="cpu", isolate=True, sink=sink) as engine:
    outcomes = engine.run(source, out)
    first = next(outcomes)
    started = time.monotonic()
    done = sum(outcome.ok for outcome in outcomes)
    seconds = time.monotonic() - started
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])  # getrusage knows the parent's too
print(json.dumps({"done": done + first.ok, "seconds": seconds, "peak": peak}))
"""


def measure(tasks: int, workers: int, sink: str) -> dict[str, float]:
    """Seconds from the first picture to the last, and the driver's peak memory in MiB, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "tasks.jsonl"
        with source.open("w") as out:
            for number in range(tasks):
                out.write(json.dumps({"prompt": f"picture {number}"}) + "\n")
        command = [sys.executable, "-c", DRIVER, str(source), f"{scratch}/out", str(workers), sink]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    if result["done"] != tasks:
        raise SystemExit(f"only {result['done']} of {tasks} were done")
    return {"rate": (tasks - 1) / result["seconds"], "seconds": result["seconds"], "mib": result["peak"] / 1024}


def seconds_of(command: list[str]) -> float:
    """The median of five runs of a command."""
    times = []
    for _ in range(5):
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.monotonic() - started)
    return sorted(times)[2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print(f"{options.tasks} tasks, {options.workers} workers, {os.cpu_count()} processors")
    for sink in ("none", "files"):
        got = measure(options.tasks, options.workers, sink)
        print(f"--sink {sink:5}  {got['rate']:7.0f} tasks/s  {got['seconds']:6.1f} s  driver peak {got['mib']:.0f} MiB")
    bare = seconds_of([sys.executable, "-c", "pass"])
    package = seconds_of([sys.executable, "-c", "import imagemill"])
    helped = seconds_of([sys.executable, "-m", "imagemill.cli", "--help"])
    print(f"python -c pass {bare:.2f} s, import imagemill {package:.2f} s, imagemill --help {helped:.2f} s")


if __name__ == "__main__":
    main()
