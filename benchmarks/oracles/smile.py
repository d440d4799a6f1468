"""Compare routed experts with fusion_bench's SmileMoELinear on a tiny BERT and a tiny CLIP. Prints the largest difference of outputs.

    python benchmarks/oracles/smile.py [--venv /opt/oracles/fusion]

The virtual environment has fusion-bench 0.2.33 or newer with torch 2.13 (a program to compare with; peru contains no code of it). Three
fine-tunes differ from the base in every linear layer by matrices of full rank, and in every bias. fusion_bench puts its own layer in the
place of each nn.Linear; peru packs, and installs with peru_cli.apply. Exits with 1 if outputs differ by more than 1e-5 of the largest."""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers as tr
from safetensors.torch import load_file, save_file

import peru_cli
from peru_cli import cli

TASKS = ("a", "b", "c")
CASES = [(4, 2, 1), (8, 8, 1), (6, 3, 2), (32, 4, 3)]  # rank, gate, top
TOLERANCE = 1e-5
# Runs there: folder of one model, rank, gate, top.
THERE = """
import sys
from pathlib import Path
import torch
import transformers as tr
from safetensors.torch import load_file, save_file
from fusion_bench.models.smile_moe.linear_from_module import SmileMoELinear
from fusion_bench.models.utils import get_attr, set_attr
folder, rank, gate, top = Path(sys.argv[1]), *map(int, sys.argv[2:])
kind = getattr(tr, (folder / "class").read_text())
load = lambda name: kind.from_pretrained(folder / name, attn_implementation="eager").eval()
base, tasks = load("base"), [load(name) for name in ("a", "b", "c")]
for name, module in tuple(base.named_modules()):
    if isinstance(module, torch.nn.Linear):
        path = name.split(".")
        set_attr(base, path, SmileMoELinear(module, [get_attr(t, path) for t in tasks], gate_k=gate, k=rank, top_k=top))
with torch.no_grad():
    save_file({"out": base(**load_file(folder / "inputs.safetensors")).last_hidden_state.contiguous()}, folder / "out.safetensors")
"""
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def models() -> dict[str, tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """Each model with its inputs."""
    torch.manual_seed(0)
    bert = tr.BertModel(tr.BertConfig(vocab_size=60, **SMALL))
    clip = tr.CLIPVisionModel(tr.CLIPVisionConfig(image_size=16, patch_size=4, **SMALL))
    mask = torch.ones(8, 12, dtype=torch.int64)
    mask[::2, 7:] = 0
    return {
        "BertModel": (bert, {"input_ids": torch.randint(0, 60, (8, 12)), "attention_mask": mask}),
        "CLIPVisionModel": (clip, {"pixel_values": torch.randn(8, 3, 16, 16)}),
    }


def write(folder: Path, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """A base with weights that make outputs depend on inputs, fine-tunes, and inputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder / "base")  # type: ignore[operator]
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for task in TASKS:
        model.load_state_dict(start)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.add_(0.05 * torch.randn(module.weight.shape))
                    module.bias.add_(0.05 * torch.randn(module.bias.shape))
        model.save_pretrained(folder / task)  # type: ignore[operator]
    save_file(inputs, folder / "inputs.safetensors")
    (folder / "class").write_text(type(model).__name__)


def ours(folder: Path, rank: int, gate: int, top: int) -> torch.Tensor:
    """The outputs with peru's experts."""
    artifact = folder / "smile.safetensors"
    given = [f"{task}={folder / task}" for task in TASKS]
    sizes = [f"--rank={rank}", f"--gate-rank={gate}", f"--top-k={top}"]
    command = ["shuffle-pack", *given, "-b", str(folder / "base"), "-o", str(artifact), "-m", "smile", *sizes, "--force", "--quiet"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.run(command)
    if code:
        sys.exit(code)
    model = getattr(tr, (folder / "class").read_text()).from_pretrained(folder / "base", attn_implementation="eager").eval()
    with peru_cli.apply(model, peru_cli.open_artifact(artifact)), torch.no_grad():
        found: torch.Tensor = model(**load_file(folder / "inputs.safetensors")).last_hidden_state
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--venv", type=Path, default=Path("/opt/oracles/fusion"))
    python = parser.parse_args().venv / "bin" / "python"
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for name, (model, inputs) in models().items():
            folder = Path(scratch) / name
            write(folder, model, inputs)
            for rank, gate, top in CASES:
                subprocess.run([python, "-c", THERE, folder, *map(str, (rank, gate, top))], check=True, capture_output=True)
                theirs = load_file(folder / "out.safetensors")["out"]
                difference = float((ours(folder, rank, gate, top) - theirs).abs().max() / theirs.abs().max())
                worst = max(worst, difference)
                print(f"{name}, rank {rank}, gate {gate}, top {top}: {difference:.2g} of the largest output", flush=True)
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
