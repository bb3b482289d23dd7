"""Folders of vision-language models as transformers keeps them: found, or had from the hub, complete, with their revision.

Reads file names, JSON and bytes; imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imagemill import hub, revision
from imagemill.devices import GIB
from imagemill.errors import InputError

INDEX = "config.json"
SHARDS = "model.safetensors.index.json"
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""What loading reads: configurations, weights, tokenizers, chat templates."""

OTHERS = ("*/*", "consolidated*")
"""What it does not: other formats of the same weights."""

_REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def locate(name: str, model: str, download: bool) -> Path:
    """The absolute folder that `model` (a folder, or a repository of the hub) means; `name` is for messages.

    Downloads if need be, unless `download` is False. Raises `InputError` when there is none, or it is incomplete.
    """
    folder = Path(os.path.expanduser(model)).absolute()
    if not os.path.isdir(folder):
        if not _REPO.fullmatch(model):
            raise InputError(f"model {name!r}: there is no folder {model}; give one, or a repository (org/name)")
        folder = hub.folder(model, download, _snapshot, gap)
    if lack := gap(folder):
        raise InputError(f"model {name!r}: {folder} is incomplete, it lacks {lack}; copy or download it again")
    return folder


def revision_of(folder: Path) -> str:
    """A sha256 in hex over what loading reads of the folder."""
    return revision.of_files(folder, files(folder))


def memory(folder: Path) -> int:
    """Bytes of all weights, a fifth more for activations, and 2 GiB for the cache of a small batch and the CUDA context."""
    weights = sum(path.stat().st_size for path in files(folder) if path.suffix == ".safetensors")
    return int(weights * 1.2) + 2 * GIB


def files(folder: Path) -> Iterator[Path]:
    """The files that loading reads, in order of their names."""
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern)}):
        if path.is_file() and not path.name.startswith((".", "consolidated")):
            yield path


def gap(folder: Path) -> str:
    """The first thing the folder lacks; empty when it lacks nothing. Raises `InputError` for JSON that does not read."""
    if not (folder / INDEX).is_file():
        return f"{INDEX} (it must be the folder of a model in transformers format)"
    _read(folder / INDEX)
    if (folder / SHARDS).is_file():
        named = sorted(set(_read(folder / SHARDS).get("weight_map", {}).values()))
        return next((shard for shard in named if not (folder / str(shard)).is_file()), "" if named else "weights")
    return "" if any(path.suffix == ".safetensors" for path in files(folder)) else "safetensors weights"


def _read(place: Path) -> dict[str, Any]:
    try:
        found = json.loads(place.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{place} does not read ({hub.line(error)}); copy or download the model again") from error
    if not isinstance(found, dict):
        raise InputError(f"{place} holds no JSON object; copy or download the model again")
    return found


def _snapshot(repo: str, offline: bool) -> Path:
    """The snapshot with what loading reads, and not every format that a repository holds."""
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        repo, local_files_only=offline, allow_patterns=list(PATTERNS), ignore_patterns=list(OTHERS)
    )
    return Path(found)
