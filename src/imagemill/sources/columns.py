"""The columns that are understood, and which of a source's columns is the prompt."""

from __future__ import annotations

import difflib
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from typing import Any

from imagemill.errors import InputError

FIELDS = {
    "id": "id",
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "images": "images",
    "image": "images",
    "model": "model",
    "width": "width",
    "height": "height",
    "size": "size",
    "steps": "steps",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "true_cfg_scale": "true_cfg_scale",
    "seed": "seed",
    "loras": "loras",
    "lora": "loras",
    "lora_path": "lora_path",
    "lora_strength": "lora_strength",
    "output_path": "output_path",
    "num_images": "num_images",
    "system_prompt": "system_prompt",
    "metadata": "metadata",
}
"""Every column that is understood, and the field it stands for."""


CLOSE = 0.82
"""How like a known column an unknown one must be for it to be a slip, as difflib counts it."""


def field_of(column: Any, columns: Container[Any]) -> str | None:
    """The field that a column stands for, its case aside where no other of the `columns` has the name itself; None for metadata.
    Columns in their thousands are best given as a mapping or a set."""
    if column in FIELDS or not isinstance(column, str):
        return FIELDS.get(column)
    plain = column.lower()
    return None if plain in columns else FIELDS.get(plain)


@lru_cache(maxsize=4096)
def meant(column: str, known: tuple[str, ...] = tuple(FIELDS)) -> str:
    """The known column that an unknown one nearly is, its first letter included; empty when it is like none."""
    alike = [name for name in known if name[:1] == column[:1].lower()]
    return next(iter(difflib.get_close_matches(column.lower(), alike, n=1, cutoff=CLOSE)), "")


def listed(columns: Mapping[str, Any] | Sequence[str], limit: int = 20) -> str:
    """Column names for a message."""
    names = [str(name) for name in columns]
    return (", ".join(names[:limit]) + (", ..." if len(names) > limit else "")) or "none"


def prompt_column_of(columns: Mapping[str, Any] | Sequence[str]) -> str:
    """`prompt`, or the only column that differs from it in case alone, or an edit benchmark's `instruction`."""
    if "prompt" in columns:
        return "prompt"
    alike = [name for name in columns if isinstance(name, str) and name.lower() == "prompt"]
    if len(alike) == 1:
        return alike[0]
    return "instruction" if "instruction" in columns else "prompt"


def table_prompt_column(columns: Sequence[str], prompt_column: str | None, place: str) -> str:
    """The column of a table that holds the prompt. Raises `InputError` when there is none."""
    name = prompt_column or prompt_column_of(columns)
    if name in columns:
        return name
    hint = f"name one of its columns with --prompt-column: {listed(columns)}"
    if len(columns) == 1 and ";" in columns[0]:
        hint = f"its columns seem to be separated by ';', so save it with ',': {columns[0]}"
    raise InputError(f"{place}: there is no column {name!r}; {hint}")
