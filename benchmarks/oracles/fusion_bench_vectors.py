"""Compare merges that need no data with fusion_bench on made-up fine-tunes: TSV-M, Iso-C, Iso-CTS, WUDI, SVC and EMR.

    python benchmarks/oracles/fusion_bench_vectors.py [--venv /tmp/peru-fusion-bench]

A base and three fine-tunes of square, wide and high matrices and vectors, in float32, for each of three seeds. fusion_bench 0.2.33
works in float64 there, but for WUDI: it takes 300 steps of Adam where peru takes the optimum, so that one is compared by the loss that
both minimise. Prints the largest difference over the largest change. Exits with 1 if it is more than float32 rounding."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from fusion_bench_merges import install
from safetensors.torch import load_file, save_file

TASKS = ("a", "b", "c")
SHAPES = {"wide.weight": (48, 80), "high.weight": (96, 40), "square.weight": (64, 64), "norm.weight": (64,), "norm.bias": (64,)}
ALIKE = {f"layers.{i}.weight": (64, 64) for i in range(3)}  # fusion_bench's EMR averages within a tensor, so sizes must be equal
# Of the largest change. The weights are written in float32: they are up to 0.4, the changes as small as 0.01.
TOLERANCE = 0.4 * 2**-24 / 0.01
TOLERANCES = {
    "svc": 5e-6,  # divides by what each task adds along a direction, and starts from a merge in float32
    "emr": 2e-5,  # a step of the pack is 2^-14 of the root mean square
}
CASES = {
    "tsv-m": ["merge", "--method", "tsv-m", "--scale", "0.8"],
    "iso-c": ["merge", "--method", "iso-c", "--scale", "0.8"],
    "iso-cts": ["merge", "--method", "iso-cts", "--scale", "0.8"],
    "svc": ["merge", "--method", "task-arithmetic", "--scale", "0.4", "--then", "svc"],
    "wudi": ["merge", "--method", "wudi", "--ridge", "0"],
    "emr": ["shuffle-pack", "--method", "emr", "--precision", "14"],
}
# Runs there: the case, the folder with base and tasks, the output.
THERE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
case, folder, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
base, *tasks = [{n: t.double() for n, t in load_file(folder / f"{name}.safetensors").items()} for name in ("base", "a", "b", "c")]
taus = [{n: t - base[n] for n, t in task.items()} for task in tasks]
def onto(found):  # the scale is for matrices; peru leaves the mean of vectors as it is
    return {n: base[n] + (0.8 if t.dim() == 2 else 1.0) * t for n, t in found.items()}
if case == "tsv-m":
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    found = compute_and_sum_svd_mem_reduction(taus, accelerator="cpu")
    result = onto(found)
elif case == "iso-c":
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c
    result = onto(iso_c(taus, accelerator="cpu"))
elif case == "iso-cts":
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts
    result = onto(iso_cts(taus, 0.8, accelerator="cpu"))
elif case == "svc":
    from fusion_bench.method.singular_value_calibration.utils import subspace_consistency_spectral_calibration as calibrate
    merged = {n: base[n] + 0.4 * sum(tau[n] for tau in taus) for n in base}
    matrices = [n for n in base if base[n].dim() == 2]
    result = merged | {n: calibrate(base[n], [t[n] for t in tasks], merged[n], 1 / 3, torch.device("cpu")) for n in matrices}
elif case == "wudi":
    from fusion_bench.method.wudi.wudi import wudi_merging
    result = {n: base[n] + t.detach() for n, t in wudi_merging(taus, accelerator="cpu").items()}
else:
    from fusion_bench.method.emr_merging.utils import emr_merge
    unified, masks, scales = emr_merge(taus)
    result = {f"{task}/{n}": base[n] + unified[n] * masks[n][i] * scales[i] for i, task in enumerate("abc") for n in base}
save_file({n: t.contiguous() for n, t in result.items()}, out)
"""
Tensors = dict[str, torch.Tensor]


def make(folder: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> list[Tensors]:
    """Write a base and three fine-tunes whose changes have singular values that fall off, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    models = [base]
    for _ in TASKS:
        models.append({name: tensor + _change(tensor.shape, generator) for name, tensor in base.items()})
    for name, tensors in zip(("base", *TASKS), models, strict=True):
        save_file(tensors, folder / f"{name}.safetensors")
    return [{name: tensor.double() for name, tensor in tensors.items()} for tensors in models]


def _change(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) != 2:
        return torch.randn(shape, generator=generator) * 0.01
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))
    return (left * (0.2 / torch.arange(1, min(shape) + 1))) @ right.T


def ours(command: list[str], folder: Path) -> Tensors:
    """What peru makes of the same models; of a pack, each task under `TASK/`."""
    name, *options = command
    out = folder / "ours.safetensors"
    models = [f"{task}={folder / task}.safetensors" for task in TASKS]
    _peru(name, *models, "--base", folder / "base.safetensors", "-o", out, *options)
    if name == "merge":
        return load_file(out)
    found = {}
    for task in TASKS:
        back = folder / f"back-{task}.safetensors"
        _peru("unpack", out, "--base", folder / "base.safetensors", "--task", task, "-o", back)
        found |= {f"{task}/{n}": tensor for n, tensor in load_file(back).items()}
    return found


def _peru(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "peru_cli", *map(str, arguments), "--quiet"], check=True, stdout=subprocess.DEVNULL)


def wudi_loss(tensors: Tensors, models: list[Tensors]) -> float:
    """sum_t |(tau - tau_t) tau_t^T|^2 / |tau_t|^2 over all matrices."""
    base, *tasks = models
    total = 0.0
    for name in (n for n in base if base[n].dim() == 2):
        for task in tasks:
            vector = task[name] - base[name]
            total += float(((tensors[name].double() - task[name]) @ vector.T).square().sum() / vector.square().sum())
    return total


def main() -> None:
    """Run all cases with three seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path("/tmp/peru-fusion-bench"))
    python = install(parser.parse_args().venv)
    failed = False
    for case, command in CASES.items():
        said = []
        for seed in range(3):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                models = make(folder, ALIKE if case == "emr" else SHAPES, seed)
                theirs_at = folder / "theirs.safetensors"
                subprocess.run([python, "-c", THERE, case, folder, theirs_at], check=True, capture_output=True)
                mine, theirs = ours(command, folder), load_file(theirs_at)
            if case == "wudi":
                losses = [wudi_loss(tensors, models) for tensors in (mine, theirs)]
                failed |= losses[0] > losses[1]
                said.append(f"loss {losses[0]:.3e} for {losses[1]:.3e} there")
                continue
            largest = max(float((t - models[0][n.rpartition("/")[2]]).abs().max()) for n, t in theirs.items())
            error = max(float((mine[n].double() - t).abs().max()) for n, t in theirs.items()) / largest
            failed |= error > TOLERANCES.get(case, TOLERANCE)
            said.append(f"{error:.1e}")
        print(f"{case:8} {', '.join(said)}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
