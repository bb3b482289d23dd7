"""For every test: signals and output as a terminal has them, and a folder in which the real command works."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from workplace import Workplace


def pytest_configure() -> None:
    """What was started with `nohup`, or in the background of a script, ignores signals, and so would every command that the
    tests start. Output that is not buffered, as containers often have it, hides what goes wrong at a command's end."""
    os.environ.pop("PYTHONUNBUFFERED", None)
    for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="module", autouse=True)
def swept() -> None:
    """What earlier files left is let go, and what stays is not looked through again: a runner that unloads its model collects
    garbage, and among all libraries and tests that takes ten times as long as the test."""
    gc.collect()
    gc.freeze()


def opened(folder: Path) -> Iterator[Workplace]:
    """A workplace; what is left of its commands ends with it."""
    made = Workplace(folder)
    yield made
    for started in made.started:
        started.end()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    """An empty workplace."""
    yield from opened(tmp_path)


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A workplace for all tests of a file."""
    yield from opened(tmp_path_factory.mktemp("shared"))
