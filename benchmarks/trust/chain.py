"""A chain of small checkpoints against a plain model of it: random operations, damage, and kills at random moments.

    python benchmarks/trust/chain.py [--operations 10000] [--seed 0]

After each operation the chain must list just the steps that the model has; a killed one may have happened, or not. Steps are read
back at random and compared in every bit, all of them at the end. Prints counts; a step that is lost or wrong ends it with an error.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.chain_model import QUICK, Modelled, call  # noqa: E402

MOST = 15  # steps that a chain has before it is pruned


class Campaign:
    """One chain, its model, and counts of what was done."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.model, self.chance = Modelled(folder, seed), random.Random(seed + 1)
        self.counts: Counter[str] = Counter()
        self.usual: dict[str, float] = {}  # seconds that a command takes

    def do(self, command: list[object], killed: bool) -> bool:
        """Run a command to its end, or kill it on the way; whether it came to its end."""
        name = str(command[1])
        if not killed:
            began = time.monotonic()
            code, _, err = call(*command)
            assert code == 0, f"{command}: {err}"
            self.usual[name] = time.monotonic() - began
            self.counts[name] += 1
            return True
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = call(*command)[0]
            finally:
                os._exit(code)
        time.sleep(self.chance.random() * 1.1 * self.usual.get(name, 0.05))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), f"{command}: exit code {status}"
        self.counts[f"{name}, killed" if status else name] += 1
        return status == 0

    def add(self) -> None:
        command, step, holds = self.model.to_add()
        done = self.do(command, self.chance.random() < 0.4)
        if not done:
            there = step in self.model.listed()
            self.counts["kills that came too late"] += there
            if not there and self.chance.random() < 0.5:
                done = self.do(command, False)
            done = done or there
        if done:
            self.model.steps[step] = holds

    def prune(self) -> None:
        every = self.chance.choice([2, 3, 5] if len(self.model.steps) <= MOST else [50, 1000])
        kept = self.model.kept_by_prune(every)
        self._drop(["chain", "prune", self.model.run, "--keep-every", every, *QUICK], kept)

    def squash(self) -> None:
        links = self.model.links()
        way = [max(links, key=lambda step: (links[step] is not None, self.chance.random()))]  # a delta, if there is one
        while (on := links[way[-1]]) is not None:
            way.append(on)
        if len(way) > 1:
            first, last = self.chance.choice(way[1:]), way[0]
            kept = {step for step in self.model.steps if not first < step < last}
            self._drop(["chain", "squash", self.model.run, first, last, *QUICK], kept)

    def _drop(self, command: list[object], kept: set[int]) -> None:
        done = self.do(command, self.chance.random() < 0.6)
        there = set(self.model.listed())
        assert kept <= there <= set(self.model.steps) and (there == kept or not done), f"{command}: {there}"
        self.counts["kills halfway"] += kept < there < set(self.model.steps)
        self.model.steps = {step: holds for step, holds in self.model.steps.items() if step in there}

    def read(self) -> None:
        wrong = self.model.wrong(self.chance.choice(sorted(self.model.steps)))
        assert not wrong, wrong
        self.counts["get"] += 1

    def verify(self) -> None:
        self.do(["chain", "verify", self.model.run, "--threads", 1], False)

    def damage(self) -> None:
        """Change a byte of a link, or take it away: just what stands on it must be said to be lost. Then put it back."""
        links, step = self.model.links(), self.chance.choice(sorted(self.model.steps))
        path, away = self.model.run / f"step-{step}.safetensors", self.model.work / "away"
        shutil.copy2(path, away)
        lost = {step}
        for other in sorted(links):
            if links[other] in lost:
                lost.add(other)
        if self.chance.random() < 0.5:
            path.unlink()
            self.counts["links taken away"] += 1
            lost -= set() if any(on == step for on in links.values()) else {step}  # nobody knows that it was there
        else:
            data = bytearray(path.read_bytes())
            data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
            path.write_bytes(data)
            self.counts["bytes changed"] += 1
        code, out, err = call("chain", "verify", self.model.run, "--threads", 1, "--json")
        found = {verdict["step"] for verdict in json.loads(out) if verdict["lost"]}
        assert found == lost and code == bool(lost), f"{sorted(found)} were said to be lost, {sorted(lost)} are: {err}"
        os.replace(away, path)

    def check(self) -> None:
        found = self.model.listed()
        assert found == sorted(self.model.steps), f"the chain lists {found}, and holds {sorted(self.model.steps)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="peru-chain-"))
    campaign = Campaign(folder, options.seed)
    weights = {"add": 45, "prune": 5, "squash": 9, "read": 27, "verify": 6, "damage": 8}
    try:
        for number in range(options.operations):
            (name,) = campaign.chance.choices(list(weights), list(weights.values())) if campaign.model.steps else ("add",)
            getattr(campaign, "prune" if len(campaign.model.steps) > MOST else name)()
            campaign.check()
            if (number + 1) % 500 == 0:
                print(number + 1, dict(campaign.counts), flush=True)
        for step in campaign.model.steps:
            assert not (wrong := campaign.model.wrong(step)), wrong
    finally:
        shutil.rmtree(folder)
    print(f"{options.operations} operations, {len(campaign.model.steps)} steps at the end; no step was lost or wrong")
    for name, times in sorted(campaign.counts.items()):
        print(f"{times:7,}  {name}")


if __name__ == "__main__":
    main()
