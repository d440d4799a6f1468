"""Names of models and files on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from peru_cli.errors import UsageError

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w])?"
_REVISION = r"refs/(?:pr|convert)/[\w.-]+|[\w.%+-]+"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>{_REVISION}))?(?:/(?P<path>.*))?", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """`org/name`, `org/name@revision`, and a path within; `revision` None is the repo's main branch."""

    repo: str
    revision: str | None = None
    path: str = ""


def parse_hub_name(text: str) -> HubName | None:
    """Parse a name on the Hub. None if it cannot be one. UsageError for an invalid `hf://`."""
    explicit = text.startswith("hf://")
    rest = text.removeprefix("hf://").removeprefix("models/") if explicit else text
    if explicit and rest.startswith(("datasets/", "spaces/", "buckets/", "kernels/")):
        raise UsageError(f"{text} is not a model repo", "write hf://models/ORG/NAME@REVISION/PATH")
    match = _NAME.fullmatch(rest)
    parts = (match["path"] or "").rstrip("/").split("/") if match else []
    if match is None or ".." in match["repo"] or "--" in match["repo"] or any(part in (".", "..") or "\\" in part for part in parts):
        if explicit:
            raise UsageError(f"{text} does not name a model on the Hub", "write hf://models/ORG/NAME@REVISION/PATH")
        return None
    revision = match["revision"]
    return HubName(match["repo"], unquote(revision) if revision else None, "/".join(parts))


@dataclass(frozen=True)
class RemoteFile:
    """A file in a repo at one commit. `label` is its name in messages, `size` is in bytes, `sha256` is set if the Hub publishes it."""

    label: str
    repo: str
    revision: str | None
    commit: str
    path: str
    size: int
    sha256: str | None

    def __str__(self) -> str:
        return self.label

    @property
    def name(self) -> str:
        """The last component of its path."""
        return self.path.rpartition("/")[2]
