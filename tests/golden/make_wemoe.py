"""Makes the golden gated MLPs beside this file: `python tests/golden/make_wemoe.py`.

Two tasks over a base with an MLP of linear layers, one of Conv1D layers (stored as in, out), other tensors, and heads. The last bits of
factors depend on the machine's linear algebra, so tests read this file; they do not make it again."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent / "wemoe"
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np  # noqa: E402

from tests.golden.make import Tensors, steps, to_bf16, weights, write_model  # noqa: E402

SHAPES = {
    "embed.weight": (9, 6),
    "h.0.attn.c_attn.weight": (6, 18),
    "h.0.fc1.weight": (9, 6),
    "h.0.fc1.bias": (9,),
    "h.0.fc2.weight": (6, 9),
    "h.1.mlp.c_fc.weight": (6, 8),
    "h.1.mlp.c_proj.weight": (8, 6),
    "norm.weight": (6,),
}
MLPS = [name for name in SHAPES if "fc" in name or "mlp" in name]
OPTIONS = ["--method", "wemoe", "--steps", "0", "--bits", "64", "--router-layers", "2", "--seed", "5", "--base-id", "example/base@0123abc"]
CONFIG = {"config.json": '{"model_type": "gpt2"}\n'}


def base() -> Tensors:
    """F32, and BF16 for the second MLP."""
    tensors: Tensors = {"ids": ("I64", np.arange(5, dtype=np.int64))}
    for seed, (name, shape) in enumerate(SHAPES.items(), 20):
        array = weights(shape, seed, bits=14)
        tensors[name] = ("BF16", to_bf16(array)) if "mlp" in name else ("F32", array)
    return tensors


def fine_tune(number: int) -> Tensors:
    """Behind a prefix, with a head. The second task leaves `c_proj` as it is."""
    tensors: Tensors = {"enc.ids": ("I64", np.arange(5, dtype=np.int64)), "head": ("F32", weights((3 + number, 6), 90 + number))}
    for seed, (name, shape) in enumerate(SHAPES.items(), 100 * number + 300):
        array = weights(shape, 20 + list(SHAPES).index(name), bits=14)
        moved = array if number and "c_proj" in name else array + steps(shape, seed)
        tensors["enc." + name] = ("BF16", to_bf16(moved)) if "mlp" in name else ("F32", moved)
    return tensors


def write_family(folder: Path) -> list[str]:
    """Base and fine-tunes; the command line that packs them."""
    write_model(folder / "base", base(), CONFIG)
    for number, task in enumerate("ab"):
        write_model(folder / task, fine_tune(number), CONFIG | {"vocab.txt": "a\nb\n"})
    return ["shuffle-pack", f"b={folder}/b", f"a={folder}/a", "-b", f"{folder}/base", *OPTIONS]


if __name__ == "__main__":
    if HERE.exists():
        shutil.rmtree(HERE)
    HERE.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        command = write_family(Path(scratch))
        subprocess.run([sys.executable, "-m", "peru_cli", *command, "-o", HERE / "wemoe.safetensors"], check=True)
