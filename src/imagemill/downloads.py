"""Pictures to edit that a source names by their address: fetched by the driver before anything starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from imagemill import source_image
from imagemill.errors import BadTask, InputError, OutputError
from imagemill.inputs import ImageFile, read_image
from imagemill.public_web import IsAllowed, PublicWeb, Resolve, is_public, plain, resolve

FOLDER = ".imagemill-downloads"
"""Where, inside the output folder, fetched pictures lie, each named by the sha256 of its address. What is there is not
fetched again, so that a run that goes on edits the very picture it began with."""

AT_ONCE = 8
"""Pictures that are fetched at the same time."""


class Downloads:
    """Fetches the pictures of one output folder into `folder`. Without `keep` nothing is written: enough to plan.

    `resolve` and `is_allowed` are those of `PublicWeb`. Used by one thread.
    """

    def __init__(
        self, folder: Path, *, keep: bool = True, resolve: Resolve = resolve, is_allowed: IsAllowed = is_public
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._looks = resolve, is_allowed
        self._threads: ThreadPoolExecutor | None = None
        self._web: PublicWeb | None = None
        self._asked: dict[str, Future[ImageFile]] = {}

    def image(self, address: str) -> ImageFile:
        """The picture at the address, as the file it is kept in. Raises `InputError` in one line with address and reason,
        `OutputError` when the folder cannot be written."""
        return self._ask(address).result()

    def ahead(self, addresses: Iterable[str]) -> None:
        """Begin to fetch these, so that they are there when they are asked for."""
        for address in addresses:
            self._ask(address)

    def close(self) -> None:
        """Give up what is under way and forget what was asked for."""
        if self._web is not None:
            self._web.close()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._threads, self._web, self._asked = None, None, {}

    def _ask(self, address: str) -> Future[ImageFile]:
        if address not in self._asked:
            if self._threads is None or self._web is None:
                self._sweep()
                self._web = PublicWeb(*self._looks)
                self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="imagemill-download")
            self._asked[address] = self._threads.submit(self._one, self._web, address)
        return self._asked[address]

    def _one(self, web: PublicWeb, address: str) -> ImageFile:
        place = self._folder.absolute() / hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
        if place.is_file():
            return read_image(str(place))
        data = web.get(address)
        try:
            size = source_image.check(data, plain(address))
        except BadTask as error:
            raise InputError(str(error)) from error
        if self._keep:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                source_image.put(data, place)
            except OSError as error:
                raise OutputError(f"{self._folder} cannot take a picture to edit: {error}") from error
        return ImageFile(str(place), hashlib.sha256(data).hexdigest(), size)

    def _sweep(self) -> None:
        """Remove what a driver that died left half-written."""
        if self._keep:
            for left in self._folder.glob("*.part"):
                with suppress(OSError):
                    left.unlink()
