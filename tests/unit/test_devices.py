"""Which devices a run takes, with a made-up NVIDIA driver."""

# ruff: noqa: N802 -- the names are those of NVML

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from imagemill import devices
from imagemill.devices import GIB, Gpu, choose, gpus, processes
from imagemill.errors import InputError

NEED = 20 * GIB
MIG = "MIG-77777777-aaaa"


class Nvml:
    """NVML with so many GPUs of 80 GiB. `free` are GiB; None is a GPU that is lost."""

    def __init__(self, free: list[float | None], init_error: int = 0, memory_error: int = 0) -> None:
        self.free, self.init_error, self.memory_error, self.open = free, init_error, memory_error, 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("NVMLError"):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:
        if self.init_error:
            raise pynvml.NVMLError(self.init_error)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13010

    def nvmlDeviceGetCount(self) -> int:
        return len(self.free)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if self.free[index] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid == MIG:
            return 0
        for index in range(len(self.free)):
            if uuid == self.nvmlDeviceGetUUID(index):
                return index
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}{handle}{handle}{handle}-bbbb"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        if self.memory_error:
            raise pynvml.NVMLError(self.memory_error)
        return SimpleNamespace(total=80 * GIB, free=int((self.free[handle] or 0) * GIB))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=4711, usedGpuMemory=3 * GIB), SimpleNamespace(pid=4712, usedGpuMemory=None)]


Install = Callable[..., Nvml]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a driver with these GPUs in, and a torch that can use them."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "torch_cuda", lambda: "13.0")
    monkeypatch.setattr(devices, "host_memory", lambda: (64 * GIB, 96 * GIB))

    def install(*free: float | None, **errors: int) -> Nvml:
        nvml = Nvml(list(free), **errors)
        monkeypatch.setattr(devices, "_nvml", lambda: nvml)
        return nvml

    return install


def labels(choice: devices.Choice) -> list[str]:
    return [device.label for device in choice.devices]


# --- what is there ----------------------------------------------------------------------------------------------------


def test_a_gpu_is_read_as_nvidia_smi_shows_it(machine: Install) -> None:
    nvml = machine(79, 12.1)
    name, uuid = "NVIDIA H100 80GB HBM3", "GPU-1111-bbbb"
    assert gpus()[1] == Gpu(1, uuid, name, total=80 * GIB, free=int(12.1 * GIB), driver="580.65.06")
    assert devices.driver_cuda() == "13.1"
    assert processes(gpus()[1]) == ((4711, 3 * GIB), (4712, 0))
    assert nvml.open == 0


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_a_machine_without_a_driver_has_no_gpus(machine: Install, error: int) -> None:
    machine(init_error=error)
    assert gpus() == ()
    assert devices.driver_cuda() == ""
    assert labels(choose()) == ["CPU 0"]


def test_a_driver_that_does_not_answer_is_an_error_and_not_a_machine_without_gpus(machine: Install) -> None:
    machine(79, init_error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    with pytest.raises(InputError, match="does not answer"):
        choose()
    assert labels(choose(device="cpu")) == ["CPU 0"]


def test_hidden_and_lost_gpus_count_as_installed_and_a_silent_driver_as_none(
    machine: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = machine(79, None, 79)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert (len(gpus()), devices.installed(), nvml.open) == (1, 3, 0)
    machine(79, init_error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    assert devices.installed() == 0
    machine(init_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    assert devices.installed() == 0


def test_one_lost_gpu_costs_that_gpu(machine: Install) -> None:
    machine(79, None, 79)
    choice = choose(need=NEED)
    assert labels(choice) == ["GPU 0", "GPU 2"]
    assert choice.left_out[0].startswith("GPU 1: does not answer")
    with pytest.raises(InputError, match="leave it out"):
        choose(gpu_ids=[1])


def test_a_gpu_without_memory_of_its_own_counts_that_of_the_machine(machine: Install) -> None:
    machine(0, memory_error=pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert (gpus()[0].free, gpus()[0].total) == (64 * GIB, 96 * GIB)


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        ("2,0", [2, 0]),
        ("GPU-1111-bbbb,2", [1, 2]),
        ("GPU-22", [2]),
        ("0,7,1", [0]),
        ("1,-1,2", [1]),
        ("", []),
        ("NoDevFiles", []),
        ("MIG-unknown", []),
    ],
)
def test_the_users_own_visible_devices_are_kept_in_their_order(
    machine: Install, monkeypatch: pytest.MonkeyPatch, variable: str, indices: list[int]
) -> None:
    machine(79, 79, 79)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert [gpu.index for gpu in gpus()] == indices


def test_a_mig_slice_is_taken_by_its_name(machine: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = machine(30)
    nvml.nvmlDeviceGetUUID = lambda handle: MIG  # type: ignore[method-assign]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", MIG)
    (device,) = choose(need=NEED).devices
    assert device.environment["CUDA_VISIBLE_DEVICES"] == MIG
    assert device.label == "GPU 0 (MIG-77777777)"


def test_the_cuda_version_of_torch_is_read_without_importing_it() -> None:
    code = "import sys; from imagemill import devices; print(devices.torch_cuda()); assert 'torch' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import torch

    assert ended.stdout.strip() == (torch.version.cuda or "")


@pytest.mark.parametrize(
    ("line", "version"),
    [("cuda: Optional[str] = None", ""), ("cuda: Optional[str] = '13.0'", "13.0"), ('cuda = "12.8"', "12.8")],
)
def test_both_builds_of_torch_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, version: str
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.11.0'\n{line}\nhip: Optional[str] = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert devices.torch_cuda() == version


def test_the_memory_of_this_machine_is_told() -> None:
    free, total = devices.host_memory()
    assert 0 < free <= total


# --- which of it a run takes ------------------------------------------------------------------------------------------


def test_auto_takes_every_gpu_that_holds_the_model_and_says_which_it_left_out(machine: Install) -> None:
    machine(79, 12.1, 20)
    choice = choose(need=NEED)
    assert labels(choice) == ["GPU 0", "GPU 2"]
    assert choice.left_out == ("GPU 1: 12.1 GiB free of 80.0, the model needs 20.0 GiB",)


def test_each_worker_sees_one_gpu_as_cuda_0(machine: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(79, 79, 79)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    first, second = choose().devices
    assert first.environment == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-2222-bbbb"}
    assert (first.label, first.torch_device, first.inline_device) == ("GPU 2", "cuda:0", "cuda:0")
    assert (second.label, second.torch_device, second.inline_device) == ("GPU 1", "cuda:0", "cuda:1")


def test_gpu_ids_count_inside_the_visible_devices(machine: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(79, 79, 79, 79)
    assert labels(choose(gpu_ids=[3, 1])) == ["GPU 3", "GPU 1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2")
    assert labels(choose(gpu_ids=[1])) == ["GPU 2"]
    with pytest.raises(InputError, match="there is no GPU 2; there are 0, 1"):
        choose(gpu_ids=[2])


def test_a_number_of_gpus_takes_the_first_that_hold_the_model(machine: Install) -> None:
    machine(5, 79, 79, 79)
    assert labels(choose(gpus=2, need=NEED)) == ["GPU 1", "GPU 2"]


def test_named_gpus_are_taken_even_when_short_of_memory_with_a_warning(machine: Install) -> None:
    machine(5, 79)
    choice = choose(gpu_ids=[0, 1], need=NEED)
    assert labels(choice) == ["GPU 0", "GPU 1"]
    assert choice.warnings == ("GPU 0: 5.0 GiB free of 80.0, the model needs 20.0 GiB",)


def test_never_more_devices_than_tasks(machine: Install) -> None:
    machine(79, 79, 79)
    assert labels(choose(tasks=2)) == ["GPU 0", "GPU 1"]
    assert labels(choose(tasks=0)) == []
    assert labels(choose(device="cpu", workers=4, tasks=3)) == ["CPU 0", "CPU 1", "CPU 2"]


def test_workers_cap_the_gpus_in_use(machine: Install) -> None:
    machine(79, 79, 79)
    assert labels(choose(workers=2)) == ["GPU 0", "GPU 1"]
    assert labels(choose(workers=1, gpu_ids=[2, 0])) == ["GPU 2"]


def test_cpu_workers_see_no_gpu(machine: Install) -> None:
    machine(79)
    first, second = choose(device="cpu", workers=2).devices
    assert (first.label, first.torch_device, first.inline_device) == ("CPU 0", "cpu", "cpu")
    assert first.environment == second.environment == {"CUDA_VISIBLE_DEVICES": ""}
    assert (first.free, first.total) == (64 * GIB, 96 * GIB)


def test_cpu_workers_that_fill_the_memory_are_warned_of(machine: Install) -> None:
    machine()
    assert choose(workers=3, need=NEED).warnings == ()
    assert choose(workers=4, need=NEED).warnings == ("4 workers need about 80.0 GiB, this machine has 64.0 GiB free",)


def test_a_cpu_build_of_torch_means_the_cpu_unless_gpus_were_asked_for(
    machine: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(79, 79)
    monkeypatch.setattr(devices, "torch_cuda", lambda: "")
    choice = choose()
    assert labels(choice) == ["CPU 0"]
    assert choice.warnings[0].startswith("2 GPUs are not used")
    asked: list[dict[str, Any]] = [{"device": "cuda"}, {"gpus": 1}, {"gpu_ids": [0]}]
    for how in asked:
        with pytest.raises(InputError, match="CPU build"):
            choose(**how)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpus": 5}, r"--gpus 5: there are only 4 \(GPU 0, GPU 1, GPU 2, GPU 3\)"),
        ({"gpus": 3, "need": NEED}, r"--gpus 3: 2 GPU of 4 can take the model \(GPU 0: 1\.0 GiB.*; GPU 3: 2\.0 GiB"),
        ({"need": 80 * GIB}, r"no GPU of 4 can take the model \(GPU 0: .*GPU 1: .*GPU 2: .*GPU 3: "),
        ({"gpu_ids": [0, 4]}, "there is no GPU 4; there are 0, 1, 2, 3"),
        ({"gpu_ids": [1, 1]}, "names 1 twice"),
        ({"gpu_ids": [0, 1], "gpus": 3}, "disagree"),
        ({"workers": 5}, "--workers 5 is more than the 4 GPUs in use; one worker a GPU"),
        ({"workers": 3, "need": NEED}, "--workers 3 is more than the 2 GPUs in use"),
        ({"device": "cpu", "gpus": 1}, "remove one of them"),
        ({"device": "cpu", "gpu_ids": [0]}, "remove one of them"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(machine: Install, asked: dict[str, Any], message: str) -> None:
    machine(1, 79, 79, 2)
    with pytest.raises(InputError, match=message) as caught:
        choose(**asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [{"device": "cuda"}, {"gpus": 1}, {"gpu_ids": [0]}])
def test_asking_for_a_gpu_where_there_is_none_does_not_fall_back_to_the_cpu(
    machine: Install, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    machine(79)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES hides all"):
        choose(**asked)


def test_gpus_and_gpu_ids_that_agree_are_fine(machine: Install) -> None:
    machine(79, 79)
    assert labels(choose(gpus=2, gpu_ids=[1, 0])) == ["GPU 1", "GPU 0"]
