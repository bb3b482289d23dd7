"""Run by hand on a machine with NVIDIA GPUs: `make gpu-test`. Takes about five minutes and 25 GiB of disk.

The full-size Z-Image pipeline with random weights makes 16 pictures of 1024² with two LoRAs, on one GPU and on two
where there are two. Checked: each worker sees one GPU as cuda:0; both do work; pixels are equal; after the run, after
ctrl-C and after SIGKILL of the driver no process is left and the GPU's memory is what it was before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from imagemill import devices

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
SLACK = 64 * 2**20
"""Bytes by which a GPU's used memory may differ before and after: the driver's own bookkeeping."""

COMMAND = [sys.executable, "-m", "imagemill.cli", "run"]


def used() -> list[int]:
    """Bytes in use on each GPU."""
    return [gpu.total - gpu.free for gpu in devices.gpus()]


def check(what: str, holds: bool) -> None:
    """Print the line of one claim; stop at the first that does not hold."""
    print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)
    if not holds:
        sys.exit(1)


def descendants(pid: int) -> list[int]:
    """Processes whose session was started by a child of `pid`, or whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def gone(pids: list[int], seconds: float) -> bool:
    """Whether none of the processes is there any more, waiting at most so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = []
        for pid in pids:
            try:
                state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != "Z":
                alive.append(pid)
        if not alive:
            return True
        time.sleep(0.2)
    return False


def memory_is_back(before: list[int], seconds: float = 20.0) -> bool:
    """Whether every GPU's memory comes back to what it was."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(now <= then + SLACK for now, then in zip(used(), before, strict=True)):
            return True
        time.sleep(0.5)
    print("used before", before, "now", used())
    return False


def digests(folder: Path) -> dict[str, str]:
    """The pixels of every picture as a hash."""
    return {
        path.name: hashlib.sha256(Image.open(path).convert("RGB").tobytes()).hexdigest()
        for path in folder.glob("*.png")
    }


def run(arguments: list[str], log: Path) -> float:
    """Run the command to its end and return its seconds; what it prints goes to the log."""
    started = time.monotonic()
    with log.open("a") as out:
        code = subprocess.run([*COMMAND, *arguments], stdout=out, stderr=subprocess.STDOUT).returncode
    seconds = time.monotonic() - started
    if code != 0:
        print(log.read_text()[-3000:])
    check(f"`imagemill run {' '.join(arguments[1:])}` ends with exit code 0 ({seconds:.1f} s)", code == 0)
    return seconds


def started_and_working(arguments: list[str], log: Path, out: Path) -> subprocess.Popen[bytes]:
    """The command in the background, once it has made its first picture."""
    process = subprocess.Popen([*COMMAND, *arguments], stdout=log.open("a"), stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and not list(out.glob("*.png")):
        time.sleep(0.2)
    check("a run in the background makes pictures", bool(list(out.glob("*.png"))))
    return process


def report_of(folder: Path) -> None:
    """Print what the report says of time."""
    data = json.loads((folder / "report.json").read_text())
    print("    " + json.dumps(data["runs"][-1], default=str)[:900])


def main() -> None:
    """Build the model, then make every claim."""
    import models

    gpus = devices.gpus()
    check(f"there is a GPU: {', '.join(gpu.name for gpu in gpus)}", bool(gpus))
    base = Path(os.environ.get("IMAGEMILL_GPU_SCRATCH") or tempfile.mkdtemp(prefix="imagemill-gpu-"))
    folder, log = base / "z-image", base / "log.txt"
    begun = time.monotonic()
    if not folder.exists():
        # In a process of its own, so that this one holds no GPU memory.
        subprocess.run([sys.executable, str(ROOT / "bench" / "models.py"), "z-image", str(folder)], check=True)
    for number in (1, 2):
        models.lora(base / f"look-{number}.safetensors", folder, seed=number)
    print(f"    model and LoRAs written in {time.monotonic() - begun:.0f} s", flush=True)
    source = base / "tasks.jsonl"
    prompts = [f"picture {number} of a harbour with boats, fog and a lighthouse" for number in range(16)]
    rows = [
        {"prompt": prompt, "lora_path": str(base / f"look-{1 + number % 2}.safetensors")}
        for number, prompt in enumerate(prompts)
    ]
    source.write_text("\n".join(map(json.dumps, rows)) + "\n")
    before = used()
    try:
        claims(source, folder, base, log, len(gpus), before)
    finally:
        shutil.rmtree(base / "z-image", ignore_errors=not os.environ.get("IMAGEMILL_GPU_SCRATCH"))


def claims(source: Path, folder: Path, base: Path, log: Path, count: int, before: list[int]) -> None:
    """Everything that must hold."""
    options = [str(source), "--model", str(folder), "--quiet"]
    run([*options, "--gpus", "1", "--out", str(base / "inline")], log)
    check("16 pictures of 1024x1024", len(digests(base / "inline")) == 16)
    report_of(base / "inline")
    check("after the run the GPU's memory is what it was before", memory_is_back(before))
    several = min(2, count)
    isolated = base / "processes"
    run([*options, "--gpus", str(several), "--isolate", "--out", str(isolated)], log)
    report_of(isolated)
    check(
        f"pixels are equal inside the process and on {several} GPU(s) in processes",
        digests(isolated) == digests(base / "inline"),
    )
    results = [json.loads(line) for line in (isolated / "results.jsonl").read_text().splitlines()]
    check(f"each of {several} worker(s) did work", {row["worker"] for row in results} == set(range(several)))
    for number in range(several):
        text = (isolated / "logs" / f"worker-{number}.log").read_text()
        check(f"worker {number} sees one GPU as cuda:0", "cuda:0 is" in text and "1 device is visible" in text)
    check("after the run no GPU memory is left", memory_is_back(before))
    check("two LoRAs give two looks", len(set(digests(isolated).values())) == 16)
    for name, sends in (("ctrl-C", signal.SIGINT), ("SIGKILL", signal.SIGKILL)):
        out = base / name
        process = started_and_working([*options, "--gpus", str(several), "--isolate", "--out", str(out)], log, out)
        workers = descendants(process.pid)
        process.send_signal(sends)
        code = process.wait(120)
        # One more than workers: their keeper.
        check(f"{name}: the driver ends ({code}), it had workers", code in (130, -9) and len(workers) == several + 1)
        check(f"{name}: no process is left after 5 s", gone(workers, 5.0))
        check(f"{name}: the GPU's memory is what it was before", memory_is_back(before))
    run([*options, "--gpus", str(several), "--out", str(base / "SIGKILL")], log)
    check(
        "the killed run, started again, ends with the pixels of an unbroken one",
        digests(base / "SIGKILL") == digests(base / "inline"),
    )


if __name__ == "__main__":
    main()
