"""The log files of a run: one for the driver, one for a worker inside the process. Worker processes have their own."""

from __future__ import annotations

import logging
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
DRIVER, WORKERS = "imagemill.driver", ("imagemill.worker", "imagemill.runners")


class LogFiles:
    """While the block lasts the package's loggers write to files in the folder, and nowhere else."""

    def __init__(self, folder: Path, level: str) -> None:
        self.folder = folder
        self.level = level.upper()
        self._handlers: list[tuple[logging.Logger, logging.Handler]] = []

    def __enter__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open("driver.log", DRIVER)
        self._open("worker-0.log", *WORKERS)

    def _open(self, name: str, *loggers: str) -> None:
        handler = logging.FileHandler(self.folder / name, encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter(FORMAT))
        for logger in map(logging.getLogger, loggers):
            logger.addHandler(handler)
            logger.setLevel(self.level)
            logger.propagate = False
            self._handlers.append((logger, handler))

    def __exit__(self, *_: object) -> None:
        for logger, handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
            logger.propagate = True
