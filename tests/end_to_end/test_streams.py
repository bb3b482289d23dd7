"""The command started with closed or full standard streams, as service managers and pipes have it, and interrupted early."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from command import Ended
from imagemill import __main__ as first_step
from workplace import Workplace

TASKS = [{"prompt": "a"}, {"prompt": "b"}]


def started(place: Workplace, redirections: str, *arguments: str) -> Ended:
    """`python -m imagemill ARGUMENTS` with a shell's redirections."""
    words = ["sh", "-c", f'exec "$0" -m imagemill "$@" {redirections}', sys.executable, *arguments]
    ended = subprocess.run(
        words, cwd=place.folder, env=place.environment(), capture_output=True, text=True, timeout=240
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_run_without_streams_makes_its_pictures_and_prints_into_no_file(closed: str, place: Workplace) -> None:
    place.tasks(TASKS)
    ended = started(place, closed, "run", "tasks.jsonl", "--model", "fake", "--out", "out")
    assert ended.code == 0, ended.text
    assert sorted(place.pixels()) == ["000001.png", "000002.png"]
    assert (place.folder / "out" / ".imagemill.lock").read_text().strip().isdigit()


def test_tasks_from_a_closed_standard_input_are_none(place: Workplace) -> None:
    ended = started(place, "<&-", "run", "-", "--model", "fake", "--out", "out")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "it is empty" in ended.err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full device is Linux's")
@pytest.mark.parametrize("arguments", [["--version"], ["models"], ["plan", "tasks.jsonl", "--model", "fake"]])
def test_what_cannot_be_printed_is_one_line(arguments: list[str], place: Workplace) -> None:
    place.tasks(TASKS)
    ended = started(place, ">/dev/full", *arguments)
    assert ended.code == 1
    assert ended.err.splitlines() == [
        "imagemill: what it prints cannot be written: No space left on device; make room there, or print elsewhere"
    ]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full device is Linux's")
def test_a_mistake_has_its_exit_code_where_no_word_of_it_can_be_printed(place: Workplace) -> None:
    ended = started(place, "2>/dev/full", "plan", "missing.jsonl", "--model", "fake")
    assert (ended.code, ended.out) == (2, "")


def test_an_interrupt_while_the_command_is_imported_leaves_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "imagemill.cli", SimpleNamespace(main=interrupted))
    monkeypatch.setattr("imagemill.cli", sys.modules["imagemill.cli"], raising=False)
    with pytest.raises(SystemExit) as ended:
        first_step.main()
    assert ended.value.code == 130


def test_an_interrupt_inside_code_that_a_library_makes_from_text_ends_with_130_too(tmp_path: Path) -> None:
    script = """
        import sys
        from types import SimpleNamespace
        import imagemill
        from imagemill.__main__ import main
        imagemill.cli = sys.modules["imagemill.cli"] = SimpleNamespace(main=lambda: exec("raise KeyboardInterrupt"))
        main()
    """
    (tmp_path / "stopped.py").write_text(textwrap.dedent(script))
    words = [sys.executable, "-m", "stopped"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "")
