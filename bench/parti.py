"""The tasks of the benchmark: 48 PartiPrompts of mixed length as rows that every engine reads alike.

`parti_48.txt` names its source and its licence (Apache-2.0, google-research/parti).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPTS = Path(__file__).with_name("parti_48.txt")
SOURCES = 8
"""Different pictures to edit."""

MIXED = ((1, 1), (3, 4), (1, 2), (1, 1), (4, 3))
"""Aspects of tasks of mixed sizes, in turn; the longer side is the one that is asked for."""

UNIT = 32
"""Sides of mixed sizes are multiples of this many pixels."""

Row = dict[str, Any]


def prompts(count: int) -> list[str]:
    """So many prompts; after the 48th they begin again."""
    lines = [line for line in PROMPTS.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return [lines[number % len(lines)] for number in range(count)]


def rows(count: int, side: int, steps: int) -> list[Row]:
    """Text to image without guidance, sides in pixels."""
    common = {"width": side, "height": side, "steps": steps, "guidance_scale": 0.0}
    return [
        {"id": f"{number:04d}", "prompt": prompt, "seed": 1000 + number, **common}
        for number, prompt in enumerate(prompts(count))
    ]


def edits(count: int, side: int, steps: int, sources: Sequence[Path]) -> list[Row]:
    """Edits with true CFG: a negative prompt, two forwards a step. The sources have the size of the result."""
    found = []
    for number, row in enumerate(rows(count, side, steps)):
        del row["guidance_scale"]
        row |= {"image": str(sources[number % len(sources)]), "negative_prompt": " ", "true_cfg_scale": 4.0}
        found.append(row)
    return found


def mixed(found: Sequence[Row], side: int) -> list[Row]:
    """The same tasks in sizes that change from one to the next."""
    made = []
    for number, row in enumerate(found):
        parts = MIXED[number % len(MIXED)]
        width, height = (max(UNIT, side * part // max(parts) // UNIT * UNIT) for part in parts)
        made.append(row | {"width": width, "height": height})
    return made


def with_loras(found: Sequence[Row], loras: Sequence[Path]) -> list[Row]:
    """The same tasks with the adapters in turn."""
    return [row | {"lora_path": str(loras[number % len(loras)])} for number, row in enumerate(found)]


def write(path: Path, found: Sequence[Row]) -> Path:
    """The rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), "utf-8")
    return path


def pictures(folder: Path, side: int, count: int = SOURCES) -> list[Path]:
    """Pictures to edit, square: coloured shapes over a gradient, the same on every machine."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"source-{side}-{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        if path.exists():
            continue
        dice = random.Random(number)
        image = Image.linear_gradient("L").resize((side, side)).rotate(90 * number).convert("RGB")
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            x, y, size = (dice.randrange(side) for _ in range(3))
            colour = tuple(dice.randrange(256) for _ in range(3))
            draw.ellipse((x, y, x + size // 3, y + size // 3), fill=colour)
        image.save(path)
    return paths
