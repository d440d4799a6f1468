"""A model repo on the Hub at one commit, and paths in it that behave like paths on a disk.

A revision is resolved to a commit once, in one request that also lists the files. All later requests use that commit. Files come
through huggingface_hub's shared cache, each on first use, or by ranges that touch no disk (ranges.py)."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, cached_assets_path, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub import errors as hub
from huggingface_hub.utils import disable_progress_bars, httpx  # type: ignore[attr-defined]

from peru_cli.checkpoints.hub.download import LEAST, NoLocks, fetch_blob
from peru_cli.checkpoints.hub.errors import HubError, explain, explained, unreachable
from peru_cli.checkpoints.hub.names import RemoteFile
from peru_cli.checkpoints.hub.ranges import TRIES, NoRanges, RangeFile, backoff
from peru_cli.checkpoints.hub.session import Session
from peru_cli.errors import BadFile

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """The Hub's record of a file: its size in bytes, and its SHA-256 if it is stored with LFS."""

    size: int | None
    sha256: str | None = None


class HubRepo:
    """A repo at one commit. `files` are those with safe names: a listing can contain anything."""

    def __init__(self, name: str, revision: str | None, session: Session) -> None:
        self.name, self.revision, self.session = name, revision, session
        self._ranges: dict[str, RangeFile] = {}
        self._small: dict[str, bytes] = {}
        self.renamed_from: str | None = None
        self.commit, self.files = self._resolve()
        if not sys.stderr.isatty():
            disable_progress_bars()

    def __str__(self) -> str:
        return f"{self.name}@{self.commit[:8]}"

    @property
    def public_name(self) -> str:
        """A name under which anybody can find these bytes."""
        return f"{self.name}@{self.commit}"

    # -- which commit, which files ----------------------------------------------------------------------

    def _resolve(self) -> tuple[str, dict[str, HubFile]]:
        fixed = self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None
        if fixed and (listed := self._remembered(fixed)) is not None:
            return fixed, listed
        shown = f"{self.name}@{self.revision}" if self.revision else self.name
        try:
            info = self._ask()
        except (hub.HfHubHTTPError, hub.OfflineModeIsEnabled, httpx.HTTPError) as error:
            commit = fixed or self._cached_ref()
            listed = (self._remembered(commit) or self._snapshot(commit)) if unreachable(error) and commit else None
            if not commit or not listed:
                raise explain(error, shown, self.revision) from error
            return commit, listed
        except (hub.HFValidationError, ValueError, TypeError, KeyError) as error:
            raise HubError(f"{shown}: {constants.ENDPOINT} does not answer as the Hub does", "check HF_ENDPOINT and proxies") from error
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
            raise HubError(f"{shown}: {constants.ENDPOINT} names no commit", "check HF_ENDPOINT and proxies")
        if info.id and info.id != self.name:
            self.renamed_from, self.name = self.name, info.id
        files = {
            s.rfilename: HubFile(s.size, s.lfs.sha256 if s.lfs is not None else None) for s in info.siblings or () if _is_sane(s.rfilename)
        }
        if not self.session.stream:
            self._remember(info.sha, files)
        return info.sha, files

    def _ask(self) -> Any:
        for attempt in range(TRIES):
            try:
                return HfApi(library_name="peru").model_info(
                    self.name, revision=self.revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
                )
            except (hub.HfHubHTTPError, httpx.TransportError) as error:
                response = getattr(error, "response", None)
                if attempt + 1 == TRIES or (response is not None and response.status_code != 429 and response.status_code < 500):
                    raise
                if response is None and attempt >= 2:  # no connection: report it soon
                    raise
                time.sleep(backoff(attempt, response))
        raise AssertionError("the last try raises")

    @property
    def _folder(self) -> Path:
        """The repo's folder in the shared cache, with the layout that huggingface_hub documents."""
        return Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"

    def _cached_ref(self) -> str | None:
        try:
            text = (self._folder / "refs" / (self.revision or "main")).read_text("ascii").strip()
        except (OSError, ValueError):
            return None
        return text if _COMMIT.fullmatch(text) else None

    def _snapshot(self, commit: str) -> dict[str, HubFile]:
        """Files that other tools left in the cache: possibly not all of the repo's."""
        folder = self._folder / "snapshots" / commit
        return {path.relative_to(folder).as_posix(): HubFile(path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()}

    def _remembered(self, commit: str) -> dict[str, HubFile] | None:
        """The stored listing of a commit: a commit never changes."""
        path = Path(constants.HF_ASSETS_CACHE) / "peru" / self._folder.name / "default" / f"{commit}.json"
        try:
            return {name: HubFile(*entry) for name, entry in json.loads(path.read_text("utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def _remember(self, commit: str, files: dict[str, HubFile]) -> None:
        """Store the listing, and the revision's commit, for use without a connection; best effort, like any cache."""
        try:
            path = Path(cached_assets_path("peru", self._folder.name)) / f"{commit}.json"
            _replace(path, json.dumps({name: [file.size, file.sha256] for name, file in files.items()}))
            if self.revision is None or not _COMMIT.fullmatch(self.revision):
                _replace(self._folder / "refs" / (self.revision or "main"), commit)
        except OSError:
            return

    # -- bytes ------------------------------------------------------------------------------------------

    def cached(self, path: str) -> Path | None:
        """A file that is already in the shared cache."""
        found = try_to_load_from_cache(self.name, path, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def download(self, path: str) -> Path:
        """A file in the shared cache, downloaded if it is not there."""
        listed = self.files.get(path, HubFile(None))
        check = listed.sha256 if self.cached(path) is None and not constants.HF_HUB_OFFLINE else None
        with explained(f"{self}/{path}", self.revision):
            if check is not None and (listed.size or 0) >= LEAST and not (blob := self._folder / "blobs" / check).exists():
                with suppress(NoRanges, NoLocks):  # otherwise huggingface_hub downloads it in one go
                    fetch_blob(self.ranges(HubPath(self, path)), check, blob)
                    check = None
            found = Path(hf_hub_download(self.name, path, revision=self.commit, library_name="peru"))
        if listed.size is not None and found.stat().st_size != listed.size:
            raise BadFile(
                f"{self}/{path}: {found.stat().st_size} bytes in the cache, the Hub has {listed.size}",
                f"delete {found.resolve()} and try again",
            )
        if check is not None and _sha256(found) != check:
            found.resolve().unlink()
            found.unlink(missing_ok=True)
            raise BadFile(f"{self}/{path}: the Hub sent other bytes than it lists", "run the command again")
        return found

    def streams(self, path: str) -> bool:
        """Whether to read a file by ranges: if the command asks for it and the file is not in the cache."""
        return self.session.stream and self.cached(path) is None

    def ranges(self, path: HubPath) -> RangeFile:
        """A file as ranges. Always the same object, which knows the header and the Hub's redirect."""
        if path.path not in self._ranges:
            remote = RemoteFile(str(path), self.name, self.revision, self.commit, path.path, path.size, path.sha256)
            self._ranges.setdefault(path.path, RangeFile(remote, self.session))  # threads may race: the first object stays
        return self._ranges[path.path]

    def small(self, path: HubPath) -> bytes:
        """All of a small file, requested once, in memory."""
        if path.path not in self._small:
            content = bytearray(path.size)
            if content:
                self.ranges(path).read_into(0, memoryview(content))
            self._small[path.path] = bytes(content)
        return self._small[path.path]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, "utf-8")
    beside.replace(path)


def _is_sane(name: object) -> bool:
    """Whether a listed name stays in its repo and can be shown."""
    return isinstance(name, str) and name.isprintable() and "\\" not in name and not any(p in ("", ".", "..") for p in name.split("/"))


@dataclass(frozen=True)
class HubPath:
    """A file or folder in a repo: the part of pathlib.Path that reading a model needs. `path` is "" for the repo itself."""

    repo: HubRepo
    path: str = ""

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}" if self.path else str(self.repo)

    def __truediv__(self, name: str) -> HubPath:
        return HubPath(self.repo, f"{self.path}/{name}" if self.path else name)

    def __lt__(self, other: HubPath) -> bool:
        return (self.repo.public_name, self.path) < (other.repo.public_name, other.path)

    @property
    def name(self) -> str:
        """The last component, or the repo's own name."""
        return (self.path or self.repo.name).rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """`.safetensors`, for example; empty for folders and the repo."""
        return Path(self.path).suffix

    @property
    def parent(self) -> HubPath:
        """The folder above. The repo is its own parent."""
        return HubPath(self.repo, self.path.rpartition("/")[0])

    @property
    def public_name(self) -> str:
        """A name under which anybody can find these bytes."""
        return f"hf://models/{self.repo.public_name}/{self.path}" if self.path else self.repo.public_name

    @property
    def sha256(self) -> str | None:
        """The SHA-256 that the Hub publishes of an LFS file."""
        return self.repo.files[self.path].sha256

    def is_file(self) -> bool:
        """Whether the repo lists it as a file."""
        return self.path in self.repo.files

    def is_dir(self) -> bool:
        """Whether it is the repo or a folder in it."""
        return not self.path or any(name.startswith(self.path + "/") for name in self.repo.files)

    def exists(self) -> bool:
        """Whether the file or folder exists."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[HubPath]:
        """Children, sorted."""
        below = f"{self.path}/" if self.path else ""
        children = {name[len(below) :].split("/")[0] for name in self.repo.files if name.startswith(below)}
        return (self / child for child in sorted(children))

    def glob(self, pattern: str) -> Iterator[HubPath]:
        """Children whose name matches."""
        return (child for child in self.iterdir() if fnmatch.fnmatchcase(child.name, pattern))

    @property
    def size(self) -> int:
        """Size in bytes, from the Hub or from the file itself."""
        known = self.repo.files[self.path].size
        return known if known is not None else self.local().stat().st_size

    @property
    def streams(self) -> bool:
        """Whether to read it by ranges."""
        return self.repo.streams(self.path)

    def ranges(self) -> RangeFile:
        """The file as ranges."""
        return self.repo.ranges(self)

    def local(self) -> Path:
        """The file on this machine's disk, through the shared cache."""
        return self.repo.download(self.path)

    def read_bytes(self) -> bytes:
        """All of a small file."""
        return self.repo.small(self) if self.streams else self.local().read_bytes()

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of a small file as text."""
        return self.read_bytes().decode(encoding)
