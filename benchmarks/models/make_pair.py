"""Write a Llama-shaped bf16 base and fine-tunes of it, for timings: real shapes, synthetic numbers.

    python benchmarks/models/make_pair.py OUT [--layers 22] [--fine-tunes 1] [--spectrum]

22 layers are 1.1B parameters (2.2 GB a file, TinyLlama's shape), 4 layers 0.3B. Weights are normal with a
row-wise scale, updates Laplace-distributed with a scale that differs by tensor, as AdamW leaves them; about
two thirds of the bf16 weights change. With `--spectrum` an update is normal noise and as much energy in 64 directions
whose singular values fall as i^-0.7, half of the embedding's rows do not change, and norms do. The same arguments give the
same bytes.
"""

from __future__ import annotations

import argparse
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 2048, 5632, 256, 32000


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a Llama with untied head."""
    table: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(layers):
        prefix = f"model.layers.{i}."
        table |= {
            prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
            prefix + "self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            prefix + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
        }
    return table


def generator(name: str, seed: int) -> torch.Generator:
    """One generator for each tensor, so that files of different depth share their layers."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def base_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A base weight."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    noise = generator(name, 0)
    rows = 0.02 * torch.exp(0.3 * torch.randn(shape[0], 1, generator=noise))
    return (torch.randn(shape, generator=noise) * rows).to(torch.bfloat16)


def fine_tensor(name: str, base: torch.Tensor, seed: int) -> torch.Tensor:
    """Its fine-tuned version."""
    noise = generator(name, seed)
    scale = 6e-5 * float(torch.exp(0.5 * torch.randn(1, generator=noise)))
    uniform = torch.rand(base.shape, generator=noise) - 0.5
    update = torch.sign(uniform) * torch.log1p(-2 * uniform.abs().clamp(max=0.4999999)) * -scale
    return (base.float() + update).to(torch.bfloat16)


def spectral_tensor(name: str, base: torch.Tensor, seed: int) -> torch.Tensor:
    """A fine-tuned version with a spectrum that a low rank can catch half of."""
    noise = generator(name, seed)
    if base.dim() == 1:
        return (base.float() + 1e-3 * torch.randn(base.shape, generator=noise)).to(torch.bfloat16)
    rows, columns = base.shape
    scale = 6e-5 * float(torch.exp(0.5 * torch.randn(1, generator=noise)))
    values = torch.arange(1, 65) ** -0.7
    values = values / values.norm() * scale * math.sqrt(rows * columns)
    left = torch.randn(rows, 64, generator=noise) / math.sqrt(rows)
    right = torch.randn(64, columns, generator=noise) / math.sqrt(columns)
    update = torch.randn(base.shape, generator=noise).mul_(scale).addmm_(left * values, right)
    if "embed_tokens" in name:
        update[torch.rand(rows, generator=noise) < 0.5] = 0
    return (base.float() + update).to(torch.bfloat16)


def main() -> None:
    """Write OUT/base.safetensors, OUT/fine1.safetensors, ..."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--fine-tunes", type=int, default=1)
    parser.add_argument("--spectrum", action="store_true", help="updates with singular values that fall, as real ones have")
    arguments = parser.parse_args()
    update = spectral_tensor if arguments.spectrum else fine_tensor
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = {name: base_tensor(name, shape) for name, shape in shapes(arguments.layers).items()}
    save_file(base, arguments.out / "base.safetensors", metadata={"format": "pt"})
    for seed in range(1, arguments.fine_tunes + 1):
        fine = {name: update(name, tensor, seed) for name, tensor in base.items()}
        save_file(fine, arguments.out / f"fine{seed}.safetensors", metadata={"format": "pt"})
        del fine
    print(f"{sum(t.numel() for t in base.values()):,} parameters in {arguments.out}")


if __name__ == "__main__":
    main()
