"""The runner that every test of the machinery uses: deterministic pictures, scripted trouble, no torch.

The picture of a task is a function of its fingerprint and size alone. Pictures to edit are read as any runner reads them,
and count through the fingerprint. A task's `metadata["fake"]` scripts what happens; where several are named, the order
is: oom, noise, crash, hang, delay, raise, the pictures to edit, fail, nan, then the picture or the answer.

    {"delay": 0.5}              seconds, spread over the task's steps; beats at each step and at least every 50 ms
    {"fail": "transient"}       fails with this kind; `oom` and `worker_lost` end the batch, others the task alone
    {"fail_attempts": 2}        ... in the first two attempts only (default: always)
    {"raise": "CUDA error"}     a `RuntimeError` with these words out of the batch; `raise_attempts` as above
    {"crash": "exit"}           the process ends: "exit" with status 0, "segv" or "kill" by that signal
    {"crash_attempts": 1}       ... in the first attempt only (default: always)
    {"noise": 1000000}          bytes printed to stdout, and as many to stderr, half of them as native code does
    {"hang": true}              sleeps for ever without a beat; "spin" burns the CPU meanwhile and ignores SIGTERM
    {"hang_attempts": 1}        ... in the first attempt only (default: always)
    {"oom": 2}                  out of memory for the whole batch when it has 2 tasks or more
    {"nan": true}               a bad output, as of a model that gave NaN
    {"black": true}             a black picture
    {"answer": "Score: 8"}      what the judge `judge:fake` says; without it, a score that the fingerprint gives

Loading is scripted by the environment variable `IMAGEMILL_FAKE_LOAD`, a JSON object:

    {"delay": 0.5}              seconds, with beats
    {"fail": "bad_model"}       any kind of `errors.py`, or "crash" (SIGKILL) or "hang"
    {"only": ["cuda:1"]}        ... only where the device, or the variable `IMAGEMILL_WORKER_LABEL`, is one of these
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from imagemill.errors import TASK_ERRORS, BadOutput, OutOfMemory, TaskError
from imagemill.plan import adapters_need, shape_need
from imagemill.records import LABEL_VARIABLE, Answer, ModelSpec, PlannedTask, Task, WorkOrder
from imagemill.runners import Beat, Result, Untold, references

if TYPE_CHECKING:
    from PIL.Image import Image

LOAD_VARIABLE = "IMAGEMILL_FAKE_LOAD"
SIGNALS = {"segv": signal.SIGSEGV, "kill": signal.SIGKILL}
BATCH_KINDS = ("oom", "worker_lost")
NOISE = ("noise " * 20 + "\n") * 500
SLICE = 0.05
"""Seconds between beats while a scripted delay passes."""


def create(device: str, threads: int) -> FakeRunner:
    """The runner. `threads` means nothing to it."""
    return FakeRunner(device)


class FakeRunner(Untold):
    """A `Runner` without a model; see the module's text for the scripts."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._spec: ModelSpec | None = None
        self._adapters = adapters_need(())
        self._shape = ""

    def prepare(self, spec: ModelSpec) -> None:
        """Nothing to import."""

    def load(self, spec: ModelSpec, beat: Beat) -> None:
        """Pretend to load; `IMAGEMILL_FAKE_LOAD` scripts how that goes."""
        script = json.loads(os.environ.get(LOAD_VARIABLE) or "{}")
        only = script.get("only")
        if only is not None and not {self.device, os.environ.get(LABEL_VARIABLE)} & set(only):
            script = {}
        beat("load", -1, 0, 1)
        wait(script.get("delay", 0.0), 1, lambda step: beat("load", -1, step, 1))
        match script.get("fail"):
            case None:
                pass
            case "crash":
                crash("kill")
            case "hang":
                hang(True)
            case kind:
                raise TASK_ERRORS[kind](f"scripted: the model does not load on {self.device}")
        self._spec = spec
        beat("load", -1, 1, 1)

    def run(self, order: WorkOrder, beat: Beat) -> Iterator[Result]:
        """One result a task, in the order's order. Raises `ValueError` for a model that is not loaded."""
        size = len(order.tasks)
        check_loaded(self._spec, order)
        for planned in order.tasks:
            if size >= script_of(planned.task).get("oom", size + 1):
                raise OutOfMemory(f"scripted: out of memory with {size} tasks in the batch")
        self._adapters = adapters_need(order.tasks[0].task.loras)
        for planned, attempt in zip(order.tasks, order.attempts, strict=True):
            self._shape = shape_need(planned.task)
            yield self._result(planned, attempt, order, beat)

    def _result(self, planned: PlannedTask, attempt: int, order: WorkOrder, beat: Beat) -> Result:
        size = len(order.tasks)
        seq, task, script = planned.ticket.seq, planned.task, script_of(planned.task)
        print_noise(script.get("noise", 0))
        if scripted(script, "crash", attempt):
            crash(script["crash"])
        if scripted(script, "hang", attempt):
            hang(script["hang"])
        started = time.monotonic()
        steps = task.steps or 1
        wait(script.get("delay", 0.0), steps, lambda step: beat("denoise", seq, step, steps))
        if scripted(script, "raise", attempt):
            raise RuntimeError(script["raise"])
        try:
            references.read(planned, order.model)
            if scripted(script, "fail", attempt):
                raise TASK_ERRORS[script["fail"]](f"scripted: {script['fail']} in attempt {attempt}")
            if script.get("nan"):
                raise BadOutput("the picture contains NaN")
        except TaskError as error:
            if error.kind in BATCH_KINDS:
                raise
            return Result(seq, error=error, batch_size=size)
        if order.model.family == "judge":
            answer = answer_to(planned, script)
            return Result(seq, answer=answer, seconds={"judge": time.monotonic() - started}, batch_size=size)
        image = picture(planned, black=bool(script.get("black")))
        return Result(seq, image=image, seconds={"denoise": time.monotonic() - started}, batch_size=size)

    def unload(self) -> None:
        """Forget the model."""
        self._spec, self._adapters, self._shape = None, adapters_need(()), ""

    @property
    def resident(self) -> frozenset[str]:
        """The loaded model, the adapters and the shape of the last run."""
        if self._spec is None:
            return frozenset()
        return frozenset({f"model:{self._spec.name}", self._adapters, *filter(None, (self._shape,))})

    def memory(self) -> tuple[int, int]:
        """What the loaded model's spec says that it needs."""
        need = self._spec.memory if self._spec else 0
        return need, need


def check_loaded(spec: ModelSpec | None, order: WorkOrder) -> None:
    """Raises `ValueError` when the order is for another model than the loaded one: a defect of whoever sent it."""
    if spec is None or order.model.name != spec.name:
        raise ValueError(f"the order is for model {order.model.name!r}; loaded is {spec.name if spec else None!r}")


def script_of(task: Task) -> Mapping[str, Any]:
    """The script in the task's metadata; an empty one where there is none."""
    script = task.metadata.get("fake")
    return script if isinstance(script, Mapping) else {}


def scripted(script: Mapping[str, Any], what: str, attempt: int) -> bool:
    """True when the script asks for this in this attempt."""
    return bool(script.get(what)) and attempt <= script.get(f"{what}_attempts", attempt)


def picture(planned: PlannedTask, black: bool = False) -> Image:
    """4x4 colours from the fingerprint, enlarged to the task's size (16x16 pixels where it names none)."""
    from PIL import Image

    size = (planned.task.width or 16, planned.task.height or 16)
    if black:
        return Image.new("RGB", size)
    colours = hashlib.sha384(planned.fingerprint.encode()).digest()
    return Image.frombytes("RGB", (4, 4), colours).resize(size, Image.Resampling.NEAREST)


def answer_to(planned: PlannedTask, script: Mapping[str, Any]) -> Answer:
    """The scripted text, else a score from 0 to 10 that the fingerprint gives; its words are counted as tokens."""
    text = str(script["answer"]) if "answer" in script else f"Score: {int(planned.fingerprint, 16) % 11}"
    return Answer(text, len(text.split()), cut=bool(script.get("cut")))


def wait(seconds: float, steps: int, on_step: Any) -> None:
    """Let the seconds pass in equal steps; calls `on_step(step)` after each, and every `SLICE` within a long one."""
    for step in range(1, steps + 1):
        until = time.monotonic() + seconds / steps
        while seconds and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, SLICE))
            if left > SLICE:
                on_step(step - 1)
        on_step(step)


def crash(how: str) -> NoReturn:
    """End this process at once: `exit`, `segv` or `kill`."""
    if how in SIGNALS:
        os.kill(os.getpid(), SIGNALS[how])
        hang(True)  # the signal may reach another thread first
    os._exit(0)


def hang(how: Any) -> NoReturn:
    """Never return and never beat; `spin` keeps the CPU busy and, in a process of its own, ignores SIGTERM."""
    if how == "spin":
        with contextlib.suppress(ValueError):  # not the main thread, so not a worker's process
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        if how != "spin":
            time.sleep(3600)


def print_noise(size: int) -> None:
    """This many bytes to stdout and to stderr: first by `print`, then past Python, where no library can catch them."""
    half = size // 2
    for stream in (sys.stdout, sys.stderr):
        for start in range(0, half, len(NOISE)):
            stream.write(NOISE[: half - start])
        stream.flush()
    for fd in (1, 2):
        for start in range(0, size - half, len(NOISE)):
            os.write(fd, NOISE[: size - half - start].encode())
