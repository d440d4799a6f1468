"""LoRA adapters as stored in their files: modules, factors, scales and whole tensors; no base needed.

The update of a module is scale * B @ A (Hu et al. 2021, https://arxiv.org/abs/2106.09685), the scale alpha / r, or
alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732). For convolutions it applies to flattened
kernels, for fused experts to each expert. DoRA (https://arxiv.org/abs/2402.09353) scales the rows of base + update to
learned magnitudes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peru_cli.checkpoints.local.checkpoint import open_file
from peru_cli.checkpoints.local.sealed import AGAIN, file_digest, told_files
from peru_cli.checkpoints.lora.alpha import Alphas
from peru_cli.checkpoints.lora.config import CONFIG, FILES, rank_of, read_config, refuse_model_beside, scale_of, sealed_config
from peru_cli.checkpoints.lora.foreign import Foreign, sort_foreign
from peru_cli.checkpoints.lora.keys import OUTER, PEFT, Keys, Sorted, looks_like_lora, sort_file, sort_peft
from peru_cli.checkpoints.lora.module import CONVOLUTION, EMBEDDING, LINEAR, PARAMETER, LoraModule
from peru_cli.checkpoints.lora.products import Product, open_product
from peru_cli.checkpoints.places import Place, children
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, UsageError

if TYPE_CHECKING:
    import torch

WEIGHTS = FILES[0]
REST = "peru-rest.safetensors"  # a sparse delta with what an adapter from a full fine-tune cannot hold
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


class Adapter:
    """One adapter: a folder with adapter_config.json, its weights' file, or a kohya or diffusers file. Opening it reads only headers.

    `path` is its folder, or its file if it has no config. `modules` are LoRA's pairs of factors. `foreign` are modules of PEFT's
    other methods, and `shared` the tensors that these share. `products` are LyCORIS' modules, `deltas` entries that are added or
    replace the base's, `whole` tensors that it holds whole."""

    def __init__(self, path: Place, label: str) -> None:
        """Raises UsageError for another kind of adapter, BadFile if modules are incomplete or have ranks of 0."""
        self.path, self.label = path, label
        self.config: dict[str, Any] = {}
        if path.is_file() and _has_config_beside(path):
            self.path, self.weights = path.parent, path
            self.config = read_config(self.path, label)
        elif (path / CONFIG).is_file():
            self.config = read_config(path, label)
            found = [path / name for name in FILES if (path / name).is_file()]
            if not found:
                raise BadFile(f"{label} has {CONFIG}, but neither {' nor '.join(FILES)}")
            self.weights = found[0]
        else:
            self.weights = path / _DIFFUSERS_FILE if path.is_dir() else path
        self.file: Checkpoint = open_file(self.weights, str(self.weights))
        try:
            self._check_config()
            self.foreign, self.shared = list[Foreign](), list[str]()
            if self.config.get("peft_type", "LORA") != "LORA":
                self.foreign, self.shared, whole = sort_foreign(list(self.file.tensors), self.config["peft_type"])
                keys = Sorted(PEFT, whole=whole)
                if not self.foreign:
                    raise BadFile(f"{self.weights}: it holds no {self.config['peft_type']} parameters")
            elif self.config:
                keys = sort_peft(self.file.tensors, str(self.weights))
            else:
                keys = sort_file(self.file.tensors, str(self.weights))
            self.layout, self.whole, self.deltas, self.unknown = keys.layout, keys.whole, keys.deltas, keys.unknown
            builder = _Builder(self, keys)
            self.modules, self.products = builder.modules(), builder.products()
        except BaseException:
            self.file.close()
            raise

    def _check_config(self) -> None:
        """Refuse a config that was altered after peru wrote it: its scales and ranks determine the weights."""
        told = told_files(self.file.metadata).get(CONFIG)
        if told is not None and file_digest(sealed_config(self.config)) != told:
            raise BadFile(f"{self.path / CONFIG} was altered after it was written", AGAIN)

    @property
    def kind(self) -> str:
        """Its kind, in words."""
        if self.foreign:
            return f"{self.config['peft_type']} adapter, on {len(self.foreign)} module{'' if len(self.foreign) == 1 else 's'}"
        if not self.modules:
            kinds = sorted({product.kind for product in self.products}) or ["differences"]
            return f"{' and '.join(kinds)} in a single file, {len(self.products) + len(self.deltas)} updates"
        ranks = sorted({module.rank for module in self.modules})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        name = "DoRA" if any(module.magnitude for module in self.modules) else "LoRA"
        where = "" if self.layout == PEFT else f" in the {self.layout} layout"
        more = f", and {len(self.products) + len(self.deltas)} other updates" if self.products or self.deltas else ""
        return f"{name} adapter{where}, rank {shown}, on {len(self.modules)} module{'' if len(self.modules) == 1 else 's'}{more}"

    def tensor(self, name: str) -> torch.Tensor:
        """One floating-point tensor in its own dtype. BadFile if it is of another type, or not finite."""
        import torch

        info = self.file.tensors[name]
        kind = info.dtype.torch_name
        if kind is None or not kind.startswith(("float", "bfloat")):
            raise BadFile(f"{self.weights}: {name} is {info.dtype.name}, not floating-point")
        data = bytearray(self.file.read(name))
        tensor = torch.frombuffer(data, dtype=getattr(torch, kind)).view(info.shape)
        if not bool(torch.isfinite(tensor).all()):
            raise BadFile(f"{self.weights}: {name} holds NaN or infinite values", "the adapter is broken: train or download it again")
        return tensor

    def number(self, name: str) -> float:
        """A tensor of one entry, floating-point or integer: alpha as trainers write it. BadFile for any other."""
        info = self.file.tensors[name]
        if info.entries != 1:
            raise BadFile(f"{self.weights}: {name} has {info.entries} entries, not one")
        if info.dtype.name not in _INTEGERS:
            return float(self.tensor(name))
        return float(int.from_bytes(self.file.read(name), "little", signed=info.dtype.name[0] == "I"))

    def factors(self, module: LoraModule) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """left (rows, rank), right (rank, columns) of each block, as stored."""
        return module.split(self.tensor(module.down.name), self.tensor(module.up.name))

    def close(self) -> None:
        """Release the file."""
        self.file.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def is_adapter(path: Place) -> bool:
    """Whether a path is the folder of one adapter: with a config, or diffusers'. UsageError if it also holds a model."""
    refuse_model_beside(path)
    return (path / CONFIG).is_file() or (path / _DIFFUSERS_FILE).is_file()


def is_lora_file(path: Place) -> bool:
    """Whether a path is the file of an adapter, judged by its tensors' names. False if it cannot be read."""
    if not path.is_file():
        return False
    if path.name in FILES and (path.parent / CONFIG).is_file():
        return True
    if path.suffix != ".safetensors":
        return False
    try:
        with open_file(path, str(path)) as opened:
            return looks_like_lora(opened.tensors)
    except BadFile:
        return False


def _has_config_beside(path: Place) -> bool:
    """Whether the config beside a file belongs to it: the file has PEFT's own name, or tensors named as in PEFT."""
    if not (path.parent / CONFIG).is_file():
        return False
    if path.name in FILES:
        return True
    with open_file(path, str(path)) as opened:
        return any(name.startswith(OUTER) for name in opened.tensors)


def find_adapters(path: Place) -> dict[str, Place]:
    """The adapters of a folder in peft's layout for several: the default one in the folder itself under "", others in sub-folders."""
    found = {"": path} if is_adapter(path) else {}
    return found | {child.name: child for child in children(path) if (child / CONFIG).is_file() and not child.name.startswith(".")}


class _Builder:
    """Builds the modules of an adapter from its sorted names."""

    def __init__(self, adapter: Adapter, keys: Sorted) -> None:
        self._adapter, self._keys = adapter, keys
        self._tensors = adapter.file.tensors
        self._alphas = Alphas(adapter.file.metadata, [*keys.modules, *keys.products], str(adapter.weights))
        if adapter.config and "lora_alpha" in adapter.config:
            self._alphas.check_config(adapter.config, CONFIG)
        self._own_alphas: dict[str, float] = {}
        self._has_alphas = any(module.alpha for module in keys.modules.values())
        self._parameters = _nesting(adapter.config.get("target_parameters") or [], list(keys.modules))

    def modules(self) -> list[LoraModule]:
        found = [self._module(path, keys) for path, keys in sorted(self._keys.modules.items())]
        for module in found if self._adapter.config else ():
            if bool(self._adapter.config.get("use_dora")) != (module.magnitude is not None):
                has = "has" if module.magnitude is not None else "has no"
                raise self._bad(module.name, f"it {has} magnitudes, {CONFIG} says use_dora={self._adapter.config.get('use_dora')!r}")
        self._alphas.check_tensors(self._own_alphas)
        return found

    def products(self) -> list[Product]:
        """LyCORIS' modules."""
        found = []
        for name, parts in sorted(self._keys.products.items()):
            alpha = self._adapter.number(parts["alpha"]) if "alpha" in parts else None
            infos = {part: self._tensors[stored] for part, stored in parts.items()}
            found.append(open_product(name, infos, alpha, self._alphas.scale(name, 1), str(self._adapter.weights)))
        return found

    def _module(self, path: str, keys: Keys) -> LoraModule:
        assert keys.down is not None and keys.up is not None
        down, up = self._tensors[keys.down], self._tensors[keys.up]
        name = path.replace(".base_layer", "").removeprefix(OUTER)
        targeted, parameter = self._parameters.get(path, (False, None))
        kind = PARAMETER if targeted else EMBEDDING if keys.embedding else CONVOLUTION if len(down.shape) > 2 else LINEAR
        if len(down.shape) < 2 or len(up.shape) != len(down.shape):
            raise self._bad(name, f"its factors are {list(down.shape)} and {list(up.shape)}")
        total, blocks = down.shape[0], 1
        if kind == PARAMETER:
            rank = rank_of(self._adapter.config, parameter or name)
            if rank < 1 or total % rank:
                raise self._bad(name, f"lora_A has {total} rows, not a multiple of its rank {rank}")
            blocks = total // rank
        if total < 1 or up.shape[1] < 1 or not down.entries or not up.entries:
            raise self._bad(name, "its rank is 0")
        if up.shape[1] != total:
            if kind == CONVOLUTION and total % up.shape[1] == 0:
                raise UsageError(
                    f"{self._adapter.weights}: {name} is a LoRA of a grouped convolution: lora_A has rank {total}, lora_B {up.shape[1]}",
                    "peru knows convolutions without groups",
                )
            raise self._bad(name, f"lora_A has rank {total}, lora_B {up.shape[1]}")
        if kind == CONVOLUTION and up.entries != up.shape[0] * up.shape[1]:
            raise self._bad(name, f"its lora_B is {list(up.shape)}, not a convolution with a kernel of 1")
        module = LoraModule(
            path, name, kind, down, up, total // blocks, 1.0, blocks, parameter, keys.magnitude, keys.bias, keys.alpha
        )  # fmt: skip
        return replace(module, scale=self._scale(module))

    def _scale(self, module: LoraModule) -> float:
        config = self._adapter.config
        if config:
            configured = rank_of(config, module.target)
            if configured != module.rank:
                raise self._bad(module.name, f"its factors have rank {module.rank}, {CONFIG} says {configured}")
            return scale_of(config, module.target, module.rank)
        if module.alpha is not None:
            self._own_alphas[module.alpha] = alpha = self._adapter.number(module.alpha)
            return alpha / module.rank
        self._alphas.check_rank(module.name, module.rank)
        # if some modules have an alpha, every loader uses the rank for those without
        recorded = None if self._has_alphas else self._alphas.scale(module.name, module.rank)
        if recorded is None and module.path.startswith(OUTER):
            raise BadFile(
                f"{self._adapter.weights}: {module.path} has a PEFT name, but no {CONFIG} beside the file gives its scale",
                "put the adapter's configuration beside the file",
            )
        return 1.0 if recorded is None else recorded  # without a record, kohya's alpha and diffusers' lora_alpha equal the rank

    def _bad(self, module: str, what: str) -> BadFile:
        return BadFile(f"{self._adapter.weights}: {module}: {what}")


def _nesting(targets: list[str], paths: list[str]) -> dict[str, tuple[bool, str | None]]:
    """Which paths are targeted parameters, and of what: peft wraps a module once for each, the first one innermost.

    The order is that in which the module declares its parameters. In transformers' experts `down_proj` comes last. If it is
    unknown, the parameter is None (and found by its shape if there is a base)."""
    depths: dict[str, dict[int, str]] = {}
    for path in paths:
        module = re.sub(r"(\.base_layer)+$", "", path)
        depths.setdefault(module, {})[(len(path) - len(module)) // len(".base_layer")] = path
    result: dict[str, tuple[bool, str | None]] = {}
    for module, by_depth in depths.items():
        leaves = sorted({t.rpartition(".")[2] for t in targets if _targets(t, module)}, key=lambda leaf: ("down" in leaf, leaf))
        if not leaves:
            continue
        known = len(leaves) == len(by_depth) and (len(leaves) == 1 or [leaf for leaf in leaves if "down" in leaf] == leaves[-1:])
        for depth, path in by_depth.items():
            result[path] = (True, f"{module}.{leaves[-1 - depth]}" if known else None)
    return result


def _targets(target: str, module: str) -> bool:
    """Whether an entry of target_parameters names a parameter of a module."""
    full = f"{module}.{target.rpartition('.')[2]}"
    return full == target or full.endswith("." + target)
