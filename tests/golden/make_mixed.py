"""Makes the golden mixed artifact beside this file: `python tests/golden/make_mixed.py`.

Its integers are made up, so that every part and every combination occurs, and its writer computes nothing that a machine
could round differently. The expected result comes from tests/support/readers/mixed_reader.py, which shares no code with peru.
Run it again only if the format is given up."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent / "mixed"
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np  # noqa: E402

from peru_cli.artifacts.index import STORED, Mode, SideFile  # noqa: E402
from peru_cli.artifacts.mixed.index import MixedRecord  # noqa: E402
from peru_cli.artifacts.mixed.writer import MixedWriter, Represented  # noqa: E402
from peru_cli.artifacts.sparse_delta import short_digest  # noqa: E402
from peru_cli.checkpoints.digests import SHORT, checkpoint_digest, tensor_digest  # noqa: E402
from peru_cli.checkpoints.dtypes import BY_NAME  # noqa: E402
from peru_cli.checkpoints.header import TensorInfo  # noqa: E402
from peru_cli.methods.compact.delta import cast_bits  # noqa: E402
from peru_cli.methods.mixed.scales import scale_of  # noqa: E402
from peru_cli.methods.mixed.sums import add_difference  # noqa: E402
from peru_cli.streaming.arrays import CPU  # noqa: E402
from tests.golden.make import write_safetensors  # noqa: E402

WIDTH = {"F16": "i2", "BF16": "i2", "F32": "i4", "F64": "i8", "I64": "i8"}
# name: shape, the base's dtype, the fine-tune's, rank, kept rows, whether DENSE, whether ULPS, new rows
TENSORS: dict[str, tuple[tuple[int, ...], str, str, int, int, bool, bool, int]] = {
    "a.both": ((6, 5), "F32", "F32", 3, 0, True, False, 0),
    "b.rows": ((40, 4), "BF16", "BF16", 2, 7, False, False, 3),
    "c.dense": ((24,), "F16", "F16", 0, 0, True, False, 0),
    "d.exact": ((10,), "F64", "F64", 0, 0, False, True, 0),
    "e.all": ((4, 3, 2), "F32", "BF16", 1, 0, True, True, 0),
    "f.absent": ((8,), "F32", "F32", 0, 0, False, False, 0),
    "g.wide": ((5, 6), "F64", "F64", 2, 0, False, False, 0),
}


def base() -> dict[str, tuple[str, np.ndarray]]:
    """The base's tensors: dtype and bits, with infinities, NaNs and both zeros among them."""
    noise = np.random.default_rng(7)
    tensors = {}
    for name, (shape, dtype, *_) in TENSORS.items():
        values = noise.integers(-4000, 4000, shape).astype(np.float64) / 4096
        flat = values.reshape(-1)
        flat[:4] = [0.0, -0.0, np.inf, np.nan]
        kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64}.get(dtype)
        bits = values.astype(kind).view(WIDTH[dtype]) if kind else (values.astype(np.float32).view(np.int32) >> 16).astype(np.int16)
        tensors[name] = (dtype, bits)
    tensors["h.steps"] = ("I64", np.arange(3))
    return tensors


def parts_of(name: str, noise: np.random.Generator) -> Represented:
    """Made-up parts of a tensor."""
    shape, _, dtype, rank, kept, dense, ulps, _ = TENSORS[name]
    entries, parts = int(np.prod(shape)), Represented()
    if rank:
        rows = kept or entries // shape[-1]
        parts.left, parts.right = (noise.integers(-40, 41, size).astype(np.int16) for size in ((rows, rank), (rank, shape[-1])))
        parts.scales = noise.integers(-60, -30, rank)
        parts.rows = np.sort(noise.choice(entries // shape[-1], kept, replace=False)) if kept else None
    if dense:
        parts.dense, parts.dense_scale = noise.integers(-3, 4, entries).astype(np.int16), -29
    if ulps:
        width = int(WIDTH[dtype][1:]) * 8
        parts.ulps = noise.integers(-(1 << (width - 2)), 1 << (width - 2), entries).astype(WIDTH[dtype])
    return parts


def sum_of(parts: Represented, shape: tuple[int, ...]) -> np.ndarray | None:
    """What the parts add, float64 (entries,), by plain loops over directions, which are exact in any order."""
    low = None
    if parts.left is not None and parts.right is not None and parts.scales is not None:
        product = np.zeros((len(parts.left), parts.right.shape[1]))
        for left, right, scale in zip(parts.left.T, parts.right, scale_of(parts.scales), strict=True):
            product += np.multiply.outer(left.astype(np.float64), right.astype(np.float64)) * scale
        low = np.zeros((int(np.prod(shape)) // shape[-1], shape[-1]))
        low[slice(None) if parts.rows is None else parts.rows] = product
        low = low.reshape(-1)
    if parts.dense is None:
        return low
    dense: np.ndarray = parts.dense * scale_of(np.array([parts.dense_scale]))
    return dense if low is None else low + dense


def write(target: Path) -> None:
    """The artifact."""
    noise, below, records, results = np.random.default_rng(11), base(), [], {}
    content = b'{"model_type": "none"}\n'
    files = [(SideFile("config.json", STORED, len(content), short_digest(content)), content)]
    metadata = {
        "peru.task": "mixed",
        "peru.prefix": "+m.",
        "peru.entries": str(sum(bits.size for name, (_, bits) in below.items() if name in TENSORS)),
        "peru.goal": "bits 0.5",
        "peru.energy": "1.5",
        "peru.error": "0.25",
    }
    stored = []
    with MixedWriter(target, {**metadata, "peru.result": "0" * 64}, sync=False) as writer:
        for name, (had, bits) in below.items():
            had_dtype, info_of = BY_NAME[had], TensorInfo(name, BY_NAME[had], bits.shape)
            digest = tensor_digest(info_of, bits.tobytes())
            if name not in TENSORS:
                records.append(MixedRecord(TensorInfo(f"m.{name}", had_dtype, bits.shape), Mode.COPY, b"", had_dtype, 0, digest[:SHORT]))
                results[f"m.{name}"] = digest
                continue
            shape, _, want, *_, new = TENSORS[name]
            dtype = BY_NAME[want]
            info = TensorInfo(f"m.{name}", dtype, (shape[0] + new, *shape[1:]))
            record = MixedRecord(info, Mode.DELTA, b"", had_dtype, shape[0] if new else 0, digest[:SHORT])
            parts = parts_of(name, noise)
            writer.add(record, parts)
            cast = cast_bits(CPU, bits.reshape(-1), had_dtype, dtype)
            data = add_difference(cast, dtype, sum_of(parts, shape), parts.ulps).tobytes()
            if new:
                rest = noise.integers(0, 100, (new, *shape[1:])).astype(WIDTH[want]).tobytes()
                record.whole_digest = tensor_digest(TensorInfo("", dtype, (new, *shape[1:])), rest)[:SHORT]
                stored.append(rest)
                data += rest
            records.append(record)
            results[info.name] = tensor_digest(info, data)
        head = TensorInfo("z.head", BY_NAME["F32"], (2, 3))
        stored.append(np.arange(6, dtype=np.int32).tobytes())
        results[head.name] = tensor_digest(head, stored[-1])
        records.append(MixedRecord(head, Mode.WHOLE, results[head.name][:SHORT]))
        index = writer.flush(records, [file for file, _ in files])
        for data in stored:
            writer.append_whole(memoryview(data))
        writer.seal({**metadata, "peru.result": checkpoint_digest(results).hex()}, index, files)
        writer.container.commit()


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    write_safetensors(HERE / "base.safetensors", base())
    write(HERE / "artifact.safetensors")
