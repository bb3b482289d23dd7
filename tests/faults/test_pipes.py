"""What is wrong on a worker's pipe costs that worker: frames cut in the middle, garbage, endless frames, false names."""

from __future__ import annotations

from pathlib import Path

import pytest
from checks import AHEAD, HASTE, after, at_start, log_of

from command import WORKERS, until
from imagemill import wire
from imagemill.executors import processes
from imagemill.records import BatchEnded, Failure, ModelSpec, WorkerLost, WorkerReady, WorkerSpec
from imagemill.saving import MAX_MESSAGE, told
from workplace import Workplace, rows

BOTH = pytest.mark.parametrize("mode", [(), (AHEAD,)], ids=["in turn", "ahead"])
STATIC = (*WORKERS, "--schedule", "static")
TASKS = 10
IDS = {f"t{number}" for number in range(TASKS)}
SILENT = "silent for 2 s"
GIANT = "a frame claims 1,073,741,824 bytes"

SPEECH = """
if fd >= 0 and label == "CPU 1" and life("one") == 1:
    import signal
    from dataclasses import replace
    import imagemill.wire as wire
    true_frame, ended = wire.frame, []

    def spoken(message, data):
        {}

    def frame(message):
        if type(message).__name__ == "BatchEnded":
            ended.append(message)
            if len(ended) == 2:
                return spoken(message, true_frame(message))
        return true_frame(message)

    wire.frame = frame
"""
"""What the first life of worker 1 says when its second batch has ended."""

FAULTS = {
    "cut by a kill": ("os.write(fd, data[: len(data) // 2]); os.kill(os.getpid(), 9)", "SIGKILL"),
    "cut in the header": ("os.write(fd, data[:2]); os._exit(0)", "code 0"),
    "cut, and it lives on": ("return data[: len(data) // 2]", SILENT),
    "cut, and it is stopped": ("os.write(fd, data[:99]); os.kill(os.getpid(), signal.SIGSTOP); return b''", SILENT),
    "nothing": ("return b''", SILENT),
    "text": ("return b'Warning: a library writes to every file it finds'", "garbage"),
    "zeros": ("return bytes(4096)", "garbage"),
    "an unknown kind": ("return wire.HEADER.pack(9) + b'Pickle {}'", "garbage"),
    "1 GB": ("os.write(fd, wire.HEADER.pack(2**30)); [os.write(fd, bytes(2**20)) for _ in range(1024)]", GIANT),
    "60 MB of nothing": ("return wire.HEADER.pack(60 * 2**20) + b'WorkerBeat '.ljust(60 * 2**20)", "garbage"),
    "in another's name": ("return true_frame(replace(message, worker=0))", "garbage"),
    "in nobody's name": ("return true_frame(replace(message, worker=99))", "garbage"),
    "an order to the driver": ("return true_frame(wire.LoadModel())", "garbage"),
    "another batch": ("return true_frame(replace(message, batch=999))", SILENT),
    "what cannot be said": ("raise wire.FrameError('too long')", "code 1"),
}

QUICK = (
    "cut by a kill",
    "cut, and it lives on",
    "text",
    "1 GB",
    "in another's name",
    "in nobody's name",
    "another batch",
)


def replaced(place: Workplace, fault: str, golden: dict[str, str], *mode: str) -> None:
    """The run with this fault: all is done, worker 1 alone was replaced, once, and only what it had was tried again."""
    code, words = FAULTS[fault]
    place.write("settings.yaml", "limits: {task_timeout: 2.0}\n")
    environment = at_start(place, SPEECH.format(code), HASTE, *mode)
    place.tasks(rows(TASKS))
    running = place.start_fake("tasks.jsonl", "out", *STATIC, "--config", "settings.yaml", **environment)
    after(place, ended := running.wait(), running=running, golden=golden, ids=IDS)
    assert ended.code == 0, ended.text
    driver = log_of(place, "driver.log")
    assert words in driver or (mode and "garbage" in driver)  # another thread may have spoken into the frame
    assert (driver.count("worker 0 is lost"), driver.count("worker 1 is lost")) == (0, 1)
    lost = set(place.ledger("SELECT id, worker FROM attempts WHERE kind IS NOT NULL"))
    if (
        mode
    ):  # a picture that was being saved, one whose end was not heard, one on the device: which, the threads decide
        assert 1 <= len(lost) <= 3
        assert {worker for _, worker in lost} == {1}
    else:
        assert lost == {("t3", 1)}


@pytest.mark.parametrize("fault", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in FAULTS])
def test_a_worker_that_speaks_wrongly_is_replaced_and_its_batch_done_by_another(
    fault: str, place: Workplace, golden: dict[str, str]
) -> None:
    replaced(place, fault, golden)


@pytest.mark.parametrize("fault", ["cut by a kill", "text", "what cannot be said"])
def test_a_worker_that_speaks_wrongly_from_a_saving_thread_is_replaced_too(
    fault: str, place: Workplace, golden: dict[str, str]
) -> None:
    replaced(place, fault, golden, AHEAD)


@BOTH
def test_what_is_said_twice_counts_once(mode: tuple[str, ...], place: Workplace, golden: dict[str, str]) -> None:
    environment = at_start(place, SPEECH.format("return data + data"), *mode)
    running = place.start_fake(place.tasks(rows(TASKS)), "out", *STATIC, **environment)
    after(place, ended := running.wait(), running=running, golden=golden, ids=IDS)
    assert ended.code == 0, ended.text
    assert place.attempts() == dict.fromkeys(IDS, 1)
    assert "is lost" not in log_of(place, "driver.log")


def test_threads_that_all_speak_at_once_tear_no_frame(place: Workplace, golden: dict[str, str]) -> None:
    tasks = [{**row, "steps": 1} for row in rows(24, delay=0.06)]
    environment = at_start(place, AHEAD)
    running = place.start_fake(place.tasks(tasks), "out", *WORKERS, "--batch-size", "4", **environment)
    after(place, ended := running.wait(), running=running, golden=golden, ids={row["id"] for row in tasks})
    assert ended.code == 0, ended.text
    assert set(place.attempts().values()) == {1}


# --- what does not fit into a frame -----------------------------------------------------------------------------------


def test_an_order_too_large_for_a_frame_is_split_and_one_such_task_fails_alone(
    place: Workplace, golden: dict[str, str]
) -> None:
    small = """
    if fd < 0:
        import imagemill.wire as wire
        wire.MAX_FRAME = 20_000
    """
    tasks = rows(8)
    for number, size in ((1, 9_000), (2, 9_000), (3, 9_000), (6, 30_000)):
        tasks[number]["note"] = "x" * size
    place.tasks(tasks)
    running = place.start_fake("tasks.jsonl", "out", *WORKERS, "--batch-size", "4", **at_start(place, small))
    states = after(place, ended := running.wait(), running=running, golden=golden)
    assert ended.code == 1, ended.text
    assert [name for name, state in states.items() if state == "failed"] == ["t6"]
    assert (place.results()[6]["kind"], "cannot be sent" in place.results()[6]["message"]) == ("bad_task", True)
    assert "is lost" not in log_of(place, "driver.log")


def test_whatever_an_error_says_a_frame_takes_it() -> None:
    words = told(ValueError("caf\udce9.png " * 1000_000))
    assert len(words) == MAX_MESSAGE
    failure = Failure(0, 1, "transient", words)
    (read,) = wire.FrameReader().feed(wire.frame(BatchEnded(0, 1, (), (failure,), frozenset())))
    assert read.failures == (failure,)
    assert words.startswith("caf?.png ")


# --- a process that the system refuses --------------------------------------------------------------------------------


def test_a_worker_that_cannot_be_started_is_lost_and_the_driver_goes_on(tmp_path: Path) -> None:
    executor = processes.create()
    (tmp_path / "file").write_text("")
    model = ModelSpec(name="fake", folder="", runner="fake", family="fake")
    executor.start([WorkerSpec(0, "cpu", "CPU 0", model, log=str(tmp_path / "file" / "worker-0.log"))])
    executor.load(0)
    events = executor.events(0)
    executor.close()
    assert isinstance(events[0], WorkerLost)
    assert "cannot be started" in events[0].message
    assert {event.worker for event in events} == {0}
    assert executor.pids == {}


def test_what_is_still_to_be_told_of_a_lost_worker_is_not_taken_for_the_end_of_the_next(tmp_path: Path) -> None:
    """A turn of the driver's loop may hold events, orders and a new start of the same worker."""
    executor = processes.create()
    model = ModelSpec(name="fake", folder="", runner="fake", family="fake")
    spec = WorkerSpec(0, "cpu", "CPU 0", model, log=str(tmp_path / "worker-0.log"))
    try:
        executor.load(0)
        executor.start([spec])
        executor.load(0)
        heard: list[object] = []
        until(lambda: heard.extend(executor.events(0.1)) or [one for one in heard if isinstance(one, WorkerReady)])
        assert not [event for event in heard if isinstance(event, WorkerLost)]
        executor.kill(0)
        until(lambda: [event for event in executor.events(0.1) if isinstance(event, WorkerLost)])
        executor.load(0)
        executor.kill(0)
        assert executor.events(0) == []
        executor.kill(0)
        assert executor.events(0) == [WorkerLost(0, message="its process is gone")]
    finally:
        executor.close()


def test_a_device_whose_processes_the_system_refuses_is_quarantined(place: Workplace, golden: dict[str, str]) -> None:
    refuse = """
    if fd < 0:
        import subprocess
        Popen = subprocess.Popen

        def popen(command, **options):
            if options.get("env", {}).get("IMAGEMILL_WORKER_LABEL") == "CPU 1":
                life("one")
                raise BlockingIOError(11, "Resource temporarily unavailable")
            return Popen(command, **options)

        subprocess.Popen = popen
    """
    place.tasks(rows(8, delay=0.1))
    running = place.start_fake("tasks.jsonl", "out", *WORKERS, **at_start(place, refuse, HASTE))
    after(place, ended := running.wait(), running=running, golden=golden, ids={f"t{number}" for number in range(8)})
    assert ended.code == 0, ended.text
    assert (place.folder / "life-one").stat().st_size == 3
    assert "it cannot be started: [Errno 11] Resource temporarily unavailable" in log_of(place, "driver.log")
