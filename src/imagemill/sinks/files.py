"""The sink that keeps each picture as a file in the output folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from imagemill import picture
from imagemill.crashpoints import crash_point
from imagemill.errors import BadTask
from imagemill.records import PlannedTask, SinkSpec
from imagemill.sinks import Stored

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPORARY = ".imagemill-"
"""What every temporary file's name starts with; a driver that finds one after a crash removes it."""


def temporary_path(planned: PlannedTask, attempt: int) -> str:
    """Where an attempt writes, relative to the output folder: beside its place, so that a rename is atomic."""
    place = PurePosixPath(planned.task.output_path or "")
    return str(place.with_name(f"{TEMPORARY}{planned.ticket.seq}-{attempt}-{planned.fingerprint[:12]}.part"))


class FileSink:
    """Writes pictures durably under temporary names."""

    def __init__(self, spec: SinkSpec) -> None:
        self.spec = spec
        self.root = Path(spec.folder).resolve()
        self._checked: set[Path] = set()

    def store(self, image: Image, planned: PlannedTask, attempt: int, facts: Mapping[str, Any]) -> Stored:
        """Encode, write, fsync, read back, check. A file that fails its check is removed."""
        data = picture.encode(image, planned, facts, metadata=self.spec.metadata)
        relative = temporary_path(planned, attempt)
        target = self.root / relative
        self._make_folder(target.parent)
        try:
            handle = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with os.fdopen(handle, "w+b") as file:
                crash_point("temporary-opened")
                file.write(data)
                file.flush()
                crash_point("temporary-written")
                os.fsync(file.fileno())
                crash_point("temporary-synced")
                file.seek(0)
                written = file.read()
            picture.check(written, *image.size)
            crash_point("temporary-checked")
        except BaseException:
            # What the disk refuses to remove, the next run sweeps; the first cause is the one to tell.
            with suppress(OSError):
                target.unlink()
            raise
        return Stored(
            temporary=relative,
            path=planned.task.output_path or "",
            bytes=len(written),
            sha256=hashlib.sha256(written).hexdigest(),
        )

    def _make_folder(self, folder: Path) -> None:
        if folder in self._checked:
            return
        if not folder.resolve().is_relative_to(self.root):
            raise BadTask(f"{folder} leads out of the output folder through a link")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError, FileNotFoundError) as error:
            if folder == self.root or not self.root.is_dir() or not os.access(self.root, os.W_OK):
                raise
            raise BadTask(f"{folder} cannot be made: {error.strerror}; choose another output_path") from error
        self._checked.add(folder)


def create(spec: SinkSpec) -> FileSink:
    """The sink for a worker."""
    return FileSink(spec)
