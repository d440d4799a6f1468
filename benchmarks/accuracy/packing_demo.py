"""Packs of the demo family: mean normalised accuracy of every variant at several scales, with bytes; nothing is chosen.

    python benchmarks/accuracy/packing_demo.py [--scales 0.5 0.7 1] [--examples 500]

Four fine-tunes of the shipped vision transformer (bfloat16, 510,192 parameters), with their heads kept for each task. Made with
`peru shuffle-pack` and judged with `peru eval` on the shipped test images. A scale changes no sum, only the stored scale. The last
rows are PERU-FFT and Post-Pruning at about a pack's bytes. Prints a table."""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from packing import PERU
from packing import VARIANTS as ALL

from peru_cli import demo

LEFT_OUT = {"STA + Shuffle, all tensors", "magnitude masks 10%"}
VARIANTS = {name: options for name, options in ALL.items() if name not in LEFT_OUT}
HEADS = ["--base", demo.BASE, "--per-task", "^(vit\\.)?classifier"]


def peru(*arguments: object) -> Any:
    """Run a command. Returns its report."""
    done = subprocess.run([*PERU, *map(str, arguments), "--json", "--quiet"], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def normalised(subjects: list[str], base: object, examples: int) -> float:
    """Mean over tasks of accuracy / the fine-tune's, in %."""
    given = [
        word for task in demo.tasks() for word in ("--data", f"{task}={demo.images(task)}", "--against", f"{task}={demo.fine_tune(task)}")
    ]
    found = peru("eval", *subjects, "--base", base, *given, "--max-samples", examples)["tasks"]
    return 100 * sum(float(task["metrics"]["normalised"]["value"]) for task in found) / len(found)


def size(folder: Path) -> int:
    """Bytes of the tensors' files directly in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", nargs="+", default=["0.5", "0.7", "1"])
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--density", default="14%", help="of PERU-FFT and Post-Pruning")
    arguments = parser.parse_args()
    tasks = list(demo.tasks())
    models = [f"{task}={demo.fine_tune(task)}" for task in tasks]
    print(f"| method | bytes | {' | '.join(f'scale {scale}' for scale in arguments.scales)} |")
    print(f"| --- | ---: | {'---: | ' * len(arguments.scales)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, options in VARIANTS.items():
            cells = []
            for scale in arguments.scales:
                pack = folder / "pack.safetensors"
                peru("shuffle-pack", *models, *HEADS, "-o", pack, "--scale", scale, "--no-sync", "--force", *options)
                cells.append(f"{normalised([str(pack)], demo.BASE, arguments.examples):.2f}")
            print(f"| {name} | {pack.stat().st_size:,} | {' | '.join(cells)} |", flush=True)
        fft, pruned = folder / "fft", folder / "pruned"
        peru("merge", *models, *HEADS, "-o", fft, "--method", "task-arithmetic", "--compress", arguments.density)
        peru("prune", *models, *HEADS, "-o", f"{pruned}/", "--keep", arguments.density)
        for name, made, base in (("PERU-FFT", fft, fft / "merged"), ("Post-Pruning", pruned, demo.BASE)):
            found = normalised([f"{task}={made / f'{task}.safetensors'}" for task in tasks], base, arguments.examples)
            more = ", the merge in the base's place" if made == fft else ""
            print(f"| {name} {arguments.density}{more} | {size(made):,} | {found:.2f} | {'| ' * (len(arguments.scales) - 1)}", flush=True)


if __name__ == "__main__":
    main()
