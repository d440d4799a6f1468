"""SMILE in a model in memory: every linear layer adds the experts that its input chooses. No weight is changed."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peru_cli.artifacts.packs.smile import RoutedLayer, Smile
from peru_cli.live.routed import AppliedRouted, find_modules
from peru_cli.methods.compact.smile import Expert, correction, probabilities, stack_gates

if TYPE_CHECKING:
    from torch import nn


class _Layer:
    """The experts of one linear layer, on the layer's device and in its dtype."""

    def __init__(self, routed: Smile, number: int) -> None:
        self.record = routed.layers[number]
        self._top = routed.top
        kind = getattr(torch, routed.dtype.torch_name or "")
        self.experts = [_expert(self.record, task, routed.read_expert(number, task), kind) for task in range(len(self.record.experts))]
        self.gates = stack_gates(self.experts, routed.gate)

    def probabilities(self, flat: Tensor) -> Tensor:
        """What each input's router says; (n, in) -> (n, tasks)."""
        if (self.gates.device, self.gates.dtype) != (flat.device, flat.dtype):
            self.gates = self.gates.to(flat)
        return probabilities(flat, self.gates)

    def correction(self, flat: Tensor, shares: Tensor) -> Tensor:
        """What the chosen experts add; (n, in) -> (n, out)."""
        one = self.experts[0].right
        if (one.device, one.dtype) != (flat.device, flat.dtype):
            self.experts = [
                Expert(e.left.to(flat), e.right.to(flat), e.bias.to(flat) if e.bias is not None else None) for e in self.experts
            ]
        return correction(flat, self.experts, shares, self._top, self.record.outputs)


def _expert(layer: RoutedLayer, task: int, data: bytearray, kind: torch.dtype) -> Expert:
    """An expert from its block."""
    numbers = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
    rank = layer.experts[task].rank
    first, second = rank * layer.inputs, rank * (layer.inputs + layer.outputs)
    right, left, bias = numbers[:first], numbers[first:second], numbers[second:]
    return Expert(left.view(rank, layer.outputs).T, right.view(rank, layer.inputs), bias if len(bias) else None)


def add(applied: AppliedRouted, model: nn.Module, table: MutableMapping[str, Tensor], names: Mapping[str, str], experts: bool) -> None:
    """Hook the modules of each layer. Without `experts` they only count what the routers say. BadFile if an expert was altered."""
    routed = applied.artifact
    assert isinstance(routed, Smile)
    places = find_modules(model, table, names, routed.layers, routed)
    layers = [_Layer(routed, number) for number in range(len(places))]
    for layer, modules in zip(layers, places, strict=True):
        for module in modules:
            applied.hook(module, partial(_route, applied, layer, experts))


def _route(applied: AppliedRouted, layer: _Layer, experts: bool, inputs: Tensor, output: Tensor) -> Tensor:
    flat = inputs.reshape(-1, inputs.shape[-1]).to(output.dtype)
    shares = layer.probabilities(flat)
    applied.count(shares.detach().view(*inputs.shape[:-1], -1))
    return output + layer.correction(flat, shares).view(output.shape) if experts else output
