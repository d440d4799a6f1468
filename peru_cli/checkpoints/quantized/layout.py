"""Find the codes and scales of quantised weights, from headers and config.json alone.

A quantised weight and its companions belong together. FP8 (and the symmetric INT8 of compressed-tensors) is converted to floats
while it is read (fp8.py). Every other scheme is refused by name. Layouts:
https://github.com/vllm-project/compressed-tensors, transformers' integrations/finegrained_fp8.py, DeepSeek-V3's README_WEIGHTS.md,
ComfyUI's `scale_weight`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peru_cli.checkpoints.dtypes import BY_NAME, BY_TORCH_NAME, Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.errors import BadFile, UsageError

CODES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_SCALES = frozenset({"F32", "F16", "BF16", "F8_E8M0", "U8"})
_DEFAULT_BLOCK = (128, 128)

# Ends of names that only one scheme uses.
_SCHEMES = [
    ("bitsandbytes 4-bit", (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")),
    ("bitsandbytes 8-bit", (".SCB", ".weight_format")),
    ("GPTQ", (".g_idx",)),
    ("AWQ or GPTQ", (".qweight", ".qzeros")),
    ("MXFP4", ("_proj_blocks", "_proj_scales")),
    ("NVFP4", (".weight_scale_2", ".weight_global_scale")),
    ("packed compressed-tensors", (".weight_packed",)),
    ("HQQ", (".W_q",)),
    ("quanto", (".weight._data", ".weight._scale")),
    ("AQLM", (".codes", ".codebooks")),
    ("EETQ", (".weight_scales",)),
]
_FOUR_BIT_STATE = ".quant_state.bitsandbytes__"  # inside names of the first one
_ALL_ENDS = tuple(end for _, ends in _SCHEMES for end in ends)
_METHODS = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4", "hqq": "HQQ", "quanto": "quanto"}
# Scales of activations and of key-value caches, which do not affect the weights.
_OF_ACTIVATIONS = re.compile(r"\.(input_scale|scale_input|activation_scale|input_scale_ub|[kqv]_scale|prob_output_scale|output_scale)$")
_MARKERS = re.compile(r"(^|\.)(scaled_fp8|comfy_quant)$")


@dataclass(frozen=True)
class Scaled:
    """A weight stored as codes: the stored tensor (`codes`), the result (`info`), and one scale for each block of rows and columns.

    `scale` is None if codes are values by themselves. The grid of scales is (matrices, rows, columns)."""

    codes: TensorInfo
    info: TensorInfo
    scale: TensorInfo | None
    block: tuple[int, int] = (1, 1)
    grid: tuple[int, int, int] = (1, 1, 1)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of each matrix."""
        rows, columns = (1, 1, *self.codes.shape)[-2:]
        return rows, columns


@dataclass
class Layout:
    """The quantised weights of a checkpoint by name, and the tensors that are their companions."""

    weights: dict[str, Scaled] = field(default_factory=dict)
    companions: set[str] = field(default_factory=set)
    kind: str = "FP8"


def is_quantized(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether any tensor is a code of a known scheme, from headers alone."""
    dtypes = {info.dtype.name for info in tensors.values()}
    return bool(dtypes & {*CODES, "F4"}) or _scheme(tensors) is not None or _int8(tensors)


def _int8(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a weight of 8-bit integers has a scale beside it."""
    return any(info.dtype.name in ("I8", "U8") and _scale_of(name, tensors) is not None for name, info in tensors.items())


def _scheme(tensors: Mapping[str, TensorInfo]) -> str | None:
    if any(_FOUR_BIT_STATE in name for name in tensors):
        return _SCHEMES[0][0]
    named = [name for name in tensors if name.endswith(_ALL_ENDS)]  # once for all schemes: there may be a hundred thousand names
    return next((scheme for scheme, ends in _SCHEMES if any(name.endswith(ends) for name in named)), None)


def _scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    stem = name.removesuffix("weight")
    names = [f"{name}_scale_inv", f"{name}_scale"] + ([f"{stem}scale_weight"] if stem != name else [])
    return next((tensors[n] for n in names if n in tensors), None)


def quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a config.json, also that of its text model; empty if there is none."""
    tables = [config, *(config[key] for key in ("text_config", "llm_config", "language_config") if isinstance(config.get(key), dict))]
    return next((t["quantization_config"] for t in tables if isinstance(t.get("quantization_config"), dict)), {})


def _dtype(config: Mapping[str, Any]) -> Dtype | None:
    """The float type that a config.json gives its model."""
    tables = [config, *(config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict))]
    for table in tables:
        for key in ("dtype", "torch_dtype"):
            named = BY_TORCH_NAME.get(str(table.get(key)).removeprefix("torch."))
            if named is not None and named.compressible:
                return named
    return None


def recognise(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], label: str, stored: bool = False) -> Layout | None:
    """The quantised weights of a checkpoint. None if it has none.

    With `stored`, for codes that are kept as they are, other schemes give None, and only codes or scales alone are refused.

    Raises:
        UsageError: a scheme that peru cannot convert to floats, by name.
        BadFile: codes without their scales, scales without their codes, or scales of a shape that fits no scheme."""
    if not is_quantized(tensors):
        return None
    said = quantization(config)
    method, kind = str(said.get("quant_method", "")), str(said.get("format", ""))
    int8 = method == "compressed-tensors" and kind in ("int-quantized", "naive-quantized")
    scheme = _scheme(tensors)
    if scheme is None and any(info.dtype.name == "F4" for info in tensors.values()):
        scheme = "FP4"
    if scheme is None and not int8 and _int8(tensors):
        scheme = _METHODS.get(method, f"8-bit integers{f' ({method})' if method else ''}")
    if scheme is not None and stored:
        return None
    if scheme is not None:
        raise UsageError(
            f"{label} is quantised ({_METHODS.get(method, scheme)}), and peru works on floating-point weights",
            "load it, dequantise it and save it in bf16 (transformers: model.dequantize()), or name the model that it was made from",
        )
    layout = Layout(kind="INT8" if int8 else "FP8")
    problems: list[str] = []
    wanted = None if method == "compressed-tensors" else _dtype(config)
    for name in sorted(tensors):
        codes = tensors[name]
        if (codes.dtype.name not in CODES and not (int8 and codes.dtype.name == "I8")) or _MARKERS.search(name):
            continue
        scale = _scale_of(name, tensors)
        if scale is None and codes.dtype.name == "I8" and len(codes.shape) < 2 and not name.endswith("weight"):
            continue  # a buffer of small integers
        if scale is None:
            layout.weights[name] = Scaled(codes, TensorInfo(name, wanted or BY_NAME["BF16"], codes.shape), None)
            continue
        found = _scaled(codes, scale, said, wanted)
        layout.companions.add(scale.name)
        if isinstance(found, str):
            problems += [] if stored else [found]
            continue
        layout.weights[name] = found
        if f"{name}_zero_point" in tensors and not stored:
            problems.append(f"{name} has a zero point, which peru does not read")
    bare = [name for name, weight in layout.weights.items() if weight.scale is None]
    marked = any(_MARKERS.search(name) for name in tensors)  # ComfyUI's marker for codes with scales
    if bare and (method or marked or len(bare) < len(layout.weights)):
        problems += [f"{name}: {tensors[name].dtype.name} without its scale" for name in bare]
    for name in tensors:
        if name not in layout.companions and re.search(r"(_scale_inv|\.weight_scale|\.scale_weight)$", name):
            problems.append(f"{name}: a scale without the codes that it is of")
        elif _OF_ACTIVATIONS.search(name) or _MARKERS.search(name):
            layout.companions.add(name)
    if problems:
        more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BadFile(
            f"{label}: quantised weights and their scales do not fit together\n  " + "\n  ".join(problems[:5]) + more,
            "the checkpoint is incomplete, or of a scheme that peru does not know: fetch it again, or dequantise it first",
        )
    return layout


def _scaled(codes: TensorInfo, scale: TensorInfo, said: Mapping[str, Any], wanted: Dtype | None) -> Scaled | str:
    """How scales cover a weight, or what is wrong with them."""
    if scale.dtype.name not in _SCALES:
        return f"{scale.name} is {scale.dtype.name}, which is no type of scales"
    dtype = wanted or (scale.dtype if scale.dtype.compressible else BY_NAME["BF16"])
    info = TensorInfo(codes.name, dtype, codes.shape)
    if scale.entries == 1:
        return Scaled(codes, info, scale)
    if len(codes.shape) < 2:
        return f"{scale.name}: {list(scale.shape)} scales for a weight of shape {list(codes.shape)}"
    *lead, rows, columns = codes.shape
    matrices = 1
    for n in lead:
        matrices *= n
    shape = list(scale.shape)
    if lead and scale.entries == matrices:  # one for each stacked expert
        return Scaled(codes, info, scale, (rows, columns), (matrices, 1, 1))
    if shape in ([*lead, rows], [*lead, rows, 1]):  # one for each row
        return Scaled(codes, info, scale, (1, columns), (matrices, rows, 1))
    if len(shape) == len(codes.shape) and shape[:-2] == lead:
        for block in _blocks(said):
            if shape[-2:] == [-(-rows // block[0]), -(-columns // block[1])]:
                return Scaled(codes, info, scale, block, (matrices, shape[-2], shape[-1]))
        block = (rows // max(shape[-2], 1), columns // max(shape[-1], 1))
        exact = all(b and b & (b - 1) == 0 for b in block) and [block[0] * shape[-2], block[1] * shape[-1]] == [rows, columns]
        if exact:  # a block that the config does not name: a power of two in each direction, dividing exactly
            return Scaled(codes, info, scale, block, (matrices, shape[-2], shape[-1]))
    return f"{scale.name}: {shape} scales for a weight of shape {list(codes.shape)}"


def _blocks(said: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Block sizes that a quantization_config names, then the usual one; (rows, columns)."""
    found = [said.get("weight_block_size")]
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    sizes = [(f[0], f[1]) for f in found if isinstance(f, list) and len(f) == 2 and all(type(n) is int and n > 0 for n in f)]
    return [*sizes, _DEFAULT_BLOCK, (1, 32)]
