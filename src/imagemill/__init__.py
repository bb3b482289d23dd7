"""imagemill: any number of diffusion tasks over every GPU, each picture exactly once, resumable.

    import imagemill
    report = imagemill.run("prompts.jsonl", out="pictures", model="tiny")

Names are imported when they are first used; importing the package costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from imagemill.version import __version__

if TYPE_CHECKING:
    from imagemill.api import run
    from imagemill.editor import MultiGPUImageEditor
    from imagemill.engine import Engine
    from imagemill.errors import ImagemillError, InputError
    from imagemill.generator import MultiGPUImageGenerator
    from imagemill.records import Lora, Outcome, Task
    from imagemill.sitting import RunOptions, RunReport

_PLACES = {
    "Engine": "engine",
    "ImagemillError": "errors",
    "InputError": "errors",
    "Lora": "records",
    "MultiGPUImageEditor": "editor",
    "MultiGPUImageGenerator": "generator",
    "Outcome": "records",
    "RunOptions": "sitting",
    "RunReport": "sitting",
    "Task": "records",
    "run": "api",
}

__all__ = [
    "Engine",
    "ImagemillError",
    "InputError",
    "Lora",
    "MultiGPUImageEditor",
    "MultiGPUImageGenerator",
    "Outcome",
    "RunOptions",
    "RunReport",
    "Task",
    "__version__",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'imagemill' has no attribute {name!r}")
    value = getattr(import_module(f"imagemill.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
