"""How long a run would take, and how many GPUs are worth using: the figures of `imagemill plan`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from imagemill import tuning_choice
from imagemill.ledger import FILE_NAME, Ledger
from imagemill.records import PlannedTask, Ticket, Tuning
from imagemill.schedule import Limits
from imagemill.simulate import Simulation, World, simulate

LEAST_PICTURES = 4
"""Measurements of fewer pictures than this say nothing."""
RECENT = 1000
"""How many of the last pictures of a model are looked at."""
WORTH = 1.1
"""A number of GPUs is worth using when fewer would take more than this times the best time."""
MOST_GPUS = 8
"""Up to how many GPUs are tried where none are known."""
SIMULATED = 10_000
TABLED = 1_000
"""Of more tickets than this the first so many are simulated, for the whole and for each number of GPUs."""
EFFORT = 400_000
"""Fewer than that when needs differ much, since a decision looks at each kind of ticket: tickets times kinds."""
LEAST_SIMULATED = 300

H100_LOAD = 27.0
"""Seconds on one H100: importing torch and diffusers 15 on a fresh machine, 20.7 GB at the measured 1.7 GB/s cold."""
ADAPTER_SWITCH = 0.4
"""Seconds on one H100: a rank-32 LoRA of 134 MiB loads in 0.38 and is put on in 0.013."""

PRECISIONS = {"bf16": "bfloat16", "fp8": "fp8"}
POLICIES = ("dynamic", "static", "lockstep", "window")

MEASURED = (
    "SELECT json_extract(t.needs, '$[0]') AS model, (a.ended - a.started) / a.batch_size / t.cost AS pace "
    "FROM attempts a JOIN tasks t ON t.id = a.id AND t.attempts = a.attempt "
    "WHERE t.state = 'done' AND a.kind IS NULL AND a.ended > a.started AND t.cost > 0 "
    "AND a.run = (SELECT max(run) FROM attempts WHERE id = a.id) ORDER BY a.ended DESC LIMIT 10000"
)
LOADS = "SELECT ended - started AS seconds FROM spans WHERE what = 'load' AND ended > started"


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks that are alike: `model`, `adapters` and `shape` are the needs of their tickets without the prefix."""

    model: str
    adapters: str
    shape: str
    steps: int
    tasks: int


@dataclass(frozen=True, slots=True)
class Pace:
    """What a unit of a ticket's cost takes, in seconds, for each model (the first need); empty when nobody knows.

    `load_seconds` is one model's loading, `adapter_seconds` one switch of adapters. `source` says where it comes from.
    """

    scales: Mapping[str, float] = field(default_factory=dict)
    load_seconds: float = 0.0
    adapter_seconds: float = 0.0
    source: str = "no measurement for this device; run with --limit 8, then plan again in the same folder"


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """What a policy would do: batches that switch the model, the adapters and the shape, and its seconds if known."""

    switches: tuple[int, ...]
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """The figures. `seconds` (loading included) is None when nobody knows; `source` says where it is from, or why not.

    `gpus_worth` is the smallest number whose time is within a tenth of the best; `per_gpu` lists (number, seconds) and
    is empty when the seconds are not known. `simulated` is how many tickets the figures rest on; with fewer than there
    are, the rest is taken to be like them.
    """

    seconds: float | None
    source: str
    policies: Mapping[str, PolicyFigures]
    gpus_worth: int
    per_gpu: tuple[tuple[int, float], ...]
    simulated: int


def groups(tasks: Iterable[PlannedTask]) -> tuple[Group, ...]:
    """The tasks counted by model, adapters, shape and steps, the largest group first. Reads them one by one."""
    counted = Counter((*_names(task.ticket), task.task.steps or 0) for task in tasks)
    return tuple(
        Group(*key, tasks=number) for key, number in sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    )


def _names(ticket: Ticket) -> tuple[str, str, str]:
    model, adapters, shape = (need.partition(":")[2] for need in ticket.needs)
    return model, adapters, shape


def pace(
    folder: Path | None, families: Mapping[str, str], device: str, tunings: Mapping[str, Tuning] | None = None
) -> Pace:
    """The best source there is: this folder's ledger, else the figures measured on an H100, else none.

    `families` maps the first need of every ticket (`model:NAME`) to the name of its family, `tunings` to how it will be
    made fast, `device` is the name of the device as the driver tells it.
    """
    found = measured(folder, frozenset(families)) if folder else None
    if found:
        return found
    if "H100" in device and set(families.values()) == {"z_image"}:
        return _of_h100(families, device, tunings or {})
    return Pace()


def _of_h100(families: Mapping[str, str], device: str, tunings: Mapping[str, Tuning]) -> Pace:
    """The measured figures; none for fp8 that is not compiled, which was not measured."""
    own = {model: tunings.get(model, Tuning()) for model in families}
    if any(tuning.precision != "bf16" and not tuning.compile for tuning in own.values()):
        return Pace()
    scales = {
        model: tuning_choice.compiled_share(tuning.precision) if tuning.compile else 1.0
        for model, tuning in own.items()
    }
    kinds = {f"{'compiled' if one.compile else 'eager'}, {PRECISIONS[one.precision]}" for one in own.values()}
    load = H100_LOAD + max(tuning_choice.compile_seconds(tuning) for tuning in own.values())
    source = f"the measured figures of one H100 for this family ({'; '.join(sorted(kinds))}); this device is {device}"
    return Pace(scales, load, ADAPTER_SWITCH, source)


def measured(folder: Path, models: frozenset[str]) -> Pace | None:
    """What earlier runs in the folder took: the median of seconds by cost. None with too few pictures of a model."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    ledger = Ledger(path, read_only=True)
    try:
        paces: dict[str, list[float]] = {model: [] for model in models}
        for row in ledger.rows(MEASURED):
            of_model = paces.get(row["model"])
            if of_model is not None and len(of_model) < RECENT:
                of_model.append(row["pace"])
        loads = [row["seconds"] for row in ledger.rows(LOADS)]
    finally:
        ledger.close()
    if not paces or min(map(len, paces.values())) < LEAST_PICTURES:
        return None
    number = sum(map(len, paces.values()))
    # The time of a switch is part of what was measured, spread over the pictures.
    return Pace(
        {model: statistics.median(values) for model, values in paces.items()},
        statistics.median(loads) if loads else 0.0,
        source=f"measured here: {number} pictures of an earlier run in {folder}",
    )


def estimate(
    tickets: Iterable[Ticket],
    *,
    workers: int,
    pace: Pace,
    policy: str = "dynamic",
    lead: int = 1,
    limits: Limits | None = None,
    most: int | None = None,
) -> Estimate:
    """The figures for these tickets on `workers` workers under the policy. Without tickets everything is zero.

    `most` is the largest number of GPUs to try: those there are, or None to try up to 8.
    """
    source = iter(tickets)
    first = list(islice(source, SIMULATED))
    total = len(first) + sum(1 for _ in source)
    kinds = len({(ticket.needs, ticket.group) for ticket in first})
    first = first[: max(LEAST_SIMULATED, EFFORT // max(1, kinds))]
    if not first:
        return Estimate(0.0, pace.source, {name: PolicyFigures((), 0.0) for name in POLICIES}, 0, (), 0)
    bench = _Bench(first, total, pace, lead, limits or Limits())
    policies = {name: bench.policy(name, workers) for name in POLICIES}
    table = bench.table(policy, most or MOST_GPUS)
    best = min(seconds for _, seconds in table)
    worth = next(number for number, seconds in table if seconds <= WORTH * best)
    return Estimate(policies[policy].seconds, pace.source, policies, worth, table if bench.known else (), len(first))


@dataclass(frozen=True, slots=True)
class _Bench:
    """Simulations of one set of tickets, scaled up to all there are."""

    tickets: Sequence[Ticket]
    total: int
    pace: Pace
    lead: int
    limits: Limits

    @property
    def known(self) -> bool:
        """Whether there is a pace for every model."""
        return all(ticket.needs[0] in self.pace.scales for ticket in self.tickets)

    def policy(self, name: str, workers: int) -> PolicyFigures:
        result = self._simulate(self.tickets, name, workers)
        scale = self.total / len(self.tickets)
        cold = [min(number, workers) for number in result.switches]  # each worker's first, however many tasks follow
        switches = tuple(
            first + round((number - first) * scale) for first, number in zip(cold, result.switches, strict=True)
        )
        return PolicyFigures(switches, self._scaled(result, scale) if self.known else None)

    def table(self, policy: str, most: int) -> tuple[tuple[int, float], ...]:
        """(workers, seconds) for 1 to `most` workers, no more than there are tasks."""
        tickets = self.tickets[:TABLED]
        scale = self.total / len(tickets)
        numbers = range(1, min(most, self.total) + 1)
        return tuple((number, self._scaled(self._simulate(tickets, policy, number), scale)) for number in numbers)

    def _simulate(self, tickets: Sequence[Ticket], policy: str, workers: int) -> Simulation:
        scales = self.pace.scales if self.known else {}
        model = tickets[0].needs[0]
        world = World(
            seconds=lambda ticket, _: ticket.cost * scales.get(ticket.needs[0], 1.0),
            load_seconds=self.pace.load_seconds if self.known else 0.0,
            switch_seconds=(self.pace.load_seconds, self.pace.adapter_seconds) if self.known else (),
            resident=frozenset({model, "adapters:-"}),
        )
        read_ahead = max(self.limits.read_ahead, workers)
        return simulate(tickets, workers, policy, self.lead, replace(self.limits, read_ahead=read_ahead), world)

    def _scaled(self, result: Simulation, scale: float) -> float:
        """Loading is done once, the rest as often as there are tickets.

        Workers that load one after the other start, on average, half way through the loading.
        """
        workers, at_once = len(result.dispatched), self.limits.parallel_loads
        loads = statistics.fmean(number // at_once + 1 for number in range(workers))
        start = min(max(result.first_start, loads * self.pace.load_seconds if self.known else 0.0), result.makespan)
        return start + (result.makespan - start) * scale
