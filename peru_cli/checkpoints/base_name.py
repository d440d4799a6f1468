"""The base's public name in an artifact, and digests of the base's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peru_cli.checkpoints.hub.names import parse_hub_name
from peru_cli.checkpoints.lora.config import read_config
from peru_cli.checkpoints.places import Place, children, is_on_hub, locate, published_digest
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch, PeruError, UsageError

FILES = "peru.base.files"
MERGED = "merged"  # the folder of the merged model that is the base of the artifacts beside it


@dataclass(frozen=True)
class BaseName:
    """`name` is what `--base` takes. `digests` are the SHA-256 of the weight files, ascending; empty for a name that is not on the Hub."""

    name: str
    digests: tuple[str, ...] = ()

    def metadata(self) -> dict[str, str]:
        """Metadata for an artifact."""
        return {"peru.base": self.name, **({FILES: ",".join(self.digests)} if self.digests else {})}


def name_base(base: Checkpoint, base_id: str | None) -> BaseName | None:
    """The name to record: `base_id` if given, otherwise the Hub name that the base was read from.

    Local files are read once more, for their digests."""
    name = base_id or base.public_name
    if name is None:
        return None
    return BaseName(name, tuple(base.file_digests()) if hub_repo(name) else ())


def recorded(metadata: Mapping[str, str]) -> BaseName | None:
    """The name that an artifact records."""
    name = metadata.get("peru.base")
    digests = metadata.get(FILES, "")
    return BaseName(name, tuple(digests.split(",")) if digests else ()) if name is not None else None


def hub_repo(name: str) -> tuple[str, str | None] | None:
    """`org/name` and revision of a base's name. None if it is not on the Hub."""
    try:
        parsed = parse_hub_name(name)
    except UsageError:
        return None
    if parsed is None or (parsed.path and not name.startswith("hf://")):
        return None
    return parsed.repo, parsed.revision


def find_base(artifact: Place, metadata: Mapping[str, str], given: str | None) -> str:
    """The base for unpacking an artifact: the given one, the one that it names, or the merged model beside it (PERU-FFT).

    UsageError if there is none. Mismatch if the Hub's files of the named base have changed; nothing is downloaded then."""
    name = recorded(metadata)
    if given is not None:
        if name is not None and is_on_hub(given):
            _refuse_moved(artifact, name, given)
        return given
    if name is not None and hub_repo(name.name) is not None:
        where = name.name if name.name.startswith("hf://") else f"hf://models/{name.name}"
        try:
            _refuse_moved(artifact, name, where)
        except Mismatch:
            raise
        except PeruError as error:
            hint = f"{error.hint}\n  " if error.hint else ""
            message = f"{artifact} was made from {name.name}, which cannot be read: {error.message}"
            raise PeruError(message, f"{hint}or name the base yourself: --base BASE") from error
        return where
    merged = artifact.parent / MERGED
    if name is None and merged.is_dir():
        return str(merged) if isinstance(merged, Path) else merged.public_name
    said = f"it names {name.name}, which is not on the Hub" if name is not None else "it does not name its base"
    raise UsageError(f"{artifact} needs the base that it was made from; {said}", "add --base BASE")


def _refuse_moved(artifact: Place, name: BaseName, where: str) -> None:
    """Compare the digests that the Hub publishes with those that the artifact recorded, if both are of one repo."""
    place, repo = locate(where), hub_repo(name.name)
    if isinstance(place, Path) or repo is None or repo[0] not in (place.repo.name, place.repo.renamed_from):
        return
    files = [place] if place.is_file() else [file for file in children(place) if file.suffix in (".safetensors", ".bin")]
    published = [published_digest(file) for file in files]
    if name.digests and None not in published and not set(name.digests) <= set(published):
        raise Mismatch(
            f"{where} is not the base that {artifact} was made from: its weight files have changed",
            f"it was made from {name.name}: pass a copy of that with --base",
        )


def base_of_adapter(adapter: Place) -> str:
    """The base that a PEFT adapter names, with its revision. UsageError if it is not on the Hub."""
    config = read_config(adapter, str(adapter)) if adapter.is_dir() else {}
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or hub_repo(name) is None:
        raise UsageError(f"{adapter} needs its base, but names none on the Hub", "add --base BASE")
    return f"hf://models/{name}" + (f"@{revision}" if isinstance(revision, str) and revision else "")
