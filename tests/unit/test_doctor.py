"""What the doctor finds, with made-up machines."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import CacheNotFound

from imagemill import devices, doctor
from imagemill.devices import GIB, Gpu
from imagemill.doctor import Diagnosis, examine
from imagemill.errors import InputError

GOOD = Gpu(0, "GPU-a", "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, "580.65")


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with one good GPU on which nothing is wrong."""
    monkeypatch.setattr(devices, "gpus", lambda: (GOOD,))
    monkeypatch.setattr(devices, "driver_cuda", lambda: "13.0")
    monkeypatch.setattr(devices, "torch_cuda", lambda: "13.0")
    monkeypatch.setattr(devices, "processes", lambda gpu: ((4711, 30 * GIB),))
    monkeypatch.setattr(devices, "host_memory", lambda: (64 * GIB, 96 * GIB))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=500 * GIB, total=900 * GIB))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (4096, 4096))
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", no_cache)
    monkeypatch.setattr(
        doctor, "version", lambda name: {"torch": "2.11.0+cu130", "torchvision": "0.26.0"}.get(name, "1")
    )
    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy", "torch==2.11.0", 'scipy ; extra == "scipy"'])
    trial(monkeypatch, json.dumps([True, {"0": ""}]))
    return monkeypatch


def no_cache() -> Any:
    raise CacheNotFound("none", "/nowhere")


def trial(patch: pytest.MonkeyPatch, output: str, code: int = 0, error: str = "") -> None:
    """What torch says when it tries the GPUs."""
    ended = subprocess.CompletedProcess([], code, output, error)
    patch.setattr(doctor.subprocess, "run", lambda *_, **__: ended)


def only_problem(diagnosis: Diagnosis) -> str:
    (problem,) = diagnosis.problems
    assert "\n" not in problem
    return problem


def test_a_healthy_machine_has_facts_and_no_problems(healthy: pytest.MonkeyPatch) -> None:
    diagnosis = examine()
    facts = dict(diagnosis.facts)
    assert diagnosis.problems == ()
    assert facts["GPU 0"] == "NVIDIA H100 80GB HBM3, 79.0 GiB free of 80.0, processes: 4711 (30.0 GiB)"
    assert facts["NVIDIA driver"] == "580.65 (CUDA up to 13.0)"
    assert facts["torch"] == "2.11.0+cu130 (CUDA 13.0)"
    assert facts["torch on GPUs"] == "1 of 1 multiply matrices"
    assert facts["Memory"] == "64.0 GiB free of 96.0"
    assert facts["Cached models"] == "none"


def test_this_machine_can_be_examined_and_torch_stays_out() -> None:
    code = (
        "import sys; from imagemill.doctor import examine; print(len(examine(cuda_trial=False).facts));"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ended.stdout) > 10


def test_a_gpu_with_a_cpu_build_of_torch_is_a_problem(healthy: pytest.MonkeyPatch) -> None:
    healthy.setattr(devices, "torch_cuda", lambda: "")
    assert "CPU build" in only_problem(examine())


def test_a_driver_older_than_torch_is_a_problem(healthy: pytest.MonkeyPatch) -> None:
    healthy.setattr(devices, "driver_cuda", lambda: "12.8")
    assert "update the driver" in only_problem(examine())


def test_a_driver_with_another_minor_version_is_none(healthy: pytest.MonkeyPatch) -> None:
    healthy.setattr(devices, "torch_cuda", lambda: "13.2")
    assert examine().problems == ()


def test_a_driver_that_does_not_answer_is_a_problem_and_the_rest_is_still_told(healthy: pytest.MonkeyPatch) -> None:
    def fail() -> Sequence[Gpu]:
        raise InputError("the NVIDIA driver does not answer; restart")

    healthy.setattr(devices, "gpus", fail)
    diagnosis = examine()
    assert "does not answer" in only_problem(diagnosis)
    assert "torch" in dict(diagnosis.facts)


def test_a_machine_without_gpus_has_no_problem_for_it(healthy: pytest.MonkeyPatch) -> None:
    healthy.setattr(devices, "gpus", lambda: ())
    healthy.setattr(devices, "driver_cuda", lambda: "")
    diagnosis = examine()
    assert diagnosis.problems == ()
    assert dict(diagnosis.facts)["NVIDIA driver"] == "none"


def test_a_taken_gpu_names_who_takes_it(healthy: pytest.MonkeyPatch) -> None:
    taken = Gpu(1, "GPU-b", "NVIDIA H100", 80 * GIB, 20 * GIB, "580.65")
    healthy.setattr(devices, "gpus", lambda: (taken,))
    assert only_problem(examine()).startswith("GPU 1 has only 20.0 GiB free of 80.0; end what uses it (4711")


def test_a_lost_gpu_is_a_problem(healthy: pytest.MonkeyPatch) -> None:
    healthy.setattr(devices, "gpus", lambda: (Gpu(0, "", "unknown", 0, 0, "580.65", "does not answer (lost)"),))
    assert "GPU 0 does not answer (lost); leave it out" in only_problem(examine())


@pytest.mark.parametrize(
    ("output", "code", "error", "part"),
    [
        (json.dumps([True, {"0": "no kernel image"}]), 0, "", "GPU 0 does not compute (no kernel image)"),
        (json.dumps([False, {}]), 0, "", "torch sees 0 of the 1 GPUs"),
        ("", 1, "Traceback\nImportError: libcudart", "ImportError: libcudart"),
        ("", -11, "", "exit code -11"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_a_problem(
    healthy: pytest.MonkeyPatch, output: str, code: int, error: str, part: str
) -> None:
    trial(healthy, output, code, error)
    assert part in only_problem(examine())
    assert examine(cuda_trial=False).problems == ()


def test_a_driver_that_hangs_is_given_up_on(healthy: pytest.MonkeyPatch) -> None:
    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("python", 300)

    healthy.setattr(doctor.subprocess, "run", hang)
    assert "did not answer within" in only_problem(examine())


def test_the_trial_is_a_program_that_runs_without_a_gpu() -> None:
    ended = subprocess.run([sys.executable, "-c", doctor.TRIAL], capture_output=True, text=True, check=True)
    available, results = json.loads(ended.stdout)
    assert available or results == {}


def test_little_memory_disk_or_file_handles_are_problems(healthy: pytest.MonkeyPatch) -> None:
    healthy.setattr(devices, "host_memory", lambda: (2 * GIB, 96 * GIB))
    healthy.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 * GIB, total=900 * GIB))
    healthy.setattr(resource, "getrlimit", lambda which: (256, 4096))
    memory, disk, handles = examine().problems
    assert "2.0 GiB of memory" in memory
    assert "1.0 GiB of disk" in disk
    assert "`ulimit -n 4096`" in handles


def test_a_torchvision_for_another_torch_is_a_problem(healthy: pytest.MonkeyPatch) -> None:
    healthy.setattr(doctor, "requires", lambda name: ["torch==2.13.0"])
    assert "torchvision 0.26.0 is built for torch 2.13.0, not 2.11.0+cu130" in only_problem(examine())


def test_a_package_that_is_missing_is_a_problem(healthy: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("peft", "torchvision"):
            raise PackageNotFoundError(name)
        return "1"

    healthy.setattr(doctor, "version", version)
    assert "pip install peft" in only_problem(examine())


def test_cached_known_models_are_listed_and_a_damaged_cache_is_a_problem(healthy: pytest.MonkeyPatch) -> None:
    repos = [SimpleNamespace(repo_id=name, size_on_disk=20 * GIB) for name in ("Tongyi-MAI/Z-Image-Turbo", "a/b")]
    cache = SimpleNamespace(repos=repos, warnings=[ValueError("broken\nlink")])
    healthy.setattr(huggingface_hub, "scan_cache_dir", lambda: cache)
    diagnosis = examine()
    assert dict(diagnosis.facts)["Cached models"] == "z-image-turbo (20.0 GiB)"
    assert "broken link" in only_problem(diagnosis)
