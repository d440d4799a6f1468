"""Measure `peru svd-lora`: an adapter of a 7B model against the dense SVD, extraction against mergekit-extract-lora.

    python benchmarks/speed/svd_lora.py [--scratch /tmp/peru-svd-lora] [--layers 32] [--venv /tmp/peru-mergekit] [--runs 3]

The adapter is synthetic: Llama-2-7B's shapes, r = 128 on all seven linear layers of each block, bfloat16, 640 MB, written
tensor by tensor. The dense SVD (torch, float32, all threads) is timed on one module of each shape and multiplied by how
many there are. For extraction, four of the 22 blocks of the synthetic 1.1B pair of make_pair.py stand for all: both
programs work on the same two folders. peru runs in processes of its own, its memory is the largest resident set that the kernel
reports; files are read once beforehand, so that the page cache is warm; start-up is included.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "oracles" / "mergekit"))
from environment import install
from make_pair import base_tensor, fine_tensor, shapes
from measured import measure as cost_of
from safetensors.torch import load_file, safe_open, save_file

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.writer import FileWriter

MAKE_PAIR = Path(__file__).resolve().parents[1] / "models" / "make_pair.py"
HIDDEN, INTERMEDIATE, RANK, KEPT, EXTRACTED = 4096, 11008, 128, 16, 32
BLOCKS = 4  # of the 22 that the 1.1B pair has, for extraction
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}  # fmt: skip
PERU = [sys.executable, "-m", "peru_cli"]
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": BLOCKS, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def measure(command: list[str], clear: Path) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a command that must succeed. Its earlier output is removed first."""
    if clear.is_dir():
        shutil.rmtree(clear)
    clear.unlink(missing_ok=True)
    cost = cost_of(command)
    if cost.code:
        raise SystemExit(f"{' '.join(command)}: exit {cost.code}")
    return cost.wall, cost.peak_mb << 20


def median(command: list[str], clear: Path, runs: int) -> tuple[float, int]:
    """Median seconds and largest memory of several runs."""
    results = [measure(command, clear) for _ in range(runs)]
    return statistics.median(seconds for seconds, _ in results), max(memory for _, memory in results)


def key(layer: int, module: str, factor: str) -> str:
    """A tensor's name as peft has it."""
    return f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight"


def factor(layer: int, module: str, which: str) -> torch.Tensor:
    """A random factor; the columns of B fall off, so that ranks are worth choosing."""
    rows, columns = MODULES[module]
    noise = torch.Generator().manual_seed(layer * 100 + list(MODULES).index(module) * 2 + (which == "B"))
    if which == "A":
        return (torch.randn(RANK, columns, generator=noise) / math.sqrt(columns)).bfloat16()
    return (torch.randn(rows, RANK, generator=noise) * 0.02 * torch.exp(-torch.arange(RANK) / 24)).bfloat16()


def make_adapter(folder: Path, layers: int) -> Path:
    """Write the adapter, one tensor in memory at a time."""
    if (folder / "adapter_config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for layer in range(layers):
        for module, (rows, columns) in MODULES.items():
            infos.append(TensorInfo(key(layer, module, "A"), BY_NAME["BF16"], (RANK, columns)))
            infos.append(TensorInfo(key(layer, module, "B"), BY_NAME["BF16"], (rows, RANK)))
    with FileWriter(folder / "adapter_model.safetensors", infos, sync=False) as writer:
        for layer in range(layers):
            for module in MODULES:
                for which in ("A", "B"):
                    data = factor(layer, module, which).view(torch.uint8).numpy()
                    writer.write(key(layer, module, which), 0, data.reshape(-1).data)
        writer.commit()
    names = sorted(name.rpartition(".")[2] for name in MODULES)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": names, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def warm(*files: Path) -> None:
    """Read files once."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def apart(function, *arguments):
    """A function's result from its own process: a child's reported usage starts with its parent's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def timed(function, *arguments):
    """Seconds and result."""
    begin = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begin, result


def adapter(scratch: Path, layers: int, runs: int) -> None:
    """Resize the 7B adapter; time the dense SVD of one module of each shape; compare their results."""
    source, out = apart(make_adapter, scratch / "adapter", layers), scratch / "resized"
    weights = source / "adapter_model.safetensors"
    warm(weights)
    command = [*PERU, "svd-lora", str(source), "-o", str(out), "--rank", str(KEPT), "--no-sync", "-q"]
    seconds, memory = median(command, out, runs)
    print(f"adapter: {weights.stat().st_size / 1e6:.0f} MB, {layers * len(MODULES)} modules, r = {RANK} to {KEPT}")
    print(f"peru svd-lora: {seconds:.1f} s (limit 20), {memory / 1e6:.0f} MB resident (limit 1000)", flush=True)
    counts = Counter(MODULES.values())
    dense = 0.0
    with safe_open(out / "adapter_model.safetensors", "pt") as resized:
        for shape, count in counts.items():
            module = next(name for name, s in MODULES.items() if s == shape)
            product = 2.0 * factor(0, module, "B").float() @ factor(0, module, "A").float()  # alpha / r is 2
            spent, (u, s, vt) = timed(lambda m: torch.linalg.svd(m, full_matrices=False), product)
            dense += spent * count * layers
            best = (u[:, :KEPT] * s[:KEPT]) @ vt[:KEPT]
            ours = resized.get_tensor(key(0, module, "B")).float() @ resized.get_tensor(key(0, module, "A")).float()
            errors = [float((product - p).norm() / product.norm()) for p in (best, ours)]
            print(
                f"dense SVD of {shape[0]} x {shape[1]}: {spent:.1f} s; relative error {errors[0]:.5f}, peru's {errors[1]:.5f}", flush=True
            )
    print(f"dense SVD of all modules: {dense:.0f} s, {dense / seconds:.0f} x peru's time (limit 100)", flush=True)
    shutil.rmtree(out)


def make_models(scratch: Path) -> tuple[Path, Path]:
    """Some blocks of the synthetic 1.1B pair as two folders. Embeddings and norms are equal, so that both programs do the same."""
    folders = scratch / "base", scratch / "fine"
    if not (folders[1] / "config.json").is_file():
        table = {name: base_tensor(name, shape) for name, shape in shapes(BLOCKS).items()}
        for folder, is_fine in zip(folders, (False, True), strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            weights = {n: fine_tensor(n, t, 1) if is_fine and "proj" in n else t for n, t in table.items()}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(LLAMA))
    return folders


def extraction(scratch: Path, venv: Path, runs: int) -> None:
    """Extract rank 32 with both programs; compare times and errors with the optimum."""
    base, fine = apart(make_models, scratch)
    warm(base / "model.safetensors", fine / "model.safetensors")
    out = scratch / "extracted"
    command = [*PERU, "svd-lora", str(fine), "--base", str(base), "-o", str(out), "--rank", str(EXTRACTED), "--no-sync", "-q"]
    start, _ = measure([*PERU, "svd-lora", str(fine), "--base", str(base), "-o", str(out), "--rank", "1", "--dry-run", "-q"], out)
    seconds, memory = median(command, out, runs)
    print(f"peru svd-lora --rank {EXTRACTED}: {seconds:.1f} s, of which {start:.1f} s are start-up; {memory / 1e6:.0f} MB", flush=True)
    ours = apart(errors, base, fine, out)
    program = install(venv).with_name("mergekit-extract-lora")
    theirs = scratch / "mergekit"
    command = [str(program), "--model", str(fine), "--base-model", str(base), "--out-path", str(theirs), "--max-rank", str(EXTRACTED)]
    spent, peak = measure([*command, "--exclude-regex", "embed_tokens|lm_head"], theirs)
    print(f"mergekit-extract-lora: {spent:.1f} s, {peak / 1e6:.0f} MB; {spent / seconds:.1f} x peru's time (limit 10)", flush=True)
    found = apart(errors, base, fine, theirs)
    print(f"largest error above the optimum: peru {100 * max(ours.values()):.3f}% (limit 1%), mergekit {100 * max(found.values()):.3f}%")


def errors(base: Path, fine: Path, adapter: Path) -> dict[str, float]:
    """How far each module's error is above that of the best approximation, relative."""
    before, after = load_file(base / "model.safetensors"), load_file(fine / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    result = {}
    for name in sorted(n for n in before if "proj" in n):
        delta = after[name].float() - before[name].float()
        best = torch.linalg.svdvals(delta)[EXTRACTED:].square().sum().sqrt()
        module = "base_model.model." + name.removesuffix(".weight")
        product = scale * factors[f"{module}.lora_B.weight"].float() @ factors[f"{module}.lora_A.weight"].float()
        result[name] = float((delta - product).norm() / best) - 1
    return result


def flatness(scratch: Path, runs: int) -> None:
    """Memory of extraction from pairs of 1 and 4 blocks (0.2B and 0.3B parameters, embeddings included)."""
    peaks = []
    for layers in (1, 4):
        folder = scratch / f"pair{layers}"
        if not (folder / "fine1.safetensors").is_file():
            subprocess.run(
                [sys.executable, MAKE_PAIR, folder, "--layers", str(layers)],
                check=True,
            )
        files = folder / "fine1.safetensors", folder / "base.safetensors"
        warm(*files)
        out = scratch / "flat"
        command = [*PERU, "svd-lora", str(files[0]), "--base", str(files[1]), "-o", str(out), "--rank", str(EXTRACTED)]
        seconds, memory = median([*command, "--no-sync", "-q", "--rest", "delta"], out, runs)
        peaks.append(memory)
        print(f"{layers} blocks: {seconds:.1f} s, {memory / 1e6:.0f} MB", flush=True)
        shutil.rmtree(out)
    print(f"memory of 4 blocks / 1 block: {peaks[1] / peaks[0]:.3f}")


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "peru-svd-lora")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "peru-mergekit")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("adapter", "extraction", "flatness"))
    arguments = parser.parse_args()
    if arguments.only in (None, "adapter"):
        adapter(arguments.scratch, arguments.layers, arguments.runs)
    if arguments.only in (None, "extraction"):
        extraction(arguments.scratch, arguments.venv, arguments.runs)
    if arguments.only in (None, "flatness"):
        flatness(arguments.scratch, arguments.runs)


if __name__ == "__main__":
    main()
