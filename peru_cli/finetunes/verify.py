"""Verify a fine-tune while it is copied: `Proven` reads like the fine-tune and digests every tile on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from peru_cli.checkpoints.bundle import Bundle
from peru_cli.checkpoints.digests import Digests
from peru_cli.checkpoints.local.writer import NullWriter
from peru_cli.checkpoints.quantized.fp8 import Dequantized
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.finetunes.adapter import AdapterWithRest
from peru_cli.finetunes.fine_tune import FromArtifact, OneTask, Positions, Witness, is_base, refuse_base
from peru_cli.vectors.copy import copy_checkpoint
from peru_cli.vectors.family import StreamSettings

_FEW = 3  # tensors of a wrong base to find before giving up


class Proven(Checkpoint):
    """A fine-tune whose base, parts and result are checked against their digests. Every byte must be read once, in tiles."""

    def __init__(self, source: FromArtifact, early: bool = True) -> None:
        """Raises BadFile if a part that the artifact stores whole was altered.

        Without `early` a base is not digested where the result's digest proves what is read: that takes half the time. Another base is
        then found, and named, at the end."""
        source.verify_stored()
        self._early = early or not isinstance(source, OneTask)
        self.source, self.ranged = source, source.base.ranged
        self.label, self.kind, self.tensors, self.metadata = source.label, source.kind, source.tensors, source.metadata
        self.side_files, self.warnings, self.files = source.side_files, source.warnings, source.files
        below = {"base": Digests(lambda name: source.origins[name].base)} if self._early else {}
        self._witness = Witness(below | source.roles())
        self._left: dict[str, int] = {}  # entries of tensors that were read in part
        self._lock = threading.Lock()
        self._bad: list[str] = []

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.read_changes(name, offset, buffer)

    def read_changes(self, name: str, offset: int, buffer: memoryview) -> Positions | None:
        """Like `read_into`, and returns where entries differ from the base's, if that is known (FineTune.read_changes)."""
        changed = self.source.read_changes(name, offset, buffer, self._witness)
        with self._lock:
            left = self._left.pop(name, self.tensors[name].entries) - len(buffer) * 8 // self.tensors[name].dtype.bits
            if left:
                self._left[name] = left
        if not left:
            self._check(name)
        return changed

    def read_bundle(self, info: Bundle, start: int, buffer: memoryview) -> None:
        if start or len(buffer) < info.nbytes:
            super().read_bundle(info, start, buffer)
            return
        self.source.read_bundle_watched(info, buffer, self._witness)
        for member in info.members:
            if member.entries:  # the others are checked at the end
                self._check(member.name)

    def _check(self, name: str) -> None:
        """Call when all of a tensor was read."""
        origin, artifact = self.source.origins[name], self.source.artifact
        if self._early and origin.base is not None and not is_base(origin, self._witness.take("base", name)):
            self._differs(origin.base.name)
        elif (found := self._witness.take_kept(name)) != origin.kept:
            raise BadFile(f"{artifact.path}: tensor {name!r} has {found} kept entries, the index says {origin.kept}")

    def _differs(self, name: str) -> None:
        """Take down that a tensor is not the base's. Mismatch after a few of them."""
        self._bad.append(f"{name}: different contents in {self.source.base.label}")
        if len(self._bad) >= _FEW:
            refuse_base(self._bad, self.source.artifact, self.source.base.label, gave_up=True)

    def prove(self) -> None:
        """Call when everything was read. Raises Mismatch for another base (naming the first tensors that differ), BadFile if
        anything was altered."""
        for name, info in self.tensors.items():
            if not info.entries:
                self._check(name)
        refuse_base(self._bad, self.source.artifact, self.source.base.label)
        try:
            self.source.settle(self._witness)
        except BadFile:
            if not self._early:
                self._blame_base()
            raise

    def _blame_base(self) -> None:
        """Mismatch if the base is another one. Reads it again."""
        for origin in self.source.origins.values():
            if origin.base is not None and not is_base(origin, self.source.base.digest(origin.base.name)):
                self._differs(origin.base.name)
        refuse_base(self._bad, self.source.artifact, self.source.base.label)

    def result_digests(self) -> dict[str, bytes]:
        """The digests of all tensors that were read to their end, 32 bytes each. Empty for a pack."""
        return self._witness.digests("result", self.tensors) if isinstance(self.source, OneTask) else {}

    def expect(self, ranges: Iterable[tuple[str, int, int]], keep: bool = False) -> None:
        self.source.base.expect(self._of_base(ranges), keep)

    def _of_base(self, ranges: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
        """The base's ranges from which ranges of the fine-tune are computed."""
        for name, offset, nbytes in ranges:
            origin = self.source.origins[name]
            if origin.base is not None:
                dtype = origin.base.dtype
                start, stop = (min(at * 8 // origin.info.dtype.bits, origin.base.entries) for at in (offset, offset + nbytes))
                if start < stop:
                    yield origin.base.name, dtype.nbytes(start), dtype.nbytes(stop - start)


def verify(source: FromArtifact, how: StreamSettings) -> None:
    """Check a fine-tune without writing it. Mismatch for another base, BadFile if the artifact was altered."""
    proven = Proven(source)
    copy_checkpoint(proven, NullWriter(list(source.tensors.values())), how)
    proven.prove()


def verify_expanded(models: Sequence[Checkpoint], how: StreamSettings, note: Callable[[str], None] = lambda text: None) -> None:
    """Check the artifacts among these fine-tunes, and those beside adapters, by their digests: see `verify`."""
    for model in models:
        found = model.delta if isinstance(model, AdapterWithRest) else model.below if isinstance(model, Dequantized) else model
        if isinstance(found, FromArtifact):
            note(f"verifying {model.label}")
            verify(found, how)
