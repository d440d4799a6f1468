"""Fit an adapter to a base: which tensor each module updates, and how; from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peru_cli.checkpoints.architectures import experts_are_in_out, is_conv1d, is_output, orientation_is_known, tied_embedding
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.lora.adapter import Adapter
from peru_cli.checkpoints.lora.foreign import Foreign
from peru_cli.checkpoints.lora.keys import KOHYA, PEFT
from peru_cli.checkpoints.lora.module import CONVOLUTION, EMBEDDING, LINEAR, PARAMETER, LoraModule
from peru_cli.checkpoints.lora.products import Product
from peru_cli.checkpoints.names.loaded_names import names_in_memory
from peru_cli.checkpoints.pairing import Prefix, find_prefix
from peru_cli.checkpoints.source import Checkpoint

PANEL = 1 << 16  # entries of a product computed at once, rounded to whole rows
F32 = BY_NAME["F32"]
_COMPONENTS = ("unet", "diffusion_model", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_KOHYA_COMPONENTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lora_prior_", "lycoris_")
_PARTS = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias", "set_weight": "weight"}
# What transformers fuses experts into while loading, and the names of the parts in checkpoints (Qwen's, Mixtral's).
_EXPERTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


@dataclass(frozen=True)
class Update:
    """The update of one tensor: a stack of `blocks` products (rows, columns), oriented like the stored tensor.

    With `block`, only a part of that block's product, from row `first_row` on: an expert that the base stores separately. `over` is
    the tensor that it is added to if the adapter holds that tensor itself. `transposed` says that the tensor is stored as (in, out).
    A bias has no `module.down`: it is a column. `source` is the base's tensor under another name: the embedding, if the output
    matrix is tied to it and gets its own update."""

    info: TensorInfo
    module: LoraModule
    rows: int
    columns: int
    transposed: bool = False
    is_bias: bool = False
    block: int | None = None
    first_row: int = 0
    over: str | None = None
    source: str | None = None

    @property
    def panel_rows(self) -> int:
        """Rows of every panel except a block's last."""
        return max(1, PANEL // max(self.columns, 1))


@dataclass(frozen=True)
class Difference:
    """A tensor of the adapter, `stored`, that is added to one of the base entry by entry."""

    info: TensorInfo
    stored: str


@dataclass(frozen=True)
class Computed:
    """An update of a whole matrix that is computed at once: a LyCORIS product."""

    info: TensorInfo
    product: Product


@dataclass(frozen=True)
class Merged:
    """A weight or bias of a module that peft merges."""

    info: TensorInfo
    module: Foreign
    part: str


AnyUpdate = Update | Difference | Computed | Merged


class Fitting:
    """Finds the base's tensor that each module updates, and collects what does not fit."""

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self._adapter, self._base = adapter, base
        self.problems: list[str] = []
        self._flat = _flat_names(base) if adapter.layout == KOHYA else {}
        self._leaves = sorted({target.rpartition(".")[2] for target in adapter.config.get("target_parameters") or []})
        self._known = {name: name for name in base.tensors}  # maps the adapter's possible names of a tensor to the base's
        self.prefix = self._find_prefix()
        strangers = any(self.base_name(f"{module.name}.weight") not in base.tensors for module in adapter.foreign)
        if strangers or (adapter.layout == PEFT and any(not self._candidates(module, base.tensors) for module in adapter.modules)):
            self._know_names_in_memory()

    def _know_names_in_memory(self) -> None:
        """PEFT uses the names that modules have in memory, after transformers has loaded them."""
        renamed, _ = names_in_memory(self._base.config(), len(self._base.tensors))
        self._known = {renamed.get(name, name): name for name in self._base.tensors} if renamed else self._known
        self.prefix = self._find_prefix()

    def _find_prefix(self) -> Prefix:
        """How the base names modules. Shapes may be unknown: a name with the right end is the module's."""
        if self._adapter.layout == KOHYA:
            return Prefix()
        wanted = [name for module in self._adapter.modules for name in self._plain_names(module)[:1]]
        others = [product.name for product in self._adapter.products] + [module.name for module in self._adapter.foreign]
        others += [owner for owner, _ in self._adapter.deltas.values()]
        wanted += [f"{self._without_component(name)}.weight" for name in others]
        wanted += [name for module in self._adapter.modules for name, _, _ in _experts(module, self._leaves, 1)]
        fake = {name: self._like(name) for name in wanted}
        known = ((name, self._base.tensors[stored]) for name, stored in self._known.items())
        return find_prefix(fake, {name: TensorInfo(name, info.dtype, info.shape) for name, info in known})

    def _like(self, name: str) -> TensorInfo:
        """The base's tensor of a name, or of the longest end of the name that it has."""
        parts = name.split(".")
        for cut in range(len(parts)):
            end = ".".join(parts[cut:])
            if end in self._known:
                return TensorInfo(name, F32, self._base.tensors[self._known[end]].shape)
        longer = [n for n in self._known if n.endswith("." + name)]
        return TensorInfo(name, F32, self._base.tensors[self._known[longer[0]]].shape if len(longer) == 1 else ())

    def base_name(self, plain: str) -> str:
        """The base's name of a tensor that the adapter names, or the adapter's own if the base has none."""
        name = self.prefix.base_name(plain)
        return plain if name is None else self._known.get(name, plain)

    def _plain_names(self, module: LoraModule) -> list[str]:
        """Possible names of the updated tensor, in the adapter's terms, most likely first."""
        if module.kind == PARAMETER:
            others = [f"{module.name}.{leaf}" for leaf in self._leaves]
            return list(dict.fromkeys([*([module.parameter] if module.parameter else []), *others]))
        name = self._without_component(module.name)
        return [f"{name}.weight", f"{name}.in_proj_weight"]

    def _without_component(self, name: str) -> str:
        """A module's name without the prefix of a diffusers file."""
        if self._adapter.layout == PEFT:
            return name
        component, _, rest = name.partition(".")
        return (rest if component in _COMPONENTS else name).replace(".processor.", ".")

    def _candidates(self, module: LoraModule, tensors: Mapping[str, TensorInfo]) -> list[TensorInfo]:
        if self._adapter.layout == KOHYA:
            return self._named(module.name, tensors)
        names = [self.base_name(name) for name in self._plain_names(module)]
        return [tensors[name] for name in names if name in tensors]

    def _named(self, module: str, tensors: Mapping[str, TensorInfo]) -> list[TensorInfo]:
        """The weight of a module of a single file, or the parameter of that name."""
        if self._adapter.layout == KOHYA:
            component = next((c for c in _KOHYA_COMPONENTS if module.startswith(c)), "")
            names = list(self._flat.get(module[len(component) :], ()))
        else:
            plain = self._without_component(module)
            names = [self.base_name(f"{plain}.weight"), self.base_name(plain)]
        return [tensors[name] for name in names if name in tensors]

    def updates(self, tensors: Mapping[str, TensorInfo], kept: Mapping[str, str]) -> dict[str, AnyUpdate]:
        """Updates by the name of their tensor. `tensors` includes those that the adapter holds whole (`kept`)."""
        found: dict[str, AnyUpdate] = {}
        for product in self._adapter.products:
            self._take_computed(found, product, tensors)
        self._take_differences(found, tensors)
        for name, (weight, bias) in self.fellows(tensors).items():
            foreign = next(one for one in self._adapter.foreign if one.name == name)
            self._take(found, Merged(weight, foreign, "weight"), {})
            if bias is not None:
                self._take(found, Merged(bias, foreign, "bias"), {})
        for module in self._adapter.modules:
            candidates = self._candidates(module, tensors)
            fitting = [update for info in candidates if info.name not in found and (update := self._update(module, info)) is not None]
            if not fitting and (experts := self._expert_updates(module, tensors)):
                for update in experts:
                    self._take(found, update, kept)
                continue
            if not fitting and not candidates and (untied := self._untied_head(module, tensors)) is not None:
                fitting = [untied]
            if not fitting:
                self._say_why(module, candidates, found)
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

    def _untied_head(self, module: LoraModule, tensors: Mapping[str, TensorInfo]) -> Update | None:
        """The update of an output matrix that the base does not store because it is tied to the embedding."""
        name = self.base_name(f"{module.name}.weight")
        embedding = tied_embedding(self._base.config(), self._base.tensors) if self._adapter.layout == PEFT else None
        if embedding is None or module.kind != LINEAR or not is_output(name) or name in tensors:
            return None
        like = self._base.tensors[embedding]
        update = self._update(module, TensorInfo(name, like.dtype, like.shape))
        return None if update is None else replace(update, source=embedding)

    def _take_computed(self, found: dict[str, AnyUpdate], product: Product, tensors: Mapping[str, TensorInfo]) -> None:
        where = f"{product.name} in {self._adapter.weights.name}"
        infos = self._named(product.name, tensors)
        if not infos:
            self.problems.append(f"{where}: the base has no weight of this name")
        elif (infos[0].shape or (0,))[0] != product.rows or infos[0].entries != product.rows * product.columns:
            size = f"{product.rows} x {product.columns}"
            self.problems.append(f"{where}: its {product.kind} is {size}, and {infos[0].name} of the base is {list(infos[0].shape)}")
        else:
            self._take(found, Computed(infos[0], product), {})

    def _take_differences(self, found: dict[str, AnyUpdate], tensors: Mapping[str, TensorInfo]) -> None:
        """Entries that are added to weights and biases directly; `put_whole` has those that replace them."""
        for stored, (owner, what) in self._adapter.deltas.items():
            if what == "set_weight":
                continue
            info = self._place_of(owner, what, tensors)
            delta = self._adapter.file.tensors[stored]
            if info is None:
                self.problems.append(f"{stored} in {self._adapter.weights.name}: the base has no {_PARTS[what]} of this name")
            elif info.entries != delta.entries or [n for n in info.shape if n != 1] != [n for n in delta.shape if n != 1]:
                self.problems.append(f"{stored}: a difference of {list(delta.shape)}, and {info.name} of the base is {list(info.shape)}")
            elif not delta.dtype.compressible:
                self.problems.append(f"{stored} is {delta.dtype.name}, not floating-point")
            elif info.name in found:
                self.problems.append(f"{stored}: {info.name} of the base has another update, and which counts depends on the loader")
            else:
                self._take(found, Difference(info, stored), {})

    def fellows(self, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[TensorInfo, TensorInfo | None]]:
        """Weight and bias of each module that peft merges, by the adapter's name for it. Missing ones are reported as problems."""
        found = {}
        for module in self._adapter.foreign:
            weight = tensors.get(self.base_name(f"{module.name}.weight"))
            if weight is None:
                self.problems.append(f"{module.name} in {self._adapter.weights.name}: the base has no {module.name}.weight")
            elif not 1 <= len(weight.shape) <= 4:
                self.problems.append(f"{module.name}: {weight.name} of the base is {list(weight.shape)}")
            else:
                found[module.name] = (weight, tensors.get(weight.name.removesuffix("weight") + "bias"))
        return found

    def put_whole(self) -> dict[str, str]:
        """The base's tensors that entries of the adapter replace, by entry."""
        placed = {}
        for stored, (owner, what) in self._adapter.deltas.items():
            if what == "set_weight":
                info = self._place_of(owner, what, self._base.tensors)
                if info is None:
                    self.problems.append(f"{stored} in {self._adapter.weights.name}: the base has no weight of this name")
                elif info.shape != self._adapter.file.tensors[stored].shape:
                    shape = list(self._adapter.file.tensors[stored].shape)
                    self.problems.append(f"{stored} is {shape}, and {info.name} of the base is {list(info.shape)}")
                else:
                    placed[stored] = info.name
        return placed

    def _place_of(self, owner: str, what: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
        infos = self._named(owner, tensors)
        if not infos:
            return None
        return tensors.get(infos[0].name.removesuffix("weight") + "bias") if _PARTS[what] == "bias" else infos[0]

    def _expert_updates(self, module: LoraModule, tensors: Mapping[str, TensorInfo]) -> list[Update]:
        """Updates of experts that the base stores one by one, while loading fuses them. Empty if one is missing."""
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

    def _take(self, found: dict[str, AnyUpdate], update: AnyUpdate, kept: Mapping[str, str]) -> None:
        name = update.info.name
        if not update.info.dtype.compressible:
            self.problems.append(f"{name}: {update.info.dtype.name}, which cannot be added to")
        if name in found:
            self.problems.append(f"{name}: the adapter has two updates for it")
        found[name] = replace(update, over=kept.get(name)) if isinstance(update, Update) else update

    def _update(self, module: LoraModule, info: TensorInfo) -> Update | None:
        """The update of a tensor, if its shape fits."""
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
            fits, fits_turned = squeezed == (rows, columns), shape == (columns, rows)
            if orientation_is_known(self._base.config()):  # PEFT uses the module's type, whatever fan_in_fan_out says
                prefer_turned = is_conv1d(info.name.removesuffix(".weight"), self._base.config())
                straight, turned = fits and not prefer_turned, fits_turned and prefer_turned
            else:
                straight, turned = fits, fits_turned
                prefer_turned = bool(self._adapter.config.get("fan_in_fan_out"))
                if fits and fits_turned and self._adapter.config and info.name.removesuffix(".weight").rpartition(".")[2].startswith("c_"):
                    self.problems.append(f"{info.name} may be stored as (in, out): its base has no config.json to tell")
        if not straight and not turned:
            return None
        if turned and (prefer_turned or not straight):
            return Update(info, module, columns, rows, transposed=True)
        return Update(info, module, rows, columns)

    def _say_why(self, module: LoraModule, candidates: list[TensorInfo], found: Mapping[str, AnyUpdate]) -> None:
        where = f"{module.name} in {self._adapter.weights.name}"
        if candidates and candidates[0].name in found:
            self.problems.append(f"{where}: {candidates[0].name} of the base has another update already")
        elif candidates:
            info = candidates[0]
            factors = f"{list(module.down.shape)} and {list(module.up.shape)}"
            self.problems.append(f"{where}: factors {factors}, and {info.name} of the base is {list(info.shape)}")
        else:
            self.problems.append(f"{where}: the base has no {self._plain_names(module)[0]}")


def _flat_names(base: Checkpoint) -> dict[str, list[str]]:
    """Names of weights with dots replaced as in kohya files, and their ends: a base in one file may have a prefix."""
    found: dict[str, list[str]] = {}
    for name in sorted(base.tensors):
        parts = name.removesuffix(".weight").split(".")
        for cut in range(len(parts)):
            found.setdefault("_".join(parts[cut:]), []).append(name)
    return {flat: names for flat, names in found.items() if len(names) == 1}


def _experts(module: LoraModule, leaves: Sequence[str], count: int) -> list[tuple[str, int, int]]:
    """Possible separate names of the experts in a fused parameter: name, number, and which part of its rows it is."""
    names = []
    for leaf in leaves if module.kind == PARAMETER else ():
        for own in _EXPERTS.get(leaf, ()):
            for container in dict.fromkeys((module.name, module.name.replace(".mlp.", ".block_sparse_moe."))):
                names += [(f"{container}.{e}.{name}.weight", e, part) for e in range(count) for part, name in enumerate(own)]
    return names
