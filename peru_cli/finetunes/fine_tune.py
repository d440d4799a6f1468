"""The base class of compact fine-tunes: checkpoints computed from their base while they are read."""

from __future__ import annotations

import json
import threading
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from peru_cli.artifacts.index import STORED, Mode, SideFile, TensorRecord
from peru_cli.artifacts.mixed.reader import Mixed
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.artifacts.single import SingleArtifact
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.checkpoints.bundle import Bundle, pieces_of
from peru_cli.checkpoints.digests import SHORT, Digests, checkpoint_digest, leaves
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.source import AGAIN, Checkpoint
from peru_cli.console import plural
from peru_cli.errors import BadFile, Mismatch
from peru_cli.methods.compact.delta import Bits, cast_bits
from peru_cli.streaming.arrays import BITS, CPU

Artifact: TypeAlias = SparseDelta | Mixed | Pack
Positions: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_SHOWN = 5  # tensors named in a message


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of one tensor of a fine-tune: `base` is the base's tensor, None if the tensor is stored whole."""

    info: TensorInfo
    base: TensorInfo | None = None
    digest: bytes = b""  # the first bytes of the base tensor's digest
    changes: bool = True  # whether it may differ from the base's
    kept: int = 0  # entries that a sparse delta or a residual changes


class Witness:
    """Digests of all that is read while a fine-tune is computed, by role and tensor. Thread-safe."""

    def __init__(self, roles: dict[str, Digests]) -> None:
        self._roles, self._kept, self._lock = roles, dict[str, int](), threading.Lock()

    def watches(self, role: str) -> bool:
        """Whether tensors are digested in a role."""
        return role in self._roles

    def saw(self, role: str, name: str, start: int, leaves: bytes) -> None:
        """Add the leaves of the chunks from entry `start` of a tensor on."""
        self._roles[role].add_at(name, start, leaves)

    def saw_kept(self, name: str, entries: int) -> None:
        """Count kept entries of the fine-tune's tensor `name`."""
        if entries:
            with self._lock:
                self._kept[name] = self._kept.get(name, 0) + entries

    def take_kept(self, name: str) -> int:
        """How many kept entries were read of a tensor that was read to its end. The number is then forgotten."""
        return self._kept.pop(name, 0)

    def take(self, role: str, name: str) -> bytes:
        """The digest of a tensor that was read to its end, which is then forgotten; 32 bytes."""
        return self._roles[role].take(name)

    def digests(self, role: str, names: Collection[str]) -> dict[str, bytes]:
        """The digests of tensors in a role, by tensor."""
        return self._roles[role].all(names)


class FineTune(Checkpoint):
    """A fine-tune on its base.

    `origins` lists the origin of each tensor, if digests can prove it. `proves` says in words what they prove.
    `heading` describes the fine-tune to the user. `facts` are added to `peru unpack --json`."""

    expanded = True
    base: Checkpoint | None = None
    origins: Mapping[str, Origin] = {}
    proves = ""
    task: str | None = None
    heading: str

    def __init__(self) -> None:
        self.warnings, self.facts = [], dict[str, object]()
        self._scratch = threading.local()

    def room(self, nbytes: int, use: str = "base") -> memoryview:
        """This thread's buffer, valid until the next request for the same use."""
        rooms = self._scratch.__dict__
        if use not in rooms or len(rooms[use]) < nbytes:
            rooms[use] = np.empty(nbytes, np.uint8).data
        found: memoryview = rooms[use]
        return found[:nbytes]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.read_watched(name, offset, buffer, None)

    @abstractmethod
    def read_watched(self, name: str, offset: int, buffer: memoryview, witness: Witness | None) -> None:
        """Like `read_into`, but reports what is read to a witness, which needs whole chunks."""

    def read_changes(self, name: str, offset: int, buffer: memoryview, witness: Witness | None) -> Positions | None:
        """Like `read_watched`. Returns where the entries differ from the base's, cast to this dtype: positions in the buffer,
        ascending, (k,) int64. None if only a comparison can tell."""
        self.read_watched(name, offset, buffer, witness)
        return None

    def read_bundle_watched(self, info: Bundle, buffer: memoryview, witness: Witness | None) -> None:
        """Fill a buffer with all of a bundle of small tensors; like `read_watched`."""
        for member, first, piece in pieces_of(info, 0, buffer):
            self.read_watched(member.name, member.dtype.nbytes(first), piece, witness)

    def contents(self) -> tuple[dict[str, bytes], list[str]]:
        """Side files of the fine-tune, and the names of those that the base should have but lacks."""
        return {name: path.read_bytes() for name, path in self.side_files.items()}, []


class FromArtifact(FineTune):
    """A fine-tune from a peru artifact, in which digests prove everything."""

    base: Checkpoint

    def __init__(self, artifact: Artifact, label: str, base: Checkpoint, files: Sequence[SideFile]) -> None:
        super().__init__()
        self.artifact, self.base, self.label, self._carried = artifact, base, label, files
        self.metadata = artifact.metadata
        self.side_files = {f.name: base.side_files[f.name] for f in files if f.origin != STORED and f.name in base.side_files}
        self.files = [*base.files, artifact.path]

    @abstractmethod
    def roles(self) -> dict[str, Digests]:
        """What to digest while all of it is read, besides the base."""

    @abstractmethod
    def verify_stored(self) -> None:
        """Check what the artifact stores whole. BadFile if it was altered."""

    @abstractmethod
    def settle(self, witness: Witness) -> None:
        """Call when everything was read. BadFile if it differs from what the artifact was made from."""

    def config(self) -> dict[str, Any]:
        """The artifact's config.json, or the base's."""
        carried = next((file for file in self._carried if file.name == "config.json" and file.origin == STORED), None)
        if carried is None:
            return super().config()
        try:
            parsed = json.loads(self.artifact.side_file(carried))
        except (ValueError, RecursionError):
            return {}
        return parsed if isinstance(parsed, dict) else {}

    def contents(self) -> tuple[dict[str, bytes], list[str]]:
        contents, missing = {}, []
        for file in self._carried:
            if file.origin == STORED:
                contents[file.name] = self.artifact.side_file(file)
                continue
            path = self.base.side_files.get(file.name)
            content = path.read_bytes() if path is not None else None
            if content is None or short_digest(content) != file.digest:
                missing.append(file.name)
            else:
                contents[file.name] = content
        return contents, missing

    def close(self) -> None:
        self.artifact.close()


def check_base(origins: Iterable[Origin], artifact: Artifact, base: Checkpoint) -> None:
    """Mismatch if the headers show that this cannot be the artifact's base."""
    problems = []
    for wanted in (origin.base for origin in origins if origin.base is not None):
        found = base.tensors.get(wanted.name)
        if found is None:
            problems.append(f"{wanted.name}: not in {base.label}")
        elif (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            was = f"{wanted.dtype.name} {list(wanted.shape)} when the {_noun(artifact)} was made"
            problems.append(f"{found.name}: {found.dtype.name} {list(found.shape)} in {base.label}, {was}")
    refuse_base(problems, artifact, base.label)


def refuse_base(problems: list[str], artifact: Artifact, label: str, gave_up: bool = False) -> None:
    """Raise Mismatch if there are problems, naming the first few and the base that the artifact was made from.

    `gave_up` says that there may be more."""
    if not problems:
        return
    wanted = artifact.metadata.get("peru.base")
    hint = f"it was made from {wanted}" if wanted else f"the {_noun(artifact)} does not record its base (--base-id does)"
    if isinstance(artifact, Pack) and artifact.has_own_base:
        hint = f"its base is the one that --merge-base wrote{f', {wanted}' if wanted else ''}"
    number = f"it differs in {'at least ' if gave_up else ''}{plural(len(problems), 'tensor')}"
    raise Mismatch(f"{label} is not the base that {artifact.path} was made from: {number}\n  " + "\n  ".join(problems[:_SHOWN]), hint)


def _noun(artifact: Artifact) -> str:
    return "pack" if isinstance(artifact, Pack) else "artifact"


def is_base(origin: Origin, digest: bytes) -> bool:
    """Whether a base tensor's digest is the recorded one."""
    return digest[:SHORT] == origin.digest


class Origins(Mapping[str, Origin]):
    """The origin of each tensor of an artifact, by the fine-tune's names in canonical order. Made when asked for: there may be many."""

    def __init__(self, artifact: SingleArtifact[Any]) -> None:
        self._artifact, self._records = artifact, artifact.records

    def __getitem__(self, name: str) -> Origin:
        record = self._records[name]
        if record.mode == Mode.WHOLE:
            return Origin(record.info)
        named, shape = self._artifact.base_name(record), record.base_shape
        same = record.base_dtype is record.info.dtype and named == name and shape == record.info.shape
        base = record.info if same else TensorInfo(named, record.base_dtype, shape)
        return Origin(record.info, base, record.base_digest, record.changes, record.kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


class OneTask(FromArtifact):
    """The fine-tune of an artifact that holds only one, with a digest of the whole result."""

    proves = "base and result"

    def __init__(self, artifact: SparseDelta | Mixed, label: str, base: Checkpoint, what: str) -> None:
        super().__init__(artifact, label, base, artifact.index.files)
        self.single: SingleArtifact[Any] = artifact
        self.kind, self.task = f"peru artifact ({what})", artifact.metadata["peru.task"]
        self.tensors = artifact.infos
        self.origins = Origins(artifact)
        self.heading = f"base {base.label}: {base.kind}; {self.task}:"
        self.facts = {"result_digest": artifact.result_digest.hex()}

    def agree(self, found: Mapping[str, bytes]) -> None:
        if found.keys() == self.tensors.keys() and checkpoint_digest(dict(found)) != self.single.result_digest:
            raise BadFile(f"{self.label} was changed while it was being read: nothing was written", AGAIN)

    def verify_stored(self) -> None:
        for record in self.single.records.values():
            self.single.verify_whole(record)

    def read_watched(self, name: str, offset: int, buffer: memoryview, witness: Witness | None) -> None:
        self.read_changes(name, offset, buffer, witness)

    def read_changes(self, name: str, offset: int, buffer: memoryview, witness: Witness | None) -> Positions | None:
        record: TensorRecord = self.single.records[name]
        dtype = record.info.dtype
        start, n = (at * 8 // dtype.bits for at in (offset, len(buffer)))
        from_base = max(0, min(start + n, record.base_entries) - start)
        ours = buffer[: dtype.nbytes(from_base)]
        changed = np.empty(0, np.int64) if record.mode == Mode.COPY else None
        if from_base < n:
            self.single.read_whole(record, offset + len(ours), buffer[len(ours) :])
        if from_base:
            self._read_base(record, start, ours, witness)
            if record.mode == Mode.DELTA:
                changed = self.change(record, start, np.frombuffer(ours, BITS[dtype.bits]), witness)
        if witness is not None:
            witness.saw("result", name, start, leaves(buffer, dtype))
        return changed if from_base == n else None

    @abstractmethod
    def change(self, record: Any, start: int, bits: Bits, witness: Witness | None) -> Positions | None:
        """Turn the base's bits from entry `start` on, (n,) in the fine-tune's dtype, into the fine-tune's, in place.

        Returns where they differ from before: positions in `bits`, ascending, (k,) int64. None if that is not known."""

    def _read_base(self, record: TensorRecord, start: int, out: memoryview, witness: Witness | None) -> None:
        """Read the base's entries from `start` on in the fine-tune's dtype."""
        origin, dtype = self.origins[record.info.name], record.info.dtype
        assert origin.base is not None
        had = origin.base.dtype
        raw = out if had is dtype else self.room(had.nbytes(len(out) * 8 // dtype.bits))
        self.base.read_into(origin.base.name, had.nbytes(start), raw)
        if witness is not None and witness.watches("base"):
            witness.saw("base", record.info.name, start, leaves(raw, had))
        if had is not dtype:
            np.copyto(np.frombuffer(out, BITS[dtype.bits]), cast_bits(CPU, np.frombuffer(raw, BITS[had.bits]), had, dtype))

    def roles(self) -> dict[str, Digests]:
        return {"result": Digests(self.tensors.get)}

    def settle(self, witness: Witness) -> None:
        if checkpoint_digest(witness.digests("result", self.tensors)) != self.single.result_digest:
            message = f"{self.single.path}: the result is not the checkpoint that was pruned"
            raise BadFile(message, "please report this with both file names")
