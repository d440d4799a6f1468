"""A Hub on loopback: answers huggingface_hub's requests from memory, logs every request, and produces faults on demand.

`HubServer` is the origin with the API; LFS files redirect to `cdn`, another origin, as on the real Hub. A fault is a function
that may answer a request in its own way: `server.fault(lambda request: ...)`."""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Commit:
    """Files of a commit; a value is the contents or the path of a file."""

    sha: str
    files: dict[str, bytes | Path]


@dataclass
class Repo:
    """A repo: commits by sha, refs by name, and who may see it."""

    name: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit_of(self, revision: str) -> Commit | None:
        """The commit that a branch, tag or sha names."""
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Request:
    """One request as the server saw it. `sent` counts body bytes of the answer, `range` is (first, last) or None."""

    method: str
    origin: str  # "hub" or "cdn"
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    range: tuple[int, int] | None = None
    body: bytes = b""
    status: int = 0
    sent: int = 0
    at: float = 0.0

    @property
    def token(self) -> str | None:
        """The request's bearer token."""
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


Fault = Callable[["Handler", Request], bool]  # True if it has answered


class HubServer:
    """Start with `with HubServer() as hub:`. `env(home)` is the environment of its clients."""

    def __init__(self, token: str = "hf_secretsecretsecret", tls: ssl.SSLContext | None = None) -> None:
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self._servers = [_Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server, origin in zip(self._servers, ("hub", "cdn"), strict=True):
            server.hub, server.origin = self, origin
            if tls is not None:
                server.socket = tls.wrap_socket(server.socket, server_side=True)
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._servers[0].server_port}"
        self.cdn = f"{scheme}://localhost:{self._servers[1].server_port}"

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """Environment of a client with its own cache."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **more,
        }  # fmt: skip

    def add(self, name: str, files: dict[str, bytes | Path] | Path, revision: str = "main", **options: Any) -> str:
        """Add a commit to a repo, created if necessary, and point a branch at it. Returns the commit's sha."""
        repo = self.repos.setdefault(name, Repo(name))
        for option, value in options.items():
            setattr(repo, option, value)
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path for path in sorted(files.rglob("*")) if path.is_file()}
        sha = hashlib.sha1(f"{name} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[sha] = Commit(sha, dict(files))
        repo.refs[revision] = sha
        return sha

    def fault(self, fault: Fault) -> None:
        """Let a function answer requests, until `faults` is cleared."""
        self.faults.append(fault)

    def clear(self) -> None:
        """Forget the requests so far."""
        with self.lock:
            self.requests = []

    def fetched(self, suffix: str = "", method: str = "GET") -> int:
        """Body bytes sent for files whose path has this end."""
        with self.lock:
            return sum(r.sent for r in self.requests if r.method == method and "/api/" not in r.path and r.path.endswith(suffix))

    def ranges(self, suffix: str = "") -> list[tuple[int, int]]:
        """The ranges that were answered with 206, as (first, last)."""
        with self.lock:
            return [r.range for r in self.requests if r.status == 206 and r.range is not None and r.path.endswith(suffix)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer
    origin: str

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Some tests are about clients that go away."""


class Handler(BaseHTTPRequestHandler):
    """Routes requests; faults build on `answer` and `send_file`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # like storage on the web: otherwise the end of each body waits for an acknowledgement
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are logged as data."""

    def _handle(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        request = Request(
            self.command, self.server.origin, unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()},
            {k.lower(): v for k, v in self.headers.items()}, (int(match[1]), int(match[2])) if match else None, self.rfile.read(length),
            at=time.monotonic(),
        )  # fmt: skip
        self.request_seen = request
        hub = self.server.hub
        with hub.lock:
            hub.requests.append(request)
            faults = list(hub.faults)
        try:
            if not any(fault(self, request) for fault in faults):
                self.route(request)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - names that http.server looks for

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole answer; underscores in header names stand for hyphens."""
        self.request_seen.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.write(body)

    def write(self, body: bytes) -> None:
        """Send body bytes and count them."""
        if self.command != "HEAD":
            self.wfile.write(body)
            self.request_seen.sent += len(body)

    def cut(self) -> None:
        """Close the connection in the middle."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    def refuse(self, status: int, code: str) -> None:
        """An error in the Hub's form."""
        self.answer(status, json.dumps({"error": code}).encode(), X_Error_Code=code, Content_Type="application/json")

    # -- routes -----------------------------------------------------------------------------------------

    def route(self, request: Request) -> None:
        """Find the handler of a path."""
        if request.origin == "cdn":
            self._cdn(request)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", request.path):
            self._info(match[1], match[2] or "main", request)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)", request.path):
            self._resolve(match[1], match[2], request)
        else:
            self.answer(404)

    def repo(self, name: str, request: Request, files: bool) -> Repo | None:
        """The repo. None if the request was refused and answered."""
        hub = self.server.hub
        if (new := hub.renamed.get(name)) is not None:
            self.answer(307, Location=self.path.replace(name, new, 1))
            return None
        repo = hub.repos.get(name)
        known = request.token == hub.token
        if repo is None or (repo.private and not known):
            self.refuse(404 if known else 401, "RepoNotFound")
            return None
        if repo.gated and files and not known:
            self.refuse(403, "GatedRepo")
            return None
        return repo

    def _info(self, name: str, revision: str, request: Request) -> None:
        repo = self.repo(name, request, files=False)
        if repo is None:
            return
        commit = repo.commit_of(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return
        siblings: list[dict[str, Any]] = []
        for path, content in commit.files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(content) if isinstance(content, bytes) else content.stat().st_size}
            entry["blobId"] = hashlib.sha1(path.encode()).hexdigest()
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"sha256": sha256(content), "size": entry["size"], "pointerSize": 134}
            siblings.append(entry)
        info = {"_id": "1", "id": repo.name, "modelId": repo.name, "sha": commit.sha, "private": repo.private, "siblings": siblings}
        self.answer(200, json.dumps({**info, "tags": [], "downloads": 0, "likes": 0}).encode(), Content_Type="application/json")

    def _resolve(self, name: str, rest: str, request: Request) -> None:
        repo = self.repo(name, request, files=True)
        if repo is None:
            return
        revision, _, path = rest.partition("/")
        commit = repo.commit_of(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return
        if path not in commit.files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.sha)
            return
        content = commit.files[path]
        if path.endswith(LFS_SUFFIXES):
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            self.answer(
                302, Location=f"{self.server.hub.cdn}/{name}/{commit.sha}/{path}?signature=abc", X_Repo_Commit=commit.sha,
                X_Linked_Etag=f'"{sha256(content)}"', X_Linked_Size=str(size), ETag='"pointer"',
            )  # fmt: skip
            return
        self.send_file(content, {"ETag": f'"{hashlib.sha1(_bytes(content)).hexdigest()}"', "X-Repo-Commit": commit.sha})

    def _cdn(self, request: Request) -> None:
        org, name, sha, path = request.path.lstrip("/").split("/", 3)
        content = self.server.hub.repos[f"{org}/{name}"].commits[sha].files[path]
        self.send_file(content, {"ETag": f'"{sha256(content)}"'})

    def send_file(self, content: bytes | Path, headers: dict[str, str]) -> None:
        """A file, or the requested range."""
        request = self.request_seen
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        first, last = request.range or (0, size - 1)
        if request.range and first >= size:
            self.answer(416, Content_Range=f"bytes */{size}")
            return
        last = min(last, size - 1)
        request.status = 206 if request.range else 200
        self.send_response(request.status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if request.range:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(content, bytes):
            self.write(content[first : last + 1])
            return
        with content.open("rb") as file:
            self.wfile.flush()
            request.sent += self.connection.sendfile(file, first, last - first + 1)


_DIGESTS: dict[Any, str] = {}


def _bytes(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def sha256(content: bytes | Path) -> str:
    """What the Hub publishes of an LFS file."""
    key = content if isinstance(content, bytes) else (content, content.stat().st_mtime_ns)
    if key not in _DIGESTS:
        _DIGESTS[key] = hashlib.sha256(_bytes(content)).hexdigest()
    return _DIGESTS[key]
