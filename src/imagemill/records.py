"""The records that travel between the rooms: frozen, small, serialisable.

This file imports nothing but the standard library, so that every other file may import it. Three groups:
what a user asks for (`Task`, `Lora`), what is decided before a run (`PlannedTask`, `Ticket`), and the words that
scheduler, executor and worker speak (`Batch`, `Receipt`, `Failure`, events, commands, `Outcome`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

SEMANTICS_VERSION = 1
"""Part of every fingerprint. Raised when the same task would give another picture than the release before."""


LABEL_VARIABLE = "IMAGEMILL_WORKER_LABEL"
"""The environment variable that tells a worker process what its device is called."""

WORKER_THREAD = "imagemill-worker"
"""The name of the thread of a worker inside the driver's process."""

# --- what a user asks for ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lora:
    """One adapter of a task: a safetensors file and the strength (scale) at which it is applied.

    `digest` is the sha256 of the file in hex; empty until the driver has read the file.
    """

    path: str
    strength: float = 1.0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """One picture (or `num_images` of them, or one judge's answer) that a user asks for. Names are those of diffusers.

    `None` means: the run's or the model's default. `width` and `height` are pixels of the output. `images` are paths
    of the pictures to edit, or to judge. `output_path` is relative to the output folder. `system_prompt` is for judges,
    which answer in text and have neither size nor steps. `metadata` holds every column that imagemill does not know; it
    travels to the results unchanged.
    """

    id: str
    prompt: str
    negative_prompt: str | None = None
    images: tuple[str, ...] = ()
    model: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    seed: int | None = None
    loras: tuple[Lora, ...] = ()
    output_path: str | None = None
    num_images: int = 1
    metadata: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None


# --- what is decided before a run -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ticket:
    """What the scheduler knows of a task: its place in the order, opaque needs, what may share its batch, its cost.

    `needs` are ordered by what it costs to satisfy them, dearest first (model, adapters, shape). `cost` is in seconds on
    whatever device the estimate was made for; only ratios matter to the scheduler. Of those that may share a batch, tasks
    whose `length` is the same share it best.
    """

    seq: int
    needs: tuple[str, ...] = ()
    group: str = ""
    cost: float = 1.0
    length: int = 0


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """A task of which everything is known: no field that its result depends on is open, and it stands for one picture, or
    for one answer; then it has no size.

    `fingerprint` is the sha256 (hex) over all that determines the picture. `output_path` of the task is final.
    """

    task: Task
    fingerprint: str
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a diffusion model is made fast on a GPU. Only `precision` is part of the model's revision.

    `compile` compiles the repeated blocks and the VAE's decoder, warmed up for pictures of `sizes` (width, height) in
    batches of `batch`, with and without classifier-free guidance as `guided` lists (empty: as the family's defaults have
    it). `precision` is `bf16` or `fp8`. `attention` names a back end of diffusers, or is `auto`. Without `adapters` fp8 keeps
    no weights to merge adapters into, and those that come all the same are layers.
    """

    compile: bool = False
    precision: str = "bf16"
    attention: str = "auto"
    sizes: tuple[tuple[int, int], ...] = ()
    batch: int = 1
    guided: tuple[bool, ...] = ()
    adapters: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model that a worker can load: where it is, what kind it is, and which code revision of it.

    `runner` names a file of `runners/`, `family` one of `families/` (empty: found by the pipeline's `_class_name`).
    `revision` goes into fingerprints. `memory` is the need in bytes of device memory, 0 when unknown. `options` are what
    a judge is asked with; those that its answers depend on are part of its revision. No secret is among them.
    """

    name: str
    folder: str
    runner: str = "diffusion"
    family: str = ""
    revision: str = ""
    dtype: str = "auto"
    memory: int = 0
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    tuning: Tuning = Tuning()


@dataclass(frozen=True, slots=True)
class SinkSpec:
    """Where pictures go: a file of `sinks/` by name, the output folder, the picture format and what is written inside."""

    kind: str = "files"
    folder: str = ""
    format: str = "png"
    metadata: bool = True


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker needs to start.

    `device` is a torch device as the worker sees it (`cpu`, `cuda:0`); `label` is what people read (`GPU 2`, `CPU 0`).
    `environment` is set before the interpreter of a worker process starts. `model` is loaded at the start. `log` is the
    path of the worker's own log file, or empty. `ahead` says that it takes the next batch while it saves the pictures of
    the one before: a GPU then never waits, and a worker that dies costs both.
    """

    worker: int
    device: str
    label: str
    model: ModelSpec
    environment: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    log: str = ""
    log_level: str = "info"
    ahead: bool = False


# --- batches and what comes back --------------------------------------------------------------------------------------

Kind: TypeAlias = Literal["bad_task", "bad_model", "oom", "transient", "worker_lost", "timeout", "bad_output"]
"""Why something failed; the kinds of `errors.py`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Tickets that one worker runs together. `attempts[i]` is 1 for the first try of `tickets[i]`."""

    id: int
    tickets: tuple[Ticket, ...]
    attempts: tuple[int, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """The needs all members share."""
        return self.tickets[0].needs


@dataclass(frozen=True, slots=True)
class WorkOrder:
    """A batch as a worker receives it: the tasks themselves in the order of the batch's tickets, the model that runs
    them and where the pictures go. A worker that holds another model changes it. `coming` are adapters that tasks still
    waiting need: the worker may read them meanwhile."""

    batch: int
    model: ModelSpec
    sink: SinkSpec
    tasks: tuple[PlannedTask, ...]
    attempts: tuple[int, ...]
    coming: tuple[Lora, ...] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """One stage of a worker: `start` on the machine's monotonic clock, in seconds. `on_device` tells the stages that keep
    the device busy from those of the CPU. `seq` is the first task of the batch; None for loading."""

    stage: str
    start: float
    seconds: float
    on_device: bool = True
    seq: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge said: its text as it came, and how many tokens it generated (0 where nothing counts them). `cut` says that
    the limit of tokens ended it."""

    text: str
    tokens: int
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Receipt:
    """A picture that a worker has made, checked and written to a temporary file beside its place; or a judge's answer.

    With an `answer` there is no file: width, height and bytes are 0, the paths empty, and the ledger alone keeps it.
    `temporary` and `path` are relative to the sink's folder and empty for the sink `none`. `seconds` maps a stage
    (`encode`, `denoise`, `decode`, `save`) to its share of this task. `flags` holds remarks such as `black` or
    `constant`. `peak_memory` is in bytes on the device.
    """

    seq: int
    attempt: int
    width: int
    height: int
    bytes: int = 0
    sha256: str = ""
    temporary: str = ""
    path: str = ""
    batch_size: int = 1
    seconds: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    peak_memory: int = 0
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A task of a batch that gave no picture. `message` is one line for people.

    `ends_run` says that it is nothing of the task's: the output folder cannot be written, so the run must end.
    """

    seq: int
    attempt: int
    kind: Kind
    message: str
    ends_run: bool = False


@dataclass(frozen=True, slots=True)
class Try:
    """One ended attempt of a task that did not give a picture. `shared`: its worker was lost and had another batch, too;
    `bystander`: this one had not begun, but for being read and encoded ahead, or the other had poisoned the device's context."""

    attempt: int
    worker: int
    kind: Kind
    message: str
    batch_size: int = 1
    shared: bool = False
    bystander: bool = False


State: TypeAlias = Literal["done", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended. `path` is the picture's absolute path (empty for a failure or the sink `none`).

    `resumed` says that an earlier run had settled it. `elapsed` is the seconds of the attempt that settled it.
    """

    task: Task
    seq: int
    state: State
    path: str = ""
    kind: Kind | None = None
    message: str = ""
    attempts: int = 0
    worker: int | None = None
    elapsed: float = 0.0
    receipt: Receipt | None = None
    resumed: bool = False

    @property
    def ok(self) -> bool:
        """True when the picture, or the answer, is there."""
        return self.state == "done"

    @property
    def answer(self) -> Answer | None:
        """What a judge said; None for a picture and for a failure."""
        return self.receipt.answer if self.receipt else None


# --- events: facts that go to the scheduler ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TasksArrived:
    """Tasks were read from the source, in order of `seq`."""

    tickets: tuple[Ticket, ...]


@dataclass(frozen=True, slots=True)
class SourceEnded:
    """No more tasks will arrive."""


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has loaded what it was told to and waits. `resident` names what it holds."""

    worker: int
    resident: frozenset[str]
    seconds: float = 0.0
    memory: int = 0
    spans: tuple[Span, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerBeat:
    """A worker is alive: it loaded a part, or did one denoising step of `seq`."""

    worker: int
    seq: int | None = None
    step: int = 0
    steps: int = 0
    stage: str = ""
    memory: int = 0


@dataclass(frozen=True, slots=True)
class BatchMade:
    """A worker has handed a batch to its device and can take the next; the pictures are still to be saved. Not `made`: the last
    steps are still to come, though it wants the next one now; it is said again when they are over."""

    worker: int
    batch: int
    resident: frozenset[str]
    made: bool = True


@dataclass(frozen=True, slots=True)
class BatchEnded:
    """A worker has ended a batch: each member has a receipt or a failure.

    `notes` are lines for the log and the report: what the worker had to change, as after running out of memory.
    """

    worker: int
    batch: int
    receipts: tuple[Receipt, ...]
    failures: tuple[Failure, ...]
    resident: frozenset[str]
    seconds: float = 0.0
    spans: tuple[Span, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone: crashed, killed, or it gave up loading. `kind` and `message` say why."""

    worker: int
    kind: Kind = "worker_lost"
    message: str = ""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Drain:
    """End what is in flight, start nothing more (the first ctrl-C)."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop at once (the second ctrl-C)."""


Event: TypeAlias = (
    TasksArrived | SourceEnded | WorkerReady | WorkerBeat | BatchMade | BatchEnded | WorkerLost | Tick | Drain | Cancel
)


# --- commands: decisions of the scheduler -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start the process of this worker; it does not load yet."""

    worker: int


@dataclass(frozen=True, slots=True)
class Load:
    """Tell the worker to load its model."""

    worker: int


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Hand the batch to the worker."""

    worker: int
    batch: Batch


@dataclass(frozen=True, slots=True)
class Kill:
    """End the worker at once; a `WorkerLost` follows from the executor."""

    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class Settle:
    """A task has ended for good: with a receipt it is done, with a failure it failed."""

    seq: int
    attempts: int
    worker: int | None
    receipt: Receipt | None = None
    failure: Failure | None = None
    tries: tuple[Try, ...] = ()


@dataclass(frozen=True, slots=True)
class Halt:
    """Nothing is in flight any more and nothing will be. `reason`: done, drained, cancelled, no_workers or bad_model."""

    reason: Literal["done", "drained", "cancelled", "no_workers", "bad_model"]
    message: str = ""


Command: TypeAlias = Spawn | Load | Dispatch | Kill | Settle | Halt
