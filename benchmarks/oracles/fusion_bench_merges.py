"""Compare Fisher merging and RegMean with fusion_bench on the demo's fine-tunes. Prints the largest difference of each.

    python benchmarks/oracles/fusion_bench_merges.py [--venv /tmp/peru-fusion-bench]

Installs fusion-bench 0.2.33 (a program to compare with; peru contains no code of it) into its own virtual environment. Both
merge from the statistics that peru has collected, fusion_bench in float64. Exits with 1 if a difference exceeds float32 rounding.
fusion_bench adds 1e-6 to every entry of F where peru takes at least --floor, so it is given F without the floor."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from safetensors.torch import load_file

from peru_cli import demo

TASKS = ("digits", "fashion_mnist", "notmnist")
WEIGHTS = {"digits": "1", "fashion_mnist": "0.5", "notmnist": "2"}
TOLERANCE = 1e-6  # weights are of size 1
CASES = {
    "fisher": ["fisher", "--floor", "1e-5", "--max-samples", "10", *(f"--weight={task}={weight}" for task, weight in WEIGHTS.items())],
    "regmean 0.9": ["regmean", "--alpha", "0.9", "--ridge", "0", "--max-samples", "50"],
    "regmean 0.3": ["regmean", "--alpha", "0.3", "--ridge", "0", "--max-samples", "50"],
}
# Runs there: folder of statistics, method, alpha, output; then for each task its weight and checkpoint.
THERE = """
import sys
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
stats, method, alpha, out, *tasks = sys.argv[1:]
found = {}
for file in Path(stats).glob(f"{method}-*.safetensors"):
    found[safe_open(file, "pt").metadata()["peru.task"]] = load_file(file)
names, weights, files = tasks[::3], [float(w) for w in tasks[1::3]], tasks[2::3]
models = [{n: t.double() for n, t in load_file(file).items() if not n.startswith("classifier")} for file in files]
stacked = {name: [model[name] for model in models] for name in models[0]}
if method == "fisher":
    given = [{n: found[task][f"fisher/{n}"].double().clamp(min=1e-5) - 1e-6 for n in stacked} for task in names]
    merged = merging_with_fisher_weights(stacked, given, torch.tensor(weights, dtype=torch.float64), normalize_fisher_weight=False)
else:
    grams = [{n[5:-7]: g for n, g in found[task].items() if n.startswith("gram/") and "classifier" not in n} for task in names]
    merged = merging_with_regmean_weights(stacked, grams, reduce_non_diagonal_ratio=float(alpha))
save_file({name: tensor.contiguous() for name, tensor in merged.items()}, out)
"""


def install(folder: Path) -> Path:
    """Install fusion_bench into its own environment. Returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", "fusion-bench==0.2.33", "torch==2.13.0"], check=True)
    return python


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path("/tmp/peru-fusion-bench"))
    python = install(parser.parse_args().venv)
    failed = False
    for case, options in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            stats, ours, theirs = (Path(folder) / name for name in ("stats", "ours", "theirs.safetensors"))
            command = [sys.executable, "-m", "peru_cli", "merge", *(f"{task}={demo.fine_tune(task)}" for task in TASKS)]
            command += ["--base", demo.BASE, "-o", ours, "--stats", stats, "--dtype", "fp32", "--per-task", "^classifier", "--quiet"]
            command += [part for task in TASKS for part in ("--data", f"{task}={demo.images(task)}")]
            subprocess.run([*map(str, command), "--method", *options], check=True, stdout=subprocess.DEVNULL)
            alpha = options[options.index("--alpha") + 1] if "--alpha" in options else "1"
            given = [
                part
                for task in TASKS
                for part in (task, WEIGHTS[task] if options[0] == "fisher" else "1", str(demo.fine_tune(task) / "model.safetensors"))
            ]
            subprocess.run([str(python), "-c", THERE, str(stats), options[0], alpha, str(theirs), *given], check=True)
            mine = {f"vit.{name}": tensor.double() for name, tensor in load_file(ours / "model.safetensors").items()}
            other = load_file(theirs)
            largest = max(float((mine[name] - tensor).abs().max()) for name, tensor in other.items())
            failed |= largest > TOLERANCE
            print(f"{case:14} {len(other)} tensors, largest difference {largest:.2e}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
