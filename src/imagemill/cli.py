"""The command: argv to settings to engine, errors to one line and an exit code.

Exit codes: 0 everything is done, 1 something failed or is left, 2 bad input, 129, 130 and 143 stopped by a signal.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagemill.cli_eval import compare_command, eval_command, with_lists
from imagemill.cli_options import (
    AllowUrls,
    Attention,
    BatchSize,
    Compile,
    Config,
    Device,
    DryRun,
    Exact,
    Format,
    GpuIds,
    Gpus,
    Guidance,
    Isolate,
    Limit,
    LoraOption,
    Model,
    Negative,
    NoMetadata,
    Out,
    Precision,
    Preload,
    PromptColumn,
    Quiet,
    RerunChanged,
    RetryFailed,
    Schedule,
    Seed,
    SinkOption,
    Size,
    SkipBad,
    Source,
    Steps,
    Trace,
    TrueCfg,
    Workers,
    options_of,
    settings_of,
    with_kinds,
)
from imagemill.cli_usage import Commands
from imagemill.errors import ChangedTasksError, ImagemillError, OutputError
from imagemill.version import __version__

if TYPE_CHECKING:
    from imagemill.config import Settings
    from imagemill.sitting import RunOptions, RunReport

LONGEST = 200
"""Characters of a failure's reason that the last words of a run show."""

app = typer.Typer(
    name="imagemill",
    cls=Commands,
    help="Run any number of diffusion tasks over every GPU: each picture exactly once, resumable.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    exact: Exact = None,
    compile: Compile = None,
    precision: Precision = None,
    attention: Attention = None,
    prompt_column: PromptColumn = None,
    allow_urls: AllowUrls = None,
    format: Format = None,
    sink: SinkOption = None,
    no_metadata: NoMetadata = False,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    retry_failed: RetryFailed = None,
    rerun_changed: RerunChanged = False,
    preload: Preload = None,
    trace: Trace = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Make the pictures of SOURCE. The same command in the same folder does what is left."""
    given = dict(locals())
    settings = settings_of(given)
    options = options_of(given)
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
    exact: Exact = None,
    compile: Compile = None,
    precision: Precision = None,
    attention: Attention = None,
    prompt_column: PromptColumn = None,
    allow_urls: AllowUrls = None,
    format: Format = None,
    sink: SinkOption = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    retry_failed: RetryFailed = None,
    rerun_changed: RerunChanged = False,
) -> None:
    """Say what a run would do, and check all that it needs. Starts no worker and writes nothing."""
    given = dict(locals())
    _plan(source, out, settings_of(given), options_of(given))


@app.command("report")
def report_command(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of a run.")]) -> None:
    """Rebuild results.jsonl, report.json, report.md and report.html of a folder from its ledger."""
    from imagemill.report import write_reports

    reports = write_reports(folder)
    for place in (reports.results, reports.data, reports.markdown, reports.page):
        typer.echo(place)


@app.command("repair")
def repair_command(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of a run.")]) -> None:
    """Rebuild a damaged ledger from the pictures of its folder. Exit code 1 when a picture does not read."""
    from imagemill.repair import repair, summary

    done = repair(folder)
    typer.echo(summary(done))
    raise typer.Exit(done.exit_code)


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


app.command("eval")(eval_command)
app.command("compare")(compare_command)


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


def _plan(source: str, out: Path | None, settings: Settings, options: RunOptions) -> None:
    from imagemill.forecast import forecast
    from imagemill.listing import forecast_text

    typer.echo(forecast_text(forecast(source, out, settings, options)))


def _run(source: str, out: Path | None, settings: Settings, options: RunOptions, *, quiet: bool) -> None:
    from imagemill import progress
    from imagemill.engine import Engine
    from imagemill.errors import InputError
    from imagemill.signals import stop_signals

    if settings.model is None:
        typer.echo(
            "model: tiny, the embedded one (no --model given). For a real one: --model z-image-turbo, a diffusers folder, "
            "or a hub repository; `imagemill models` lists the known ones.",
            err=True,
        )
    show = progress.create(quiet=quiet)
    engine = Engine(config=settings, show=show, keep=False)
    # Around all of it: workers take their time to leave, and a long report to be written.
    with stop_signals(engine, show) as stopped:
        with engine:
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
        _tell(report, folder, fault, pictures=settings.output.sink == "files")
        raise typer.Exit(stopped[0] if stopped else report.exit_code)


def _tell(report: RunReport, folder: Path, fault: ImagemillError | None, *, pictures: bool) -> None:
    """Write the reports and say how the run ended. Raises its fault."""
    from imagemill.report import write_reports

    lines = [summary(report)]
    if pictures:
        lines.append(f"pictures: {folder}")
    try:
        lines.append(f"report:   {write_reports(folder).page}")
    except ImagemillError as error:
        if fault is None:
            raise
        lines.append(f"no report: {error}")
    with suppress(OSError):
        # Whoever read our output has gone; that changes nothing of what was done.
        print("\n".join(lines), flush=True)
        lines = []
    if lines:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if fault is not None:
        raise fault


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
        lines.append(f"{_failures(report)}; the report tells of each, --retry-failed tries them again")
    if report.pending:
        on = "" if report.status == "bad_model" else "; the same command goes on"
        lines.append(f"{report.pending} not reached{on}")
    if report.older:
        lines.append(report.older)
    return "\n".join(lines)


def _failures(report: RunReport) -> str:
    """How many tasks failed, and of what most of them."""
    from imagemill.report.figures import cut

    reason, count = report.usual_failure
    most = "" if count == report.failed else f", {count} of them"
    return f"{report.failed} failed{most}: {cut(' '.join(reason.split()), LONGEST)}"


def main() -> None:
    """The console script. A user's mistake ends in one line and exit code 2, a defect in a traceback."""
    from imagemill.records import WORKER_THREAD

    try:
        _command()
    except SystemExit as ended:
        _drop_unread()
        if any(thread.name == WORKER_THREAD for thread in threading.enumerate()):
            # The worker inside this process is still computing: torn down under it, torch would abort the process.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1)
        raise


def _drop_unread() -> None:
    """Let go what nobody reads any more of standard error: at its end Python would try again to write it, and exit with 120."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _command() -> None:
    arguments = with_lists(with_kinds(sys.argv[1:]))
    try:
        app(arguments, prog_name="imagemill")
    except OutputError as error:
        _say(f"imagemill: {error}; what is done is kept: mend that, and the same command goes on")
        sys.exit(error.exit_code)
    except ChangedTasksError as error:
        mend = "give --rerun-changed to make them again, or another --out to keep both"
        _say("\n".join([f"imagemill: {error.what}", *(f"  {line}" for line in error.differences), mend]))
        sys.exit(error.exit_code)
    except ImagemillError as error:
        _say(f"imagemill: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        code, message = _told(error)
        _say(f"imagemill: {message}")
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)


def _say(text: str) -> None:
    """Print on standard error. Where that cannot be written the exit code says it alone."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _told(error: OSError) -> tuple[int, str]:
    """Exit code and line for an error of the system that is no defect; raises any other again."""
    if error.errno == errno.ENAMETOOLONG:
        return 2, f"{error.filename}: {error.strerror}; give a shorter one"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return 1, f"{error}; raise the limit of open files (ulimit -n)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) and error.filename is None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print would fail again at the end
        return 1, f"what it prints cannot be written: {error.strerror}; make room there, or print elsewhere"
    raise error


if __name__ == "__main__":
    main()
