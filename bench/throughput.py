"""Pictures a second: plain diffusers loops, accelerate and imagemill side by side, on one machine in one command.

    python bench/throughput.py --rows a,d,f,w --model z-image --size 1024 --gpus 1 --tasks 48 --out FILE.json
    python bench/throughput.py --scaling --gpus 1,4 --tasks 4,16,64 --out FILE.json     (see scaling.py)
    python bench/throughput.py --judge --out FILE.json                                  (see judging.py)
    python bench/throughput.py --table FILE.json                                        (Markdown from the figures)

    a  diffusers loop, one process, default settings     d  imagemill bf16        f  imagemill bf16, 8 LoRAs interleaved
    b  the same, repeated blocks and VAE compiled        e  imagemill fp8         w  imagemill bf16, compile cache of d
    c  accelerate's split_between_processes, all GPUs

Models have their full size and random weights; the first command on a machine builds them. Every row runs in processes of
its own. A row that fails is reported with its error, one whose option is missing as not available; the others go on. FILE
is a list in the form of docs/benchmarks.json, written after every row and appended to by later commands; ratios are taken
only between rows of one boot of one machine.

pictures/s      from the end of the first batch to the last picture, by the times of the files; on several GPUs from the
                moment when each has written its first batch
of the ceiling  counted operations of all stages (operations.py) over the matrix ceiling measured first (ceiling.py)
first picture   seconds from the command to the first file; the page cache is warm, since the model was just written or read
peak            the most GPU memory in use by all processes of a GPU together, by NVML
GPU idle        in the same time: 1 - mean NVML utilisation, or the trace's, from a GPU's first decode on, where NVML gives
                no samples (a lower bound: `encode` counts as busy while the host prepares pictures, every stage from its
                first launch on); `details` says which, and holds both
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engines
import meter
import models
import parti
import scorecard
import traces
from arguments import arguments_of
from engines import Failed, Measured, Place, Unavailable

ON_ALL_GPUS = "cdefw"
LORAS = 8
WARM_TASKS = 4
"""Row w asks only for the first picture; a few more let it settle."""

GRACE = 30.0
"""Seconds that a row may run on after `--minutes`."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One command: its options, where the model is, the ceiling of one GPU, operations of a picture, and the clock."""

    options: argparse.Namespace
    model: Path
    facts: dict[str, Any]
    deadline: float
    done: list[scorecard.Entry] = field(default_factory=list)

    @property
    def work(self) -> Path:
        folder: Path = self.options.work
        return folder

    def left(self) -> float:
        """Seconds until no row may start."""
        return self.deadline - time.monotonic()

    def place(self, name: str, cache: str, gpus: int) -> Place:
        """A fresh folder for a row; the compile cache is kept from one row to the next of the same name."""
        options = self.options
        stem = f"{options.model}-{options.size}"
        folder = self.work / "rows" / f"{stem}-{name}-{gpus}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return Place(folder, self.work / "cache" / f"{stem}-{cache}", options.device, gpus, self.left() + GRACE)


# --- before the rows --------------------------------------------------------------------------------------------------


def ensure_model(options: argparse.Namespace, name: str) -> Path:
    """The folder of the model, built in a process of its own where it is not there. Exits when the disk has no room."""
    folder: Path = options.work / ("small" if options.small else "full") / name
    if (folder / ".complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free, need = shutil.disk_usage(folder).free / meter.GIB, 0.1 if options.small else models.DISK_GIB[name]
    if free < need:
        sys.exit(
            f"{folder} needs {need:.0f} GiB and {free:.0f} are free; remove other models, or name a place by --work"
        )
    begun = time.monotonic()
    command = [sys.executable, str(engines.BENCH / "models.py"), name, str(folder), "--device", options.device]
    place = Place(folder, folder, options.device, 1, 0)
    subprocess.run([*command, *(["--small"] if options.small else [])], check=True, env=place.environment)
    (folder / ".complete").touch()
    print(f"{name} built in {time.monotonic() - begun:.0f} s: {folder}", flush=True)
    return folder


def measure_facts(options: argparse.Namespace, model: Path | None, tasks: Path | None) -> dict[str, Any]:
    """The ceiling and the operations of a picture, each in a process of its own, side by side: one needs the GPU, one a CPU."""
    env = Place(options.work, options.work, options.device, 1, 0).environment
    counting = None
    if model is not None:
        counting = subprocess.Popen(
            [sys.executable, str(engines.BENCH / "operations.py"), str(model), str(tasks)],
            env=env | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
    side = str(256 if options.device == "cpu" else 8192)
    command = [sys.executable, str(engines.BENCH / "ceiling.py"), "--device", options.device, "--side", side]
    facts: dict[str, Any] = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
    facts["tflops"] = round(facts.pop("operations_per_second") / 1e12, 1 if options.device == "cuda" else 6)
    if counting is not None:
        printed, _ = counting.communicate()
        if counting.returncode:
            sys.exit("operations.py failed")
        facts["tflop_a_picture"] = {stage: count / 1e12 for stage, count in json.loads(printed).items()}
    print(json.dumps(facts), flush=True)
    return facts


def boot() -> str:
    """A name of this boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


# --- the rows ---------------------------------------------------------------------------------------------------------


def task_files(options: argparse.Namespace, model: Path) -> dict[str, Path]:
    """The tasks of the rows: plain, with LoRAs, and the few of row w."""
    folder = options.work / "tasks"
    stem = f"{options.model}-{options.size}-{options.tasks}-{options.steps}"
    if options.model == "qwen-image-edit":
        sources = parti.pictures(options.work / "sources", options.size)
        rows = parti.edits(options.tasks, options.size, options.steps, sources)
    else:
        rows = parti.rows(options.tasks, options.size, options.steps)
    found = {
        "plain": parti.write(folder / f"{stem}.jsonl", rows),
        "few": parti.write(folder / f"{stem}-few.jsonl", rows[:WARM_TASKS]),
    }
    if "f" in options.rows:
        found["loras"] = parti.write(folder / f"{stem}-loras.jsonl", parti.with_loras(rows, loras_of(options, model)))
    return found


def loras_of(options: argparse.Namespace, model: Path) -> list[Path]:
    """The LoRAs of the model, made where they are not there."""
    folder: Path = options.work / f"loras-{model.parent.name}-{model.name}"
    return models.loras(folder, model, LORAS, rank=4 if options.small else 32)


def run_row(bench: Bench, row: str, gpus: int, files: dict[str, Path]) -> Measured:
    """Run one row. Raises `Failed` or `Unavailable`."""
    options, count = bench.options, bench.options.tasks
    if row in "abc":
        place = bench.place(row, row, gpus)
        how = {"compiled": row == "b", "split": row == "c", "backend": options.backend}
        return engines.loop(bench.model, [(files["plain"], count)], place, **how)
    if row == "e" and options.device == "cpu":
        raise Unavailable("not available: fp8 needs a GPU")
    if row == "e" and find_spec("torchao") is None:
        raise Unavailable("not available: fp8 needs torchao (pip install 'imagemill[fp8]')")
    precision = "fp8" if row == "e" else "bf16"
    place = bench.place(row, precision, gpus)
    extra = engines.options_for(compiled=not options.eager, precision=precision, traced=not options.no_trace)
    extra += options.imagemill.split()
    if row == "w":
        count = min(WARM_TASKS, count)
    tasks = files[{"f": "loras", "w": "few"}.get(row, "plain")]
    found = engines.imagemill(str(bench.model), tasks, count, place, extra)
    found.details["arguments"] = extra
    return found


def entry_of(bench: Bench, row: str, gpus: int, found: Measured) -> scorecard.Entry:
    """The figures of a row."""
    rate, facts, details = found.images_per_second, bench.facts, dict(found.details)
    if row == "w":
        rate = None  # too few pictures to speak of a steady state
    operations = sum(facts["tflop_a_picture"].values())
    by_nvml = meter.idle_share(found.samples, found.first, found.written[-1])
    by_trace = None
    if "trace" in details:
        by_trace = traces.idle(traces.events_of(Path(details["trace"])))
    idle = by_nvml if by_nvml is not None else by_trace
    details |= {
        "idle_from": "nvml" if by_nvml is not None else "trace" if by_trace is not None else None,
        "idle_by_nvml": rounded(by_nvml),
        "idle_by_trace": rounded(by_trace),
        "samples": len(found.samples),
        "seconds_first_to_last": rounded(found.written[-1] - found.first),
        "pictures": len(found.written),
    }
    return scorecard.entry(
        **common(bench, row, gpus),
        images_per_second=rounded(rate),
        share_of_ceiling=rounded(rate and rate * operations / (gpus * facts["tflops"])),
        first_image_s=rounded(found.first_image_s, 2),
        peak_gib=rounded(meter.peak_gib(found.samples), 2),
        gpu_idle_share=rounded(idle),
        details=details | base_details(bench),
    )


def common(bench: Bench, row: str, gpus: int) -> dict[str, Any]:
    """What every entry says of its row."""
    options = bench.options
    return {
        "row": row,
        "model": options.model,
        "size": options.size,
        "gpus": gpus,
        "commit": options.commit,
        "gpu": bench.facts["gpu"],
    }


def base_details(bench: Bench) -> dict[str, Any]:
    """What every entry says of the whole command."""
    options = bench.options
    return {
        "machine": boot(),
        "steps": options.steps,
        "small": options.small,
        "tasks": options.tasks,
        "ceiling_tflops": bench.facts["tflops"],
        "tflop_a_picture": bench.facts.get("tflop_a_picture"),
    }


def rounded(value: float | None, places: int = 4) -> float | None:
    """None stays None."""
    return None if value is None else round(value, places)


def keep(bench: Bench, one: scorecard.Entry, log: Path | None = None) -> None:
    """Write an entry down, and print it; a failed row's log is kept beside the figures."""
    entries = scorecard.add(bench.options.out, one)
    bench.done.append(entries[-1])
    print(scorecard.table([entries[-1]]).splitlines()[-1], flush=True)
    start = one["details"].get("start") or one["details"].get("report", {}).get("workers")
    if start:
        print(f"    start: {json.dumps(start)}", flush=True)
    if log is not None and log.exists():
        print(log.read_text(errors="replace")[-3000:], flush=True)


def rows_of(bench: Bench, files: dict[str, Path]) -> None:
    """All rows of the command, for every number of GPUs; those of one GPU once."""
    options = bench.options
    for count in options.gpus:
        for row in options.rows:
            if row not in ON_ALL_GPUS and count != options.gpus[0]:
                continue
            gpus = count if row in ON_ALL_GPUS else 1
            figures = common(bench, row, gpus)
            if bench.left() <= 0:
                print(f"({row}) on {gpus}: not started, the {options.minutes:g} minutes are over", flush=True)
                continue
            try:
                found = run_row(bench, row, gpus, files)
            except Unavailable as error:
                keep(bench, scorecard.entry(**figures, note=str(error), details=base_details(bench)))
            except Failed as error:
                log = bench.work / "rows" / f"{options.model}-{options.size}-{row}-{gpus}" / "log.txt"
                keep(bench, scorecard.entry(**figures, note=f"failed: {error}", details=base_details(bench)), log)
            else:
                keep(bench, entry_of(bench, row, gpus, found))
                keep_trace(options, row, gpus, found)


def keep_trace(options: argparse.Namespace, row: str, gpus: int, found: Measured) -> None:
    """The trace beside the figures, since the row's folder goes with the machine."""
    if "trace" in found.details:
        path = Path(found.details["trace"])
        suffix = "".join(path.suffixes)
        shutil.copy(path, options.out.parent / f"trace-{options.model}-{options.size}-{row}-{gpus}{suffix}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, and print the table."""
    options = arguments_of(__doc__ or "", arguments)
    if options.table:
        print(scorecard.table(scorecard.read(options.table)))
        return
    if options.scaling:
        import scaling

        scaling.run(options)
        return
    if options.judge:
        import judging

        judging.run(options)
        return
    deadline = time.monotonic() + 60 * options.minutes
    model = ensure_model(options, options.model)
    files = task_files(options, model)
    bench = Bench(options, model, measure_facts(options, model, files["plain"]), deadline)
    rows_of(bench, files)
    print(f"\n{scorecard.table(scorecard.read(options.out)[-len(bench.done) :] if bench.done else ())}")


if __name__ == "__main__":
    main()
