"""The base's name in an artifact: where everybody finds it, and what its files are there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from peru_cli.checkpoints.source import Checkpoint

FILES = "peru.base.files"
_HUB = re.compile(r"(?:hf://(?:models/)?)?([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([\w.-]+|refs/[\w./-]+?))?(?:/(.*))?", re.ASCII)


@dataclass(frozen=True)
class BaseName:
    """`name` is what `--base` takes; `digests` are the SHA-256 of the weight files, ascending; none for a name that is not the Hub's."""

    name: str
    digests: tuple[str, ...] = ()

    def metadata(self) -> dict[str, str]:
        """What an artifact records."""
        return {"peru.base": self.name, **({FILES: ",".join(self.digests)} if self.digests else {})}


def name_base(base: Checkpoint, base_id: str | None) -> BaseName | None:
    """The name to record: `base_id` as given, else where on the Hub the base was read from.

    Local files are read once more, for their digests.
    """
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
    """`org/name` and revision of a base's name; None if it is not one of the Hub's."""
    match = _HUB.fullmatch(name)
    if match is None or (match.group(3) is not None and not name.startswith("hf://")):
        return None
    return match.group(1), match.group(2)
