"""What the end-to-end tests share: the real command in a real process, and looks at what it left behind."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
COMMAND = (sys.executable, "-m", "imagemill.cli")
MARK = "IMAGEMILL_TEST_MARK"
PATIENCE = 60.0
"""Seconds until a test gives up waiting for something that should come: far more than it takes."""

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
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""Runs each command of a list in a process of its own that has imported what every command needs."""

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = PATIENCE) -> T:
    """The first true value of the condition. Fails the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"nothing within {seconds:g} s")
        time.sleep(0.02)
    return value


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


class Started:
    """A command that runs in a session of its own, as under a terminal. All its descendants carry its mark."""

    def __init__(self, arguments: Sequence[object], folder: Path, environment: dict[str, str]) -> None:
        self.mark = uuid.uuid4().hex
        self._out, self._err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*COMMAND, *map(str, arguments)],
                cwd=folder,
                env={**environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def err(self) -> str:
        return self._err.read_text("utf-8")

    def family(self) -> list[int]:
        """Every living process that carries the mark, the command itself included, whoever is its parent by now."""
        needle, found = f"{MARK}={self.mark}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if needle in (entry / "environ").read_bytes().split(b"\0") and _alive(int(entry.name)):
                        found.append(int(entry.name))
        return sorted(found)

    def children(self) -> list[int]:
        """The living processes that the command has started, and theirs; not the keeper, which does no work.

        One that has only been forked still has the command's own words: it may become the keeper, and is not counted.
        """
        forked = (b"", _words(self.pid))
        return [pid for pid in self.family() if pid != self.pid and _words(pid) not in forked and not is_keeper(pid)]

    def signal(self, number: int) -> None:
        """To the whole process group, as a terminal does."""
        os.killpg(self.pid, number)

    def wait(self) -> Ended:
        code = self.process.wait(PATIENCE)
        return Ended(code, self._out.read_text("utf-8"), self.err)

    def end(self) -> None:
        for pid in self.family():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


def _alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


def _words(pid: int) -> bytes:
    """The command line of a process, its words ended by NUL; empty for one that is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def is_keeper(pid: int) -> bool:
    """Whether the process is the one that ends the workers of a killed driver."""
    return b"/keeper.py\0" in _words(pid)


def parents() -> dict[int, int]:
    """The parent of every living process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if state not in ("Z", "X"):
                    found[int(entry.name)] = int(parent)
    return found


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


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    """An empty workplace."""
    made = Workplace(tmp_path)
    yield made
    for started in made.started:
        started.end()


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A workplace for all tests of a file."""
    made = Workplace(tmp_path_factory.mktemp("shared"))
    yield made
    for started in made.started:
        started.end()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of shared data; the test is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"needs {DATA}")
    return DATA


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """Waits for a condition, never for a time."""
    return until


@pytest.fixture(scope="session")
def pixels_of() -> Callable[[Path], dict[str, str]]:
    """Digests of the pixels of all pictures below a folder."""
    return pixels


@pytest.fixture(scope="session")
def descendants() -> Callable[[], set[int]]:
    """Living processes that this process has started, and theirs; not the keeper, which does no work."""

    def below(pid: int | None = None) -> set[int]:
        tree, found, open_ = parents(), set(), [pid or os.getpid()]
        while open_:
            now = open_.pop()
            children = {child for child, parent in tree.items() if parent == now}
            found |= children
            open_ += children
        return {one for one in found if not is_keeper(one)}

    return below


@pytest.fixture(scope="session")
def make_lora() -> Callable[..., Path]:
    """Writes an adapter that fits the embedded model: `make_lora(path, seed=1)`."""
    import random_lora

    return random_lora.make_lora
