"""A LoRA adapter as GGUF, as llama.cpp reads it. The specification is llama.cpp's convert_lora_to_gguf.py.

For each module `NAME.lora_a` (r, d_in) and `NAME.lora_b` (d_out, r), float32, with GGUF's names of tensors. llama.cpp adds
alpha / r * B A, where alpha is the file's and r the tensor's own rank: other scales go into B. For Llama and Mistral the rows of
query and key projections are in the order that llama.cpp's RoPE wants (LlamaModel.permute there). The factor A of an embedding is
transposed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peru_cli.checkpoints.base_name import base_of_adapter
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.local.atomic import PartialFile, check_room
from peru_cli.checkpoints.lora.adapter import Adapter, is_adapter, is_lora_file
from peru_cli.checkpoints.lora.module import EMBEDDING, LINEAR, LoraModule
from peru_cli.checkpoints.places import locate
from peru_cli.errors import BadFile, Mismatch, UsageError
from peru_cli.shown import listed

if TYPE_CHECKING:
    import torch

# model_type in config.json -> the architecture's name in GGUF; of these the converter renames tensors and, of some, reorders rows.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2"}
_REORDERED = ("llama", "mistral")
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_CONVERTER = "llama.cpp's convert_lora_to_gguf.py knows more models"
_OF_BASE = ".base_layer.weight"  # PEFT stores embeddings that it targets a second time; llama.cpp's converter skips them
_F32 = 0  # llama.cpp's file type


@dataclass(frozen=True)
class Plan:
    """An adapter's modules with their names in GGUF. `alpha` is the file's; module by module, B is multiplied by what that leaves of the
    scale."""

    adapter: Adapter
    architecture: str
    names: Mapping[str, str]
    alpha: float
    config: Mapping[str, Any]
    reordered: bool

    def factors(self, module: LoraModule) -> tuple[torch.Tensor, torch.Tensor]:
        """lora_a and lora_b of a module as they are stored, float32. BadFile if a scaled value does not fit."""
        import torch

        down, up = (self.adapter.tensor(info.name).double() for info in (module.down, module.up))
        up = (up * (module.scale * module.rank / self.alpha)).float()
        if not bool(torch.isfinite(up).all()):
            raise BadFile(f"{self.adapter.label}: {module.up.name}, scaled, does not fit float32")
        if module.kind == EMBEDDING:
            down = down.T
        last = module.name.rpartition(".")[2]
        if self.reordered and last in _HEADS:
            heads = _heads(self.config, _HEADS[last])
            up = up.reshape(heads, 2, up.shape[0] // heads // 2, module.rank).swapaxes(1, 2).reshape(up.shape)
        return down.float().contiguous(), up.contiguous()

    def shapes(self, module: LoraModule) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_a and lora_b."""
        down = module.down.shape[::-1] if module.kind == EMBEDDING else module.down.shape
        return down, module.up.shape

    @property
    def left_out(self) -> list[str]:
        """Copies of the base's embeddings in the adapter, which GGUF does not take."""
        return [name for name in self.adapter.whole.values() if name.endswith(_OF_BASE)]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(4 * (module.down.entries + module.up.entries) for module in self.adapter.modules)


def _heads(config: Mapping[str, Any], key: str) -> int:
    heads = config.get(key, config.get("num_attention_heads"))
    if not isinstance(heads, int) or heads < 1:
        raise BadFile(f"the base's config.json has {key} as {heads!r}")
    return heads


def open_adapter(named: str, base: str | None) -> tuple[Adapter, dict[str, Any]]:
    """The adapter that an argument names, and its base's config.json; only that is read of the base.

    UsageError for anything else than an adapter, or without a base."""
    place = locate(named)
    if not (is_adapter(place) or is_lora_file(place)):
        raise UsageError(f"{named} is no LoRA adapter, and --to gguf takes one", "peru svd-lora makes one of a fine-tune")
    folder = locate(base if base is not None else base_of_adapter(place))
    config = folder / "config.json" if folder.is_dir() else folder.parent / "config.json"
    if not config.is_file():
        raise UsageError(f"{folder} has no config.json, which says what model the adapter is for", "add --base DIR")
    try:
        parsed = json.loads(inputs.read_small(config))
    except ValueError as error:
        raise BadFile(f"{config}: not JSON ({error})") from error
    return Adapter(place, named), parsed if isinstance(parsed, dict) else {}


def plan_gguf(adapter: Adapter, config: Mapping[str, Any]) -> Plan:
    """Names and scales. UsageError for a model that peru does not know, Mismatch for what GGUF cannot hold."""
    import gguf

    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise UsageError(f"peru writes GGUF adapters for {listed(_ARCHITECTURES)}, and this base is {kind!r}", _CONVERTER)
    more = [name for name in adapter.whole.values() if not name.endswith(_OF_BASE)]
    more += [*adapter.deltas, *adapter.unknown]
    more += [name for module in adapter.modules for name in (module.magnitude, module.bias) if name is not None]
    if more or adapter.foreign or adapter.products:
        what = listed(more) if more else adapter.kind
        raise Mismatch(f"a GGUF adapter holds pairs of LoRA factors, and {adapter.label} has more: {what}", _CONVERTER)
    architecture = _ARCHITECTURES[kind]
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    # As many layers as the adapter names: the config's number is a stranger's, and the table has names for each.
    named = [int(part) for module in adapter.modules for part in module.name.split(".") if part.isdecimal() and len(part) < 5]
    table = gguf.get_tensor_name_map(number, max(named, default=0) + 1)
    names = {module.name: table.get_name(f"{module.name}.weight", try_suffixes=(".weight",)) for module in adapter.modules}
    bad = [m.name for m in adapter.modules if names[m.name] is None or m.kind not in (LINEAR, EMBEDDING) or len(m.down.shape) != 2]
    if kind.startswith("gemma") or config.get("tie_word_embeddings"):
        bad += [name for name in names if names[name] == "output.weight"]  # llama.cpp has no such tensor where it is tied
    if bad:
        raise Mismatch(f"GGUF's {architecture} has no matrix for {listed(bad)}", _CONVERTER)
    for key in {name.rpartition(".")[2] for name in names} & set(_HEADS) if kind in _REORDERED else ():
        rows = {module.up.shape[0] for module in adapter.modules if module.name.endswith(f".{key}")}
        if any(n % (2 * _heads(config, _HEADS[key])) for n in rows):
            sizes, heads = " or ".join(map(str, sorted(rows))), _heads(config, _HEADS[key])
            raise Mismatch(f"{key} has {sizes} rows, which do not divide into the {heads} heads of config.json")
    alphas = {module.scale * module.rank for module in adapter.modules}
    alpha = alphas.pop() if len(alphas) == 1 else float(max(module.rank for module in adapter.modules))
    found = {name: name_there for name, name_there in names.items() if name_there is not None}
    return Plan(adapter, architecture, found, alpha or 1.0, config, kind in _REORDERED)


def write_gguf(plan: Plan, target: Path, sync: bool) -> int:
    """Write the adapter, module by module. Returns the file's bytes."""
    import gguf
    import numpy as np

    check_room(target, plan.nbytes)
    with PartialFile(target, sync) as file:
        writer = gguf.GGUFWriter(file.path, plan.architecture)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, plan.alpha)
            writer.add_file_type(_F32)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for module in plan.adapter.modules:
                for end, shape in zip(("lora_a", "lora_b"), plan.shapes(module), strict=True):
                    writer.add_tensor_info(f"{plan.names[module.name]}.{end}", shape, np.dtype(np.float32), 4 * shape[0] * shape[1])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in _tensors(plan):
                writer.write_tensor_data(tensor.numpy())
        finally:
            writer.close()
        nbytes = file.path.stat().st_size
        file.commit()
    return nbytes


def _tensors(plan: Plan) -> Iterator[torch.Tensor]:
    for module in plan.adapter.modules:
        yield from plan.factors(module)
