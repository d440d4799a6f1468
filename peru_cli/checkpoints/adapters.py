"""PEFT LoRA adapters as full fine-tunes of a base, expanded while they are read.

W = W_0 + s B A with s = alpha / r, or alpha / sqrt(r) for rsLoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685;
Kalajdzievski 2023, https://arxiv.org/abs/2312.03732), in float32 whatever the dtypes of the factors and the base, so
that small updates of a bf16 base are not rounded away. Only panels of rows are ever computed, at fixed places,
so that tiles and threads do not change the result.
"""

from __future__ import annotations

import json
import math
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local import open_file
from peru_cli.checkpoints.pairing import Prefix, find_prefix
from peru_cli.checkpoints.sidefiles import find_side_files
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, Mismatch, UsageError

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_OUTER = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_PANEL = 1 << 16  # entries of the product computed at once, rounded to whole rows
_F32 = BY_NAME["F32"]
_FULL = "merge the adapter into its base with peft (merge_and_unload) and save that"
# Settings under which W is not W_0 + s B A, and the values that leave them off.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None),
    "use_bdlora": (False, None, {}),
    "kasa_config": (None, {}),
    "arrow_config": (None, {}),
    "velora_config": (None, {}),
    "monteclora_config": (None, {}),
    "lora_ga_config": (None, {}),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None, {}),
}
# Ways to begin that leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ change it.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def read_config(folder: Path, label: str) -> dict[str, Any]:
    """The adapter's configuration, if it is a plain LoRA; UsageError names what it is instead."""
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{folder / CONFIG}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise BadFile(f"{folder / CONFIG}: not a table")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UsageError(f"{label} is a PEFT adapter of type {kind}; peru expands plain LoRA only", _FULL)
    odd = [f"{name}={config[name]!r}" for name, plain in _PLAIN.items() if config.get(name) not in plain]
    if config.get("init_lora_weights", True) not in _INITS:
        odd.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if odd:
        raise UsageError(f"{label} is no plain LoRA adapter: {', '.join(odd)}", _FULL)
    return config


def scale_of(config: dict[str, Any], module: str) -> float:
    """alpha / r, or alpha / sqrt(r), with the first pattern that matches the module's name, as peft has it."""

    def pattern(table: Any, default: float) -> float:
        for key, value in (table or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return float(value)
        return default

    rank = pattern(config.get("rank_pattern"), float(config["r"]))
    alpha = pattern(config.get("alpha_pattern"), float(config.get("lora_alpha") or config["r"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


@dataclass
class Product:
    """One weight's update: scale * left @ right, read as a flat tensor; left (rows, r), right (r, columns)."""

    base: TensorInfo
    left: torch.Tensor
    right: torch.Tensor
    scale: float

    def panel(self, number: int) -> torch.Tensor:
        """Rows of one panel of the update, flat, float32."""
        rows = self.panel_rows
        product = self.left[number * rows : (number + 1) * rows] @ self.right
        return product.mul_(self.scale).view(-1)

    @property
    def panel_rows(self) -> int:
        """Rows of every panel but the last."""
        return max(1, _PANEL // max(self.right.shape[1], 1))


class LoraCheckpoint(Checkpoint):
    """A base with an adapter on it. Tensors have the base's names; those that the base lacks, the adapter's."""

    expanded = True

    def __init__(self, folder: Path, label: str, base: Checkpoint) -> None:
        config = read_config(folder, label)
        found = [folder / name for name in _FILES if (folder / name).is_file()]
        if not found:
            raise BadFile(f"{label} has {CONFIG}, but neither {' nor '.join(_FILES)}")
        self._adapter, self._base = open_file(found[0], str(found[0])), base
        self.label, self.metadata, self.warnings = label, {}, list(self._adapter.warnings)
        self.side_files = dict(base.side_files) | {n: p for n, p in find_side_files(folder).items() if n != "config.json"}
        self.files = [*base.files, found[0], folder / CONFIG]
        self._kept: dict[str, str] = {}  # tensors that the adapter holds whole: our name -> its name
        self._products: dict[str, Product] = {}
        self._local = threading.local()
        factors = self._sort(label)
        self.prefix = self._find_prefix(factors)
        problems = [problem for module, pair in sorted(factors.items()) if (problem := self._add(module, pair, config)) is not None]
        if problems:
            raise Mismatch(
                f"the adapter {label} does not fit {base.label}: {len(problems)} module(s)\n  " + "\n  ".join(problems[:5]),
                "is this the base that the adapter was trained on?",
            )
        self._whole(label)
        patterned = " with patterns" if config.get("rank_pattern") or config.get("alpha_pattern") else ""
        self.kind = f"LoRA adapter, rank {config['r']}{patterned}, on {len(self._products)} modules ({self.prefix})"

    def _sort(self, label: str) -> dict[str, dict[str, str]]:
        """The adapter's names by module: A, B and whether they belong to an embedding."""
        factors: dict[str, dict[str, str]] = {}
        for name in sorted(self._adapter.tensors):
            plain = name.removeprefix(_OUTER)
            match = _FACTOR.fullmatch(plain)
            if match:
                module, embedding, factor = match.groups()
                factors.setdefault(module, {})[factor] = name
                if embedding:
                    factors[module]["embedding"] = name
            elif ".lora_" in plain or "trainable_tokens" in plain:
                raise UsageError(f"{label} holds {name}, which is not plain LoRA", _FULL)
            else:
                self._kept[plain] = name
        broken = [module for module, pair in factors.items() if not {"A", "B"} <= pair.keys()]
        if broken or not factors:
            raise BadFile(f"{label}: " + (f"{broken[0]} has one LoRA factor of two" if broken else "no LoRA factors in it"))
        return factors

    def _find_prefix(self, factors: dict[str, dict[str, str]]) -> Prefix:
        """How modules are named in the base. Shapes need not be known: a name with the right end is the module's."""
        fake = {f"{module}.weight": self._like(f"{module}.weight") for module in factors}
        return find_prefix(fake, {n: TensorInfo(n, t.dtype, t.shape) for n, t in self._base.tensors.items()})

    def _like(self, name: str) -> TensorInfo:
        """What the base has under a name, or under its longest end that the base knows."""
        parts = name.split(".")
        for cut in range(len(parts)):
            end = ".".join(parts[cut:])
            if end in self._base.tensors:
                return TensorInfo(name, _F32, self._base.tensors[end].shape)
        longer = [n for n in self._base.tensors if n.endswith("." + name)]
        return TensorInfo(name, _F32, self._base.tensors[longer[0]].shape if len(longer) == 1 else ())

    def _tensor(self, name: str) -> torch.Tensor:
        import torch

        info = self._adapter.tensors[name]
        if info.dtype.torch_name is None or not info.dtype.torch_name.startswith(("float", "bfloat")):
            raise BadFile(f"{self.label}: {name} is {info.dtype.name}, not floating-point")
        data = bytearray(self._adapter.read(name))
        return torch.frombuffer(data, dtype=getattr(torch, info.dtype.torch_name)).view(info.shape).to(torch.float32)

    def _add(self, module: str, names: dict[str, str], config: dict[str, Any]) -> str | None:
        """Make one module's product; what is wrong with it, or None."""
        name = self.prefix.base_name(f"{module}.weight")
        base = self._base.tensors.get(name) if name is not None else None
        if base is None:
            return f"{module}.weight: not in the base"
        a, b = self._tensor(names["A"]), self._tensor(names["B"])
        if "embedding" in names or (config.get("fan_in_fan_out") and len(base.shape) == 2):
            left, right = a.T.contiguous(), b.T.contiguous()  # the weight is stored transposed
        else:
            left, right = b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)
        entries = left.shape[0] * right.shape[1]
        if left.shape[1] != right.shape[0] or not base.shape or left.shape[0] != base.shape[0] or entries != base.entries:
            return f"{base.name}: {list(base.shape)} in the base, factors {list(a.shape)} and {list(b.shape)}"
        if not base.dtype.compressible:
            return f"{base.name}: {base.dtype.name} in the base, which cannot be added to"
        self._products[base.name] = Product(base, left, right.contiguous(), scale_of(config, module))
        return None

    def _whole(self, label: str) -> None:
        """What the fine-tune holds: the base's tensors, updated ones in float32, and what the adapter has whole."""
        tensors = dict(self._base.tensors)
        for name in self._products:
            tensors[name] = TensorInfo(name, _F32, tensors[name].shape)
        renamed: dict[str, str] = {}
        for plain, stored in self._kept.items():
            base_name = self.prefix.base_name(plain)
            name = base_name if base_name is not None and base_name in self._base.tensors else plain
            if name in self._products:
                raise BadFile(f"{label}: {name} has LoRA factors and stands there whole as well")
            info = self._adapter.tensors[stored]
            tensors[name] = TensorInfo(name, info.dtype, info.shape)
            renamed[name] = stored
        self._kept, self.tensors = renamed, tensors

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name in self._kept:
            self._adapter.read_into(self._kept[name], offset, buffer)
        elif name in self._products:
            self._expand(self._products[name], offset, buffer)
        else:
            self._base.read_into(name, offset, buffer)

    def _expand(self, product: Product, offset: int, buffer: memoryview) -> None:
        import torch

        if not len(buffer):
            return
        if offset % 4 or len(buffer) % 4:
            raise AssertionError("an expanded tensor is read by whole entries")
        start, n, info = offset // 4, len(buffer) // 4, product.base
        assert info.dtype.torch_name is not None
        room = bytearray(info.dtype.nbytes(n))
        self._base.read_into(info.name, info.dtype.nbytes(start), memoryview(room))
        out = torch.frombuffer(buffer, dtype=torch.float32)
        out.copy_(torch.frombuffer(room, dtype=getattr(torch, info.dtype.torch_name)))
        size = product.panel_rows * product.right.shape[1]
        at = start
        while at < start + n:
            number = at // size
            panel = self._panel(product, number)
            part = panel[at - number * size : start + n - number * size]
            out[at - start : at - start + len(part)].add_(part)
            at += len(part)

    def _panel(self, product: Product, number: int) -> torch.Tensor:
        """A panel of the update; each thread keeps its last one, which the next tile often shares."""
        key, panel = getattr(self._local, "last", (None, None))
        if key != (product.base.name, number):
            panel = product.panel(number)
            self._local.last = ((product.base.name, number), panel)
        assert panel is not None
        result: torch.Tensor = panel
        return result

    def close(self) -> None:
        self._adapter.close()
