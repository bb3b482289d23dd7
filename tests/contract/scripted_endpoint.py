"""An OpenAI-compatible endpoint on loopback whose every reply is scripted: a real HTTP server, real sockets."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Endpoint:
    """What the server does and saw. `scripts` maps a prompt to the replies it gets in turn; the last one goes on.

    A reply is a status with its body, or "ok", "silent" (until the test ends), "cut" (in the middle), "hang up" (before
    a byte), "garbage" (no JSON).
    """

    scripts: dict[str, list[Any]] = field(default_factory=dict)
    answer: str = '{"score": 8}'
    headers: dict[str, str] = field(default_factory=dict)
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    meet: int = 0
    lock: threading.Condition = field(default_factory=threading.Condition)
    over: threading.Event = field(default_factory=threading.Event)

    def prompts(self) -> list[str]:
        """The user text of every request, in order of arrival."""
        return [text_of(request) for request in self.requests]

    def next_reply(self, request: dict[str, Any]) -> Any:
        with self.lock:
            self.requests.append(request)
            replies = self.scripts.get(text_of(request), ["ok"])
            return replies.pop(0) if len(replies) > 1 else replies[0]

    def enter(self) -> None:
        """Count the request; where `meet` is set, wait until that many are here together."""
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self.lock.notify_all()
            if self.meet:
                self.lock.wait_for(lambda: self.most_at_once >= self.meet or self.over.is_set(), 30)

    def leave(self) -> None:
        with self.lock:
            self.at_once -= 1


def text_of(request: dict[str, Any]) -> str:
    (text,) = [part["text"] for part in request["messages"][-1]["content"] if part["type"] == "text"]
    return str(text)


def pictures_of(request: dict[str, Any]) -> list[bytes]:
    """The bytes of every picture of a request; each must be a PNG in a data URL."""
    urls = [part["image_url"]["url"] for part in request["messages"][-1]["content"] if part["type"] == "image_url"]
    found = [base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True) for url in urls]
    assert all(one.startswith(PNG) for one in found)
    return found


def completion(text: Any, tokens: int = 7) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {"completion_tokens": tokens}}


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            endpoint.keys.append(self.headers["Authorization"])
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = endpoint.next_reply(request)
            endpoint.enter()
            try:
                self.reply(reply)
            finally:
                endpoint.leave()

        def reply(self, reply: Any) -> None:
            match reply:
                case "ok":
                    self.send(200, json.dumps(completion(endpoint.answer)))
                case "garbage":
                    self.send(200, "<html>busy</html>")
                case "silent":
                    endpoint.over.wait(30)
                    self.close_connection = True
                case "hang up":
                    self.close_connection = True
                case "cut":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [{"mess')
                    self.close_connection = True
                case (int() as status, body):
                    self.send(status, body if isinstance(body, str) else json.dumps(body))

        def send(self, status: int, body: str) -> None:
            data = body.encode()
            self.send_response(status)
            for name, value in endpoint.headers.items() if status != 200 else ():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[Endpoint]:
    """The endpoint, reachable at its `url` until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(endpoint))
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
