"""The version, in one place, and what else a ledger says of the machine that made its pictures."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

__version__ = "0.1.0"

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "pillow")


def machine() -> dict[str, Any]:
    """System, processors, Python and the libraries that make pictures (None where one is not installed)."""
    from importlib import metadata

    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "python": sys.version.split()[0],
        "imagemill": __version__,
        **versions,
    }
