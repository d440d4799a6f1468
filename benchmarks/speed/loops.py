"""Time the compiled loops (peru_cli/kernels) beside NumPy passes that do the same: processor nanoseconds an entry, one thread.

    python benchmarks/speed/loops.py

A tile of 2^18 bf16 entries, about half of which changed; three task vectors. The least of ten runs each.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from peru_cli.kernels.deltas import Room
from peru_cli.kernels.merging import verbs
from peru_cli.kernels.random import below

N = 1 << 18


def least(run: Callable[[], object]) -> float:
    """Processor nanoseconds an entry."""
    run()
    found = []
    for _ in range(10):
        begin = time.process_time()
        run()
        found.append(time.process_time() - begin)
    return min(found) / N * 1e9


def widened(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def main() -> None:
    """Print a table."""
    noise = np.random.default_rng(0)
    weights = noise.normal(size=N).astype(np.float32) * 0.02
    base, fine = ((w.view(np.uint32) >> 16).astype(np.uint16) for w in (weights, weights + noise.laplace(size=N).astype(np.float32) * 6e-5))
    room = Room(N, "f4")
    keys = np.sort(room.keys(base, fine, "BF16"))
    low, high = int(keys[int(0.895 * N)]), int(keys[int(0.905 * N)])
    vectors = [noise.standard_normal(N).astype(np.float32) for _ in range(3)]
    flags = [noise.random(N) < 0.2 for _ in range(3)]
    total = np.zeros(N, np.float32)

    def passes() -> tuple[np.ndarray, int, int]:
        key = np.abs(widened(fine) - widened(base)).view(np.int32)
        key[base == fine] = -1
        return key[(key >= low) & (key <= high)], np.count_nonzero(key > high), np.count_nonzero(key >= 0)

    def elect() -> np.ndarray:
        votes = [vector * flag for vector, flag in zip(vectors, flags, strict=True)]
        signs = np.where(votes[0] + votes[1] + votes[2] >= 0, np.float32(1), np.float32(-1))
        agree = [np.maximum(vote * signs, 0) for vote in votes]
        count = sum(part > 0 for part in agree)
        return (agree[0] + agree[1] + agree[2]) / np.maximum(count, 1, dtype=np.float32) * signs

    def added() -> np.ndarray:
        return np.add(total, (widened(fine) - vectors[0]) * np.float32(0.3), out=total)

    factors, ones = [(1.0, 1.0)] * 3, [1.0] * 3
    cases: list[tuple[str, Callable[[], object], Callable[[], object] | None]] = [
        ("random words below a limit", lambda: below((1, 2), 0, N, 1 << 30), None),
        ("difference, key, count of a window", lambda: room.count(base, fine, "BF16", low, high), passes),
        ("threshold, positions and ULP codes of 10%", lambda: room.select(base, fine, "BF16", low), None),
        ("the same, and squared norms", lambda: room.select(base, fine, "BF16", low, np.zeros((N >> 14, 2))), None),
        ("difference, weight, add", lambda: verbs.accumulate(total, fine, "BF16", vectors[0], None, (0.3, 1.0), False), added),
        ("trim", lambda: verbs.trim(vectors[0], 0x3F00_0000), None),
        ("elect and merge three tasks", lambda: verbs.disjoint(vectors, flags, factors, ones, ones, False, total), elect),
        ("round to bf16", lambda: verbs.narrowed(vectors[0], "BF16"), None),
    ]
    print(f"{'ns an entry':45}{'loop':>7}{'NumPy':>8}")
    for name, loop, numpy_passes in cases:
        print(f"{name:45}{least(loop):7.2f}{f'{least(numpy_passes):8.2f}' if numpy_passes else ''}", flush=True)


if __name__ == "__main__":
    main()
