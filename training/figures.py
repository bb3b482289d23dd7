"""Measures the shipped models, as the model cards show: `python training/figures.py --out build/figures`.

Runs the prompts through imagemill itself (two workers on the CPU take some minutes) and prints a table; the pictures
stay in `--out` to be looked at. `--sheets DIR` also writes the contact sheets of README and docs.
"""

from __future__ import annotations

import argparse
import json
import random
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import imagemill
from classifier import load_classifier
from measure import (
    WHOLE,
    Picture,
    add_instructions,
    background_colour,
    background_prompts,
    count_prompts,
    nearer,
    nearer_by_pixels,
    noun_prompts,
    nouns_seen,
    parts,
    place_prompts,
    psnr,
    stands_at,
)
from nouns import load_nouns
from render import Atlas
from scenes import COLOURS

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "examples" / "bench_tiny"
CLASSIFIER = ROOT / "tests" / "data" / "noun_classifier.safetensors"
NOUNS = [noun.name for noun in load_nouns()]
GROUNDS = WHOLE[:20]
PLACED = ("apple", "cat", "rocket", "key", "owl", "chair", "car", "mushroom", "guitar", "penguin")
LOOKED_AT = ("cat", "apple", "car", "house", "owl", "rocket", "dog", "tree", "fish", "guitar", "cactus", "bus")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--sheets", type=Path, default=None)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    paint = Painter(options.out, options.workers)
    rows = [*of_text_to_image(paint), *of_loras(paint, Atlas(options.sprites)), *of_edits(paint)]
    print("\n| what | figure |\n|---|---|")
    for what, figure in rows:
        print(f"| {what} | {figure} |")
    if options.sheets:
        options.sheets.mkdir(parents=True, exist_ok=True)
        sheets(paint, options.sheets)


class Painter:
    """Runs tasks with imagemill and hands back their pictures, in order. Resumes what is there."""

    def __init__(self, out: Path, workers: int) -> None:
        self.out = out
        self.workers = workers

    def __call__(self, name: str, tasks: Sequence[dict[str, Any]], model: str = "tiny") -> list[Picture]:
        folder = self.out / name
        report = imagemill.run(tasks, out=folder, model=model, workers=self.workers)
        if report.exit_code:
            raise SystemExit(f"{folder}: {report.failed} failed, {report.pending} pending; see its report.html")
        results = map(json.loads, (folder / "results.jsonl").read_text("utf-8").splitlines())
        return [np.asarray(Image.open(folder / result["path"]).convert("RGB")) for result in results]

    def prompts(self, name: str, prompts: Iterable[str], **fields: Any) -> list[Picture]:
        return self(name, [{"prompt": prompt, **fields} for prompt in prompts])


def of_text_to_image(paint: Painter) -> list[tuple[str, str]]:
    """The rows of `tiny`."""
    classifier = load_classifier(CLASSIFIER)
    grounds = background_prompts(list(GROUNDS))
    pictures = paint.prompts("backgrounds", [prompt for prompt, _ in grounds])
    colour = share(background_colour(picture) == want for picture, (_, want) in zip(pictures, grounds, strict=True))
    chosen = random.Random(7).sample(NOUNS, 300)
    named = noun_prompts(chosen)
    seen = nouns_seen(classifier, paint.prompts("nouns", [prompt for prompt, _ in named]))
    wrong = [(want, NOUNS[number]) for (_, want), number in zip(named, seen, strict=True) if NOUNS[number] != want]
    print("nouns seen as others:", wrong)
    counted = count_prompts(list(WHOLE))
    found = [parts(picture) for picture in paint.prompts("counts", [prompt for prompt, _ in counted])]
    right = share(number == want for number, (_, want) in zip(found, counted, strict=True))
    print("miscounted:", [(p, n) for n, (p, want) in zip(found, counted, strict=True) if n != want])
    placed = place_prompts(list(PLACED))
    stood = paint.prompts("places", [prompt for prompt, _ in placed])
    there = [stands_at(picture, want) for picture, (_, want) in zip(stood, placed, strict=True)]
    print("misplaced:", [prompt for ok, (prompt, _) in zip(there, placed, strict=True) if not ok])
    return [
        (f"background colour right, {len(COLOURS)} colours x {len(GROUNDS)} nouns", colour),
        (f"noun recognised among {len(NOUNS)} by the classifier, {len(named)} prompts", share(not w for w in
         [NOUNS[number] != want for (_, want), number in zip(named, seen, strict=True)])),
        (f'"two" and "three" counted by connected parts, {len(counted)} prompts', right),
        (f"place words by the centre of mass, {len(placed)} prompts", share(there)),
    ]  # fmt: skip


def of_loras(paint: Painter, atlas: Atlas) -> list[tuple[str, str]]:
    """A row for each look."""
    rows = []
    for look in ("pixel-art", "line-icon"):
        nouns = random.Random(11).sample(NOUNS, 60)
        prompts = [f"{prompt} on a yellow background" for prompt, _ in noun_prompts(nouns)]
        pictures = paint.prompts(look, prompts, lora=look)
        base = paint.prompts(f"without-{look}", prompts)
        for what, near in (("its marks", nearer), ("pixels", nearer_by_pixels)):
            with_it, without = (
                share(near(picture, noun, atlas, look) for picture, noun in zip(made, nouns, strict=True))
                for made in (pictures, base)
            )
            name = f"nearer to the look's atlas than to the 3D one by {what}, `{look}` at 1, {len(nouns)} prompts"
            rows.append((name, f"{with_it}; without the adapter {without}"))
    return rows


def of_edits(paint: Painter) -> list[tuple[str, str]]:
    """The rows of `tiny-edit`, on the embedded benchmark."""
    pairs = [json.loads(line) for line in (BENCH / "bench.jsonl").read_text("utf-8").splitlines()]
    tasks = [{"id": pair["id"], "prompt": pair["instruction"], "image": str(BENCH / pair["image"])} for pair in pairs]
    edited = paint("edits", tasks, model="tiny-edit")
    better: dict[str, list[bool]] = {}
    gains = []
    for pair, picture in zip(pairs, edited, strict=True):
        source, target = (np.asarray(Image.open(BENCH / pair[name]).convert("RGB")) for name in ("image", "target"))
        before, after = psnr(source, target), psnr(picture, target)
        better.setdefault(pair["category"], []).append(after > before)
        gains.append((before, after))
        if after <= before:
            print(f"no better: {pair['id']} ({pair['instruction']}): {before:.1f} to {after:.1f} dB")
    rows = [(f"PSNR to the target above the source's, {kind}", share(values)) for kind, values in better.items()]
    added = add_instructions(random.Random(5).sample(NOUNS, 60), paint.out / "plain")
    seen = nouns_seen(load_classifier(CLASSIFIER), paint("added", [task for task, _ in added], model="tiny-edit"))
    print("added, seen as others:", [(w, NOUNS[n]) for n, (_, w) in zip(seen, added, strict=True) if NOUNS[n] != w])
    named = share(NOUNS[number] == want for number, (_, want) in zip(seen, added, strict=True))
    everything = [value for values in better.values() for value in values]
    means = np.mean(gains, axis=0)
    return [
        (f"PSNR to the target above the source's, all {len(pairs)} pairs", share(everything)),
        *rows,
        ("mean PSNR to the target: unedited source, edit", f"{means[0]:.1f} dB, {means[1]:.1f} dB"),
        (f"noun added to a plain picture, recognised among {len(NOUNS)} by the classifier, {len(added)}", named),
    ]


def share(values: Iterable[bool]) -> str:
    """`97.3 % (292 of 300)`."""
    held = [bool(value) for value in values]
    return f"{100 * sum(held) / len(held):.1f} % ({sum(held)} of {len(held)})"


# --- sheets -----------------------------------------------------------------------------------------------------------

SHEET = (
    "a red apple", "two cats on a blue background", "a small rocket on a yellow background, top left",
    "a sailboat", "three balloons on a pink background", "a green dragon", "an owl on an orange background",
    "a fox and a rabbit", "a big castle on a purple background", "a cup of coffee, soft light", "a blue car",
    "a penguin on a turquoise background", "a slice of pizza", "a robot holding nothing, highly detailed",
    "a hot air balloon over the sea", "a dinosaur on a white background", "a guitar on a brown background",
    "a strawberry, bottom right, on a gray background",
)  # fmt: skip


def sheets(paint: Painter, folder: Path) -> None:
    """`tiny.png`, `loras.png` and `tiny-edit.png`: pictures with their prompts."""
    pictures = paint.prompts("sheet", SHEET)
    grid(list(zip(pictures, SHEET, strict=True)), 6, folder / "tiny.png")
    cells = []
    for look in ("pixel-art", "line-icon"):
        for strength in (0.0, 0.5, 1.0):
            tasks = [
                {"prompt": prompt, "seed": 42 + number, "lora_path": look, "lora_strength": strength}
                for number, (prompt, _) in enumerate(noun_prompts(list(LOOKED_AT[:6])))
            ]
            made = paint(f"sheet-{look}-{strength}", tasks)
            cells += [(picture, f"{look} at {strength:g}") for picture in made]
    grid(cells, 6, folder / "loras.png")
    pairs = [json.loads(line) for line in (BENCH / "bench.jsonl").read_text("utf-8").splitlines()]
    tasks = [{"id": pair["id"], "prompt": pair["instruction"], "image": str(BENCH / pair["image"])} for pair in pairs]
    edited = paint("edits", tasks, model="tiny-edit")
    shown = []
    for number in (0, 4, 11, 14, 21, 22, 26, 31, 33, 37, 41, 44):
        source = np.asarray(Image.open(BENCH / pairs[number]["image"]).convert("RGB"))
        shown += [(source, pairs[number]["instruction"]), (edited[number], "")]
    grid(shown, 6, folder / "tiny-edit.png")


def grid(cells: Sequence[tuple[Picture, str]], columns: int, path: Path) -> None:
    """Pictures side by side, each with its words below."""
    width, height, text = 132, 132, 38
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, words) in enumerate(cells):
        x, y = number % columns * width, number // columns * (height + text)
        sheet.paste(Image.fromarray(picture), (x + 2, y + 2))
        for line, part in enumerate(textwrap.wrap(words, 22)[:3]):
            pen.text((x + 3, y + height + 12 * line), part, fill=(60, 60, 60))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main()
