"""The arguments of `bench/throughput.py`, checked."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from engines import ROOT

ROWS = "abcdefw"


def arguments_of(about: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; lists are split, and what does not go is refused."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="a,d", help="letters, with commas between them")
    parser.add_argument("--model", choices=("z-image", "qwen-image-edit"), default="z-image")
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--gpus", default="1", help="numbers of GPUs, with commas between them")
    parser.add_argument("--tasks", default="48", help="how many; several for --scaling")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"))
    parser.add_argument("--minutes", type=float, default=9.0, help="after these no row starts, building counted in")
    parser.add_argument("--work", type=Path, default=Path("/tmp/imagemill-bench"), help="models, pictures, caches")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="models of a few MB: to try the script, not to measure")
    parser.add_argument("--backend", default="inductor", help="of torch.compile in row b")
    parser.add_argument("--eager", action="store_true", help="imagemill without --compile")
    parser.add_argument("--no-trace", action="store_true", help="imagemill without --trace")
    parser.add_argument("--imagemill", default="", metavar="ARGS", help="more arguments for `imagemill run`")
    parser.add_argument("--commit", default=None, help="for a checkout without its git folder")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a file's table and end")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--engines", default="imagemill,accelerate", help="--scaling")
    parser.add_argument("--loads", default="equal,mixed", help="--scaling: equal tasks, mixed sizes with 8 LoRAs")
    parser.add_argument("--policies", default="dynamic,lockstep", help="--scaling")
    parser.add_argument(
        "--cold", default="", help="--scaling: tasks to measure cold too; the least of --tasks if left out"
    )
    parser.add_argument(
        "--settings", default="{}", metavar="JSON", help="--scaling: keyword arguments of imagemill.Engine"
    )
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--tokens", type=int, default=128, help="--judge: tokens of an answer")
    options = parser.parse_args(arguments)
    options.rows = [row.strip() for row in options.rows.split(",") if row.strip()]
    if unknown := [row for row in options.rows if row not in ROWS or len(row) != 1]:
        parser.error(f"--rows: there is no row {', '.join(unknown)}; known: {', '.join(ROWS)}")
    options.gpus = numbers(parser, "--gpus", options.gpus)
    counts = numbers(parser, "--tasks", options.tasks)
    if not options.scaling and len(counts) > 1:
        parser.error("--tasks: one number, but for --scaling")
    options.tasks = counts if options.scaling else counts[0]
    options.cold = numbers(parser, "--cold", options.cold) if options.cold else [min(counts)]
    for name in ("engines", "loads", "policies"):
        setattr(options, name, getattr(options, name).split(","))
    options.commit = options.commit or os.environ.get("IMAGEMILL_COMMIT") or commit()
    options.work, options.out = options.work.absolute(), options.out.absolute()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return options


def numbers(parser: argparse.ArgumentParser, name: str, text: str) -> list[int]:
    """Positive whole numbers with commas between them."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        parser.error(f"{name}: {text!r} is no list of positive numbers")
    return found


def commit() -> str:
    """The checkout's commit, `+` for changes; `unknown` without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("+" if changed.strip() else "")
