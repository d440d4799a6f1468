"""LoRA adapters as their files have them: modules, factors, scales and what is held whole, without any base.

The update of a module is scale * B @ A (Hu et al. 2021, https://arxiv.org/abs/2106.09685), the scale alpha / r, or
alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732). Convolutions have it on flattened
kernels, fused experts for each expert; DoRA (https://arxiv.org/abs/2402.09353) scales the rows of base + update to
learned magnitudes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.checkpoint import open_file
from peru_cli.checkpoints.lora.config import CONFIG, rank_of, read_config, scale_of
from peru_cli.checkpoints.lora.keys import PEFT, Keys, Sorted, looks_like_lora, sort_file, sort_peft
from peru_cli.checkpoints.places import Place, children
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, UsageError

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
REST = "peru-rest.safetensors"  # a sparse delta of what an adapter out of a full fine-tune cannot hold
_FILES = (WEIGHTS, "adapter_model.bin")
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"
LINEAR, EMBEDDING, CONVOLUTION, PARAMETER = "linear", "embedding", "convolution", "parameter"


@dataclass(frozen=True)
class LoraModule:
    """One pair of factors.

    `path` is the module as the file names it (with `.base_layer` where PEFT nests), `name` without that. `parameter` is
    the full name of a targeted parameter, as far as it is known without the base. `blocks` is the number of experts; `rank` that
    of each. `magnitude` and `bias` are names of tensors of DoRA and of `lora_bias`.
    """

    path: str
    name: str
    kind: str
    down: TensorInfo
    up: TensorInfo
    rank: int
    scale: float
    blocks: int = 1
    parameter: str | None = None
    magnitude: str | None = None
    bias: str | None = None
    alpha: str | None = None

    @property
    def target(self) -> str:
        """What rank and alpha patterns are matched against: the module, or the parameter."""
        return self.parameter or self.name

    @property
    def rows(self) -> int:
        """d_out: rows of B @ A."""
        return self.up.shape[0]

    @property
    def columns(self) -> int:
        """d_in: columns of B @ A, a convolution's kernel flattened."""
        return self.down.entries // max(self.down.shape[0], 1)

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.down.nbytes + self.up.nbytes

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at another rank."""
        total = rank * self.blocks
        return (total, *self.down.shape[1:]), (self.up.shape[0], total, *self.up.shape[2:])

    def split(self, down: torch.Tensor, up: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """left (rows, rank), right (rank, columns) of each block, without the scale."""
        if self.kind != PARAMETER:
            return [(up.reshape(self.rows, -1), down.reshape(down.shape[0], -1))]
        # peft: A stacks experts outermost, B innermost (ParamWrapper.get_delta_weight)
        lefts = up.reshape(self.rows, -1, self.blocks).permute(2, 0, 1)
        rights = down.reshape(self.blocks, -1, self.columns)
        return list(zip(lefts, rights, strict=True))

    def join(self, blocks: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, in the file's shapes, of the blocks' factors (all of one rank): the inverse of `split`."""
        import torch

        down_shape, up_shape = self.shapes(blocks[0][1].shape[0])
        if self.kind != PARAMETER:
            return blocks[0][1].reshape(down_shape), blocks[0][0].reshape(up_shape)
        down = torch.cat([right for _, right in blocks])
        up = torch.stack([left for left, _ in blocks], dim=2)
        return down.reshape(down_shape), up.reshape(up_shape)


class Adapter:
    """One adapter: a folder with adapter_config.json, or a kohya or diffusers file. Opening it reads headers only."""

    def __init__(self, path: Place, label: str) -> None:
        """Raises UsageError for another kind of adapter, BadFile if modules are incomplete or have ranks of 0."""
        self.path, self.label = path, label
        self.config: dict[str, Any] = {}
        if (path / CONFIG).is_file():
            self.config = read_config(path, label)
            found = [path / name for name in _FILES if (path / name).is_file()]
            if not found:
                raise BadFile(f"{label} has {CONFIG}, but neither {' nor '.join(_FILES)}")
            self.weights = found[0]
        else:
            self.weights = path / _DIFFUSERS_FILE if path.is_dir() else path
        self.file: Checkpoint = open_file(self.weights, str(self.weights))
        try:
            keys = sort_peft(self.file.tensors, str(self.weights)) if self.config else sort_file(self.file.tensors, str(self.weights))
            self.layout = keys.layout
            self.whole = keys.whole
            self.modules = _Builder(self, keys).modules()
        except BaseException:
            self.file.close()
            raise

    @property
    def kind(self) -> str:
        """In words."""
        ranks = sorted({module.rank for module in self.modules})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        name = "DoRA" if any(module.magnitude for module in self.modules) else "LoRA"
        where = "" if self.layout == PEFT else f" in the {self.layout} layout"
        return f"{name} adapter{where}, rank {shown}, on {len(self.modules)} module{'' if len(self.modules) == 1 else 's'}"

    def tensor(self, name: str) -> torch.Tensor:
        """One floating-point tensor in its own dtype; BadFile if it is of another type, or not finite."""
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
    """Whether a path is one LoRA adapter: a folder with a configuration, or diffusers' folder."""
    return (path / CONFIG).is_file() or (path / _DIFFUSERS_FILE).is_file()


def is_lora_file(path: Place) -> bool:
    """Whether a path is a safetensors file of a LoRA in kohya's or diffusers' layout; False for what cannot be read."""
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    try:
        with open_file(path, str(path)) as opened:
            return looks_like_lora(opened.tensors)
    except BadFile:
        return False


def find_adapters(path: Place) -> dict[str, Place]:
    """The adapters of a folder as peft saves several: the default one in itself under "", others in sub-folders by name."""
    found = {"": path} if is_adapter(path) else {}
    return found | {child.name: child for child in children(path) if (child / CONFIG).is_file() and not child.name.startswith(".")}


class _Builder:
    """Makes the modules of an adapter out of its sorted names."""

    def __init__(self, adapter: Adapter, keys: Sorted) -> None:
        self._adapter, self._keys = adapter, keys
        self._tensors = adapter.file.tensors
        self._metadata = _diffusers_configs(adapter.file.metadata)
        self._parameters = _nesting(adapter.config.get("target_parameters") or [], list(keys.modules))

    def modules(self) -> list[LoraModule]:
        found = [self._module(path, keys) for path, keys in sorted(self._keys.modules.items())]
        for module in found if self._adapter.config else ():
            if bool(self._adapter.config.get("use_dora")) != (module.magnitude is not None):
                has = "has" if module.magnitude is not None else "has no"
                raise self._bad(module.name, f"it {has} magnitudes, {CONFIG} says use_dora={self._adapter.config.get('use_dora')!r}")
        return found

    def _module(self, path: str, keys: Keys) -> LoraModule:
        assert keys.down is not None and keys.up is not None
        down, up = self._tensors[keys.down], self._tensors[keys.up]
        name = path.replace(".base_layer", "")
        targeted, parameter = self._parameters.get(path, (False, None))
        kind = PARAMETER if targeted else EMBEDDING if keys.embedding else CONVOLUTION if len(down.shape) > 2 else LINEAR
        if len(down.shape) < 2 or len(up.shape) != len(down.shape):
            raise self._bad(name, f"its factors are {list(down.shape)} and {list(up.shape)}")
        total, blocks = down.shape[0], 1
        if kind == PARAMETER:
            rank = rank_of(self._adapter.config, parameter or name)
            if rank < 1 or total % rank:
                raise self._bad(name, f"lora_A has {total} rows, no multiple of its rank {rank}")
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
            alpha = float(self._adapter.tensor(module.alpha))
            return alpha / module.rank
        component, _, rest = module.name.partition(".")
        if component in self._metadata:
            return scale_of(self._metadata[component], rest, module.rank)
        if "" in self._metadata:
            return scale_of(self._metadata[""], module.name, module.rank)
        return 1.0  # kohya's alpha and diffusers' lora_alpha are the rank where none is given

    def _bad(self, module: str, what: str) -> BadFile:
        return BadFile(f"{self._adapter.weights}: {module}: {what}")


def _diffusers_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """LoRA configurations by component (`unet.r`, ...) out of a diffusers file's metadata; "" is that of a single model's file."""
    try:
        table = json.loads(metadata.get(DIFFUSERS_METADATA, "{}"))
    except ValueError:
        return {}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in table.items() if isinstance(table, dict) else ():
        component, dot, name = str(key).partition(".")
        component, name = (component, name) if dot else ("", component)
        configs.setdefault(component, {})[name] = value
    return {component: config for component, config in configs.items() if "r" in config}


def _nesting(targets: list[str], paths: list[str]) -> dict[str, tuple[bool, str | None]]:
    """Which paths are targeted parameters, and of which: peft wraps a module once for each, the first one innermost.

    The order is that in which the module declares its parameters. In transformers' experts `down_proj` comes last; where
    nothing tells, the parameter is None (and found by its shape where there is a base).
    """
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
