"""The next batch's text, and the pictures that it edits: read on a thread while a batch is at work, and encoded between its
last steps.

A CPU launches the encoding of an edit more slowly than a GPU runs it, so at a batch's own turn the GPU would wait; between
two steps it has enough to do meanwhile. Text alone is quick, but behind a batch of several pictures, whose decoding is many
launches, it too would come when the steps are over.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

from imagemill.errors import BadTask, OutOfMemory, WorkerGone, classify
from imagemill.families import Family
from imagemill.records import ModelSpec, WorkOrder
from imagemill.runners import Result
from imagemill.runners.ladder import release
from imagemill.runners.references import Member, by_shapes, take_in
from imagemill.runners.streams import Lane, Stages

log = logging.getLogger(__name__)

T = TypeVar("T")

LAST_STEPS = 4
"""So many steps before its end a batch of edits asks for the next one: time for the driver's answer, the reading, three pieces.
Not sooner: another worker might be free for it first."""
LAST_STEPS_OF_TEXT = 1
"""The same for pictures from text: time for the answer; the text is one piece."""

Encoded: TypeAlias = tuple[Any, Stages]
"""Conditioning, and the marks around the pieces of its making."""


class Early:
    """What one loaded pipeline does for the next order while it runs one. Used by the runner's thread.

    `pays` says whether anything is gained at all: the stages are apart, and no adapter changes the text encoder. `tell`
    takes a line for the log and the report.
    """

    def __init__(
        self, pipe: Any, family: Family, model: ModelSpec, lane: Lane, tell: Callable[[str], None], *, pays: bool
    ) -> None:
        self.wanted = False
        self._pipe = pipe
        self._family = family
        self._model = model
        self._lane = lane
        self._tell = tell
        self._pays = pays and lane.overlaps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._last: Member | None = None
        self._own: EarlyOrder | None = None
        self._next: EarlyOrder | None = None

    def begin(self, order: WorkOrder) -> Iterable[Member | Result]:
        """Its turn has come: its tasks with their pictures, read early or now."""
        self._own, self._next, self.wanted = self._next, None, False
        if self._own is not None and self._own.order is not order:
            self._own.drop()
            self._own = None
        return self._own.members() if self._own else take_in(order.tasks, self._family, self._model)

    def until(self, last: Member) -> None:
        """The order's own work ends with the batch that ends with this one."""
        self._last = last

    def claim(self, members: Sequence[Member]) -> Encoded | None:
        """The encoding of this batch, if it was begun early."""
        own = self._own
        return self._tried(own, lambda: own.claim(members, self._lane)) if own else None

    def left(self, steps: int, members: Sequence[Member]) -> None:
        """This batch has so many steps left to launch: whether the next order is wanted now."""
        near = LAST_STEPS if members[0].pictures else LAST_STEPS_OF_TEXT
        self.wanted = self._pays and steps <= near and members[-1] is self._last

    def follow(self, order: WorkOrder) -> None:
        """Begin with the order that comes next: read its pictures. Nothing if it was told before."""
        if not self._pays or (self._next is not None and self._next.order is order):
            return
        if self._next is not None:
            self._next.drop()
        self._next = EarlyOrder(order, self._family, self._model, self._thread)

    def advance(self) -> None:
        """Launch a piece of the next order's encoding, if there is one. Raises `WorkerGone` when the device's context is
        found spoilt."""
        following = self._next
        if following is not None:
            self._tried(following, lambda: following.advance(self._pipe, self._lane))

    def give_up(self) -> bool:
        """Let go of all that is on the device, and encode nothing early from now on; False when that makes no room."""
        held = [order.drop() for order in (self._own, self._next) if order is not None]
        self._pays = self.wanted = False
        self._own = self._next = None
        return any(held)

    def close(self) -> None:
        """End the thread, after the picture it is at."""
        self.give_up()
        self._thread.shutdown(cancel_futures=True)

    def _tried(self, order: EarlyOrder, work: Callable[[], T]) -> T | None:
        """What the work gives; None when it fails, and the order's own turn does it anew. What fails for another reason than
        its task would fail for the next one, too."""
        try:
            return work()
        except Exception as error:
            order.forget()
            failure = classify(error)
            if isinstance(failure, WorkerGone):
                raise
            if isinstance(failure, BadTask):
                return None
            self._pays = self.wanted = False
            log.info("encoding ahead of its turn failed", exc_info=error)
            self._tell(f"nothing is encoded ahead of its turn any more, since that failed: {failure}")
            if isinstance(failure, OutOfMemory):
                release(error, str(self._pipe.device))
            return None


class EarlyOrder:
    """One order that comes next; only its first batch is encoded."""

    def __init__(self, order: WorkOrder, family: Family, model: ModelSpec, thread: ThreadPoolExecutor) -> None:
        self.order = order
        self._family = family
        self._model = model
        self._dropped = threading.Event()
        self._reading = thread.submit(self._read) if edits(order) else at_once(self._read)
        self._first: Sequence[Member] = ()
        self._pieces: Generator[None, None, Any] | None = None
        self._made: Encoded | None = None
        self._stages = Stages()
        self._over = False

    def members(self) -> list[Member | Result]:
        """The tasks with their pictures, as `take_in` has them; waits for them. What could not be read for another reason
        than the task's own is read once more: nothing that failed early counts."""
        if self._reading.exception() is not None:
            return list(take_in(self.order.tasks, self._family, self._model))
        found: list[Member | Result] = []
        for planned, one in zip(self.order.tasks, self._reading.result(), strict=True):
            again = isinstance(one, Result) and not isinstance(one.error, BadTask)
            found += take_in([planned], self._family, self._model) if again else [one]
        return found

    def advance(self, pipe: Any, lane: Lane) -> None:
        """Launch another piece, once the pictures are read and while there is one."""
        if self._over or not self._reading.done():
            return
        if self._pieces is None:
            self._begin(pipe)
        self._piece(lane)

    def claim(self, members: Sequence[Member], lane: Lane) -> Encoded | None:
        """The encoding of this batch, if it was begun, and once; what is missing is launched now. What is launched next on the
        main stream waits for it."""
        if self._pieces is None or list(map(id, members)) != list(map(id, self._first)):
            return None
        while not self._over:
            self._piece(lane)
        made, self._made = self._made, None
        if made is not None:
            lane.join()
        return made

    def forget(self) -> bool:
        """Let go of what is on the device and make no more of it; False when there was nothing."""
        held = self._made is not None or (self._pieces is not None and not self._over)
        self._over, self._pieces, self._made = True, None, None
        return held

    def drop(self) -> bool:
        """`forget`, and read no further picture."""
        self._dropped.set()
        return self.forget()

    def _read(self) -> list[Member | Result]:
        found: list[Member | Result] = []
        for one in take_in(self.order.tasks, self._family, self._model):
            if self._dropped.is_set():
                break
            found.append(one)
        return found

    def _begin(self, pipe: Any) -> None:
        if self._reading.exception() is not None:
            self._over = True
            return
        members = [member for member in self._reading.result() if isinstance(member, Member)]
        self._first = by_shapes(members, self._family)[0] if members else ()
        tasks, pictures = [one.planned.task for one in self._first], [one.pictures for one in self._first]
        self._pieces = pieces(self._family, pipe, tasks, pictures)
        self._over = not members

    def _piece(self, lane: Lane) -> None:
        if self._over or self._pieces is None:
            return
        with lane.beside(), lane.stage(self._stages, "encode"):
            try:
                next(self._pieces)
            except StopIteration as end:
                self._made, self._over = (end.value, self._stages), True


def edits(order: WorkOrder) -> bool:
    """Whether there are pictures to read."""
    return any(planned.task.images for planned in order.tasks)


def at_once(work: Callable[[], T]) -> Future[T]:
    """What the work came to: text waits for no thread, since nothing but the last step is left to launch it behind."""
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future


def pieces(family: Family, pipe: Any, tasks: Sequence[Any], pictures: Sequence[Any]) -> Generator[None, None, Any]:
    """A family's `encode`, in pieces where it has them (`encoding`)."""
    encoding = getattr(family, "encoding", None)
    if encoding is not None:
        return (yield from encoding(pipe, tasks, pictures))
    return family.encode(pipe, tasks, pictures)


def whole(encoding: Generator[None, None, T]) -> T:
    """What a generator of pieces comes to, all at once."""
    try:
        while True:
            next(encoding)
    except StopIteration as end:
        made: T = end.value
        return made
