"""LoRA adapters as full fine-tunes of a base, expanded while they are read.

W = W_0 + s B A in float32, whatever the dtypes of the factors and the base, so that small updates of a bf16 base are
not rounded away; with DoRA the rows of that are scaled to their magnitudes. Only panels of rows are ever computed, at
fixed places, so that tiles and threads do not change the result. Factors are read when they are needed.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.lora.adapter import Adapter
from peru_cli.checkpoints.lora.config import CONFIG, check_can_be_added
from peru_cli.checkpoints.lora.fit import F32, Fitting, Update
from peru_cli.checkpoints.lora.keys import PEFT
from peru_cli.checkpoints.places import Place
from peru_cli.checkpoints.sidefiles import find_side_files
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, Mismatch

if TYPE_CHECKING:
    import torch

_CACHED = 4  # modules whose factors are kept for the next tiles

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
        fitting = Fitting(adapter, base)
        self.prefix = fitting.prefix
        self._whole(fitting)
        self.updates = fitting.updates(self.tensors, self._kept)
        if fitting.problems:
            raise Mismatch(
                f"the adapter {label} does not fit {base.label}: {len(fitting.problems)} module(s)\n  " + "\n  ".join(fitting.problems[:5]),
                "is this the base that the adapter was trained on?",
            )
        self.tensors = dict(self.tensors) | {name: TensorInfo(name, F32, u.info.shape) for name, u in self.updates.items()}
        self.kind = f"{adapter.kind} ({self.prefix})"

    def _whole(self, fitting: Fitting) -> None:
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


def _table(path: Place) -> dict[str, Any]:
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
