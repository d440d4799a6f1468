"""What FP8 weights cost: processor seconds and peak memory of commands on FP8 checkpoints and on the same weights in bf16.

    python benchmarks/speed/fp8.py [--sizes 100 400]

Sizes are MB of the bf16 checkpoint. Blocks of 128 x 128 with float32 scales (DeepSeek's layout), matrices of 1024 x 4096."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from measured import PERU, measure
from safetensors.torch import save_file

BLOCK = 128
ROWS, COLUMNS = 1024, 4096


def checkpoint(folder: Path, matrices: int, seed: int, fp8: bool) -> Path:
    """Random codes; another seed moves a few of them. In bf16 the same weights, rounded as peru reads them."""
    folder.mkdir()
    tensors = {}
    for i in range(matrices):
        random = torch.Generator().manual_seed(i)
        weight = torch.randn(ROWS, COLUMNS, generator=random)
        weight += seed * 0.02 * torch.randn(ROWS, COLUMNS, generator=random)
        blocks = weight.view(ROWS // BLOCK, BLOCK, COLUMNS // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        name = f"model.layers.{i}.mlp.up_proj.weight"
        if fp8:
            tensors |= {name: codes.view(ROWS, COLUMNS), f"{name}_scale_inv": scale}
        else:
            tensors[name] = (codes.float() * scale[:, None, :, None]).view(ROWS, COLUMNS).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}} if fp8 else {}
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **said}))
    return folder


def main() -> None:
    """Measure every command once on each form and size, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 400], help="MB of a checkpoint in bf16")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="for the files")
    sizes = parser.parse_args()
    print("| command | MB in bf16 | bf16: CPU s, peak MB | FP8: CPU s, peak MB | time |\n| --- | ---: | ---: | ---: | ---: |")
    for megabytes in sizes.sizes:
        with tempfile.TemporaryDirectory(dir=sizes.folder) as text:
            work, matrices = Path(text), max(1, round(megabytes * 1e6 / (2 * ROWS * COLUMNS)))
            costs: dict[str, list[tuple[float, int]]] = {}
            for form in ("bf16", "fp8"):
                base, a, b = (checkpoint(work / f"{form}-{i}", matrices, i, form == "fp8") for i in range(3))
                at = ["-b", base, "--no-sync", "--force", "-o"]
                commands = {
                    "prune --keep 10%": ["prune", a, *at, work / "o.safetensors", "--keep", "10%"],
                    "prune --lossless": ["prune", a, *at, work / "o.safetensors", "--lossless"],
                    "merge -m task-arithmetic": ["merge", f"a={a}", f"b={b}", *at, work / "m.safetensors", "-m", "task-arithmetic"],
                    "shuffle-pack": ["shuffle-pack", f"a={a}", f"b={b}", *at, work / "p.safetensors"],
                }
                for name, command in commands.items():
                    cost = measure([*PERU, *command])
                    if cost.code:
                        raise SystemExit(f"{name} of {form} weights ended with {cost.code}")
                    costs.setdefault(name, []).append((cost.cpu, cost.peak_mb))
            for name, ((cpu, peak), (cpu8, peak8)) in costs.items():
                row = f"{megabytes} | {cpu:.1f}, {peak} | {cpu8:.1f}, {peak8} | {cpu8 / cpu:.2f} times"
                print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
