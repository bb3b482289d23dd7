"""From a task as the user wrote it to a task of which everything is known.

Pure: no file, no clock, no torch. Digests of adapters and input pictures are read by the driver and handed in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Protocol

from imagemill import canvas
from imagemill.records import SEMANTICS_VERSION, Lora, PlannedTask, Task, Ticket

FORMATS = {"png": (".png",), "jpg": (".jpg", ".jpeg"), "webp": (".webp",)}
"""Picture formats and the suffixes of their files; the first is the one we give."""

MAX_PIXELS = 8192 * 8192
TOO_LARGE = f"is over the limit of {MAX_PIXELS:,} pixels (8192x8192); write a smaller size"
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_PROMPT = 100_000
MAX_NAME = 200
MAX_PATH = 2048
DEFAULT_SEED = 42
"""The seed of a run that names none; task number i (from 0) then has seed 42 + i."""

LENGTH_CLASS = 64
"""Bytes of a prompt in one class of lengths: about 16 tokens, of English and of Chinese alike; captions are padded to
multiples of 32."""

ANSWER_SUFFIX = ".answer"
"""What the output path of a task ends with that gives an answer: a name in the ledger, no file."""

OPTIONAL_FIELDS = ("negative_prompt", "guidance_scale", "true_cfg_scale", "images", "loras", "system_prompt")
"""Fields that a family takes or not; a task that names one its family does not take is refused, never run without it."""


class Traits(Protocol):
    """What planning asks of a family, without torch. With `answer` among its `fields` it gives text and no picture."""

    name: str
    fields: frozenset[str]
    multiple: int
    max_images: int

    def group(self, task: Task) -> str:
        """What may share a batch."""

    def cost(self, task: Task) -> float:
        """Estimated seconds."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values for fields that a task leaves open. `seed` is the seed of the first task; later ones count up."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    loras: tuple[Lora, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model as planning sees it: its name in the run, its revision, its family and its own defaults."""

    name: str
    revision: str
    family: Traits
    defaults: Defaults


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a row cannot be run, and which field it is in; the field is empty where it is the row as a whole."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


def resolve(
    task: Task,
    index: int,
    run: Defaults,
    model: PlannedModel,
    picture_format: str,
    source: tuple[int, int] | None = None,
) -> Task:
    """The task with every open field filled: from the task, else the run, else the model.

    `index` is the place of the task in its source, from 0: a task without a seed gets the run's seed plus its index,
    so that rows differ and a row's picture does not depend on the rows around it. `source` is the width and height of
    its first picture to edit, whose aspect an open size follows; None when there is none or it does not read.
    """

    if answers(model.family):
        return replace(task, model=model.name, output_path=task.output_path or file_stem(task.id) + ANSWER_SUFFIX)

    def first(name: str) -> Any:
        for place in (task, run, model.defaults):
            value = getattr(place, name)
            if value is not None:
                return value
        return None

    seed = task.seed if task.seed is not None else (run.seed if run.seed is not None else DEFAULT_SEED) + index
    takes = model.family.fields
    width, height = first("width"), first("height")
    if task.images:
        width = task.width if task.width is not None else run.width
        height = task.height if task.height is not None else run.height
        own = (model.defaults.width, model.defaults.height)
        width, height = canvas.edited_size(width, height, source, own, model.family.multiple)
    return replace(
        task,
        model=model.name,
        width=width,
        height=height,
        steps=first("steps"),
        guidance_scale=first("guidance_scale") if "guidance_scale" in takes else task.guidance_scale,
        true_cfg_scale=first("true_cfg_scale") if "true_cfg_scale" in takes else task.true_cfg_scale,
        negative_prompt=first("negative_prompt") if "negative_prompt" in takes else task.negative_prompt,
        seed=seed,
        loras=task.loras or run.loras,
        output_path=output_path(task, picture_format),
    )


def answers(family: Traits) -> bool:
    """Whether tasks of the family end in an answer: they have no size, no steps, no seed and no file."""
    return "answer" in family.fields


def expand(task: Task) -> tuple[Task, ...]:
    """One task a picture: `num_images` of n gives ids `ID_1` … `ID_n`, seeds counting up, paths numbered alike."""
    if task.num_images == 1:
        return (task,)
    place = PurePosixPath(task.output_path or "")
    return tuple(
        replace(
            task,
            id=f"{task.id}_{number}",
            seed=(task.seed or 0) + number - 1,
            output_path=str(place.with_name(f"{place.stem}_{number}{place.suffix}")),
            num_images=1,
        )
        for number in range(1, task.num_images + 1)
    )


def output_path(task: Task, picture_format: str) -> str:
    """Where the picture goes, relative to the output folder: as the task says, else by its id."""
    if task.output_path:
        named = bool(PurePosixPath(task.output_path).suffix)
        # a//b.png and ./a/b.png are a/b.png: one file, one name.
        return str(PurePosixPath(task.output_path + ("" if named else FORMATS[picture_format][0])))
    return file_stem(task.id) + FORMATS[picture_format][0]


def file_stem(name: str) -> str:
    """A file name that any system takes: letters, digits, `.`, `-` and `_` stay, all else becomes `_`.

    A name that had to change, or that is longer than 120 bytes, gets a short hash, so that two names never meet.
    """
    stem = re.sub(r"[^\w.-]", "_", name).lstrip(".-")[:120]  # a character is a byte at least
    while len(stem.encode()) > 120:
        stem = stem[:-1]
    if stem != name:
        stem = f"{stem}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}".lstrip("-")
    return stem


def problems(task: Task, family: Traits, *, only_edits: bool = False) -> list[Problem]:
    """Everything that is wrong with a resolved task; an empty list means that it can be run. `only_edits` is for a model that
    does not make pictures from text, though others of its family do."""
    found = _text_problems(task)
    found += _answer_problems(task) if answers(family) else [*_number_problems(task, family), *_path_problems(task)]
    for name in OPTIONAL_FIELDS:
        if getattr(task, name) not in (None, ()) and name not in family.fields:
            mend = "name one that edits (--model; `imagemill models` lists them)" if name == "images" else "remove it"
            found.append(Problem(name, f"the model {task.model!r} (family {family.name}) does not take it; {mend}"))
    if task.images == () and "images" in family.fields and (only_edits or "prompt_only" not in family.fields):
        found.append(Problem("images", f"the model {task.model!r} edits pictures; name at least one"))
    if len(task.images) > family.max_images and "images" in family.fields:
        most = f"{family.max_images} picture{'s' * (family.max_images > 1)}"
        found.append(Problem("images", f"names {len(task.images)}; {family.name} takes at most {most}"))
    return found


def _text_problems(task: Task) -> list[Problem]:
    found = []
    for name in ("id", "prompt", "negative_prompt", "system_prompt"):
        text = getattr(task, name) or ""
        if "\0" in text:
            found.append(Problem(name, "contains a NUL character; remove it"))
        if not is_unicode(text):
            found.append(Problem(name, "contains half of a surrogate pair, which no file can hold; remove it"))
        limit = MAX_NAME if name == "id" else MAX_PROMPT
        if len(text) > limit:
            found.append(Problem(name, f"has {len(text):,} characters; at most {limit:,} are taken"))
    if not task.prompt.strip():
        found.append(Problem("prompt", "is empty; write one"))
    if not task.id.strip():
        found.append(Problem("id", "is empty; name the task or drop the column"))
    return found


def _answer_problems(task: Task) -> list[Problem]:
    """Fields of a picture that a judge's task names."""
    found = [
        Problem(name, f"the judge {task.model!r} makes no picture; remove it")
        for name in ("width", "height", "steps", "seed")
        if getattr(task, name) is not None
    ]
    if task.num_images != 1:
        found.append(Problem("num_images", f"is {task.num_images}; a judge gives one answer a task"))
    if task.output_path != file_stem(task.id) + ANSWER_SUFFIX:
        found.append(Problem("output_path", f"the judge {task.model!r} makes no picture; remove it"))
    return found


def _number_problems(task: Task, family: Traits) -> list[Problem]:
    found = []
    for name in ("width", "height"):
        size = getattr(task, name)
        if size is None:
            found.append(Problem(name, "is not known: neither task, run nor model names it; give --size WxH"))
        elif size < family.multiple or size % family.multiple:
            lower = max(family.multiple, size - size % family.multiple)
            found.append(
                Problem(name, f"is {size}; {family.name} takes multiples of {family.multiple}, such as {lower}")
            )
    if task.width and task.height and task.width * task.height > MAX_PIXELS:
        found.append(Problem("width", f"{task.width}x{task.height}: {TOO_LARGE}"))
    if task.steps is None:
        found.append(Problem("steps", "is not known: neither task, run nor model names it; give --steps"))
    elif not 1 <= task.steps <= MAX_STEPS:
        found.append(Problem("steps", f"is {task.steps}; 1 to {MAX_STEPS} are taken"))
    if task.seed is not None and not 0 <= task.seed <= MAX_SEED - max(0, task.num_images - 1):
        found.append(Problem("seed", f"is {task.seed}; 0 to 2**63-1 are taken"))
    if not 1 <= task.num_images <= 10_000:
        found.append(Problem("num_images", f"is {task.num_images}; 1 to 10000 are taken"))
    for name in ("guidance_scale", "true_cfg_scale"):
        scale = getattr(task, name)
        if scale is not None and not 0 <= scale <= 1000:
            found.append(Problem(name, f"is {scale}; 0 to 1000 are taken"))
    for number, lora in enumerate(task.loras):
        if not -100 <= lora.strength <= 100:
            found.append(Problem(f"loras[{number}].strength", f"is {lora.strength}; -100 to 100 are taken"))
    return found


def _path_problems(task: Task) -> list[Problem]:
    path = task.output_path or ""
    place = PurePosixPath(path)
    number = f"_{task.num_images}" if task.num_images > 1 else ""
    suffixes = [suffix for known in FORMATS.values() for suffix in known]

    def refuse(message: str) -> list[Problem]:
        return [Problem("output_path", f"{path!r} {message}")]

    if "\0" in path or not is_unicode(path):
        return refuse("contains a character no file name can hold; remove it")
    if place.is_absolute() or re.match(r"[A-Za-z]:", path):
        return refuse("is absolute; give it relative to the output folder")
    if "\\" in path:
        return refuse("contains a backslash; write / between folders")
    if ".." in place.parts:
        return refuse("leaves the output folder; remove the '..'")
    if any(len(part.encode()) > 255 for part in (*place.parts, place.name + number)):
        return refuse("has a part longer than 255 bytes; shorten it")
    if len(path.encode()) > MAX_PATH:
        return refuse(f"is longer than {MAX_PATH:,} bytes; shorten it")
    if any(part.startswith(".imagemill") for part in place.parts):
        return refuse("starts with .imagemill, which is reserved; choose another name")
    if any(PurePosixPath(part).suffix.lower() in suffixes for part in place.parts[:-1]):
        return refuse("puts the picture into a folder with a picture's name; choose another folder")
    if place.suffix.lower() not in suffixes:
        return refuse(f"is no picture's name; end it with one of {' '.join(suffixes)}")
    return []


def is_unicode(text: str) -> bool:
    """False when the text holds half of a surrogate pair, which UTF-8 cannot write."""
    return text.isascii() or not re.search(r"[\ud800-\udfff]", text)


def planned(task: Task, seq: int, model: PlannedModel, image_digests: Sequence[str] = ()) -> PlannedTask:
    """The task with its fingerprint and its ticket. `task` is resolved, expanded and its LoRAs have digests."""
    group, cost = model.family.group(task), model.family.cost(task)
    ticket = Ticket(seq=seq, needs=needs(task), group=group, cost=cost, length=length(task))
    return PlannedTask(task, fingerprint(task, model.revision, image_digests), ticket)


def length(task: Task) -> int:
    """The class of the prompt's length: a batch of unlike ones is padded to the longest and pays for a mask."""
    return len(task.prompt.encode("utf-8", "surrogatepass")) // LENGTH_CLASS


def needs(task: Task) -> tuple[str, ...]:
    """What a worker must hold to run the task, dearest first: the model, the set of adapters, the shape."""
    return (f"model:{task.model}", adapters_need(task.loras), shape_need(task))


def shape_need(task: Task) -> str:
    """The shape of what the task makes: its size, or `answer`."""
    return "shape:answer" if task.width is None else f"shape:{task.width}x{task.height}"


def adapters_need(loras: Sequence[Lora]) -> str:
    """The name of a set of adapters with their strengths; adapters at strength 0 do nothing and are left out."""
    return "adapters:" + (
        ",".join(f"{lora.digest or lora.path}@{lora.strength!r}" for lora in loras if lora.strength) or "-"
    )


def fingerprint(task: Task, revision: str, image_digests: Sequence[str] = ()) -> str:
    """sha256 in hex over all that determines the picture or the answer, and nothing else (not the id, the path, the metadata)."""
    content = {
        "semantics": SEMANTICS_VERSION,
        "model": revision,
        "prompt": task.prompt,
        "negative_prompt": task.negative_prompt,
        "images": list(image_digests),
        "size": [task.width, task.height],
        "steps": task.steps,
        "guidance_scale": _number(task.guidance_scale),
        "true_cfg_scale": _number(task.true_cfg_scale),
        "seed": task.seed,
        "loras": [[lora.digest, float(lora.strength)] for lora in task.loras],
    }
    if task.system_prompt is not None:  # left out otherwise: pictures keep the fingerprints they had before judges came
        content["system_prompt"] = task.system_prompt
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
