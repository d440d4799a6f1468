"""`peru unpack --in-place`: turn the base on the disk into the fine-tune, with a journal (checkpoints/local/patch.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peru_cli.artifacts.container import find_artifact, seal_of
from peru_cli.checkpoints.digests import checkpoint_digest
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.local.atomic import PATCH_MARKER, check_room
from peru_cli.checkpoints.local.checkpoint import SafetensorsCheckpoint
from peru_cli.checkpoints.local.patch import PatchJournal, Placed, finish, most_bytes
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.console import console
from peru_cli.errors import Mismatch, UsageError
from peru_cli.finetunes.fine_tune import FineTune, OneTask
from peru_cli.finetunes.verify import Proven
from peru_cli.shown import listed
from peru_cli.vectors.copy import copy_checkpoint
from peru_cli.vectors.family import StreamSettings

_ELSEWHERE = "write a new checkpoint instead: -o OUT in place of --in-place"


def folder_of_base(base: str) -> Path:
    """The folder that a base to be patched lies in. UsageError if it is not on this machine."""
    path = Path(base)
    if not path.exists():
        raise UsageError(f"{base}: no such checkpoint on this machine", "--in-place changes a folder or a .safetensors file here")
    if path.is_symlink():
        raise UsageError(f"{base} is a link, and what it links to would change", f"name that: --base {path.resolve()}")
    return path if path.is_dir() else path.absolute().parent


def seal_of_artifact(named: str) -> str | None:
    """The digest of the artifact that an argument names. None if it is no file here, or no artifact."""
    path = Path(named)
    place = find_artifact(path) if path.exists() else path
    return seal_of(place) if place.is_file() else None


@dataclass(frozen=True)
class Plan:
    """A checked patch. `room` is what its journal takes at most, in bytes."""

    source: OneTask
    base: SafetensorsCheckpoint
    folder: Path
    tensors: list[Placed]
    side: dict[str, bytes]
    room: int


def plan(source: FineTune, folder: Path) -> Plan:
    """Check all that headers show. UsageError or Mismatch if the base cannot be patched; the hint says what to do."""
    if not isinstance(source, OneTask):
        raise UsageError(f"--in-place takes the artifact of one fine-tune, and {source.label} is {source.kind}", _ELSEWHERE)
    base = source.base
    if not isinstance(base, SafetensorsCheckpoint) or base.ranged:
        raise UsageError(f"{base.label} is {base.kind}; --in-place changes safetensors files on this machine", _ELSEWHERE)
    files = [path for path in base.files if isinstance(path, Path)]
    for path in files:
        found = path.lstat()
        if path.is_symlink() or found.st_nlink > 1:
            raise UsageError(f"{path} is a link, so its weights would change for others, too", f"copy it first, or {_ELSEWHERE}")
        if not os.access(path, os.W_OK):
            raise UsageError(f"{path} is not writable", _ELSEWHERE)
    if any(key.startswith("peru.") for key in base.metadata):
        raise UsageError(f"{base.label} carries digests that peru wrote, which a patch would make wrong", _ELSEWHERE)
    _refuse_growth(source, base)
    side, missing = source.contents()
    if missing:
        console.warn(f"{base.label} no longer has {listed(missing)}, so it will lack them afterwards, too")
    if side and (extra := sorted(base.side_files.keys() - side.keys())):
        console.warn(f"{base.label} keeps side files that the fine-tune lacks: {listed(extra)}")
    side = {name: content for name, content in side.items() if not _has(folder / name, content)}
    tensors = [Placed(info, *base.place_of(name)) for name, info in source.tensors.items()]
    tensors.sort(key=lambda placed: (placed.file, placed.begin))
    room = sum(most_bytes(placed.info, _changed(source, placed.info)) for placed in tensors) + sum(map(len, side.values()))
    check_room(folder / PATCH_MARKER, room, "free it elsewhere: the journal of --in-place lies beside the checkpoint")
    return Plan(source, base, folder, tensors, side, room)


def _has(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _changed(source: OneTask, info: TensorInfo) -> int | None:
    """How many entries of a tensor change at most; None if all may."""
    origin = source.origins[info.name]
    if origin.base is None or (origin.changes and not origin.kept):
        return None
    return origin.kept


def _refuse_growth(source: OneTask, base: SafetensorsCheckpoint) -> None:
    """Mismatch unless the fine-tune has exactly the base's tensors."""
    problems = [f"{name}: the fine-tune lacks it" for name in sorted(base.tensors.keys() - source.tensors.keys())]
    for name, info in source.tensors.items():
        found = base.tensors.get(name)
        if found is None:
            problems.append(f"{name}: the base lacks it")
        elif (found.dtype, found.shape) != (info.dtype, info.shape):
            was = f"{found.dtype.name} {list(found.shape)}"
            problems.append(f"{name}: {was} in the base, {info.dtype.name} {list(info.shape)} in the fine-tune")
    if problems:
        shown = "\n  ".join([*problems[:5], *([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])])
        raise Mismatch(f"--in-place changes values, but here tensors come, go, grow or shrink:\n  {shown}", _ELSEWHERE)


class _Patches(CheckpointWriter):
    """Takes the fine-tune's bytes and records what differs from the base's."""

    ordered = True

    def __init__(self, made: Plan, journal: PatchJournal) -> None:
        self.order = [placed.info for placed in made.tensors]
        self._base, self._journal = made.base, journal
        self._numbers = {info.name: number for number, info in enumerate(self.order)}
        self._room = memoryview(bytearray())

    def write(self, name: str, offset: int, data: memoryview) -> None:
        if len(self._room) < len(data):
            self._room = memoryview(bytearray(len(data)))
        old = self._room[: len(data)]
        self._base.read_into(name, offset, old)
        self._journal.add(self._numbers[name], offset, data, old)

    def commit(self) -> None:
        raise AssertionError("the journal is committed with the digests")

    def __enter__(self) -> _Patches:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@dataclass(frozen=True)
class Patched:
    """What was done: changed units (entries), and the journal's bytes. Both are 0 if the base already was the fine-tune."""

    changed: int
    journal_bytes: int


def patch(made: Plan, how: StreamSettings, sync: bool, note: Callable[[str], None]) -> Patched:
    """Verify the base and write the journal in one pass, then change the files and compare the result.

    Mismatch for another base, BadFile if the artifact was altered; until the journal is complete, nothing is changed."""
    source, base = made.source, made.base
    files = [path for path in base.files if isinstance(path, Path)]
    headers = [base.header_bytes(number) for number in range(len(files))]
    try:
        with PatchJournal(made.folder, files, headers, made.tensors, sync) as journal:
            note("verifying the base, writing the journal")
            proven = Proven(source)
            copy_checkpoint(proven, _Patches(made, journal), how)
            proven.prove()
            nothing = not journal.changed and not made.side
            if not nothing:
                journal.commit(proven.result_digests(), made.side, seal_of(source.artifact.path) or "")
    except Mismatch:
        if is_result(made):
            return Patched(0, 0)
        raise
    if nothing:
        return Patched(0, 0)
    note("changing the checkpoint")
    how.advance(0)
    finish(made.folder, sync, how.advance)
    return Patched(journal.changed, journal.nbytes)


def is_result(made: Plan) -> bool:
    """Whether the base already is the fine-tune: the command was run before."""
    inputs.unchanged()
    digests = {name: made.base.digest(name) for name in made.base.tensors}
    return checkpoint_digest(digests) == made.source.single.result_digest and not made.side
