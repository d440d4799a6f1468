"""WEMoE in a model in memory: all tensors but those of MLPs become base + lambda * sum of task vectors, and MLPs add what routers weigh.

`restore` puts the tensors back, bit for bit, and removes the hooks. MLPs' own weights are not changed."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from peru_cli.artifacts.mixed.index import DENSE, LOW_RANK, MixedRecord
from peru_cli.artifacts.mixed.reader import Mixed
from peru_cli.artifacts.packs.routed import LinearLayer
from peru_cli.artifacts.packs.wemoe import Wemoe, known_numbers
from peru_cli.errors import Mismatch
from peru_cli.finetunes.mixed import MixedOnBase
from peru_cli.live.memory import TensorTable, empty_tensor, fill
from peru_cli.live.routed import AppliedRouted, find_modules
from peru_cli.methods.compact.wemoe import Change, Changes, Known, Router, shares_of
from peru_cli.methods.mixed.scales import scale_of

if TYPE_CHECKING:
    from torch import nn


class GatedModules:
    """One MLP in a model: its router, and what its gates were for the input that it sees."""

    def __init__(self, applied: AppliedRouted, router: Router) -> None:
        self._applied, self.router = applied, router
        self._seen: Tensor | None = None
        self._gates: Tensor | None = None
        self.record: list[Tensor] | None = None  # the gates of all inputs, if a list is put here

    def choose(self, inputs: Tensor) -> Tensor:
        """The gates for the MLP's input, computed once for all layers that take it; (n, tokens, width) -> (n, tasks)."""
        if self._seen is not inputs or self._gates is None:
            wide = inputs if inputs.dtype == torch.float64 else inputs.float()
            if (self.router.tensors[0].device, self.router.tensors[0].dtype) != (wide.device, wide.dtype):
                self.router = self.router.to(wide)
            self._seen, self._gates = inputs, self._applied.over_tokens(self.router(self.rows(wide)))
            found = self._gates.detach()
            self._applied.count(shares_of(found, self.router.known))
            if self.record is not None:
                self.record.append(found)
        return self._gates

    def rows(self, inputs: Tensor) -> Tensor:
        """Hidden states with one row for each input of the model: some models put the tokens of all inputs in a row."""
        count = self._applied.inputs
        if inputs.dim() == 2 and count is not None and len(inputs) % count == 0:
            return inputs.view(count, -1, inputs.shape[-1])
        return inputs.reshape(len(inputs), -1, inputs.shape[-1])

    def layer(self, changes: Changes, entry: bool, inputs: Tensor, output: Tensor) -> Tensor:
        """A layer's output with what the tasks add."""
        gates = self.choose(inputs) if entry else self._gates
        if gates is None:
            raise Mismatch(
                f"{self._applied.artifact.path}: in this model a layer of an MLP runs before those that should take its input",
                "make it with --target REGEX or --exclude REGEX for the layers of MLPs",
            )
        given = self.rows(inputs).to(output.dtype)
        changes.to(given)
        return output + changes.add(given, gates.to(given)).reshape(output.shape)

    def forget(self) -> None:
        """Let go of the last input."""
        self._seen = self._gates = None


class GatedMlps:
    """All MLPs of a model."""

    def __init__(self, mlps: Sequence[GatedModules]) -> None:
        self.mlps = mlps

    @property
    def routers(self) -> list[Router]:
        """Their routers, in the artifact's order."""
        return [mlp.router for mlp in self.mlps]


def add(applied: AppliedRouted, model: nn.Module, table: MutableMapping[str, Tensor], names: Mapping[str, str], experts: bool) -> GatedMlps:
    """Change all tensors but those of MLPs, and hook the MLPs. BadFile if something was altered.

    `experts` makes no difference: routers were trained on the activations of this model, and not on the base's."""
    routed = applied.artifact
    assert isinstance(routed, Wemoe)
    layers = [layer for mlp in routed.mlps for layer in mlp.layers]
    places = iter(find_modules(model, table, names, layers, routed))
    parts = [routed.part(1 + number) for number in range(len(routed.tasks))]
    _add_rest(applied, table, names, routed)
    mlps = []
    kind = getattr(torch, routed.dtype.torch_name or "")
    for number, mlp in enumerate(routed.mlps):
        data = routed.read_router(number)
        router = Router.read(torch.frombuffer(data, dtype=kind, count=routed.router_numbers(number)), mlp.width, len(parts), routed.depth)
        if routed.seen:
            known = torch.frombuffer(data, dtype=torch.float32, offset=len(data) - 4 * known_numbers(len(parts))).view(-1, len(parts))
            router.known = Known(known[:-1], known[-1])
        gated = GatedModules(applied, router)
        for layer, entry in zip(mlp.layers, mlp.entries, strict=True):
            changes = Changes([_change(part, layer) for part in parts], layer.inputs, layer.outputs)
            for module in next(places):
                applied.hook(module, partial(gated.layer, changes, entry))
        applied.after(gated.forget)
        mlps.append(gated)
    for part in parts:
        part.close()
    return GatedMlps(mlps)


def _add_rest(applied: AppliedRouted, table: MutableMapping[str, Tensor], names: Mapping[str, str], routed: Wemoe) -> None:
    """Overwrite all tensors but those of MLPs, as unpacking the difference would, in the model's own dtype."""
    with routed.part(0) as rest:
        records = [record for record in rest.index.tensors if record.parts]
        base = TensorTable("the model", {})
        for record in records:
            assert record.base_dtype is not None
            kind = getattr(torch, record.base_dtype.torch_name or "")
            base.add({record.info.name: table[names[record.info.name]].detach().to(kind)})
        values = {record.info.name: empty_tensor(str(routed.path), record.info) for record in records}
        fill(MixedOnBase(rest, str(routed.path), base), values)
        with torch.no_grad():
            for name, value in values.items():
                there = table[names[name]]
                applied.set_tensor(table, names[name], value.to(there))


def _change(part: Mixed, layer: LinearLayer) -> Change:
    """A task's difference of a layer, float32."""
    found = Change()
    weight, bias = part.records.get(layer.weight.name), part.records.get(layer.bias.name) if layer.bias is not None else None
    if weight is not None and weight.parts == LOW_RANK and weight.columns == weight.info.shape[-1]:
        factors = part.factors(weight)
        left = np.zeros((weight.rows, weight.rank))
        left[slice(None) if factors.rows is None else factors.rows] = factors.left * scale_of(factors.scales)
        one, other = torch.from_numpy(left).float(), torch.from_numpy(factors.right.astype(np.float32))
        found.left, found.right = (other.T.contiguous(), one.T.contiguous()) if layer.transposed else (one, other)
        if found.left.numel() + found.right.numel() >= layer.inputs * layer.outputs:  # factors would cost more than the matrix
            found = Change(whole=found.left @ found.right)
    elif weight is not None and weight.parts & (LOW_RANK | DENSE):
        whole = _dense(part, weight).view(weight.info.shape)
        found.whole = whole.T.contiguous() if layer.transposed else whole
    if bias is not None and bias.parts:
        found.bias = _dense(part, bias)
    return found


def _dense(part: Mixed, record: MixedRecord) -> Tensor:
    """All entries of a difference, float32 (n,)."""
    found = part.difference(record, 0, record.info.entries)
    assert found is not None
    return torch.from_numpy(np.ascontiguousarray(found)).float()
