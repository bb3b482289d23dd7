"""Signals, each test in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import signal, sys
from imagemill.progress import create
from imagemill.signals import stop_signals

class Work:
    under_way = {under_way}
    def drain(self):
        return self.under_way
    def cancel(self):
        return False

with stop_signals(Work(), create(quiet=True)) as code:
    for _ in range({times}):
        signal.raise_signal(signal.SIGINT)
    print("closed in peace", code)
"""


@pytest.mark.parametrize(
    ("under_way", "times", "said"),
    [(True, 1, "closed in peace [130]"), (True, 2, "closed in peace [130, 130]"), (False, 1, "")],
)
def test_nothing_is_torn_out_of_its_end(under_way: bool, times: int, said: str) -> None:
    script = SCRIPT.format(under_way=under_way, times=times)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert ended.stdout.strip() == said
    assert (ended.returncode == 0) == bool(said)
