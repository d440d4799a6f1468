"""LoRA adapters as full fine-tunes of a base, expanded while they are read.

W = W_0 + s B A in float32, whatever the dtypes of the factors and the base, so that small updates of a bf16 base are
not rounded away; with DoRA the rows of that are scaled to their magnitudes. Only panels of rows are ever computed, at
fixed places, so that tiles and threads do not change the result. Factors are read when they are needed.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from peru_cli.checkpoints.adapterconfig import CONFIG, check_can_be_added
from peru_cli.checkpoints.adapterkeys import KOHYA, PEFT
from peru_cli.checkpoints.adapters import CONVOLUTION, EMBEDDING, PARAMETER, Adapter, LoraModule
from peru_cli.checkpoints.architectures import experts_are_in_out
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.memorynames import names_in_memory
from peru_cli.checkpoints.pairing import Prefix, find_prefix
from peru_cli.checkpoints.sidefiles import find_side_files
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, Mismatch

if TYPE_CHECKING:
    import torch

_PANEL = 1 << 16  # entries of the product computed at once, rounded to whole rows
_CACHED = 4  # tensors whose factors are kept for the next tiles
_F32 = BY_NAME["F32"]
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_KOHYA_COMPONENTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lora_prior_", "lycoris_")

T = TypeVar("T")


@dataclass(frozen=True)
class Update:
    """What is added to one tensor: a stack of `blocks` products (rows, columns), as the tensor stores them.

    `over` is the tensor that it is added to where the adapter holds that itself. `transposed` says that the tensor is
    stored as (in, out). A bias has no `module.down`: it is a column.
    """

    info: TensorInfo
    module: LoraModule
    rows: int
    columns: int
    transposed: bool = False
    is_bias: bool = False
    over: str | None = None

    @property
    def panel_rows(self) -> int:
        """Rows of every panel but a block's last."""
        return max(1, _PANEL // max(self.columns, 1))


class LoraCheckpoint(Checkpoint):
    """A base with an adapter on it. Tensors have the base's names; those that the base lacks, the adapter's."""

    expanded = True

    def __init__(self, path: Path, label: str, base: Checkpoint) -> None:
        """Raises Mismatch, from headers alone, if the adapter does not fit the base."""
        import torch  # noqa: F401 - now, so that the engine sees it and switches its threads off

        self._adapter, self._base = Adapter(path, label), base
        try:
            self._open(path, label)
        except BaseException:
            self._adapter.close()
            raise

    def _open(self, path: Path, label: str) -> None:
        adapter, base = self._adapter, self._base
        check_can_be_added(adapter.config, label)
        self.label, self.metadata, self.warnings = label, {}, list(adapter.file.warnings)
        own = find_side_files(path) if adapter.layout == PEFT else {}
        if "config.json" in own and "architectures" not in _table(own["config.json"]):
            del own["config.json"]  # of no model: some programs leave a stub there
        self.side_files = dict(base.side_files) | own
        self.files = [*base.files, adapter.weights, *([path / CONFIG] if adapter.config else [])]
        self.updates: dict[str, Update] = {}
        self._kept: dict[str, str] = {}  # tensors that the adapter holds whole: our name -> its name
        self._local = threading.local()
        self._factors: _Cache[list[tuple[torch.Tensor, torch.Tensor]]] = _Cache(_CACHED)
        self._scales: _Cache[torch.Tensor] = _Cache(len(base.tensors))
        fitting = _Fitting(adapter, base)
        self.prefix = fitting.prefix
        self._whole(fitting)
        self.updates = fitting.updates(self.tensors, self._kept)
        if fitting.problems:
            raise Mismatch(
                f"the adapter {label} does not fit {base.label}: {len(fitting.problems)} module(s)\n  " + "\n  ".join(fitting.problems[:5]),
                "is this the base that the adapter was trained on?",
            )
        self.tensors = dict(self.tensors) | {name: TensorInfo(name, _F32, u.info.shape) for name, u in self.updates.items()}
        self.kind = f"{adapter.kind} ({self.prefix})"

    def _whole(self, fitting: _Fitting) -> None:
        """The base's tensors, and what the adapter holds whole in their places or beside them."""
        tensors = dict(self._base.tensors)
        for plain, stored in self._adapter.whole.items():
            name = fitting.base_name(plain.replace(".base_layer.", "."))
            if name in self._kept:
                raise BadFile(f"{self._adapter.weights}: {stored} and {self._kept[name]} stand for the same tensor")
            info = self._adapter.file.tensors[stored]
            tensors[name] = TensorInfo(name, info.dtype, info.shape)
            self._kept[name] = stored
        self.tensors = tensors

    def fine_name(self, name: str) -> str:
        """What the adapter's own model calls a tensor: a base's name with the prefix that the adapter's names have more."""
        return self.prefix.added + name if self.prefix.added and name in self._base.tensors else name

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name in self.updates:
            self._expand(self.updates[name], offset, buffer)
        elif name in self._kept:
            self._adapter.file.read_into(self._kept[name], offset, buffer)
        else:
            self._base.read_into(name, offset, buffer)

    def _expand(self, update: Update, offset: int, buffer: memoryview) -> None:
        import torch

        if not len(buffer):
            return
        if offset % 4 or len(buffer) % 4:
            raise AssertionError("an expanded tensor is read by whole entries")
        start, n = offset // 4, len(buffer) // 4
        out = torch.frombuffer(buffer, dtype=torch.float32)
        self._add(update, start, out)
        if update.module.magnitude is not None and not update.is_bias:
            scales = self._scales.get(update.info.name, lambda: self._dora_scales(update))
            if update.transposed:
                out.mul_(scales[torch.arange(start, start + n).remainder_(update.columns)])
            else:
                out.mul_(scales[torch.arange(start, start + n).div_(update.columns, rounding_mode="floor")])

    def _add(self, update: Update, start: int, out: torch.Tensor) -> None:
        """Base + update of `len(out)` entries from `start` on, into `out`."""
        import torch

        info, n = update.info, len(out)
        assert info.dtype.torch_name is not None
        room = bytearray(info.dtype.nbytes(n))
        if update.over is not None:
            self._adapter.file.read_into(update.over, info.dtype.nbytes(start), memoryview(room))
        else:
            self._base.read_into(info.name, info.dtype.nbytes(start), memoryview(room))
        out.copy_(torch.frombuffer(room, dtype=getattr(torch, info.dtype.torch_name)))
        size = update.panel_rows * update.columns
        block_size = update.rows * update.columns
        at = start
        while at < start + n:
            block, within = divmod(at, block_size)
            number = within // size
            panel = self._panel(update, block, number)
            skip = within - number * size
            part = panel[skip : skip + start + n - at]
            out[at - start : at - start + len(part)].add_(part)
            at += len(part)

    def _panel(self, update: Update, block: int, number: int) -> torch.Tensor:
        """A panel of the update, flat; each thread keeps its last one, which the next tile often shares."""
        key, panel = getattr(self._local, "last", (None, None))
        if key != (update.info.name, block, number):
            left, right = self._factors.get(update.info.name, lambda: self._load(update))[block]
            rows = update.panel_rows
            product = left[number * rows : (number + 1) * rows] @ right
            panel = product.mul_(update.module.scale).view(-1)
            self._local.last = ((update.info.name, block, number), panel)
        assert panel is not None
        result: torch.Tensor = panel
        return result

    def _load(self, update: Update) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Float32 factors of each block, of the tensor as it is stored."""
        import torch

        if update.is_bias:
            assert update.module.bias is not None
            return [(self._adapter.tensor(update.module.bias).float().view(-1, 1), torch.ones(1, 1))]
        blocks = [(left.float(), right.float()) for left, right in self._adapter.factors(update.module)]
        if update.transposed:
            blocks = [(right.T, left.T) for left, right in blocks]
        return [(left.contiguous(), right.contiguous()) for left, right in blocks]

    def _dora_scales(self, update: Update) -> torch.Tensor:
        """magnitude / norm of each row of W_0 + s B A (of each column where it is stored transposed); float32."""
        import torch

        name = update.module.magnitude
        assert name is not None
        magnitude = self._adapter.tensor(name).float().view(-1)
        squares = torch.zeros(update.columns if update.transposed else update.rows, dtype=torch.float64)
        rows = update.panel_rows
        for first in range(0, update.rows, rows):
            room = torch.empty(min(rows, update.rows - first) * update.columns)
            self._add(update, first * update.columns, room)
            panel = room.view(-1, update.columns).double().square_()
            if update.transposed:
                squares += panel.sum(0)
            else:
                squares[first : first + len(panel)] = panel.sum(1)
        if len(magnitude) != len(squares):
            raise BadFile(f"{self._adapter.weights}: {name} has {len(magnitude)} entries, {update.info.name} needs {len(squares)}")
        return magnitude / squares.sqrt().float()

    def close(self) -> None:
        self._adapter.close()


def _table(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


class _Cache(Generic[T]):
    """What threads share: made once each, the oldest dropped when more than `limit` are held."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._values: OrderedDict[str, T] = OrderedDict()

    def get(self, key: str, make: Callable[[], T]) -> T:
        """The value of a key; one thread makes it, the others wait."""
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
                while len(self._values) > self._limit:
                    self._values.popitem(last=False)
            return self._values[key]


class _Fitting:
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
        fake = {name: self._like(name) for name in wanted}
        known = ((name, self._base.tensors[stored]) for name, stored in self._known.items())
        return find_prefix(fake, {name: TensorInfo(name, info.dtype, info.shape) for name, info in known})

    def _like(self, name: str) -> TensorInfo:
        """What the base has under a name, or under its longest end that the base knows."""
        parts = name.split(".")
        for cut in range(len(parts)):
            end = ".".join(parts[cut:])
            if end in self._known:
                return TensorInfo(name, _F32, self._base.tensors[self._known[end]].shape)
        longer = [n for n in self._known if n.endswith("." + name)]
        return TensorInfo(name, _F32, self._base.tensors[self._known[longer[0]]].shape if len(longer) == 1 else ())

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
