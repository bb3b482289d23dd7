"""The data of a settings file before they are checked: paths made absolute, options put above them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagemill.errors import ConfigError
from imagemill.scoring.settings_form import as_judge
from imagemill.scoring.settings_wording import nearest

OPTIONS = {
    **{name: name for name in ("bench", "lang", "categories", "limit", "out", "rubric", "min_coverage", "controls")},
    **{name: name for name in ("save_images", "allow_urls")},
    "edit_model": "edit.model",
    **{name: f"edit.{name}" for name in ("steps", "true_cfg_scale", "guidance_scale", "negative_prompt", "seed")},
    **{name: f"edit.{name}" for name in ("schedule", "size", "dtype", "compile", "precision", "attention")},
    **{name: f"devices.{name}" for name in ("device", "gpus", "gpu_ids", "workers", "isolate")},
    "judge": "judge",
    "judge_model": "judge.model",
    "judge_dtype": "judge.dtype",
    **{name: f"judge.{name}" for name in ("batch_size", "max_new_tokens", "compare_with_original", "base_url")},
    **{name: f"judge.{name}" for name in ("api_key_env", "concurrency", "pixels")},
    "log_level": "logging.level",
    "log_dir": "logging.folder",
}
"""Names of options and the keys of the YAML file that they stand for."""

PATHS = ("bench", "out", "log_dir")
"""Options that are paths."""

OF_ITS_KIND = ("kind", "model", "base_url")
"""What of a judge goes when another kind of judge takes its place."""


def chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given (not None), their paths absolute. Raises `ConfigError` for one that is none."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in OPTIONS:
            close = nearest(name, list(OPTIONS))
            raise ConfigError(f"{name}: is no setting of an evaluation" + (f"; did you mean {close}?" if close else ""))
    here = Path.cwd()
    return {name: _path(value, here) if name in PATHS else value for name, value in given.items()}


def merged(form: Mapping[Any, Any], given: Mapping[str, Any]) -> dict[Any, Any]:
    """The data of a file with the options in their places.

    Another kind of judge takes model and address of the file's judge away; a choice of GPUs takes the other kind away.
    """
    data = dict(form)
    for section in ("edit", "judge"):
        data[section] = {} if data.get(section) is None else data[section]
    data["judge"] = as_judge(data["judge"])
    if "judge" in given:
        data["judge"] = _judge(data["judge"], as_judge(given["judge"]))
    for name, value in given.items():
        section, _, key = OPTIONS[name].rpartition(".")
        if not section and name != "judge":
            data[key] = value
        elif section and isinstance(data.get(section, {}), dict):
            data[section] = {**data.get(section, {}), key: value}
    for name, displaced in (("gpu_ids", "gpus"), ("gpus", "gpu_ids")):
        if name in given and displaced not in given and isinstance(data["devices"], dict):
            data["devices"].pop(displaced, None)
    return data


def local(form: Mapping[Any, Any], base: Path) -> dict[Any, Any]:
    """The data of a file with its paths relative to the folder `base`."""
    data = dict(form)
    for name in ("bench", "out"):
        if name in data:
            data[name] = _path(data[name], base)
    if "judge" in data:
        data["judge"] = as_judge(data["judge"])
    for section, name, locate in (("edit", "model", _model), ("judge", "model", _model), ("logging", "folder", _path)):
        inner = data.get(section)
        if isinstance(inner, dict) and name in inner:
            data[section] = {**inner, name: locate(inner[name], base)}
    return data


def _judge(before: Any, after: Any) -> Any:
    if not isinstance(before, dict) or not isinstance(after, dict):
        return after
    same = after.get("kind") == before.get("kind")
    return {**{name: value for name, value in before.items() if same or name not in OF_ITS_KIND}, **after}


def _path(value: Any, base: Path) -> Any:
    """The absolute path that text means; what is no path is left to be refused."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return os.path.abspath(base / os.path.expanduser(value)) if isinstance(value, str) and value else value


def _model(value: Any, base: Path) -> Any:
    """A model's folder as an absolute path; names and repositories stay."""
    if not isinstance(value, str):
        return value
    folder = value.startswith((".", "~")) or ("/" in value and os.path.isdir(base / value))
    return _path(value, base) if folder else value
