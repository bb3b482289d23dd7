"""Settings of a run and the YAML file they are read from: one file for one GPU and many.

Every key is known or refused, and an error names file, field, value and mend in one line. A command-line option stands
above the file (`merge`).
"""

from __future__ import annotations

from imagemill.config.file import load_settings, merge
from imagemill.config.keywords import settings_from
from imagemill.config.settings import (
    DeviceSettings,
    JudgeSettings,
    LimitSettings,
    LoggingSettings,
    OutputSettings,
    Settings,
)
from imagemill.config.values import Schedule, parse_lora, parse_schedule, parse_size

__all__ = [
    "DeviceSettings",
    "JudgeSettings",
    "LimitSettings",
    "LoggingSettings",
    "OutputSettings",
    "Schedule",
    "Settings",
    "load_settings",
    "merge",
    "parse_lora",
    "parse_schedule",
    "parse_size",
    "settings_from",
]
