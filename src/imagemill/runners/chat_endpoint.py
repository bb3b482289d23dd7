"""One OpenAI-compatible endpoint: a request, the answer read, and what is tried again.

Tried again, a bounded number of times and later each time: 408, 409, 425, 429 (after what `Retry-After` says), 5xx,
time-outs, connections that fail or are cut, and a reply that is no answer in JSON. Every other status is the endpoint's
refusal of this task. The key is read from the environment, goes into one header, and is cut out of whatever the endpoint
says.
"""

from __future__ import annotations

import email.utils
import os
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadModel, BadTask, TaskError, Transient
from imagemill.records import Answer

if TYPE_CHECKING:
    from httpx2 import Response
    from tenacity import RetryCallState

TRIES = 5
"""How often one attempt of a task asks; the scheduler tries a task `max_attempts` times."""

FIRST_WAIT = 1.0
MAX_WAIT = 60.0
"""Seconds before the second try, doubled at each further one, with up to as much again by chance; and the most."""

MAX_RETRY_AFTER = 300.0
"""Seconds that `Retry-After` may ask for; an endpoint that wants more is left for the scheduler's next attempt."""

PASSING = (408, 409, 425, 429)
MAX_MESSAGE = 500
HIDDEN = "[key]"
SHORTEST_SECRET = 8


class Passing(Transient):
    """A failure that another request may not meet. `after` is how many seconds the endpoint asked for, if it did."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class ChatEndpoint:
    """A client of one endpoint, for one event loop. `options` are those of the judge's `ModelSpec`."""

    def __init__(self, options: Mapping[str, str | int | float | bool]) -> None:
        import httpx2

        self._url = f"{options['base_url']}/chat/completions"
        self._asked = {"model": options["model"], "temperature": 0}
        self._limit = {"max_tokens": int(options["max_new_tokens"])}
        self._variable = str(options["api_key_env"])
        self._key = read_key(self._variable)
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            # No limit to the wait for a connection of the pool: the turn of a request decides that.
            timeout=httpx2.Timeout(float(options["timeout"]), pool=None),
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def ask(self, messages: list[dict[str, Any]]) -> Answer:
        """The answer to a conversation. Raises `BadTask` when the endpoint refuses it, `Transient` when no try gave one."""
        import tenacity

        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Passing),
            stop=tenacity.stop_after_attempt(TRIES),
            wait=seconds_to_wait,
            reraise=True,
        )
        answer: Answer = await tries(self._once, messages)
        return answer

    async def _once(self, messages: list[dict[str, Any]]) -> Answer:
        import httpx2

        limit = self._limit
        try:
            response = await self._client.post(self._url, json={**self._asked, **limit, "messages": messages})
        except httpx2.TimeoutException as error:
            raise Passing(f"the endpoint was silent too long ({type(error).__name__})") from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            message = self._clean(f"{type(error).__name__}: {error}")
            raise Passing(f"the endpoint cannot be reached: {message}") from error
        if response.status_code == 400 and "max_completion_tokens" in response.text and "max_tokens" in limit:
            # Newer models of OpenAI know the limit by another name only, and say so.
            self._limit = {"max_completion_tokens": limit["max_tokens"]}
            return await self._once(messages)
        if response.status_code != 200:
            raise self._fault(response)
        try:
            answer = read_answer(response.json())
            return replace(answer, text=self._hide(answer.text))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Passing(f"the endpoint's reply is no answer: {self._clean(response.text)}") from error

    def _fault(self, response: Response) -> TaskError:
        status, message = response.status_code, self._clean(said(response))
        if status in PASSING or status >= 500:
            return Passing(f"the endpoint answers {status}: {message}", retry_after(response.headers))
        hint = f"; set {self._variable} to a key that it takes" if status in (401, 403) else ""
        return BadTask(f"the endpoint refuses with {status}: {message}{hint}")

    def _clean(self, text: str) -> str:
        """One line, not too long, without the key. It is cut out first: half of it at the end would still be a secret."""
        line = " ".join(self._hide(text).split())
        return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "..."

    def _hide(self, text: str) -> str:
        """The text without the key, should the endpoint have sent it back; a dummy such as `EMPTY` is no secret."""
        return text.replace(self._key, HIDDEN) if len(self._key) >= SHORTEST_SECRET else text


def read_key(variable: str) -> str:
    """The key in that variable; empty when there is none. Raises `BadModel` for one that no header can carry."""
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise BadModel(f"{variable} holds characters that no key has (blanks, or other than ASCII); set it again")
    return key


def read_answer(reply: Any) -> Answer:
    """The answer of a chat completion: its text, or the words of its refusal, or nothing; and whether it was cut off.

    Raises `LookupError`, `TypeError` or `AttributeError` for what is no chat completion.
    """
    choice = reply["choices"][0]
    message = choice["message"]
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    text = content or message.get("refusal") or ""
    if not isinstance(text, str):
        raise TypeError("the content is no text")
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    counted = tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else 0
    return Answer(text, counted, cut=choice.get("finish_reason") == "length")


def said(response: Response) -> str:
    """The endpoint's own words for what went wrong."""
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        return response.text or response.reason_phrase or "nothing more"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply asks to wait, from a number or a date (RFC 9110, section 10.2.3); None when it asks for none.

    A date counts from the reply's own: the clock of this machine may be set to anything.
    """
    asked = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", asked):
        return float(asked)
    try:
        moment, sent = (email.utils.parsedate_to_datetime(text) for text in (asked, headers.get("date", "")))
    except (ValueError, TypeError):
        return None
    return max(0.0, moment.timestamp() - sent.timestamp())


def seconds_to_wait(state: RetryCallState) -> float:
    """What the endpoint asked for; else twice as long at each try, by chance up to double, so that requests spread."""
    fault = state.outcome.exception() if state.outcome else None
    if isinstance(fault, Passing) and fault.after is not None:
        return min(fault.after, MAX_RETRY_AFTER)
    longer: float = FIRST_WAIT * 2 ** (state.attempt_number - 1)
    return min(MAX_WAIT, longer * (1 + random.random()))
