"""Compare `peru merge` with mergekit on a random family, method by method; prints the largest difference of each.

    python benchmarks/mergekit_oracle.py [--venv /tmp/peru-mergekit]

Installs mergekit 0.1.5 (LGPL: a program to compare with, no code of it is in peru) into a virtual environment of its
own and runs `mergekit-pytorch` on the same files. Exits with 1 if a difference exceeds float32 rounding. mergekit
drops at random with torch's generator, so for DARE the means over seeds are compared, in standard errors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from mergekit_environment import install
from safetensors.torch import load_file, save_file

TASKS = 3
WEIGHTS = [1.0, -0.5, 0.75]
SHAPES = {"a.weight": (211, 130), "b.weight": (97, 64), "c.weight": (40, 300), "c.bias": (401,)}
TOLERANCE = 1e-6  # weights are of size 1
DRAWS = 8

# name, mergekit's method and parameters, its parameters of each model, peru's options
CASES = [
    ("linear", "linear", {"normalize": True}, {}, ["linear"]),
    ("linear, not normalised", "linear", {"normalize": False}, {}, ["linear", "--no-normalize"]),
    ("task_arithmetic", "task_arithmetic", {"lambda": 0.3, "normalize": False}, {}, ["task-arithmetic", "--scale", "0.3"]),
    ("ties", "ties", {"normalize": True}, {"density": 0.2}, ["ties", "--variant", "mergekit", "--keep", "0.2"]),
    (
        "ties, normalize false", "ties", {"normalize": False, "lambda": 0.5}, {"density": 0.6},
        ["ties", "--variant", "mergekit", "--keep", "0.6", "--reduce", "sum", "--scale", "0.5"],
    ),
    (
        "breadcrumbs", "breadcrumbs", {"normalize": False}, {"density": 0.5, "gamma": 0.1},
        ["breadcrumbs", "--keep", "0.5", "--gamma", "0.1", "--scope", "tensor", "--scale", "1"],
    ),
]  # fmt: skip


def make_family(folder: Path) -> dict[str, torch.Tensor]:
    """Base and fine-tunes in float32 with zeros, and no equal magnitudes (mergekit's order of equals is arbitrary)."""
    noise = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=noise) * 0.5 for name, shape in SHAPES.items()}
    save_file(base, folder / "base.safetensors")
    for i in range(TASKS):
        fine = {}
        for name, tensor in base.items():
            change = torch.randn(tensor.shape, generator=noise) * 0.1
            fine[name] = tensor + change * (torch.rand(tensor.shape, generator=noise) > 0.1)
        save_file(fine, folder / f"t{i}.safetensors")
    return base


def run_mergekit(program: Path, folder: Path, method: str, settings: dict[str, object], own: dict[str, object], seed: int = 0):
    """Merge with mergekit-pytorch; the result's tensors."""
    models = [{"model": str(folder / f"t{i}.safetensors"), "parameters": {"weight": w, **own}} for i, w in enumerate(WEIGHTS)]
    config: dict[str, object] = {"merge_method": method, "models": models, "parameters": settings, "dtype": "float32"}
    if method == "slerp":
        config["models"] = [{"model": str(folder / f"t{i}.safetensors")} for i in (0, 1)]
        config["base_model"] = str(folder / "t0.safetensors")
    elif method != "linear":
        config["base_model"] = str(folder / "base.safetensors")
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    out = folder / "mergekit"
    command = [program, folder / "config.yml", out, "--random-seed", str(seed)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"mergekit failed on {method}:\n{done.stderr[-3000:]}")
    return load_file(out / "model.safetensors") if (out / "model.safetensors").exists() else load_file(next(out.glob("*.safetensors")))


def run_peru(folder: Path, options: list[str], tasks: int = TASKS) -> dict[str, torch.Tensor]:
    """Merge with this tree's peru; the result's tensors."""
    out = folder / "peru.safetensors"
    models = [f"t{i}={folder / f't{i}.safetensors'}" for i in range(tasks)]
    weights = [part for i, w in enumerate(WEIGHTS) for part in ("--weight", f"t{i}={w}")] if options[0] != "slerp" else []
    command = [sys.executable, "-m", "peru_cli", "merge", *models, "-o", str(out), "--force", "--no-sync", "-q", *weights]
    base = [] if options[0] in ("linear", "slerp") else ["--base", str(folder / "base.safetensors")]
    subprocess.run([*command, *base, "--method", *options], check=True, stdout=subprocess.DEVNULL)
    return load_file(out)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference of two checkpoints."""
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in SHAPES)


def dare_score(program: Path, folder: Path, base: dict[str, torch.Tensor], method: str) -> float:
    """Mean square difference of the two means over seeds, in its standard error: 1 if both draw alike."""
    settings, own = {"normalize": False, "rescale": True, "rescale_norm": "default"}, {"density": 0.5}
    theirs, ours = [], []
    for seed in range(DRAWS):
        for into, table in (
            (theirs, run_mergekit(program, folder, method, settings, own, seed + 1)),
            (ours, run_peru(folder, [method.replace("_", "-").replace("-linear", ""), "--keep", "0.5", "--seed", str(seed)])),
        ):
            into.append(torch.cat([(table[n] - base[n]).view(-1) for n in SHAPES]).double())
    a, b = torch.stack(theirs), torch.stack(ours)
    error = (a.var(dim=0) + b.var(dim=0)) / DRAWS
    return float((a.mean(dim=0) - b.mean(dim=0)).square()[error > 1e-12].div(error[error > 1e-12]).median() / 0.4549)


def main() -> None:
    """Compare all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "peru-mergekit")
    parser.add_argument("--skip-dare", action="store_true", help="leave out the slow part: two runs for each of many seeds")
    arguments = parser.parse_args()
    program = install(arguments.venv)
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="peru-oracle-") as name:
        folder = Path(name)
        base = make_family(folder)
        print(f"{'method':28}  largest difference")
        for case, method, settings, own, options in CASES:
            found = difference(run_mergekit(program, folder, method, settings, own), run_peru(folder, options))
            worst = max(worst, found)
            print(f"{case:28}  {found:.3g}", flush=True)
        found = difference(run_mergekit(program, folder, "slerp", {"t": 0.3}, {}), run_peru(folder, ["slerp", "--t", "0.3"], tasks=2))
        worst = max(worst, found)
        print(f"{'slerp':28}  {found:.3g}", flush=True)
        for method in () if arguments.skip_dare else ("dare_linear", "dare_ties"):
            score = dare_score(program, folder, base, method)
            print(f"{method:28}  {score:.3f} (difference of means over {DRAWS} seeds in standard errors, squared; 1 is chance)", flush=True)
            if not 0.8 < score < 1.25:
                worst = float("inf")
    if worst > TOLERANCE:
        raise SystemExit(f"a difference is above {TOLERANCE}")


if __name__ == "__main__":
    main()
