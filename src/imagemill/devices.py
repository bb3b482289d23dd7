"""Which devices a run uses: the GPUs of this machine as NVML sees them, or the CPU. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from imagemill.errors import InputError

GIB = 2**30
CPU_BUILD = "the installed torch is a CPU build; install one for CUDA (https://pytorch.org/get-started/locally)"

Count: TypeAlias = Literal["auto"] | int | None
Places: TypeAlias = tuple[list[int], tuple[str, ...], tuple[str, ...]]
"""Places in the list of visible GPUs, which were left out, warnings."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one MIG slice that `CUDA_VISIBLE_DEVICES` names.

    `index` is the number that nvidia-smi shows. `total` and `free` are bytes, `driver` is the driver's version. `fault`
    says why it cannot be used; its memory then counts as 0.
    """

    index: int
    uuid: str
    name: str
    total: int
    free: int
    driver: str
    fault: str = ""

    @property
    def label(self) -> str:
        """What people read: `GPU 2`."""
        return f"GPU {self.index}" + (f" ({self.uuid[:12]})" if self.uuid.startswith("MIG-") else "")


@dataclass(frozen=True, slots=True)
class Device:
    """What one worker runs on.

    A worker process gets `environment`, which shows it one GPU, and uses `torch_device`. A worker inside this process
    uses `inline_device`; for a GPU that number counts as nvidia-smi does only if `CUDA_DEVICE_ORDER=PCI_BUS_ID` is set
    before CUDA starts; it is empty where there can be none (`spread.py`). `free` and `total` are bytes of the device's
    memory (for a CPU the machine's).
    """

    label: str
    torch_device: str
    inline_device: str
    environment: Mapping[str, str]
    free: int
    total: int
    name: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The devices of a run, which were left out and why, and what may go wrong all the same: one line each."""

    devices: tuple[Device, ...]
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _nvml() -> Any:
    import pynvml

    return pynvml


@contextmanager
def _session() -> Iterator[Any]:
    """NVML between its start and its end; `None` where there is no NVIDIA driver."""
    nvml = _nvml()
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
        yield None
        return
    except nvml.NVMLError as error:
        raise InputError(
            f"the NVIDIA driver does not answer ({error}); see what `nvidia-smi` says (after an update of the driver a "
            "restart helps), or use --device cpu"
        ) from error
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def gpus() -> tuple[Gpu, ...]:
    """The GPUs this process may use: all, or those of `CUDA_VISIBLE_DEVICES` in its order; empty without a driver.

    Like CUDA it stops reading that variable at the first entry that is no GPU. Raises `InputError` when there is a
    driver that does not answer.
    """
    with _session() as nvml:
        if nvml is None:
            return ()
        driver = nvml.nvmlSystemGetDriverVersion()
        everything = [_gpu(nvml, index, driver) for index in range(nvml.nvmlDeviceGetCount())]
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        if shown is None:
            return tuple(everything)
        chosen: list[Gpu] = []
        for entry in shown.split(","):
            gpu = _named(nvml, entry.strip(), everything, driver)
            if gpu is None:
                break
            chosen.append(gpu)
        return tuple(chosen)


def installed() -> int:
    """How many GPUs the machine shows, hidden ones and those of other processes counted in; 0 without a driver that answers."""
    try:
        with _session() as nvml:
            return int(nvml.nvmlDeviceGetCount()) if nvml is not None else 0
    except (InputError, _nvml().NVMLError):
        return 0


def processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu(nvml: Any, index: int, driver: str) -> Gpu:
    try:
        return _read(nvml, nvml.nvmlDeviceGetHandleByIndex(index), index, driver)
    except nvml.NVMLError as error:
        return Gpu(index, "", "unknown", 0, 0, driver, f"does not answer ({error})")


def _read(nvml: Any, handle: Any, index: int, driver: str) -> Gpu:
    uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        free, total = int(memory.free), int(memory.total)
    except nvml.NVMLError_NotSupported:
        free, total = host_memory()  # a GPU without memory of its own shares the machine's
    return Gpu(index, uuid, name, total, free, driver)


def _named(nvml: Any, entry: str, everything: Sequence[Gpu], driver: str) -> Gpu | None:
    """The GPU of one entry: its number, its UUID or the beginning of it, or the UUID of a MIG slice."""
    if re.fullmatch(r"\d+", entry, re.ASCII):
        return everything[int(entry)] if int(entry) < len(everything) else None
    if entry.startswith("GPU-"):
        return next((gpu for gpu in everything if gpu.uuid.startswith(entry)), None)
    if not entry.startswith("MIG-"):
        return None
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(entry)
        parent = nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle))
        return _read(nvml, handle, parent, driver)
    except nvml.NVMLError:
        return None  # no such slice, where CUDA stops reading too


def processes(gpu: Gpu) -> tuple[tuple[int, int], ...]:
    """(pid, bytes) of every process that computes on the GPU, as far as the driver tells; 0 for unknown bytes."""
    with _session() as nvml:
        if nvml is None or gpu.fault:
            return ()
        try:
            found = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(gpu.uuid))
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
            return ()
        return tuple((one.pid, one.usedGpuMemory or 0) for one in found)


def driver_cuda() -> str:
    """The newest CUDA version that the driver serves, such as `13.0`; empty without a driver."""
    with _session() as nvml:
        if nvml is None:
            return ""
        version = nvml.nvmlSystemGetCudaDriverVersion()
        return f"{version // 1000}.{version % 1000 // 10}"


def torch_cuda() -> str:
    """The CUDA version that the installed torch was built for; empty for a CPU build or without torch.

    Read from torch's `version.py`, since importing torch takes seconds.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    version = Path(spec.origin).with_name("version.py")
    found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", version.read_text("utf-8"), re.MULTILINE)
    return found[1] if found else ""


def host_memory() -> tuple[int, int]:
    """Bytes of main memory (free, total); on Linux within the limit of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    if (info := Path("/proc/meminfo")).is_file():
        free = int(re.findall(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.MULTILINE)[0]) * 1024
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        cache = re.findall(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        used = int((group / "memory.current").read_text()) - int(cache[0] if cache else 0)
        total, free = min(total, int(limit)), min(free, max(0, int(limit) - used))
    return free, total


def choose(
    *,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    gpus: Count = "auto",
    gpu_ids: Sequence[int] | None = None,
    workers: int | None = None,
    need: int = 0,
    tasks: int | None = None,
) -> Choice:
    """The devices for a run, one a worker, never more than `tasks`.

    `gpu_ids` count as torch does: they are places in `CUDA_VISIBLE_DEVICES` if that is set, else nvidia-smi's numbers.
    `need` is the model's need in bytes. Raises `InputError` when what was asked for is not there.
    """
    found = _machine() if device != "cpu" else ()
    if kind(device, gpus, gpu_ids) == "cpu":
        return _cpu(workers, need, tasks, (f"{len(found)} GPUs are not used: {CPU_BUILD}",) if found else ())
    places, left_out, warnings = _by_ids(found, gpu_ids, gpus, need) if gpu_ids else _by_memory(found, gpus, need)
    if workers is not None and workers > len(places):
        raise InputError(f"--workers {workers} is more than the {len(places)} GPUs in use; one worker a GPU")
    limit = min(len(places), workers or len(places), len(places) if tasks is None else tasks)
    return Choice(tuple(_cuda(found[place], place) for place in places[:limit]), left_out, warnings)


def kind(
    device: Literal["auto", "cuda", "cpu"] = "auto", gpus: Count = "auto", gpu_ids: Sequence[int] | None = None
) -> Literal["cuda", "cpu"]:
    """The kind of device that `choose` takes: `auto` is cuda when GPUs are asked for, or there and usable.

    Raises `InputError` when GPUs are asked for although the device is the CPU, or there is none to use.
    """
    asked = bool(gpu_ids) or isinstance(gpus, int)
    if device == "cpu" and asked:
        raise InputError("--gpus and --gpu-ids name GPUs, --device says cpu; remove one of them")
    if device == "cpu" or (device == "auto" and not asked and not (torch_cuda() and _machine())):
        return "cpu"
    _check_usable(_machine())
    return "cuda"


def _machine() -> tuple[Gpu, ...]:
    return gpus()


def _check_usable(found: Sequence[Gpu]) -> None:
    if not found:
        hidden = " (CUDA_VISIBLE_DEVICES hides all)" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
        raise InputError(f"there is no NVIDIA GPU here{hidden}; use --device cpu, or see `imagemill doctor`")
    if not torch_cuda():
        raise InputError(f"no GPU can be used: {CPU_BUILD}, or use --device cpu")


def _cuda(gpu: Gpu, place: int) -> Device:
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpu.uuid}
    return Device(gpu.label, "cuda:0", f"cuda:{place}", environment, gpu.free, gpu.total, gpu.name)


def _cpu(workers: int | None, need: int, tasks: int | None, warnings: tuple[str, ...] = ()) -> Choice:
    count = (workers or 1) if tasks is None else min(workers or 1, tasks)
    free, total = host_memory()
    if need * count > free:
        models = "the model needs" if count == 1 else f"{count} workers need"
        warnings += (f"{models} about {need * count / GIB:.1f} GiB, this machine has {free / GIB:.1f} GiB free",)
    # No GPU is shown to a CPU worker, so that nothing it imports takes memory there.
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    devices = (Device(f"CPU {number}", "cpu", "cpu", environment, free, total, "CPU") for number in range(count))
    return Choice(tuple(devices), warnings=warnings)


def _by_ids(found: Sequence[Gpu], ids: Sequence[int], count: Count, need: int) -> Places:
    """The named GPUs, whatever is free on them; what is short of memory is a warning."""
    if isinstance(count, int) and count != len(ids):
        raise InputError(f"--gpus {count} and --gpu-ids {','.join(map(str, ids))} disagree; keep one of them")
    if twice := sorted({one for one in ids if list(ids).count(one) > 1}):
        raise InputError(f"--gpu-ids names {twice[0]} twice; one worker a GPU")
    there = ", ".join(map(str, range(len(found))))
    for one in ids:
        if not 0 <= one < len(found):
            raise InputError(f"--gpu-ids: there is no GPU {one}; there are {there}")
        if found[one].fault:
            raise InputError(f"--gpu-ids: {_lack(found[one], need)}; leave it out")
    return list(ids), (), tuple(_lack(found[one], need) for one in ids if found[one].free < need)


def _by_memory(found: Sequence[Gpu], count: Count, need: int) -> Places:
    """The GPUs whose free memory holds the model: the first `count` of them, or all."""
    number = count if isinstance(count, int) else None
    if number is not None and number > len(found):
        raise InputError(f"--gpus {number}: there are only {len(found)} ({', '.join(gpu.label for gpu in found)})")
    good = [place for place, gpu in enumerate(found) if not gpu.fault and gpu.free >= need]
    lacking = tuple(_lack(gpu, need) for gpu in found if gpu.fault or gpu.free < need)
    if len(good) < (number or 1):
        asked = f"--gpus {number}: " if number else ""
        raise InputError(
            f"{asked}{len(good) or 'no'} GPU of {len(found)} can take the model ({'; '.join(lacking)}); "
            "free some, name GPUs with --gpu-ids, or use --device cpu"
        )
    return good[:number], lacking, ()


def _lack(gpu: Gpu, need: int) -> str:
    if gpu.fault:
        return f"{gpu.label}: {gpu.fault}"
    return f"{gpu.label}: {gpu.free / GIB:.1f} GiB free of {gpu.total / GIB:.1f}, the model needs {need / GIB:.1f} GiB"
