"""What `imagemill plan` says of how a run is made fast, and what it calls what a task gives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imagemill import crew
from imagemill.config import Settings, merge
from imagemill.devices import GIB, Choice, Device
from imagemill.forecast import forecast
from imagemill.listing import forecast_text
from imagemill.models import Model
from imagemill.sitting import RunOptions

Plan = Callable[..., str]


def an_h100(settings: Settings, used: Sequence[Model], tasks: int | None) -> Choice:
    """One H100, where there is work for one."""
    device = Device("GPU 0", "cuda:0", "cuda:0", {}, 80 * GIB, 80 * GIB, "NVIDIA H100 80GB HBM3")
    return Choice((device,) * min(2, tasks or 2))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """The text of the plan of so many tasks of 512x512."""

    def text(count: int = 3, fields: dict[str, Any] | None = None, **given: Any) -> str:
        row = {"prompt": "an owl", "size": "512x512", **(fields or {})}
        source = tmp_path / "tasks.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for _ in range(count)), "utf-8")
        return forecast_text(forecast(str(source), tmp_path / "out", merge(Settings(), given), RunOptions()))

    return text


def test_a_short_run_says_what_compiling_would_save_and_take(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "choose", an_h100)
    text = plan(3, batch_size=1)
    assert "Speed of tiny" in text
    (line,) = (line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("  compiled"))
    assert re.fullmatch(r"no: saves a worker \S+ s and takes it 43 s, as measured on one H100", line)
    assert "(eager, bfloat16)" in text


def test_a_long_run_is_compiled_and_its_time_is_that_of_compiled_pictures(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "choose", an_h100)
    text = plan(1200, {"size": "1024x1024"}, dtype="bfloat16")
    assert "compiled    yes: saves a worker " in text
    assert "precision   bf16" in text
    assert "attention   auto" in text
    assert "(compiled, bfloat16)" in text


def test_a_plan_names_the_batch_of_every_size(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "choose", an_h100)
    assert "batch size  512x512: 2" in plan(3, batch_size=2)
    assert "batch size  512x512: 1" in plan(3, exact=True)


def test_on_the_cpu_nothing_is_said_of_precision_and_attention(plan: Plan) -> None:
    text = plan(2, **{"devices.device": "cpu"})
    assert "compiled    no: not done by itself on the CPU" in text
    assert "precision" not in text


def test_judgments_are_not_called_pictures(plan: Plan, tmp_path: Path) -> None:
    judged = plan(2, {"size": None}, model="judge:fake", **{"devices.device": "cpu"})
    assert "2 judgments, 2 to do" in judged
    assert "pictures" not in judged
    assert "Speed" not in judged
    assert "2 pictures, 2 to do" in plan(2, **{"devices.device": "cpu"})


def test_on_gpus_as_many_workers_load_at_once_as_main_memory_holds_and_on_the_cpu_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crew.host_memory, "free", lambda: 14 * GIB)
    gpu = an_h100(Settings(), (), None).devices[0]
    cpu = replace(gpu, torch_device="cpu", inline_device="cpu")

    def loads(device: Device, asked: int | None = None) -> int:
        settings = merge(Settings(), {"limits.parallel_loads": asked})
        return crew.limits(settings, (), Choice((device,) * 8)).parallel_loads

    assert (loads(gpu), loads(cpu)) == (3, 1)
    assert (loads(gpu, 2), loads(cpu, 2)) == (2, 2)
