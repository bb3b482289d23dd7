"""The public web, and nothing else: GET of an address, bounded in bytes and seconds.

Addresses in task files come from anywhere, so they must not reach what only this machine can. Every address that a name
stands for is checked, at each redirect anew, and the connection goes to the checked address itself, so that a name that
is looked up twice cannot mean something else the second time; TLS and `Host` keep the name. No proxy is used, since it
would look the name up for itself.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from imagemill.errors import InputError

if TYPE_CHECKING:
    import httpx2
    from httpcore2 import NetworkBackend, NetworkStream

MAX_BYTES = 64 * 2**20
"""The longest content that is taken."""

MAX_ADDRESS = 4096
"""Characters of an address."""

REDIRECTS = 5
TRIES = 3
FIRST_WAIT, MAX_WAIT = 0.5, 8.0
"""Seconds before the second try, doubled at each further one; and the most."""

CONNECT, SILENCE, WHOLE = 10.0, 20.0, 120.0
"""Seconds for a connection, without a byte, and for one answer from the connection to its last byte."""

REDIRECT = (301, 302, 303, 307, 308)
PASSING = (408, 425, 429)
HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "imagemill"}

NAT64 = ipaddress.ip_network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""What IPv6 has given out (RFC 4291, section 2.4); all else is link-local, unique local, multicast or reserved."""

SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20")))
"""Special-purpose networks (IANA's registries) of which older versions of Python take some for global."""

Resolve = Callable[[str, int], list[str]]
IsAllowed = Callable[[str], bool]


class Passing(Exception):
    """A failure of the network or the server that another try may not meet."""


class Refused(Exception):
    """What no other try would change. The message goes on after the address."""


def resolve(host: str, port: int) -> list[str]:
    """Every address that the system knows for a name, each once. Raises `Passing`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Passing(f"the name {host!r} is not known ({getattr(error, 'strerror', None) or error})") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """Whether the address is one of the public internet: not private, loopback, link-local, multicast or reserved, also not
    behind an IPv6 address that stands for an IPv4 one."""
    found = ipaddress.ip_address(address)
    if any(found in network for network in SPECIAL):
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return found.is_global and not found.is_multicast and not found.is_reserved
    inner = found.ipv4_mapped or found.sixtofour
    if found in NAT64:
        inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    if inner is not None:
        return is_public(str(inner))
    return found.is_global and found in GLOBAL_UNICAST


def plain(address: str) -> str:
    """The address for messages: without its query, which may hold a key, and without name and password."""
    scheme, _, rest = address.partition("?")[0].partition("#")[0].partition("://")
    host, slash, path = rest.partition("/")
    short = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    short = "".join(mark if mark.isprintable() else "?" for mark in short)
    return short if len(short) <= 200 else short[:197] + "..."


class PublicWeb:
    """Fetches from public addresses. `get` may be called from several threads.

    `resolve` and `is_allowed` are the look at names and addresses; only tests give others.
    """

    def __init__(self, resolve: Resolve = resolve, is_allowed: IsAllowed = is_public) -> None:
        self._stopped = threading.Event()
        self._streams: set[NetworkStream] = set()
        self._transport = _transport(_backend(resolve, is_allowed, self._streams, self._stopped))

    def close(self) -> None:
        """Cut every connection; whoever waits for one ends."""
        self._stopped.set()
        for stream in tuple(self._streams):
            stream.close()
        self._transport.close()

    def get(self, address: str) -> bytes:
        """What lies at the address. Raises `InputError` in one line that names the address without its query."""
        import tenacity

        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Passing),
            stop=tenacity.stop_any(tenacity.stop_after_attempt(TRIES), tenacity.stop_when_event_set(self._stopped)),
            wait=tenacity.wait_exponential(FIRST_WAIT, MAX_WAIT),
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )
        try:
            data: bytes = tries(self._follow, address)
        except Refused as error:
            raise InputError(f"{plain(address)} {error}") from error
        except Passing as error:
            raise InputError(f"{plain(address)} cannot be fetched: {error}; run the command again later") from error
        return data

    def _follow(self, address: str) -> bytes:
        """The content at the end of the redirects. They are followed here: the client would read what comes with each."""
        import httpcore2
        import httpx2

        # One for each picture, so that no cookie outlives it.
        client = httpx2.Client(
            transport=self._transport,
            timeout=httpx2.Timeout(SILENCE, connect=CONNECT, pool=None),
            trust_env=False,
            headers=HEADERS,
        )
        try:
            url = _checked(address)
            for _ in range(REDIRECTS + 1):
                response = client.send(client.build_request("GET", url), stream=True)
                try:
                    if response.status_code not in REDIRECT:
                        return _body(response)
                    location = response.headers.get("location", "")
                finally:
                    response.close()
                url = _checked(str(url.join(location)))
        except (httpx2.InvalidURL, ValueError) as error:
            raise Refused(f"is no address, or leads to none ({error}); check it") from error
        except (httpx2.TransportError, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise Passing(" ".join(f"{type(error).__name__} {error}".split())) from error
        except httpcore2.TimeoutException as error:
            raise Passing(f"the server was silent or slow too long ({type(error).__name__})") from error
        raise Refused(f"leads on more than {REDIRECTS} times; check it")


def _checked(address: str) -> httpx2.URL:
    """The address, if it is one of the web. Raises `Refused`, and `ValueError` or `InvalidURL` for what is no address."""
    import httpx2

    if len(address) > MAX_ADDRESS:
        raise Refused(f"has, or leads to, {len(address):,} characters; an address has at most {MAX_ADDRESS:,}")
    url = httpx2.URL(address)
    if url.scheme not in ("http", "https") or not url.host:
        raise Refused(
            f"is, or leads to, no address of http or https ({plain(str(url))}); download it and name the file"
        )
    if url.userinfo:
        raise Refused("holds a name or password, which is not used; download it and name the file")
    return url


def _body(response: httpx2.Response) -> bytes:
    """The content of an answer, no more of it than the limit. Raises `Refused` or `Passing`."""
    status = response.status_code
    if status in PASSING or status >= 500:
        raise Passing(f"the server answers {status}")
    if status != 200:
        raise Refused(f"is answered with {status}; check the address")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused("comes compressed though that was not asked for; download it and name the file")
    length = response.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > MAX_BYTES:
        raise Refused(f"has {int(length):,} bytes; at most {MAX_BYTES:,} are fetched")
    content = bytearray()
    for part in response.iter_raw():
        content += part
        if len(content) > MAX_BYTES:
            raise Refused(f"has more than {MAX_BYTES:,} bytes, which are the most that is fetched")
    return bytes(content)


# --- connections ------------------------------------------------------------------------------------------------------


def _backend(
    resolve: Resolve, is_allowed: IsAllowed, streams: set[NetworkStream], stopped: threading.Event
) -> NetworkBackend:
    """Where connections are made: only to addresses that were looked at, each with a time to end."""
    import httpcore2

    class Stream(httpcore2.NetworkStream):
        """A connection that ends at its time, however it drips. It stands among `streams` while it is open."""

        def __init__(self, inner: NetworkStream, until: float) -> None:
            self._inner = inner
            self._until = until
            streams.add(self)

        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            return self._inner.read(max_bytes, self._left(timeout))

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            self._inner.write(buffer, self._left(timeout))

        def close(self) -> None:
            streams.discard(self)
            with suppress(OSError):
                # Wakes whoever waits for a byte; closing alone does not.
                self._inner.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
            self._inner.close()

        def start_tls(
            self, ssl_context: Any, server_hostname: Any = None, timeout: float | None = None
        ) -> NetworkStream:
            streams.discard(self)
            return Stream(self._inner.start_tls(ssl_context, server_hostname, self._left(timeout)), self._until)

        def get_extra_info(self, info: str) -> Any:
            return self._inner.get_extra_info(info)

        def _left(self, timeout: float | None) -> float:
            left = self._until - time.monotonic()
            if stopped.is_set():
                raise httpcore2.ReadError("stopped")
            if left <= 0:
                raise httpcore2.ReadTimeout(f"not whole after {WHOLE:g} s")
            return left if timeout is None else min(timeout, left)

    class Backend(httpcore2.NetworkBackend):
        """Looks each name up once and connects to what was found and allowed."""

        def __init__(self) -> None:
            self._tcp = httpcore2.SyncBackend()

        def connect_tcp(
            self, host: str, port: int, timeout: float | None = None, *rest: Any, **more: Any
        ) -> NetworkStream:
            addresses = resolve(host, port)
            for address in addresses:
                if not is_allowed(address):
                    raise Refused(f"leads to {address}, which is no public address; download it and name the file")
            fault: Exception = Passing(f"the name {host!r} has no address")
            for address in addresses:
                try:
                    inner = self._tcp.connect_tcp(address, port, timeout, *rest, **more)
                except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                    fault = error
                else:
                    return Stream(inner, time.monotonic() + WHOLE)
            raise fault

    return Backend()


def _transport(backend: NetworkBackend) -> httpx2.BaseTransport:
    """httpx's own transport has no place for a backend, so this one stands in for it."""
    import httpcore2
    import httpx2

    class Content(httpx2.SyncByteStream):
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __iter__(self) -> Iterator[bytes]:
            yield from self._inner

        def close(self) -> None:
            self._inner.close()

    class Transport(httpx2.BaseTransport):
        def __init__(self) -> None:
            # A connection serves one request: it has one time to end.
            self._pool = httpcore2.ConnectionPool(
                ssl_context=httpx2.create_ssl_context(),
                max_connections=None,
                max_keepalive_connections=0,
                network_backend=backend,
            )

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            url = request.url
            asked = httpcore2.Request(
                method=request.method,
                url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
            answer = self._pool.handle_request(asked)
            return httpx2.Response(answer.status, headers=answer.headers, stream=Content(answer.stream))

        def close(self) -> None:
            self._pool.close()

    return Transport()
