"""Settings as Python's keyword arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from imagemill.config.file import load_settings, merge
from imagemill.config.settings import Settings

SHORT_NAMES = {
    "gpus": "devices.gpus",
    "gpu_ids": "devices.gpu_ids",
    "workers": "devices.workers",
    "device": "devices.device",
    "isolate": "devices.isolate",
    "guidance_scale": "guidance",
    "format": "output.format",
    "sink": "output.sink",
    "metadata": "output.metadata",
    "load_timeout": "limits.load_timeout",
    "task_timeout": "limits.task_timeout",
    "parallel_loads": "limits.parallel_loads",
    "max_attempts": "limits.max_attempts",
    "read_ahead": "limits.read_ahead",
    "log_level": "logging.level",
    "log_folder": "logging.folder",
}
"""Python's keyword arguments and the keys of the YAML file they stand for; other keys are the same in both."""


def settings_from(given: str | os.PathLike[str] | Settings | None, overrides: Mapping[str, Any]) -> Settings:
    """Settings from a file or an object, with keyword arguments above them. Raises `ConfigError`."""
    base = given if isinstance(given, Settings) else load_settings(given) if given is not None else Settings()
    keys = {SHORT_NAMES.get(name, name): value for name, value in overrides.items()}
    return merge(base, keys, {key: name for name, key in SHORT_NAMES.items()})
