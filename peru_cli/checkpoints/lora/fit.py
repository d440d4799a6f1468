"""Where an adapter's modules belong in a base: which tensor each of them updates, and how; from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peru_cli.checkpoints.architectures import experts_are_in_out
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.loaded_names import names_in_memory
from peru_cli.checkpoints.lora.adapter import CONVOLUTION, EMBEDDING, PARAMETER, Adapter, LoraModule
from peru_cli.checkpoints.lora.keys import KOHYA, PEFT
from peru_cli.checkpoints.pairing import Prefix, find_prefix
from peru_cli.checkpoints.source import Checkpoint

PANEL = 1 << 16  # entries of a product computed at once, rounded to whole rows
F32 = BY_NAME["F32"]
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_KOHYA_COMPONENTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lora_prior_", "lycoris_")
# What transformers fuses experts into while loading, and what checkpoints call the parts (Qwen's names, Mixtral's).
_EXPERTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


@dataclass(frozen=True)
class Update:
    """What is added to one tensor: a stack of `blocks` products (rows, columns), as the tensor stores them.

    With `block`, it is a part of that block's product alone, from row `first_row` on: an expert that the base has on
    its own. `over` is the tensor that it is added to where the adapter holds that itself. `transposed` says that the tensor is
    stored as (in, out). A bias has no `module.down`: it is a column.
    """

    info: TensorInfo
    module: LoraModule
    rows: int
    columns: int
    transposed: bool = False
    is_bias: bool = False
    block: int | None = None
    first_row: int = 0
    over: str | None = None

    @property
    def panel_rows(self) -> int:
        """Rows of every panel but a block's last."""
        return max(1, PANEL // max(self.columns, 1))


class Fitting:
    """Finds the tensor of the base that each module updates, and collects what does not fit."""

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self._adapter, self._base = adapter, base
        self.problems: list[str] = []
        self._flat = _flat_names(base) if adapter.layout == KOHYA else {}
        self._leaves = sorted({target.rpartition(".")[2] for target in adapter.config.get("target_parameters") or []})
        self._known = {name: name for name in base.tensors}  # what the adapter may call a tensor: what the base calls it
        self.prefix = self._find_prefix()
        if adapter.layout == PEFT and any(not self._candidates(module, base.tensors) for module in adapter.modules):
            self._know_names_in_memory()

    def _know_names_in_memory(self) -> None:
        """PEFT goes by the names that transformers gives modules when it loads them."""
        renamed, _ = names_in_memory(self._base.config())
        self._known = {renamed.get(name, name): name for name in self._base.tensors} if renamed else self._known
        self.prefix = self._find_prefix()

    def _find_prefix(self) -> Prefix:
        """How modules are named in the base. Shapes need not be known: a name with the right end is the module's."""
        if self._adapter.layout == KOHYA:
            return Prefix()
        wanted = [name for module in self._adapter.modules for name in self._plain_names(module)[:1]]
        wanted += [name for module in self._adapter.modules for name, _, _ in _experts(module, self._leaves, 1)]
        fake = {name: self._like(name) for name in wanted}
        known = ((name, self._base.tensors[stored]) for name, stored in self._known.items())
        return find_prefix(fake, {name: TensorInfo(name, info.dtype, info.shape) for name, info in known})

    def _like(self, name: str) -> TensorInfo:
        """What the base has under a name, or under its longest end that the base knows."""
        parts = name.split(".")
        for cut in range(len(parts)):
            end = ".".join(parts[cut:])
            if end in self._known:
                return TensorInfo(name, F32, self._base.tensors[self._known[end]].shape)
        longer = [n for n in self._known if n.endswith("." + name)]
        return TensorInfo(name, F32, self._base.tensors[self._known[longer[0]]].shape if len(longer) == 1 else ())

    def base_name(self, plain: str) -> str:
        """The base's name of a tensor that the adapter names; the adapter's own, if the base has none."""
        name = self.prefix.base_name(plain)
        return plain if name is None else self._known.get(name, plain)

    def _plain_names(self, module: LoraModule) -> list[str]:
        """What the updated tensor may be called, in the adapter's terms, likeliest first."""
        if module.kind == PARAMETER:
            others = [f"{module.name}.{leaf}" for leaf in self._leaves]
            return list(dict.fromkeys([*([module.parameter] if module.parameter else []), *others]))
        name = module.name
        if self._adapter.layout != PEFT:
            component, _, rest = name.partition(".")
            name = (rest if component in _COMPONENTS else name).replace(".processor.", ".")
        return [f"{name}.weight", f"{name}.in_proj_weight"]

    def _candidates(self, module: LoraModule, tensors: Mapping[str, TensorInfo]) -> list[TensorInfo]:
        if self._adapter.layout == KOHYA:
            component = next((c for c in _KOHYA_COMPONENTS if module.name.startswith(c)), "")
            names = list(self._flat.get(module.name[len(component) :], ()))
        else:
            names = [self.base_name(name) for name in self._plain_names(module)]
        return [tensors[name] for name in names if name in tensors]

    def updates(self, tensors: Mapping[str, TensorInfo], kept: Mapping[str, str]) -> dict[str, Update]:
        """The updates by the name of their tensor; `tensors` includes those that the adapter holds whole (`kept`)."""
        found: dict[str, Update] = {}
        for module in self._adapter.modules:
            candidates = self._candidates(module, tensors)
            fitting = [update for info in candidates if info.name not in found and (update := self._update(module, info)) is not None]
            if not fitting and (experts := self._expert_updates(module, tensors)):
                for update in experts:
                    self._take(found, update, kept)
                continue
            if not fitting:
                self._say_why(module, candidates)
                continue
            self._take(found, fitting[0], kept)
            if module.bias is not None:
                name = fitting[0].info.name.removesuffix("weight") + "bias"
                info = tensors.get(name)
                if info is None or info.shape != (module.rows,):
                    self.problems.append(f"{module.bias}: the base has no bias {name} of {module.rows} entries to add it to")
                else:
                    self._take(found, Update(info, module, module.rows, 1, is_bias=True), kept)
        return found

    def _expert_updates(self, module: LoraModule, tensors: Mapping[str, TensorInfo]) -> list[Update]:
        """The updates of experts that the base has one by one, where loading fuses them; none if any is not there."""
        for leaf in self._leaves if module.kind == PARAMETER else ():
            parts = _experts(module, [leaf], module.blocks)
            names = {self.base_name(name): at for name, *at in parts}
            found = {name: at for name, at in names.items() if name in tensors}
            if not found:
                continue
            rows = module.rows * module.blocks // len(found)
            updates = [
                Update(tensors[name], module, rows, module.columns, block=block, first_row=part * rows)
                for name, (block, part) in found.items()
            ]
            if all(update.info.shape == (rows, module.columns) for update in updates):
                return updates
        return []

    def _take(self, found: dict[str, Update], update: Update, kept: Mapping[str, str]) -> None:
        name = update.info.name
        if not update.info.dtype.compressible:
            self.problems.append(f"{name}: {update.info.dtype.name}, which cannot be added to")
        found[name] = replace(update, over=kept.get(name))

    def _update(self, module: LoraModule, info: TensorInfo) -> Update | None:
        """The update of a tensor if its shape fits."""
        rows, columns, shape = module.rows, module.columns, info.shape
        if module.kind == PARAMETER and len(shape) == 3:
            straight, turned = (module.blocks, rows, columns) == shape, (module.blocks, columns, rows) == shape
            prefer_turned = experts_are_in_out(self._base.config())
        elif module.kind == CONVOLUTION:
            straight, turned = bool(shape) and shape[0] == rows and info.entries == rows * columns, False
            prefer_turned = False
        elif module.kind == EMBEDDING:
            straight, turned, prefer_turned = False, shape == (columns, rows), True
        else:
            squeezed = shape[:2] if all(n == 1 for n in shape[2:]) else shape  # a linear LoRA of a 1 x 1 convolution
            straight, turned = squeezed == (rows, columns), shape == (columns, rows)
            prefer_turned = bool(self._adapter.config.get("fan_in_fan_out"))
        if not straight and not turned:
            return None
        if turned and (prefer_turned or not straight):
            return Update(info, module, columns, rows, transposed=True)
        return Update(info, module, rows, columns)

    def _say_why(self, module: LoraModule, candidates: list[TensorInfo]) -> None:
        where = f"{module.name} in {self._adapter.weights.name}"
        if candidates:
            info = candidates[0]
            factors = f"{list(module.down.shape)} and {list(module.up.shape)}"
            self.problems.append(f"{where}: factors {factors}, and {info.name} of the base is {list(info.shape)}")
        else:
            self.problems.append(f"{where}: the base has no {self._plain_names(module)[0]}")


def _flat_names(base: Checkpoint) -> dict[str, list[str]]:
    """Names of weights with dots replaced as kohya does, and their ends: a base in one file may have a prefix."""
    found: dict[str, list[str]] = {}
    for name in sorted(base.tensors):
        parts = name.removesuffix(".weight").split(".")
        for cut in range(len(parts)):
            found.setdefault("_".join(parts[cut:]), []).append(name)
    return {flat: names for flat, names in found.items() if len(names) == 1}


def _experts(module: LoraModule, leaves: Sequence[str], count: int) -> list[tuple[str, int, int]]:
    """What the experts in a fused parameter may be called on their own: name, number, and which part of its rows it is."""
    names = []
    for leaf in leaves if module.kind == PARAMETER else ():
        for own in _EXPERTS.get(leaf, ()):
            for container in dict.fromkeys((module.name, module.name.replace(".mlp.", ".block_sparse_moe."))):
                names += [(f"{container}.{e}.{name}.weight", e, part) for e in range(count) for part, name in enumerate(own)]
    return names
