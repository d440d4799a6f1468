"""WEMoE: task arithmetic for all but the MLPs, and MLPs that add each task's difference as far as a small router says.

Source: Tang et al. 2024, https://arxiv.org/abs/2402.00433. With the hidden states x that go into an MLP, and its weights W_0:

    g(x) = the mean over tokens of  fc2(relu(fc1(x)))  (two layers), or of  fc(x)  (one layer)
    W(x) = W_0 + sum over tasks of g_i(x) tau_i

At the start the last bias is the scale lambda of task arithmetic, all other biases are 0, and weights come from a normal distribution with
a standard deviation of 0.01, as in the authors' program: so g is near lambda. Each MLP has a router of its own, for all of its layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peru_cli.kernels.random import words
from peru_cli.methods.philox import stream_key

SPREAD = 0.01  # standard deviation of a router's weights at the start


def normals(seed: int, purpose: str, n: int) -> Tensor:
    """Numbers with a standard normal distribution, float64 (n,), from philox words by Box and Muller (docs/random.md)."""
    drawn = words(stream_key(seed, "", purpose), 0, 2 * (-(-n // 2))).astype(np.float64)
    radius = np.sqrt(-2 * np.log((drawn[0::2] + 1) / 2**32))
    angle = 2 * math.pi * drawn[1::2] / 2**32
    return torch.from_numpy(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:n])


@dataclass
class Known:
    """What a router says of each task's inputs: the mean gates (tasks, tasks), one row a task, and their variance within tasks (tasks,)."""

    means: Tensor
    variances: Tensor

    @classmethod
    def of(cls, gates: Sequence[Tensor]) -> Known:
        """From the gates of every task's inputs; (inputs of the task, tasks) each."""
        means = torch.stack([found.mean(0) for found in gates])
        squares = sum((found - mean).square().sum(0) for found, mean in zip(gates, means, strict=True))
        assert isinstance(squares, Tensor)
        return cls(means, (squares / sum(map(len, gates))).clamp(min=1e-12))


@dataclass
class Router:
    """One MLP's router: a weight (out, in) and a bias (out,) for each of its one or two layers; what it says of tasks, if that is known."""

    layers: list[tuple[Tensor, Tensor]]
    known: Known | None = None

    @classmethod
    def fresh(cls, width: int, tasks: int, depth: int, scale: float, seed: int, name: str) -> Router:
        """A router as it starts; float32. `name` is that of its MLP."""
        layers = []
        for number, outputs in enumerate([width] * (depth - 1) + [tasks], 1):
            weight = SPREAD * normals(seed, f"router {number}\0{name}", outputs * width).view(outputs, width)
            layers.append((weight.float(), torch.full((outputs,), scale if number == depth else 0.0)))
        return cls(layers)

    @classmethod
    def read(cls, numbers: Tensor, width: int, tasks: int, depth: int) -> Router:
        """A router from its numbers in a row; float32."""
        layers, at = [], 0
        for outputs in [width] * (depth - 1) + [tasks]:
            weight = numbers[at : at + outputs * width].view(outputs, width).float()
            layers.append((weight, numbers[at + outputs * width : at + outputs * (width + 1)].float()))
            at += outputs * (width + 1)
        return cls(layers)

    @property
    def tensors(self) -> list[Tensor]:
        """All of its tensors, in the order in which they are stored."""
        return [tensor for layer in self.layers for tensor in layer]

    def train(self) -> list[Tensor]:
        """Let its tensors be learned, and return them."""
        return [tensor.requires_grad_(True) for tensor in self.tensors]

    def to(self, like: Tensor) -> Router:
        """The same in another place and dtype."""
        known = Known(self.known.means.to(like), self.known.variances.to(like)) if self.known is not None else None
        return Router([(weight.to(like), bias.to(like)) for weight, bias in self.layers], known)

    def __call__(self, hidden: Tensor) -> Tensor:
        """What each token says; (..., width) -> (..., tasks)."""
        (weight, bias), *more = self.layers
        found: Tensor = torch.nn.functional.linear(hidden, weight, bias)
        for weight, bias in more:
            found = torch.nn.functional.linear(found.relu(), weight, bias)
        return found


def shares_of(gates: Tensor, known: Known | None) -> Tensor:
    """How likely an input belongs to each task, by its gates; (n, tasks), each row adds up to 1.

    If it is known what the router says of each task's inputs, the posterior of normal distributions around these means, which all have the
    same variances. Otherwise the positive gates over their sum, or equal shares if there is none."""
    if known is not None:
        distance = ((gates[:, None] - known.means).square() / known.variances).sum(2)
        found: Tensor = (-0.5 * distance).softmax(1)
        return found
    positive = gates.clamp(min=0)
    total = positive.sum(1, keepdim=True)
    return torch.where(total > 0, positive / total.clamp(min=torch.finfo(total.dtype).tiny), 1 / gates.shape[1])


@dataclass
class Change:
    """One task's difference of a linear layer: `left` (out, r) @ `right` (r, in), or `whole` (out, in), or none; `bias` (out,) or None."""

    left: Tensor | None = None
    right: Tensor | None = None
    whole: Tensor | None = None
    bias: Tensor | None = None


class Changes:
    """The differences of all tasks for one linear layer. Factors lie in one matrix, so that two products serve all tasks."""

    def __init__(self, changes: Sequence[Change], inputs: int, outputs: int) -> None:
        zero = torch.zeros(0)
        ranks = [len(change.right) if change.right is not None else 0 for change in changes]
        self.task_of = torch.repeat_interleave(torch.arange(len(changes)), torch.tensor(ranks))
        self.right = torch.cat([zero.view(0, inputs), *(c.right for c in changes if c.right is not None)])
        self.left = torch.cat([zero.view(outputs, 0), *(c.left for c in changes if c.left is not None)], 1)
        self.whole = {number: change.whole for number, change in enumerate(changes) if change.whole is not None}
        biases = [change.bias if change.bias is not None else torch.zeros(outputs) for change in changes]
        self.bias = torch.stack(biases) if any(change.bias is not None for change in changes) else None

    def to(self, like: Tensor) -> None:
        """Move all to where the inputs are, and to their dtype."""
        if (self.right.device, self.right.dtype) != (like.device, like.dtype):
            self.task_of = self.task_of.to(like.device)
            self.right, self.left = self.right.to(like), self.left.to(like)
            self.whole = {number: tensor.to(like) for number, tensor in self.whole.items()}
            self.bias = self.bias.to(like) if self.bias is not None else None

    def add(self, inputs: Tensor, gates: Tensor) -> Tensor:
        """What the tasks add; inputs (n, tokens, in), gates (n, tasks) -> (n, tokens, out)."""
        linear = torch.nn.functional.linear
        found: Tensor = linear(linear(inputs, self.right) * gates[:, None, self.task_of], self.left)
        for number, whole in self.whole.items():
            found = found + gates[:, number, None, None] * linear(inputs, whole)
        return found if self.bias is None else found + (gates @ self.bias)[:, None]
