"""Who works for an engine: nobody yet, or a crew that stays between runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from imagemill import crew, tuning_choice
from imagemill.config import Settings
from imagemill.crew import Crew
from imagemill.devices import Choice
from imagemill.intake import Models
from imagemill.progress import Progress
from imagemill.staging import Shape


class Roster:
    """The crew of an engine, `crew` None while nobody is hired. With `keep` False it is for a single run, and no more devices
    are taken than that run has tasks."""

    def __init__(self, settings: Settings, show: Progress, *, keep: bool) -> None:
        self.crew: Crew | None = None
        self._settings = settings
        self._progress = show
        self._keep = keep

    def choose(self, book: Models, to_do: int | None) -> Choice | None:
        """The devices for the workers; None where nothing is to do or the workers are there already."""
        if to_do == 0 or self.crew is not None:
            return None
        choice = crew.choose(self._settings, book.used(), None if self._keep else to_do)
        for line in (*(f"left out: {line}" for line in choice.left_out), *choice.warnings):
            self._progress.note(line)
        return choice

    def tune(
        self, book: Models, choice: Choice | None, shapes: Iterable[Shape] | None, total: int | None
    ) -> dict[str, tuning_choice.Choice]:
        """How the models are made fast, by the whole run; workers that are there keep what they were loaded with."""
        if self.crew is None and choice is None:
            return {}
        if self.crew is None or self.crew.early:
            return crew.tune(self._settings, book, shapes, total, kept=self._keep)
        book.tune({name: one.tuning for name, one in self.crew.tuned.items()})
        return self.crew.tuned

    def hire(self, choice: Choice, book: Models, logs: Path, *, died: bool) -> Crew:
        """The workers. After a run that died even a single one gets a process of its own: should one of the tasks crash it
        again, it is that task that ends, and not the run."""
        apart = died and crew.works_inside(choice, self._settings)
        if apart:
            self._progress.note(
                "the last run in this folder died; its worker now has a process of its own, as with --isolate"
            )
        self.crew = crew.hire(choice, self._settings, book.used()[0].spec, logs, apart=apart)
        return self.crew

    def start_early(self, book: Models, logs: Path, *, died: bool) -> None:
        """Start the workers of the run's own model while its tasks are still read and checked."""
        if self.crew is None:
            book.get(None)
            choice = self.choose(book, None)
            assert choice is not None, "nothing is known of the tasks yet"
            self.hire(choice, book, logs, died=died).start_early()

    def dismiss(self) -> None:
        """End the workers."""
        if self.crew is not None:
            for number, worker in self.crew.workers.items():
                if worker.state in ("waiting", "loading"):
                    # It would hear that it may leave only once it has loaded.
                    self.crew.executor.kill(number)
            self.crew.executor.close()
            self.crew = None
