"""Fine-tunes as `prune` and `merge` take them: full checkpoints, LoRA adapters, and peru artifacts expanded while they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from peru_cli.artifacts.container import artifact_kind, find_artifact
from peru_cli.artifacts.index import COPY, STORED
from peru_cli.artifacts.packs.masks import KINDS
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.checkpoint import open_file
from peru_cli.checkpoints.lora.adapter import REST, find_adapters, is_adapter, is_lora_file
from peru_cli.checkpoints.lora.expand import LoraCheckpoint
from peru_cli.checkpoints.places import Place, locate
from peru_cli.checkpoints.quantized.fp8 import Dequantized
from peru_cli.checkpoints.resolve import open_model
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.checkpoints.usable import usable
from peru_cli.errors import UsageError
from peru_cli.finetunes.decode import decode_bits
from peru_cli.finetunes.pack_task import ExpandedTask
from peru_cli.finetunes.rebuild import check_base, reconstruct
from peru_cli.methods.delta import cast_bits
from peru_cli.streaming.aligned import clip
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.copy import refuse_overflow
from peru_cli.vectors.family import StreamSettings


class ExpandedArtifact(Checkpoint):
    """A sparse delta on its base: the fine-tune that unpack would give, without writing it."""

    expanded = True

    def __init__(self, path: Place, label: str, base: Checkpoint) -> None:
        self.artifact = SparseDelta(path)
        try:
            check_base(self.artifact, base)
        except BaseException:
            self.artifact.close()
            raise
        self._base = base
        self.label, self.kind, self.warnings = label, "peru artifact (sparse delta)", []
        self.tensors = {info.name: info for info in self.artifact.tensors()}
        self.metadata = self.artifact.metadata
        self.side_files = {
            f.name: base.side_files[f.name] for f in self.artifact.index.files if f.origin != STORED and f.name in base.side_files
        }
        self.files = [*base.files, path]

    def verify(self, how: StreamSettings) -> None:
        """Check base and result by their digests: reads everything once. Mismatch or BadFile as unpack has them."""
        reconstruct(self.artifact, self._base, self.artifact.tensors(), None, how)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        record = self.artifact.records[name]
        dtype = record.info.dtype
        n = len(buffer) * 8 // dtype.bits
        start = offset * 8 // dtype.bits
        from_base = clip(Tile(0, 0, start, start + n), record.base_entries)
        if from_base < n:
            rest = buffer[dtype.nbytes(from_base) :]
            self.artifact.read_whole(record, offset + dtype.nbytes(from_base), rest)
        if not from_base:
            return
        base_name = self.artifact.base_name(record)
        if record.mode == COPY:
            self._base.read_into(base_name, offset, buffer)
            return
        assert record.base_dtype is not None
        room = bytearray(record.base_dtype.nbytes(from_base))
        self._base.read_into(base_name, record.base_dtype.nbytes(start), memoryview(room))
        bits = cast_bits(CPU, np.frombuffer(room, BITS[record.base_dtype.bits]), record.base_dtype, dtype)
        stream, entries = self.artifact.entries(record, start, start + from_base)
        if stream is not None and len(entries.positions):
            bits[entries.positions] = decode_bits(bits.take(entries.positions), entries, stream.values, dtype)
        buffer[: dtype.nbytes(from_base)] = bits.data.cast("B")

    def close(self) -> None:
        self.artifact.close()


class Overlaid(Checkpoint):
    """An adapter on its base, and what the adapter could not hold, from the sparse delta beside it."""

    expanded = True

    def __init__(self, adapter: LoraCheckpoint, delta: ExpandedArtifact) -> None:
        self.adapter, self.delta = adapter, delta
        self.label, self.metadata, self.warnings = adapter.label, adapter.metadata, adapter.warnings
        self.side_files, self.files = adapter.side_files, [*adapter.files, *delta.files]
        self.kind = f"{adapter.kind}, and {len(delta.tensors)} tensors from {REST}"
        self._from_delta: dict[str, str] = {}
        tensors = dict(adapter.tensors)
        for name, info in delta.tensors.items():
            base_name = adapter.prefix.base_name(name)
            ours = base_name if base_name is not None and base_name in tensors else name
            tensors[ours] = TensorInfo(ours, info.dtype, info.shape)
            self._from_delta[ours] = name
        self.tensors = tensors

    def verify(self, how: StreamSettings) -> None:
        """Check the delta by its digests, as ExpandedArtifact does."""
        self.delta.verify(how)

    def fine_name(self, name: str) -> str:
        """What the fine-tune calls a tensor."""
        return self._from_delta.get(name) or self.adapter.fine_name(name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name in self._from_delta:
            self.delta.read_into(self._from_delta[name], offset, buffer)
        else:
            self.adapter.read_into(name, offset, buffer)

    def close(self) -> None:
        self.adapter.close()
        self.delta.close()


class RoundedAdapter(Checkpoint):
    """An adapter on its base as unpack writes it: the fine-tune's names, updated weights rounded to the base's dtype."""

    expanded = True

    def __init__(self, model: LoraCheckpoint | Overlaid) -> None:
        under = model.adapter if isinstance(model, Overlaid) else model
        self._model = model
        self.label, self.kind, self.metadata, self.warnings = model.label, model.kind, model.metadata, model.warnings
        self.side_files, self.files = model.side_files, model.files
        self.names = {model.fine_name(name): name for name in model.tensors}  # the expanded one's, by ours
        dtypes = {name: under.updates[name].info.dtype if name in under.updates else info.dtype for name, info in model.tensors.items()}
        self.tensors = {ours: TensorInfo(ours, dtypes[name], model.tensors[name].shape) for ours, name in self.names.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        info, wide = self.tensors[name], self._model.tensors[self.names[name]]
        if info.dtype is wide.dtype:
            self._model.read_into(wide.name, offset, buffer)
            return
        start, n = offset * 8 // info.dtype.bits, len(buffer) * 8 // info.dtype.bits
        room = memoryview(bytearray(wide.dtype.nbytes(n)))
        self._model.read_into(wide.name, wide.dtype.nbytes(start), room)
        bits = np.frombuffer(room, BITS[wide.dtype.bits])
        cast = cast_bits(CPU, bits, wide.dtype, info.dtype)
        refuse_overflow(self.label, info, bits, wide.dtype, cast)
        buffer[:] = cast.data.cast("B")

    def close(self) -> None:
        self._model.close()


def as_unpacked(model: Checkpoint) -> Checkpoint:
    """An expanded adapter as unpack would write it; any other model as it is."""
    return RoundedAdapter(model) if isinstance(model, (LoraCheckpoint, Overlaid)) else model


def open_fine_tune(model: str, base: Checkpoint | None, task: str | None = None, stored: bool = False) -> Checkpoint:
    """Open a model, an adapter, an artifact or one task of a pack; all but the first need their base, else UsageError.

    A folder or repo that holds one artifact stands for it; of several, the one of the task. A full checkpoint's FP8 weights
    come as floats unless `stored` asks for the tensors of its files.
    """
    opened = _open(model, base, task, stored)
    if opened.expanded and base is not None and not isinstance(opened, Dequantized):
        base.echo()
    return opened


def _open(model: str, base: Checkpoint | None, task: str | None, stored: bool) -> Checkpoint:
    path = locate(model)
    if (path.is_dir() and is_adapter(path)) or is_lora_file(path):
        return _open_adapter(path, model, base)
    path = artifact_for(path, task)
    if path.is_dir() and not any(path.glob("*.safetensors")) and (several := find_adapters(path)):
        names = ", ".join(str(folder) for folder in several.values())
        raise UsageError(f"{model} holds several adapters: {names}", "name one of them")
    if path.is_file() and path.suffix == ".safetensors":
        opened = open_file(path, model)
        if "peru.format" in opened.metadata:
            opened.close()
            if base is None:
                raise UsageError(f"{model} is a peru artifact: it can be expanded only with its base", "add --base BASE")
            return ExpandedTask(path, model, task, base) if artifact_kind(path) in KINDS else ExpandedArtifact(path, model, base)
        return opened if stored else usable(opened)
    return open_model(model, stored)


def artifact_for(place: Place, task: str | None) -> Place:
    """The artifact that a folder or repo stands for: its only one, or of several the one of the task; else the place itself."""
    try:
        return find_artifact(place)
    except UsageError:
        if task is None:
            raise
        return find_artifact(place, task)


def _open_adapter(path: Place, label: str, base: Checkpoint | None) -> Checkpoint:
    if base is None:
        raise UsageError(f"{label} is a LoRA adapter: it can be expanded only with its base", "add --base BASE")
    if "peru.merge.method" in base.metadata:
        raise UsageError(
            f"{label} is a LoRA adapter, and {base.label} is a merge, which no adapter was trained on",
            "fold it into its own base first (peru unpack), or merge with --compress",
        )
    adapter = LoraCheckpoint(path, label, base)
    delta = adapter.folder / REST
    if not delta.is_file():
        return adapter
    try:
        return Overlaid(adapter, ExpandedArtifact(delta, str(delta), base))
    except BaseException:
        adapter.close()
        raise


VERIFIABLE = (ExpandedArtifact, ExpandedTask, Overlaid)


def verify_expanded(models: Sequence[Checkpoint], how: StreamSettings, note: Callable[[str], None]) -> None:
    """Check the artifacts among these fine-tunes, and those beside adapters, by their digests: Mismatch or BadFile as unpack has them."""
    for model in models:
        if isinstance(model, VERIFIABLE):
            note(f"verifying {model.label}")
            model.verify(how)
