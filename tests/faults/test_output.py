"""What workers and their libraries print goes to their logs, which are capped: it holds nobody up and tears no frame."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
from checks import AHEAD, HASTE, after, at_start, log_of
from hypothesis import given, settings
from hypothesis import strategies as st

from command import WORKERS, until
from imagemill.logfiles import GAP, KEPT, LONGEST, trim
from workplace import Workplace, rows

BOTH = pytest.mark.parametrize("mode", [(), (AHEAD,)], ids=["in turn", "ahead"])
FLOOD = 50_000_000
IMPORT_PRINTS = """
if fd >= 0:
    print("the library says hello on", label)
    sys.stderr.write("and warns\\n" * 20_000)
    os.write(1, b"native hello\\n" * 20_000)
    os.write(2, b"\\0\\xff\\xfe native binary\\n" * 1000)
"""


@BOTH
def test_a_worker_that_prints_100_mb_to_stdout_and_to_stderr_is_heard_and_its_log_is_capped(
    mode: tuple[str, ...], place: Workplace, golden: dict[str, str]
) -> None:
    place.tasks(rows(12, t3={"noise": FLOOD, "delay": 0.2}, t5={"noise": FLOOD}))
    environment = at_start(place, *mode, IMPORT_PRINTS)
    running = place.start_fake("tasks.jsonl", "out", *WORKERS, "--schedule", "static", **environment)
    after(place, ended := running.wait(), running=running, golden=golden, ids={f"t{number}" for number in range(12)})
    assert ended.code == 0, ended.text
    assert place.ledger("SELECT id FROM attempts WHERE kind IS NOT NULL") == []
    assert "noise" not in ended.text
    size = (place.folder / "out" / "logs" / "worker-1.log").stat().st_size
    assert size <= LONGEST
    loud, quiet = log_of(place, "worker-1.log"), log_of(place, "worker-0.log")
    assert loud.startswith("the library says hello on CPU 1\n")
    assert "worker 1 on CPU 1" in loud[:KEPT]
    assert loud.endswith("left as told\n")
    (gap,) = GAP.findall(loud.encode())
    assert int(gap) > FLOOD
    assert "native hello" in quiet
    assert "left out" not in quiet
    assert quiet.endswith("left as told\n")


def test_the_log_of_a_worker_that_prints_and_dies_is_capped_too(place: Workplace, golden: dict[str, str]) -> None:
    place.tasks(rows(6, t1={"noise": LONGEST, "crash": "segv"}))
    running = place.start_fake("tasks.jsonl", "out", *WORKERS, **at_start(place, HASTE))
    after(place, ended := running.wait(), running=running, golden=golden, ids={f"t{number}" for number in range(6)})
    assert ended.code == 1, ended.text
    for worker in (0, 1):
        text = log_of(place, f"worker-{worker}.log")
        assert len(text) <= LONGEST
        assert len(GAP.findall(text.encode())) == 1
        assert re.search(
            r"(noise|imagemill\.worker: .*)$", text.rstrip()
        )  # the end is there: no life need end with a leave


# --- the cap itself ---------------------------------------------------------------------------------------------------


def lines(first: int, count: int) -> bytes:
    return b"".join(b"line %09d\n" % number for number in range(first, first + count))


def test_a_log_that_is_short_enough_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(lines(0, 100))
    assert trim(str(log), longest=1500, kept=200) == 0
    assert log.read_bytes() == lines(0, 100)


def test_a_log_that_is_not_there_or_is_a_folder_is_nobodys_trouble(tmp_path: Path) -> None:
    assert trim(str(tmp_path / "none"), longest=0) == 0
    assert trim(str(tmp_path), longest=0) == 0


def test_the_middle_goes_in_whole_lines_and_what_is_gone_adds_up(tmp_path: Path) -> None:
    log, written = tmp_path / "log", 0
    for _ in range(5):
        with log.open("ab") as file:
            file.write(lines(written, 1000))
        written += 1000
        trim(str(log), longest=2000, kept=300)
        text = log.read_bytes()
        (gap,) = GAP.findall(text)
        head, tail = GAP.sub(b"|", text).split(b"|")
        assert (head, tail) == (lines(0, 20), lines(written - 19, 19))
        assert int(gap) + len(head) + len(tail) == 15 * written


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=400), max_size=20))
def test_whatever_is_written_the_log_is_capped_and_keeps_its_beginning_and_its_end(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    log, whole = tmp_path_factory.getbasetemp() / "any.log", b""
    log.write_bytes(b"")
    for piece in pieces:
        with log.open("ab") as file:
            file.write(piece)
        whole += piece
        trim(str(log), longest=500, kept=100)
        text = log.read_bytes()
        assert len(text) <= 500
        if len(whole) <= 500:
            assert text == whole
        else:
            head, gap, tail = re.split(rb"\n?\[imagemill: at least (\d+) bytes left out here\]\n", text, maxsplit=1)
            assert whole.startswith(head)
            assert whole.endswith(tail)
            assert len(head) + int(gap) + len(tail) in (len(whole), len(whole) - 1)


def test_a_writer_in_append_mode_is_neither_held_up_nor_torn(tmp_path: Path) -> None:
    log, over = tmp_path / "log", threading.Event()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write() -> None:
        for number in range(60_000):
            os.write(handle, b"line %09d\n" % number)
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    cuts = 0
    while not over.is_set():
        cuts += trim(str(log), longest=30_000, kept=3_000) > 0
    writer.join()
    # What is written while a log is cut may go with the middle: the last line comes after.
    os.write(handle, b"line %09d\n" % 60_000)
    os.close(handle)
    trim(str(log), longest=30_000, kept=3_000)
    text = log.read_bytes()
    assert cuts > 0
    assert len(text) <= 30_000
    assert text.startswith(lines(0, 200))
    assert text.endswith(lines(60_000, 1))


def test_the_log_of_a_worker_that_lives_on_is_capped_meanwhile(place: Workplace) -> None:
    place.tasks(rows(1, t0={"noise": 20_000_000, "delay": 600}))
    running = place.start_fake("tasks.jsonl", "out", "--isolate")
    log = place.folder / "out" / "logs" / "worker-0.log"
    until(lambda: log.exists() and b"left out here" in log.read_bytes())
    assert running.process.poll() is None
