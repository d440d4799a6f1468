"""Compare `peru merge` with mergekit on a random family, method by method. Prints the largest difference of each.

    python benchmarks/oracles/mergekit/methods.py [--venv /tmp/peru-mergekit] [METHOD ...]

Installs mergekit 0.1.5 (LGPL: a program to compare with; peru contains no code of it) into its own virtual environment and
runs `mergekit-pytorch` on the same files. Methods, parameters and their names in mergekit come from the table of methods
(`Method.mergekit`): a new line there is compared without any change here. CASES adds values other than the defaults.
Tensors have the names and shapes of tiny Llama and BERT models. Exits with 1 if a difference exceeds float32 rounding.
Methods that drop at random use other generators, so their means and variances over seeds are compared."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path

import torch
from environment import install
from safetensors.torch import load_file, save_file

from peru_cli import cli
from peru_cli.methods.parameters import Value
from peru_cli.methods.table import METHODS, Method, effective_values, shown

TASKS = 3
WEIGHTS = [1.0, 0.5, 0.75]
SHAPES = {
    "model.embed_tokens.weight": (96, 32),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.self_attn.k_proj.weight": (16, 32),
    "model.layers.0.mlp.up_proj.weight": (80, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 80),
    "model.norm.weight": (32,),
    "bert.encoder.layer.0.output.dense.weight": (48, 96),
    "bert.encoder.layer.0.output.dense.bias": (48,),
    "bert.pooler.dense.weight": (401, 131),
}
TOLERANCE = 1e-6  # relative to the largest weight, of size 1
BESIDES = {"arcee-fusion": 1e-4}  # entries at the threshold: the program rounds the divergence to float32
# The program computes in float32 and adds the rounding of a vector that is 0: its own formula in float32 is off by 1.3e-6 from the one
# in float64, which peru's equals to 1e-14.
LOOSER = {"multislerp": 5e-6}
DRAWS = 8
SEEDS = (0, 1, 2)

# Values besides the defaults, by method; `None` weights are WEIGHTS, `base`: whether a base is given.
CASES: dict[str, list[dict[str, Value]]] = {
    "linear": [{"normalize": False}],
    "slerp": [{"t": 0.3}],
    "ties": [{"keep": Fraction(1, 5)}, {"keep": Fraction(3, 5), "reduce": "sum", "scale": 0.5}],
    "breadcrumbs": [{"keep": Fraction(1, 2), "gamma": Fraction(1, 10), "scale": 1.0}],
    "breadcrumbs-ties": [{"keep": Fraction(1, 2), "gamma": Fraction(1, 10), "reduce": "sum"}],
    "nuslerp": [{"flatten": False}, {"flatten": False, "row-wise": True}],
    "multislerp": [{"normalize": False}],
    "karcher": [{"max-iter": 50, "tol": 1e-7}],
    "model-stock": [{"filter-wise": True}],
    "passthrough": [{"scale": -0.7}],
    "nearswap": [{"t": 0.03}],
    "sce": [{"keep": Fraction(1)}, {"keep": Fraction(3, 10)}],
    "ram": [{"epsilon": 0.05}],
    "ramplus-tl": [{"epsilon": 0.05}, {"epsilon": 0.1, "amplify": 0.4, "alpha": 3.0}],
    "dare": [{"keep": Fraction(1, 2)}],
    "dare-ties": [{"keep": Fraction(1, 2)}],
}
BASELESS = ("linear", "karcher", "passthrough")  # methods that get no base in mergekit
EITHER = ("nuslerp", "multislerp")  # with and without a base
WITH_BASE_AS_MODEL = ("nearswap", "arcee_fusion")

# Runs many merges in one process of mergekit's environment: [{config, out, seed}] as JSON from stdin.
DRIVER = """
import json, sys
from mergekit.scripts.merge_raw_pytorch import main
for job in json.load(sys.stdin):
    main.main([job["config"], job["out"], "--random-seed", str(job["seed"])], standalone_mode=False)
"""


def make_family(folder: Path, seed: int) -> None:
    """Base and fine-tunes in float32 with zeros, and without equal magnitudes (mergekit orders ties arbitrarily)."""
    noise = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=noise) * 0.5 for name, shape in SHAPES.items()}
    save_file(base, folder / "base.safetensors")
    for i in range(TASKS):
        fine = {}
        for name, tensor in base.items():
            change = torch.randn(tensor.shape, generator=noise) * 0.1
            fine[name] = tensor + change * (torch.rand(tensor.shape, generator=noise) > 0.1)
        save_file(fine, folder / f"t{i}.safetensors")


def tasks_of(method: Method) -> int:
    """How many fine-tunes are merged."""
    return min(method.tasks[1] or TASKS, TASKS)


def config(folder: Path, method: Method, values: dict[str, Value], base: bool) -> dict[str, object]:
    """mergekit's configuration for a merge with our options."""
    theirs = method.mergekit
    assert theirs is not None

    def value(name: str) -> object:
        mine = values[name]
        return mine == "mean" if name == "reduce" else float(mine) if isinstance(mine, Fraction) else mine

    own = {parameter: value(name) for name, parameter in theirs.own.items() if name != "weight"}
    models = [
        {"model": str(folder / f"t{i}.safetensors"), "parameters": own | ({"weight": WEIGHTS[i]} if "weight" in theirs.own else {})}
        for i in range(tasks_of(method))
    ]
    at = folder / "base.safetensors"
    if theirs.name in WITH_BASE_AS_MODEL:
        models.insert(0, {"model": str(at), "parameters": {}})
    if theirs.name == "slerp":
        at = folder / "t0.safetensors"
    settings = {parameter: value(name) for name, parameter in theirs.whole.items()}
    if "reduce" not in values and theirs.name in ("task_arithmetic", "dare_linear", "breadcrumbs"):
        settings["normalize"] = False
    table = {"merge_method": theirs.name, "models": models, "parameters": settings, "dtype": "float32"}
    return table | ({"base_model": str(at)} if base or theirs.name == "slerp" else {})


def run_mergekit(venv: Path, jobs: list[dict[str, object]], folder: Path) -> list[dict[str, torch.Tensor]]:
    """Merge with mergekit-pytorch, all in one process. Returns the results' tensors."""
    listed = []
    for number, job in enumerate(jobs):
        at = folder / f"config{number}.yml"
        at.write_text(json.dumps(job["config"]))  # JSON is YAML
        listed.append({"config": str(at), "out": str(folder / f"mergekit{number}"), "seed": job["seed"]})
    done = subprocess.run([venv / "bin" / "python", "-c", DRIVER], input=json.dumps(listed), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"mergekit failed:\n{done.stderr[-3000:]}")
    return [load_file(next(Path(str(job["out"])).glob("*.safetensors"))) for job in listed]


def run_peru(folder: Path, method: Method, values: dict[str, Value], base: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """Merge with this tree's peru. Returns the result's tensors."""
    out = folder / "peru.safetensors"
    words = ["merge", *(f"t{i}={folder / f't{i}.safetensors'}" for i in range(tasks_of(method))), "-o", str(out), "-m", method.name]
    words += ["--force", "--no-sync", "-q", *(["--base", str(folder / "base.safetensors")] if base else [])]
    if "weight" in method.options:
        words += [part for i in range(tasks_of(method)) for part in ("--weight", f"t{i}={WEIGHTS[i]}")]
    for name, value in ({"seed": seed} | values if "seed" in values else values).items():
        value = seed if name == "seed" else value
        exact = str(float(value)) if isinstance(value, Fraction) else shown(value)
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", exact]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
        code = cli.run(words)
    if code:
        raise SystemExit(f"peru {' '.join(words)}\n{errors.getvalue()}")
    return load_file(out)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], besides: float = 0.0) -> float:
    """The largest difference of two checkpoints, relative to the largest weight of each tensor (at least 1).

    `besides`: this share of the entries, the worst ones, is ignored."""
    parts = [((a[name].double() - b[name].double()).abs() / b[name].abs().max().clamp(min=1)).view(-1) for name in SHAPES]
    found = torch.cat(parts).sort().values
    return float(found[len(found) - 1 - int(besides * len(found))])


def spread(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """How similarly two programs draw: 1 and 1, up to chance, if they draw from the same distribution.

    Computed over all entries together, so that it does not matter how few draws keep an entry: the squared difference of the two
    means over seeds relative to its expectation, and the variance over seeds of one relative to the other."""
    a, b = (torch.stack([torch.cat([table[n].view(-1) for n in SHAPES]).double() for table in tables]) for tables in (theirs, ours))
    variances = a.var(dim=0).sum(), b.var(dim=0).sum()
    apart = (a.mean(dim=0) - b.mean(dim=0)).square().sum() / (sum(variances) / DRAWS)
    return float(apart), float(variances[1] / variances[0])


def main() -> None:
    """Compare all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="only these")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "peru-mergekit")
    arguments = parser.parse_args()
    install(arguments.venv)
    worst: list[str] = []
    with tempfile.TemporaryDirectory(prefix="peru-oracle-") as name:
        folder = Path(name)
        for seed in SEEDS:
            (folder / str(seed)).mkdir()
            make_family(folder / str(seed), seed)
        cases = []
        for method in METHODS.values():
            if method.mergekit is None or (arguments.methods and method.name not in arguments.methods):
                continue
            for given in ({}, *CASES.get(method.name, [])):
                values = effective_values(method, method.mergekit.fixed | given)
                bases = (True, False) if method.mergekit.name in EITHER else (method.mergekit.name not in (*BASELESS, "slerp"),)
                cases += [(method, given, values, base) for base in bases]
        jobs = []
        for method, _, values, base in cases:
            draws = [(0, seed + 1) for seed in range(DRAWS)] if "seed" in values else [(seed, 0) for seed in SEEDS]
            jobs += [{"config": config(folder / str(family), method, values, base), "seed": seed} for family, seed in draws]
        results = iter(run_mergekit(arguments.venv, jobs, folder))
        print(f"{'method':72}  largest difference")
        for method, given, values, base in cases:
            label = f"{method.name} {' '.join(f'{n}={shown(v)}' for n, v in given.items())}{'' if base else ' (no base)'}"
            if "seed" in values:
                theirs = [next(results) for _ in range(DRAWS)]
                apart, wider = spread([run_peru(folder / "0", method, values, base, seed) for seed in range(DRAWS)], theirs)
                print(
                    f"{label:72}  {apart:.3f}, {wider:.3f} (over {DRAWS} seeds, squared difference and variance: 1, 1 is chance)",
                    flush=True,
                )
                worst += [label] if not (0.95 < apart < 1.05 and 0.95 < wider < 1.05) else []
            else:
                besides = BESIDES.get(method.name, 0.0)
                found = max(difference(run_peru(folder / str(seed), method, values, base), next(results), besides) for seed in SEEDS)
                print(f"{label:72}  {found:.3g}", flush=True)
                worst += [label] if found > LOOSER.get(method.name, TOLERANCE) else []
    if worst:
        raise SystemExit(f"differences above {TOLERANCE}: {'; '.join(worst)}")


if __name__ == "__main__":
    main()
