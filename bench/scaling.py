"""How pictures a second grow with the GPUs: imagemill and accelerate, cold and warm, equal tasks and mixed ones.

    python bench/throughput.py --scaling --gpus 1,4 --tasks 4,16,64 --cold 4 --loads equal,mixed --policies dynamic,lockstep

A run is one engine, number of GPUs, load and policy, in processes of its own. Its first job is cold: seconds count from the
command to the last picture, start of Python, imports and loading included. Its further jobs are warm: the workers have the
model, seconds count from handing the tasks over to the last picture. More numbers under `--cold` get a run each. Mixed
tasks have several sizes and 8 LoRAs in turn. A speed-up is over one GPU with the same engine, tasks, load and start, of the
same boot of one machine; policies make no difference there, so one GPU runs the first of them alone.

FILE is a list of {engine, gpus, tasks, start, load, policy, seconds, images_per_second, speed_up, commit, gpu, note}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import parti
import throughput
from engines import Failed

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One start of an engine; `jobs` are numbers of tasks, the first of them cold."""

    engine: str
    gpus: int
    load: str
    policy: str
    jobs: tuple[int, ...]

    @property
    def name(self) -> str:
        return "-".join((self.engine, str(self.gpus), self.load, self.policy.replace(":", ""), str(self.jobs[0])))


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """All runs of a command: few GPUs first, the plain load first. Only imagemill has policies."""
    first, *further = sorted(options.cold)
    for gpus in sorted(options.gpus):
        for load in options.loads:
            for engine in options.engines:
                policies = options.policies if engine == "imagemill" and gpus > 1 else options.policies[:1]
                for policy in policies:
                    policy = policy if engine == "imagemill" else "split"
                    yield Run(engine, gpus, load, policy, (first, *sorted(options.tasks)))
                    for count in further:
                        yield Run(engine, gpus, load, policy, (count,))


def run(options: argparse.Namespace) -> None:
    """Make every run that the minutes allow; print the table."""
    deadline = time.monotonic() + 60 * options.minutes
    model = throughput.ensure_model(options, options.model)
    facts = throughput.measure_facts(options, None, None)
    for one in runs(options):
        if time.monotonic() >= deadline:
            print(f"{one.name}: not started, the {options.minutes:g} minutes are over", flush=True)
            continue
        base = {"engine": one.engine, "gpus": one.gpus, "load": one.load, "policy": one.policy}
        base |= {"commit": options.commit, "gpu": facts["gpu"], "machine": throughput.boot(), "model": options.model}
        try:
            found = measure(options, model, one, deadline)
        except Failed as error:
            found = [{"tasks": one.jobs[0], "start": "cold", "seconds": None, "note": f"failed: {error}"}]
        entries = add(options.out, [base | entry for entry in found])
        print("\n".join(table(entries).splitlines()[-len(found) :]), flush=True)
    print(f"\n{table(read(options.out))}")


def measure(options: argparse.Namespace, model: Path, one: Run, deadline: float) -> list[Entry]:
    """The seconds of every job of a run. Raises `Failed`."""
    bench = throughput.Bench(options, model, {}, deadline)
    place = bench.place(f"scaling-{one.name}", f"scaling-{one.engine}", one.gpus)
    jobs = [(tasks_of(options, model, one.load, count), count) for count in one.jobs]
    if one.engine == "accelerate":
        found = engines.loop(model, jobs, place, split=True)
        ranks = [json.loads(path.read_text()) for path in sorted(place.folder.glob("marks.*.json"))]
        begun = [min(rank["jobs"][number]["begun"] for rank in ranks) for number in range(len(jobs))]
    else:
        command = command_of(options, model, one, jobs, place.folder)
        found = engines.measured(lambda log: [engines.popen(command, place, log)], place, place.folder, sum(one.jobs))
        begun = [job["begun"] for job in json.loads((place.folder / "marks.json").read_text())["jobs"]]
    moments = engines.times(place.folder)
    entries = []
    for number, count in enumerate(one.jobs):
        last = max(moment for path, moment in moments.items() if Path(path).parts[0] == str(number))
        seconds = last - (begun[number] if number else found.begun)
        entries.append(
            {"tasks": count, "start": "warm" if number else "cold", "seconds": round(seconds, 3), "note": ""}
        )
    return entries


def command_of(
    options: argparse.Namespace, model: Path, one: Run, jobs: Sequence[tuple[Path, int]], folder: Path
) -> list[str]:
    """imagemill on the jobs."""
    command = [sys.executable, str(engines.BENCH / "crew_jobs.py"), "--model", str(model), "--gpus", str(one.gpus)]
    command += ["--policy", one.policy, "--device", options.device, "--settings", options.settings]
    command += ["--marks", str(folder / "marks.json")]
    for number, (tasks, _) in enumerate(jobs):
        command += ["--job", str(tasks), str(folder / str(number))]
    return command


def tasks_of(options: argparse.Namespace, model: Path, load: str, count: int) -> Path:
    """The task file of a load."""
    rows = parti.rows(count, options.size, options.steps)
    if load == "mixed":
        rows = parti.with_loras(parti.mixed(rows, options.size), throughput.loras_of(options, model))
    return parti.write(options.work / "tasks" / f"scaling-{options.size}-{options.steps}-{load}-{count}.jsonl", rows)


# --- the figures ------------------------------------------------------------------------------------------------------


def rated(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with pictures a second and the speed-up over one GPU filled in, null where it was not measured."""
    same = ("engine", "tasks", "start", "load", "machine", "model")
    single = {tuple(one.get(key) for key in same): one["seconds"] for one in entries if one["gpus"] == 1}
    found = []
    for one in entries:
        seconds, alone = one["seconds"], single.get(tuple(one.get(key) for key in same))
        rate = round(one["tasks"] / seconds, 4) if seconds else None
        speed_up = round(alone / seconds, 3) if alone and seconds else None
        found.append(one | {"images_per_second": rate, "speed_up": speed_up})
    return found


def read(path: Path) -> list[Entry]:
    """The entries of a file, none if there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def add(path: Path, further: Sequence[Entry]) -> list[Entry]:
    """Append to the file; all of its entries."""
    entries = rated([*read(path), *further])
    path.write_text(json.dumps(entries, indent=1) + "\n")
    return entries


def table(entries: Sequence[Entry]) -> str:
    """A Markdown table, one line an entry."""
    lines = [
        "| engine | GPUs | tasks | workers | load | policy | seconds | pictures/s | over one GPU | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in entries:
        texts = [one[key] for key in ("engine", "gpus", "tasks", "start", "load", "policy")]
        figures = (
            (one["seconds"], "{:.1f}"),
            (one.get("images_per_second"), "{:.3f}"),
            (one.get("speed_up"), "{:.2f}"),
        )
        texts += ["–" if value is None else form.format(value) for value, form in figures]
        note = one.get("note", "").replace("|", "\\|")
        lines.append("| " + " | ".join(map(str, [*texts, note])) + " |")
    return "\n".join(lines)
