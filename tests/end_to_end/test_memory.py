"""The driver's memory does not grow with the number of tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BOUND = 100
"""MiB."""

DRIVER = """
import re, sys
from imagemill.engine import Engine
with Engine(model="fake", workers=2, device="cpu", sink="none") as engine:
    done = sum(outcome.ok for outcome in engine.run(sys.argv[1], sys.argv[2]))
# getrusage would tell the peak of the process that started this one.
print(done, int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024)
"""


def test_twenty_thousand_tasks_need_no_more_memory_than_the_stated_bound(tmp_path: Path) -> None:
    source = tmp_path / "tasks.jsonl"
    with source.open("w") as out:
        for number in range(20_000):
            out.write(json.dumps({"prompt": f"picture {number} " + "of a harbour " * 20}) + "\n")
    command = [sys.executable, "-c", DRIVER, str(source), str(tmp_path / "out")]
    done, peak = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert int(done) == 20_000
    assert float(peak) < BOUND
