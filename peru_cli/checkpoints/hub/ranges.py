"""A file on the Hub read by HTTP ranges: any thread, any offset, nothing on disk.

The Hub redirects large files to storage on another origin under a signed address. That address is kept and requested directly,
without the token, until it expires. An interrupted range continues where it stopped. Any answer but the exact range is an error."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import constants, hf_hub_url
from huggingface_hub import errors as hub
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx  # type: ignore[attr-defined]

from peru_cli.checkpoints.header import Header
from peru_cli.checkpoints.hub import connection as hubsocket
from peru_cli.checkpoints.hub.errors import HubError, explain
from peru_cli.checkpoints.hub.names import RemoteFile
from peru_cli.checkpoints.hub.session import Session
from peru_cli.errors import BadFile

TRIES = 6  # in a row without progress
_PROGRESS = 1 << 16  # bytes that count as progress
_STEP = 1 << 18  # bytes that a broken connection loses at most
_TIMEOUT = 30  # seconds without a byte; storage is slower to start than the API
_MAX_REDIRECTS = 5
_EXPIRED = {401, 403, 404, 410}  # storage's answers for an expired signature


class NoRanges(HubError):
    """The server only returns whole files."""

    passes = False


def backoff(attempt: int, response: Any = None) -> float:
    """Seconds to wait before the next try: Retry-After if given (at most ten minutes), otherwise twice as long each time."""
    after = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(after), 600.0) if re.fullmatch(r"\d+(\.\d+)?", after) else min(0.25 * 2.0**attempt, 20.0)


def _pause(seconds: float, session: Session) -> None:
    """Sleep, in any thread at most until an interrupt."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not session.interrupted:
        time.sleep(min(left, 0.2))


class _Again(Exception):
    """An answer worth another try, with the response if there is one."""

    def __init__(self, error: BaseException, response: Any = None) -> None:
        super().__init__(str(error))
        self.error, self.response = error, response


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


class RangeFile:
    """Like RandomAccessFile, over HTTP. `size` comes from the repo's listing; every answer must agree."""

    def __init__(self, file: RemoteFile, session: Session) -> None:
        self._session = session
        self.path, self.size = file, file.size
        self._url = hf_hub_url(file.repo, file.path, revision=file.commit)
        self._storage: str | None = None  # the address that the Hub redirected to, if it is on another origin
        self._etags: dict[tuple[str, str | None, int | None], str] = {}
        self._to_hub = build_hf_headers(library_name="peru", headers={"Accept-Encoding": "identity"})
        self._to_storage = {name: value for name, value in self._to_hub.items() if name.lower() != "authorization"}
        self._lock = threading.Lock()
        self.header: Header | None = None  # set once it has been read

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`. BadFile or HubError if the server does not return these bytes."""
        if offset + len(buffer) > self.size:
            raise BadFile(f"{self.path}: the file ends at byte {self.size}")
        done = attempt = 0
        while done < len(buffer):
            if self._session.interrupted:
                raise KeyboardInterrupt
            before = done
            try:
                for got in self._receive(offset + done, buffer[done:]):
                    done += got
                if done < len(buffer):
                    raise _Again(HubError(f"{self.path}: the server sent fewer bytes than the range has"))
            except (_Again, httpx.TransportError) as error:
                attempt = 0 if done - before >= _PROGRESS else attempt + 1
                if attempt >= TRIES and not self._session.interrupted:
                    cause = error.error if isinstance(error, _Again) else error
                    raise (cause if isinstance(cause, HubError) else explain(cause, str(self.path), self.path.revision)) from error
                _pause(backoff(attempt, getattr(error, "response", None)), self._session)

    def _receive(self, start: int, buffer: memoryview) -> Iterator[int]:
        """Fill a buffer from byte `start`, yielding the number of bytes of each step; fewer in total if the body ends early."""
        url, redirects, stop = self._storage or self._url, 0, start + len(buffer)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT if "HF_HUB_DOWNLOAD_TIMEOUT" in os.environ else _TIMEOUT
        while True:
            foreign = _origin(url) != _origin(constants.ENDPOINT)
            headers = {**(self._to_storage if foreign else self._to_hub), "Range": f"bytes={start}-{stop - 1}"}
            direct = foreign and not hubsocket.needs_proxy(urlsplit(url).scheme, urlsplit(url).hostname or "")
            with (
                hubsocket.get(url, headers, timeout, self._session)
                if direct
                else get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=timeout)
            ) as response:
                if response.status_code in (301, 302, 303, 307, 308) and "Location" in response.headers:
                    self._check_linked(response)
                    url, redirects = urljoin(url, response.headers["Location"]), redirects + 1
                    if redirects > _MAX_REDIRECTS or urlsplit(url).scheme not in ("http", "https"):
                        raise HubError(f"{self.path}: redirected in circles, or to something that is not a web address")
                    continue
                self._check(response, url, start, stop)
                if foreign:
                    self._storage = url
                yield from self._read(response, buffer) if direct else self._copy(response, buffer)
                return

    def _read(self, response: Any, buffer: memoryview) -> Iterator[int]:
        """The body from the socket."""
        done = 0
        while done < len(buffer) and (got := response.read_into(buffer[done : done + _STEP])):
            done += got
            yield got
        if done == len(buffer) and not response.ended():
            raise self._too_much()

    def _copy(self, response: Any, buffer: memoryview) -> Iterator[int]:
        """The body from huggingface_hub's client."""
        done = 0
        for chunk in response.iter_raw():
            if done + len(chunk) > len(buffer):
                raise self._too_much()
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)
            yield len(chunk)

    def _too_much(self) -> BadFile:
        return BadFile(f"{self.path}: the server sent more bytes than the range has")

    def _check_linked(self, response: Any) -> None:
        """Check that the Hub's answer for a file that it redirects agrees with its listing."""
        size, etag = response.headers.get("X-Linked-Size"), (response.headers.get("X-Linked-Etag") or "").strip('W/"')
        digest = self.path.sha256
        if (size is not None and size != str(self.size)) or (digest and len(etag) == len(digest) and etag != digest):
            raise BadFile(f"{self.path}: the Hub redirects to another file than it lists", "run the command again")

    def _check(self, response: Any, url: str, start: int, stop: int) -> None:
        status = response.status_code
        if status in _EXPIRED and _origin(url) != _origin(constants.ENDPOINT):
            with self._lock:
                if self._storage == url:  # otherwise another thread, whose request expired too, has already got a new address
                    self._storage = None
            raise _Again(HubError(f"{self.path}: the storage of {constants.ENDPOINT} refuses access ({status})", "run the command again"))
        if status == 429 or status >= 500 or status == 408:
            raise _Again(self._error(response), response)
        if status >= 400:
            raise explain(self._error(response), str(self.path), self.path.revision)
        if status != 206:
            raise NoRanges(f"{self.path}: the server ignores ranges (status {status})", "leave --stream out to read through the cache")
        whole = (response.headers.get("Content-Range"), response.headers.get("Content-Length", str(stop - start)))
        if whole != (f"bytes {start}-{stop - 1}/{self.size}", str(stop - start)):
            raise _Again(HubError(f"{self.path}: the server returned another range than requested, or one of a file of another size"))
        etag = (response.headers.get("ETag") or "").removeprefix("W/")
        with self._lock:
            if self._etags.setdefault(_origin(url), etag) != etag:
                raise BadFile(f"{self.path}: the file on the server changed between two ranges", "run the command again")

    def _error(self, response: Any) -> BaseException:
        if isinstance(response, hubsocket.Answer):
            response = response.as_usual()
        response.read()
        try:
            hf_raise_for_status(response)
        except hub.HfHubHTTPError as error:
            return error
        return HubError(f"{self.path}: status {response.status_code}")

    def close(self) -> None:
        """Connections belong to the client, which all files share."""
