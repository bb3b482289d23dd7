"""The commands `eval` and `compare`: argv to settings to evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from imagemill.cli_options import (
    AllowUrls,
    Attention,
    Compile,
    Device,
    GpuIds,
    Gpus,
    Precision,
    Quiet,
    RerunChanged,
    RetryFailed,
    Schedule,
    Workers,
)

if TYPE_CHECKING:
    from imagemill.scoring.evaluation import EvalReport
    from imagemill.scoring.settings import EvalSettings
    from imagemill.sitting import RunOptions

LISTS = ("--categories",)
"""Options that take several values in a row; typer itself takes one each time the option is named."""

FLAGS = (
    *(
        "--controls",
        "--compile",
        "--no-compile",
        "--rerun-changed",
        "--dry-run",
        "--quiet",
        "--retry-failed",
        "--allow-urls",
    ),
    *("--help", "-h"),
)
"""Options that no value follows; those of `--retry-failed` stand behind its equals sign."""

Bench = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG.yaml|BENCH",
        help="A settings file of an evaluation, or a benchmark's file or folder; see docs/evaluation.md.",
    ),
]
EditModel = Annotated[
    str | None,
    typer.Option(
        "--edit-model",
        metavar="NAME|FOLDER|REPO",
        help="The model that edits: a known name (see `imagemill models`), a diffusers folder, or a hub repository.",
    ),
]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="vlm:FOLDER|openai:MODEL|reference|preservation",
        help="What scores the edits: a vision-language model, an endpoint, or figures against target or source.",
    ),
]
BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", metavar="URL", help="The endpoint of --judge openai:MODEL; its key is OPENAI_API_KEY."),
]
Categories = Annotated[
    list[str] | None,
    typer.Option("--categories", metavar="NAME ...", help="Only these categories, by their exact names."),
]
EvalLimit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only so many items, spread evenly over the categories.")
]
EvalOut = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Output folder.", show_default="eval-out, or the file's")
]
Lang = Annotated[
    str | None,
    typer.Option(
        "--lang", metavar="en|zh|intersection|zh-intersection", help="The benchmark's language.", show_default="en"
    ),
]
RubricOption = Annotated[
    str | None,
    typer.Option(
        "--rubric",
        metavar="default|viescore|prompts",
        help="What a model is asked; prompts are those of the settings file.",
        show_default="prompts if there are some",
    ),
]
Controls = Annotated[
    bool, typer.Option("--controls", help="Judge the unedited sources and shuffled edits as well, by the same judge.")
]
MinCoverage = Annotated[
    float | None,
    typer.Option("--min-coverage", metavar="SHARE", help="Scored share for exit code 0.", show_default="0.98"),
]
RejudgeOption = Annotated[
    str | None,
    typer.Option("--rejudge", metavar="failed|all", help="Ask the judge again about what has no score, or about all."),
]
EvalSteps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.", show_default="the model's")]
EvalSeed = Annotated[int | None, typer.Option("--seed", help="Of items without one of their own.", show_default="42")]
EvalDryRun = Annotated[bool, typer.Option("--dry-run", help="Read and check everything, start nothing.")]


def with_lists(arguments: Sequence[str]) -> list[str]:
    """The arguments of `imagemill eval` with `--categories A B` as `--categories A --categories B`.

    Where no word stands elsewhere, the last of the list is the benchmark: `--categories A B BENCH`.
    """
    if not arguments or arguments[0] != "eval":
        return list(arguments)
    found, last = _spread(arguments[1:])
    if last is not None:
        del found[last]
    return ["eval", *found]


def _spread(arguments: Sequence[str]) -> tuple[list[str], int | None]:
    """The arguments with the option before each value of a list, and the place of one option too many: that before the
    last value of a list of several, where there would be no benchmark."""
    found: list[str] = []
    option, taken, after, bench, last = "", 0, False, False, None
    for argument in arguments:
        if argument.startswith("-") and argument != "-" and not after:
            option, taken, after = argument, 0, argument == "--"
            found.append(argument)
        elif option in LISTS and not after:
            last = len(found) if taken else last
            found += [option, argument] if taken else [argument]
            taken += 1
        else:
            bench = bench or after or not option or "=" in option or option in FLAGS or taken > 0
            taken += 1
            found.append(argument)
    return found, None if bench else last


def eval_command(
    source: Bench,
    edit_model: EditModel = None,
    judge: JudgeOption = None,
    base_url: BaseUrl = None,
    categories: Categories = None,
    limit: EvalLimit = None,
    out: EvalOut = None,
    lang: Lang = None,
    rubric: RubricOption = None,
    controls: Controls = False,
    min_coverage: MinCoverage = None,
    steps: EvalSteps = None,
    seed: EvalSeed = None,
    compile: Compile = None,
    precision: Precision = None,
    attention: Attention = None,
    schedule: Schedule = None,
    gpus: Gpus = None,
    gpu_ids: GpuIds = None,
    device: Device = None,
    workers: Workers = None,
    rejudge: RejudgeOption = None,
    allow_urls: AllowUrls = None,
    retry_failed: RetryFailed = None,
    rerun_changed: RerunChanged = False,
    dry_run: EvalDryRun = False,
    quiet: Quiet = False,
) -> None:
    """Edit every item of a benchmark, score the edits, write a report. The same command goes on where it was."""
    given = dict(locals())
    settings = settings_of(given)
    options, again = run_options(given), rejudge_of(rejudge)
    if dry_run:
        from imagemill.scoring.outlook import outlook

        typer.echo(outlook(settings, options))
        return
    report, code = _evaluate(settings, options, again, quiet=quiet)
    for line in summary(report):
        typer.echo(line)
    raise typer.Exit(code if code is not None else report.exit_code)


def compare_command(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="The output folder of an evaluation.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one, of the same items.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Say how much better or worse RUN_B scores than RUN_A on the same items, with the 95 % interval."""
    from imagemill.scoring.comparison import compare_runs, comparison_json, comparison_text

    found = compare_runs(first, second)
    typer.echo(comparison_json(found) if as_json else comparison_text(found))


# --- argv to settings -------------------------------------------------------------------------------------------------


def settings_of(given: Mapping[str, Any]) -> EvalSettings:
    """The settings file with the options above it, or the options alone. Raises `ConfigError` that names the option."""
    from imagemill.cli_options import gpus_of
    from imagemill.scoring.settings import load_eval_settings, override

    names = (
        *("edit_model", "judge", "base_url", "limit", "out", "lang", "rubric", "min_coverage", "steps", "seed"),
        *("compile", "precision", "attention", "schedule", "device", "workers", "allow_urls"),
    )
    options = {name: given[name] for name in names}
    options |= gpus_of(given)
    options["out"] = None if given["out"] is None else str(given["out"])
    options["categories"] = tuple(given["categories"]) if given["categories"] else None
    options["controls"] = given["controls"] or None
    if Path(given["source"]).suffix.lower() in (".yaml", ".yml"):
        return load_eval_settings(given["source"], **options)
    return override(bench=given["source"], **options)


def run_options(given: Mapping[str, Any]) -> RunOptions:
    """How the first stage treats its folder. Raises `ConfigError`."""
    from imagemill.cli_options import kinds_of
    from imagemill.sitting import RunOptions

    return RunOptions(retry=kinds_of(given["retry_failed"]), rerun_changed=given["rerun_changed"])


def rejudge_of(text: str | None) -> Literal["failed", "all"] | None:
    """What is judged again. Raises `ConfigError`."""
    from imagemill.errors import ConfigError

    match text:
        case None | "failed" | "all":
            return text
    raise ConfigError(f"--rejudge: {text!r} is neither failed nor all")


def _evaluate(
    settings: EvalSettings, options: RunOptions, rejudge: Literal["failed", "all"] | None, *, quiet: bool
) -> tuple[EvalReport, int | None]:
    """The report, and the exit code where a signal asked to stop."""
    from imagemill import progress
    from imagemill.scoring.evaluation import Evaluation, displays
    from imagemill.signals import stop_signals

    evaluation = Evaluation(settings, rejudge=rejudge, options=options, shows=displays(quiet=quiet))
    with stop_signals(evaluation, progress.create(quiet=quiet)) as stopped:
        report = evaluation.run()
    return report, stopped[0] if stopped else None


# --- what is said at the end ------------------------------------------------------------------------------------------


LONGEST = 200
"""Characters of a reason that the last words of an evaluation show."""

UNANSWERED = ("parse_failed", "refused", "error")
"""What an item may be without a score that another answer of the judge would give it."""


def summary(report: EvalReport) -> list[str]:
    """The last words of an evaluation."""
    from imagemill.scoring.report.words import score, share, span

    if report.stopped or report.summary is None:
        return [f"stopped before all {report.items} items were judged; the same command goes on"]
    found, overall = report.summary, report.summary["overall"]
    lines = [
        f"{found['edits']['done']} of {report.items} edits, {report.scored} scored (coverage {share(report.coverage)})"
    ]
    rows = found["unscored"]["rows"]
    if report.failed_edits:
        why = _usual([row for row in rows if row["status"] == "edit_failed"])
        lines.append(
            f"{report.failed_edits} edits failed{why}; the report tells of each, --retry-failed tries them again"
        )
    if report.coverage < report.min_coverage:
        counts = ", ".join(f"{count} {name}" for name, count in overall["statuses"].items() if name != "ok")
        asked = any(overall["statuses"].get(name) for name in UNANSWERED)
        mend = "; --rejudge failed asks the judge again" if asked else "; the report says why"
        lines.append(f"coverage is below {share(report.min_coverage)} ({counts}){mend}")
        if why := _usual([row for row in rows if row["status"] in UNANSWERED]):
            lines.append(f"the judge's answers without a score{why}")
    scale = found["scale"]
    mean = f"{score(overall['mean'], scale)} [{span(overall['interval'], scale)}]"
    lines.append(f"mean {found['headline']} {mean}, macro mean {score(found['macro_mean'], scale)}")
    return [*lines, f"report: {report.page}"]


def _usual(rows: Sequence[Mapping[str, Any]]) -> str:
    """`: REASON` of items without a score, or `, mostly: REASON` where they have several; empty without any."""
    from imagemill.report.figures import cut

    said = Counter(" ".join((row["message"] or row["text"]).split()) for row in rows)
    reason = max(said, key=said.__getitem__, default="")
    return f"{', mostly' * (len(said) > 1)}: {cut(reason, LONGEST)}" if reason else ""
