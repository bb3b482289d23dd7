"""What the scheduler would make of several GPUs, by simulation with figures measured on one.

    python bench/scaling_simulated.py [--gpus 2,4,8] [--tasks 4,16,64,256] [--seconds 0.787] [--start 22]

The real scheduler runs under virtual time, as `imagemill plan` does it; what GPUs of one host take from each other (disk, host
memory, CPUs, PCIe) is not in it, so these are bounds and no measurements. Equal tasks are pictures of 1024x1024 that take
`--seconds`, times a factor drawn for each (standard deviation `--noise`); mixed ones have several sizes and 8 adapters in
turn, each switch of which takes `--switch` seconds. Cold workers are ready after `--start` seconds, all at once. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import parti
from arguments import numbers
from schedules import draw

from imagemill.families.z_image import forward_teraflop
from imagemill.records import Ticket
from imagemill.schedule import Limits
from imagemill.simulate import World, simulate

SIDE, LORAS = 1024, 8
POLICIES = ("dynamic", "lockstep")


def tickets(count: int, load: str, seconds: float) -> list[Ticket]:
    """The tasks of `scaling.py` as the scheduler knows them."""
    rows = parti.rows(count, SIDE, 8)
    if load == "mixed":
        rows = parti.mixed(rows, SIDE)
    found = []
    for number, row in enumerate(rows):
        width, height = row["width"], row["height"]
        adapter = f"lora {number % LORAS}" if load == "mixed" else "-"
        needs = ("model:m", f"adapters:{adapter}", f"shape:{width}x{height}")
        cost = seconds * forward_teraflop(width * height) / forward_teraflop(SIDE**2)
        found.append(Ticket(number, needs, f"{width}x{height}", cost))
    return found


def makespan(tasks: Sequence[Ticket], gpus: int, policy: str, start: float, options: argparse.Namespace) -> float:
    """Seconds from the start of the run to the last picture."""
    factors = draw(len(tasks), options.noise, seed=len(tasks))
    world = World(
        seconds=lambda ticket, worker: ticket.cost * factors[ticket.seq],
        load_seconds=start,
        switch_seconds=(0.0, options.switch, 0.0),
        resident=frozenset({"model:m", "adapters:-"}),
    )
    return simulate(tasks, gpus, policy, limits=Limits(parallel_loads=gpus), world=world).makespan


def table(options: argparse.Namespace) -> str:
    """How many times one GPU, warm and cold."""
    lines = [
        "| load | tasks | policy | "
        + " | ".join(f"{gpus} GPUs warm | {gpus} GPUs cold" for gpus in options.gpus)
        + " |",
        "|---" * (3 + 2 * len(options.gpus)) + "|",
    ]
    for load in ("equal", "mixed"):
        for count in options.tasks:
            tasks = tickets(count, load, options.seconds)
            alone = {start: makespan(tasks, 1, "dynamic", start, options) for start in (0.0, options.start)}
            for policy in POLICIES:
                cells = [
                    f"{alone[start] / makespan(tasks, gpus, policy, start, options):.2f}"
                    for gpus in options.gpus
                    for start in (0.0, options.start)
                ]
                lines.append("| " + " | ".join([load, str(count), policy, *cells]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="2,4,8", help="numbers of GPUs, with commas between them")
    parser.add_argument("--tasks", default="4,16,64,256")
    parser.add_argument("--seconds", type=float, default=0.787, help="of a picture of 1024x1024")
    parser.add_argument("--noise", type=float, default=0.01)
    parser.add_argument("--switch", type=float, default=0.057, help="seconds of a change of adapters")
    parser.add_argument("--start", type=float, default=22.0, help="seconds until a cold worker is ready")
    options = parser.parse_args(arguments)
    options.gpus = numbers(parser, "--gpus", options.gpus)
    options.tasks = numbers(parser, "--tasks", options.tasks)
    print(table(options))


if __name__ == "__main__":
    main()
