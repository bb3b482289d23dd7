"""imagemill over several jobs with the workers kept between them: what scaling.py measures as cold and warm.

    python bench/crew_jobs.py --model FOLDER --job TASKS.jsonl OUT [--job …] --marks FILE --gpus N [--policy dynamic]

The first job finds no worker (cold), the others find them with the model loaded (warm). A first job of few tasks may end
before the last worker has loaded, so in between tasks are run that nobody measures, until every worker has done one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROUNDS = 100
"""After so many rounds that a worker took no part in, it never will."""


def settle(engine: Any, tasks: str, folder: Path, gpus: int) -> None:
    """Run the tasks again, into folders that are hidden, until all workers did some."""
    seen: set[int] = set()
    rows = [json.loads(line) for line in Path(tasks).read_text("utf-8").splitlines()]
    rows = [row | {"id": f"{row['id']}-{copy}"} for copy in range(-(-2 * gpus // len(rows))) for row in rows]
    for number in range(ROUNDS):
        seen |= {outcome.worker for outcome in engine.run(rows, folder / str(number))}
        if len(seen) >= gpus:
            return
    sys.exit(f"only {len(seen)} of {gpus} workers do tasks")


def main() -> None:
    """Do every job, write the marks: `time.time()` at the start and at the end of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--job", nargs=2, action="append", required=True, metavar=("TASKS", "OUT"))
    parser.add_argument("--marks", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--policy", default="dynamic")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON")
    options = parser.parse_args()
    from imagemill import Engine

    where: dict[str, Any] = {"gpus": options.gpus}
    if options.device == "cpu":
        where = {"device": "cpu", "workers": options.gpus}
    jobs = []
    with Engine(model=options.model, schedule=options.policy, isolate=True, **where, **options.settings) as engine:
        for tasks, out in options.job:
            begun = time.time()
            bad = [outcome for outcome in engine.run(tasks, out) if not outcome.ok]
            if bad:
                sys.exit(f"{len(bad)} tasks failed, the first: {bad[0].kind}: {bad[0].message}")
            jobs.append({"out": out, "begun": begun, "ended": time.time()})
            if len(jobs) == 1 and len(options.job) > 1:
                settle(engine, tasks, Path(out).parent / ".settling", options.gpus)
    options.marks.write_text(json.dumps({"jobs": jobs}))


if __name__ == "__main__":
    main()
