"""Compare packs with fusion_bench's port of RanDeS on a tiny GPT-2 and a tiny CLIP. Prints the largest difference of each variant.

    python benchmarks/oracles/randes.py [--venv /tmp/peru-fusion-bench]

fusion-bench 0.2.33 runs in its own virtual environment (a program to compare with; peru contains no code of it). Its signs and
orders come from NumPy's and Python's generators. They are passed to `peru shuffle-pack` and `peru unpack` in place of ours, and the
retrieved tasks are compared. Exits with 1 if a difference exceeds rounding. Skip rates are left out: fusion_bench takes the
second of every two target tensors, peru the first block of every two."""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers as tr
from fusion_bench_merges import install
from safetensors.torch import load_file, save_file

from peru_cli import cli
from peru_cli.methods.compact import superpose

SEED, SCALE, TASKS = 42, 0.7, ("a", "b", "c")
TOLERANCE = 2e-7  # weights are below 1: some roundings to float32, and half a step of 2^-20 of the differences a task
VARIANTS = {  # fusion_bench's mode and shift_layers, our options
    "task arithmetic": ("identity_matrix", 0, ["--decorrelate", "none", "--no-signs"]),
    "TA + Shuffle": ("identity_matrix", -1, ["--no-signs"]),
    "TA + Shift": ("identity_matrix", 1, ["--no-signs", "--decorrelate", "shift"]),
    "STA": ("random_binary_diagonal_matrix", 0, ["--decorrelate", "none"]),
    "STA + Shuffle": ("random_binary_diagonal_matrix", -1, []),
    "STA + Shift": ("random_binary_diagonal_matrix", 1, ["--decorrelate", "shift"]),
}
# Runs there: folder, mode, shift_layers, seed.
THERE = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from fusion_bench.method.randes import SuperposedTaskArithmeticAlgorithm
folder, mode, shift, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
base = load_file(folder / "base.safetensors")
vectors = {t: {n: v - base[n] for n, v in load_file(folder / f"{t}.safetensors").items()} for t in "abc"}
method = SuperposedTaskArithmeticAlgorithm(
    scaling_factor=1.0, mode=mode, target_layer=["mlp_w", "attn_w"], random_seed=seed, different_across_layers=False,
    joint_matrix_mode="flatten_1d", rank=1, random_components=False, shift_layers=shift, absorber="None", debug=0,
    ms_mode="average", verbose=0, dropout_rate=1,
)
found, _ = method._compress_and_retrieve(vectors, mode="superposed_task_arithmetic")
for task, table in found.items():
    save_file({n: v.contiguous() for n, v in table.items()}, folder / f"theirs-{task}.safetensors")
"""


def models() -> dict[str, torch.nn.Module]:
    """A GPT-2, and a CLIP with two towers."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 2}
    clip = tr.CLIPConfig(text_config={**tower, "vocab_size": 60}, vision_config={**tower, "image_size": 8, "patch_size": 4})
    return {"GPT-2": tr.GPT2Model(tr.GPT2Config(n_embd=32, n_layer=6, n_head=2, vocab_size=60, n_positions=16)), "CLIP": tr.CLIPModel(clip)}


def their_signs(seed: int, task: str, tensor: str, count: int) -> np.ndarray:
    """The signs by which fusion_bench multiplies columns; float32 (count,)."""
    return np.random.RandomState(SEED + TASKS.index(task)).binomial(p=0.5, n=1, size=(1, count))[0].astype(np.float32) * 2 - 1


def their_order(seed: int, task: str, prefix: str, depth: int) -> list[int]:
    """Where fusion_bench moves each layer."""
    order = list(range(depth))
    random.Random(SEED + TASKS.index(task)).shuffle(order)
    return order


def peru(*arguments: object) -> None:
    """Run a command in this process, with their random numbers."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.run([str(argument) for argument in arguments])
    if code:
        sys.exit(said.getvalue())


def compare(python: Path, folder: Path, mode: str, shift: int, options: list[str]) -> float:
    """The largest difference between both retrieved tasks."""
    subprocess.run([python, "-c", THERE, folder, mode, str(shift), str(SEED)], check=True, stdout=subprocess.DEVNULL)
    base, pack, out = folder / "base.safetensors", folder / "pack.safetensors", folder / "out.safetensors"
    fine = [f"{task}={folder / f'{task}.safetensors'}" for task in TASKS]
    targets = ("--target", "mlp|attn", "--exclude", "bias", "--precision", 20, "--scale", SCALE)
    peru("shuffle-pack", *fine, "-b", base, "-o", pack, "--force", "--no-sync", *targets, *options)
    largest, start = 0.0, load_file(base)
    for task in TASKS:
        peru("unpack", pack, "--task", task, "-b", base, "-o", out, "--force", "--no-sync")
        theirs, ours = load_file(folder / f"theirs-{task}.safetensors"), load_file(out)
        for name, vector in theirs.items():
            wanted = start[name].double() + SCALE * vector.double()
            largest = max(largest, float((ours[name].double() - wanted).abs().max()))
    return largest


def main() -> None:
    """Run all variants on all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path("/tmp/peru-fusion-bench"))
    python = install(parser.parse_args().venv)
    superpose.signs, superpose.permutation = their_signs, their_order
    failed = False
    for label, model in models().items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
            save_file(base, folder / "base.safetensors")
            for number, task in enumerate(TASKS):
                noise = torch.Generator().manual_seed(number)
                save_file(
                    {name: tensor + 0.01 * torch.randn(tensor.shape, generator=noise) for name, tensor in base.items()},
                    folder / f"{task}.safetensors",
                )
            for variant, (mode, shift, options) in VARIANTS.items():
                largest = compare(python, folder, mode, shift, options)
                failed |= largest > TOLERANCE
                print(f"{label:6} {variant:16} largest difference {largest:.2e}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
