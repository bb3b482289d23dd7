"""The fake runner does what its scripts say, and nothing else: every other test of the machinery leans on it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from imagemill.errors import BadModel, OutOfMemory, WorkerGone
from imagemill.records import Lora
from imagemill.runners import Cancelled, Result, create, fake
from orders import FAKE, fake_task, order_of


class Beats(list[tuple[str, int, int, int]]):
    def __call__(self, stage: str, seq: int, step: int, steps: int) -> None:
        self.append((stage, seq, step, steps))


@pytest.fixture
def runner() -> Iterator[fake.FakeRunner]:
    made = create("fake", "cpu", 1)
    assert isinstance(made, fake.FakeRunner)
    made.load(FAKE, Beats())
    yield made
    made.unload()


def only(results: Iterator[Result]) -> Result:
    (result,) = results
    return result


def test_a_picture_follows_from_fingerprint_and_size_alone(runner: fake.FakeRunner) -> None:
    first, again = (only(runner.run(order_of(fake_task(7)), Beats())).image for _ in range(2))
    other = only(runner.run(order_of(fake_task(8)), Beats())).image
    assert first
    assert again
    assert other
    assert first.size == (16, 16)
    assert first.mode == "RGB"
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert len(set(first.get_flattened_data() if hasattr(first, "get_flattened_data") else first.getdata())) > 8


def test_a_batch_gives_one_result_a_task_in_order(runner: fake.FakeRunner) -> None:
    results = list(runner.run(order_of(*map(fake_task, (5, 3, 9))), Beats()))
    assert [result.seq for result in results] == [5, 3, 9]
    assert {result.batch_size for result in results} == {3}


def test_beats_come_at_every_step_and_during_a_long_delay(runner: fake.FakeRunner) -> None:
    beats = Beats()
    list(runner.run(order_of(fake_task(4, steps=3)), beats))
    assert beats == [("denoise", 4, step, 3) for step in (1, 2, 3)]
    beats.clear()
    list(runner.run(order_of(fake_task(4, delay=0.12)), beats))
    assert beats[0] == ("denoise", 4, 0, 1)
    assert beats[-1] == ("denoise", 4, 1, 1)


def test_a_cancel_out_of_a_beat_stops_the_run(runner: fake.FakeRunner) -> None:
    def beat(stage: str, seq: int, step: int, steps: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        list(runner.run(order_of(fake_task(delay=30)), beat))


@pytest.mark.parametrize("kind", ["bad_task", "bad_model", "transient", "timeout", "bad_output"])
def test_a_scripted_failure_costs_its_task_alone(runner: fake.FakeRunner, kind: str) -> None:
    results = list(runner.run(order_of(fake_task(0), fake_task(1, fail=kind), fake_task(2)), Beats()))
    assert [result.error.kind if result.error else None for result in results] == [None, kind, None]
    assert [result.image is not None for result in results] == [True, False, True]


def test_a_failure_can_be_limited_to_the_first_attempts(runner: fake.FakeRunner) -> None:
    task = fake_task(fail="transient", fail_attempts=2)
    kinds = [only(runner.run(order_of(task, attempt=attempt), Beats())).error for attempt in (1, 2, 3)]
    assert kinds[0]
    assert kinds[1]
    assert kinds[2] is None


def test_out_of_memory_and_a_lost_worker_end_the_whole_batch(runner: fake.FakeRunner) -> None:
    with pytest.raises(OutOfMemory):
        list(runner.run(order_of(fake_task(0), fake_task(1, fail="oom")), Beats()))
    with pytest.raises(WorkerGone):
        list(runner.run(order_of(fake_task(0, fail="worker_lost")), Beats()))


def test_scripted_oom_depends_on_the_batch_size(runner: fake.FakeRunner) -> None:
    with pytest.raises(OutOfMemory):
        list(runner.run(order_of(fake_task(0, oom=2), fake_task(1)), Beats()))
    assert only(runner.run(order_of(fake_task(0, oom=2)), Beats())).image


def test_nan_is_a_bad_output_and_black_is_black(runner: fake.FakeRunner) -> None:
    error = only(runner.run(order_of(fake_task(nan=True)), Beats())).error
    assert error
    assert error.kind == "bad_output"
    assert str(error) == "the picture contains NaN"
    image = only(runner.run(order_of(fake_task(black=True)), Beats())).image
    assert image
    assert image.getbbox() is None


def test_resident_names_model_adapters_and_shape(runner: fake.FakeRunner) -> None:
    assert runner.resident == {"model:fake", "adapters:-"}
    list(runner.run(order_of(fake_task(loras=(Lora("a", 0.5, "d1"), Lora("b", 0.0, "d2")))), Beats()))
    assert runner.resident == {"model:fake", "adapters:d1@0.5", "shape:16x16"}
    assert runner.memory() == (7, 7)
    runner.unload()
    assert runner.resident == frozenset()
    assert runner.memory() == (0, 0)


def test_another_model_than_the_loaded_one_is_a_defect(runner: fake.FakeRunner) -> None:
    runner.unload()
    with pytest.raises(ValueError, match="loaded is None"):
        list(runner.run(order_of(fake_task()), Beats()))


def test_loading_fails_only_where_the_script_says(monkeypatch: pytest.MonkeyPatch) -> None:
    script = {"fail": "bad_model", "only": ["cuda:1", "GPU 7"], "delay": 0.01}
    monkeypatch.setenv(fake.LOAD_VARIABLE, json.dumps(script))
    create("fake", "cpu", 1).load(FAKE, Beats())
    with pytest.raises(BadModel):
        create("fake", "cuda:1", 1).load(FAKE, Beats())
    monkeypatch.setenv(fake.LABEL_VARIABLE, "GPU 7")
    with pytest.raises(BadModel):
        create("fake", "cpu", 1).load(FAKE, Beats())


PROCESS = """
import sys
from imagemill.records import ModelSpec, PlannedTask, SinkSpec, Task, Ticket, WorkOrder
from imagemill.runners import create
runner = create("fake", "cpu", 1)
model = ModelSpec("fake", "")
runner.load(model, lambda *beat: None)
task = Task("0", "p", metadata={"fake": SCRIPT})
members = (PlannedTask(task, "f", Ticket(0)),)
results = runner.run(WorkOrder(1, model, SinkSpec(), members, (ATTEMPT,)), lambda *beat: None)
print(len(list(results)))
print("torch" in sys.modules)
"""


def run_process(script: dict[str, Any], attempt: int = 1, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    code = PROCESS.replace("SCRIPT", repr(script)).replace("ATTEMPT", str(attempt))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize(("how", "status"), [("exit", 0), ("segv", -11), ("kill", -9)])
def test_a_scripted_crash_ends_the_process(how: str, status: int) -> None:
    ended = run_process({"crash": how})
    assert (ended.returncode, ended.stdout) == (status, "")


def test_a_crash_can_be_limited_to_the_first_attempts_and_no_torch_is_imported() -> None:
    ended = run_process({"crash": "kill", "crash_attempts": 1}, attempt=2)
    assert ended.stdout.split() == ["1", "False"]


@pytest.mark.parametrize("how", [True, "spin"])
def test_a_scripted_hang_never_returns(how: Any) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_process({"hang": how}, timeout=2)
