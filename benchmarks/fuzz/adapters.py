"""Made-up adapters of every layout over a small base, sometimes with foreign keys, and the weights that they mean."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
OUTER = "base_model.model."
LINEAR = ["layers.0.attn.q_proj", "layers.0.mlp.up_proj", "layers.1.attn.q_proj"]


@dataclass
class Adapted:
    """A base, an adapter's folder (PEFT) or file, and the merged base, float64.

    `broken` says why the adapter must be refused. `low_rank` says whether `svd-lora` can resize it."""

    base: Tensors
    tensors: Tensors
    wanted: Tensors
    layout: str
    config: dict[str, object] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    base_config: dict[str, object] = field(default_factory=dict)
    broken: str | None = None
    low_rank: bool = True
    by_file: bool = False
    file: str = "style.safetensors"


def make(rng: random.Random) -> Adapted:
    """A base of linear layers, norms, an embedding and a convolution, and an adapter for some of them."""
    torch.manual_seed(rng.randrange(1 << 30))
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    gpt2 = rng.random() < 0.15
    base: Tensors = {}
    for name in LINEAR:
        rows, columns = rng.choice([(16, 16), (24, 16), (16, 40)])
        base[f"{name}.weight"], base[f"{name}.bias"] = torch.randn(rows, columns), torch.randn(rows)
    if gpt2:
        base["h.0.attn.c_proj.weight"], base["h.0.attn.c_proj.bias"] = torch.randn(16, 16), torch.randn(16)
    base |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16), "embed_tokens.weight": torch.randn(20, 16)}
    base["conv.weight"] = torch.randn(8, 6, 3, 3)
    base = {n: t.to(dtype) for n, t in base.items()}
    made = Adapted(base, {}, {n: t.double() for n, t in base.items()}, rng.choice(sorted(LAYOUTS)))
    made.base_config = {"model_type": "gpt2" if gpt2 else "llama", "torch_dtype": str(dtype)[6:], "vocab_size": 20}
    LAYOUTS[made.layout](rng, made, gpt2)
    if rng.random() < 0.25:
        foreign(rng, made)
    return made


def write(made: Adapted, folder: Path) -> tuple[Path, Path]:
    """The base's folder and the adapter's folder or file."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file(made.base, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(made.base_config))
    file = adapter / ("adapter_model.safetensors" if made.config is not None else made.file)
    save_file({n: t.contiguous() for n, t in made.tensors.items()}, file, made.metadata or None)
    if made.config is not None:
        (adapter / "adapter_config.json").write_text(json.dumps(made.config))
    return base, file if made.by_file or made.config is None else adapter


def _pair(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 0.1 * torch.randn(rank, columns), 0.1 * torch.randn(rows, rank)


def _kind(rng: random.Random) -> torch.dtype:
    return rng.choice([torch.float32, torch.bfloat16, torch.float16])


def _some(rng: random.Random, gpt2: bool) -> list[str]:
    names = LINEAR + (["h.0.attn.c_proj"] if gpt2 else [])
    return rng.sample(names, rng.randint(1, len(names)))


def peft(rng: random.Random, made: Adapted, gpt2: bool) -> None:
    """PEFT's folder: patterns, rsLoRA, DoRA, lora_bias, embeddings, convolutions, saved modules, `.default` in the names."""
    rank, alpha = rng.choice([1, 2, 4]), rng.choice([1, 4, 16])
    rs, dora, bias = (rng.random() < 0.2 for _ in range(3))
    bias = bias and not dora
    names = _some(rng, gpt2)
    config: dict[str, object] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rs, "use_dora": dora, "lora_bias": bias}
    config |= {"target_modules": [n.rpartition(".")[2] for n in names], "fan_in_fan_out": gpt2 and rng.random() < 0.5, "bias": "none"}
    ranks: dict[str, int] = {}
    if rng.random() < 0.3:
        ranks = config["rank_pattern"] = {"q_proj": 3}
    alphas = config["alpha_pattern"] = {"0.attn.q_proj": 7} if rng.random() < 0.3 else {}
    kind = _kind(rng)
    adapter_name = rng.choice(["", ".default"]) if rng.random() < 0.2 else ""
    for name in names:
        weight = made.wanted[f"{name}.weight"]
        conv1d = name.startswith("h.")
        rows, columns = weight.T.shape if conv1d else weight.shape
        r = next((v for k, v in ranks.items() if name.endswith(k)), rank)
        a, b = (t.to(kind) for t in _pair(rows, columns, r))
        scale = next((v for k, v in alphas.items() if name.endswith(k)), alpha) / (math.sqrt(r) if rs else r)
        _put(made, f"{OUTER}{name}", adapter_name, a, b)
        new = weight + (scale * b.double() @ a.double()).T if conv1d else weight + scale * b.double() @ a.double()
        if dora:
            magnitude = 1 + torch.rand(rows)
            made.tensors[f"{OUTER}{name}.lora_magnitude_vector"] = magnitude
            norm = new.norm(dim=0 if conv1d else 1)
            factor = magnitude.double() / norm
            new = new * (factor if conv1d else factor[:, None])
        made.wanted[f"{name}.weight"] = new
        if bias:
            more = torch.randn(rows).to(kind)
            made.tensors[f"{OUTER}{name}.lora_B.bias"] = more
            made.wanted[f"{name}.bias"] = made.wanted[f"{name}.bias"] + scale * more.double()
    if not dora and rng.random() < 0.2:
        a, b = 0.1 * torch.randn(rank, 20), 0.1 * torch.randn(16, rank)
        made.tensors |= {f"{OUTER}embed_tokens.lora_embedding_A": a, f"{OUTER}embed_tokens.lora_embedding_B": b}
        scale = alpha / (math.sqrt(rank) if rs else rank)
        made.wanted["embed_tokens.weight"] = made.wanted["embed_tokens.weight"] + scale * (b.double() @ a.double()).T
    elif not dora and rng.random() < 0.2:
        a, b = 0.1 * torch.randn(rank, 6, 3, 3), 0.1 * torch.randn(8, rank, 1, 1)
        made.tensors |= {f"{OUTER}conv.lora_A.weight": a, f"{OUTER}conv.lora_B.weight": b}
        scale = alpha / (math.sqrt(rank) if rs else rank)
        made.wanted["conv.weight"] = made.wanted["conv.weight"] + scale * (b.double().flatten(1) @ a.double().flatten(1)).view(8, 6, 3, 3)
    if rng.random() < 0.2:
        config["modules_to_save"] = ["norm"]
        saved = torch.rand(16)
        made.tensors |= {f"{OUTER}norm.weight": saved, f"{OUTER}norm.bias": saved + 1}
        made.wanted |= {"norm.weight": saved.double(), "norm.bias": (saved + 1).double()}
    made.config, made.by_file = config, rng.random() < 0.3


def _put(made: Adapted, name: str, adapter: str, a: torch.Tensor, b: torch.Tensor) -> None:
    made.tensors |= {f"{name}.lora_A{adapter}.weight": a, f"{name}.lora_B{adapter}.weight": b}


def kohya(rng: random.Random, made: Adapted, gpt2: bool) -> None:
    """sd-scripts: names with underscores, alpha as a tensor of any type, or in the metadata, or nowhere."""
    where = rng.choice(["tensor", "integer", "metadata", "nowhere", "contradiction"])
    alpha, rank = rng.choice([1, 2, 8]), rng.choice([2, 4])
    for name in _some(rng, False):
        flat = "lora_unet_" + name.replace(".", "_")
        weight = made.wanted[f"{name}.weight"]
        a, b = (t.to(torch.float16) for t in _pair(*weight.shape, rank))
        made.tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        if where in ("tensor", "integer", "contradiction"):
            made.tensors[f"{flat}.alpha"] = torch.tensor(alpha if where == "integer" else float(alpha))
        scale = 1.0 if where == "nowhere" else alpha / rank
        made.wanted[f"{name}.weight"] = weight + scale * b.double() @ a.double()
    if where == "metadata":
        made.metadata = {"ss_network_alpha": str(float(alpha)), "ss_network_dim": str(rank)}
    elif where == "contradiction":
        made.metadata = {"ss_network_alpha": str(float(alpha + 5))}
        made.broken = "two alphas"


def diffusers(rng: random.Random, made: Adapted, gpt2: bool) -> None:
    """diffusers' names, new and old, with the scale in the metadata or nowhere."""
    ends = rng.choice([("lora_A", "lora_B"), ("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up")])
    alpha, rank = rng.choice([None, 1, 8]), 4
    component = rng.choice(["", "unet.", "transformer."])
    for name in _some(rng, False):
        weight = made.wanted[f"{name}.weight"]
        a, b = _pair(*weight.shape, rank)
        made.tensors |= {f"{component}{name}.{ends[0]}.weight": a, f"{component}{name}.{ends[1]}.weight": b}
        made.wanted[f"{name}.weight"] = weight + (1.0 if alpha is None else alpha / rank) * b.double() @ a.double()
    if alpha is not None:
        table = {f"{component}r": rank, f"{component}lora_alpha": alpha}
        made.metadata = rng.choice([{"alpha": str(alpha)}, {"lora_adapter_metadata": json.dumps(table)}])


def loha(rng: random.Random, made: Adapted, gpt2: bool) -> None:
    """LyCORIS' product of two low-rank matrices, entry by entry."""
    made.low_rank = False
    for name in _some(rng, False):
        weight, flat = made.wanted[f"{name}.weight"], "lycoris_" + name.replace(".", "_")
        rows, columns = weight.shape
        parts = [0.3 * torch.randn(s) for s in ((rows, 2), (2, columns), (rows, 2), (2, columns))]
        made.tensors |= {f"{flat}.hada_{k}": t for k, t in zip(("w1_a", "w1_b", "w2_a", "w2_b"), parts, strict=True)}
        made.tensors[f"{flat}.alpha"] = torch.tensor(1.0)
        a, b, c, d = (t.double() for t in parts)
        made.wanted[f"{name}.weight"] = weight + 0.5 * (a @ b) * (c @ d)


def lokr(rng: random.Random, made: Adapted, gpt2: bool) -> None:
    """LyCORIS' Kronecker product; whole factors have no scale."""
    made.low_rank = False
    for name in _some(rng, False):
        weight, flat = made.wanted[f"{name}.weight"], "lycoris_" + name.replace(".", "_")
        rows, columns = weight.shape
        one = 0.3 * torch.randn(4, 4)
        made.tensors[f"{flat}.lokr_w1"] = one
        if rng.random() < 0.5:
            two = 0.3 * torch.randn(rows // 4, columns // 4)
            made.tensors |= {f"{flat}.lokr_w2": two, f"{flat}.alpha": torch.tensor(1.0)}
            scale, product = 1.0, two.double()
        else:
            a, b = 0.3 * torch.randn(rows // 4, 2), 0.3 * torch.randn(2, columns // 4)
            made.tensors |= {f"{flat}.lokr_w2_a": a, f"{flat}.lokr_w2_b": b, f"{flat}.alpha": torch.tensor(1.0)}
            scale, product = 0.5, a.double() @ b.double()
        made.wanted[f"{name}.weight"] = weight + scale * torch.kron(one.double(), product)


def differences(rng: random.Random, made: Adapted, gpt2: bool) -> None:
    """Entries that are added or replace the base's (ComfyUI, LyCORIS)."""
    made.low_rank = False
    for name in _some(rng, False):
        what = rng.choice(["diff", "diff_b", "set_weight"])
        part = "bias" if what == "diff_b" else "weight"
        old = made.wanted[f"{name}.{part}"]
        tensor = 0.1 * torch.randn(old.shape)
        made.tensors[f"diffusion_model.{name}.{what}"] = tensor
        made.wanted[f"{name}.{part}"] = tensor.double() if what == "set_weight" else old + tensor.double()
    if rng.random() < 0.5:
        made.tensors["diffusion_model.norm.w_norm"] = torch.ones(16)
        made.wanted["norm.weight"] = made.wanted["norm.weight"] + 1


def ia3(rng: random.Random, made: Adapted, gpt2: bool) -> None:
    """PEFT's IA3: scaled rows, or scaled columns of feedforward modules."""
    made.low_rank = False
    names = _some(rng, False)
    config: dict[str, object] = {"peft_type": "IA3", "target_modules": [n.rpartition(".")[2] for n in names], "feedforward_modules": []}
    for name in names:
        weight = made.wanted[f"{name}.weight"]
        factor = 1 + 0.1 * torch.randn(len(weight))
        made.tensors[f"{OUTER}{name}.ia3_l"] = factor.view(-1, 1)
        made.wanted[f"{name}.weight"] = weight * factor.double()[:, None]
        made.wanted[f"{name}.bias"] = made.wanted[f"{name}.bias"] * factor.double()
    made.config = config


LAYOUTS = {f.__name__: f for f in (peft, kohya, diffusers, loha, lokr, differences, ia3)}


def foreign(rng: random.Random, made: Adapted) -> None:
    """A key, a field or a state that makes the adapter something else than it seems."""
    name = LINEAR[0]
    flat = name.replace(".", "_")
    outer = OUTER if made.config is not None else ("lora_unet_" if made.layout == "kohya" else "diffusion_model.")
    here = flat if made.layout in ("kohya", "loha", "lokr") else name
    first = sorted(made.tensors)[0]
    kinds = ["key", "half", "shape", "module"]
    kinds += ["init", "config field", "kind", "no config"] if made.config is not None else ["diff_m", "oft"]
    if made.layout == "ia3":
        kinds = ["key", "module", "kind", "config field"]
    kind = rng.choice(kinds)
    if kind == "key":
        made.tensors[f"{outer}something.else"] = torch.ones(2)
    elif kind == "half":
        if made.layout == "differences":
            return
        halves = [n for n in made.tensors if n.endswith(("lora_A.weight", "down.weight", "w1_a", "lokr_w1"))]
        if not halves:
            return
        del made.tensors[halves[0]]
    elif kind == "shape":
        if made.layout in ("loha", "lokr"):
            return
        matrices = [n for n in sorted(made.tensors) if made.tensors[n].ndim == 2 and "embed" not in n]
        if not matrices:
            return
        made.tensors[matrices[0]] = torch.cat([made.tensors[matrices[0]]] * 2, 1)
    elif kind == "module":
        tensor = made.tensors[first]
        made.tensors[first.replace("layers", "strange")] = tensor
        if "layers" in first:
            del made.tensors[first]
        else:
            return
    elif kind == "init":
        assert made.config is not None
        made.config["init_lora_weights"] = rng.choice(["pissa", "olora", "corda", "loftq", "lora_ga"])
    elif kind == "config field":
        assert made.config is not None
        made.config["something_new"] = 3
    elif kind == "kind":
        assert made.config is not None
        made.config["peft_type"] = rng.choice(["PREFIX_TUNING", "XLORA", "WHATEVER", "RANDLORA", None])
    elif kind == "no config":
        made.config, made.file = None, "adapter_model.safetensors"  # nothing gives the scale
    else:
        made.tensors[f"{outer}{here}.{'diff_m' if kind == 'diff_m' else 'oft_blocks'}"] = torch.ones(2, 2)
    made.broken = kind
