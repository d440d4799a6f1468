"""`peru unpack --in-place` killed at random moments: the checkpoint is the old one, the new one, or half patched and said to be.

    python benchmarks/trust/in_place.py [--kills 100] [--entries 20000000] [--seed 0]

Each round starts from the base, kills the command, and kills what finishes it now and then, too. After each kill peru is asked to read
the checkpoint; then the same command must finish it, bit for bit. Prints counts, and what the command costs next to copying.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.chain_model import call  # noqa: E402

SHARDS = 3


def write(folder: Path, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    files = {name: f"model-{int(name) % SHARDS + 1:05d}-of-{SHARDS:05d}.safetensors" for name in state}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"folder": folder.name}))


def same(a: Path, b: Path) -> bool:
    return all((a / path.name).read_bytes() == path.read_bytes() for path in b.iterdir() if path.suffix == ".safetensors")


class Campaign:
    def __init__(self, work: Path, entries: int, seed: int) -> None:
        noise, self.chance = torch.Generator().manual_seed(seed), random.Random(seed)
        sizes = [entries // 12] * 12
        old = {str(i): torch.randn(n, generator=noise).bfloat16() for i, n in enumerate(sizes)}
        new = {name: torch.where(torch.rand(len(t), generator=noise) < 0.01, t * 1.02, t) for name, t in old.items()}
        self.old, self.new, self.work, self.artifact = work / "old", work / "new", work / "now", work / "a.safetensors"
        write(self.old, old)
        write(self.new, new)
        self.run("prune", self.new, "--base", self.old, "-o", self.artifact, "--lossless")
        self.command = ["unpack", self.artifact, "--base", self.work, "--in-place"]
        self.counts: Counter[str] = Counter()

    def run(self, *arguments: object) -> None:
        code, _, err = call(*arguments)
        assert code == 0, err

    def reset(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.old, self.work)

    def kill(self, seconds: float) -> bool:
        """Run the command in a child and kill it after so long; whether it was still at work."""
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = call(*self.command)[0]
            finally:
                os._exit(code)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        return status != 0

    def state(self) -> str:
        """What a reader finds: `old`, `new`, `half patched` or something that must not be."""
        code, _, err = call("inspect", self.work)
        if code:
            return "half patched" if "is half patched" in err else f"UNREADABLE: {err}"
        if same(self.work, self.new):
            return "new"
        return "old" if same(self.work, self.old) else "WRONG WEIGHTS WITHOUT A WORD"

    def round(self, usual: float) -> None:
        self.reset()
        while True:
            if not self.kill(self.chance.random() * usual):
                self.counts["not killed: done before"] += 1
                break
            found = self.state()
            self.counts[f"killed, {found}"] += 1
            assert found in ("old", "new", "half patched"), found
            if self.chance.random() < 0.5:
                break
        self.run(*self.command)
        assert self.state() == "new", self.state()
        assert (self.work / "config.json").read_bytes() == (self.new / "config.json").read_bytes()
        left = sorted(path.name for path in self.work.iterdir() if path.name.startswith("."))
        assert not left, left

    @property
    def kills(self) -> int:
        return sum(times for what, times in self.counts.items() if what.startswith("killed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--entries", type=int, default=20_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="peru-in-place-"))
    try:
        campaign = Campaign(folder, options.entries, options.seed)
        campaign.reset()
        began = time.monotonic()
        code, out, err = call(*campaign.command, "--json")
        usual, done = time.monotonic() - began, json.loads(out)
        assert code == 0 and campaign.state() == "new", err
        nbytes = sum(path.stat().st_size for path in campaign.old.glob("*.safetensors"))
        while campaign.kills < options.kills:
            campaign.round(usual)
    finally:
        shutil.rmtree(folder)
    print(f"{nbytes / 1e6:.0f} MB, 1% changed: {usual:.2f} s; the journal took {done['journal_bytes'] / nbytes:.2%} of the checkpoint")
    print(f"{campaign.kills} kills; no checkpoint was lost, and none was wrong without a word")
    for name, times in sorted(campaign.counts.items()):
        print(f"{times:5}  {name}")


if __name__ == "__main__":
    main()
