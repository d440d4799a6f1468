"""Small tensors that share a tile are read as one, wherever their bytes lie, and digested one by one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from peru_cli.checkpoints.bundle import Bundle, bundle
from peru_cli.checkpoints.digests import CHUNK, Digests, leaves
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.checkpoint import SafetensorsCheckpoint
from peru_cli.checkpoints.local.writer import FileWriter
from peru_cli.errors import BadFile
from tests.conftest import raw


def small() -> dict[str, torch.Tensor]:
    """Tensors whose order by name is not that in a file."""
    noise = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (0,), (7,), (1, 1), (64,), (2, 0), (40, 9)]
    return {f"t{i}": torch.randn(shapes[i % 7], generator=noise).bfloat16() for i in range(60)}


@pytest.mark.parametrize("shards", [1, 3])
def test_any_run_of_a_bundle_is_what_its_tensors_hold(tmp_path: Path, shards: int) -> None:
    tensors = small()
    files = [tmp_path / f"{number}.safetensors" for number in range(shards)]
    for number, file in enumerate(files):  # wide tensors between them leave gaps that are not read
        mine = {name: t for i, (name, t) in enumerate(tensors.items()) if i % shards == number}
        save_file(mine | {f"t{number}5.wide": torch.ones(9000, dtype=torch.bfloat16)}, file)
    with SafetensorsCheckpoint("models", "files", files, {}) as opened:
        names = sorted(tensors)
        together = bundle([opened.tensors[name] for name in names])
        assert isinstance(together, Bundle)
        everything = b"".join(raw(tensors[name]) for name in names)
        chosen = random.Random(0)
        runs = [(0, together.entries)] + [sorted(chosen.sample(range(together.entries + 1), 2)) for _ in range(40)]
        for start, stop in runs:
            room = memoryview(bytearray(2 * (stop - start)))
            opened.read_bundle(together, start, room)
            assert bytes(room) == everything[2 * start : 2 * stop], (start, stop)


def test_a_sealed_file_is_compared_while_bundles_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sealed.safetensors"
    tensors = {name: tensor for name, tensor in small().items() if tensor.numel()}
    infos = [TensorInfo(name, BY_NAME["BF16"], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with FileWriter(path, infos, sync=False, files={}) as writer:
        for part in (infos[:20], infos[20:]):
            writer.write_whole([memoryview(raw(tensors[info.name])) for info in part], [info.name for info in part])
        writer.commit()
    assert all(raw(load_file(path)[name]) == raw(tensor) for name, tensor in tensors.items())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last tensor by name, in the order of the file
    for content, error in ((path.read_bytes(), None), (bytes(data), f"tensor {max(tensors)!r} was altered")):
        path.write_bytes(content)
        with SafetensorsCheckpoint("sealed", "file", [path], {}) as opened:
            together = bundle([opened.tensors[name] for name in sorted(tensors)])
            assert isinstance(together, Bundle)
            room = memoryview(bytearray(together.nbytes))
            if error is None:
                opened.read_bundle(together, 0, room)
                continue
            with pytest.raises(BadFile, match=error):
                opened.read_bundle(together, 0, room)


def test_digests_are_what_the_format_defines_whatever_the_order_of_their_leaves() -> None:
    dtype = BY_NAME["BF16"]
    infos = {name: TensorInfo(name, dtype, shape) for name, shape in (("long", (5, CHUNK)), ("small", (3, 4)), ("empty", (0, 2)))}
    data = {name: random.Random(1).randbytes(info.nbytes) for name, info in infos.items()}
    digests = Digests(infos.get)
    for first in (2, 0, 4, 1, 3):
        piece = memoryview(data["long"])[2 * first * CHUNK : 2 * (first + 1) * CHUNK]
        digests.add_at("long", first * CHUNK, leaves(piece, dtype))
    digests.add_at("small", 0, leaves(memoryview(data["small"]), dtype))
    for name, info in infos.items():
        chunks = [data[name][at : at + 2 * CHUNK] for at in range(0, info.nbytes, 2 * CHUNK)]
        shape = ",".join(map(str, info.shape)).encode()
        expected = blake3(b"peru tensor 1\0BF16\0" + shape + b"\0" + b"".join(blake3(chunk).digest() for chunk in chunks)).digest()
        assert digests.digest(name) == expected, name
    before = digests.digest("long")
    assert digests.take("long") == before and set(digests.found) == {"small", "empty"}
    with pytest.raises(AssertionError, match="leaves of small are missing"):
        Digests(infos.get).digest("small")
