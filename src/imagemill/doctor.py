"""What this machine has, and what is wrong with it."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from imagemill import devices
from imagemill.devices import GIB, Gpu
from imagemill.errors import InputError
from imagemill.models import KNOWN

PACKAGES = ("diffusers", "transformers", "peft", "safetensors", "accelerate", "huggingface_hub", "nvidia-ml-py")
NEEDED = ("torch", *PACKAGES)

LEAST_MEMORY = 4 * GIB
LEAST_DISK = 10 * GIB
LEAST_HANDLES = 1024
BUSY = 0.1
"""A GPU of which more than this share is taken before we start is worth a word."""

TRIAL_SECONDS = 300
TRIAL = """\
import json, torch
found = {}
for place in range(torch.cuda.device_count()):
    try:
        one = torch.ones(64, 64, device=f"cuda:{place}")
        found[place] = "" if float((one @ one).sum()) == 64.0**3 else "computes wrong"
    except Exception as error:
        found[place] = " ".join(str(error).split())[:300]
print(json.dumps([torch.cuda.is_available(), found]))
"""
"""Tried in a process of its own: torch is heavy, and a broken driver may hang or crash whoever asks it."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`facts` are (name, value) in the order to show them; `problems` are lines: what is wrong, and what mends it."""

    facts: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]


def examine(*, cuda_trial: bool = True) -> Diagnosis:
    """Look at the machine; changes nothing. With `cuda_trial` each GPU multiplies two matrices, which takes seconds."""
    facts: list[tuple[str, str]] = []
    problems: list[str] = []
    for part in (_machine(), _gpus(cuda_trial), _packages(), _hub()):
        for name, value in part:
            if name:
                facts.append((name, value))
            else:
                problems.append(value)
    return Diagnosis(tuple(facts), tuple(problems))


# Each part yields (name, value), or ("", problem).


def _machine() -> Iterator[tuple[str, str]]:
    free, total = devices.host_memory()
    disk = shutil.disk_usage(Path.cwd())
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "System", platform.platform()
    yield "CPU cores", str(devices.processors())
    yield "Memory", f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    yield "Disk here", f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} ({Path.cwd()})"
    yield "Open files", "unlimited" if handles == resource.RLIM_INFINITY else str(handles)
    if free < LEAST_MEMORY:
        yield "", f"only {free / GIB:.1f} GiB of memory are free: loading a model needs more; end other programs"
    if disk.free < LEAST_DISK:
        yield "", f"only {disk.free / GIB:.1f} GiB of disk are free here; free some, or choose another --out"
    if handles != resource.RLIM_INFINITY and handles < LEAST_HANDLES:
        yield "", f"only {handles} open files are allowed; raise it with `ulimit -n 4096`"


def _gpus(cuda_trial: bool) -> Iterator[tuple[str, str]]:
    try:
        found, serves = devices.gpus(), devices.driver_cuda()
    except InputError as error:
        yield "", str(error)
        return
    built = devices.torch_cuda()
    yield "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    yield "NVIDIA driver", f"{found[0].driver if found else 'present'} (CUDA up to {serves})" if serves else "none"
    if not found:
        yield "GPUs", "none that this process may use"
    for gpu in found:
        yield from _gpu(gpu)
    if found and not built:
        yield "", f"there are {len(found)} GPUs, but {devices.CPU_BUILD}"
    elif found and int(built.split(".")[0]) > int(serves.split(".")[0]):
        yield "", f"torch is built for CUDA {built}, the driver serves up to {serves}; update the driver"
    elif found and cuda_trial:
        yield from _trial(found)


def _gpu(gpu: Gpu) -> Iterator[tuple[str, str]]:
    if gpu.fault:
        yield gpu.label, gpu.fault
        yield "", f"{gpu.label} {gpu.fault}; leave it out with --gpu-ids, see `nvidia-smi` and the system's log"
        return
    taken = ", ".join(f"{pid} ({used / GIB:.1f} GiB)" for pid, used in devices.processes(gpu))
    memory = f"{gpu.free / GIB:.1f} GiB free of {gpu.total / GIB:.1f}"
    yield gpu.label, f"{gpu.name}, {memory}, processes: {taken or 'none seen'}"
    if gpu.total - gpu.free > BUSY * gpu.total:
        yield "", f"{gpu.label} has only {memory}; end what uses it ({taken or 'not seen from here'}) or leave it out"


def _trial(found: tuple[Gpu, ...]) -> Iterator[tuple[str, str]]:
    """Whether torch can use each GPU."""
    environment = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    command = [sys.executable, "-c", TRIAL]
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        yield "", f"torch did not answer within {TRIAL_SECONDS} s when it tried the GPUs; see `nvidia-smi`"
        return
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        yield "", f"torch cannot try the GPUs ({last[:300]}); reinstall it for CUDA"
        return
    available, results = json.loads(ended.stdout.splitlines()[-1])
    if not available or len(results) < len(found):
        yield "", f"torch sees {len(results)} of the {len(found)} GPUs; check CUDA_VISIBLE_DEVICES and the driver"
    for place, message in results.items():
        if message:
            yield "", f"{found[int(place)].label} does not compute ({message}); leave it out with --gpu-ids"
    good = sum(not message for message in results.values())
    yield "torch on GPUs", f"{good} of {len(found)} multiply matrices"


def _packages() -> Iterator[tuple[str, str]]:
    built = devices.torch_cuda()
    for name in NEEDED:
        installed = _version(name)
        yield name, (installed or "not installed") + (f" (CUDA {built or 'none'})" if name == "torch" else "")
        if not installed:
            yield "", f"{name} is not installed; run `pip install {name}`"
    torch, vision = _version("torch"), _version("torchvision")
    if vision:
        yield "torchvision", vision
        wanted = [
            match[1] for line in requires("torchvision") or [] if (match := re.match(r"torch\s*\(?==([\d.]+)", line))
        ]
        if torch and wanted and torch.partition("+")[0] != wanted[0]:
            yield "", f"torchvision {vision} is built for torch {wanted[0]}, not {torch}; install the two that match"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _hub() -> Iterator[tuple[str, str]]:
    if not _version("huggingface_hub"):
        return
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    yield "HF_HOME", constants.HF_HOME + (" (offline)" if constants.HF_HUB_OFFLINE else "")
    try:
        cache: Any = scan_cache_dir()
    except CacheNotFound:
        yield "Cached models", "none"
        return
    names = {model.repo.lower(): model.name for model in KNOWN.values() if model.repo}
    cached = [
        f"{names[repo.repo_id.lower()]} ({repo.size_on_disk / GIB:.1f} GiB)"
        for repo in cache.repos
        if repo.repo_id.lower() in names
    ]
    yield "Cached models", ", ".join(sorted(cached)) or "none of the known ones"
    for warning in cache.warnings:
        yield "", f"the model cache is damaged ({' '.join(str(warning).split())[:200]}); download that model again"
