"""The engine: wires source, ledger, scheduler, workers and report together. The library's API.

with imagemill.Engine(model="z-image-turbo", gpus=4) as engine:
    for outcome in engine.run("prompts.jsonl", out="pictures"):
        print(outcome.task.id, outcome.path or outcome.message)
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from inspect import GEN_CLOSED, GEN_SUSPENDED, getgeneratorstate
from pathlib import Path
from types import TracebackType
from typing import Any

from imagemill import crew, progress, sources
from imagemill.config import Settings, settings_from
from imagemill.errors import ConfigError, InputError
from imagemill.loop import Run
from imagemill.progress import Progress
from imagemill.records import Outcome, Task
from imagemill.roster import Roster
from imagemill.sitting import KEPT, RunOptions, RunReport, Sitting


class Engine:
    """Runs tasks on every device it was given and keeps the workers, with their models, between runs.

    With `keep=False`, for a single run, no more devices are taken than that run has tasks. Use the engine from one
    thread that outlives it: the kernel ends worker processes with the thread that started them.

    Use it as a context manager: leaving the block ends every process and frees all device memory. Settings are those of
    the YAML file; `settings` are its dotted keys, or the short names of `imagemill.run`.
    Raises `InputError` (or one below it) for mistakes, before anything starts.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        gpus: int | str | None = None,
        gpu_ids: Sequence[int] | None = None,
        workers: int | None = None,
        device: str | None = None,
        isolate: bool | None = None,
        schedule: str | None = None,
        config: str | os.PathLike[str] | Settings | None = None,
        show: Progress | None = None,
        keep: bool = True,
        **settings: Any,
    ) -> None:
        if gpu_ids is not None and not len(gpu_ids):
            raise ConfigError("gpu_ids: names no GPU; leave it out (None) to use every GPU that holds the model")
        given = {"model": model, "gpus": gpus, "gpu_ids": gpu_ids, "workers": workers, "device": device}
        self.settings = settings_from(config, {**given, "isolate": isolate, "schedule": schedule, **settings})
        crew.check(self.settings)
        self._progress = show or progress.Logged()
        self._roster = Roster(self.settings, self._progress, keep=keep)
        self._sitting: Sitting | None = None
        # Weak: a loop that is left early drops its iterator, and that ends the run.
        self._stream: Callable[[], Generator[Outcome] | None] = lambda: None
        self._closed = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker process and free all device memory; a run that is still open is stopped at once.

        The engine cannot be used afterwards.
        """
        self._closed = True
        try:
            stream = self._stream()
            if stream is not None:
                stream.close()
        finally:
            self._roster.dismiss()

    @property
    def report(self) -> RunReport | None:
        """How the last run went; None before it has ended."""
        return self._sitting.report if self._sitting is not None else None

    def _running(self) -> Run | None:
        return self._sitting.run if self._sitting is not None else None

    def drain(self) -> bool:
        """Let the current run end what is in flight and stop; False if none is under way.

        Safe from other threads and from signal handlers, as `cancel` is.
        """
        run = self._running()
        if run is not None:
            run.drain()
        return run is not None

    def cancel(self) -> bool:
        """Stop the current run at once, as soon as somebody asks for its next outcome; False if none is under way."""
        run = self._running()
        if run is not None:
            run.cancel()
        return run is not None

    def run(
        self,
        source: str | os.PathLike[str] | Iterable[Task | Mapping[str, Any] | str],
        out: str | os.PathLike[str] | None = None,
        options: RunOptions | None = None,
    ) -> Iterator[Outcome]:
        """Run a task file, or tasks, and hand back each outcome in task order as soon as it and all before it ended.

        The same call with the same folder does what is left. A list or file is checked whole before anything starts; an
        iterator is read as it is needed. Afterwards `report` says how the run went.
        Raises `InputError`, `ChangedTasksError`, `FolderInUseError` before the start; `OutputError` and
        `NoWorkersError` when the run cannot go on.
        """
        if self._closed:
            raise InputError("this engine is closed; make a new one")
        if isinstance(source, Mapping) or not isinstance(source, (str, os.PathLike, Iterable)):
            raise InputError("the tasks are no list: give a file's path, or a list of tasks, dicts or prompts")
        self._end_last_run()
        options = options or RunOptions()
        folder = Path(out) if out is not None else self.default_folder(source)
        lazy = not isinstance(source, (str, os.PathLike, Sequence))
        self._sitting = Sitting(self.settings, self._progress, self._roster, folder, options)
        stream = self._sitting.outcomes(self._rows(source, options, folder), lazy=lazy)
        self._stream = weakref.ref(stream)
        return stream

    def _end_last_run(self) -> None:
        """Close a run that has ended but was not read to its end. Raises `InputError` when it is still going on."""
        stream = self._stream()
        if stream is None or getgeneratorstate(stream) == GEN_CLOSED:
            return
        run = self._running()
        over = run is not None and run.halt is not None
        if getgeneratorstate(stream) != GEN_SUSPENDED or not over:
            raise InputError("this engine runs already; read that run to its end or close it, or make a second engine")
        stream.close()

    def default_folder(self, source: object) -> Path:
        """Where pictures go when nobody said: the configured folder, else one of `outputs/` named after the file; `stdin` for
        standard input, `python` for what is no file."""
        if "folder" in self.settings.output.model_fields_set:
            return Path(self.settings.output.folder)
        if not isinstance(source, (str, os.PathLike)):
            return Path("outputs", "python")
        name = "stdin" if str(source) == "-" else Path(source).stem
        return Path("outputs", name if name.strip(".") else "tasks")

    def _rows(self, source: Any, options: RunOptions, folder: Path) -> Iterator[sources.Row]:
        if isinstance(source, (str, os.PathLike)):
            return sources.open_source(source, prompt_column=options.prompt_column)
        return sources.from_iterable(source, folder / KEPT)
