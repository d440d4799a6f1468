"""How fast `peru_cli.diff` is, how much memory it takes, and how near its bytes come to the entropy of what changed.

    python benchmarks/speed/diff.py [--entries 200000000] [--threads 1]

Weights are normal, in bfloat16, in tensors of 2^24 entries; the share of entries that changes moves by one or two units in the last place.
The order-0 bound is n times the entropy of "changed or not", and for each changed entry the entropy of the steps.
"""

from __future__ import annotations

import argparse
import math
import resource
import time

import torch

import peru_cli
from peru_cli.streaming.engine import available_threads

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


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=200_000_000)
    parser.add_argument("--threads", type=int, default=available_threads())
    options = parser.parse_args()
    peru_cli.diff(*(2 * [weights(1000)]))  # imports and compiled loops
    old = weights(options.entries)
    print("| changed | GB/s of checkpoint and core | MB more than the inputs | bytes | of the bound | bits a parameter |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for share in (0.001, 0.01, 0.1):
        new, bound = change(old, share)
        before, began = peak(), time.process_time()
        data = peru_cli.diff(old, new, threads=options.threads)
        took, more = time.process_time() - began, peak() - before
        nbytes = 2 * options.entries
        print(
            f"| {share:.1%} | {nbytes / took / 1e9:.2f} | {more / 1e6:.0f} | {len(data):,} | {len(data) / bound:.3f} "
            f"| {8 * len(data) / options.entries:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
