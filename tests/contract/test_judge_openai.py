"""The judge behind an endpoint: whatever the endpoint does, a judgment is an answer or a failure that says why."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from scripted_endpoint import Endpoint, completion, pictures_of, serving

from imagemill import Engine, InputError, Outcome, RunOptions
from imagemill.records import Answer
from imagemill.report import write_reports
from imagemill.runners import chat_endpoint
from imagemill.runners.chat_endpoint import read_answer, retry_after, seconds_to_wait
from imagemill.scoring.evaluation import evaluate
from imagemill.scoring.settings import EvalSettings, load_eval_settings

KEY = "sk-test-0123456789abcdef"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(chat_endpoint, "FIRST_WAIT", 0.001)
    with serving(Endpoint()) as made:
        yield made


def judge(
    endpoint: Endpoint, out: Path, *prompts: str, options: RunOptions | None = None, **settings: Any
) -> list[Outcome]:
    image = out.parent / "edit.png"
    if not image.exists():
        Image.effect_noise((64, 48), 50).convert("RGB").save(image)
    tasks = [
        {"id": f"t{number}", "prompt": prompt, "system_prompt": "be fair", "images": [str(image)]}
        for number, prompt in enumerate(prompts)
    ]
    asked = {"base_url": endpoint.url, "concurrency": 4, "timeout": 20.0, **settings}
    with Engine(model="judge:openai:some/model", judge=asked, max_attempts=1, log_level="debug") as engine:
        outcomes = list(engine.run(tasks, out, options))
    write_reports(out)
    return outcomes


def texts(outcomes: list[Outcome]) -> list[str | None]:
    return [outcome.answer.text if outcome.answer else None for outcome in outcomes]


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_a_request_holds_model_limits_system_prompt_pictures_and_text(endpoint: Endpoint, tmp_path: Path) -> None:
    (outcome,) = judge(endpoint, tmp_path / "out", "how good?", max_new_tokens=33)
    assert outcome.answer == Answer('{"score": 8}', 7)
    (request,) = endpoint.requests
    assert {key: request[key] for key in ("model", "max_tokens", "temperature")} == {
        "model": "some/model",
        "max_tokens": 33,
        "temperature": 0,
    }
    assert request["messages"][0] == {"role": "system", "content": "be fair"}
    assert [part["type"] for part in request["messages"][1]["content"]] == ["image_url", "text"]
    (picture,) = pictures_of(request)
    assert Image.open(io.BytesIO(picture)).size == (64, 48)


def test_pictures_are_kept_within_the_pixel_budget_in_their_own_aspect(endpoint: Endpoint, tmp_path: Path) -> None:
    Image.new("RGB", (400, 100)).save(tmp_path / "edit.png")
    judge(endpoint, tmp_path / "out", "how good?", pixels=10_000)
    (picture,) = pictures_of(endpoint.requests[0])
    assert Image.open(io.BytesIO(picture)).size == (200, 50)


def test_requests_run_at_the_same_time_and_never_more_than_asked_for(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.meet = 3
    outcomes = judge(endpoint, tmp_path / "out", *(f"q{n}" for n in range(9)), concurrency=3)
    assert all(outcome.ok for outcome in outcomes)
    assert endpoint.most_at_once == 3


def test_without_a_key_none_is_sent(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert texts(judge(endpoint, tmp_path / "out", "q")) == ['{"score": 8}']
    assert endpoint.keys == [None]


# --- what is tried again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"error": {"message": "slow down"}}),
        (500, "oh no"),
        (503, {"error": "loading"}),
        (408, ""),
        "hang up",
        "cut",
        "garbage",
        (200, {"choices": []}),
        (200, {"error": "none"}),
        (200, [1]),
        (200, {"choices": [{"message": "text"}]}),
    ],
)
def test_a_passing_failure_is_tried_again_until_there_is_an_answer(
    endpoint: Endpoint, tmp_path: Path, trouble: Any
) -> None:
    endpoint.scripts["bad"] = [trouble, trouble, "ok"]
    outcomes = judge(endpoint, tmp_path / "out", "good", "bad")
    assert texts(outcomes) == ['{"score": 8}'] * 2
    assert sorted(endpoint.prompts()) == ["bad", "bad", "bad", "good"]


def test_a_silent_endpoint_is_given_up_after_the_time_out_and_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.scripts["bad"] = ["silent", "ok"]
    assert texts(judge(endpoint, tmp_path / "out", "bad", timeout=0.2)) == ['{"score": 8}']
    assert len(endpoint.requests) == 2


def test_what_never_passes_fails_that_task_with_the_endpoints_words(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.scripts["bad"] = [(500, {"error": {"message": "the model fell over"}})]
    good, bad = judge(endpoint, tmp_path / "out", "good", "bad")
    assert good.ok
    assert (bad.state, bad.kind) == ("failed", "transient")
    assert "the endpoint answers 500: the model fell over" in bad.message
    assert endpoint.prompts().count("bad") >= chat_endpoint.TRIES
    assert endpoint.prompts().count("bad") <= 2 * chat_endpoint.TRIES
    assert bad.answer is None


def test_an_endpoint_that_is_not_there_fails_every_task_and_says_so(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.url = "http://127.0.0.1:9/v1"
    outcomes = judge(endpoint, tmp_path / "out", "a", "b")
    assert [outcome.kind for outcome in outcomes] == ["transient"] * 2
    assert "cannot be reached" in outcomes[0].message


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_refusal_fails_that_task_alone_and_is_not_tried_again(
    endpoint: Endpoint, tmp_path: Path, status: int
) -> None:
    endpoint.scripts["bad"] = [(status, {"error": {"message": "this picture is too large"}})]
    good, bad = judge(endpoint, tmp_path / "out", "good", "bad")
    assert good.ok
    assert bad.kind == "bad_task"
    assert bad.message == f"the endpoint refuses with {status}: this picture is too large"
    assert endpoint.prompts().count("bad") == 1


def test_a_key_that_is_not_taken_is_told_with_the_variable_to_set(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.scripts["q"] = [(401, {"error": {"message": "no"}})]
    (outcome,) = judge(endpoint, tmp_path / "out", "q")
    assert outcome.message.endswith("401: no; set OPENAI_API_KEY to a key that it takes")


def test_a_model_that_knows_the_limit_by_its_newer_name_is_asked_so(endpoint: Endpoint, tmp_path: Path) -> None:
    words = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    endpoint.scripts["q"] = [(400, {"error": {"message": words}}), "ok"]
    assert texts(judge(endpoint, tmp_path / "out", "q", max_new_tokens=9)) == ['{"score": 8}']
    assert [request.get("max_completion_tokens") for request in endpoint.requests] == [None, 9]
    assert "max_tokens" not in endpoint.requests[1]


# --- waiting ----------------------------------------------------------------------------------------------------------


def state(attempt: int, after: float | None = None) -> Any:
    fault = chat_endpoint.Passing("busy", after)
    return SimpleNamespace(attempt_number=attempt, outcome=SimpleNamespace(exception=lambda: fault))


def test_each_wait_is_longer_and_the_endpoints_own_wish_goes_first() -> None:
    assert 1 <= seconds_to_wait(state(1)) <= 2
    assert 8 <= seconds_to_wait(state(4)) <= 16
    assert seconds_to_wait(state(50)) == chat_endpoint.MAX_WAIT
    assert seconds_to_wait(state(1, 17.0)) == 17
    assert seconds_to_wait(state(1, 1e9)) == chat_endpoint.MAX_RETRY_AFTER


def test_retry_after_may_be_seconds_or_a_date() -> None:
    sent = datetime(2038, 1, 19, tzinfo=UTC)
    soon, date = (format_datetime(one, usegmt=True) for one in (sent + timedelta(seconds=60), sent))
    assert retry_after({"retry-after": "2"}) == 2
    assert retry_after({"retry-after": soon, "date": date}) == 60
    assert retry_after({"retry-after": soon}) is None
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT", "date": date}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_retry_after_of_a_reply_is_honoured(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.headers["Retry-After"] = "0"
    monkeypatch.setattr(chat_endpoint, "FIRST_WAIT", 1e6)
    endpoint.scripts["q"] = [(429, "slow down"), "ok"]
    assert texts(judge(endpoint, tmp_path / "out", "q")) == ['{"score": 8}']


# --- what an answer is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (completion("Score: 8", 3), Answer("Score: 8", 3)),
        (
            {"choices": [{"message": {"content": "Score: 1"}, "finish_reason": "length"}]},
            Answer("Score: 1", 0, cut=True),
        ),
        (completion([{"type": "text", "text": "Score"}, {"type": "text", "text": ": 8"}]), Answer("Score: 8", 7)),
        (completion(None), Answer("", 7)),
        ({"choices": [{"message": {"content": None, "refusal": "I cannot"}}]}, Answer("I cannot", 0)),
        ({"choices": [{"message": {"content": "8"}}], "usage": None}, Answer("8", 0)),
    ],
)
def test_every_shape_of_a_completion_is_read(reply: Any, answer: Answer) -> None:
    assert read_answer(reply) == answer


# --- resume and stop --------------------------------------------------------------------------------------------------


def test_no_answer_is_paid_for_twice(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.scripts["bad"] = [(400, "no"), "ok"]
    judge(endpoint, tmp_path / "out", "good", "bad")
    assert [outcome.resumed for outcome in judge(endpoint, tmp_path / "out", "good", "bad")] == [True, True]
    again = judge(endpoint, tmp_path / "out", "good", "bad", options=RunOptions(retry=("bad_task",)))
    assert [outcome.state for outcome in again] == ["done", "done"]
    assert endpoint.prompts().count("good") == 1


def test_a_run_that_is_stopped_leaves_its_requests(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.scripts["q"] = ["silent"]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = {"base_url": endpoint.url, "timeout": 600.0}
    with Engine(model="judge:openai:m", judge=asked) as engine:
        stream = engine.run([{"id": "a", "prompt": "q", "images": [str(tmp_path / "a.png")]}], tmp_path / "out")
        waiter = threading.Thread(target=lambda: _when_asked(endpoint, engine))
        waiter.start()
        assert list(stream) == []
        waiter.join()
    assert engine.report is not None
    assert engine.report.status == "cancelled"


def _when_asked(endpoint: Endpoint, engine: Engine) -> None:
    with endpoint.lock:
        endpoint.lock.wait_for(lambda: endpoint.requests, 30)
    engine.cancel()


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_goes_into_the_header_and_nowhere_else(
    endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = f"bad key {KEY} " + "x" * 470 + KEY
    endpoint.answer = f"Score: 8 {KEY}"
    endpoint.scripts |= {
        "refused": [(400, {"error": {"message": echo}})],
        "failing": [(500, echo)],
        "garbage": [(200, echo)],
    }
    outcomes = judge(endpoint, tmp_path / "out", "fine", "refused", "failing", "garbage")
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    assert [outcome.state for outcome in outcomes] == ["done", "failed", "failed", "failed"]
    assert texts(outcomes)[0] == "Score: 8 [key]"
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for place in (written, caplog.text.encode(), repr(outcomes).encode()):
        assert KEY.encode() not in place
        assert KEY[:12].encode() not in place
    assert b"[key]" in written


@pytest.mark.parametrize("key", ["two words", "schlüssel", "line\nbreak"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY holds characters that no key has") as caught:
        judge(endpoint, tmp_path / "out", "q")
    assert key not in str(caught.value)
    assert endpoint.requests == []


# --- an endpoint that has gone ----------------------------------------------------------------------------------------


def test_a_finished_evaluation_is_written_up_though_its_endpoint_has_gone(endpoint: Endpoint, tmp_path: Path) -> None:
    Image.effect_noise((64, 48), 50).convert("RGB").save(tmp_path / "a.png")

    def settings(count: int) -> EvalSettings:
        items = [{"id": f"e{n}", "instruction": "make it", "image": "a.png", "category": "c"} for n in range(count)]
        (tmp_path / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
        judge = f"{{kind: openai, model: some/model, base_url: '{gone.url}'}}"
        text = f"bench: {tmp_path}/items.jsonl\nout: {tmp_path}/out\nedit: {{model: fake}}\njudge: {judge}\n"
        (tmp_path / "c.yaml").write_text(f"{text}devices: {{device: cpu}}\n")
        return load_eval_settings(tmp_path / "c.yaml")

    with serving(Endpoint()) as gone:
        assert evaluate(settings(2)).scored == 2
    page = tmp_path / "out" / "report.html"
    page.unlink()
    assert evaluate(settings(2)).scored == 2
    assert page.is_file()
    with pytest.raises(InputError, match="takes no connection"):
        evaluate(settings(2), rejudge="all")
    with pytest.raises(InputError, match="takes no connection"):
        evaluate(settings(3))
    assert len(list((tmp_path / "out" / "edits").glob("*.png"))) == 2
    (tmp_path / "out" / "judgments" / "ledger.sqlite").unlink()
    with pytest.raises(InputError, match="takes no connection"):
        evaluate(settings(2))
