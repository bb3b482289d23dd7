"""For every test: signals as a terminal has them."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """What was started with `nohup`, or in the background of a script, ignores signals, and so would every command that the
    tests start."""
    for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
