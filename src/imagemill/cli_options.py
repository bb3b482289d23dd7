"""The options that `run` and `plan` share, and the settings they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from imagemill.config import Settings
    from imagemill.sitting import RunOptions

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="A .json, .jsonl, .csv, .tsv or .parquet file, a tweet batch, or - for JSONL on stdin."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Output folder.", show_default="outputs/SOURCE")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME|FOLDER|REPO",
        help="A known name (see `imagemill models`), a diffusers folder, or a hub repository.",
        show_default="tiny",
    ),
]
Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="N|auto",
        help="How many GPUs; auto takes those whose free memory holds the model.",
        show_default="auto",
    ),
]
GpuIds = Annotated[str | None, typer.Option("--gpu-ids", metavar="0,2,4", help="Which GPUs.")]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="cuda|cpu|auto", help="Kind of device.", show_default="auto"),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Worker processes on the CPU; on GPUs one each, this many at most.",
        show_default="one a device",
    ),
]
Isolate = Annotated[bool | None, typer.Option("--isolate", help="Run a single worker in a process of its own, too.")]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--schedule", metavar="dynamic|static|lockstep|window:K", help="Order of the work.", show_default="dynamic"
    ),
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.yaml", help="Settings; options stand above them.")
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:STRENGTH]", help="Adapter for tasks that name none; repeatable."),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.", show_default="the model's")]
Size = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Pixels.", show_default="the model's")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale.", show_default="the model's")]
TrueCfg = Annotated[
    float | None,
    typer.Option("--true-cfg-scale", help="True CFG scale, for models that take it.", show_default="the model's"),
]
Negative = Annotated[str | None, typer.Option("--negative-prompt", help="For tasks that name none.")]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of the first task; task number i gets seed + i.", show_default="42")
]
BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        metavar="N|auto",
        help="Tasks that may share a forward pass; auto goes by shape. Pictures may then be 1 of 255 apart.",
        show_default="auto",
    ),
]
Exact = Annotated[bool | None, typer.Option("--exact", help="Batches of one: a picture hangs on no other task.")]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the model's blocks.",
        show_default="on GPUs where the run is long enough to pay it back",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="bf16|fp8",
        help="fp8 multiplies in 8 bits, on GPUs that can; the pictures differ a little.",
        show_default="bf16",
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="NAME|auto",
        help="An attention back end of diffusers, such as native or _flash_3; auto takes the fastest installed.",
        show_default="auto",
    ),
]
Preload = Annotated[
    bool | None, typer.Option("--preload", help="Start the workers while the source is still being read and checked.")
]
Trace = Annotated[
    bool | None,
    typer.Option("--trace", help="Write trace.json beside the report: every stage of every worker, for Perfetto."),
]
AllowUrls = Annotated[
    bool | None,
    typer.Option("--allow-urls", help="Fetch pictures to edit that are named by an http(s) address; public ones only."),
]
PromptColumn = Annotated[
    str | None,
    typer.Option("--prompt-column", metavar="NAME", help="The column that holds the prompt.", show_default="prompt"),
]
Format = Annotated[
    str | None, typer.Option("--format", metavar="png|jpg|webp", help="Picture format.", show_default="png")
]
SinkOption = Annotated[
    str | None,
    typer.Option("--sink", metavar="files|none", help="none keeps no pictures: for measuring.", show_default="files"),
]
NoMetadata = Annotated[bool, typer.Option("--no-metadata", help="Write no task into the pictures.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N rows.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out instead of starting nothing.")]
RetryFailed = Annotated[
    str | None,
    typer.Option(
        "--retry-failed",
        metavar="[KIND,...]",
        help="Try failed tasks of earlier runs again; alone or with kinds as in --retry-failed=oom,timeout.",
    ),
]
RerunChanged = Annotated[bool, typer.Option("--rerun-changed", help="Make pictures of changed tasks again.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read and check everything, start nothing; the same as `imagemill plan`.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the summary.")]

OPTION_KEYS = {
    "model": "model",
    "gpus": "devices.gpus",
    "gpu_ids": "devices.gpu_ids",
    "device": "devices.device",
    "workers": "devices.workers",
    "isolate": "devices.isolate",
    "schedule": "schedule",
    "lora": "loras",
    "steps": "steps",
    "size": "size",
    "guidance": "guidance",
    "true_cfg_scale": "true_cfg_scale",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "batch_size": "batch_size",
    **{name: name for name in ("exact", "compile", "precision", "attention", "preload", "trace", "allow_urls")},
    "format": "output.format",
    "sink": "output.sink",
}
"""Options of the command line and the settings they stand for."""


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The settings of the YAML file with the options above them. Raises `ConfigError` that names the option."""
    from imagemill import config

    base = config.load_settings(given["config"]) if given["config"] else config.Settings()
    overrides = {key: given.get(name) for name, key in OPTION_KEYS.items()}
    overrides |= {f"devices.{name}": value for name, value in gpus_of(given).items()}
    overrides["batch_size"] = whole_or_word(given.get("batch_size"))
    if given.get("no_metadata"):
        overrides["output.metadata"] = False
    options = {key: "--" + name.replace("_", "-") for name, key in OPTION_KEYS.items()}
    return config.merge(base, overrides, options)


def options_of(given: Mapping[str, Any]) -> RunOptions:
    """How the run treats its source and its folder."""
    from imagemill.sitting import RunOptions

    return RunOptions(
        limit=given["limit"],
        skip_bad=given["skip_bad"],
        retry=kinds_of(given["retry_failed"]),
        rerun_changed=given["rerun_changed"],
        prompt_column=given["prompt_column"],
    )


def whole_or_word(text: str | None) -> int | str | None:
    """Digits as a number; a word stays, and the settings say whether they know it."""
    return int(text) if text is not None and text.isdecimal() else text


def gpus_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """`gpus` and `gpu_ids` as numbers, None where they are not given. Raises `ConfigError`."""
    from imagemill.errors import ConfigError

    gpus, ids = given["gpus"], given["gpu_ids"]
    if gpus not in (None, "auto"):
        if not gpus.isdecimal():
            raise ConfigError(f"--gpus: {gpus!r} is neither a number nor auto")
        gpus = int(gpus)
    if ids is not None:
        parts = ids.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ConfigError(f"--gpu-ids: {ids!r} is no list of numbers; write 0,2,4")
        ids = [int(part) for part in parts]
    return {"gpus": gpus, "gpu_ids": ids}


def with_kinds(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--retry-failed` alone as all kinds, and with the kinds that follow it as its value, unless a file
    has that name."""
    from imagemill.errors import KINDS

    found: list[str] = []
    for argument in arguments:
        named = all(kind in (*KINDS, "all") for kind in argument.split(","))
        if found and found[-1] == "--retry-failed" and named and not Path(argument).exists():
            found[-1] = f"--retry-failed={argument}"
        else:
            found.append(argument)
    return ["--retry-failed=all" if argument == "--retry-failed" else argument for argument in found]


def kinds_of(text: str | None) -> tuple[str, ...]:
    """The kinds of failures that `--retry-failed` names. Raises `ConfigError` for an unknown one."""
    from imagemill.errors import KINDS, ConfigError

    if text is None:
        return ()
    asked = [kind.strip() for kind in text.split(",")]
    kinds = KINDS if asked == ["all"] else tuple(asked)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"--retry-failed: {unknown[0]!r} is no kind of failure; known: {', '.join(KINDS)}, all")
    return kinds
