"""Compare files that peru wrote with the digests in them, and report files that cannot be checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peru_cli.artifacts.container import artifact_kind, seal_of
from peru_cli.artifacts.packs.masks import KINDS, open_pack
from peru_cli.artifacts.packs.routed import KIND as ROUTED
from peru_cli.artifacts.packs.routed import open_routed
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.checkpoints.digests import CHUNK
from peru_cli.checkpoints.local.checkpoint import SafetensorsCheckpoint, open_directory, open_file
from peru_cli.checkpoints.local.inputs import read_small
from peru_cli.checkpoints.local.sealed import file_digest, is_sealed, told_files
from peru_cli.checkpoints.lora.config import CONFIG, read_config, sealed_config
from peru_cli.checkpoints.places import Place
from peru_cli.errors import BadFile, PeruError, UsageError
from peru_cli.finetunes.head import HEADS, check_bound

_PIECE = 16 * CHUNK  # entries decoded at once
SOUND, CHANGED, UNKNOWN = "sound", "changed", "cannot be checked"


@dataclass
class Finding:
    """The result for one file: `verdict` is SOUND, CHANGED or UNKNOWN, `said` gives the reason."""

    file: str
    verdict: str
    said: str


def verify(path: Path) -> list[Finding]:
    """Check every file at a path that peru may have written, sorted by name. UsageError if there is none."""
    if path.is_file():
        return list(_weights(path))
    files = sorted(file for file in path.rglob("*.safetensors") if not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not files:
        raise UsageError(f"{path} holds no safetensors file", "name what peru wrote: an artifact, an adapter, a merge or a folder of these")
    found = [finding for file in files for finding in _weights(file)]
    return found + [finding for file in files if file.parent.name == HEADS for finding in _binding(file)]


def _weights(path: Path) -> Iterator[Finding]:
    """Check a file of weights and the side files that it lists."""
    try:
        if artifact_kind(path) is not None:
            yield verify_artifact(path)
            return
        with open_file(path, str(path)) as opened:
            assert isinstance(opened, SafetensorsCheckpoint)
            if not is_sealed(opened.metadata) and any(key.startswith("peru.") for key in opened.metadata):
                yield Finding(str(path), CHANGED, "its metadata was altered: it no longer says what peru wrote here")
                return
            if not is_sealed(opened.metadata):
                yield Finding(str(path), UNKNOWN, "it has no digests: peru did not write it, or wrote it with `peru unpack`")
                return
            opened.verify()
            yield Finding(str(path), SOUND, f"header and {len(opened.tensors)} tensors are unchanged")
            for name, digest in told_files(opened.metadata).items():
                yield _beside(path.parent / name, digest)
    except (PeruError, OSError) as error:
        yield Finding(str(path), CHANGED, error.message if isinstance(error, PeruError) else str(error))


def _beside(path: Path, digest: str) -> Finding:
    """Check a small file that was written with the weights."""
    try:
        content = sealed_config(read_config(path.parent, str(path.parent))) if path.name == CONFIG else read_small(path)
        same = file_digest(content) == digest
    except (PeruError, OSError) as error:
        return Finding(str(path), CHANGED, error.message if isinstance(error, PeruError) else f"{error.strerror}: {path}")
    return Finding(str(path), SOUND, "as it was written") if same else Finding(str(path), CHANGED, "changed after the weights were written")


def verify_artifact(place: Place) -> Finding:
    """Check everything in an artifact that needs no base."""
    try:
        return Finding(str(place), SOUND, _artifact(place))
    except (PeruError, OSError) as error:
        return Finding(str(place), CHANGED, error.message if isinstance(error, PeruError) else str(error))


def _artifact(path: Place) -> str:
    """Check everything in an artifact that needs no base. BadFile if it was altered."""
    seal = f"its digest is {seal_of(path)}"
    if artifact_kind(path) in KINDS:
        with open_pack(path) as pack:
            for task in pack.index.tasks:
                for tensor in task.tensors:
                    pack.verify_whole(task, tensor)
                if (residual := pack.corrections(task)) is not None:
                    for record in residual.records.values():
                        for start in range(0, record.info.entries if record.kept else 0, _PIECE):
                            residual.entries.entries(record, start, min(start + _PIECE, record.info.entries))
            for size, digest in pack.index.contents:
                pack.content(size, digest)
            for packed in pack.index.tensors:
                for start in range(0, packed.info.entries if packed.is_sum else 0, _PIECE):
                    stop = min(start + _PIECE, packed.info.entries)
                    pack.sums(packed, start, stop)
                    for name in pack.tasks:
                        pack.mask(name, packed, start, stop)
        return f"header, index, blocks and {len(pack.tasks)} tasks' own tensors are unchanged; {seal}"
    if artifact_kind(path) == ROUTED:
        with open_routed(path) as routed:
            routed.verify()
            return f"header, index, {routed.parts()} and {len(routed.tasks)} tasks' own tensors are unchanged; {seal}"
    with SparseDelta(path) as delta:
        delta.verify()
    return f"header, index and blocks are unchanged; `peru unpack` also checks base and result; {seal}"


def _binding(head: Path) -> Iterator[Finding]:
    """Check whether a head belongs to the merge beside it."""
    try:
        with open_directory(head.parent.parent, str(head.parent.parent)) as merged, open_file(head, str(head)) as opened:
            unknown = check_bound(merged, opened)
    except BadFile:
        return  # already reported for the file itself
    except PeruError as error:
        yield Finding(str(head), CHANGED, error.message)
        return
    yield Finding(str(head), UNKNOWN, unknown[0]) if unknown else Finding(str(head), SOUND, f"it belongs to {head.parent.parent}")
