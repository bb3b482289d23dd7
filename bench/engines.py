"""How the rows of the benchmark are run: each in processes of its own, its log beside it, its pictures counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loops
import meter

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent

LOG_TAIL = 600
"""Characters of a failed row's log that are reported."""


class Unavailable(Exception):
    """The row has no meaning for this model."""


class Failed(Exception):
    """The row did not end well; the message is the end of its log."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row runs: its folder, the folder of its compile cache, device and number of GPUs, seconds it may take."""

    folder: Path
    cache: Path
    device: str
    gpus: int
    seconds: float

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with the sources found and the compile caches of the row's own."""
        paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "XDG_CACHE_HOME": str(self.cache),
        }
        return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


@dataclass(slots=True)
class Measured:
    """A run that ended well: when its command began, when each picture was written (ordered), what NVML saw, and when each
    worker had written its first batch."""

    begun: float
    written: list[float]
    samples: list[meter.Sample] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    openings: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """When every worker had written its first batch: before, some load, and the first batch's pictures are computed."""
        return max(self.openings, default=self.written[0])

    @property
    def images_per_second(self) -> float | None:
        """From the first batch (of the last worker to make one) to the last picture; None with none in between."""
        span = self.written[-1] - self.first
        return sum(moment > self.first for moment in self.written) / span if span > 0 else None

    @property
    def first_image_s(self) -> float:
        return self.written[0] - self.begun


Start = Callable[[Any], list[subprocess.Popen[bytes]]]


def measured(start: Start, place: Place, out: Path, expected: int) -> Measured:
    """Start the row's processes with their log, wait for them, and read when its pictures were written.

    A picture's time is its file's. Raises `Failed`.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    with place.log.open("ab") as log, meter.Meter(place.gpus if place.device == "cuda" else 0) as watch:
        begun = time.time()
        _wait(start(log), place)
    written = sorted(times(out).values())
    if len(written) != expected:
        raise Failed(f"{len(written)} of {expected} pictures were made: {tail(place.log)}")
    return Measured(begun, written, watch.samples)


def times(folder: Path) -> dict[str, float]:
    """When each picture below a folder was written, by its path in there; hidden ones are not yet pictures."""
    found = {path.relative_to(folder): path.stat().st_mtime for path in folder.rglob("*.png")}
    return {str(path): moment for path, moment in found.items() if not any(part[0] == "." for part in path.parts)}


def _wait(processes: Sequence[subprocess.Popen[bytes]], place: Place) -> None:
    """Until all ended well. Raises `Failed`, with none of them left, when one did not, or when the time is over."""
    deadline = time.monotonic() + place.seconds
    try:
        left = list(processes)
        while left:
            if any(process.poll() for process in left):
                raise Failed(
                    f"ended with exit code {next(p.returncode for p in left if p.returncode)}: {tail(place.log)}"
                )
            left = [process for process in left if process.returncode is None]
            if left and time.monotonic() > deadline:
                raise Failed(f"was ended after {place.seconds:.0f} s, when the time of the benchmark was over")
            if left:
                try:
                    left[0].wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
    finally:
        for process in processes:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and the session that it leads, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tail(log: Path) -> str:
    """The end of a log in one line."""
    return " ".join(log.read_text(errors="replace").split())[-LOG_TAIL:]


# --- the baselines ----------------------------------------------------------------------------------------------------


def loop(
    model: Path,
    jobs: Sequence[tuple[Path, int]],
    place: Place,
    *,
    compiled: bool = False,
    split: bool = False,
    backend: str = "inductor",
) -> Measured:
    """A baseline over jobs, each a task file and its number of tasks; the pictures of job n lie in `FOLDER/n`."""
    marks = place.folder / "marks"
    command = [sys.executable, str(BENCH / "loops.py"), "--model", str(model), "--marks", str(marks)]
    command += ["--device", place.device, *(["--compile", "--backend", backend] if compiled else [])]
    for number, (tasks, _) in enumerate(jobs):
        command += ["--job", str(tasks), str(place.folder / str(number))]
    processes = place.gpus if split else 1

    def start(log: Any) -> list[subprocess.Popen[bytes]]:
        if split:
            return loops.spawn_split([*command, "--split"], processes, place.environment, log)
        return [popen(command, place, log)]

    found = measured(start, place, place.folder, sum(count for _, count in jobs))
    read = [json.loads(marks.with_suffix(f".{rank}.json").read_text()) for rank in range(processes)]
    stages = ("started", "imported", "loaded", "warmed")
    found.details["start"] = {stage: round(read[0][stage] - found.begun, 2) for stage in stages if stage in read[0]}
    ranks = [[moment for job in mark["jobs"] for moment in job["written"]] for mark in read]
    found.openings = [min(times) for times in ranks if times]
    if "allocated" in read[0]:
        found.details["allocated_gib"] = round(max(mark["allocated"] for mark in read) / meter.GIB, 2)
    return found


def popen(command: Sequence[str], place: Place, log: Any) -> subprocess.Popen[bytes]:
    """Start a command of a row, in a session of its own, so that nothing of it is left."""
    return subprocess.Popen(
        command, env=place.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


# --- imagemill --------------------------------------------------------------------------------------------------------


def imagemill(model: str, tasks: Path, count: int, place: Place, extra: Sequence[str] = ()) -> Measured:
    """`imagemill run` over a task file; its pictures lie in `FOLDER/out`."""
    out = place.folder / "out"
    found = measured(lambda log: [popen(run_command(model, tasks, out, place, extra), place, log)], place, out, count)
    report = json.loads((out / "report.json").read_text())["runs"][-1]
    moments = times(out)
    found.openings = openings(out / "results.jsonl", moments)
    names = ("workers", "stats", "steady_pictures_per_second")
    found.details["report"] = {name: report[name] for name in names if name in report}
    for path in (*out.rglob("*trace*.json"), *out.rglob("*trace*.json.gz")):
        found.details["trace"] = str(path)
    return found


def openings(results: Path, moments: Mapping[str, float]) -> list[float]:
    """When each worker had written its first batch: its b-th picture in order of time, where `results.jsonl` says that its
    first was made in a batch of b."""
    found: dict[int, list[tuple[float, int]]] = {}
    for line in results.read_text("utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["worker"], []).append((moments[row["path"]], row["batch_size"]))
    ordered = [sorted(pictures) for pictures in found.values()]
    # A picture of the batch that failed may have been made again by another worker.
    return [pictures[min(pictures[0][1], len(pictures)) - 1][0] for pictures in ordered]


def run_command(model: str, tasks: Path, out: Path, place: Place, extra: Sequence[str]) -> list[str]:
    """The command line."""
    where = ["--gpus", str(place.gpus)] if place.device == "cuda" else ["--device", "cpu", "--workers", str(place.gpus)]
    command = [sys.executable, "-m", "imagemill.cli", "run", str(tasks), "--model", model, "--out", str(out)]
    return [*command, "--quiet", *where, *extra]


def options_for(*, compiled: bool, precision: str, traced: bool) -> list[str]:
    """Arguments of `imagemill run` for a row."""
    switch = "--compile" if compiled else "--no-compile"
    return [switch, "--precision", precision, *(["--trace"] if traced else [])]
