"""The editing call of the system that imagemill replaces: `MultiGPUImageEditor` and its `batch_edit`."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from imagemill import source_image
from imagemill.config import merge
from imagemill.engine import Engine
from imagemill.errors import TASK_ERRORS, BadTask, InputError, TaskFileError, Transient
from imagemill.inputs import Inputs, local_path
from imagemill.plan import DEFAULT_SEED
from imagemill.records import Outcome
from imagemill.sources.columns import FIELDS

if TYPE_CHECKING:
    from PIL.Image import Image

Source: TypeAlias = "Image | str | os.PathLike[str]"
"""A picture to edit: one of Pillow's, or the path of a file."""

SET_HERE = frozenset({"id", "prompt", "image", "images", "output_path", "num_images"})
"""Fields of a task that `batch_edit` gives each item itself."""

OTHER_NAMES = {
    "model": "model_name",
    "gpu_ids": "device_ids",
    "steps": "num_inference_steps",
    "schedule": "enable_batch_sync",
}
"""Settings of an engine that have a name of their own here."""


class MultiGPUImageEditor:
    """Edits lists of pictures by instructions on several GPUs; the models stay loaded until the block is left.

        with MultiGPUImageEditor(device_ids=[0, 1], model_name="qwen-image-edit") as editor:
            edited = editor.batch_edit([picture, "cat.jpg"], ["make it night", "add a hat"])

    `device_ids` are the numbers that nvidia-smi shows; None takes every GPU that holds the model, and the CPU where there
    is none (`workers=` says how many processes). `model_name` is what `--model` takes. With `enable_batch_sync` the
    workers go in rounds of one picture each (the schedule `lockstep`), else each takes the next task when it is free
    (`dynamic`). `num_inference_steps` and `true_cfg_scale` of None are the model's own. Other keywords are those of
    `Engine`. Raises `InputError` for one that is unknown or out of range.
    """

    def __init__(
        self,
        device_ids: Sequence[int] | None = None,
        model_name: str = "qwen-image-edit",
        enable_batch_sync: bool = True,
        num_inference_steps: int | None = None,
        true_cfg_scale: float | None = None,
        **settings: Any,
    ) -> None:
        for name, here in OTHER_NAMES.items():
            if name in settings:
                raise InputError(f"{name}: its name here is {here}")
        self.enable_batch_sync = enable_batch_sync
        # Its own end removes it where nobody called close.
        self._temporary = tempfile.TemporaryDirectory(prefix="imagemill-", ignore_cleanup_errors=True)
        self._scratch = Path(self._temporary.name)
        settings.setdefault("log_folder", str(self._scratch / "logs"))
        try:
            self._engine = Engine(
                model_name, gpu_ids=device_ids, steps=num_inference_steps, true_cfg_scale=true_cfg_scale, **settings
            )
            if self._engine.settings.output.sink != "files":
                raise InputError("sink: the pictures are read back from their files; remove it")
        except BaseException:
            self._temporary.cleanup()
            raise
        self._batches = 0

    def __enter__(self) -> MultiGPUImageEditor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker process and free all device memory; can be called again."""
        self._engine.close()
        self._temporary.cleanup()

    def batch_edit(
        self,
        images: Sequence[Source | Sequence[Source]],
        instructions: Sequence[str] | str,
        enable_batch_sync: bool | None = None,
        *,
        on_error: Literal["return", "raise"] = "return",
        seed: int | Sequence[int] | None = None,
        **fields: Any,
    ) -> list[Image | Exception]:
        """Edit each picture by its instruction; returns the edited pictures (RGB) in the same order.

        An item of `images` is a picture or a path, or a list of them for models that take several. One instruction is
        for all of them. `seed` is for every item, a list gives each its own; without it item i has 42 + i. `fields` are
        those of a task, for every item: `width` and `height` or `size` (default: the picture's aspect at the model's number
        of pixels), `negative_prompt`, `num_inference_steps`, `true_cfg_scale`, `guidance_scale`, `loras`.

        An item that fails is an exception in its place, never the picture that came in: `InputError` for a file that is
        not there, a `TaskError` that says why for all else. With `on_error="raise"` the first of them is raised, once the
        batch has ended. Raises `InputError` for a call that cannot be used, with the number of the item; then nothing was
        started. Raises `NoWorkersError` when no worker is left that could go on.
        """
        rows = self._rows(images, instructions, seed, fields)
        if on_error not in ("return", "raise"):
            raise InputError(f"on_error: {on_error!r} is neither 'return' nor 'raise'")
        if not rows:
            return []
        policy = (
            "lockstep" if (self.enable_batch_sync if enable_batch_sync is None else enable_batch_sync) else "dynamic"
        )
        self._engine.settings = merge(self._engine.settings, {"schedule": policy})
        self._batches += 1
        folder = self._scratch / f"batch-{self._batches}"
        try:
            edited = self._edit(rows, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        failed = next((item for item in edited if isinstance(item, Exception)), None)
        if failed is not None and on_error == "raise":
            raise failed
        return edited

    def _rows(
        self, images: Any, instructions: Any, seed: int | Sequence[int] | None, fields: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """A row of task fields an item. Raises `InputError` for lists of unlike lengths and fields that no row takes."""
        if isinstance(images, str | bytes | os.PathLike) or not isinstance(images, Sequence):
            raise InputError("images: give a list of pictures or paths")
        count = len(images)
        texts = _for_each("instructions", instructions, count, str, "a text")
        seeds = _for_each("seed", seed, count, Integral | None, "a whole number")
        for name in fields:
            if name in SET_HERE:
                raise InputError(f"{name}: batch_edit sets it itself; remove it")
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS.keys() - SET_HERE, n=1)
                raise InputError(f"{name}: is no field of a task" + (f"; did you mean {near[0]}?" if near else ""))
        first = self._engine.settings.seed
        first = DEFAULT_SEED if first is None else first
        seeds = [first + number if own is None else own for number, own in enumerate(seeds)]
        rows = [
            {**fields, "id": str(number), "prompt": text, "seed": own, "output_path": f"{number}.png"}
            for number, (text, own) in enumerate(zip(texts, seeds, strict=True))
        ]
        return [
            {**row, "images": _listed(image, number)}
            for number, (row, image) in enumerate(zip(rows, images, strict=True))
        ]

    def _edit(self, rows: Sequence[dict[str, Any]], folder: Path) -> list[Image | Exception]:
        """The rows' pictures or what went wrong; those whose pictures cannot be used never reach a worker."""
        edited: dict[int, Image | Exception] = {}
        usable, inputs = [], Inputs()
        for number, row in enumerate(rows):
            try:
                paths = [_path(one, folder / "sources", inputs) for one in row["images"]]
            except (BadTask, InputError) as error:
                edited[number] = error
            else:
                usable.append({**row, "images": paths})
        if usable:
            try:
                for outcome in self._engine.run(usable, folder / "edited"):
                    edited[int(outcome.task.id)] = _result(outcome)
            except TaskFileError as error:
                raise _by_item(error, [row["id"] for row in usable]) from error
        stopped = Transient("the batch was stopped before this item's turn")
        return [edited.get(number, stopped) for number in range(len(rows))]


def _for_each(name: str, given: Any, count: int, one: Any, what: str) -> list[Any]:
    """A list of `count` from one value for all, or from a list with a value each. Raises `InputError` for all else."""
    if isinstance(given, one):
        return [given] * count
    if isinstance(given, bytes) or not isinstance(given, Sequence):
        raise InputError(
            f"{name}: {type(given).__name__} is neither {what} nor a list; give one for all or one for each"
        )
    if len(given) != count:
        raise InputError(f"{name}: {len(given)} for {count} images; give one for each")
    return list(given)


def _by_item(error: TaskFileError, numbers: Sequence[str]) -> TaskFileError:
    """The error with each task that it names as the item that it was made from, counted from 0."""

    def item(found: re.Match[str]) -> str:
        return f"item {numbers[int(found[1]) - 1]}: "

    lines = [re.sub(r"^task (\d+): ", item, line) for line in error.problems]
    return TaskFileError(lines, error.total, "nothing was started")


def _listed(image: Any, number: int) -> list[Source]:
    """One item's pictures. Raises `InputError` for what is neither picture nor path."""
    from PIL import Image

    found = list(image) if isinstance(image, list | tuple) else [image]
    for one in found:
        if not isinstance(one, Image.Image | str | os.PathLike):
            raise InputError(f"images[{number}]: {type(one).__name__} is neither a picture of Pillow's nor a path")
    if not found:
        raise InputError(f"images[{number}]: is an empty list; name a picture")
    return found


def _path(one: Source, kept: Path, inputs: Inputs) -> str:
    """The file of a picture. Raises `InputError` for one that is not there, `BadTask` for one from memory that is
    damaged or too large."""
    if isinstance(one, str | os.PathLike):
        return inputs.image(local_path(os.fspath(one))).path
    return str(source_image.keep(one, kept))


def _result(outcome: Outcome) -> Image | Exception:
    """The picture of an outcome, loaded, or its failure as an exception."""
    from PIL import Image

    if not outcome.ok:
        return TASK_ERRORS[outcome.kind or "transient"](outcome.message)
    with Image.open(outcome.path) as image:
        return image.convert("RGB")
