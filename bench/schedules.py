"""What each schedule costs: 270 tasks of one kind on 6 workers, by simulation with the real scheduler.

    python bench/schedules.py [--tasks 270] [--workers 6] [--seconds 23] [--runs 20]

Prints a Markdown table. Every task takes `--seconds`, times a factor drawn for it from a normal distribution whose
standard deviation is the noise; the rows with a slow GPU have one that takes 5 % longer for every task. Loading is left
out. Figures are means over `--runs` draws; nothing depends on the machine.
"""

from __future__ import annotations

import argparse
import random
import statistics

from imagemill.records import Ticket
from imagemill.simulate import Simulation, World, simulate

SCHEDULES = (("dynamic", 1), ("static", 1), ("lockstep", 1), ("window", 1), ("window", 4))
WORLDS = (
    ("0 %", 0.0, 1.0),
    ("1 %", 0.01, 1.0),
    ("5 %", 0.05, 1.0),
    ("20 %", 0.2, 1.0),
    ("1 %, a slow GPU", 0.01, 1.05),
)
LEAST = 0.1
"""No factor is drawn below this."""


def draw(tasks: int, noise: float, seed: int) -> list[float]:
    """One factor a task."""
    dice = random.Random(seed)
    return [max(LEAST, dice.gauss(1.0, noise)) for _ in range(tasks)]


def run(policy: str, lead: int, factors: list[float], workers: int, seconds: float, slow: float) -> Simulation:
    """One simulated run; the scheduler believes that all tasks cost the same."""
    tickets = [Ticket(seq, ("model:m", "adapters:-", "shape:1"), "g", seconds) for seq in range(len(factors))]
    world = World(seconds=lambda ticket, worker: seconds * factors[ticket.seq] * (slow if worker == 0 else 1.0))
    return simulate(tickets, workers, policy, lead, world=world)


def row(policy: str, lead: int, noise: float, slow: float, options: argparse.Namespace) -> tuple[float, float, int]:
    """Mean makespan in seconds, mean share of worker time spent idle, largest lead in tasks."""
    found = [
        run(policy, lead, draw(options.tasks, noise, seed), options.workers, options.seconds, slow)
        for seed in range(options.runs if noise else 1)
    ]
    idle = statistics.fmean(sum(one.idle) / (one.makespan * options.workers) for one in found)
    return statistics.fmean(one.makespan for one in found), idle, max(one.largest_lead for one in found)


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=270)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=23.0)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    print("| noise | schedule | makespan | over the best | idle | largest lead |")
    print("|---|---|---|---|---|---|")
    for title, noise, slow in WORLDS:
        rows = {(policy, lead): row(policy, lead, noise, slow, options) for policy, lead in SCHEDULES}
        best = min(makespan for makespan, _, _ in rows.values())
        for (policy, lead), (makespan, idle, largest) in rows.items():
            name = f"{policy}:{lead}" if policy == "window" else policy
            over = f"{makespan / best - 1:.1%}"
            print(f"| {title} | `{name}` | {makespan:.0f} s | {over} | {idle:.1%} | {largest} |")


if __name__ == "__main__":
    main()
