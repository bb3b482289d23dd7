"""The figures of a plan, and that they say where they come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagemill.estimate import Group, Pace, estimate, groups, measured, pace
from imagemill.ledger import FILE_NAME, Attempt, Ledger
from imagemill.records import Failure, PlannedTask, Receipt, Settle, Task, Ticket, Tuning

MODEL = "model:z"
FAMILIES = {MODEL: "z_image"}
H100 = "NVIDIA H100 80GB HBM3"


def ticket(number: int, adapters: str = "-", cost: float = 2.0, model: str = MODEL) -> Ticket:
    return Ticket(number, (model, f"adapters:{adapters}", "shape:64x64"), "g", cost)


def known(scale: float = 1.0, load: float = 0.0, switch: float = 0.0) -> Pace:
    return Pace({MODEL: scale}, load, switch, "a test")


def earlier_run(folder: Path, seconds: list[float], *, size: int = 1, failed: int = 0, model: str = MODEL) -> None:
    """A ledger in which tasks of cost 2 took so many seconds each, in batches of `size`; the first ones failed."""
    ledger = Ledger(folder / FILE_NAME)
    ledger.staging.begin()
    for number in range(len(seconds)):
        planned = PlannedTask(Task(str(number), "p", output_path=f"{number}.png"), "f", ticket(number, model=model))
        assert ledger.staging.add(planned, f"line {number}") is None
    ledger.begin_run(0.0, {}, {})
    ledger.staging.apply(ledger.run)
    settles, attempts = [], []
    for number, taken in enumerate(seconds):
        bad = number < failed
        failure = Failure(number, 1, "bad_task", "no") if bad else None
        receipt = None if bad else Receipt(number, 1, 64, 64)
        settles.append((str(number), Settle(number, 1, 0, receipt, failure)))
        kind = "bad_task" if bad else None
        attempts.append(Attempt(str(number), 1, 0, 100.0, 100.0 + taken * size, kind, "", size))
    ledger.settle(settles, attempts, 200.0)
    ledger.span(0, "load", 10.0, 22.0)
    ledger.close()


# --- where the seconds come from --------------------------------------------------------------------------------------


def test_an_earlier_run_in_the_folder_is_the_best_source(tmp_path: Path) -> None:
    earlier_run(tmp_path, [6.0, 6.0, 6.0, 60.0, 6.0])
    found = pace(tmp_path, FAMILIES, H100)
    assert found.scales == {MODEL: 3.0}
    assert found.load_seconds == 12.0
    assert found.source == f"measured here: 5 pictures of an earlier run in {tmp_path}"


def test_the_time_of_a_batch_is_shared_by_its_members(tmp_path: Path) -> None:
    earlier_run(tmp_path, [6.0] * 8, size=4)
    assert pace(tmp_path, FAMILIES, "any").scales == {MODEL: 3.0}


def test_failed_tasks_measure_nothing(tmp_path: Path) -> None:
    earlier_run(tmp_path, [0.1, 0.1, 0.1, 6.0, 6.0, 6.0, 6.0], failed=3)
    found = pace(tmp_path, FAMILIES, "any")
    assert found.scales == {MODEL: 3.0}
    assert "4 pictures" in found.source


def test_fewer_than_four_pictures_or_another_model_are_no_measurement(tmp_path: Path) -> None:
    earlier_run(tmp_path, [6.0] * 3)
    assert measured(tmp_path, frozenset(FAMILIES)) is None
    other = tmp_path / "other"
    other.mkdir()
    earlier_run(other, [6.0] * 9, model="model:other")
    assert measured(other, frozenset(FAMILIES)) is None


def test_an_h100_has_the_figures_of_an_h100_only_for_the_family_that_was_measured(tmp_path: Path) -> None:
    assert pace(tmp_path, FAMILIES, H100).scales == {MODEL: 1.0}
    assert "H100" in pace(None, FAMILIES, H100).source
    assert pace(None, {MODEL: "sdxl"}, H100).scales == {}
    assert pace(None, {MODEL: "z_image", "model:s": "sdxl"}, H100).scales == {}


def test_a_compiled_run_has_the_figures_of_compiled_pictures_and_its_compiling_counts_as_loading() -> None:
    eager, compiled, fp8 = (
        pace(None, FAMILIES, H100, {MODEL: Tuning(compile=on, precision=precision, sizes=((1024, 1024),))})
        for on, precision in ((False, "bf16"), (True, "bf16"), (True, "fp8"))
    )
    assert eager == pace(None, FAMILIES, H100)
    assert "(eager, bfloat16)" in eager.source
    assert "(compiled, bfloat16)" in compiled.source
    assert "(compiled, fp8)" in fp8.source
    assert compiled.scales[MODEL] == pytest.approx(0.812 / 1.347)
    assert fp8.scales[MODEL] < compiled.scales[MODEL]
    assert compiled.load_seconds == eager.load_seconds + 43


def test_fp8_that_is_not_compiled_was_not_measured() -> None:
    assert pace(None, FAMILIES, H100, {MODEL: Tuning(precision="fp8")}) == Pace()


def test_an_unknown_device_has_no_seconds_and_says_how_to_get_them() -> None:
    found = pace(None, FAMILIES, "NVIDIA L4")
    result = estimate([ticket(number) for number in range(9)], workers=2, pace=found)
    assert result.seconds is None
    assert result.per_gpu == ()
    assert result.source == "no measurement for this device; run with --limit 8, then plan again in the same folder"
    assert {figures.seconds for figures in result.policies.values()} == {None}
    assert result.gpus_worth == 5  # nine equal tasks: two rounds on five as on eight


# --- the figures ------------------------------------------------------------------------------------------------------


def test_the_seconds_are_the_costs_at_the_pace_and_the_loading() -> None:
    result = estimate([ticket(number) for number in range(10)], workers=1, pace=known(scale=3.0, load=12.0))
    assert result.seconds == 12 + 10 * 2 * 3
    assert result.simulated == 10


def test_each_policy_has_its_switches_and_its_seconds() -> None:
    mixed = [ticket(number, "ab"[number % 2]) for number in range(20)]
    policies = estimate(mixed, workers=1, pace=known(switch=1.0)).policies
    assert list(policies) == ["dynamic", "static", "lockstep", "window"]
    assert policies["dynamic"].switches == (0, 2, 1)
    assert policies["static"].switches == (0, 20, 1)
    assert policies["dynamic"].seconds == 42
    assert policies["static"].seconds == 60


def test_the_time_is_that_of_the_policy_asked_for() -> None:
    mixed = [ticket(number, "ab"[number % 2]) for number in range(20)]
    assert estimate(mixed, workers=1, pace=known(switch=1.0), policy="static").seconds == 60


def test_loading_one_after_the_other_makes_many_gpus_not_worth_it() -> None:
    few = [ticket(number, cost=1.0) for number in range(20)]
    result = estimate(few, workers=1, pace=known(load=60.0), most=8)
    assert result.gpus_worth == 1
    assert [number for number, _ in result.per_gpu] == list(range(1, 9))
    many = [ticket(number, cost=100.0) for number in range(200)]
    assert estimate(many, workers=1, pace=known(load=60.0), most=4).gpus_worth == 4


def test_no_more_gpus_are_tried_than_there_are_or_than_there_are_tasks() -> None:
    tasks = [ticket(number) for number in range(5)]
    assert [number for number, _ in estimate(tasks, workers=1, pace=known(), most=2).per_gpu] == [1, 2]
    assert [number for number, _ in estimate(tasks, workers=1, pace=known()).per_gpu] == [1, 2, 3, 4, 5]


def test_no_tasks_take_no_time() -> None:
    result = estimate([], workers=2, pace=known(load=9.0))
    assert (result.seconds, result.gpus_worth, result.simulated) == (0.0, 0, 0)


def test_of_very_many_tasks_the_first_are_simulated_and_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    import imagemill.estimate as module

    monkeypatch.setattr(module, "SIMULATED", 100)
    monkeypatch.setattr(module, "TABLED", 50)
    result = estimate((ticket(number) for number in range(1000)), workers=4, pace=known(load=5.0))
    whole = sum(5.0 * number for number in range(1, 5)) / 4 + 1000 * 2 / 4
    assert result.simulated == 100
    assert result.seconds == pytest.approx(whole, rel=0.03)
    assert dict(result.per_gpu)[4] == pytest.approx(whole, rel=0.05)
    assert result.policies["static"].switches == (0, 0, 4)


def test_tasks_are_counted_by_model_adapters_shape_and_steps() -> None:
    tasks = [
        PlannedTask(Task(str(number), "p", steps=8 if number else 4), "f", ticket(number, "ab"[number > 3]))
        for number in range(6)
    ]
    assert groups(iter(tasks)) == (
        Group("z", "a", "64x64", 8, 3),
        Group("z", "b", "64x64", 8, 2),
        Group("z", "a", "64x64", 4, 1),
    )
