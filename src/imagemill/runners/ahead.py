"""Work on adapter files ahead of their use, on one thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock
from typing import Generic, TypeVar

from imagemill.records import Lora

T = TypeVar("T")


class Ahead(Generic[T]):
    """Makes something of adapter files before it is asked for, at most `most` of them at a time.

    What fails ahead of time says nothing: `take` then makes it again and raises. Results are not kept here; `make` puts
    them where they belong. The thread starts with the first file and ends with `stop`.
    """

    def __init__(self, make: Callable[[Lora], T], most: int) -> None:
        self._make = make
        self._most = most
        self._lock = RLock()
        self._jobs: dict[str, Future[T]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def start(self, lora: Lora) -> None:
        """Begin with this file, unless that has happened or enough is under way. Returns at once."""
        with self._lock:
            if lora.digest in self._jobs or len(self._jobs) >= self._most:
                return
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="adapters")
            job = self._jobs[lora.digest] = self._pool.submit(self._make, lora)
            job.add_done_callback(lambda job: self._forget(lora.digest, job))

    def take(self, lora: Lora) -> T:
        """What `make` gives for the file: waits for a job that has begun, and makes it here otherwise."""
        with self._lock:
            job = self._jobs.get(lora.digest)
        if job is not None and not job.cancel() and job.exception() is None:
            return job.result()
        return self._make(lora)

    def stop(self) -> None:
        """End the thread, after the file it is at. It starts again when it is needed."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _forget(self, digest: str, job: Future[T]) -> None:
        with self._lock:
            if self._jobs.get(digest) is job:
                del self._jobs[digest]
