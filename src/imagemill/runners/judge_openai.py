"""The judge behind an OpenAI-compatible endpoint (vLLM, SGLang and others): `POST {base_url}/chat/completions`.

The requests of a batch run at the same time, `concurrency` of them at most. Pictures go along as PNG in data URLs.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadModel, TaskError
from imagemill.records import ModelSpec, PlannedTask, WorkOrder
from imagemill.runners import Beat, Result, Untold
from imagemill.runners.chat_endpoint import ChatEndpoint
from imagemill.runners.fake import check_loaded
from imagemill.runners.judge_inputs import pictures
from imagemill.source_image import PNG_LEVEL

if TYPE_CHECKING:
    from PIL.Image import Image

BEAT_SECONDS = 1.0
"""Seconds between two signs of life while answers are waited for."""


def create(device: str, threads: int) -> EndpointRunner:
    """The runner; it computes nothing, so neither means anything to it."""
    return EndpointRunner()


class EndpointRunner(Untold):
    """A `Runner` that asks another machine. Its event loop turns only inside `run`, on the worker's own thread."""

    def __init__(self) -> None:
        self._spec: ModelSpec | None = None
        self._endpoint: ChatEndpoint | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def prepare(self, spec: ModelSpec) -> None:
        """There is nothing to import ahead."""

    def load(self, spec: ModelSpec, beat: Beat) -> None:
        """Open the client. Raises `BadModel` for a key that no header takes; nothing is sent yet."""
        self.unload()
        self._endpoint = ChatEndpoint(spec.options)
        self._loop = asyncio.new_event_loop()
        self._spec = spec

    def run(self, order: WorkOrder, beat: Beat) -> Iterator[Result]:
        """One result a task, as each comes. Raises `ValueError` for another judge's order."""
        check_loaded(self._spec, order)
        if self._endpoint is None or self._loop is None:
            raise BadModel("no endpoint is open")
        loop, size = self._loop, len(order.tasks)
        turns = asyncio.Semaphore(int(order.model.options["concurrency"]))
        waiting = {
            loop.create_task(_judge(self._endpoint, planned, order.model, turns, size)) for planned in order.tasks
        }
        try:
            while waiting:
                beat("judge", order.tasks[0].ticket.seq, size - len(waiting), size)
                some = asyncio.wait(waiting, timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                ended, waiting = loop.run_until_complete(some)
                yield from (task.result() for task in ended)
        finally:
            for task in waiting:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*waiting, return_exceptions=True))

    def unload(self) -> None:
        """Close the connections."""
        if self._loop is not None and self._endpoint is not None:
            self._loop.run_until_complete(self._endpoint.close())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
        self._spec = self._endpoint = self._loop = None

    @property
    def resident(self) -> frozenset[str]:
        """The judge."""
        return frozenset({f"model:{self._spec.name}"}) if self._spec else frozenset()

    def memory(self) -> tuple[int, int]:
        """No device memory is used."""
        return 0, 0


async def _judge(
    endpoint: ChatEndpoint, planned: PlannedTask, model: ModelSpec, turns: asyncio.Semaphore, size: int
) -> Result:
    """The result of one task, once it is its turn."""
    seq = planned.ticket.seq
    async with turns:
        started = time.monotonic()
        try:
            # Reading and packing pictures takes a thread: answers come in meanwhile.
            asked = await asyncio.to_thread(lambda: messages(planned, pictures(planned, model)))
            answer = await endpoint.ask(asked)
        except TaskError as error:
            return Result(seq, error=error, batch_size=size)
        return Result(seq, answer=answer, seconds={"judge": time.monotonic() - started}, batch_size=size)


def messages(planned: PlannedTask, own: list[Image]) -> list[dict[str, Any]]:
    """The conversation: the system prompt if there is one, the pictures, the text."""
    task = planned.task
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in own]
    content.append({"type": "text", "text": task.prompt})
    system = [{"role": "system", "content": task.system_prompt}] if task.system_prompt else []
    return [*system, {"role": "user", "content": content}]


def data_url(picture: Image) -> str:
    """The picture as PNG, whole: traces of JPEG would count as faults of the edit."""
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=PNG_LEVEL)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
