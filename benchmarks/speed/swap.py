"""What a swap of a loaded pack costs: from one task to the next in memory.

    peru shuffle-pack a=A b=B c=C -b BASE -o pack.safetensors
    python benchmarks/speed/swap.py pack.safetensors BASE/model.safetensors [--swaps 40]

Milliseconds by the clock and of the processor, least and middle of all swaps, and the same of the floor: a copy of as many bytes by torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

import peru_cli


def cost(act: Callable[[int], object], times: int) -> str:
    """Cells of a table: least and middle milliseconds, by the clock and of the processor."""
    clock, processor = [], []
    for turn in range(times):
        began, used = time.perf_counter(), time.process_time()
        act(turn)
        clock.append(1000 * (time.perf_counter() - began))
        processor.append(1000 * (time.process_time() - used))
    return " | ".join(f"{found:.1f}" for spent in (clock, processor) for found in (min(spent), sorted(spent)[times // 2]))


def main() -> None:
    """Swap and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--swaps", type=int, default=40)
    arguments = parser.parse_args()
    base = load_file(arguments.base)
    copies = {name: tensor.clone() for name, tensor in base.items()}
    print(f"{sum(tensor.numel() for tensor in base.values()):,} parameters\n")
    print("| | ms, least | middle | CPU ms, least | middle |\n| --- | ---: | ---: | ---: | ---: |")
    print("| copy |", cost(lambda _: [copies[name].copy_(tensor) for name, tensor in base.items()], arguments.swaps), "|")
    with peru_cli.open_artifact(arguments.pack) as pack:
        pack.load()
        names = list(pack.tasks)
        with peru_cli.apply(dict(base), pack, task=names[-1]) as applied:
            print("| swap |", cost(lambda turn: applied.switch(names[turn % len(names)]), arguments.swaps), "|")


if __name__ == "__main__":
    main()
