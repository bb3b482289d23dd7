"""The judge that is a vision-language model of transformers: batched, padded on the left, greedy.

Tasks of a batch are asked longest first, in turns that fit into free memory unless the options give a batch size. A task
that cannot be asked fails alone; when the device runs out of memory, what is left is raised for the scheduler to split.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadModel, BadTask, TaskError, classify
from imagemill.records import Answer, ModelSpec, PlannedTask, WorkOrder
from imagemill.runners import Beat, Result, Untold
from imagemill.runners.fake import check_loaded
from imagemill.runners.judge_inputs import pictures
from imagemill.spread import SPREAD_DEVICE

if TYPE_CHECKING:
    from PIL.Image import Image

TOKEN_PIXELS = 28 * 28
"""Pixels of a picture behind one token of Qwen-VL (Qwen2.5-VL technical report, section 2.1); others are near it."""

MEMORY_SHARE = 0.7
"""Of the free memory, what a turn may be planned to take: estimates of activations are rough."""

log = logging.getLogger(__name__)


def create(device: str, threads: int) -> VisionLanguageRunner:
    """The runner for a torch device; `threads` is how many CPU threads torch may use."""
    return VisionLanguageRunner(device, threads)


@dataclass(frozen=True, slots=True)
class Question:
    """A task as the model sees it; `tokens` is about how many it takes."""

    planned: PlannedTask
    text: str
    pictures: list[Image]
    tokens: int


class VisionLanguageRunner(Untold):
    """A `Runner` for one image-text-to-text model on one device, or on all it sees where the device is `cuda`."""

    def __init__(self, device: str, threads: int = 1) -> None:
        self.device = device
        self.threads = threads
        self._spec: ModelSpec | None = None
        self._model: Any = None
        self._processor: Any = None

    def prepare(self, spec: ModelSpec) -> None:
        """Import torch and transformers' automatic classes."""
        from imagemill.runners import chat_model

        chat_model.import_classes()

    def load(self, spec: ModelSpec, beat: Beat) -> None:
        """Load model and processor. Raises `BadModel` when the folder can never load."""
        import torch

        from imagemill.runners import chat_model

        self.unload()
        torch.set_num_threads(self.threads)
        started = time.monotonic()
        beat("load", -1, 0, 2)
        try:
            self._processor = chat_model.load_processor(spec)
            beat("load", -1, 1, 2)
            self._model = chat_model.load_model(spec, self.device, self._processor, spread=self.device == SPREAD_DEVICE)
        except BaseException:
            self.unload()
            raise
        self._spec = spec
        beat("load", -1, 2, 2)
        log.info("loaded %s on %s in %.1f s", spec.name, self.device, time.monotonic() - started)

    def run(self, order: WorkOrder, beat: Beat) -> Iterator[Result]:
        """One result a task. Raises `ValueError` for another judge's order."""
        check_loaded(self._spec, order)
        questions = []
        for planned in order.tasks:
            beat("read", planned.ticket.seq, 0, 1)
            try:
                questions.append(self._question(planned, order.model))
            except TaskError as error:
                yield Result(planned.ticket.seq, error=error)
        questions.sort(key=lambda question: -question.tokens)
        while questions:
            turn = self._turn(questions, order.model)
            del questions[: len(turn)]
            yield from self._ask(turn, order.model, beat)

    def _question(self, planned: PlannedTask, model: ModelSpec) -> Question:
        own = pictures(planned, model)
        text = render(self._processor, planned, len(own))
        words = len(self._processor.tokenizer(text, add_special_tokens=False).input_ids)
        return Question(
            planned, text, own, words + sum(picture.width * picture.height // TOKEN_PIXELS for picture in own)
        )

    def _turn(self, questions: Sequence[Question], model: ModelSpec) -> list[Question]:
        """The next ones to ask together: as many as are asked for, or fit; with pictures and without them apart."""
        from imagemill.runners import chat_model

        given = int(model.options["batch_size"])
        tokens = questions[0].tokens + int(model.options["max_new_tokens"])
        room = MEMORY_SHARE * chat_model.free_memory(self._model)
        size = given or max(1, int(room / chat_model.sequence_memory(self._model, tokens)))
        turn = list(questions[:size])
        if any(bool(question.pictures) != bool(turn[0].pictures) for question in turn):
            turn = turn[:1]
        return turn

    def _ask(self, turn: Sequence[Question], model: ModelSpec, beat: Beat) -> Iterator[Result]:
        try:
            results = self._generate(turn, int(model.options["max_new_tokens"]), beat)
        except Exception as error:
            fault = classify(error)
            if fault.kind in ("oom", "worker_lost"):
                raise
            if len(turn) == 1:
                log.warning("task %s", turn[0].planned.task.id, exc_info=error)
                yield Result(turn[0].planned.ticket.seq, error=fault)
                return
            for question in turn:
                yield from self._ask([question], model, beat)
            return
        yield from results

    def _generate(self, turn: Sequence[Question], most: int, beat: Beat) -> list[Result]:
        """All answers of a turn."""
        import torch

        started, size, seq = time.monotonic(), len(turn), turn[0].planned.ticket.seq
        starts = self._processor.tokenizer.bos_token
        inputs = self._processor(
            text=[question.text for question in turn],
            images=[question.pictures for question in turn] if turn[0].pictures else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            # A template may have written the token for the start already.
            add_special_tokens=not (starts and turn[0].text.startswith(starts)),
        ).to(self._model.device, dtype=self._model.dtype)
        length = inputs["input_ids"].shape[1]

        def alive(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            beat("judge", seq, ids.shape[1] - length, most)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        with torch.inference_mode():
            out = self._model.generate(**inputs, max_new_tokens=most, stopping_criteria=[alive])
        seconds = {"judge": (time.monotonic() - started) / size}
        return [
            Result(question.planned.ticket.seq, answer=self._answer(ids), seconds=seconds, batch_size=size)
            for question, ids in zip(turn, out[:, length:].tolist(), strict=True)
        ]

    def _answer(self, ids: Sequence[int]) -> Answer:
        """The text up to the first token that ends it, and how many tokens were generated for it."""
        ends = self._model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        return Answer(self._processor.tokenizer.decode(ids[:stop], skip_special_tokens=True).strip(), stop)

    def unload(self) -> None:
        """Drop the model and give the device's cached memory back."""
        self._spec = self._model = self._processor = None
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

        return chat_model.used_memory(self.device)


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
