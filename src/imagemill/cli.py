"""The command: argv to settings to engine, errors to one line and an exit code.

Exit codes: 0 everything is done, 1 something failed or is left, 2 bad input, 130 and 143 stopped by a signal.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagemill.errors import ChangedTasksError, ImagemillError
from imagemill.version import __version__

if TYPE_CHECKING:
    from imagemill.config import Settings
    from imagemill.engine import Engine, RunOptions, RunReport
    from imagemill.progress import Progress

app = typer.Typer(
    name="imagemill",
    help="Run any number of diffusion tasks over every GPU: each picture exactly once, resumable.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str, typer.Argument(help="A .json, .jsonl, .csv, .tsv or .parquet file, a tweet batch, or - for JSONL on stdin.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Output folder.", show_default="outputs/SOURCE")]
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
    typer.Option("--device", metavar="cuda|cpu", help="Kind of device.", show_default="cuda if there is one"),
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
    int | None,
    typer.Option(
        "--batch-size",
        help="Tasks that may share a forward pass; pictures may then be 1 of 255 apart.",
        show_default="1",
    ),
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


@app.command("run")
def run_command(
    source: Source,
    out: Out = None,
    model: Model = None,
    gpus: Gpus = None,
    gpu_ids: GpuIds = None,
    device: Device = None,
    workers: Workers = None,
    isolate: Isolate = None,
    schedule: Schedule = None,
    config: Config = None,
    lora: LoraOption = None,
    steps: Steps = None,
    size: Size = None,
    guidance: Guidance = None,
    true_cfg_scale: TrueCfg = None,
    negative_prompt: Negative = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    prompt_column: PromptColumn = None,
    format: Format = None,
    sink: SinkOption = None,
    no_metadata: NoMetadata = False,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    retry_failed: RetryFailed = None,
    rerun_changed: RerunChanged = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Make the pictures of SOURCE. The same command in the same folder does what is left."""
    given = dict(locals())
    settings = _settings(given)
    options = _options(given)
    if dry_run:
        _plan(source, out, settings, options)
    else:
        _run(source, out, settings, options, quiet=quiet)


@app.command("plan")
def plan_command(
    source: Source,
    out: Out = None,
    model: Model = None,
    gpus: Gpus = None,
    gpu_ids: GpuIds = None,
    device: Device = None,
    workers: Workers = None,
    schedule: Schedule = None,
    config: Config = None,
    lora: LoraOption = None,
    steps: Steps = None,
    size: Size = None,
    guidance: Guidance = None,
    true_cfg_scale: TrueCfg = None,
    negative_prompt: Negative = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    prompt_column: PromptColumn = None,
    format: Format = None,
    sink: SinkOption = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    retry_failed: RetryFailed = None,
    rerun_changed: RerunChanged = False,
) -> None:
    """Say what a run would do, and check all that it needs. Starts no worker and writes nothing."""
    given = dict(locals())
    _plan(source, out, _settings(given), _options(given))


@app.command("report")
def report_command(folder: Annotated[Path, typer.Argument(help="The output folder of a run.")]) -> None:
    """Rebuild results.jsonl, report.json, report.md and report.html of a folder from its ledger."""
    from imagemill.report import write_reports

    reports = write_reports(folder)
    for place in (reports.results, reports.data, reports.markdown, reports.page):
        typer.echo(place)


@app.command("models")
def models_command() -> None:
    """List the known models: name, family, size, memory need, where they come from."""
    from imagemill.listing import models_table

    typer.echo(models_table())


@app.command("doctor")
def doctor_command() -> None:
    """Say what this machine has, and what is wrong with it. Exit code 1 when something is."""
    from imagemill.doctor import examine
    from imagemill.listing import diagnosis_text

    diagnosis = examine()
    typer.echo(diagnosis_text(diagnosis))
    raise typer.Exit(1 if diagnosis.problems else 0)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"imagemill {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


# --- what the commands share ------------------------------------------------------------------------------------------

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
    "format": "output.format",
    "sink": "output.sink",
}
"""Options of the command line and the settings they stand for."""


def _settings(given: dict[str, Any]) -> Settings:
    from imagemill import config
    from imagemill.errors import ConfigError

    base = config.load_settings(given["config"]) if given["config"] else config.Settings()
    overrides = {key: given.get(name) for name, key in OPTION_KEYS.items()}
    if given["gpus"] not in (None, "auto"):
        if not given["gpus"].isdecimal():
            raise ConfigError(f"--gpus: {given['gpus']!r} is neither a number nor auto")
        overrides["devices.gpus"] = int(given["gpus"])
    if given["gpu_ids"] is not None:
        parts = given["gpu_ids"].split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ConfigError(f"--gpu-ids: {given['gpu_ids']!r} is no list of numbers; write 0,2,4")
        overrides["devices.gpu_ids"] = [int(part) for part in parts]
    if given.get("no_metadata"):
        overrides["output.metadata"] = False
    options = {key: "--" + name.replace("_", "-") for name, key in OPTION_KEYS.items()}
    return config.merge(base, overrides, options)


def _options(given: dict[str, Any]) -> RunOptions:
    from imagemill.engine import RunOptions
    from imagemill.errors import KINDS, ConfigError

    retry: tuple[str, ...] = ()
    if given["retry_failed"] is not None:
        asked = [kind.strip() for kind in given["retry_failed"].split(",")]
        retry = KINDS if asked == ["all"] else tuple(asked)
        unknown = [kind for kind in retry if kind not in KINDS]
        if unknown:
            raise ConfigError(f"--retry-failed: {unknown[0]!r} is no kind of failure; known: {', '.join(KINDS)}, all")
    return RunOptions(
        limit=given["limit"],
        skip_bad=given["skip_bad"],
        retry=retry,
        rerun_changed=given["rerun_changed"],
        prompt_column=given["prompt_column"],
    )


def _plan(source: str, out: Path | None, settings: Settings, options: RunOptions) -> None:
    from imagemill.forecast import forecast
    from imagemill.listing import forecast_text

    typer.echo(forecast_text(forecast(source, out, settings, options)))


def _run(source: str, out: Path | None, settings: Settings, options: RunOptions, *, quiet: bool) -> None:
    from imagemill import progress
    from imagemill.engine import Engine
    from imagemill.errors import InputError
    from imagemill.report import write_reports

    if settings.model is None:
        typer.echo(
            "model: tiny, the embedded one (no --model given). For a real one: --model z-image-turbo, a diffusers folder, "
            "or a hub repository; `imagemill models` lists the known ones.",
            err=True,
        )
    show = progress.create(quiet=quiet)
    with Engine(config=settings, show=show, keep=False) as engine, stop_signals(engine, show) as stopped:
        folder = out if out is not None else engine.default_folder(source)
        fault: ImagemillError | None = None
        try:
            for _ in engine.run(source, folder, options):
                pass
        except ImagemillError as error:
            if engine.report is None:
                raise
            fault = error
        report = engine.report
    if report is None:
        raise InputError("the run was stopped before it began")
    reports = write_reports(folder)
    typer.echo(summary(report))
    typer.echo(f"pictures: {folder}\nreport:   {reports.page}")
    if fault is not None:
        raise fault
    raise typer.Exit(stopped[0] if stopped else report.exit_code)


def summary(report: RunReport) -> str:
    """The last words of a run: what was done, what was not, and how to go on."""
    from imagemill.progress import duration

    made = report.done - report.resumed
    lines = [f"{report.done} done ({made} in this run, {duration(report.seconds)})"]
    lines += [f"{place}: skipped: {reason}" for place, reason in report.skipped[:20]]
    if len(report.skipped) > 20:
        lines.append(f"... and {len(report.skipped) - 20} more skipped; the report names them")
    lines += [f"left out: {line}" for line in report.left_out]
    if report.failed:
        lines.append(f"{report.failed} failed; the report says why, --retry-failed tries them again")
    if report.pending:
        lines.append(f"{report.pending} not reached; the same command goes on")
    return "\n".join(lines)


@contextmanager
def stop_signals(engine: Engine, show: Progress) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM ends what is in flight, the second stops at once. Yields the exit code to use."""
    code: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        code.append(128 + number)
        under_way = engine.drain() if len(code) == 1 else engine.cancel()
        if not under_way:
            raise KeyboardInterrupt
        if len(code) == 1:
            show.note("stopping: what is in flight is finished; once more stops at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield code
    except KeyboardInterrupt:
        raise typer.Exit(code[0] if code else 130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """The console script. A user's mistake ends in one line and exit code 2, a defect in a traceback."""
    arguments = ["--retry-failed=all" if argument == "--retry-failed" else argument for argument in sys.argv[1:]]
    try:
        app(arguments, prog_name="imagemill")
    except ImagemillError as error:
        print(f"imagemill: {error}", file=sys.stderr)
        if isinstance(error, ChangedTasksError):
            for line in error.differences:
                print(f"  {line}", file=sys.stderr)
            print("give --rerun-changed to make them again, or another --out to keep both", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
