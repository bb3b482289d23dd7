"""A folder in which the real command works: the tasks that go in, and looks at what comes out."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from command import COMMAND, PATIENCE, Ended, Started

FORKED = """
import json, os, sys
import imagemill.engine, imagemill.intake, imagemill.report
from imagemill.cli import main

folder = sys.argv[1]
for number, arguments in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if not child:
        for handle in (1, 2):
            os.dup2(os.open(f"{folder}/{number}.{handle}", os.O_WRONLY | os.O_CREAT), handle)
        sys.argv[1:] = arguments
        main()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs each command of a list in a process of its own that has imported what every command needs."""


@dataclass(frozen=True)
class Workplace:
    """A folder with task files and output folders, and the command that works in it."""

    folder: Path
    started: list[Started] = field(default_factory=list)

    # --- the command ------------------------------------------------------------------------------------------------

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("IMAGEMILL_")}
        return {**kept, "HF_HUB_OFFLINE": "1", **more}

    def __call__(self, *arguments: object, stdin: bytes | None = None, **environment: str) -> Ended:
        """Run `imagemill ARGUMENTS` to its end."""
        ended = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment(**environment),
            input=stdin if stdin is not None else b"",
            capture_output=True,
            timeout=4 * PATIENCE,
            check=False,
        )
        return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())

    def many(self, commands: Iterable[Sequence[object]]) -> list[Ended]:
        """Run commands that do not touch each other, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda arguments: self(*arguments), commands))

    def forked(self, commands: Iterable[Sequence[object]]) -> list[Ended]:
        """Run many short commands, each in a process of its own, without the cost of importing everything anew."""
        words = json.dumps([list(map(str, arguments)) for arguments in commands])
        with TemporaryDirectory() as folder:
            ended = subprocess.run(
                [sys.executable, "-c", FORKED, folder],
                cwd=self.folder,
                env=self.environment(),
                input=words,
                capture_output=True,
                text=True,
                timeout=4 * PATIENCE,
                check=True,
            )
            said = [
                [Path(folder, f"{number}.{handle}").read_text("utf-8") for handle in (1, 2)]
                for number in range(len(ended.stdout.split()))
            ]
        return [Ended(int(code), *texts) for code, texts in zip(ended.stdout.split(), said, strict=True)]

    def start(self, *arguments: object, **environment: str) -> Started:
        """Start `imagemill ARGUMENTS`; what is left of it ends with the test."""
        self.started.append(Started(arguments, self.folder, self.environment(**environment)))
        return self.started[-1]

    def fake(self, source: object, out: object = "out", *arguments: object, **environment: str) -> Ended:
        """Run a source with the model of the machinery's tests."""
        return self("run", source, "--out", out, "--model", "fake", *arguments, **environment)

    def start_fake(self, source: object, out: object = "out", *arguments: object, **environment: str) -> Started:
        return self.start("run", source, "--out", out, "--model", "fake", *arguments, **environment)

    # --- what goes in -----------------------------------------------------------------------------------------------

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def tasks(self, rows: Sequence[dict[str, Any] | str], name: str = "tasks.jsonl") -> Path:
        """A JSONL file of the rows."""
        return self.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    # --- what comes out ---------------------------------------------------------------------------------------------

    def results(self, out: object = "out") -> list[dict[str, Any]]:
        lines = (self.folder / str(out) / "results.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def states(self, out: object = "out") -> dict[str, str]:
        return {result["id"]: result["state"] for result in self.results(out)}

    def pixels(self, out: object = "out") -> dict[str, str]:
        return pixels(self.folder / str(out))

    def ledger(self, query: str, out: object = "out") -> list[Any]:
        with closing(sqlite3.connect(self.folder / str(out) / "ledger.sqlite")) as database:
            return database.execute(query).fetchall()

    def attempts(self, out: object = "out") -> dict[str, int]:
        """How many attempts the ledger knows of each task."""
        return dict(self.ledger("SELECT id, count(*) FROM attempts GROUP BY id", out))

    def leftovers(self, out: object = "out") -> list[Path]:
        """Temporary files below the output folder."""
        return [path for path in (self.folder / str(out)).rglob("*") if path.name.endswith(".part")]


def rows(count: int = 8, delay: float = 0.0, **scripts: dict[str, Any]) -> list[dict[str, Any]]:
    """`count` tasks t0, t1, …; `scripts` say what befalls some of them. No script changes a picture."""
    return [
        {"id": f"t{number}", "prompt": f"prompt {number}", "fake": {"delay": delay, **scripts.get(f"t{number}", {})}}
        for number in range(count)
    ]


def pixels(folder: Path) -> dict[str, str]:
    """A digest of size, mode and pixels of every picture below the folder, by its path; opening one checks it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".png", ".jpg", ".webp"):
            with Image.open(path) as image:
                image.load()
                head = f"{image.mode} {image.size}".encode()
                found[path.relative_to(folder).as_posix()] = sha256(head + image.tobytes()).hexdigest()
    return found
