"""Planned tasks, and orders of them for a worker, as a driver gives them."""

from __future__ import annotations

from typing import Any

from imagemill.inputs import digest_file
from imagemill.plan import fingerprint
from imagemill.records import Lora, ModelSpec, PlannedTask, SinkSpec, Task, Ticket, WorkOrder

FAKE = ModelSpec(name="fake", folder="", runner="fake", family="fake", memory=7)
NOWHERE = SinkSpec("none")


def order_of(
    *tasks: PlannedTask, model: ModelSpec = FAKE, batch: int = 1, attempt: int = 1, sink: SinkSpec = NOWHERE
) -> WorkOrder:
    """A batch of the tasks, all in that attempt; its pictures are dropped where the sink does not say otherwise."""
    return WorkOrder(batch, model, sink, tasks, (attempt,) * len(tasks))


def fake_task(
    seq: int = 0, *, prompt: str = "p", steps: int = 1, loras: tuple[Lora, ...] = (), path: str = "", **script: Any
) -> PlannedTask:
    """A task of 16x16 pixels that the fake runner plays as scripted."""
    task = Task(
        id=str(seq),
        prompt=prompt,
        model="fake",
        width=16,
        height=16,
        steps=steps,
        seed=seq,
        loras=loras,
        output_path=path or f"pictures/{seq}.png",
        metadata={"fake": script},
    )
    return PlannedTask(task, fingerprint=f"{seq:064x}", ticket=Ticket(seq, needs=("model:fake",)))


def planned(task: Task, revision: str, seq: int = 0) -> PlannedTask:
    """The task for a model of that revision, with the fingerprint of what it says and of the pictures it names."""
    return PlannedTask(task, fingerprint(task, revision, [digest_file(path) for path in task.images]), Ticket(seq))
