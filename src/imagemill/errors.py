"""The error tree. Every error has a `kind` (the word in ledgers and reports) and ends the command with an exit code.

    ImagemillError
    ├── InputError            exit 2: the user's mistake, one line with place and mend
    │   ├── TaskFileError         many bad rows of a source
    │   ├── ConfigError           a setting or the YAML file
    │   └── ChangedTasksError     changed tasks under ids that an earlier run used
    ├── FolderInUseError      exit 2: another run holds the output folder
    ├── LedgerError           exit 2: the ledger is damaged or of another version
    ├── OutputError           exit 1: the output folder cannot be written any more
    ├── NoWorkersError        exit 1: every device has failed
    └── TaskError             never ends a run: one task's failure, raised inside a worker
        └── BadTask  BadModel  OutOfMemory  Transient (StoreFailed)  WorkerGone  TimedOut  BadOutput

`classify` is the one boundary at which foreign exceptions get their kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from imagemill.records import Kind

KINDS: tuple[Kind, ...] = ("bad_task", "bad_model", "oom", "transient", "worker_lost", "timeout", "bad_output")


class ImagemillError(Exception):
    """Base of everything imagemill raises on purpose. `exit_code` is what the command ends with."""

    exit_code: ClassVar[int] = 1


class InputError(ImagemillError):
    """A mistake in what the user gave. The message names the place and the mend in one line."""

    exit_code = 2


class TaskFileError(InputError):
    """Rows of a source that cannot be used. `problems` are one line each: file, line, field, what to do. `hint` is a last
    line for all of them."""

    def __init__(self, problems: Sequence[str], total: int, hint: str = "") -> None:
        self.problems = tuple(problems)
        self.total = total
        self.hint = hint
        rest = total - len(self.problems)
        lines = list(self.problems)
        if rest > 0:
            lines.append(f"... and {rest} more")
        if hint:
            lines.append(hint)
        super().__init__("\n".join(lines))


class ConfigError(InputError):
    """A setting that is unknown or out of range; the message starts with the field's path."""


class ChangedTasksError(InputError):
    """Tasks that an earlier run of this folder knew under the same ids, but with other content. `differences` are a line for
    each of the first of `total` tasks."""

    def __init__(self, differences: Sequence[str], total: int) -> None:
        self.differences = tuple(differences)
        self.total = total
        self.what = f"{total} task{'s' if total > 1 else ''} changed under ids this folder already knows"
        lines = [self.what, *(f"  {line}" for line in self.differences)]
        lines.append("give options=RunOptions(rerun_changed=True) to make them again, or another out to keep both")
        super().__init__("\n".join(lines))


class FolderInUseError(InputError):
    """Another run holds the lock of the output folder."""


class LedgerError(InputError):
    """The ledger cannot be read: damaged, or written by another version."""


class OutputError(ImagemillError):
    """The output folder cannot be written any more (disk full, read-only). What is done stays done."""


class NoWorkersError(ImagemillError):
    """No worker is left that could go on. What is done stays done; the same command goes on later."""


class TaskError(ImagemillError):
    """One task's failure. Its `kind` decides what the scheduler does with the task."""

    kind: ClassVar[Kind] = "transient"


class BadTask(TaskError):
    """The task itself cannot be run: a field the model refuses, a LoRA that does not fit, a prompt too long."""

    kind = "bad_task"


class BadModel(TaskError):
    """The model cannot be loaded: missing files, weights left on `meta`, a class that is not served."""

    kind = "bad_model"


class OutOfMemory(TaskError):
    """The device ran out of memory."""

    kind = "oom"


class Transient(TaskError):
    """A failure that another try may not meet."""

    kind = "transient"


class StoreFailed(Transient):
    """The output folder refused a picture. No other task would escape that, so it ends the run."""


class WorkerGone(TaskError):
    """The worker died, or must not be used again (a poisoned CUDA context)."""

    kind = "worker_lost"


class TimedOut(TaskError):
    """The worker was silent for longer than its deadline."""

    kind = "timeout"


class BadOutput(TaskError):
    """A picture came out that is no picture: NaN, wrong size, a file that does not decode."""

    kind = "bad_output"


TASK_ERRORS: dict[Kind, type[TaskError]] = {
    error.kind: error for error in (BadTask, BadModel, OutOfMemory, Transient, WorkerGone, TimedOut, BadOutput)
}

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")
"""Parts of the messages of CUDA, torch's allocator on the CPU, the system (ENOMEM) and cuBLAS."""

POISONING = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "an illegal instruction",
    "uncorrectable ecc",
    "unable to determine the device handle",
    "gpu has fallen off the bus",
)
"""Parts of CUDA's messages after which every further call of the process fails (CUDA runtime API, sticky errors)."""


def classify(error: BaseException) -> TaskError:
    """The task error that stands for any exception raised while a task ran.

    Torch is not imported: its errors are known by the names of their classes and their words. What is not known is
    `transient`, which is tried again a bounded number of times.
    """
    if isinstance(error, TaskError):
        return error
    name, words = type(error).__name__, str(error).lower()
    if name == "OutOfMemoryError" or isinstance(error, MemoryError) or any(part in words for part in OUT_OF_MEMORY):
        return OutOfMemory(_line(error))
    if any(part in words for part in POISONING) or name == "AcceleratorError":
        return WorkerGone(f"the device's context is poisoned: {_line(error)}")
    return Transient(_line(error))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__
