"""Compare gated MLPs with fusion_bench's WeightEnsemblingMoE on a tiny BERT and a tiny CLIP: outputs, and one step of training.

    python benchmarks/oracles/wemoe.py [--venv /opt/oracles/fusion]

The virtual environment has fusion-bench 0.2.33 or newer with torch 2.13 (a program to compare with; peru contains no code of it). Three
fine-tunes differ from the base in every tensor. peru packs them at 64 bits a parameter, and installs them with peru_cli.apply. There,
fusion_bench's modules take the place of the MLPs, with the same routers and differences, in a model whose other tensors are peru's.
The gradient of the entropy by the routers is compared with an autograd loop over these modules. Exits with 1 if outputs or gradients
differ by more than 1e-5 of the largest. BERT's MLP is two modules: one with both stands for them.
Heads are small: fusion_bench adds 1e-8 to probabilities before it takes logarithms, which shows where predictions are sure."""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tr
from safetensors.torch import load_file, save_file

import peru_cli
from peru_cli import cli
from peru_cli.artifacts.packs.wemoe import Wemoe
from peru_cli.live.wemoe import GatedMlps
from peru_cli.methods.examples.adamerging import entropy

TASKS = ("a", "b", "c")
TOLERANCE = 1e-5
LABELS = 5
# Runs there: the folder of one model, and how many layers a router has.
THERE = """
import sys
from pathlib import Path
import torch
import transformers as tr
from safetensors.torch import load_file, save_file
from fusion_bench.method.we_moe.entropy_loss import entropy_loss
from fusion_bench.models.we_moe import WeightEnsemblingMoE
folder, depth = Path(sys.argv[1]), int(sys.argv[2])
kind = getattr(tr, (folder / "class").read_text())
load = lambda name: kind.from_pretrained(folder / name, attn_implementation="eager").eval()
names = ("a", "b", "c")
class Mlp(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.intermediate, self.dense = layer.intermediate, layer.output.dense
    def forward(self, hidden):
        return self.dense(self.intermediate(hidden))
def mlp_of(layer):
    return layer.mlp if hasattr(layer, "mlp") else Mlp(layer)
def layers_of(model):
    return model.vision_model.encoder.layers if hasattr(model, "vision_model") else (
        model.encoder.layers if hasattr(model.encoder, "layers") else model.encoder.layer)
merged = load("base").requires_grad_(False)
merged.load_state_dict(load_file(folder / "merged.safetensors"))
base, tasks, routers = load("base"), [load("base") for name in names], load_file(folder / "routers.safetensors")
for name, task in zip(names, tasks):
    for path, difference in load_file(folder / f"{name}.safetensors").items():
        task.get_parameter(path).data += difference
gates = []
for number, layer in enumerate(layers_of(merged)):
    old = mlp_of(layers_of(base)[number])
    new = WeightEnsemblingMoE(32, old, [mlp_of(layers_of(t)[number]) for t in tasks], 0.3, True, depth)
    fcs = [new.gate.fc] if depth == 1 else [new.gate.fc1, new.gate.fc2]
    for place, fc in enumerate(fcs):
        fc.weight.data, fc.bias.data = routers[f"{number}.{2 * place}"], routers[f"{number}.{2 * place + 1}"]
        gates += [fc.weight, fc.bias]
    if hasattr(layer, "mlp"):
        layer.mlp = new
    else:
        layer.intermediate, layer.output.dense = new, torch.nn.Identity()
inputs, heads = load_file(folder / "inputs.safetensors"), load_file(folder / "heads.safetensors")
hidden = merged(**inputs).last_hidden_state
loss = sum(entropy_loss(hidden[:, 0] @ heads[name].T) for name in names)
found = {f"gradient.{n}": g for n, g in enumerate(torch.autograd.grad(loss, gates))}
save_file({"out": hidden.detach().contiguous(), "loss": loss.detach().reshape(1), **found}, folder / "out.safetensors")
"""
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def models() -> dict[str, tuple[Any, dict[str, torch.Tensor]]]:
    """Each model with its inputs, without padding: fusion_bench takes means over padding, too."""
    torch.manual_seed(0)
    bert = tr.BertModel(tr.BertConfig(vocab_size=60, **SMALL))
    clip = tr.CLIPVisionModel(tr.CLIPVisionConfig(image_size=16, patch_size=4, **SMALL))
    return {
        "BertModel": (bert, {"input_ids": torch.randint(0, 60, (8, 12))}),
        "CLIPVisionModel": (clip, {"pixel_values": torch.randn(8, 3, 16, 16)}),
    }


def write(folder: Path, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """A base with weights that make outputs depend on inputs, fine-tunes, inputs and heads."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder / "base")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for task in TASKS:
        model.load_state_dict(start)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        model.save_pretrained(folder / task)
    save_file(inputs, folder / "inputs.safetensors")
    save_file({task: 0.2 * torch.randn(LABELS, 32) for task in TASKS}, folder / "heads.safetensors")
    (folder / "class").write_text(type(model).__name__)


def ours(folder: Path, depth: int) -> dict[str, torch.Tensor]:
    """Outputs and gradients with peru's gated MLPs, whose routers were moved away from their start."""
    artifact = folder / "wemoe.safetensors"
    given = [f"{task}={folder / task}" for task in TASKS]
    options = ["--steps=0", "--bits=64", f"--router-layers={depth}", "--dtype=fp32", "--force", "--quiet"]
    command = ["shuffle-pack", *given, "-b", str(folder / "base"), "-o", str(artifact), "-m", "wemoe", *options]
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.run(command)
    if code:
        sys.exit(code)
    model = getattr(tr, (folder / "class").read_text()).from_pretrained(folder / "base", attn_implementation="eager").eval()
    opened = peru_cli.open_artifact(artifact)
    assert isinstance(opened, Wemoe)
    heads = load_file(folder / "heads.safetensors")
    with peru_cli.apply(model.requires_grad_(False), opened) as applied:
        gated: GatedMlps = applied.installed  # type: ignore[attr-defined]
        tensors = [tensor for router in gated.routers for tensor in router.train()]
        with torch.no_grad():
            for tensor in tensors:
                tensor.add_(0.2 * torch.randn(tensor.shape))
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "merged.safetensors")
        for number, task in enumerate(TASKS):  # as they are stored: coding is not what is compared
            with opened.part(1 + number) as part:
                stored = {r.info.name: (r, part.difference(r, 0, r.info.entries)) for r in part.index.tensors if r.parts}
            dense = {name: torch.from_numpy(found).float().view(record.info.shape) for name, (record, found) in stored.items()}
            save_file(dense, folder / f"{task}.safetensors")
        each = len(tensors) // len(gated.routers)
        save_file({f"{n // each}.{n % each}": tensor.detach() for n, tensor in enumerate(tensors)}, folder / "routers.safetensors")
        hidden = model(**load_file(folder / "inputs.safetensors")).last_hidden_state
        loss: Any = sum(entropy(hidden[:, 0] @ heads[task].T) for task in TASKS)
        found = {f"gradient.{n}": gradient for n, gradient in enumerate(torch.autograd.grad(loss, tensors))}
    return {"out": hidden.detach(), "loss": loss.detach().reshape(1), **found}


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
            for depth in (1, 2):
                mine = ours(folder, depth)
                subprocess.run([python, "-c", THERE, folder, str(depth)], check=True)
                theirs = load_file(folder / "out.safetensors")
                apart = {key: float((mine[key] - theirs[key]).abs().max() / theirs[key].abs().max()) for key in theirs}
                gradient = max(value for key, value in apart.items() if key.startswith("gradient"))
                worst = max(worst, *apart.values())
                said = f"outputs {apart['out']:.2g}, entropy {apart['loss']:.2g}, gradients {gradient:.2g}"
                print(f"{name}, routers of {depth}: {said} of the largest", flush=True)
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
