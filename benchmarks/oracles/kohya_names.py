"""Adapters with kohya's names: diffusers' result against `peru unpack`. Prints the largest difference of each.

    /opt/oracles/real/bin/python benchmarks/oracles/kohya_names.py

Needs diffusers 0.42 and peft beside peru, in a separate virtual environment. diffusers' own conversion reads names, factors and
alphas from an sd-scripts file for a small U-Net; peft applies them to the model and merges. peru reads the same file. Ranks,
alphas, dtypes and modules are random. All modules of a file have one alpha, as in sd-scripts: if alphas differ, diffusers 0.42
warns that it ignored those of attention layers. Exits with 1 if a difference is above 1e-5 of the largest weight."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors.torch import load_file, save_file

from peru_cli import cli

TOLERANCE = 1e-5  # of the largest weight


def unet() -> UNet2DConditionModel:
    """A small U-Net with linear and convolutional layers."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12,
        attention_head_dim=4, norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def adapter(model: UNet2DConditionModel, rng: random.Random) -> dict[str, torch.Tensor]:
    """An sd-scripts file with random tensors for some of a model's attention layers."""
    kind = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    alpha = rng.choice([None, 1.0, 2.0, 8.0])
    modules = dict(model.named_modules())
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0", ".proj_in", ".proj_out")
    names = [n for n in modules if n.endswith(ends) and "attentions" in n]
    table = {}
    for name in rng.sample(names, rng.randint(1, len(names))):
        weight, rank = modules[name].weight, rng.choice([1, 2, 4])
        flat = "lora_unet_" + name.replace(".", "_")
        kernel = (1,) * (weight.ndim - 2)
        table[f"{flat}.lora_down.weight"] = (0.3 * torch.randn(rank, weight.shape[1], *weight.shape[2:])).to(kind)
        table[f"{flat}.lora_up.weight"] = (0.3 * torch.randn(weight.shape[0], rank, *kernel)).to(kind)
        if alpha is not None:
            table[f"{flat}.alpha"] = torch.tensor(alpha)
    return table


def main() -> None:
    """Compare some adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    arguments = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="peru-kohya-") as place:
        folder = Path(place)
        unet().save_pretrained(folder / "base")
        base = next((folder / "base").glob("*.safetensors"))
        for seed in range(arguments.adapters):
            torch.manual_seed(seed)
            table = adapter(unet(), random.Random(seed))
            save_file(table, folder / "lora.safetensors")
            model = unet()
            state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(folder), weight_name="lora.safetensors")[:2]
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, model)
            model.fuse_lora()
            model.unload_lora()
            theirs = model.state_dict()
            out = folder / "out.safetensors"
            if cli.run(["unpack", str(folder / "lora.safetensors"), "-b", str(base), "-o", str(out), "--no-sync", "--force", "-q"]):
                sys.exit(1)
            ours = load_file(out)
            if set(ours) != set(theirs):
                sys.exit(f"other tensors: {sorted(set(ours) ^ set(theirs))[:4]}")
            changed = sum(int(not torch.equal(ours[n], t)) for n, t in load_file(base).items())
            size = max(float(t.abs().max()) for t in theirs.values())
            error = max(float((ours[n] - theirs[n]).abs().max()) for n in ours) / size
            worst = max(worst, error)
            print(f"adapter {seed}: {len(table)} tensors, {changed} weights changed, largest difference {error:.1e}", flush=True)
    print(f"worst {worst:.1e}, allowed {TOLERANCE:.0e}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
