"""GET requests to the Hub's storage whose bodies go straight from the socket into the reader's buffer.

huggingface_hub's client returns a body in small Python objects. For gigabytes that is most of the work, while the standard
library's client copies each byte once. It is used for ranges of addresses that the Hub returned, which need no token. If a proxy
is set it is not used. Errors are raised as by the usual client."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from peru_cli.checkpoints.hub.session import Session

_PER_ORIGIN = 16  # idle connections kept
_Origin = tuple[str, str, int | None]

_idle: dict[_Origin, list[http.client.HTTPConnection]] = {}
_lock = threading.Lock()


def _break_off(connection: http.client.HTTPConnection) -> None:
    """Abort the request in progress. For signal handlers: takes no lock."""
    if connection.sock is not None:
        with suppress(OSError):
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)  # TLS's own shutdown would talk to the server


@lru_cache
def needs_proxy(scheme: str, host: str) -> bool:
    """Whether a proxy is set for a host."""
    proxies = getproxies()
    return bool((proxies.get(scheme) or proxies.get("all")) and not proxy_bypass(host))


class Answer:
    """A response: its status, its headers, and its body as a stream."""

    def __init__(self, url: str, response: http.client.HTTPResponse) -> None:
        self._url, self._response = url, response
        self.status_code, self.headers = response.status, response.headers

    def read_into(self, buffer: memoryview) -> int:
        """Fill the buffer. Returns fewer bytes if the body ends first."""
        return self._response.readinto(buffer)

    def ended(self) -> bool:
        """Whether the body has ended. Reads a byte if it has not."""
        return self._response.isclosed() or not self._response.read(1)

    def as_usual(self) -> httpx.Response:
        """The response as an object of huggingface_hub's client, with the beginning of its body."""
        content = self._response.read(1 << 16)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("transfer-encoding", "content-length")}
        return httpx.Response(self.status_code, headers=headers, content=content, request=httpx.Request("GET", self._url))


@contextmanager
def get(url: str, headers: Mapping[str, str], timeout: float, session: Session) -> Iterator[Answer]:
    """Request an address. `timeout` is in seconds without a byte. If the body was read to its end, the connection is kept for
    the next request.

    Raises httpx.TransportError, as huggingface_hub's client does."""
    parts = urlsplit(url)
    origin = (parts.scheme, parts.hostname or "", parts.port)
    target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe="%/?:@!$&'()*+,;=-._~[]")
    connection, kept = _idle_one(origin), False
    try:
        try:
            response = None
            if connection is not None:
                _make_busy(connection, session)
                response = _ask(connection, target, headers, timeout)
            if connection is None or response is None:  # the server may have closed an idle connection
                if connection is not None:
                    session.waiting.pop(connection, None)
                connection = _new(origin, timeout)
                connection.connect()
                _make_busy(connection, session)
                connection.request("GET", target, headers=dict(headers))
                response = connection.getresponse()
            yield Answer(url, response)
        except TimeoutError as error:
            raise httpx.ReadTimeout(str(error)) from error
        except (http.client.HTTPException, OSError) as error:
            raise (httpx.ConnectError if connection is None or connection.sock is None else httpx.ReadError)(str(error)) from error
        if response.isclosed() and not response.will_close:
            with _lock:
                if kept := len(idle := _idle.setdefault(origin, [])) < _PER_ORIGIN:
                    idle.append(connection)
    finally:
        if connection is not None:
            session.waiting.pop(connection, None)
            if not kept:
                connection.close()


def _make_busy(connection: http.client.HTTPConnection, session: Session) -> None:
    session.waiting[connection] = partial(_break_off, connection)
    if session.interrupted:  # checked after adding: either the interrupt sees the connection, or this check sees the interrupt
        raise ConnectionAbortedError("interrupted")


def _idle_one(origin: _Origin) -> http.client.HTTPConnection | None:
    with _lock:
        return _idle[origin].pop() if _idle.get(origin) else None


def _ask(
    connection: http.client.HTTPConnection, target: str, headers: Mapping[str, str], timeout: float
) -> http.client.HTTPResponse | None:
    """Send a request over an idle connection. None if the server has closed it."""
    try:
        connection.sock.settimeout(timeout)
        connection.request("GET", target, headers=dict(headers))
        return connection.getresponse()
    except (http.client.RemoteDisconnected, ConnectionError, ssl.SSLEOFError):
        connection.close()
        return None


def _new(origin: _Origin, timeout: float) -> http.client.HTTPConnection:
    scheme, host, port = origin
    if scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=_trusted())
    return http.client.HTTPConnection(host, port, timeout=timeout)


@lru_cache
def _trusted() -> ssl.SSLContext:
    """The certificates that huggingface_hub's client trusts."""
    context: ssl.SSLContext = httpx.create_ssl_context()
    return context
