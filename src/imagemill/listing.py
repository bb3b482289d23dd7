"""What `models`, `doctor` and `plan` print: plain text in columns."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imagemill.devices import GIB
from imagemill.progress import duration

if TYPE_CHECKING:
    from imagemill.doctor import Diagnosis
    from imagemill.forecast import Forecast, Tuned

SHOWN = 20
"""How many groups, adapters or skipped rows are listed."""


def columns(rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """Rows in aligned columns, as wide as they need to be."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=bool(heads), pad_edge=False, header_style="")
    for number in range(max(len(heads), *(len(row) for row in rows)) if rows else len(heads)):
        table.add_column(heads[number] if heads else "", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=1000, markup=False, highlight=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def gib(count: int) -> str:
    """Bytes as GiB with one digit."""
    return f"{count / GIB:.1f} GiB"


def models_table() -> str:
    """The known models, and how to name others."""
    from imagemill import judges
    from imagemill.models import KNOWN

    rows = []
    for model in KNOWN.values():
        size = f"{model.parameters:g} B" if model.parameters >= 0.1 else "small"
        rows.append(
            (
                model.name,
                model.family,
                size,
                gib(model.memory) if model.memory else "-",
                model.repo or "in the package",
                model.note,
            )
        )
    table = columns(rows, ("NAME", "FAMILY", "SIZE", "MEMORY", "FROM", "NOTE"))
    others = "Also a folder in diffusers format, or a hub repository such as org/name: --model FOLDER|REPO."
    return f"{table}\n\n{others}\nWhat answers in text instead of making pictures: {judges.KNOWN}."


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """Facts in two columns, then what is wrong."""
    text = columns(diagnosis.facts)
    if not diagnosis.problems:
        return f"{text}\n\nNothing is wrong."
    return "\n".join([text, "", *(f"! {problem}" for problem in diagnosis.problems)])


def forecast_text(forecast: Forecast) -> str:
    """Everything `imagemill plan` says."""
    parts = [
        _head(forecast),
        _groups(forecast),
        "\n".join(f"warning: {line}" for line in forecast.remarks),
        _adapters(forecast),
        _unreadable(forecast),
        _memory(forecast),
        _speed(forecast),
        _policies(forecast),
        _time(forecast),
    ]
    return "\n\n".join(part for part in parts if part)


def _head(forecast: Forecast) -> str:
    known = forecast.comparison
    unit = forecast.unit + "s" * (known.total != 1)
    lines = [f"{forecast.source} -> {forecast.folder}: {known.total} {unit}, {forecast.to_do} to do"]
    found = [
        (known.done - forecast.damaged, "done already"),
        (forecast.damaged, "done, but the picture is gone or altered"),
        (sum(known.failed.values()), "failed before"),
        (known.changed, "changed"),
        (known.moved, "of them under another name: the old pictures stay beside the new ones"),
    ]
    lines += [f"  {number} {what}" for number, what in found if number]
    skipped = forecast.admission.skipped
    lines += [f"  {place}: skipped: {reason}" for place, reason in skipped[:SHOWN]]
    if len(skipped) > SHOWN:
        lines.append(f"  ... and {len(skipped) - SHOWN} more skipped")
    return "\n".join(lines)


def _groups(forecast: Forecast) -> str:
    if not forecast.groups:
        return ""
    names = {adapter.path: Path(adapter.path).name for adapter in forecast.adapters}
    rows = [
        (
            str(group.tasks),
            group.model,
            _adapter_names(group.adapters, names, forecast),
            group.shape,
            str(group.steps or "-"),
        )
        for group in forecast.groups[:SHOWN]
    ]
    more = f"\n... and {len(forecast.groups) - SHOWN} more kinds" if len(forecast.groups) > SHOWN else ""
    return columns(rows, ("TASKS", "MODEL", "ADAPTERS", "SIZE", "STEPS")) + more


def _adapter_names(text: str, names: dict[str, str], forecast: Forecast) -> str:
    """A set of adapters as people name it: the ledger knows files by their digests."""
    if text == "-":
        return "none"
    by_digest = {adapter.digest: names[adapter.path] for adapter in forecast.adapters}
    return re.sub(r"([0-9a-f]{64})", lambda found: by_digest.get(found[1], found[1][:12]), text)


def _adapters(forecast: Forecast) -> str:
    if not forecast.adapters:
        return ""
    rows = [
        (str(one.tasks), one.path, f"rank {one.rank}", f"{one.bytes / 2**20:.1f} MiB")
        for one in forecast.adapters[:SHOWN]
    ]
    more = f"\n... and {len(forecast.adapters) - SHOWN} more files" if len(forecast.adapters) > SHOWN else ""
    return columns(rows, ("TASKS", "LORA FILE, CHECKED", "", "")) + more


def _unreadable(forecast: Forecast) -> str:
    lines = [f"{path}: is no picture that reads; its tasks will fail" for path in forecast.unreadable[:SHOWN]]
    if len(forecast.unreadable) > SHOWN:
        lines.append(f"... and {len(forecast.unreadable) - SHOWN} more such pictures")
    return "\n".join(lines)


def _memory(forecast: Forecast) -> str:
    need = max(model.spec.memory for model in forecast.models)
    rows = [
        (device.label, device.name, f"{gib(device.free)} free of {gib(device.total)}")
        for device in forecast.choice.devices
    ]
    lines = [f"Memory needed by a worker: {gib(need) if need else 'next to none'}", columns(rows)]
    lines += [f"left out: {line}" for line in forecast.choice.left_out]
    lines += [f"warning: {line}" for line in forecast.choice.warnings]
    return "\n".join(lines)


def _speed(forecast: Forecast) -> str:
    """One block a diffusion model: compiling and why, precision, attention, batches."""
    return "\n".join(line for one in forecast.tuned for line in _tuned(one, forecast.choice.devices[0].torch_device))


def _tuned(one: Tuned, device: str) -> list[str]:
    choice, tuning = one.choice, one.choice.tuning
    weighed = ""
    if choice.spent is not None and choice.saved is not None:
        weighed = f"saves a worker {duration(choice.saved)} and takes it {duration(choice.spent)}, "
    rows = [("  compiled", f"{'yes' if tuning.compile else 'no'}: {weighed}{choice.why}")]
    if device.startswith("cuda"):
        rows += [("  precision", choice.precision), ("  attention", tuning.attention)]
    if one.batches:
        rows.append(("  batch size", ", ".join(f"{size[0]}x{size[1]}: {number}" for size, number in one.batches)))
    return [f"Speed of {one.model}", columns(rows)]


def _policies(forecast: Forecast) -> str:
    rows = []
    for name, figures in forecast.estimate.policies.items():
        switches = figures.switches[1] if len(figures.switches) > 1 else 0
        chosen = "chosen" if forecast.schedule.partition(":")[0] == name else ""
        rows.append((name, str(switches), duration(figures.seconds) if figures.seconds is not None else "-", chosen))
    return columns(rows, ("POLICY", "ADAPTER SWITCHES", "ESTIMATED TIME", ""))


def _time(forecast: Forecast) -> str:
    figures, workers = forecast.estimate, len(forecast.choice.devices)
    if forecast.to_do == 0:
        return "Nothing is to do."
    lines = []
    if figures.seconds is None:
        lines.append(f"Estimated time: not known ({figures.source})")
    else:
        lines.append(
            f"Estimated time on {workers} worker{'s' * (workers > 1)}: {duration(figures.seconds)} ({figures.source})"
        )
    kind = "GPUs" if forecast.choice.devices[0].torch_device.startswith("cuda") else "workers"
    lines.append(f"Number of {kind} worth using: {figures.gpus_worth}")
    if figures.per_gpu:
        lines.append("  " + ", ".join(f"{number}: {duration(seconds)}" for number, seconds in figures.per_gpu))
    if figures.simulated < forecast.to_do:
        lines.append(f"  from the first {figures.simulated} tasks; the rest is taken to be like them")
    return "\n".join(lines)
