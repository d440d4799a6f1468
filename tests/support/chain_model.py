"""A chain's plain model: for each step, the tensors and side files that were added. Random operations on both."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from peru_cli import cli
from peru_cli.chain.links import read_chain
from peru_cli.console import console

State = dict[str, torch.Tensor]


def call(*arguments: object) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    console.quiet = console.json = console.data_on_stderr = False
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


def first_state(seed: int) -> State:
    """Tensors of several dtypes; an integer, a buffer and an empty one among them."""
    noise = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(60, 8, generator=noise).bfloat16(),
        "layer.weight": torch.randn(8, 9, generator=noise),
        "layer.bias": torch.randn(9, generator=noise).half(),
        "running_mean": torch.randn(9, generator=noise),
        "steps": torch.tensor([0]),
        "empty": torch.zeros(0, 3),
    }


def next_state(state: State, chance: random.Random) -> State:
    """What a step of training makes of it; now and then a tensor appears, or a table of rows grows."""
    noise = torch.Generator().manual_seed(chance.randrange(1 << 30))
    state = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and chance.random() < 0.7:
            changed = torch.rand(tensor.shape, generator=noise) < chance.choice([0.01, 0.1, 1.0])
            state[name] = torch.where(changed, tensor + tensor.abs().clamp(min=0.01) * 0.02, tensor)
    state["steps"] += chance.randrange(2)
    if chance.random() < 0.05 and len(state) < 9:
        state[f"extra.{len(state)}"] = torch.randn(3, generator=noise)
    if chance.random() < 0.05:
        state["layer.bias"][0] = float("nan")
    return state


def same(a: State, b: State) -> bool:
    """Whether two states agree in every bit."""

    def bits(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    return a.keys() == b.keys() and all((a[n].dtype, a[n].shape, bits(a[n])) == (b[n].dtype, b[n].shape, bits(b[n])) for n in a)


class Modelled:
    """A chain in a folder, and what it should hold."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance, self.work, self.run = random.Random(seed), folder, folder / "run"
        self.steps: dict[int, tuple[State, str]] = {}
        self.newest = first_state(seed)
        self.tokenizer = "{}"

    def save(self, state: State, config: str) -> Path:
        """A checkpoint folder with two side files, of which one is mostly that of the step before."""
        folder = self.work / "checkpoint"
        folder.mkdir(exist_ok=True)
        save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(config)
        (folder / "tokenizer.json").write_text("{}" if len(config) % 3 else '{"a": 1}')
        return folder

    def next_step(self) -> int:
        """A step that is not there: mostly one after the last."""
        if self.steps and self.chance.random() < 0.15:
            step = self.chance.randrange(max(self.steps) + 1)
            if step not in self.steps:
                return step
        return max(self.steps, default=0) + self.chance.choice([1, 2, 5, 10])

    def to_add(self) -> tuple[list[object], int, tuple[State, str]]:
        """A command that adds a new step, the step, and what it holds."""
        self.newest = next_state(self.newest, self.chance)
        step, config = self.next_step(), json.dumps({"step": self.chance.randrange(3)})
        source = self.save(self.newest, config)
        every = self.chance.choice([1, 3, 6])
        return ["chain", "add", self.run, source, "--step", step, "--full-every", every, *QUICK], step, (self.newest, config)

    def kept_by_prune(self, every: int) -> set[int]:
        """Steps that pruning keeps."""
        return {step for step in self.steps if step % every == 0 or step == max(self.steps)}

    def wrong(self, step: int) -> str:
        """What is wrong with a step that is read back; empty if nothing is."""
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        code, _, err = call("chain", "get", self.run, step, "-o", out, *QUICK)
        if code:
            return f"get {step}: {err}"
        state, config = self.steps[step]
        if (out / "config.json").read_text() != config or not (out / "tokenizer.json").exists():
            return f"step {step}: other side files"
        return "" if same(load_file(out / "model.safetensors"), state) else f"step {step}: other bits"

    def links(self) -> dict[int, int | None]:
        """What each step stands on."""
        return {step: link.on for step, link in read_chain(self.run).links.items()} if self.run.exists() else {}

    def listed(self) -> list[int]:
        """Steps that the chain says it has; none of them lost."""
        if not self.run.exists():
            return []
        chain = read_chain(self.run)
        assert not chain.losses(), chain.losses()
        return list(chain.links)


QUICK = ("--no-sync", "--threads", 1)
