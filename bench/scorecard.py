"""The figures of rows as docs/benchmarks.json holds them, and the Markdown table made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

KEYS = (
    "row",
    "model",
    "size",
    "gpus",
    "images_per_second",
    "ratio_to_diffusers_loop",
    "share_of_ceiling",
    "first_image_s",
    "peak_gib",
    "gpu_idle_share",
    "commit",
    "gpu",
)
"""What every entry has; what could not be measured is null. `note` says why, `details` holds the rest."""

BASELINE = "a"
TITLES = {
    "a": "diffusers loop, one process",
    "b": "the same, compiled",
    "c": "accelerate, split_between_processes",
    "d": "imagemill bf16",
    "e": "imagemill fp8",
    "f": "imagemill bf16, 8 LoRAs interleaved",
    "w": "imagemill bf16, compile cache of d",
    "judge-single": "imagemill judge, one at a time",
    "judge-batched": "imagemill judge, batched",
}
Entry = dict[str, Any]


def entry(*, note: str = "", details: Mapping[str, Any] | None = None, **figures: Any) -> Entry:
    """One entry with every key. Raises `KeyError` for a figure that there is not."""
    if unknown := set(figures) - set(KEYS):
        raise KeyError(f"no such figure: {', '.join(sorted(unknown))}")
    return {key: figures.get(key) for key in KEYS} | {"note": note, "details": dict(details or {})}


def rated(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with the ratio to row (a) of the same model, size and machine filled in, null where that is missing.

    A machine is one boot of one machine: figures of two are never compared. Of several rows (a) the first that was measured
    with as many tasks counts, else the first.
    """
    base: dict[tuple[object, ...], float] = {}
    for one in entries:
        if one["row"] == BASELINE and one["images_per_second"]:
            for key in (_run(one), (*_run(one), one["details"].get("tasks"))):
                base.setdefault(key, one["images_per_second"])
    found = []
    for one in entries:
        slow = base.get((*_run(one), one["details"].get("tasks")), base.get(_run(one)))
        rate = one["images_per_second"]
        judges = str(one["row"]).startswith("judge")
        ratio = rate / slow if rate and slow and not judges else None
        found.append(one | {"ratio_to_diffusers_loop": ratio and round(ratio, 3)})
    return found


def _run(one: Entry) -> tuple[object, ...]:
    details = one["details"]
    return one["model"], one["size"], details.get("machine"), details.get("steps"), details.get("small")


def add(path: Path, one: Entry) -> list[Entry]:
    """Append an entry to the file and give all of its entries back; a file that is not there is begun."""
    entries = rated([*read(path), one])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=1) + "\n")
    return entries


def read(path: Path) -> list[Entry]:
    """The entries of a file. Raises `ValueError` when one lacks a key."""
    if not path.exists():
        return []
    entries: list[Entry] = json.loads(path.read_text())
    for number, one in enumerate(entries):
        if lack := [key for key in KEYS if key not in one]:
            raise ValueError(f"{path}: entry {number} lacks {', '.join(lack)}")
        one.setdefault("note", "")
        one.setdefault("details", {})
    return entries


def table(entries: Iterable[Entry]) -> str:
    """A Markdown table, one line an entry in the order given; what has no figure shows its note instead."""
    lines = [
        "| row | model | size | GPUs | pictures/s | over (a) | of the ceiling | first picture | peak | GPU idle | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in entries:
        row = str(one["row"])
        cells = [
            f"({row}) {TITLES[row]}" if len(row) == 1 and row in TITLES else TITLES.get(row, row),
            str(one["model"]),
            _size(one["size"]),
            str(one["gpus"]),
            _figure(one["images_per_second"], "{:.3f}"),
            _figure(one["ratio_to_diffusers_loop"], "{:.2f}"),
            _figure(one["share_of_ceiling"], "{:.1%}"),
            _figure(one["first_image_s"], "{:.1f} s"),
            _figure(one["peak_gib"], "{:.1f} GiB"),
            _figure(one["gpu_idle_share"], "{:.1%}"),
            str(one.get("note", "")).replace("|", "\\|").replace("\n", " "),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _size(size: Any) -> str:
    return "–" if size is None else f"{size}²"


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
