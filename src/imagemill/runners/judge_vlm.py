"""The judge that is a vision-language model of transformers: batched, padded on the left, greedy.

Tasks are read and cut into patches on threads. On a GPU a thread of its own asks them, so that those of the next batch are
prepared while it answers; on the CPU a batch is answered before `run` gives its results. Tasks of a batch are asked longest
first, in turns that fit into free memory unless the options give a batch size. A task that cannot be asked fails alone;
when the device runs out of memory, what is left fails so, for the scheduler to split.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from imagemill import devices
from imagemill.errors import BadModel, BadTask, OutOfMemory, TaskError, classify
from imagemill.records import Answer, ModelSpec, PlannedTask, Span, WorkOrder
from imagemill.runners import Beat, Result, Untold
from imagemill.runners.fake import check_loaded
from imagemill.runners.judge_inputs import pictures
from imagemill.runners.ladder import release
from imagemill.spread import SPREAD_DEVICE

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

TOKEN_PIXELS = 28 * 28
"""Pixels of a picture behind one token of Qwen-VL (Qwen2.5-VL technical report, section 2.1); others are near it."""

MEMORY_SHARE = 0.85
"""Of the free memory, what a turn may be planned to take: the rest is for what the estimate leaves out."""

PREPARERS = 8
"""Threads at most that read pictures and cut them up; decoding, scaling and copying let go of the interpreter."""

log = logging.getLogger(__name__)


def create(device: str, threads: int) -> VisionLanguageRunner:
    """The runner for a torch device; `threads` is how many CPU threads torch may use."""
    return VisionLanguageRunner(device, threads)


@dataclass(frozen=True, slots=True)
class Question:
    """A task as the model sees it; `tokens` is about how many it takes.

    `inputs` are the model's own where they are made task by task; its pictures are no longer kept then. `span` is its
    preparation.
    """

    planned: PlannedTask
    text: str
    pictures: list[Image]
    tokens: int
    shows: bool = False
    inputs: Mapping[str, torch.Tensor] | None = None
    span: Span | None = None


class VisionLanguageRunner(Untold):
    """A `Runner` for one image-text-to-text model on one device, or on all it sees where the device is `cuda`.

    `ahead` says that it answers on a thread of its own, so that results may still be on their way.
    """

    def __init__(self, device: str, threads: int = 1, ahead: bool | None = None) -> None:
        self.device = device
        self.threads = threads
        self.ahead = device.startswith("cuda") if ahead is None else ahead
        self._spec: ModelSpec | None = None
        self._model: Any = None
        self._processor: Any = None
        self._inputs: Any = None
        self._preparers: ThreadPoolExecutor | None = None
        self._asker: ThreadPoolExecutor | None = None
        self._flying: Future[None] | None = None
        self._peak = 0

    def prepare(self, spec: ModelSpec) -> None:
        """Import torch and transformers' automatic classes."""
        from imagemill.runners import chat_model

        chat_model.import_classes()

    def load(self, spec: ModelSpec, beat: Beat) -> None:
        """Load model and processor. Raises `BadModel` when the folder can never load."""
        import torch

        from imagemill.runners import chat_model, vision_inputs, vision_windows

        self.unload()
        torch.set_num_threads(self.threads)
        started = time.monotonic()
        beat("load", -1, 0, 2)
        try:
            self._processor = chat_model.load_processor(spec)
            beat("load", -1, 1, 2)
            self._model = chat_model.load_model(spec, self.device, self._processor, spread=self.device == SPREAD_DEVICE)
            vision_windows.join_windows(self._model)
            on_gpu = self._model.device.type == "cuda"
            self._inputs = vision_inputs.inputs_by(self._processor, as_bytes=on_gpu)
        except BaseException:
            self.unload()
            raise
        self._preparers = ThreadPoolExecutor(
            min(PREPARERS, devices.processors()), thread_name_prefix="imagemill-prepare"
        )
        self._asker = ThreadPoolExecutor(1, thread_name_prefix="imagemill-judge") if self.ahead else None
        self._spec = spec
        beat("load", -1, 2, 2)
        log.info("loaded %s on %s in %.1f s", spec.name, self.device, time.monotonic() - started)

    def run(self, order: WorkOrder, beat: Beat) -> Iterator[Result]:
        """One result a task. Raises `ValueError` for another judge's order.

        `ahead` it ends when the order before this one is answered: one is asked, one waits.
        """
        check_loaded(self._spec, order)
        questions = []
        for found in self._prepared(order, beat):
            if isinstance(found, Result):
                yield found
            else:
                questions.append(found)
        questions.sort(key=lambda question: -question.tokens)
        if self._asker is None:
            yield from self._answers(questions, order.model, beat)
            return
        places: dict[int, Future[Result]] = {question.planned.ticket.seq: Future() for question in questions}
        before, self._flying = self._flying, self._asker.submit(self._fly, places, questions, order.model, beat)
        for seq, place in places.items():
            yield Result(seq, arrive=place.result)
        if before is not None:
            wait([before])

    def _prepared(self, order: WorkOrder, beat: Beat) -> Iterator[Question | Result]:
        """The questions in the order of the tasks, or why one cannot be asked."""
        assert self._preparers is not None, "a model is loaded"
        jobs = [self._preparers.submit(self._ready, planned, order.model) for planned in order.tasks]
        try:
            for planned, job in zip(order.tasks, jobs, strict=True):
                beat("read", planned.ticket.seq, 0, 1)
                try:
                    yield job.result()
                except Exception as error:
                    yield self._refused(planned, error)
        finally:
            for job in jobs:
                job.cancel()

    def _ready(self, planned: PlannedTask, model: ModelSpec) -> Question:
        """The question with its inputs, if they are made task by task: on any thread."""
        from imagemill.runners import vision_inputs

        started = time.monotonic()
        question = self._question(planned, model)
        if self._inputs.apart:
            made = self._inputs.own(question.text, question.pictures, self._model.dtype)
            if self._model.device.type == "cuda":
                made = vision_inputs.pinned(made)
            question = replace(question, inputs=made, tokens=made["input_ids"].shape[1], pictures=[])
        seconds = time.monotonic() - started
        return replace(question, span=Span("prepare", started, seconds, on_device=False, seq=planned.ticket.seq))

    def _question(self, planned: PlannedTask, model: ModelSpec) -> Question:
        own = pictures(planned, model)
        text = render(self._processor, planned, len(own))
        if self._inputs.apart:
            return Question(planned, text, own, 0, bool(own))
        words = len(self._processor.tokenizer(text, add_special_tokens=False).input_ids)
        tokens = words + sum(picture.width * picture.height // TOKEN_PIXELS for picture in own)
        return Question(planned, text, own, tokens, bool(own))

    def _refused(self, planned: PlannedTask, error: Exception) -> Result:
        """What a task met alone. Raises what concerns the device."""
        fault = classify(error)
        if fault.kind in ("oom", "worker_lost"):
            raise error
        if not isinstance(error, TaskError):
            log.warning("task %s", planned.task.id, exc_info=error)
        return Result(planned.ticket.seq, error=fault)

    def _fly(
        self, places: Mapping[int, Future[Result]], questions: list[Question], model: ModelSpec, beat: Beat
    ) -> None:
        """Answer the questions of an order, each in its place; without an answer it gets what went wrong."""
        try:
            for result in self._answers(questions, model, beat):
                places[result.seq].set_result(result)
        except BaseException as error:
            fault: BaseException = error
            if isinstance(error, Exception) and isinstance(classify(error), OutOfMemory):
                fault = OutOfMemory(str(classify(error)))  # the error itself holds the batch's tensors
                release(error, self.device)
            for place in places.values():
                if not place.done():
                    place.set_exception(fault)

    def _answers(self, questions: list[Question], model: ModelSpec, beat: Beat) -> Iterator[Result]:
        while questions:
            turn = self._turn(questions, model)
            del questions[: len(turn)]
            yield from self._ask(turn, model, beat)

    def _turn(self, questions: Sequence[Question], model: ModelSpec) -> list[Question]:
        """The next ones to ask together: as many as are asked for, or fit; with pictures and without them apart."""
        from imagemill.runners import chat_model

        given = int(model.options["batch_size"])
        tokens = questions[0].tokens + int(model.options["max_new_tokens"])
        room = MEMORY_SHARE * chat_model.free_memory(self._model)
        size = given or max(1, int(room / chat_model.sequence_memory(self._model, tokens)))
        turn = list(questions[:size])
        if any(question.shows != turn[0].shows for question in turn):
            turn = turn[:1]
        return turn

    def _ask(self, turn: Sequence[Question], model: ModelSpec, beat: Beat) -> Iterator[Result]:
        try:
            results = self._generate(turn, int(model.options["max_new_tokens"]), beat)
        except Exception as error:
            if len(turn) == 1 or classify(error).kind in ("oom", "worker_lost"):
                results = [self._refused(turn[0].planned, error)]
            else:
                results = []
        if results:
            yield from results
            return
        for question in turn:
            yield from self._ask([question], model, beat)

    def _generate(self, turn: Sequence[Question], most: int, beat: Beat) -> list[Result]:
        """All answers of a turn."""
        import torch

        started, size, seq = time.monotonic(), len(turn), turn[0].planned.ticket.seq
        self._peak, read = 0, 0.0
        inputs = self._joined(turn)
        length, device = inputs["input_ids"].shape[1], inputs["input_ids"].device
        none = torch.zeros(size, dtype=torch.bool, device=device)

        def alive(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            nonlocal read
            if not read:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # once: to know when the prompts were read
                read = time.monotonic()
            beat("judge", seq, ids.shape[1] - length, most)
            return none

        with torch.inference_mode():
            out = self._model.generate(**inputs, max_new_tokens=most, stopping_criteria=[alive])
        answers, ended = out[:, length:].tolist(), time.monotonic()
        self.memory()
        read = read or ended
        spans = (Span("prefill", started, read - started, seq=seq), Span("generate", read, ended - read, seq=seq))
        return [
            Result(
                question.planned.ticket.seq,
                answer=self._answer(ids),
                seconds={"judge": (ended - started) / size} | ({"prepare": own.seconds} if own else {}),
                batch_size=size,
                spans=(*((own,) if own else ()), *(spans if question is turn[0] else ())),
                peak_memory=self._peak,
            )
            for question, ids in zip(turn, answers, strict=True)
            for own in (question.span,)
        ]

    def _joined(self, turn: Sequence[Question]) -> Any:
        device, dtype = self._model.device, self._model.dtype
        parts = [question.inputs for question in turn if question.inputs is not None]
        if len(parts) == len(turn):
            return self._inputs.join(parts, device, dtype)
        texts, shown = [question.text for question in turn], [question.pictures for question in turn]
        return self._inputs.whole(texts, shown, device, dtype)

    def _answer(self, ids: Sequence[int]) -> Answer:
        """The text up to the first token that ends it, and how many tokens were generated for it; cut where there is none."""
        ends = self._model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        end = next((place + 1 for place, token in enumerate(ids) if token in ends), None)
        stop = len(ids) if end is None else end
        text = self._processor.tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()
        return Answer(text, stop, cut=bool(ends) and end is None)

    def unload(self) -> None:
        """Drop the model and give the device's cached memory back, after what is being answered."""
        if self._preparers is not None:
            self._preparers.shutdown(wait=True, cancel_futures=True)
        if self._asker is not None:
            self._asker.shutdown(wait=True)  # an order that waits is answered: results of it may be waited for
        self._preparers = self._asker = self._flying = None
        self._spec = self._model = self._processor = self._inputs = None
        gc.collect()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    @property
    def resident(self) -> frozenset[str]:
        """The judge."""
        return frozenset({f"model:{self._spec.name}"}) if self._spec else frozenset()

    def memory(self) -> tuple[int, int]:
        """Bytes now, and at the peak since the last call, on all devices of the model together."""
        from imagemill.runners import chat_model

        now, peak = chat_model.used_memory(self.device)
        self._peak = max(self._peak, peak)
        return now, peak


def render(processor: Any, planned: PlannedTask, count: int) -> str:
    """The conversation in the model's own template: the system prompt if there is one, the pictures, the text.

    Raises `BadTask` for text that holds one of the model's control tokens, which it would take for a picture or an end.
    """
    task = planned.task
    for name, text in (("prompt", task.prompt), ("system_prompt", task.system_prompt or "")):
        if token := next((token for token in processor.tokenizer.all_special_tokens if token in text), None):
            raise BadTask(f"the {name} contains {token!r}, a control token of the judge; remove it")
    asked = [{"type": "image"}] * count + [{"type": "text", "text": task.prompt}]
    conversation = [{"role": "user", "content": asked}]
    if task.system_prompt:
        conversation.insert(0, {"role": "system", "content": [{"type": "text", "text": task.system_prompt}]})
    rendered = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    if not isinstance(rendered, str):
        raise BadModel("the judge's chat template gives no text")
    return rendered
