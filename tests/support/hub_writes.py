"""The Hub's API for publishing with the real client: repos, branches, uploads, commits; on a loopback port.

Every request is logged. The server checks what the Hub checks: tokens, rights, cards, sizes and digests of uploads, the parent
commit. Uploads go to another origin (`localhost`), which must never see the token."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "SecretTokenOfTheTests"
CUT = -1  # instead of a status: the connection breaks
READ_TOKEN = "hf_" + "ThisOneMayOnlyRead"
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass
class Repo:
    """A repo's history: files of each commit, the branches, and whether it is private."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str, files: dict[str, bytes], title: str) -> str:
        """Add a commit on a branch."""
        parent = self.refs.get(revision)
        text = json.dumps([parent, title, len(self.commits), sorted((n, hashlib.sha1(c).hexdigest()) for n, c in files.items())])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.titles[oid], self.parents[oid], self.refs[revision] = files, title, parent, oid
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Files of a branch or commit, without .gitattributes."""
        files = self.commits[self.refs.get(revision, revision)]
        return {name: content for name, content in files.items() if name != ".gitattributes"}


class HubServer(ThreadingHTTPServer):
    """`repos` is the Hub's content, `log` the requests: method, path, whether the token was sent, host.

    `before` is called with method and path before each answer: it may wait, kill, or return a status to fail with."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.log: list[tuple[str, str, bool, str]] = []
        self.before: Callable[[str, str], int | None] = lambda method, path: None
        self.readers: set[str] = set()  # repos that the user may only read
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """The value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, method: str, part: str = "") -> list[str]:
        """Paths of logged requests."""
        return [path for verb, path, _, _ in self.log if verb == method and part in path]

    def make(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repo with a first commit and, if there are files, a second."""
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        if files:
            repo.commit("main", {**repo.commits[repo.refs["main"]], **files}, "add files")
        return repo

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()


def is_lfs(path: str) -> bool:
    """As in the .gitattributes of a new repo."""
    return path.endswith(".safetensors")


def blob_id(content: bytes) -> str:
    """Git's blob id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        host = self.headers.get("Host", "").split(":")[0]
        self.server.log.append((method, path, "Authorization" in self.headers, host))
        status = self.server.before(method, path)
        if status == CUT:
            self.close_connection = True
            self.connection.close()
            return
        if status is not None:
            self._answer({"error": f"asked to fail with {status}"}, status)
            return
        if path.startswith("/store/") and method == "PUT":
            self._store(path.removeprefix("/store/"), body)
            return
        if (token := self.headers.get("Authorization", "").removeprefix("Bearer ")) not in ("", TOKEN, READ_TOKEN):
            self._answer({"error": "Invalid credentials in Authorization header"}, 401, "", "Invalid credentials in Authorization header")
            return
        self.token = token
        with self.server.lock:
            self._route(method, path, body)

    def _route(self, method: str, path: str, body: bytes) -> None:
        for verb, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and (verb == method or (verb == "GET" and method == "HEAD")):
                answer(self, *match.groups(), **({"body": body} if method == "POST" else {}))
                return
        self._answer({"error": f"no such address: {method} {path}"}, 404)

    def _answer(self, value: Any, status: int = 200, code: str = "", message: str = "") -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if isinstance(value, bytes) else "application/json")
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer({"error": "digest"}, 400)
            return
        self.server.stored[oid] = body
        self._answer(b"")

    # -- reading ----------------------------------------------------------------------------------

    def _repo(self, name: str, revision: str = "main") -> tuple[Repo, str] | None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.token):
            self._answer({"error": "Repository not found"}, 404 if self.token else 401, "RepoNotFound")
            return None
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._answer({"error": "Revision not found"}, 404, "RevisionNotFound")
            return None
        return repo, commit

    def whoami(self) -> None:
        if not self.token:
            self._answer({"error": "Unauthorized"}, 401)
            return
        role = "read" if self.token == READ_TOKEN else "write"
        self._answer({"type": "user", "name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": role}}})

    def model(self, name: str, revision: str | None = None) -> None:
        if found := self._repo(name, revision or "main"):
            repo, commit = found
            files = []
            for path, content in repo.commits[commit].items():
                entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": blob_id(content)}
                if is_lfs(path):
                    entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                files.append(entry)
            self._answer({"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": files, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        if found := self._repo(name, revision):
            repo, commit = found
            entries = []
            for path, content in sorted(repo.commits[commit].items()):
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
                if is_lfs(path):
                    entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                entries.append(entry)
            self._answer(entries)

    def history(self, name: str, revision: str) -> None:
        if found := self._repo(name, revision):
            repo, at = found
            entries = []
            while at is not None:
                about = {"id": at, "title": repo.titles[at], "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": [{"user": "me"}]}
                entries.append(about)
                at = repo.parents[at]
            self._answer(entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        if found := self._repo(name, revision):
            repo, commit = found
            content = repo.commits[commit].get(path)
            if content is None:
                self._answer({"error": "Entry not found"}, 404, "EntryNotFound")
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest() if is_lfs(path) else blob_id(content)}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    # -- writing ----------------------------------------------------------------------------------

    def _may_write(self, name: str) -> bool:
        if not self.token:
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.token == READ_TOKEN or name.split("/")[0] not in ("me", "team") or name in self.server.readers:
            self._answer({"error": "You don't have the rights to write"}, 403, "", "You do not have the rights to write")
        else:
            return True
        return False

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self._may_write(name):
            return
        if name in self.server.repos:
            self._answer({"error": "You already created this model repo", "url": f"{self.server.endpoint}/{name}"}, 409)
            return
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.server.make(name, {}, private)
        self._answer({"url": f"{self.server.endpoint}/{name}", "name": name, "id": name})

    def branch(self, name: str, branch: str, body: bytes) -> None:
        if self._may_write(name) and (found := self._repo(name, json.loads(body).get("startingPoint", "main"))):
            repo, commit = found
            if branch in repo.refs:
                self._answer({"error": "Reference already exists"}, 409)
                return
            repo.refs[branch] = commit
            self._answer({})

    def validate(self, body: bytes) -> None:
        """Checks the front matter as the Hub does; a card that fails here cannot be committed."""
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?\n)---\n", content, re.DOTALL)
        errors = []
        try:
            about = yaml.safe_load(match.group(1)) if match else {}
        except yaml.YAMLError as error:
            about, errors = {}, [{"message": str(error)}]
        bases = about.get("base_model", [])
        for base in [bases] if isinstance(bases, str) else bases or []:
            if not _NAME.fullmatch(base):
                errors.append({"message": f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'})
        if about.get("base_model_relation", "adapter") not in RELATIONS:
            errors.append({"message": '"base_model_relation" is not one of them'})
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        if self._may_write(name) and (found := self._repo(name, revision)):
            repo, commit = found
            files = []
            for file in json.loads(body)["files"]:
                old = repo.commits[commit].get(file["path"])
                oid = None if old is None else hashlib.sha256(old).hexdigest() if is_lfs(file["path"]) else blob_id(old)
                mode = "lfs" if is_lfs(file["path"]) else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._answer({"files": files})

    def batch(self, name: str, body: bytes) -> None:
        if not self._may_write(name):
            return
        objects = []
        for item in json.loads(body)["objects"]:
            entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.stored:
                entry["actions"] = {
                    "upload": {"href": f"http://localhost:{self.server.server_port}/store/{item['oid']}"},
                    "verify": {"href": f"{self.server.endpoint}/api/verify"},
                }
            objects.append(entry)
        self._answer({"transfer": "basic", "objects": objects})

    def verify(self, body: bytes) -> None:
        wanted = json.loads(body)
        good = len(self.server.stored.get(wanted["oid"], b"")) == wanted["size"]
        self._answer({}, 200 if good else 404)

    def commit(self, name: str, revision: str, body: bytes) -> None:
        if not (self._may_write(name) and (found := self._repo(name, revision))):
            return
        repo, head = found
        lines = [json.loads(line) for line in body.splitlines()]
        about = next(line["value"] for line in lines if line["key"] == "header")
        if about.get("parentCommit") not in (None, head):
            self._answer({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        files = dict(repo.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.stored:
                    self._answer({"error": "an LFS pointer to nothing"}, 400)
                    return
                files[value["path"]] = self.server.stored[value["oid"]]
        oid = repo.commit(revision, files, about["summary"])
        self._answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}", "hookOutput": ""})


_MODEL = r"/api/models/([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("GET", _MODEL, _Handler.model),
    ("GET", _MODEL + "/revision/(.+)", _Handler.model),
    ("GET", _MODEL + "/tree/(.+)", _Handler.tree),
    ("GET", _MODEL + "/commits/(.+)", _Handler.history),
    ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", _MODEL + "/branch/(.+)", _Handler.branch),
    ("POST", _MODEL + "/preupload/(.+)", _Handler.preupload),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", "/api/verify", _Handler.verify),
    ("POST", _MODEL + "/commit/(.+)", _Handler.commit),
]
