"""What others build on, frozen: public names, options, what an import costs, and which room may know which."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

import imagemill
from imagemill.cli import app

PACKAGE = Path(imagemill.__file__).parent

# --- names ------------------------------------------------------------------------------------------------------------

NAMES = {
    "Engine": "class",
    "ImagemillError": "class",
    "InputError": "class",
    "Lora": "class",
    "MultiGPUImageEditor": "class",
    "MultiGPUImageGenerator": "class",
    "Outcome": "class",
    "RunOptions": "class",
    "RunReport": "class",
    "Task": "class",
    "__version__": "str",
    "run": "function",
}


def test_the_public_names_are_frozen() -> None:
    assert sorted(imagemill.__all__) == sorted(NAMES)
    assert dir(imagemill) == sorted(NAMES)


@pytest.mark.parametrize("first", [None, "run", "Engine", "Task"])
def test_every_public_name_is_what_it_is_whichever_is_used_first(first: str | None) -> None:
    kinds = "{name: type(getattr(imagemill, name)).__name__.replace('type', 'class') for name in imagemill.__all__}"
    script = f"import imagemill; {f'imagemill.{first}' if first else ''}\nprint({kinds})"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ast.literal_eval(ended.stdout) == NAMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Egine'"):
        _ = imagemill.Egine


SIGNATURES = {
    "run": ["source", "out", "options", "settings"],
    "Engine": [
        *("model", "gpus", "gpu_ids", "workers", "device", "isolate", "schedule", "config", "show", "keep", "settings"),
    ],
    "Engine.run": ["self", "source", "out", "options"],
    "Engine.close": ["self"],
    "Engine.drain": ["self"],
    "Engine.cancel": ["self"],
    "MultiGPUImageEditor": [
        *("device_ids", "model_name", "enable_batch_sync", "num_inference_steps", "true_cfg_scale", "settings"),
    ],
    "MultiGPUImageEditor.batch_edit": [
        *("self", "images", "instructions", "enable_batch_sync", "on_error", "seed", "fields"),
    ],
    "MultiGPUImageEditor.close": ["self"],
    "MultiGPUImageGenerator": ["num_gpus", "gpu_ids", "output_dir", "settings"],
    "MultiGPUImageGenerator.generate_batch": ["self", "tasks"],
    "MultiGPUImageGenerator.close": ["self"],
    "RunOptions": [
        *("limit", "skip_bad", "retry", "rerun_changed", "overwrite", "ledger", "prompt_column", "again"),
    ],
    "RunReport": [
        *("folder", "done", "failed", "pending", "resumed", "skipped", "seconds", "status", "message", "exit_code"),
        *("left_out", "usual_failure", "older"),
    ],
    "Task": [
        *("id", "prompt", "negative_prompt", "images", "model", "width", "height", "steps", "guidance_scale"),
        *("true_cfg_scale", "seed", "loras", "output_path", "num_images", "metadata", "system_prompt"),
    ],
    "Lora": ["path", "strength", "digest"],
    "Outcome": [
        *("task", "seq", "state", "path", "kind", "message", "attempts", "worker", "elapsed", "receipt", "resumed"),
    ],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_parameters_of_public_calls_are_frozen(name: str) -> None:
    head, _, tail = name.partition(".")
    importlib.import_module("imagemill.engine")
    value = getattr(imagemill, head)
    value = getattr(value, tail) if tail else value
    assert list(inspect.signature(value).parameters) == SIGNATURES[name]


# --- options ----------------------------------------------------------------------------------------------------------

PLAN = {
    *(
        "--out",
        "--model",
        "--gpus",
        "--gpu-ids",
        "--device",
        "--workers",
        "--schedule",
        "--config",
        "--lora",
        "--steps",
    ),
    *("--size", "--guidance", "--true-cfg-scale", "--negative-prompt", "--seed", "--batch-size", "--prompt-column"),
    "--allow-urls",
    *("--format", "--sink", "--limit", "--skip-bad", "--retry-failed", "--rerun-changed", "--exact"),
    *("--compile", "--no-compile", "--precision", "--attention"),
}
OPTIONS = {
    "run": {"SOURCE", *PLAN, "--isolate", "--no-metadata", "--preload", "--trace", "--dry-run", "--quiet"},
    "plan": {"SOURCE", *PLAN},
    "eval": {
        *("SOURCE", "--edit-model", "--judge", "--base-url", "--categories", "--limit", "--out", "--lang", "--rubric"),
        *("--controls", "--min-coverage", "--steps", "--seed", "--schedule", "--gpus", "--gpu-ids", "--device"),
        "--allow-urls",
        *("--workers", "--rejudge", "--retry-failed", "--rerun-changed", "--dry-run", "--quiet"),
        *("--compile", "--no-compile", "--precision", "--attention"),
    },
    "compare": {"FIRST", "SECOND", "--json"},
    "repair": {"FOLDER"},
    "report": {"FOLDER"},
    "models": set(),
    "doctor": set(),
}


def test_the_commands_and_options_are_frozen() -> None:
    command = typer.main.get_command(app)
    found = {
        name: {
            option
            for parameter in sub.params
            for option in (
                [parameter.name.upper()]
                if parameter.param_type_name == "argument"
                else parameter.opts + parameter.secondary_opts
            )
        }
        for name, sub in command.commands.items()
    }
    assert found == OPTIONS
    assert [option for parameter in command.params for option in parameter.opts] == ["--version"]


# --- what an import costs ---------------------------------------------------------------------------------------------

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "ray",
    "accelerate",
    "huggingface_hub",
    "pyarrow",
    "numpy",
    "PIL",
)


def imported(*arguments: str) -> set[str]:
    """The top-level modules that a Python process imports."""
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_importing_the_package_imports_next_to_nothing() -> None:
    found = imported("-c", "import imagemill")
    assert "imagemill" in found
    assert not found & {*HEAVY, "pydantic", "yaml", "typer", "rich"}


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("eval", "--help"), ("--version",)])
def test_help_imports_no_library_that_takes_long(arguments: tuple[str, ...]) -> None:
    found = imported("-m", "imagemill.cli", *arguments)
    assert "typer" in found
    assert not found & {*HEAVY, "yaml"}  # typer itself may import pydantic


@pytest.mark.parametrize("name", ["engine", "generator", "editor", "worker", "runners.diffusion"])
def test_no_module_of_the_package_costs_torch(name: str) -> None:
    assert not imported("-c", f"import imagemill.{name}") & {"torch", "diffusers", "transformers", "ray", "pyarrow"}


# --- which room may know which ----------------------------------------------------------------------------------------

WORDS = {"records", "errors"}
CORE = {"plan", "canvas", "schedule", "worker_state", "retry", "policies", "backlog", "simulate"}
EDGES = {"__main__", "api", "cli", "cli_eval", "server", "scoring", "report", "doctor", "listing", "forecast"}
HOSTS = {"torch", "diffusers", "transformers", "ray"}
HOST_ROOMS = ("imagemill.runners.", "imagemill.families.", "imagemill.executors.ray")
IMPURE = {
    *("time", "datetime", "threading", "multiprocessing", "concurrent", "subprocess", "asyncio", "queue", "signal"),
    *("os", "io", "socket", "selectors", "shutil", "tempfile", "glob", "sqlite3", "random", "secrets", "uuid"),
}
"""Of the standard library, what has a clock, a thread, a file or chance in it: not for the pure core."""


@dataclass(frozen=True)
class Import:
    """One imported module, where, and whether it is imported when the file is (not in a function)."""

    by: str
    module: str
    at_once: bool
    line: int

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def room(self) -> str:
        """`report` for `imagemill.report.page`; empty for what is not ours or the package itself."""
        parts = self.module.split(".")
        return parts[1] if parts[0] == "imagemill" and len(parts) > 1 else ""

    def __str__(self) -> str:
        return f"{self.by}, line {self.line}: {self.module}"


def imports() -> list[Import]:
    """Every import of the package that runs; those for type checkers alone do not."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("imagemill", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        is_package = path.name == "__init__.py"
        for node, at_once in walk(ast.parse(path.read_text("utf-8")), at_once=True):
            found += [Import(name, module, at_once, node.lineno) for module in modules(node, name, is_package)]
    assert len(found) > 300
    return found


def walk(tree: ast.AST, *, at_once: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield from walk(other, at_once=at_once)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node, at_once
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(node, at_once=at_once and not inside)


def modules(node: ast.Import | ast.ImportFrom, by: str, is_package: bool) -> Iterator[str]:
    """The modules a statement imports; `from imagemill import plan` imports `imagemill.plan`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        above = by.split(".")[: len(by.split(".")) - node.level + is_package]
        base = ".".join([*above, *filter(None, [base])])
    for alias in node.names:
        whole = f"{base}.{alias.name}"
        yield whole if base.startswith("imagemill") and importlib.util.find_spec(base) and is_module(whole) else base


def is_module(name: str) -> bool:
    place = PACKAGE.joinpath(*name.split(".")[1:])
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def own_room(one: Import) -> str:
    return one.by.split(".")[1] if "." in one.by else ""


def test_every_room_knows_only_the_rooms_that_it_may_know() -> None:
    """records, errors ← pure core ← driver, executors, worker ← edges; torch and its kin only inside functions."""
    wrong = []
    for one in imports():
        room, standard = own_room(one), one.top in sys.stdlib_module_names
        if room in WORDS and not (standard or one.room in WORDS):
            wrong.append(f"{one}: {room} knows the standard library and records alone")
        elif room == "records" and not standard:
            wrong.append(f"{one}: records knows the standard library alone")
        elif room in CORE and not (standard or one.room in WORDS | CORE):
            wrong.append(f"{one}: the pure core knows the standard library, records, errors and itself")
        elif room in CORE and one.top in IMPURE:
            wrong.append(f"{one}: the pure core has no clock, thread or file")
        elif room and room not in EDGES and one.room in EDGES:
            wrong.append(f"{one}: {room} is no edge and knows none")
        if one.top in HOSTS and one.at_once:
            wrong.append(f"{one}: imported only inside functions")
        elif one.top in HOSTS and not one.by.startswith(HOST_ROOMS) and room != "doctor":
            wrong.append(f"{one}: only runners, families and executors.ray import it")
    assert wrong == []


def test_the_pure_core_opens_no_file() -> None:
    for name in CORE:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text("utf-8"))
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        methods = {call.attr for call in calls if isinstance(call, ast.Attribute)}
        assert not names & {"open", "print", "input", "exec", "eval"}
        assert not methods & {"read_text", "read_bytes", "write_text", "write_bytes", "resolve_path", "stat", "exists"}


def test_nothing_is_swallowed() -> None:
    """No bare except anywhere, and no multiprocessing: its queues deadlock when a reader is killed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path}, line {node.lineno}"
    assert not [
        str(one)
        for one in imports()
        if one.top == "multiprocessing" or one.module.startswith("concurrent.futures.process")
    ]
