"""The calls of the system that imagemill replaces: `MultiGPUImageGenerator` and its `generate_batch`."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from imagemill.engine import Engine
from imagemill.errors import InputError, TaskFileError
from imagemill.records import Outcome
from imagemill.sitting import RunOptions

NUMBERS = ".imagemill.next"
"""The file of an output folder with the first number that no picture without an `output_path` has been given yet."""

NUMBERED = re.compile(r"\d{6,9}")
"""What is left of such a picture's name without its suffix."""


class MultiGPUImageGenerator:
    """Makes pictures for lists of dicts on several GPUs; the workers stay loaded until the block is left.

        with MultiGPUImageGenerator(num_gpus=4) as generator:
            results = generator.generate_batch([{"prompt": "a red apple", "seed": 1, "output_path": "out/apple.png"}])

    `num_gpus` counts GPUs, `gpu_ids` names them; with neither, every GPU that holds the model is used, and the CPU where
    there is none. Other keywords are those of `Engine` (`model`, `steps`, `size`, `guidance`, `schedule`, …).
    Pictures whose dict names no `output_path` go to `output_dir`, under numbers that no other call and no other process takes.
    """

    def __init__(
        self,
        num_gpus: int | None = None,
        gpu_ids: Sequence[int] | None = None,
        *,
        output_dir: str | os.PathLike[str] = "outputs",
        **settings: Any,
    ) -> None:
        self.output_dir = Path(output_dir).absolute()
        settings.setdefault("log_folder", str(self.output_dir / "logs"))
        self._engine = Engine(gpus=num_gpus, gpu_ids=gpu_ids, **settings)

    def __enter__(self) -> MultiGPUImageGenerator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker process and free all device memory."""
        self._engine.close()

    def generate_batch(self, tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Make one picture for each dict; returns one dict each, in the same order.

        A task takes `prompt`, `lora_path`, `lora_strength`, `seed`, `output_path` (absolute, or relative to the current
        folder) and any other field of a task. A result has `task_id`, `success`, `output_path` (None on failure),
        `elapsed` seconds and `error` (None on success). Files that stand at a given output path are replaced, but never one
        that the tasks read.
        Raises `InputError` when a dict cannot be used, with its number in the list, from 1; then nothing was started.
        """
        if not tasks:
            return []
        for number, task in enumerate(tasks):
            if not isinstance(task, Mapping):
                raise InputError(f"task {number + 1}: {type(task).__name__} is no dict; give one with a prompt")
            if task.get("num_images", 1) != 1:
                raise InputError(
                    f"task {number + 1}: num_images: generate_batch gives one result a task; give one dict a picture"
                )
        unnamed = any(task.get("output_path") is None for task in tasks)
        first = take_numbers(self.output_dir, len(tasks)) if unnamed else 0
        places = [self._place(task, number) for number, task in enumerate(tasks, first)]
        root = Path(os.path.commonpath([place.parent for place in places]))
        rows = [
            {
                **task,
                "id": str(task.get("task_id", task.get("id", number))),
                "output_path": place.relative_to(root).as_posix(),
            }
            for number, (task, place) in enumerate(zip(tasks, places, strict=True))
        ]
        for row in rows:
            row.pop("task_id", None)
        with tempfile.TemporaryDirectory(prefix="imagemill-") as scratch:
            options = RunOptions(overwrite=True, ledger=Path(scratch) / "ledger.sqlite")
            try:
                return [_result(outcome) for outcome in self._engine.run(rows, root, options)]
            except TaskFileError as error:
                raise _in_own_words(error) from error

    def _place(self, task: Mapping[str, Any], number: int) -> Path:
        given = task.get("output_path")
        suffix = f".{self._engine.settings.output.format}"
        if given is None:
            return self.output_dir / f"{number:06d}{suffix}"
        place = Path(os.path.abspath(os.path.expanduser(str(given))))
        return place if place.suffix else place.with_name(place.name + suffix)


def _result(outcome: Outcome) -> dict[str, Any]:
    return {
        "task_id": outcome.task.id,
        "success": outcome.ok,
        "output_path": outcome.path or None,
        "elapsed": outcome.elapsed,
        "error": None if outcome.ok else f"{outcome.kind}: {outcome.message}",
    }


def _in_own_words(error: TaskFileError) -> TaskFileError:
    """The refusal without columns that no dict had and without options that only the command and `imagemill.run` have."""
    lines = [
        re.sub(r"(: is missing); the columns here are .* with --prompt-column", r"\1; give one", line)
        for line in error.problems
    ]
    mend = "; choose another output_path" if error.hint.startswith("choose another output_path") else ""
    return TaskFileError(lines, error.total, f"nothing was started{mend}")


def take_numbers(folder: Path, count: int) -> int:
    """The first of `count` numbers in a row that are above those of all files in the folder and that nobody else gets.

    The next free one stands in a file of the folder, which is locked meanwhile. Raises `InputError` when the folder cannot
    be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / NUMBERS, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror}; give another output_dir") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        known = os.read(handle, 32).strip()
        used = (int(name.stem) for name in folder.iterdir() if NUMBERED.fullmatch(name.stem))
        first = max(int(known) if known.isdigit() else 0, max(used, default=-1) + 1)
        following = f"{first + count}\n".encode()
        os.pwrite(handle, following, 0)
        os.ftruncate(handle, len(following))  # the file may have held anything
        return first
    except OSError as error:
        raise InputError(f"{folder / NUMBERS}: {error.strerror}; mend that, or give another output_dir") from error
    finally:
        os.close(handle)
