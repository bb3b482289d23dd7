"""The command's first step, `imagemill` or `python -m imagemill`: what it imports may be interrupted too."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """The console script: `cli.main` with three open streams, and ctrl-C at any time without a traceback."""
    try:
        open_streams()
        from imagemill import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # Python remembers an interrupt that came inside code a library makes from text (dataclasses do, while they are
        # imported), and would end by the signal whatever our exit code is. The next such code makes it forget.
        exec("")


def open_streams() -> None:
    """Give standard input, output and error that came closed to nothing: else the next file that is opened would take their
    numbers, and what is printed would go into it."""
    for handle, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is this one
            setattr(sys, name, open(handle, mode, closefd=False))  # noqa: SIM115 - it stays open


if __name__ == "__main__":
    main()
