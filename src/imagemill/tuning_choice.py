"""How each diffusion model of a run is made fast: from the settings and the whole run's pictures to a `Tuning`, with why.

The pictures that an earlier sitting has done count too, so that a run that goes on compiles as it did before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from imagemill import batching
from imagemill.config import Settings
from imagemill.config.settings import FP8_ON_CPU
from imagemill.errors import ConfigError
from imagemill.guidance import guidance
from imagemill.models import Model
from imagemill.records import Tuning
from imagemill.staging import Shape

MOST_SIZES = 8
"""Sizes that are warmed up, at most. The blocks are compiled for all sizes at once; what is not warmed up makes the first
picture of its size wait."""

SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

# One Z-Image picture of 1024x1024 at 8 steps on one H100, in seconds: forwards and decode, text running beside them.
EAGER_PICTURE = 8 * 0.157 + 0.091
COMPILED_PICTURES = {"bf16": 0.812, "fp8": 0.589}
COMPILE_SECONDS = {"bf16": 43.0, "fp8": 62.0}
"""Repeated blocks and the VAE's decoder with nothing in the cache, on an H100 with 16 CPU cores; fp8 takes 1.44 times as long as
bf16, measured beside it on another machine."""
BATCH_SECONDS = {"bf16": 21.0, "fp8": 30.0}
"""More for batches, or where tasks come both with guidance and without: blocks for one row and for several are compiled
apart. Guidance makes two rows of a picture, and those of a batch serve it."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What is known of a model's pictures: the mean of their costs in eager mode, in seconds.

    `measured` says that the family's figures were measured on such a device.
    """

    seconds: float
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The tuning of one model and the reason for compiling or not. Seconds are a worker's: what compiling takes at most
    and what it saves; None where nothing was weighed. `dtype` is that of the model."""

    tuning: Tuning
    why: str
    spent: float | None = None
    saved: float | None = None
    dtype: str = "bfloat16"

    @property
    def precision(self) -> str:
        """What is computed in, for people: `fp8`, or the short name of the model's dtype."""
        return "fp8" if self.tuning.precision == "fp8" else SHORT_NAMES.get(self.dtype, self.dtype)


def as_stats(found: Mapping[str, Choice]) -> dict[str, Any]:
    """The choices by model, as the statistics of a run (`tuning`) and its report have them."""
    return {
        name: {
            "compiled": one.tuning.compile,
            "why": one.why,
            "precision": one.precision,
            "attention": one.tuning.attention,
            "sizes": [f"{width}x{height}" for width, height in one.tuning.sizes],
            "batch_size": one.tuning.batch,
        }
        for name, one in found.items()
    }


def compiled_share(precision: str) -> float:
    """What a compiled picture takes of the time of an eager one in bfloat16."""
    return COMPILED_PICTURES[precision] / EAGER_PICTURE


def compile_seconds(tuning: Tuning) -> float:
    """What compiling takes at most; 0 without."""
    if not tuning.compile:
        return 0.0
    apart = tuning.batch > 1 or len(tuning.guided) > 1
    return COMPILE_SECONDS[tuning.precision] + (BATCH_SECONDS[tuning.precision] if apart else 0.0)


def check(settings: Settings, on_cuda: bool) -> None:
    """Raises `ConfigError` for what the devices of the run cannot do."""
    if settings.precision == "fp8" and not on_cuda:
        raise ConfigError(FP8_ON_CPU)


def tuning_of(
    settings: Settings,
    sizes: Sequence[tuple[int, int]],
    pictures: int | None,
    workers: int,
    on_cuda: bool,
    known_figures: Figures | None,
    batch: int = 1,
) -> Tuning:
    """The tuning of one diffusion model; see `choose`."""
    return choose(settings, sizes, pictures, workers, on_cuda, known_figures, batch).tuning


def choose(
    settings: Settings,
    sizes: Sequence[tuple[int, int]],
    pictures: int | None,
    workers: int,
    on_cuda: bool,
    known: Figures | None,
    batch: int = 1,
    guided: tuple[bool, ...] = (),
    adapters: bool = True,
) -> Choice:
    """Whether to compile, for which of the sizes (width, height; the most frequent first), and why.

    `pictures` are those of the whole run, done and to do; None when nobody knows. `batch` is the largest batch. `guided` and
    `adapters` are those of `Tuning`.
    """
    bare = Tuning(
        precision=settings.precision,
        attention=settings.attention,
        sizes=tuple(sizes[:MOST_SIZES]),
        batch=batch,
        guided=guided,
        adapters=adapters,
    )
    made = replace(bare, compile=True)
    if settings.compile != "auto":
        asked = settings.compile == "on"
        return Choice(made if asked else bare, "as asked")
    if not on_cuda:
        return Choice(bare, "not done by itself on the CPU")
    if settings.precision == "fp8":
        return Choice(made, "fp8 gains where it is compiled")
    if settings.exact:
        return Choice(bare, "with exact not done by itself: it would hang on the length of the run")
    if pictures is None or known is None:
        return Choice(bare, "how many pictures come is not known")
    spent, saved = compile_seconds(made), saving(-(-pictures // max(1, workers)), known.seconds, settings.precision)
    why = "as measured on one H100" if known.measured else "if it gains as much as Z-Image on one H100"
    return Choice(made if saved > spent else bare, why, spent, saved)


def saving(pictures: int, seconds: float, precision: str) -> float:
    """Seconds that a worker saves by compiling: its pictures at so many eager seconds each."""
    return pictures * seconds * (1 - compiled_share(precision))


def choices(
    settings: Settings,
    used: Sequence[Model],
    shapes: Iterable[Shape] | None,
    workers: int,
    on_cuda: bool,
    free: int | None = None,
    device: str = "",
    kept: bool = False,
) -> dict[str, Choice]:
    """The choice for each diffusion model of a run by its name; others have nothing to tune.

    `shapes` are those of all staged tasks, None for a source that is read as it is needed. `workers` are as many as the
    whole run would get, `device` is the name of theirs, `free` the bytes of the one that has the fewest. `kept` says that
    they may get other tasks later.
    """
    staged = None if shapes is None else list(shapes)
    found = {}
    for model in used:
        if model.spec.runner != "diffusion":
            continue
        own = [shape for shape in staged or () if shape.model == f"model:{model.spec.name}"]
        sizes = batching.sizes({(shape.shape,): shape.tasks for shape in own}) or _expected(settings, model)
        rule = batching.rule(settings, model, on_cuda, free)
        count = sum(shape.tasks for shape in own)
        measured = model.planned.family.name == "z_image" and "H100" in device
        known = Figures(sum(shape.cost for shape in own) / count, measured) if count else None
        batch = max((rule.at(size) for size in sizes[:MOST_SIZES]), default=1)
        pictures = None if staged is None else count
        guided, adapters = _guided(settings, model, own), kept or not own or any(shape.adapters for shape in own)
        choice = choose(settings, sizes, pictures, workers, on_cuda, known, batch, guided, adapters)
        found[model.spec.name] = replace(choice, dtype=model.spec.dtype)
    return found


def _guided(settings: Settings, model: Model, own: Sequence[Shape]) -> tuple[bool, ...]:
    """Whether guidance runs in the model's tasks, once for each answer there is; of one that names none where they are not
    known."""
    usual = model.planned.defaults
    expected = guidance(
        usual.guidance_scale if settings.guidance is None else settings.guidance,
        usual.true_cfg_scale if settings.true_cfg_scale is None else settings.true_cfg_scale,
        usual.negative_prompt if settings.negative_prompt is None else settings.negative_prompt,
    )
    kinds = {kind for shape in own for kind in shape.guidance} or {expected}
    return tuple(sorted({kind.runs(model.planned.family) for kind in kinds}))


def _expected(settings: Settings, model: Model) -> tuple[tuple[int, int], ...]:
    """The size of tasks that name none."""
    width, height = settings.size or (model.planned.defaults.width, model.planned.defaults.height)
    return ((width, height),) if width and height else ()
