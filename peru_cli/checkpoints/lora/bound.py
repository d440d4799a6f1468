"""Bind an adapter to its base: digests of the base's weights, for adapters that peru made from full fine-tunes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from peru_cli.checkpoints.bundle import Bundle, alike, bundle
from peru_cli.checkpoints.digests import SHORT, tensor_digest
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.sealed import Collected, complete
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch

BASE_TENSORS = "peru.base.tensors"  # JSON: module -> dtype, shape and 32 hexadecimal digits of the base's tensor


def bound_to(base: Checkpoint, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The entry for an adapter's metadata. `tensors` maps modules to the base's tensors that they change. Reads each once."""
    told = {}
    for module, digest in _digests(base, tensors):
        info = tensors[module]
        told[module] = [info.dtype.name, list(info.shape), digest.hex()]
    return {BASE_TENSORS: json.dumps(told, separators=(",", ":"))}


def _digests(base: Checkpoint, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, bytes]]:
    """The first half of the digest of each module's tensor, by module in order. Small tensors are read together."""
    for run in alike(sorted(tensors), lambda module: tensors[module].entries, lambda module: tensors[module].dtype):
        if len(run) == 1:
            [module] = run
            collected = Collected(info := tensors[module])
            complete(collected, lambda offset, buffer, name=info.name: base.read_into(name, offset, buffer))
            yield module, collected.digest()
            continue
        together = bundle([tensors[module] for module in run])
        assert isinstance(together, Bundle)
        room, at = memoryview(bytearray(together.nbytes)), 0
        base.read_bundle(together, 0, room)
        for module in run:
            end = at + tensors[module].nbytes
            yield module, tensor_digest(tensors[module], room[at:end])[:SHORT]
            at = end


class BoundBase:
    """The base under an adapter, compared with the adapter's records while it is read. Thread-safe."""

    def __init__(self, metadata: Mapping[str, str], base: Checkpoint, modules: Mapping[str, str], label: str) -> None:
        """`modules` maps modules to the names of the base's tensors that they change."""
        self._base, self._label = base, label
        self._wanted: dict[str, bytes] = {}
        self._collected: dict[str, Collected] = {}
        self.unknown: list[str] = []  # modules of another shape or dtype than the adapter was made from
        try:
            told = json.loads(metadata.get(BASE_TENSORS, "{}"))
            for module, (dtype, shape, digest) in told.items():
                info = base.tensors.get(modules.get(module, ""))
                if info is None or info.dtype.name != dtype or list(info.shape) != shape:
                    self.unknown.append(module)
                    continue
                self._wanted[info.name] = bytes.fromhex(digest)[:SHORT]
                self._collected[info.name] = Collected(info)
        except (ValueError, TypeError, AttributeError):  # not an entry of ours: the seal would have shown damage
            self._wanted, self._collected = {}, {}

    def saw(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of the base that were read. Mismatch as soon as a tensor is complete and differs."""
        collected = self._collected.get(name)
        if collected is not None and not collected.complete and collected.saw(offset, data):
            self._compare(name)

    def finish(self) -> None:
        """Read the rest of tensors that were read in part, and compare."""
        for name, collected in self._collected.items():
            if collected.touched and not collected.complete:
                complete(collected, lambda offset, buffer, name=name: self._base.read_into(name, offset, buffer))
                self._compare(name)

    def _compare(self, name: str) -> None:
        if self._collected[name].digest() != self._wanted[name]:
            raise Mismatch(
                f"{self._base.label} is not the base that {self._label} was made from: {name} has different contents",
                "name the base that `peru svd-lora` was given",
            )
