"""The tasks that wait for a worker: kept by what they need, by length and by age."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import TypeAlias

from imagemill.records import Ticket, Try
from imagemill.retry import doubt

Bucket: TypeAlias = tuple[tuple[str, ...], str]
"""What tasks must share to run in one batch: their needs and their group."""


def spread(number: int, length: int) -> int:
    """A place in a row of that length: 0 for 0, and far from each other for numbers that follow each other."""
    return int(number * 0.618 % 1 * length)


@dataclass(slots=True)
class Entry:
    """A task on its way: `ordinal` is its place in the order of arrival, `tries` what it has met so far.

    An entry that failed runs `alone`, prefers workers against which least speaks (`doubt`), and not before `not_before`.
    """

    ticket: Ticket
    ordinal: int
    tries: list[Try] = field(default_factory=list)
    alone: bool = False
    not_before: float = 0.0

    @property
    def bucket(self) -> Bucket:
        """The bucket it waits in."""
        return self.ticket.needs, self.ticket.group

    @property
    def attempt(self) -> int:
        """The number of its next or current attempt, from 1."""
        return len(self.tries) + 1

    def doubt(self, worker: int) -> int:
        """How much its failures there speak against giving it to that worker: 0 for nothing, see `retry.doubt`."""
        return max((doubt(one) for one in self.tries if one.worker == worker), default=0)


class Backlog:
    """Waiting entries. Taking the oldest, the longest of a bucket, or a given one costs at most O(log n)."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, Entry] = OrderedDict()
        self._heaps: dict[Bucket, list[tuple[float, int]]] = {}
        self._retries: dict[int, Entry] = {}
        self._taken = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._retries)

    def add(self, entry: Entry) -> None:
        """Put an entry in: a new one, or one of a batch that was split."""
        if entry.alone:
            self._retries[entry.ordinal] = entry
            return
        self._waiting[entry.ordinal] = entry
        if entry.tries:
            earlier = list(takewhile(lambda ordinal: ordinal < entry.ordinal, self._waiting))
            for ordinal in (entry.ordinal, *reversed(earlier)):
                self._waiting.move_to_end(ordinal, last=False)
        heapq.heappush(self._heaps.setdefault(entry.bucket, []), (-entry.ticket.cost, entry.ordinal))

    def take(self, entry: Entry) -> None:
        """Remove an entry that is about to be dispatched."""
        if self._retries.pop(entry.ordinal, None) is None:
            del self._waiting[entry.ordinal]
            if not entry.tries:
                self._taken += 1
            heap = self._heaps[entry.bucket]
            if heap[0][1] == entry.ordinal:
                heapq.heappop(heap)
                self._prune(entry.bucket)

    def _prune(self, bucket: Bucket) -> None:
        heap = self._heaps[bucket]
        while heap and heap[0][1] not in self._waiting:
            heapq.heappop(heap)
        if not heap:
            del self._heaps[bucket]

    def oldest(self) -> Entry | None:
        """The first of the waiting entries, retries left out."""
        return next(iter(self._waiting.values()), None)

    def overtaken(self) -> int:
        """How many tasks that arrived after the oldest waiting one were dispatched before it."""
        entry = self.oldest()
        return 0 if entry is None else max(0, self._taken - entry.ordinal)

    def in_order(self) -> Iterator[Entry]:
        """Waiting entries in order of arrival, retries left out."""
        return iter(self._waiting.values())

    def pick(self, number: int, count: int) -> list[Entry]:
        """This many of the waiting entries, neighbours: the oldest for 0, for other numbers some that are far apart."""
        place = spread(number, len(self._waiting))
        found = list(islice(self._waiting.values(), place, place + count))
        return found + list(islice(self._waiting.values(), min(place, count - len(found))))

    def longest(self, bucket: Bucket) -> Entry | None:
        """The dearest entry of a bucket, the earlier one of equals."""
        if bucket in self._heaps:
            self._prune(bucket)
        heap = self._heaps.get(bucket)
        return self._waiting[heap[0][1]] if heap else None

    def heads(self) -> Iterator[tuple[Bucket, Entry]]:
        """Each bucket with its dearest entry."""
        for bucket in list(self._heaps):
            entry = self.longest(bucket)
            if entry is not None:
                yield bucket, entry

    def retries(self, now: float) -> Iterator[Entry]:
        """Entries to try again whose time has come, in order of arrival."""
        return (entry for _, entry in sorted(self._retries.items()) if entry.not_before <= now)

    def retry_times(self) -> list[float]:
        """When each retry's time comes."""
        return [entry.not_before for entry in self._retries.values()]

    def waiting(self) -> int:
        """How many wait, retries left out."""
        return len(self._waiting)
