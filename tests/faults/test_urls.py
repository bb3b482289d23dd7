"""Row 10, addresses: fetched only where that is allowed, never from what only this machine can reach, bounded, a picture."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import imagemill
from command import until
from imagemill import intake, public_web
from imagemill.downloads import FOLDER, Downloads
from imagemill.errors import ImagemillError, InputError, TaskFileError
from imagemill.forecast import forecast
from imagemill.public_web import is_public, plain

HOST = "pictures.example"
"""The one name that leads to the test's server; its address, 127.0.0.1, is allowed to these tests alone."""

FAKE = {"model": "fake", "device": "cpu", "size": "16x16"}


def png(colour: str = "red", size: tuple[int, int] = (24, 16)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Server:
    """A server on loopback; `answers` say what each path gets, `seen` what was asked."""

    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    looked_up: list[str] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=lambda: {HOST: ["127.0.0.1"]})
    released: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str, host: str = HOST) -> str:
        return f"http://{host}:{self.port}{path}"

    def resolve(self, host: str, port: int) -> list[str]:
        self.looked_up.append(host)
        return self.names.get(host) or public_web.resolve(host, port)

    def asked(self) -> list[str]:
        return [path for path, _ in self.seen]


def send(status: int, body: bytes = b"", **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def redirect(place: str, status: int = 302) -> Answer:
    return send(status, Location=place)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.seen.append((self.path, dict(self.headers)))
            found.answers.get(self.path, send(404))(self)

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    found = Server(listening.server_address[1], {"/a.png": send(200, png())})
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.released.set()
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a second try as long as a person would."""
    monkeypatch.setattr(public_web, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(public_web, "MAX_WAIT", 0.01)


@pytest.fixture
def fetch(server: Server, tmp_path: Path) -> Iterator[Downloads]:
    """Downloads that take the test's server for a public one."""
    made = Downloads(tmp_path / FOLDER, resolve=server.resolve, is_allowed=lambda address: address == "127.0.0.1")
    yield made
    made.close()


@pytest.fixture
def allowed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for whole runs: no option or setting can say this."""
    own = partial(Downloads, resolve=server.resolve, is_allowed=lambda address: address == "127.0.0.1")
    monkeypatch.setattr(intake, "Downloads", own)


def refused(fetch: Downloads, address: str, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        fetch.image(address)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# --- addresses --------------------------------------------------------------------------------------------------------

NOT_PUBLIC = [
    *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254"),
    *("192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.0.1", "240.0.0.1"),
    *(
        "255.255.255.255",
        "192.0.0.8",
        "192.88.99.1",
        "2001:0:7f00:1::1",
        "3fff::1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12:3456::1",
        "fec0::1",
    ),
    *("ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "2002:7f00:1::", "2002:a00:1::1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "4000::1"),
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_known(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_a_public_address_is_known(address: str) -> None:
    assert is_public(address)


LOCAL = [
    *("127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:127.0.0.1]"),
    *("0.0.0.0", "[::]"),
]
"""Ways to write this machine."""


@pytest.mark.parametrize("host", LOCAL)
def test_this_machine_is_never_asked_whatever_it_is_called(host: str, server: Server, tmp_path: Path) -> None:
    fetch = Downloads(tmp_path / FOLDER)
    try:
        refused(fetch, server.url("/a.png", host))
    finally:
        fetch.close()
    assert server.seen == []
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "fd00::1", "224.0.0.1", "240.0.0.1"])
def test_a_name_that_stands_for_an_address_that_is_not_public_is_refused_before_a_connection(
    address: str, server: Server, tmp_path: Path
) -> None:
    fetch = Downloads(tmp_path / FOLDER, resolve=lambda host, port: ["93.184.216.34", address])
    try:
        refused(fetch, f"http://{HOST}/a.png", f"{HOST}/a.png", address, "no public address")
    finally:
        fetch.close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_an_address_that_is_not_public_is_not_followed(
    status: int, server: Server, fetch: Downloads
) -> None:
    for number, place in enumerate(("http://127.0.0.2/a.png", f"http://[::1]:{server.port}/a.png", "//10.0.0.1/a.png")):
        server.answers[f"/{number}"] = redirect(place, status)
        refused(fetch, server.url(f"/{number}"), "no public address")
    assert server.asked() == ["/0", "/1", "/2"]


def test_a_name_that_changes_its_meaning_is_connected_to_where_it_was_checked(server: Server, tmp_path: Path) -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])
    looks: list[str] = []

    def rebinding(host: str, port: int) -> list[str]:
        looks.append(host)
        return next(answers)

    fetch = Downloads(tmp_path / FOLDER, resolve=rebinding, is_allowed=lambda address: address == "127.0.0.1")
    try:
        assert fetch.image(server.url("/a.png")).size == (24, 16)
        assert looks == [HOST]
        server.answers["/again"] = redirect("/a.png")
        refused(fetch, server.url("/again"), "127.0.0.2", "no public address")
    finally:
        fetch.close()
    assert server.asked() == ["/a.png"]


def test_the_server_hears_the_name_and_nothing_that_is_not_its_business(
    server: Server, fetch: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    server.answers["/first"] = send(200, png("blue"), Set_Cookie="secret=1; Path=/")
    fetch.image(server.url("/first"))
    fetch.image(server.url("/a.png"))
    for _, headers in server.seen:
        assert headers["Host"] == f"{HOST}:{server.port}"
        assert "Cookie" not in headers
        assert "Authorization" not in headers


@pytest.mark.parametrize(
    "place",
    ["file:///etc/passwd", "ftp://pictures.example/a.png", "gopher://x/", "data:image/png;base64,AAAA"],
)
def test_a_redirect_to_another_kind_of_address_is_not_followed(place: str, server: Server, fetch: Downloads) -> None:
    server.answers["/x"] = redirect(place)
    refused(fetch, server.url("/x"), "/x")
    assert server.asked() == ["/x"]


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "https:///a.png",
        "http://[::1",
        "http://a b/",
        "http://x:99999/",
        "http://x:-1/",
        "http://\ud800/",
        "http://a\0b/",
    ],
)
def test_what_is_no_address_is_refused(address: str, fetch: Downloads) -> None:
    refused(fetch, address)


def test_names_and_passwords_are_neither_used_nor_told(server: Server, fetch: Downloads) -> None:
    message = refused(fetch, f"http://me:s3cret@{HOST}:{server.port}/a.png?key=k3y#part", "name or password")
    assert "s3cret" not in message
    assert "k3y" not in message
    assert plain("https://me:s3cret@x.org/a/b.png?key=k3y#part") == "https://x.org/a/b.png"
    assert server.seen == []


# --- what comes back --------------------------------------------------------------------------------------------------


def test_a_picture_is_kept_once_and_not_fetched_again(server: Server, fetch: Downloads, tmp_path: Path) -> None:
    first = fetch.image(server.url("/a.png"))
    assert first.size == (24, 16)
    assert Path(first.path).read_bytes() == png()
    assert Path(first.path).parent == tmp_path / FOLDER
    fetch.image(server.url("/a.png"))
    fetch.close()
    server.answers["/a.png"] = send(200, png("blue"))
    assert fetch.image(server.url("/a.png")) == first
    assert server.asked() == ["/a.png"]


def test_to_plan_nothing_is_written(server: Server, tmp_path: Path) -> None:
    looks = {"resolve": server.resolve, "is_allowed": lambda address: address == "127.0.0.1"}
    fetch = Downloads(tmp_path / FOLDER, keep=False, **looks)
    planned = fetch.image(server.url("/a.png"))
    fetch.close()
    assert list(tmp_path.iterdir()) == []
    kept = Downloads(tmp_path / FOLDER, **looks)
    assert kept.image(server.url("/a.png")) == planned
    kept.close()


def test_redirects_are_followed_a_few_times(server: Server, fetch: Downloads) -> None:
    server.answers |= {f"/{number}": redirect(f"/{number - 1}") for number in range(1, 9)}
    server.answers["/0"] = send(200, png())
    assert fetch.image(server.url(f"/{public_web.REDIRECTS}")).size == (24, 16)
    refused(fetch, server.url(f"/{public_web.REDIRECTS + 1}"), "leads on more than")
    server.answers["/round"] = redirect("/round")
    refused(fetch, server.url("/round"), "leads on more than")


def endless(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(b"\0" * 65536)


def endless_redirect(request: BaseHTTPRequestHandler) -> None:
    request.send_response(302)
    request.send_header("Location", "/a.png")
    request.end_headers()
    while True:
        request.wfile.write(b"\0" * 65536)


BAD: dict[str, tuple[Answer, tuple[str, ...]]] = {
    "page": (send(200, b"<html>not a picture</html>"), ("none that can be read",)),
    "empty": (send(200, b""), ("none that can be read",)),
    "cut": (send(200, png()[:-20]), ("damaged or cut off",)),
    "gone": (send(404), ("404", "check the address")),
    "forbidden": (send(403), ("403",)),
    "long": (send(200, b"", Content_Length=str(2**40)), ("1,099,511,627,776 bytes",)),
    "endless": (endless, ("more than", "bytes")),
    "compressed": (send(200, png(), Content_Encoding="gzip"), ("compressed",)),
    "nowhere": (send(302), ("/nowhere",)),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_is_refused_at_once(
    kind: str, server: Server, fetch: Downloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public_web, "MAX_BYTES", 2**20)
    answer, words = BAD[kind]
    server.answers[f"/{kind}"] = answer
    refused(fetch, server.url(f"/{kind}"), *words)
    assert set(server.asked()) == {f"/{kind}"}
    if kind != "nowhere":
        assert len(server.seen) == 1
    assert not list(tmp_path.rglob("*"))


def test_what_comes_with_a_redirect_is_not_read(server: Server, fetch: Downloads) -> None:
    server.answers["/x"] = endless_redirect
    assert fetch.image(server.url("/x")).size == (24, 16)


def test_a_bomb_from_the_net_is_refused_by_its_header(server: Server, fetch: Downloads) -> None:
    out = io.BytesIO()
    Image.new("1", (11_000, 11_000)).save(out, "PNG")
    server.answers["/bomb"] = send(200, out.getvalue())
    refused(fetch, server.url("/bomb"), "giant", "11000x11000")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(status: int, server: Server, fetch: Downloads) -> None:
    def flaky(request: BaseHTTPRequestHandler) -> None:
        (send(status) if len(server.seen) < public_web.TRIES else send(200, png()))(request)

    server.answers["/x"] = flaky
    assert fetch.image(server.url("/x")).size == (24, 16)
    assert len(server.seen) == public_web.TRIES


def test_what_does_not_pass_is_given_up_after_a_few_tries(server: Server, fetch: Downloads) -> None:
    server.answers["/x"] = send(500)
    refused(fetch, server.url("/x"), "500", "later")
    assert len(server.seen) == public_web.TRIES


def test_an_answer_that_is_cut_off_is_tried_again(server: Server, fetch: Downloads) -> None:
    def cut(request: BaseHTTPRequestHandler) -> None:
        whole = len(server.seen) > 1
        send(200, png() if whole else png()[:20], Content_Length=str(len(png())))(request)
        request.close_connection = True

    server.answers["/x"] = cut
    assert fetch.image(server.url("/x")).size == (24, 16)
    assert len(server.seen) == 2


def test_a_server_that_nobody_hears_is_told_by_its_name(fetch: Downloads, server: Server) -> None:
    server.names["gone.example"] = ["127.0.0.1"]
    refused(fetch, "http://gone.example:1/a.png", "gone.example", "cannot be fetched")
    refused(fetch, "http://no-such-name.invalid/a.png", "no-such-name.invalid")


def test_a_silent_and_a_dripping_server_are_given_up(
    server: Server, fetch: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(request: BaseHTTPRequestHandler) -> None:
        server.released.wait()

    def dripping(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        while not server.released.wait(0.01):
            request.wfile.write(b"\0")

    def dripping_header(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not server.released.wait(0.01):
            request.wfile.write(b"X: y\r\n")

    monkeypatch.setattr(public_web, "SILENCE", 0.2)
    monkeypatch.setattr(public_web, "WHOLE", 0.4)
    server.answers |= {"/silent": silent, "/dripping": dripping, "/header": dripping_header}
    refused(fetch, server.url("/silent"), "slow too long")
    refused(fetch, server.url("/dripping"), "slow too long")
    refused(fetch, server.url("/header"))


def test_closing_ends_what_is_under_way(server: Server, fetch: Downloads) -> None:
    def silent(request: BaseHTTPRequestHandler) -> None:
        server.released.wait()

    server.answers["/x"] = silent
    fetch.ahead([server.url("/x")])
    until(lambda: server.seen)
    fetch.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("imagemill-download")]


def test_a_cache_that_cannot_be_written_is_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    fetch = Downloads(tmp_path / FOLDER, resolve=server.resolve, is_allowed=lambda _: True)
    try:
        with pytest.raises(ImagemillError, match="cannot take a picture"):
            fetch.image(server.url("/a.png"))
    finally:
        fetch.close()


def test_what_a_dead_driver_left_half_written_is_removed(server: Server, fetch: Downloads, tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "abc-1234.part").write_bytes(b"half")
    kept = fetch.image(server.url("/a.png"))
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [Path(kept.path).name]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_without_the_option_no_name_is_looked_up(server: Server, allowed: None, tmp_path: Path) -> None:
    for address in (server.url("/a.png"), server.url("/a.png").upper().replace("/A.PNG", "/a.png")):
        with pytest.raises(TaskFileError, match=r"images\[0\]: .* is a URL.*--allow-urls"):
            imagemill.run([{"prompt": "a", "images": address}], tmp_path / "out", **FAKE)
    assert (server.looked_up, server.seen) == ([], [])


def test_the_command_refuses_an_address_without_the_option_and_this_machine_with_it(place: Any, server: Server) -> None:
    place.tasks([{"prompt": "a", "images": [server.url("/a.png", "127.0.0.1")]}])
    place.write("allowed.yaml", "allow_urls: true\n")
    for options, word in (
        ((), "--allow-urls"),
        (("--allow-urls",), "no public address"),
        (("--config", "allowed.yaml"), "no public address"),
        (("--allow-urls", "--dry-run"), "no public address"),
    ):
        ended = place.fake("tasks.jsonl", "out", *options)
        assert ended.code == 2, ended.text
        assert word in ended.err
        assert "Traceback" not in ended.err
    assert server.seen == []


def test_lora_files_are_never_fetched(server: Server, allowed: None, tmp_path: Path) -> None:
    task = {"prompt": "a", "loras": [server.url("/a.png")]}
    with pytest.raises(TaskFileError, match="URL"):
        imagemill.run([task], tmp_path / "out", allow_urls=True, **FAKE)
    assert server.seen == []


def test_a_run_edits_what_it_has_fetched_and_goes_on_without_the_network(
    server: Server, allowed: None, tmp_path: Path
) -> None:
    server.answers["/b.png"] = send(200, png("blue"))
    tasks = [
        {"prompt": str(number), "images": [server.url(path)]}
        for number, path in enumerate(["/a.png", "/b.png", "/a.png"])
    ]
    out = tmp_path / "out"
    report = imagemill.run(tasks, out, allow_urls=True, **FAKE)
    assert (report.done, report.exit_code) == (3, 0)
    assert sorted(server.asked()) == ["/a.png", "/b.png"]
    server.answers.clear()
    (out / "000002.png").unlink()
    again = imagemill.run(tasks, out, allow_urls=True, **FAKE)
    assert (again.done, again.resumed) == (3, 2)
    assert len(server.seen) == 2


def test_a_picture_that_does_not_come_is_its_rows_problem(server: Server, allowed: None, tmp_path: Path) -> None:
    tasks = [{"prompt": "a", "images": [server.url(path)]} for path in ("/a.png", "/gone.png", "/a.png")]
    with pytest.raises(TaskFileError, match=r"task 2: images\[0\]: .*/gone.png is answered with 404"):
        imagemill.run(tasks, tmp_path / "out", allow_urls=True, **FAKE)
    options = imagemill.RunOptions(skip_bad=True)
    report = imagemill.run(tasks, tmp_path / "out", options=options, allow_urls=True, **FAKE)
    assert report.done == 2
    assert "404" in report.skipped[0][1]


def test_a_limit_fetches_no_more_than_its_rows(server: Server, allowed: None, tmp_path: Path) -> None:
    server.answers |= {f"/{number}": send(200, png()) for number in range(9)}
    tasks = [{"prompt": "a", "images": [server.url(f"/{number}")]} for number in range(9)]
    report = imagemill.run(tasks, tmp_path / "out", options=imagemill.RunOptions(limit=3), allow_urls=True, **FAKE)
    assert report.done == 3
    assert sorted(server.asked()) == ["/0", "/1", "/2"]


def test_a_plan_fetches_and_keeps_nothing(server: Server, allowed: None, tmp_path: Path) -> None:
    from imagemill.config import Settings, merge

    settings = merge(Settings(), {"model": "fake", "devices.device": "cpu", "size": "16x16", "allow_urls": True})
    (tmp_path / "tasks.jsonl").write_text(f'{{"prompt": "a", "images": ["{server.url("/a.png")}"]}}\n')
    found = forecast(str(tmp_path / "tasks.jsonl"), tmp_path / "out", settings, imagemill.RunOptions())
    assert found.to_do == 1
    assert found.unreadable == ()
    assert server.asked() == ["/a.png"]
    assert not (tmp_path / "out").exists()


def test_an_evaluation_fetches_the_pictures_of_its_benchmark_only_if_that_is_allowed(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from imagemill.scoring import evaluation
    from imagemill.scoring.settings import override

    own = partial(Downloads, resolve=server.resolve, is_allowed=lambda address: address == "127.0.0.1")
    monkeypatch.setattr(evaluation, "Downloads", own)
    item = {"id": "a", "image": server.url("/a.png"), "instruction": "make it blue", "category": "colour"}
    (tmp_path / "bench.jsonl").write_text(json.dumps(item) + "\n")
    given = {
        "bench": str(tmp_path / "bench.jsonl"),
        "edit_model": "fake",
        "judge": "fake",
        "out": str(tmp_path / "out"),
    }
    with pytest.raises(InputError, match=r"image: .* is a URL.*--allow-urls"):
        evaluation.items_of(override(**given), tmp_path / "cache")
    assert server.seen == []
    (found,) = evaluation.items_of(override(**given, allow_urls=True), tmp_path / "cache")
    assert Path(found.image).read_bytes() == png()
    server.answers.clear()
    with pytest.raises(InputError, match=r"bench.jsonl.*image: .*404"):
        evaluation.items_of(override(**given, allow_urls=True), tmp_path / "another")
