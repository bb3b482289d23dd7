"""The first meeting with shapes, before the clock of any task runs: made-up tasks through all stages of a family.

Compiled code is made here, and libraries choose their kernels here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from imagemill.errors import WorkerGone, classify
from imagemill.families import Family, OnStep, Pictures, Size
from imagemill.guidance import guidance
from imagemill.records import Span, Task, Tuning
from imagemill.runners import Beat
from imagemill.runners.loading import timed

log = logging.getLogger(__name__)

STAGE = "compile"

SHORT, LONG = 3, 100
"""Words of a prompt: of the first bucket of 32 tokens, and of a later one."""

ON, OFF = 2.0, 0.0
"""Scales with which every family's guidance runs, and does not."""

STATIC_LENGTHS = (SHORT, 24, 52, 80)
"""Words for the first four buckets, where each is compiled apart."""

PROBE_SIZE = (512, 512)
"""What is warmed up where neither the run nor the family names a size."""


@dataclass(frozen=True, slots=True)
class Round:
    """One batch of a warm-up: its size, the words of each prompt, whether it ends when the prompts are encoded, and whether
    guidance runs (None: as the family's defaults have it)."""

    size: Size
    words: tuple[int, ...]
    only_text: bool = False
    guided: bool | None = None

    def __str__(self) -> str:
        how = {None: "", True: " with guidance", False: " without guidance"}[self.guided]
        return f"{'text' if self.only_text else len(self.words)} at {self.size[0]}x{self.size[1]}{how}"


def rounds(tuning: Tuning, family: Family, dynamic: bool | None) -> list[Round]:
    """The batches that meet every graph: each size with the largest batch and with one, with guidance and without as the
    tasks have it; there captions of one length, of another, and of both in a batch. Lengths vary at the first size only,
    unless shapes are static. The text encoder, which is not compiled, meets the lengths between as well: a GPU waits where a
    kernel is launched for the first time."""
    largest = family.max_edit_batch if edits(family) else family.max_batch
    counts = sorted({max(1, min(tuning.batch, largest)), 1})
    lengths = (SHORT, LONG) if dynamic else STATIC_LENGTHS
    found: list[Round] = []
    sizes = tuning.sizes or (usual_size(family),)
    for guided, (place, size) in product(tuning.guided or (None,), enumerate(sizes)):
        own = lengths if place == 0 or not dynamic else lengths[:1]
        for count in counts:
            found += [Round(size, (words,) * count, guided=guided) for words in own]
            if count > 1:
                found.append(Round(size, (LONG, *(SHORT,) * (count - 1)), guided=guided))
    if dynamic and not edits(family):
        found += [Round(found[0].size, (words,), only_text=True) for words in STATIC_LENGTHS[1:]]
    return found


def edits(family: Family) -> bool:
    """Whether the family makes nothing without a picture."""
    return "images" in family.fields and "prompt_only" not in family.fields


def usual_size(family: Family) -> Size:
    """The family's default size."""
    return (family.defaults.width or PROBE_SIZE[0], family.defaults.height or PROBE_SIZE[1])


def warm_up(pipe: Any, family: Family, found: Sequence[Round], device: str, beat: Beat, spans: list[Span]) -> list[str]:
    """Run the rounds; beats before each and at each step, and adds the spans of their stages.

    Lines say what could not be run, for want of room or because the made-up task was refused: real ones may fare better.
    Raises what ends a worker: `Cancelled`, a broken device.
    """
    import torch

    notes = []
    for place, one in enumerate(found):

        def on_step(step: int, steps: int, place: int = place) -> None:
            beat(STAGE, -1, place, len(found))

        on_step(0, 0)
        try:
            with torch.inference_mode():
                run(pipe, family, one, on_step, device, spans)
        except Exception as error:
            known = classify(error)
            if isinstance(known, WorkerGone):
                raise
            notes.append(f"not warmed up: {one}: {known}")
            del error, known
            free()
    beat(STAGE, -1, len(found), len(found))
    return notes


def run(pipe: Any, family: Family, one: Round, on_step: OnStep, device: str, spans: list[Span]) -> None:
    """Encode, denoise and decode the batch; ends when the device has."""
    tasks = list(made_up(one, family))
    pictures = [blank_pictures(task, family) for task in tasks]
    with timed(f"warm up encode {one}", device, spans):
        conditioning = family.encode(pipe, tasks, pictures)
    if one.only_text:
        return
    with timed(f"warm up denoise {one}", device, spans):
        latents = family.denoise(pipe, tasks, conditioning, on_step)
    with timed(f"warm up decode {one}", device, spans):
        family.decode(pipe, tasks, latents)


def made_up(one: Round, family: Family) -> Iterator[Task]:
    """A task of one step for each prompt of the round, with the family's defaults but for guidance."""
    scales = guidance_fields(family, one.guided)
    for place, words in enumerate(one.words):
        yield Task(
            id=f"warm-up-{place}",
            prompt=" ".join(["picture"] * words),
            images=("made up",) if edits(family) else (),
            width=one.size[0],
            height=one.size[1],
            steps=1,
            seed=place,
            **scales,
        )


def guidance_fields(family: Family, guided: bool | None) -> dict[str, Any]:
    """Negative prompt and scales with which guidance runs, or does not: the family's defaults, also for None, with as little
    changed as that takes."""
    names = ("guidance_scale", "true_cfg_scale", "negative_prompt")
    usual = {name: getattr(family.defaults, name) if name in family.fields else None for name in names}
    scale, negative = (ON, usual["negative_prompt"] or " ") if guided else (OFF, usual["negative_prompt"])
    others = ({"true_cfg_scale": scale, "negative_prompt": negative}, {"guidance_scale": scale})
    tries = [usual, *(usual | other for other in others if family.fields.issuperset(other))]
    return next((one for one in tries if guided is None or guidance(**one).runs(family) is guided), usual)


def blank_pictures(task: Task, family: Family) -> Pictures:
    """Grey pictures of the sizes that the family asks for."""
    from PIL import Image

    given = [(task.width or 0, task.height or 0) for _ in task.images]
    return [Image.new("RGB", size, "grey") for size in family.reference_sizes(task, given)]


def free() -> None:
    """Give back what a batch without room held."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
