"""How fast `peru_cli.diff`, `Updates` and `patches` are, how much memory they take, and how near the bytes come to the change's entropy.

    python benchmarks/speed/diff.py [--entries 200000000] [--rounds 5] [--folder /tmp]

Weights are normal, in bfloat16, in tensors of 2^24 entries; the share of entries that changes moves by one or two units in the last place.
The order-0 bound is n times the entropy of "changed or not", and for each changed entry the entropy of the steps. One thread; seconds
are of the processor, the best of some rounds in turns. `diff` must digest old and new weights: how fast BLAKE3 alone does that, in chunks
of 32 kB as peru takes them, is the first column. `Updates` and `patches` digest half of that. Memory is the peak of resident memory above
what was there before.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import save_file

import peru_cli

_TENSOR = 1 << 24
_STEPS = {-2: 0.1, -1: 0.4, 1: 0.4, 2: 0.1}


def weights(entries: int) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    sizes = [min(_TENSOR, entries - at) for at in range(0, entries, _TENSOR)]
    return {f"layer.{i}": torch.randn(n, generator=noise, dtype=torch.float32).mul_(0.02).bfloat16() for i, n in enumerate(sizes)}


def change(old: dict[str, torch.Tensor], share: float) -> tuple[dict[str, torch.Tensor], float]:
    """New weights, and the order-0 bound in bytes."""
    noise = torch.Generator().manual_seed(1)
    steps = torch.tensor(list(_STEPS), dtype=torch.int16)
    chances, counts, total, changed, new = torch.tensor(list(_STEPS.values())), torch.zeros(4), 0, 0, dict[str, torch.Tensor]()
    for name, tensor in old.items():
        where = torch.rand(len(tensor), generator=noise).lt_(share).bool().nonzero()[:, 0]
        which = torch.multinomial(chances, len(where), replacement=True, generator=noise)
        new[name] = tensor.clone()
        new[name].view(torch.int16)[where] += steps[which]
        counts += torch.bincount(which, minlength=4)
        total, changed = total + len(tensor), changed + len(where)
    bits = changed * _entropy((counts / changed).tolist()) + total * _entropy([changed / total, 1 - changed / total])
    return new, bits / 8


def _entropy(shares: list[float]) -> float:
    return -sum(share * math.log2(share) for share in shares if share)


def resident(what: str) -> int:
    """Bytes of resident memory now (VmRSS) or at most since `forget_peak` (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def measured(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds of the processor, and bytes of memory besides what was there."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before, began = resident("VmRSS"), time.process_time()
    call()
    return time.process_time() - began, max(0, resident("VmHWM") - before)


def digest(*models: dict[str, torch.Tensor]) -> None:
    """BLAKE3 of all chunks of 32 kB."""
    hasher = blake3()
    for model in models:
        for tensor in model.values():
            data = memoryview(tensor.view(torch.uint8).numpy())
            for at in range(0, len(data), 1 << 15):
                hasher.reset()
                hasher.update(data[at : at + (1 << 15)]).digest()


def step(updates: peru_cli.Updates, turns: Iterator[dict[str, torch.Tensor]]) -> None:
    """The next update; old and new weights take turns."""
    updates.next(next(turns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=200_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the base and the artifact are written, for patches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peru_cli.diff(*(2 * [weights(1000)]))  # imports and compiled loops
    old = weights(options.entries)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        base, update = Path(name) / "base.safetensors", Path(name) / "update.safetensors"
        save_file(old, base)
        heads = (
            "changed",
            "digests alone, GB/s",
            "diff, GB/s",
            "Updates, GB/s",
            "patches, GB/s",
            "diff, MB",
            "Updates, MB",
            "patches, MB",
            "bytes",
            "of the bound",
            "bits a parameter",
        )
        print("| " + " | ".join(heads) + " |\n| " + " | ".join(["---:"] * len(heads)) + " |")
        for share in (0.001, 0.01, 0.1):
            new, bound = change(old, share)
            data = peru_cli.diff(old, new, threads=1)
            update.write_bytes(data)
            updates = peru_cli.Updates(old, threads=1)
            updates.next(new)  # the first one has no digests yet
            calls: list[Callable[[], object]] = [
                partial(digest, old, new),
                partial(peru_cli.diff, old, new, threads=1),
                partial(step, updates, cycle((old, new))),
                lambda: deque(peru_cli.patches(update, base), 0),
            ]
            runs = [[measured(call) for call in calls] for _ in range(options.rounds)]
            speeds = [2 * options.entries / min(seconds for seconds, _ in each) / 1e9 for each in zip(*runs, strict=True)]
            memory = [max(nbytes for _, nbytes in each) / 1e6 for each in zip(*runs, strict=True)]
            figures = [f"{speed:.2f}" for speed in speeds] + [f"{nbytes:.0f}" for nbytes in memory[1:]]
            print(
                f"| {share:.1%} | {' | '.join(figures)} | {len(data):,} "
                f"| {len(data) / bound:.3f} | {8 * len(data) / options.entries:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
