"""LoRA adapters as full fine-tunes of a base, expanded while they are read.

W = W_0 + s B A in float32, whatever the dtypes of the factors and the base, so that small updates of a bf16 base are
not rounded away. DoRA then scales the rows to their magnitudes. Only panels of rows are ever computed, at fixed places, so
tiles and threads do not change the result. Factors are read on demand."""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from peru_cli.checkpoints.architectures import is_embedding, is_output, tied_embedding
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.lora.adapter import Adapter
from peru_cli.checkpoints.lora.bound import BoundBase
from peru_cli.checkpoints.lora.config import CONFIG, check_can_be_added
from peru_cli.checkpoints.lora.fit import F32, AnyUpdate, Computed, Difference, Fitting, Merged, Update
from peru_cli.checkpoints.lora.foreign import Around, Foreign, merge
from peru_cli.checkpoints.lora.keys import OUTER, PEFT
from peru_cli.checkpoints.lora.products import Product
from peru_cli.checkpoints.lora.tied import is_untied, vocabulary, with_settings
from peru_cli.checkpoints.places import Place
from peru_cli.checkpoints.sidefiles import find_side_files
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import plural
from peru_cli.errors import BadFile, Mismatch, UsageError
from peru_cli.shown import listed

if TYPE_CHECKING:
    import torch

_CACHED = 4  # modules whose factors are cached for the next tiles

T = TypeVar("T")


class LoraCheckpoint(Checkpoint):
    """A base with an adapter on it. Tensors have the base's names; those that the base lacks, the adapter's."""

    expanded = True

    def __init__(self, path: Place, label: str, base: Checkpoint) -> None:
        """Raises Mismatch, from headers alone, if the adapter does not fit the base."""
        import torch  # noqa: F401 - now, so that the engine sees it and switches its threads off

        self._adapter, self._base = Adapter(path, label), base
        try:
            self._open(path, label)
        except BaseException:
            self._adapter.close()
            raise

    def _open(self, path: Place, label: str) -> None:
        adapter, base = self._adapter, self._base
        check_can_be_added(adapter.config, label)
        self.label, self.metadata, self.warnings = label, {}, list(adapter.file.warnings)
        own = dict(find_side_files(adapter.path)) if adapter.config else {}
        if "config.json" in own and "architectures" not in _table(own["config.json"]):
            del own["config.json"]  # not a model's: some programs leave a stub there
        self.side_files = dict(base.side_files) | own
        self.files = [*base.files, adapter.weights, *([adapter.path / CONFIG] if adapter.config else [])]
        self.updates: dict[str, AnyUpdate] = {}
        self._copied: dict[str, str] = {}  # tensors that the base has under another name
        self._kept: dict[str, str] = {}  # tensors that the adapter holds whole: our name -> its name
        self._local = threading.local()
        self._factors: _Cache[list[tuple[torch.Tensor, torch.Tensor]]] = _Cache(_CACHED)
        self._scales: _Cache[torch.Tensor] = _Cache(len(base.tensors))
        self._matrices: _Cache[torch.Tensor] = _Cache(_CACHED)
        self._merged: _Cache[dict[str, torch.Tensor]] = _Cache(_CACHED)
        self._made: tempfile.TemporaryDirectory[str] | None = None  # location of a modified config
        fitting = Fitting(adapter, base)
        self.prefix = fitting.prefix
        self._whole(fitting)
        self.updates = fitting.updates(self.tensors, self._kept)
        self._around = Around(adapter.config, base.config(), fitting.fellows(self.tensors) if adapter.foreign else {})
        if fitting.problems:
            raise Mismatch(
                f"the adapter {label} does not fit {base.label}: {plural(len(fitting.problems), 'module')}\n  "
                + "\n  ".join(fitting.problems[:5]),
                "is this the base that the adapter was trained on?",
            )
        self._follow_embedding()
        self.tensors = dict(self.tensors) | {name: TensorInfo(name, F32, u.info.shape) for name, u in self.updates.items()}
        self.kind = f"{adapter.kind} ({self.prefix})"
        plain = {
            u.module.path: u.source or name
            for name, u in self.updates.items()
            if isinstance(u, Update) and not u.is_bias and u.over is None
        }
        self._bound = BoundBase(adapter.file.metadata, base, plain, label)
        if self._bound.unknown:
            told = f"{base.label} has other shapes or dtypes than the base that {label} was made from"
            self.warnings.append(f"{told}: peru cannot tell whether it is that base")
        if (watch := inputs.current()) is not None:
            watch.expect(self._bound)
        self._correct_config()

    def _correct_config(self) -> None:
        """Update config.json to the tensors: the number of embedding rows, and whether the head is tied to them."""
        config, settings = self.config(), {}
        if not config:
            return
        if (rows := vocabulary(config, self.tensors, self._base.tensors)) is not None:
            settings["vocab_size"] = rows
        if self._touches_head() and is_untied(config, self.tensors, self.read_into):
            settings["tie_word_embeddings"] = False
        if settings:
            self._made = tempfile.TemporaryDirectory(prefix="peru-")
            path = Path(self._made.name) / "config.json"
            path.write_bytes(with_settings(self.side_files["config.json"].read_bytes(), **settings))
            self.side_files = dict(self.side_files) | {"config.json": path}
            self.warnings.append("config.json is written with " + listed(f"{name} {value}" for name, value in settings.items()))

    def _follow_embedding(self) -> None:
        """Leave out the base's output matrix if it repeats an updated embedding: in memory the two are one tensor."""
        embedding = tied_embedding(self._base.config(), self._base.tensors)
        heads = [name for name in self._base.tensors if is_output(name) and name not in self._kept and name not in self.updates]
        if heads and embedding in self.updates and not is_untied(self._base.config(), self._base.tensors, self._base.read_into):
            self.tensors = {name: info for name, info in self.tensors.items() if name not in heads}
            self.warnings.append(f"{heads[0]} repeats the embedding, which the adapter updates, and is left out")

    def _touches_head(self) -> bool:
        """Whether the adapter holds or updates an output matrix or an embedding, so that the two may differ now."""
        names = {*self._kept, *self.updates}
        return any(is_output(name) or is_embedding(name.removesuffix(".weight")) for name in names)

    def _whole(self, fitting: Fitting) -> None:
        """The base's tensors, with those that the adapter holds whole in their places or beside them."""
        adapter, tensors = self._adapter, dict(self._base.tensors)
        if adapter.layout != PEFT:
            if adapter.unknown:
                more = f" and {len(adapter.unknown) - 1} more" if len(adapter.unknown) > 1 else ""
                raise UsageError(
                    f"{adapter.weights} holds {adapter.unknown[0]}{more}, and nothing says how it applies to the base",
                    "peru knows the factors of LoRA, DoRA, LoHa and LoKr, .diff, .diff_b, .w_norm, .b_norm and .set_weight",
                )
            placed = fitting.put_whole()
        else:
            placed = {stored: fitting.base_name(plain.replace(".base_layer.", ".")) for plain, stored in adapter.whole.items()}
        for stored, name in placed.items():
            if name in self._kept:
                raise BadFile(f"{adapter.weights}: {stored} and {self._kept[name]} stand for the same tensor")
            if name not in self._base.tensors and not _is_saved(stored.removeprefix(OUTER), adapter.config) and not is_output(name):
                fitting.problems.append(f"{stored}: the base has no {name}, and modules_to_save of {CONFIG} does not name it")
            info = adapter.file.tensors[stored]
            tensors[name] = TensorInfo(name, info.dtype, info.shape)
            self._kept[name] = stored
        self._untie_saved_embedding(tensors)
        self.tensors = tensors

    def _untie_saved_embedding(self, tensors: dict[str, TensorInfo]) -> None:
        """PEFT trains a copy of an embedding in modules_to_save. A tied output matrix stays the base's, and becomes a tensor of its own."""
        config, saved = self._base.config(), self._adapter.config.get("modules_to_save") or []
        embedding = tied_embedding(config, self._base.tensors)
        if embedding is None or embedding not in self._kept or self._adapter.config.get("ensure_weight_tying"):
            return
        if not _is_saved(self._kept[embedding].removeprefix(OUTER), self._adapter.config) or any(is_output(name) for name in tensors):
            return
        architectures = config.get("architectures") or [""]
        if saved and re.search(r"LMHead|ForCausalLM|ForConditionalGeneration", str(architectures[0])):
            info = self._base.tensors[embedding]
            tensors["lm_head.weight"] = TensorInfo("lm_head.weight", info.dtype, info.shape)
            self._copied["lm_head.weight"] = embedding

    @property
    def folder(self) -> Place:
        """The folder of the adapter's other files, or the file itself if it has no config."""
        return self._adapter.path

    def fine_name(self, name: str) -> str:
        """The name of a tensor in the adapter's own model: the base's name with the adapter's additional prefix."""
        return self.prefix.added + name if self.prefix.added and name in self._base.tensors else name

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name in self.updates:
            self._expand(self.updates[name], offset, buffer)
        elif name in self._kept:
            self._adapter.file.read_into(self._kept[name], offset, buffer)
        else:
            self._base.read_into(self._copied.get(name, name), offset, buffer)

    def _expand(self, update: AnyUpdate, offset: int, buffer: memoryview) -> None:
        import torch

        if not len(buffer):
            return
        if offset % 4 or len(buffer) % 4:
            raise AssertionError("an expanded tensor is read by whole entries")
        start, n = offset // 4, len(buffer) // 4
        out = torch.frombuffer(buffer, dtype=torch.float32)
        if not isinstance(update, Update):
            self._add_whole(update, start, out)
            return
        self._add(update, start, out)
        if update.module.magnitude is not None and not update.is_bias:
            scales = self._scales.get(update.info.name, lambda: self._dora_scales(update))
            if update.transposed:
                out.mul_(scales[torch.arange(start, start + n).remainder_(update.columns)])
            else:
                out.mul_(scales[torch.arange(start, start + n).div_(update.columns, rounding_mode="floor")])

    def _add_whole(self, update: Difference | Computed | Merged, start: int, out: torch.Tensor) -> None:
        """The same for an update that is stored entry by entry, or computed matrix by matrix."""
        if isinstance(update, Merged):
            merged = self._merged.get(update.module.name, lambda: self._merge(update.module))
            out.copy_(merged[update.part].view(-1)[start : start + len(out)])
            return
        self._read_floats(self._base, update.info, start, out)
        if isinstance(update, Computed):
            name = update.product.name
            out += self._matrices.get(name, lambda: self._product(update.product)).view(-1)[start : start + len(out)]
            return
        delta = out.new_empty(len(out))
        self._read_floats(self._adapter.file, self._adapter.file.tensors[update.stored], start, delta)
        if not bool(delta.isfinite().all()):
            raise BadFile(f"{self._adapter.weights}: {update.stored} holds NaN or infinite values")
        out += delta

    def _merge(self, module: Foreign) -> dict[str, torch.Tensor]:
        """A module's weight and bias, merged by peft."""
        import torch

        weight, bias = self._around.fellows[module.name]
        weights = {}
        for part, info in (("weight", weight), ("bias", bias)):
            if info is not None:
                whole = torch.empty(info.entries)
                source, stored = (self._adapter.file, self._kept[info.name]) if info.name in self._kept else (self._base, info.name)
                self._read_floats(source, source.tensors[stored], 0, whole)
                weights[part] = whole.view(info.shape)
        return merge(module, self._around, weights, self._any_tensor, self._adapter.shared, str(self._adapter.weights))

    def _any_tensor(self, name: str) -> torch.Tensor:
        """A tensor of the adapter, of any dtype: some methods store indices."""
        import torch

        info = self._adapter.file.tensors[name]
        if (info.dtype.torch_name or "").startswith(("float", "bfloat")):
            return self._adapter.tensor(name)
        if info.dtype.torch_name is None:
            raise BadFile(f"{self._adapter.weights}: torch has no dtype for {name} ({info.dtype.name})")
        return torch.frombuffer(bytearray(self._adapter.file.read(name)), dtype=getattr(torch, info.dtype.torch_name)).view(info.shape)

    def _product(self, product: Product) -> torch.Tensor:
        delta = product.delta(self._adapter.tensor)
        if not bool(delta.isfinite().all()):
            raise BadFile(f"{self._adapter.weights}: the {product.kind} of {product.name} comes to NaN or infinite values")
        return delta

    @staticmethod
    def _read_floats(source: Checkpoint, info: TensorInfo, start: int, out: torch.Tensor, bound: BoundBase | None = None) -> None:
        """Entries of a tensor from `start` on as float32. `bound` compares what is read with the required base."""
        import torch

        assert info.dtype.torch_name is not None
        room = bytearray(info.dtype.nbytes(len(out)))
        source.read_into(info.name, info.dtype.nbytes(start), memoryview(room))
        if bound is not None:
            bound.saw(info.name, info.dtype.nbytes(start), memoryview(room))
        out.copy_(torch.frombuffer(room, dtype=getattr(torch, info.dtype.torch_name)))

    def _add(self, update: Update, start: int, out: torch.Tensor) -> None:
        """Base + update of `len(out)` entries from `start` on, into `out`."""
        info, n = update.info, len(out)
        if update.over is not None:
            self._read_floats(self._adapter.file, self._adapter.file.tensors[update.over], start, out)
        else:
            self._read_floats(self._base, self._base.tensors[update.source or info.name], start, out, self._bound)
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
        """A panel of the update, flat. Each thread keeps its last one, which the next tile often shares."""
        key, panel = getattr(self._local, "last", (None, None))
        if key != (update.info.name, block, number):
            blocks = self._factors.get(f"{update.module.path} {update.is_bias}", lambda: self._load(update))
            left, right = blocks[block if update.block is None else update.block]
            rows, first = update.panel_rows, update.first_row
            product = left[first + number * rows : first + min((number + 1) * rows, update.rows)] @ right
            panel = product.mul_(update.module.scale).view(-1)
            self._local.last = ((update.info.name, block, number), panel)
        assert panel is not None
        result: torch.Tensor = panel
        return result

    def _load(self, update: Update) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Float32 factors of each block, oriented like the stored tensor."""
        import torch

        if update.is_bias:
            assert update.module.bias is not None
            return [(self._adapter.tensor(update.module.bias).float().view(-1, 1), torch.ones(1, 1))]
        blocks = [(left.float(), right.float()) for left, right in self._adapter.factors(update.module)]
        if update.transposed:
            blocks = [(right.T, left.T) for left, right in blocks]
        return [(left.contiguous(), right.contiguous()) for left, right in blocks]

    def _dora_scales(self, update: Update) -> torch.Tensor:
        """magnitude / norm of each row of W_0 + s B A (of each column if it is stored transposed); float32."""
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
        if self._made is not None:
            self._made.cleanup()


def _is_saved(plain: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to a module in modules_to_save, matched by the ends of modules' names as in PEFT."""
    parts = plain.split(".")
    modules = [".".join(parts[:cut]) for cut in range(1, len(parts))]
    saved = [name for name in config.get("modules_to_save") or [] if isinstance(name, str)]
    return any(module.endswith(name) for module in modules for name in saved)


def _table(path: Place) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


class _Cache(Generic[T]):
    """A cache shared by threads: each value is made once, and the oldest is dropped beyond `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._values: OrderedDict[str, T] = OrderedDict()

    def get(self, key: str, make: Callable[[], T]) -> T:
        """The value of a key. One thread makes it, the others wait."""
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
                while len(self._values) > self._limit:
                    self._values.popitem(last=False)
            return self._values[key]
