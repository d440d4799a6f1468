"""`shuffle-pack --merge-base`: write the plain sums into a new base, so that they take no space in the pack.

Its tensors have the dtypes of retrieved tasks, so unpacking rounds once, as it does without a new base: each task gets the
same bits. Superposed tensors, and tensors that the pack does not know, are copied from the old base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peru_cli.artifacts.packs.pack import Sums
from peru_cli.artifacts.packs.superposed import PackedTensor, PackMode
from peru_cli.checkpoints.base_name import FILES, BaseName, name_base
from peru_cli.checkpoints.digests import SHORT, TensorDigest, leaves
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.checkpoint import open_directory
from peru_cli.checkpoints.local.writer import DirectoryWriter
from peru_cli.checkpoints.sidefiles import config_with_dtype
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, UsageError
from peru_cli.finetunes.pack_task import float_kind, plus_vector, scaled
from peru_cli.methods.compact.delta import Bits, cast_bits
from peru_cli.pack.plan import PackPlan
from peru_cli.publish.card import PERU, as_text, front_matter, link
from peru_cli.shown import listed
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.tiles import Tile
from peru_cli.version import __version__

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class MergeBase:
    """Where the new base goes, and its public name."""

    target: Path
    base_id: str | None = None


def check_plain(plan: PackPlan) -> None:
    """UsageError for a pack without plain sums."""
    if all(tensor.is_target for tensor in plan.sums if tensor.info.entries):
        raise UsageError("--merge-base has nothing to write: every tensor is superposed", "leave it out")


class NewBase:
    """A base being written. A context manager: leaving it uncommitted removes it."""

    def __init__(self, plan: PackPlan, wanted: MergeBase, sync: bool) -> None:
        self._plan, self._wanted = plan, wanted
        self._scale = float(plan.metadata["peru.scale"])
        known = {tensor.info.name: tensor.info for tensor in plan.tensors}
        infos = [known.get(name, info) for name, info in sorted(plan.base.tensors.items())]
        self.files = self._side_files()
        self._digests = {info.name: TensorDigest(info.dtype, info.shape) for info in infos}
        metadata = {"peru.merge.method": "shuffle-pack", "peru.merge.version": __version__}
        self._writer = DirectoryWriter(wanted.target, infos, self.files, MAX_SHARD_BYTES, sync, metadata, seal=True)

    def _side_files(self) -> dict[str, bytes]:
        """The old base's side files, and a card."""
        plan = self._plan
        contents = {name: path.read_bytes() for name, path in plan.base.side_files.items()}
        dtypes = {tensor.info.dtype for tensor in plan.sums}
        if len(dtypes) == 1 and "config.json" in contents:
            contents["config.json"] = config_with_dtype(contents["config.json"], dtypes.pop())
        old = plan.base.public_name
        head = front_matter([old] if old else [], "merge", "transformers" if "config.json" in contents else None, ["merge", "peru"])
        tasks = listed(vector.name for vector in plan.vectors)
        what = (
            f"Made by {PERU} out of {link(old) if old else 'a base'} and the tasks {tasks}. Tensors that their pack does not superpose",
            f"hold the base plus {plan.metadata['peru.scale']} times the sum of the tasks' differences from it, the others the base.",
        )
        name = plan.vectors[0].name
        body = ["# Base of a pack", "", *what, "", "```sh", f"peru unpack PACK --task {name} --base BASE -o {name}/", "```", ""]
        contents["README.md"] = as_text(head + body).encode()
        return contents

    def largest_name(self) -> dict[str, str]:
        """The longest metadata that `name` may return."""
        if self._wanted.base_id is None:
            return {}
        return {"peru.base": self._wanted.base_id, FILES: ",".join(["0" * 64] * self._writer.shards)}

    def copy(self, tensor: TensorInfo, tile: Tile, raw: memoryview) -> None:
        """Write the base's bytes of a superposed tensor, in the tasks' dtype."""
        old = self._plan.base.tensors[tensor.name].dtype
        self._write(tensor, tile, cast_bits(CPU, np.frombuffer(raw, BITS[old.bits]), old, tensor.dtype))

    def merge(self, record: PackedTensor, tile: Tile, raw: memoryview, sums: Sums) -> None:
        """Write base plus scale times a plain sum, which is what every task would get."""
        dtype = record.info.dtype
        vector = scaled(sums, self._scale * 2.0**record.exponent, np.empty(len(sums), float_kind(dtype)))
        bits = plus_vector(np.frombuffer(raw, BITS[record.base_dtype.bits]), record.base_dtype, dtype, vector)
        if bits is None:
            raise BadFile(f"the plain sum of {record.info.name!r} does not fit {dtype.name}", "use a smaller --scale")
        self._write(record.info, tile, bits)

    def _write(self, info: TensorInfo, tile: Tile, bits: Bits) -> None:
        raw = bits.data.cast("B") if len(bits) else memoryview(b"")
        self._digests[info.name].add_at(tile.start, leaves(raw, info.dtype))
        self._writer.write(info.name, info.dtype.nbytes(tile.start), raw)

    def settle(self) -> BaseName | None:
        """Copy the other tensors, and turn the pack's tensors into those of the new base. Returns the name to record."""
        base, records = self._plan.base, {tensor.info.name: tensor for tensor in self._plan.tensors}
        for name, info in sorted(base.tensors.items()):
            record = records.get(name)
            if record is None or record.mode == PackMode.BASE:
                digest = self._copy_whole(base, info)
                if record is not None:
                    record.base_digest = digest[:SHORT]
        for tensor in self._plan.sums:
            tensor.base_dtype, tensor.base_digest = tensor.info.dtype, self._digests[tensor.info.name].digest()[:SHORT]
            tensor.mode = tensor.mode if tensor.is_target else PackMode.BASE
        self._writer.seal()
        if self._wanted.base_id is None:
            return None
        with self.opened() as written:
            return name_base(written, self._wanted.base_id)

    def opened(self) -> Checkpoint:
        """The new base, readable before it is in place; call after `settle`."""
        return open_directory(self._writer.folder, str(self._wanted.target))

    def _copy_whole(self, base: Checkpoint, info: TensorInfo) -> bytes:
        at = 0

        def write(data: memoryview) -> None:
            nonlocal at
            self._writer.write(info.name, at, data)
            at += len(data)

        return base.digest(info.name, write)

    def commit(self) -> None:
        """Rename the new base into place."""
        self._writer.commit()

    def __enter__(self) -> NewBase:
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.__exit__(*exc)
