"""The order in which workers get tasks. A policy looks at the board and proposes; the scheduler does the rest.

`dynamic`   an idle worker takes what fits what it holds, the longest first
`static`    task i goes to worker i mod N, in order
`lockstep`  rounds of N tasks, one a worker; the next round starts when the last has ended everywhere
`window:K`  dynamic, but no worker is ever more than K tasks ahead of the slowest
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from imagemill.backlog import Backlog, Bucket, Entry
from imagemill.worker_state import Worker


@dataclass(slots=True)
class Board:
    """The state that a policy decides on."""

    workers: dict[int, Worker]
    backlog: Backlog
    batch_limit: Callable[[Entry], int]
    patience: int
    source_ended: bool = False
    in_flight: dict[int, Entry] = field(default_factory=dict)

    def idle(self) -> list[Worker]:
        """Workers that could take a batch: first those that have none, each in order of their numbers."""
        return sorted((worker for worker in self.workers.values() if worker.has_room), key=lambda one: bool(one.saving))


class Policy(Protocol):
    """Proposes what an idle worker shall run. `common_start`: nothing starts before every worker is ready."""

    common_start: bool

    def arrived(self, entries: Iterable[Entry]) -> None:
        """Tasks have come."""

    def may(self, worker: Worker, board: Board) -> bool:
        """Whether the worker may run anything now, a retry included."""

    def choose(self, worker: Worker, board: Board) -> list[Entry]:
        """The entries of its next batch, still in the backlog; empty to let it wait."""

    def probe(self, worker: Worker, board: Board) -> Entry | None:
        """One from elsewhere than what is next, for a worker that was lost several times in a row; None if there is none."""


class Dynamic:
    """Affinity first, then the longest, with a bound on how often the oldest may be passed over."""

    common_start = False

    def arrived(self, entries: Iterable[Entry]) -> None:
        """Nothing to note: the backlog keeps them."""

    def may(self, worker: Worker, board: Board) -> bool:
        """Always."""
        return True

    def choose(self, worker: Worker, board: Board) -> list[Entry]:
        """The oldest if it was passed over `patience` times, else the best fit."""
        backlog = board.backlog
        oldest = backlog.oldest()
        if oldest is None:
            return []
        head = oldest if backlog.overtaken() >= board.patience else _best_fit(worker, board)
        return [head, *_mates(head, board, board.batch_limit(head))]

    def probe(self, worker: Worker, board: Board) -> Entry | None:
        """Any that waits."""
        return next(iter(board.backlog.pick(worker.losses, 1)), None)


def _best_fit(worker: Worker, board: Board) -> Entry:
    """Most needs satisfied; then needs nobody else holds, so that workers do not all load one adapter; then the longest."""
    heads = list(board.backlog.heads())
    matches = [worker.match(needs) for (needs, _), _ in heads]
    best = max(matches)
    fitting = [head for head, match in zip(heads, matches, strict=True) if match == best]
    others = [other.holds for other in board.workers.values() if other is not worker and other.live]

    def rank(head: tuple[Bucket, Entry]) -> tuple[int, float, int]:
        (needs, _), entry = head
        holders = 0 if all(best) else sum(held.issuperset(needs) for held in others)
        return -holders, entry.ticket.cost, -entry.ordinal

    return max(fitting, key=rank)[1]


def _mates(head: Entry, board: Board, limit: int) -> list[Entry]:
    """Others of the bucket to fill the batch of `head`: those nearest to its length, of equals the first to arrive."""
    if limit <= 1:
        return []
    others = (entry for entry in board.backlog.in_order() if entry is not head and entry.bucket == head.bucket)
    return heapq.nsmallest(limit - 1, others, key=lambda entry: abs(entry.ticket.length - head.ticket.length))


class Static:
    """Task i belongs to worker i mod N. A worker that is out for good leaves its tasks to the others in turn."""

    common_start = False

    def __init__(self, workers: Sequence[int]) -> None:
        self._workers = tuple(workers)
        self._queues: dict[int, deque[Entry]] = {worker: deque() for worker in workers}

    def arrived(self, entries: Iterable[Entry]) -> None:
        """Deal them out by their place."""
        for entry in entries:
            self._queues[self._workers[entry.ordinal % len(self._workers)]].append(entry)

    def may(self, worker: Worker, board: Board) -> bool:
        """Always."""
        return True

    def choose(self, worker: Worker, board: Board) -> list[Entry]:
        """The next of its own, with those right behind that share the bucket."""
        self._inherit(board)
        queue = self._queues[worker.id]
        if not queue:
            return []
        chosen = [queue.popleft()]
        limit = board.batch_limit(chosen[0])
        while queue and len(chosen) < limit and queue[0].bucket == chosen[0].bucket:
            chosen.append(queue.popleft())
        return chosen

    def probe(self, worker: Worker, board: Board) -> Entry | None:
        """Any that waits, of another worker too: all of its own may be bad."""
        for entry in board.backlog.pick(worker.losses, 1):
            for queue in self._queues.values():
                if entry in queue:
                    queue.remove(entry)
            return entry
        return None

    def _inherit(self, board: Board) -> None:
        heirs = [worker.id for worker in board.workers.values() if worker.usable]
        for worker in board.workers.values():
            if not worker.usable and self._queues[worker.id] and heirs:
                for place, entry in enumerate(self._queues[worker.id]):
                    self._queues[heirs[place % len(heirs)]].append(entry)
                self._queues[worker.id].clear()


class Lockstep:
    """Batch synchronisation. A round is one task for each worker that is ready when it opens."""

    common_start = True

    def __init__(self) -> None:
        self._share: dict[int, Entry] = {}
        self.rounds = 0

    def arrived(self, entries: Iterable[Entry]) -> None:
        """Nothing to note: the backlog keeps them."""

    def may(self, worker: Worker, board: Board) -> bool:
        """Retries run at once: they belong to the round that is open."""
        return True

    def choose(self, worker: Worker, board: Board) -> list[Entry]:
        """Its share of the round; the first idle worker opens a round when the last one has ended everywhere."""
        if not self._share and not board.in_flight and board.backlog.waiting() == len(board.backlog):
            self._open(board)
        entry = self._share.pop(worker.id, None)
        return [entry] if entry else []

    def probe(self, worker: Worker, board: Board) -> Entry | None:
        """None: what runs belongs to a round. The next round is taken from elsewhere (`_open`)."""
        return None

    def _open(self, board: Board) -> None:
        crew = board.idle()
        if board.backlog.waiting() < len(crew) and not board.source_ended:
            return
        doubts = max((worker.losses for worker in crew if worker.doubted), default=0)
        entries = board.backlog.pick(doubts, len(crew))
        for entry in entries:
            best = max(crew, key=lambda worker: (worker.match(entry.ticket.needs), -worker.id))
            crew.remove(best)
            self._share[best.id] = entry
        self.rounds += 1


class Window(Dynamic):
    """Dynamic, with a leash: a worker may finish at most K tasks more than the slowest live one."""

    common_start = True

    def __init__(self, lead: int) -> None:
        self.lead = lead

    def _room(self, worker: Worker, board: Board) -> int:
        slowest = min(other.completed for other in board.workers.values() if other.live)
        under_way = sum(len(batch.tickets) for batch in worker.batches)
        return self.lead - (worker.completed + under_way - slowest)

    def may(self, worker: Worker, board: Board) -> bool:
        """Only with room on the leash."""
        return self._room(worker, board) >= 1

    def choose(self, worker: Worker, board: Board) -> list[Entry]:
        """As dynamic, no more than the leash lets it finish."""
        return super().choose(worker, board)[: max(0, self._room(worker, board))]


def create(name: str, lead: int, workers: Sequence[int]) -> Policy:
    """The policy of that name; `lead` is the K of `window:K`."""
    if name == "static":
        return Static(workers)
    if name == "lockstep":
        return Lockstep()
    if name == "window":
        return Window(lead)
    return Dynamic()
