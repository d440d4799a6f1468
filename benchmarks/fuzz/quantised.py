"""FP8 (and INT8) weights as programs store them: codes, their companions, and the values that they represent."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from families import Family

Tensors = dict[str, torch.Tensor]
FINEGRAINED = {"quant_method": "fp8", "weight_block_size": [16, 16]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
INT8 = COMPRESSED | {"format": "int-quantized"}
FBGEMM = {"quant_method": "fbgemm_fp8"}
SCALES = ("weight_scale", "weight_scale_inv", "scale_weight")
# layout -> quantization_config; None: the config has none (ComfyUI)
LAYOUTS: dict[str, dict[str, object] | None] = {
    "block": FINEGRAINED, "tensor": FINEGRAINED, "row": FBGEMM, "flat row": COMPRESSED, "e5m2": COMPRESSED, "comfy": None, "int8": INT8,
    "powers": FINEGRAINED, "bare": None,
}  # fmt: skip


def encode(weight: torch.Tensor, layout: str) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
    """Codes, companions by the end of their name (`.weight` minus its last part), and float32 values."""
    rows, columns = weight.shape
    scale = torch.rand(()) * 0.02 + 0.001
    spread, name, more = scale, "weight_scale", {}
    if layout in ("block", "powers"):
        scale = torch.rand(-(-rows // 16), -(-columns // 16)) * 0.02 + 0.001
        if layout == "powers":
            scale = torch.exp2(scale.log2().round())
        spread = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
        name = "weight_scale_inv"
    elif layout in ("row", "flat row", "e5m2", "int8"):
        scale = spread = torch.rand(rows, 1) * 0.02 + 0.001
        scale = scale.view(-1) if layout == "flat row" else scale
        more = {"input_scale": torch.tensor(1.5)} if layout == "e5m2" else {}
    elif layout == "comfy":
        name = "scale_weight"
    elif layout == "bare":
        return weight.to(torch.float8_e4m3fn), {}, weight.to(torch.float8_e4m3fn).float()
    if layout == "int8":
        codes = (weight / spread).round().clamp(-127, 127).to(torch.int8)
    else:
        codes = (weight / spread).clamp(-448, 448).to(torch.float8_e5m2 if layout == "e5m2" else torch.float8_e4m3fn)
    stored = scale.to(torch.float8_e8m0fnu) if layout == "powers" else scale
    return codes, {name: stored, **more}, codes.float() * spread


def has_codes(tensors: Tensors) -> bool:
    """Whether any of the stored tensors are codes."""
    return any((tensor.dtype.itemsize == 1 and tensor.is_floating_point()) or name.endswith(SCALES) for name, tensor in tensors.items())


def decoded(tensors: Tensors, layout: str) -> Tensors:
    """Stored tensors as float32 values, without companions."""
    values = {n: t.float() for n, t in tensors.items() if not n.endswith((*SCALES, "input_scale", "scaled_fp8"))}
    for name, scale in tensors.items():
        stem = next((name.removesuffix(end) for end in SCALES if name.endswith(end)), None)
        if stem is not None:
            codes = tensors[f"{stem}weight"]
            rows, columns = codes.shape
            scale = scale.float()
            if layout in ("block", "powers"):
                scale = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
            values[f"{stem}weight"] = codes.float() * (scale.view(-1, 1) if layout == "flat row" else scale)
    return values


def quantise(rng: random.Random, family: Family) -> None:
    """Quantise the `up` weights of some models, all in one layout; sometimes lose a scale, or keep one without its codes."""
    layout = family.layout = rng.choice(sorted(LAYOUTS))
    for name in rng.choice([["base", "a", "b"], ["a"], ["a", "b"]]):
        said = LAYOUTS[layout]
        if said is not None:
            family.configs[name]["quantization_config"] = said
        # the output's float type: the config's, or for compressed-tensors the scale's
        kind = torch.float32 if said in (COMPRESSED, INT8) else getattr(torch, str(family.configs[name]["torch_dtype"]))
        for n in [n for n in family.values[name] if n.endswith("up.weight")]:
            codes, companions, values = encode(family.values[name][n].float().nan_to_num(0, 0, 0), layout)
            family.stored[name][n] = codes
            family.stored[name] |= {n.removesuffix("weight") + end: tensor for end, tensor in companions.items()}
            family.values[name][n] = values.to(kind)
        if layout == "comfy":
            family.stored[name]["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if layout in ("flat row", "e5m2", "int8") or layout == "bare":
        family.may |= {"merge", "pack"}  # a model of several dtypes
    scales = sorted(n for n in family.stored["a"] if n.endswith(SCALES))
    if scales and rng.random() < 0.15:
        lost = rng.choice(scales)
        del family.stored["a"][lost]
        family.broken.setdefault("a", f"{lost} is lost")  # names of an unread scheme hide it where codes are kept unchanged
    elif scales and rng.random() < 0.1:
        family.stored["a"]["other.weight_scale_inv"] = torch.ones(1)
        family.broken.setdefault("a", "a scale without codes")
