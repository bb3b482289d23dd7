"""A bounded shelf: things by name, of which the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Shelf(Generic[T]):
    """At most `max_items` things of at most `max_bytes` together, and always the last one put there. Any thread may use it.

    `evictions` counts what went for want of room.
    """

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self.max_items = max_items
        self.max_bytes = max_bytes
        self.evictions = 0
        self._lock = Lock()
        self._things: OrderedDict[str, tuple[T, int]] = OrderedDict()

    def get(self, name: str) -> T | None:
        """The thing, which is now the last used; `None` where there is none of that name."""
        with self._lock:
            if name not in self._things:
                return None
            self._things.move_to_end(name)
            return self._things[name][0]

    def put(self, name: str, thing: T, size: int) -> None:
        """Put the thing of `size` bytes there, and drop what there is no room for any more."""
        with self._lock:
            self._things[name] = (thing, size)
            self._things.move_to_end(name)
            while len(self._things) > 1 and self._over():
                self._things.popitem(last=False)
                self.evictions += 1

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._things.clear()

    def __len__(self) -> int:
        return len(self._things)

    def _over(self) -> bool:
        return len(self._things) > self.max_items or sum(size for _, size in self._things.values()) > self.max_bytes
