"""Every executor carries batches to workers and facts back alike, whatever the workers do; and those that start
processes leave none behind."""

from __future__ import annotations

import os
import pkgutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import pytest

import imagemill
from imagemill import executors, wire
from imagemill.errors import NoWorkersError
from imagemill.executors import inline, processes
from imagemill.records import (
    BatchEnded,
    Event,
    ModelSpec,
    PlannedTask,
    SinkSpec,
    WorkerBeat,
    WorkerLost,
    WorkerReady,
    WorkerSpec,
    WorkOrder,
)
from imagemill.runners import fake
from orders import FAKE, fake_task, order_of

EXECUTORS = [module.name for module in pkgutil.iter_modules(executors.__path__)]
SOURCES = str(Path(imagemill.__file__).parents[1])
OTHER = ModelSpec(name="other", folder="", runner="fake", family="fake")
BROKEN = ModelSpec(name="broken", folder="", runner="no-such-runner")
TIMEOUT = 60.0
"""Seconds after which a wait is taken for a hang; none of these tests measures time."""

E = TypeVar("E", bound=Event)


class Bench:
    """An executor under test. `next` takes events in order, so that one too many is seen by whoever takes the next."""

    def __init__(self, name: str, folder: Path) -> None:
        self.executor: Any = import_module(f"imagemill.executors.{name}").create()
        self.folder = folder
        self.sink = SinkSpec("files", str(folder / "out"))
        self._events: deque[Event] = deque()
        self._batches = 0

    def spec(self, worker: int = 0, **fields: Any) -> WorkerSpec:
        return WorkerSpec(worker, "cpu", f"CPU {worker}", FAKE, log=str(self.log(worker)), **fields)

    def log(self, worker: int = 0) -> Path:
        return self.folder / "logs" / f"worker-{worker}.log"

    def start(self, worker: int = 0, **fields: Any) -> None:
        self.executor.start([self.spec(worker, **fields)])

    def ready(self, worker: int = 0, **fields: Any) -> WorkerReady:
        """Start the worker and load its model."""
        self.start(worker, **fields)
        self.executor.load(worker)
        return self.next(WorkerReady)

    def order(self, *tasks: PlannedTask, model: ModelSpec = FAKE, sink: SinkSpec | None = None) -> WorkOrder:
        self._batches += 1
        return order_of(*tasks, model=model, batch=self._batches, sink=sink or self.sink)

    def send(self, *tasks: PlannedTask, worker: int = 0, **fields: Any) -> WorkOrder:
        order = self.order(*tasks, **fields)
        self.executor.send(worker, order)
        return order

    def run(self, *tasks: PlannedTask, worker: int = 0, **fields: Any) -> BatchEnded:
        """Send a batch and take its end."""
        order = self.send(*tasks, worker=worker, **fields)
        ended = self.next(BatchEnded)
        assert (ended.worker, ended.batch) == (worker, order.batch)
        return ended

    def next(self, kind: type[E]) -> E:
        """The next event that is no beat; it must be of this kind. With `WorkerBeat`, the next beat."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, kind):
                    return event
                assert isinstance(event, WorkerBeat), f"{event} came instead of {kind.__name__}"
            left = deadline - time.monotonic()
            assert left > 0, f"no {kind.__name__} came"
            self._events += self.executor.events(left)

    def works(self, worker: int = 0) -> bool:
        """Whether a batch runs through; nothing else may have been waiting."""
        ended = self.run(fake_task(900 + worker), worker=worker)
        return len(ended.receipts) == 1 and not ended.failures

    def close(self) -> None:
        for worker in list(self.executor.pids):
            self.executor.kill(worker)
        self.executor.close()


@pytest.fixture(params=EXECUTORS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(request.param, tmp_path)
    yield made
    made.close()


@pytest.fixture
def processes_bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench("processes", tmp_path)
    yield made
    made.close()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def process_state(pid: int) -> str:
    """The letter of /proc/PID/stat; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_gone(pid: int) -> bool:
    """True for a zombie too: in a container nobody may reap orphans."""
    return process_state(pid) in ("", "Z", "X")


def processor_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_worker_says_what_it_holds_once_it_was_told_to_load(bench: Bench) -> None:
    bench.start()
    assert bench.executor.events(0.2) == []
    bench.executor.load(0)
    ready = bench.next(WorkerReady)
    assert (ready.worker, ready.memory) == (0, 7)
    assert "model:fake" in ready.resident


@pytest.mark.parametrize("kind", ["bad_model", "oom", "transient"])
def test_a_worker_that_fails_to_load_is_lost_once_and_can_start_again(
    bench: Bench, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fake.LOAD_VARIABLE, f'{{"fail": "{kind}"}}')
    bench.start()
    bench.executor.load(0)
    lost = bench.next(WorkerLost)
    assert (lost.worker, lost.kind) == (0, kind)
    assert "does not load" in lost.message
    monkeypatch.delenv(fake.LOAD_VARIABLE)
    bench.ready()
    assert bench.works()


def test_a_worker_whose_model_nothing_can_host_is_lost_once(bench: Bench) -> None:
    bench.executor.start([replace(bench.spec(), model=BROKEN)])
    bench.executor.load(0)
    lost = bench.next(WorkerLost)
    assert (lost.worker, lost.kind) == (0, "bad_model")
    assert "no-such-runner" in lost.message
    bench.ready()
    assert bench.works()


def test_a_long_load_beats(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake.LOAD_VARIABLE, '{"delay": 0.5}')
    bench.start()
    bench.executor.load(0)
    beat = bench.next(WorkerBeat)
    assert (beat.worker, beat.stage) == (0, "load")
    bench.next(WorkerReady)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_every_task_of_a_batch_comes_back_with_its_picture_under_a_temporary_name(bench: Bench) -> None:
    bench.ready()
    ended = bench.run(fake_task(3), fake_task(1), fake_task(2))
    assert not ended.failures
    assert sorted(receipt.seq for receipt in ended.receipts) == [1, 2, 3]
    assert {"model:fake", "shape:16x16"} <= ended.resident
    root = Path(bench.sink.folder)
    for receipt in ended.receipts:
        data = (root / receipt.temporary).read_bytes()
        assert (receipt.attempt, receipt.batch_size, receipt.width, receipt.height) == (1, 3, 16, 16)
        assert (receipt.bytes, receipt.sha256) == (len(data), sha256(data).hexdigest())
        assert receipt.path == f"pictures/{receipt.seq}.png"
        assert not (root / receipt.path).exists()
        assert "save" in receipt.seconds
    assert len(list((root / "pictures").iterdir())) == 3


def test_the_same_task_gives_the_same_bytes_in_any_batch(bench: Bench) -> None:
    bench.ready()
    (alone,) = bench.run(fake_task(5)).receipts
    (again,) = bench.run(fake_task(5)).receipts
    assert alone.sha256 == again.sha256


def test_the_sink_none_keeps_no_file(bench: Bench) -> None:
    bench.ready()
    (receipt,) = bench.run(fake_task(), sink=SinkSpec("none")).receipts
    assert (receipt.temporary, receipt.path, receipt.bytes, receipt.width) == ("", "", 0, 16)
    assert not Path(bench.sink.folder).exists()


def test_a_failing_task_costs_itself_alone(bench: Bench) -> None:
    bench.ready()
    kinds = ["bad_task", "bad_model", "transient", "timeout", "bad_output"]
    bad = [fake_task(number, fail=kind) for number, kind in enumerate(kinds)]
    ended = bench.run(fake_task(10), *bad, fake_task(11))
    assert {receipt.seq for receipt in ended.receipts} == {10, 11}
    assert [(failure.seq, failure.attempt, failure.kind) for failure in ended.failures] == [
        (number, 1, kind) for number, kind in enumerate(kinds)
    ]
    assert all("scripted" in failure.message and not failure.ends_run for failure in ended.failures)


def test_out_of_memory_costs_the_batch_and_nothing_more(bench: Bench) -> None:
    bench.ready()
    ended = bench.run(fake_task(0, oom=2), fake_task(1))
    assert not ended.receipts
    assert [(failure.seq, failure.kind) for failure in ended.failures] == [(0, "oom"), (1, "oom")]
    assert not bench.run(fake_task(0, oom=2)).failures


def test_what_was_made_before_a_batch_broke_off_counts(bench: Bench) -> None:
    bench.ready()
    ended = bench.run(fake_task(0), fake_task(1, fail="worker_lost"), fake_task(2))
    assert [receipt.seq for receipt in ended.receipts] == [0]
    assert [(failure.seq, failure.kind) for failure in ended.failures] == [(1, "worker_lost"), (2, "worker_lost")]


def test_a_task_whose_folder_is_a_file_costs_itself_alone(bench: Bench) -> None:
    bench.ready()
    root = Path(bench.sink.folder)
    root.mkdir()
    (root / "taken").write_text("a file")
    ended = bench.run(fake_task(0, path="taken/0.png"), fake_task(1))
    assert [receipt.seq for receipt in ended.receipts] == [1]
    (failure,) = ended.failures
    assert (failure.kind, failure.ends_run) == ("bad_task", False)
    assert "taken" in failure.message


def test_an_output_folder_that_refuses_everything_ends_the_run(bench: Bench, tmp_path: Path) -> None:
    bench.ready()
    (tmp_path / "file").write_text("no folder")
    (failure,) = bench.run(fake_task(), sink=SinkSpec("files", str(tmp_path / "file"))).failures
    assert (failure.kind, failure.ends_run) == ("transient", True)


def test_a_long_task_beats(bench: Bench) -> None:
    bench.ready()
    bench.send(fake_task(4, delay=0.5, steps=2))
    beat = bench.next(WorkerBeat)
    assert (beat.worker, beat.seq, beat.steps, beat.stage) == (0, 4, 2, "denoise")
    assert bench.next(BatchEnded).receipts


def test_an_order_for_another_model_switches_to_it_and_back(bench: Bench) -> None:
    bench.ready()
    there, back = bench.run(fake_task(0), model=OTHER), bench.run(fake_task(1))
    assert there.receipts
    assert {need for need in there.resident if need.startswith("model:")} == {"model:other"}
    assert back.receipts
    assert {need for need in back.resident if need.startswith("model:")} == {"model:fake"}


def test_a_model_that_does_not_load_costs_its_orders_alone(bench: Bench) -> None:
    bench.ready()
    ended = bench.run(fake_task(0), fake_task(1), model=BROKEN)
    assert [failure.kind for failure in ended.failures] == ["bad_model", "bad_model"]
    assert ended.resident == frozenset()
    assert bench.works()


def test_orders_wait_in_line(bench: Bench) -> None:
    bench.ready()
    orders = [bench.send(fake_task(seq)) for seq in range(20)]
    assert [bench.next(BatchEnded).batch for _ in orders] == [order.batch for order in orders]


# --- losing workers ---------------------------------------------------------------------------------------------------


def test_a_worker_killed_before_it_loads_is_lost_once_and_can_start_again(bench: Bench) -> None:
    bench.start()
    bench.executor.kill(0)
    assert bench.next(WorkerLost).worker == 0
    bench.ready()
    assert bench.works()


def test_a_worker_killed_while_it_loads_is_lost_once_and_can_start_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fake.LOAD_VARIABLE, '{"delay": 600}')
    bench.start()
    bench.executor.load(0)
    bench.next(WorkerBeat)
    bench.executor.kill(0)
    lost = bench.next(WorkerLost)
    assert (lost.worker, lost.kind) == (0, "worker_lost")
    monkeypatch.delenv(fake.LOAD_VARIABLE)
    bench.ready()
    assert bench.works()


def test_a_worker_killed_while_it_waits_is_lost_once_and_can_start_again(bench: Bench) -> None:
    bench.ready()
    bench.executor.kill(0)
    assert bench.next(WorkerLost).worker == 0
    bench.ready()
    assert bench.works()


def test_a_worker_killed_at_work_is_lost_once_and_can_start_again(bench: Bench) -> None:
    bench.ready()
    bench.send(fake_task(0), fake_task(1, delay=600), fake_task(2))
    bench.next(WorkerBeat)
    bench.executor.kill(0)
    lost = bench.next(WorkerLost)
    assert (lost.worker, lost.kind) == (0, "worker_lost")
    assert lost.message
    bench.ready()
    assert bench.works()


def test_calls_to_a_worker_that_is_gone_say_no_more_than_that(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline, "GRACE", 0.2)
    bench.ready()
    bench.executor.kill(0)
    bench.next(WorkerLost)
    bench.executor.kill(0)
    bench.executor.load(0)
    bench.send(fake_task())
    assert {type(event) for event in bench.executor.events(0.5)} <= {WorkerLost}
    assert bench.executor.events(0.5) == []
    bench.ready()
    assert bench.works()


def test_a_worker_that_breaks_over_an_order_is_lost_and_not_silent(bench: Bench) -> None:
    bench.ready()
    bench.executor.send(0, WorkOrder(1, FAKE, bench.sink, (fake_task(0), fake_task(1)), attempts=(1,)))
    assert bench.next(WorkerLost).worker == 0
    bench.ready()
    assert bench.works()


# --- waking and closing -----------------------------------------------------------------------------------------------


def test_wake_makes_waiting_events_return(bench: Bench) -> None:
    timer = threading.Timer(0.2, bench.executor.wake)
    timer.start()
    assert bench.executor.events(None) == []
    timer.join()


def test_wake_counts_even_before_anybody_waits(bench: Bench) -> None:
    for _ in range(3):
        bench.executor.wake()
    assert bench.executor.events(None) == []
    assert bench.executor.events(0.05) == []


def test_wake_works_in_a_signal_handler(bench: Bench) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: bench.executor.wake())
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        assert bench.executor.events(None) == []
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("state", ["nothing started", "waiting", "ready", "at work"])
def test_close_leaves_no_process_no_thread_and_no_open_file(
    name: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LEAVE_TIMEOUT", 2.0)
    threads, files = set(threading.enumerate()), os.listdir("/proc/self/fd")
    bench = Bench(name, tmp_path)
    if state == "waiting":
        bench.start()
    elif state != "nothing started":
        bench.ready()
    if state == "at work":
        bench.send(fake_task(delay=600))
        bench.next(WorkerBeat)
    pids = list(bench.executor.pids.values())
    bench.executor.close()
    assert all(process_state(pid) == "" for pid in pids)
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) == len(files)
    bench.executor.close()
    bench.executor.wake()


# --- inline alone -----------------------------------------------------------------------------------------------------


def test_a_thread_that_hangs_cannot_be_killed_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, hanging = threading.Event(), threading.Event()

    def hang(how: Any) -> None:
        hanging.set()
        assert release.wait(TIMEOUT)

    monkeypatch.setattr(fake, "hang", hang)
    monkeypatch.setattr(inline, "GRACE", 0.3)
    bench = Bench("inline", tmp_path)
    bench.ready()
    bench.send(fake_task(hang=True))
    assert hanging.wait(TIMEOUT)
    bench.executor.kill(0)
    with pytest.raises(NoWorkersError, match="--isolate"):
        bench.next(WorkerLost)
    release.set()
    monkeypatch.setattr(inline, "GRACE", TIMEOUT)
    bench.executor.close()


def test_only_one_worker_runs_inside_a_process(tmp_path: Path) -> None:
    bench = Bench("inline", tmp_path)
    with pytest.raises(ValueError, match="one worker"):
        bench.executor.start([bench.spec(0), bench.spec(1)])
    bench.close()


# --- processes alone: how workers end ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"), [("kill", "killed by SIGKILL"), ("segv", "killed by SIGSEGV"), ("exit", "exited with code 0")]
)
def test_a_crash_is_told_with_how_it_ended(processes_bench: Bench, how: str, words: str) -> None:
    bench = processes_bench
    bench.ready()
    whole = bench.send(fake_task(0))
    bench.send(fake_task(1), fake_task(2, crash=how))
    assert bench.next(BatchEnded).batch == whole.batch
    lost = bench.next(WorkerLost)
    assert (lost.worker, lost.kind) == (0, "worker_lost")
    assert words in lost.message
    assert bench.executor.pids == {}
    bench.ready()
    assert bench.works()


def test_a_worker_killed_from_outside_costs_only_itself(processes_bench: Bench) -> None:
    bench = processes_bench
    bench.ready(0)
    bench.ready(1)
    os.kill(bench.executor.pids[0], signal.SIGKILL)
    assert bench.next(WorkerLost) == WorkerLost(0, "worker_lost", "killed by SIGKILL")
    assert bench.works(1)


def test_a_crash_while_loading_is_a_lost_worker(processes_bench: Bench) -> None:
    bench = processes_bench
    bench.start(environment={fake.LOAD_VARIABLE: '{"fail": "crash"}'})
    bench.executor.load(0)
    assert bench.next(WorkerLost) == WorkerLost(0, "worker_lost", "killed by SIGKILL")


@pytest.mark.parametrize("how", [True, "spin"])
def test_a_hanging_worker_can_be_killed(processes_bench: Bench, how: Any) -> None:
    bench = processes_bench
    bench.ready()
    bench.send(fake_task(0, delay=0.1), fake_task(1, hang=how))
    bench.next(WorkerBeat)
    bench.executor.kill(0)
    assert bench.next(WorkerLost).message == "killed by SIGKILL"


def test_what_a_killed_worker_started_dies_with_it(processes_bench: Bench, tmp_path: Path) -> None:
    bench = processes_bench
    environment = at_start(
        tmp_path,
        """
        import subprocess
        child = subprocess.Popen(["sleep", "600"])
        print("child", child.pid, flush=True)
        """,
    )
    bench.ready(environment=environment)
    child = int(bench.log().read_text().split("child ")[1].split()[0])
    assert not is_gone(child)
    bench.executor.kill(0)
    bench.next(WorkerLost)
    wait_for(lambda: is_gone(child), "the child of a killed worker lives on")


def test_a_stopped_worker_blocks_neither_the_driver_nor_the_others(processes_bench: Bench) -> None:
    bench, none = processes_bench, SinkSpec("none")
    bench.ready(0)
    bench.ready(1)
    os.kill(bench.executor.pids[0], signal.SIGSTOP)
    orders = [bench.send(fake_task(seq, prompt="x" * 2_000_000), worker=0, sink=none) for seq in range(25)]
    assert bench.works(1)
    os.kill(bench.executor.pids[0], signal.SIGCONT)
    assert [bench.next(BatchEnded).batch for _ in orders] == [order.batch for order in orders]


def test_a_stopped_worker_can_be_killed(processes_bench: Bench) -> None:
    bench = processes_bench
    bench.ready()
    os.kill(bench.executor.pids[0], signal.SIGSTOP)
    bench.send(fake_task(prompt="x" * 2_000_000))
    bench.executor.kill(0)
    assert bench.next(WorkerLost).message == "killed by SIGKILL"


# --- processes alone: foreign behaviour -------------------------------------------------------------------------------

DRIVER_END = """
import sys
fd = int(sys.orig_argv[sys.orig_argv.index("--fd") + 1]) if "--fd" in sys.orig_argv else -1
"""


def at_start(folder: Path, code: str) -> dict[str, str]:
    """The environment of a worker that runs this code before anything else."""
    place = folder / "at-start"
    place.mkdir()
    (place / "sitecustomize.py").write_text(DRIVER_END + textwrap.dedent(code))
    return {"PYTHONPATH": os.pathsep.join([str(place), SOURCES])}


GARBAGE = {
    "a giant length": b"\xff" * 64,
    "an unknown kind": wire.HEADER.pack(9) + b"Pickle {}",
    "broken JSON": wire.HEADER.pack(13) + b"WorkerReady {",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_on_the_pipe_costs_that_worker_alone(processes_bench: Bench, tmp_path: Path, garbage: bytes) -> None:
    bench = processes_bench
    bench.ready(1)
    bench.start(0, environment=at_start(tmp_path, f"import os; os.write(fd, {garbage!r})"))
    pid = bench.executor.pids[0]
    lost = bench.next(WorkerLost)
    assert (lost.worker, lost.kind) == (0, "worker_lost")
    assert "garbage" in lost.message
    assert process_state(pid) == ""
    assert bench.works(1)
    bench.ready(0)
    assert bench.works(0)


def test_a_worker_that_closes_its_pipe_and_lives_on_is_ended(
    processes_bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "DEATH_TIMEOUT", 0.3)
    bench = processes_bench
    bench.start(environment=at_start(tmp_path, "import os, time; os.close(fd); time.sleep(600)"))
    pid = bench.executor.pids[0]
    assert bench.next(WorkerLost) == WorkerLost(0, "worker_lost", "it closed its pipe")
    assert process_state(pid) == ""


def test_each_worker_has_its_own_environment_and_its_own_log(processes_bench: Bench, tmp_path: Path) -> None:
    bench = processes_bench
    code = """
    import os
    print("sees", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    os.write(2, b"native words\\n")
    """
    environment = at_start(tmp_path, code)
    for worker in (0, 1):
        bench.ready(worker, environment={**environment, "CUDA_VISIBLE_DEVICES": f"GPU-{worker}"})
    for worker in (0, 1):
        log = bench.log(worker).read_text()
        assert f"sees GPU-{worker}\n" in log
        assert f"GPU-{1 - worker}" not in log
        assert "native words" in log
        assert f"worker {worker} on CPU {worker}" in log


def test_a_script_for_one_label_reaches_that_worker_alone(processes_bench: Bench) -> None:
    bench = processes_bench
    script = '{"fail": "oom", "only": ["GPU 1"]}'
    for worker in (0, 1):
        environment = {fake.LOAD_VARIABLE: script, fake.LABEL_VARIABLE: f"GPU {worker}"}
        bench.start(worker, environment=environment)
        bench.executor.load(worker)
        if worker == 0:
            bench.next(WorkerReady)
    assert (lost := bench.next(WorkerLost)).worker == 1
    assert lost.kind == "oom"


def test_the_log_of_an_earlier_life_is_kept(processes_bench: Bench) -> None:
    bench = processes_bench
    for _ in range(2):
        bench.ready()
        bench.executor.kill(0)
        bench.next(WorkerLost)
    assert bench.log().read_text().count("loaded fake") == 2


def test_a_file_of_the_users_folder_shadows_no_module(
    processes_bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("random", "queue", "json", "pydantic"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    bench = processes_bench
    bench.ready()
    assert bench.works()


def test_ctrl_c_at_the_terminal_does_not_reach_workers(processes_bench: Bench) -> None:
    bench = processes_bench
    bench.ready()
    pid = bench.executor.pids[0]
    assert os.getsid(pid) == os.getpgid(pid) == pid != os.getsid(0)
    os.kill(pid, signal.SIGINT)
    assert bench.works()


# --- processes alone: no worker outlives its driver -------------------------------------------------------------------

DRIVER = """
import json, sys
from imagemill.executors import processes
from imagemill.records import *
spec = ModelSpec(name="fake", folder="", runner="fake")
executor = processes.create()
executor.start([WorkerSpec(number, "cpu", "CPU", spec) for number in (0, 1)])
executor.load(0)
executor.load(1)
ready = 0
while ready < 2:
    ready += sum(isinstance(event, WorkerReady) for event in executor.events(None))
task = Task("0", "p", width=16, height=16, output_path="0.png", metadata={"fake": json.loads(sys.argv[1])})
order = WorkOrder(1, spec, SinkSpec("none"), (PlannedTask(task, "f", Ticket(0)),), (1,))
executor.send(0, order)
print(*executor.pids.values(), flush=True)
while True:
    executor.events(None)
"""


@pytest.mark.parametrize("script", ["{}", '{"delay": 600}', '{"hang": true}', '{"hang": "spin"}'])
def test_workers_die_with_a_driver_that_is_killed(script: str) -> None:
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    command = [sys.executable, "-c", DRIVER, script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as driver:
        try:
            assert driver.stdout is not None
            pids = [int(pid) for pid in driver.stdout.readline().split()]
            assert len(pids) == 2
            if "spin" in script:
                ticks = processor_ticks(pids[0])
                wait_for(lambda: processor_ticks(pids[0]) > ticks + 20, "the worker does not spin")
            assert not any(is_gone(pid) for pid in pids)
        finally:
            driver.kill()
    wait_for(lambda: all(is_gone(pid) for pid in pids), "a worker outlives its driver")


class LoneWorker:
    """A worker process whose driver is this test: one end of its pipe and nothing else."""

    def __init__(self, parent: int, log: Path) -> None:
        self.pipe, theirs = socket.socketpair()
        with theirs, log.open("wb") as output:
            fd = theirs.fileno()
            command = [sys.executable, "-P", "-m", "imagemill.worker", "--fd", str(fd), "--parent", str(parent)]
            environment = {**os.environ, "PYTHONPATH": SOURCES}
            self.process = subprocess.Popen(command, pass_fds=(fd,), env=environment, stdout=output, stderr=output)

    def post(self, *messages: Any) -> None:
        self.pipe.sendall(b"".join(map(wire.frame, messages)))

    def hear(self, kind: type[Event]) -> None:
        """Read events until one of this kind, and leave none of them unread."""
        self.pipe.settimeout(TIMEOUT)
        reader = wire.FrameReader()
        while not any(isinstance(event, kind) for event in list(reader.feed(self.pipe.recv(1 << 16)))):
            pass

    def __enter__(self) -> LoneWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.wait()


def lone_spec() -> WorkerSpec:
    return WorkerSpec(0, "cpu", "CPU", FAKE)


def test_a_worker_leaves_when_its_pipe_ends_even_while_it_hangs(tmp_path: Path) -> None:
    with LoneWorker(os.getpid(), tmp_path / "log") as worker:
        worker.post(lone_spec(), wire.LoadModel(), order_of(fake_task(hang="spin")))
        worker.hear(WorkerReady)
        ticks = processor_ticks(worker.process.pid)
        wait_for(lambda: processor_ticks(worker.process.pid) > ticks + 20, "the worker does not spin")
        worker.pipe.close()
        assert worker.process.wait(TIMEOUT) == 0


def test_a_worker_leaves_when_its_driver_dies_with_unread_events(tmp_path: Path) -> None:
    """The kernel resets such a pipe; it does not end."""
    log = tmp_path / "log"
    with LoneWorker(os.getpid(), log) as worker:
        worker.post(lone_spec(), wire.LoadModel())
        assert worker.pipe.recv(1)
        wait_for(lambda: "loaded fake" in log.read_text(), "the worker does not load")
        worker.pipe.close()
        worker.process.wait(TIMEOUT)


def test_a_worker_that_cannot_read_its_orders_ends_with_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with LoneWorker(os.getpid(), log) as worker:
        worker.post(lone_spec(), wire.LoadModel())
        worker.pipe.sendall(b"\xff" * 64)
        assert worker.process.wait(TIMEOUT) == 1
    assert "FrameError" in log.read_text()


def test_a_worker_whose_parent_is_gone_at_its_start_leaves(tmp_path: Path) -> None:
    with LoneWorker(os.getppid(), tmp_path / "log") as worker:
        assert worker.process.wait(TIMEOUT) == 0
