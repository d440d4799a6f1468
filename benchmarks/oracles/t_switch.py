"""Compare `prune --scope sign --values sign` with T-Switch's authors' program on noise over the demo's base. Prints the largest difference.

    git clone https://github.com/lfy-123/Binary-Task-Switch
    python benchmarks/oracles/t_switch.py Binary-Task-Switch/merge_vit/merge_vit.py

Runs two functions of that file, process_matrix and binarize_matrix (peru contains no code of it). Exits with 1 if they keep
other entries, or a scale differs by more than float32's rounding. Shares are exact in doubles: of 10% their 1 - 0.9 is a little
less, and an entry of some tensors is lost. The authors leave tensors without dimensions as they are; the base has none.
"""

from __future__ import annotations

import argparse
import ast
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from peru_cli import cli, demo

TOLERANCE = 1e-6  # of the scale


def authors(file: Path) -> dict[str, Any]:
    """Their two functions."""
    tree = ast.parse(file.read_text("utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in ("process_matrix", "binarize_matrix")]
    names: dict[str, Any] = {"torch": torch, "logger": logging.getLogger("authors")}
    exec(compile(ast.Module(wanted, []), str(file), "exec"), names)
    return names


def main() -> None:
    """Compare at three drop ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the authors' merge_vit.py")
    theirs = authors(parser.parse_args().file)
    logging.disable()
    noise = torch.Generator().manual_seed(1)
    base = {name: tensor.float() for name, tensor in load_file(Path(demo.BASE) / "model.safetensors").items()}
    fine = {n: t + 0.01 * torch.randn(t.shape, generator=noise) * (1 + torch.rand(t.shape, generator=noise)) ** 3 for n, t in base.items()}
    failed = False
    for percent in (50, 25, 3.125):
        vectors = {n: sum(theirs["process_matrix"](fine[n] - base[n], 1 - percent / 100, n)) for n in base}
        vectors, _, _ = theirs["binarize_matrix"](vectors)
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, f"{name}.safetensors") for name in ("base", "fine", "artifact", "back")]
            save_file(base, files[0])
            save_file(fine, files[1])
            how = ["--keep", f"{percent}%", "--scope", "sign", "--values", "sign", "--no-sync", "--quiet"]
            assert cli.run(["prune", str(files[1]), "-b", str(files[0]), "-o", str(files[2]), *how]) == 0
            assert cli.run(["unpack", str(files[2]), "-b", str(files[0]), "-o", str(files[3]), "--no-sync", "--quiet"]) == 0
            got = load_file(files[3])
        worst = max(float((got[n] - (base[n] + vectors[n])).abs().max() / vectors[n].abs().max()) for n in base)
        apart = sum(int(((got[n] != base[n]) != (vectors[n] != 0)).sum()) for n in base)
        kept = sum(int((tensor != 0).sum()) for tensor in vectors.values())
        print(f"--keep {percent}%: {kept:,} entries kept, {apart} by one of the two only; largest difference {worst:.1e} of a scale")
        failed |= bool(apart) or worst > TOLERANCE
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
