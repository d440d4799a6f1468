"""The place of a model: a path on this machine, or a path in a repo on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from peru_cli.checkpoints.hub.names import parse_hub_name
from peru_cli.checkpoints.hub.session import current_session
from peru_cli.errors import PeruError

if TYPE_CHECKING:
    from peru_cli.checkpoints.hub.repo import HubPath

Place: TypeAlias = Union[Path, "HubPath"]


def is_on_hub(text: str) -> bool:
    """Whether an argument names something on the Hub: neither the path nor its first component exists here."""
    if text.startswith("hf://"):
        return True
    path = Path(text)
    return not path.exists() and parse_hub_name(text) is not None and not Path(path.parts[0]).exists()


def locate(text: str) -> Place:
    """The place that an argument names: a path, which need not exist, or a path in a repo whose revision is resolved.

    Raises PeruError for the Hub's errors (checkpoints/hub/errors.py)."""
    name = parse_hub_name(text) if is_on_hub(text) else None
    if name is None:
        return Path(text)
    from peru_cli.checkpoints.hub.repo import HubPath, HubRepo

    key = (name.repo, name.revision)
    session = current_session()
    if key not in session.repos:
        try:
            session.repos[key] = HubRepo(name.repo, name.revision, session)
        except PeruError as error:
            if not text.startswith("hf://"):
                error.message += f"; it was looked for on the Hub because no folder {text} is here"
                error.args = (error.message,)
            raise
    return HubPath(session.repos[key], name.path)


def children(folder: Place, pattern: str = "*") -> list[Place]:
    """Files and folders in a folder with matching names, sorted by name. Empty if the folder does not exist."""
    found: list[Place] = list(folder.glob(pattern))
    return sorted(found, key=lambda place: place.name)


def size_of(place: Place) -> int:
    """Size of a file in bytes."""
    return place.stat().st_size if isinstance(place, Path) else place.size


def fingerprint(place: Place) -> tuple[object, ...]:
    """A value that changes when the file changes. It contains no path of this machine."""
    if isinstance(place, Path):
        stat = place.stat()
        return (stat.st_size, stat.st_mtime_ns)
    return (place.public_name, place.size, place.sha256)


def sha256(place: Place) -> str:
    """SHA-256 of a file: as published by the Hub, or computed."""
    if not isinstance(place, Path):
        return place.sha256 or hashlib.sha256(place.read_bytes()).hexdigest()
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_as(place: Place) -> object:
    """Equal for two names of one file."""
    if isinstance(place, Path):
        stat = place.stat()
        return (stat.st_dev, stat.st_ino)
    return place.public_name


def published_digest(place: Place) -> str | None:
    """SHA-256 of a file in a repo, if the Hub publishes it."""
    return None if isinstance(place, Path) else place.sha256


def on_disk(place: Place) -> Path:
    """The file on this machine, downloaded into the Hub's cache if necessary."""
    return place if isinstance(place, Path) else place.local()


def why_not_here(text: str) -> tuple[str, str | None]:
    """Message and hint for an argument that names nothing."""
    parts = Path(text).parts
    if Path(text).exists() and not Path(text).is_file() and not Path(text).is_dir():
        return f"{text}: not a regular file, but a pipe, a device or a socket", "put the file itself there"
    if len(parts) > 1 and Path(parts[0]).exists() and parse_hub_name(text) is not None:
        return (
            f"{text}: no such file or folder",
            f"{parts[0]} is here, so this was not looked up on the Hub; hf://models/{text} would be",
        )
    name_alone = len(parts) == 1 and Path(text).suffix not in (".safetensors", ".bin") and parse_hub_name(f"org/{text}") is not None
    return f"{text}: no such file or folder", f"a model on the Hub is named with its owner: ORG/{text}" if name_alone else None
