"""One task of a pack on the pack's base: base + scale * its vector from the sums -> the task's bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.artifacts.cache import BlockCache
from peru_cli.artifacts.packs.masks import MaskPack, as_mask, mask_leaves
from peru_cli.artifacts.packs.pack import Pack, Sums, as_sums, sum_leaves
from peru_cli.artifacts.packs.superposed import PackedTensor, PackMode, TaskRecord
from peru_cli.checkpoints.digests import Digests, checkpoint_digest, leaves
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.finetunes.decode import kept_bits
from peru_cli.finetunes.fine_tune import FromArtifact, Origin, Witness
from peru_cli.kernels.packs import retrieved
from peru_cli.methods.compact.delta import Bits, cast_bits, infinity
from peru_cli.streaming.arrays import BITS, CPU

_ROWS = 64  # tensors whose signs are cached
_LEAST = 1024  # entries of a row of signs, at least: one loop goes over each
Floats = np.ndarray[Any, np.dtype[Any]]


def float_kind(dtype: Dtype) -> str:
    """The NumPy type in which a dtype's vectors are computed."""
    return "f8" if dtype.name == "F64" else "f4"


def scaled(sums: Sums, factor: float, out: Floats) -> Floats:
    """Sums as floats times a factor, in `out`; (n,)."""
    np.copyto(out, sums, casting="unsafe")
    out *= out.dtype.type(factor)
    return out


def plus_vector(base: Bits, base_dtype: Dtype, dtype: Dtype, vector: Floats) -> Bits | None:
    """Base (bits in its own dtype) plus a vector as bits of `dtype`, (n,). None if a value does not fit. Overwrites the vector."""
    cast = cast_bits(CPU, base, base_dtype, dtype)
    np.add(CPU.widen(cast, dtype, np.empty(len(base), vector.dtype.str[1:])), vector, out=vector)
    bits: Bits = CPU.narrow(vector, dtype)
    return None if CPU.largest_magnitude(bits) >= infinity(dtype) else bits


def base_of_pack(pack: Pack) -> list[Origin]:
    """The pack's tensors under the base's names, the same for all tasks."""
    return [Origin(r.info, TensorInfo(r.info.name, r.base_dtype, r.info.shape), r.base_digest) for r in pack.index.tensors]


def origins_of_task(pack: Pack, task: TaskRecord) -> dict[str, Origin]:
    """The origin of each of a task's tensors, by the fine-tune's names."""
    corrections = pack.corrections(task)
    residual = corrections.records if corrections is not None else {}
    origins = {}
    for record, below in zip(pack.index.tensors, base_of_pack(pack), strict=True):
        info = TensorInfo(task.fine_name(record.info.name), record.info.dtype, record.info.shape)
        changes = record.is_sum or (bool(residual) and record.info.dtype.compressible)
        kept = residual[record.info.name].kept if record.info.name in residual else 0
        origins[info.name] = Origin(info, below.base, record.base_digest, changes, kept)
    return origins | {tensor.info.name: Origin(tensor.info) for tensor in task.tensors}


class TaskOfPack(FromArtifact):
    """The fine-tune that a pack returns for a task."""

    proves = "base and sums"

    def __init__(self, pack: Pack, task: str | None, label: str, base: Checkpoint) -> None:
        """Raises UsageError if the pack has no such task."""
        self.record = pack.task(task)
        super().__init__(pack, label, base, self.record.files)
        self.origins = origins_of_task(pack, self.record)
        self.pack, self.part = pack, self.record.name
        self.kind, self.task = f"task {self.record.name} of a peru pack", self.record.name
        self.tensors = {name: origin.info for name, origin in self.origins.items()}
        self.heading = f"base {base.label}: {base.kind}; {self.task}:"
        self._records = {self.record.fine_name(record.info.name): record for record in pack.index.tensors}
        self._own = {tensor.info.name: tensor for tensor in self.record.tensors}
        self._scale, self._arrangement, self._corrections = pack.factor(self.task), pack.arrangement, pack.corrections(self.record)
        self._places = {source: place for place, source in self._arrangement.sources(self.task, self.record.shift).items()}
        self._rows: BlockCache[Floats] = BlockCache(_ROWS)

    def roles(self) -> dict[str, Digests]:
        sums = {name: record.info for name, record in self.pack.records.items() if record.is_sum}
        roles = {"sums": Digests({name: as_sums(info) for name, info in sums.items()}.get)}
        if isinstance(self.pack, MaskPack):
            roles["mask"] = Digests({name: as_mask(info) for name, info in sums.items()}.get)
        return roles

    def verify_stored(self) -> None:
        for tensor in self.record.tensors:
            self.pack.verify_whole(self.record, tensor)

    def settle(self, witness: Witness) -> None:
        pack, hint = self.pack, "please report this with the file's name"
        sums = [name for name, record in pack.records.items() if record.is_sum]
        if checkpoint_digest(witness.digests("sums", sums)).hex() != pack.metadata["peru.sums"]:
            raise BadFile(f"{pack.path}: its sums are not those that were packed", hint)
        if isinstance(pack, MaskPack) and checkpoint_digest(witness.digests("mask", sums)) != pack.masks[self.record.name].digest:
            raise BadFile(f"{pack.path}: the mask of {self.record.name} is not the one that was written", hint)

    def read_watched(self, name: str, offset: int, buffer: memoryview, witness: Witness | None) -> None:
        if name in self._own:
            self.pack.read_whole(self.record, self._own[name], offset, buffer)
            return
        record = self._records[name]
        start = offset * 8 // record.info.dtype.bits
        if not record.is_sum:
            self.base.read_into(record.info.name, offset, buffer)
            raw = buffer
        else:
            raw = self._read_sum(record, start, np.frombuffer(buffer, BITS[record.info.dtype.bits]), witness)
        if witness is not None:
            witness.saw("base", name, start, leaves(raw, record.base_dtype))
        if self.origins[name].kept:
            self._correct(name, start, np.frombuffer(buffer, BITS[record.info.dtype.bits]), witness)

    def _read_sum(self, record: PackedTensor, start: int, out: Bits, witness: Witness | None) -> memoryview:
        """Base plus vector from entry `start` on, into `out`; the base's bytes there."""
        begin, nbytes = record.base_dtype.nbytes(start), record.base_dtype.nbytes(len(out))
        raw = self.base.view(record.info.name, begin, nbytes)
        if raw is None:
            raw = self.room(nbytes)
            self.base.read_into(record.info.name, begin, raw)
        base = np.frombuffer(raw, BITS[record.base_dtype.bits])
        below = np.zeros_like(base) if record.mode == PackMode.WEIGHTS else base
        if not self._retrieve(record, start, cast_bits(CPU, below, record.base_dtype, record.info.dtype), out, witness):
            message = f"{self.pack.path}: {record.info.name!r} of {self.record.name} does not fit {record.info.dtype.name}"
            raise BadFile(message, "use a smaller --scale")
        return raw

    def _retrieve(self, record: PackedTensor, start: int, base: Bits, out: Bits, witness: Witness | None) -> bool:
        """base + scale * tau^ from entry `start` on, from the sums at its place, into `out`. False if an entry is not finite."""
        place = self.pack.records[self._places.get(record.info.name, record.info.name)]
        sums = self.pack.sums(place, start, start + len(out))
        mask = self.pack.mask(self.record.name, place, start, start + len(out))
        if witness is not None:
            witness.saw("sums", place.info.name, start, sum_leaves(sums))
            if mask is not None:
                witness.saw("mask", place.info.name, start, mask_leaves(mask))
        row = self._row(place, record.info.dtype)
        return retrieved(base, sums, mask, row, start % len(row), record.info.dtype.name, out)

    def _row(self, place: PackedTensor, dtype: Dtype) -> Floats:
        """Signs and factor of a tensor's columns in one: (c m) S equals c (m S) to the bit. Short rows are repeated."""
        kind = np.dtype(float_kind(dtype)).type
        factor: Any = kind(self._scale * 2.0**place.exponent)
        if not (place.is_target and self._arrangement.signs):
            return np.full(_LEAST, factor)

        def signed() -> Floats:
            row = factor * self._arrangement.row(self.record.name, place.info)
            return np.tile(row, -(-_LEAST // len(row)))

        return self._rows.get((place.info.name, kind), signed)

    def _correct(self, name: str, start: int, bits: Bits, witness: Witness | None) -> None:
        """Put the residual's entries into the retrieved bits from entry `start` on, in place."""
        assert self._corrections is not None
        delta = self._corrections.records[self._records[name].info.name]
        if (found := kept_bits(self._corrections.entries, delta, start, start + len(bits), bits.take)) is not None:
            bits[found[0]] = found[1]
            if witness is not None:
                witness.saw_kept(name, len(found[0]))
