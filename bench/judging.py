"""The judge stage: answers a second of a Qwen2.5-VL of the 7 B size, one task at a time and batched.

    python bench/throughput.py --judge --tasks 48 --tokens 128 --out FILE.json

Each task shows a source and its edit and asks a question of mixed length; weights are random, so an answer runs to
`--tokens`. The rate counts from the first task's start to the last one's end, without loading, by the run's ledger.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import time
from pathlib import Path

import engines
import meter
import parti
import scorecard
import throughput
from engines import Failed, Measured

SIZES = {"judge-single": 1, "judge-batched": None}
"""Rows and their `judge.batch_size`; null takes what fits into memory."""

MODEL = "qwen2.5-vl-7b"
SYSTEM = "You judge edits of pictures. Answer with a score from 0 to 10 and one sentence."


def run(options: argparse.Namespace) -> None:
    """Both rows, and their ratio."""
    deadline = time.monotonic() + 60 * options.minutes
    options.model = MODEL
    model = throughput.ensure_model(options, MODEL)
    bench = throughput.Bench(options, model, throughput.measure_facts(options, None, None), deadline)
    tasks = questions(options)
    rates: dict[str, float] = {}
    for row, batch in SIZES.items():
        if bench.left() <= 0:
            print(f"{row}: not started, the {options.minutes:g} minutes are over", flush=True)
            continue
        try:
            found = measure(bench, model, tasks, row, batch)
        except Failed as error:
            figures = throughput.common(bench, row, 1)
            log = bench.work / "rows" / f"{MODEL}-{options.size}-{row}-1" / "log.txt"
            throughput.keep(bench, scorecard.entry(**figures, note=f"failed: {error}"), log)
            continue
        rates[row] = found.details["rate"]
        single = rates.get("judge-single")
        over = "" if single is None or row == "judge-single" else f"{rates[row] / single:.2f} times one at a time"
        throughput.keep(bench, entry_of(bench, row, found, over))
    print(f"\n{scorecard.table(bench.done)}")


def questions(options: argparse.Namespace) -> Path:
    """The judge's tasks: the edit first, then the source."""
    pictures = parti.pictures(options.work / "sources", options.size)
    rows = [
        {
            "id": f"{number:04d}",
            "prompt": f"The second picture was to be changed so: {prompt}. The first is the result. How good is it?",
            "system_prompt": SYSTEM,
            "images": [str(pictures[(number + 1) % len(pictures)]), str(pictures[number % len(pictures)])],
        }
        for number, prompt in enumerate(parti.prompts(options.tasks))
    ]
    return parti.write(options.work / "tasks" / f"judge-{options.size}-{options.tasks}.jsonl", rows)


def measure(bench: throughput.Bench, model: Path, tasks: Path, row: str, batch: int | None) -> Measured:
    """One row. Raises `Failed`, also for tasks without an answer."""
    place = bench.place(row, "judge", 1)
    settings = place.folder / "judge.yaml"
    settings.write_text(json.dumps({"judge": {"batch_size": batch, "max_new_tokens": bench.options.tokens}}))
    out = place.folder / "out"
    command = engines.run_command(f"judge:vlm:{model}", tasks, out, place, ["--config", str(settings), "--trace"])
    found = engines.measured(lambda log: [engines.popen(command, place, log)], place, out, 0)
    results = [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]
    answered = [result for result in results if result["state"] == "done"]
    if len(answered) != bench.options.tasks:
        raise Failed(f"{len(answered)} of {bench.options.tasks} tasks have an answer: {engines.tail(place.log)}")
    first, last = span(out / "ledger.sqlite")
    found.written = [first, last]
    found.details |= {
        "rate": len(answered) / (last - first),
        "tokens": sum(result["answer"]["tokens"] for result in answered),
        "batch_sizes": sorted({result["batch_size"] for result in answered}),
        "seconds": round(last - first, 3),
        "stages": stages(out / "trace.json"),
    }
    return found


def stages(trace: Path) -> dict[str, float]:
    """Seconds by stage, added up: `prepare` over its threads, the others over the batches."""
    found: dict[str, float] = {}
    for event in json.loads(trace.read_text("utf-8")):
        if event["ph"] == "X":
            found[event["name"]] = found.get(event["name"], 0.0) + event["dur"] / 1e6
    return {name: round(seconds, 3) for name, seconds in found.items()}


def span(ledger: Path) -> tuple[float, float]:
    """When the first attempt began and the last ended."""
    with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as connection:
        first, last = connection.execute("SELECT min(started), max(ended) FROM attempts").fetchone()
    connection.close()
    return first, last


def entry_of(bench: throughput.Bench, row: str, found: Measured, note: str) -> scorecard.Entry:
    """The figures of a row: its pictures a second are answers a second."""
    first, last = found.written
    idle = meter.idle_share(found.samples, first, last)
    return scorecard.entry(
        **throughput.common(bench, row, 1),
        images_per_second=throughput.rounded(found.details["rate"]),
        first_image_s=throughput.rounded(first - found.begun, 2),
        peak_gib=throughput.rounded(meter.peak_gib(found.samples), 2),
        gpu_idle_share=throughput.rounded(idle),
        note=note,
        details=found.details | throughput.base_details(bench),
    )
