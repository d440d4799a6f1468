"""`prune --data`: the integers of an artifact, moved by gradients so that outputs on texts come nearer to the fine-tune's.

Straight-through estimation (Bengio, Leonard and Courville 2013): the model computes with rounded integers, and what it would like to
change is added to the numbers before rounding. They start at the integers that were found without data, half a step from the next ones:
what only one batch asks for changes nothing. Steps, ranks and streams stay as they are. No labels are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peru_cli.artifacts.mixed.writer import Represented
from peru_cli.errors import Mismatch
from peru_cli.inference.inputs import counted_logits
from peru_cli.inference.models import IMAGE, LABELS, TEXT, VALUE, problem_of
from peru_cli.inference.prepare import Loaded
from peru_cli.methods.mixed import dense, directions
from peru_cli.methods.mixed.scales import is_exact, scale_of

STEPS = 48  # of gradient descent
RATE = 0.05  # at first, in integers
WARM = 5  # steps until the rate is reached; then it falls as a cosine
_HIDDEN = 5.0  # what the hidden states' relative error counts beside the outputs' KL
_BETAS = (0.9, 0.95)  # short memories, as there are few steps
_EVERY, _MOST_HELD = 5, 100  # one of so many examples is held out, up to so many
_FEW = 20  # examples below which none is
Array = np.ndarray[Any, np.dtype[Any]]


class Moved:
    """Integers of any shape that gradients move, and their steps, which fit that shape."""

    def __init__(self, integers: Array, steps: Array, most: int, device: torch.device) -> None:
        self._start = torch.from_numpy(integers.astype(np.float32)).to(device)
        self._steps = torch.from_numpy(np.asarray(steps, np.float32)).to(device)
        self.exact, self.most = self._start.clone(), most
        self._mean, self._square = torch.zeros_like(self.exact), 0.0
        self.used = self._values()

    def _values(self) -> Tensor:
        return (self.exact.round() * self._steps).requires_grad_()

    def step(self, rate: float, number: int) -> None:
        """Move against the mean of the last gradients, over the root of what they square to in the whole tensor; step `number` from 1.

        As in Adam (Kingma and Ba 2015), but that has such a root for every entry: entries about which batches do not agree would move, too.
        """
        if self.used.grad is None:
            return
        gradient = self.used.grad * self._steps  # in integers
        self._mean.lerp_(gradient, 1 - _BETAS[0])
        self._square += (1 - _BETAS[1]) * (float(gradient.square().mean()) - self._square)
        length = math.sqrt(self._square / (1 - _BETAS[1] ** number))
        if length:
            self.exact -= rate / (1 - _BETAS[0] ** number) / length * self._mean
            self.exact.clamp_(-self.most, self.most)
        self.used = self._values()

    def after(self, share: float) -> Tensor:
        """The numbers after this share of each one's way."""
        if share == 1:
            return self.exact
        return (self._start + share * (self.exact - self._start)).clamp(-self.most, self.most)

    def go(self, share: float) -> None:
        """Stand there."""
        self.exact = self.after(share)
        self.used = self._values()

    def integers(self, share: float) -> Array:
        """The same as integers, int16."""
        moved: Array = self.after(share).round().cpu().numpy().astype(np.int16)
        return moved


@dataclass
class LowRankParts:
    """A linear layer's factors: left (rows, k), right (columns, k), and the rows that the left one has, None for all."""

    module: nn.Module
    left: Moved
    right: Moved
    rows: Tensor | None

    def add(self, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook: what the factors add to the base's output."""
        left = self.left.used
        if self.rows is not None:
            left = left.new_zeros(output.shape[-1], left.shape[1]).index_copy(0, self.rows, left)
        return output + (given[0] @ self.right.used.to(given[0].dtype)) @ left.T.to(given[0].dtype)


class Student:
    """A fine-tune's model that can be switched between its own weights and those of its artifact."""

    def __init__(
        self, loaded: Loaded, own: Mapping[str, str], parts: Mapping[str, Represented], weights: Callable[[str, bool], Tensor | None]
    ) -> None:
        """Take the model over; `weights` gives a tensor with what the artifact adds, or without, float32; None for the fine-tune's own.

        Args:
            own: the checkpoint's names of tensors by those in the model.
            parts: what the artifact adds to the base, by the checkpoint's names.
        """
        self.loaded, model = loaded, loaded.model
        self._places: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self._fine = {name: place.data for name, place in self._places.items()}
        self._ours: dict[str, Tensor] = {}
        self.low: dict[str, LowRankParts] = {}
        self.plain: dict[str, Moved] = {}
        self._base: dict[str, Tensor] = {}
        device = next(model.parameters()).device
        linear = _linear_weights(model)
        for name, place in self._places.items():
            called = own.get(name, "")
            part, module = parts.get(called), linear.get(name)
            if part is not None and module is not None and _fits(part, place):
                assert part.left is not None and part.right is not None and part.scales is not None
                root = np.sqrt(scale_of(part.scales))
                rows = None if part.rows is None else torch.from_numpy(part.rows.astype(np.int64)).to(device)
                self.low[called] = LowRankParts(
                    module,
                    Moved(part.left, root, directions.LARGEST, device),
                    Moved(np.ascontiguousarray(part.right.T), root, directions.LARGEST, device),
                    rows,
                )
            value = weights(called, called not in self.low)
            if value is None:
                continue
            self._ours[name] = value.to(device, place.dtype)
            plain, bare = (part.dense, weights(called, False)) if part is not None and part.left is None else (None, None)
            if part is not None and plain is not None and bare is not None and plain.size == place.numel():
                self.plain[name] = Moved(plain, scale_of(np.array([part.dense_scale])), dense.LARGEST, device)
                self._base[name] = bare.to(device).view(-1)
        self._named = {name: own[name] for name in self.plain}

    @property
    def moved(self) -> list[Moved]:
        """All integers."""
        return [*(m for low in self.low.values() for m in (low.left, low.right)), *self.plain.values()]

    def outputs(self, batch: dict[str, Tensor], ours: bool, hidden: bool) -> tuple[Tensor, list[Tensor]]:
        """Outputs that count, (n, outputs), and hidden states, under the artifact's weights or the fine-tune's."""
        hooks = []
        for name, place in self._places.items():
            place.data = self._ours.get(name, self._fine[name]) if ours else self._fine[name]
        if ours:
            for name, moved in self.plain.items():
                place = self._places[name]
                place.data = (self._base[name] + moved.used.detach()).view(place.shape).to(place.dtype)
                if isinstance(place, nn.Parameter):
                    place.requires_grad_(torch.is_grad_enabled())
                    place.grad = None
            hooks = [low.module.register_forward_hook(low.add) for low in self.low.values()]
        try:
            return counted_logits(self.loaded.model, batch, self.loaded.kind, hidden)
        finally:
            for hook in hooks:
                hook.remove()

    def step(self, rate: float, number: int) -> None:
        """Move all integers' numbers, after a backward pass."""
        for name, moved in self.plain.items():
            gradient = self._places[name].grad
            moved.used.grad = None if gradient is None else gradient.view(-1).float()
        for moved in self.moved:
            moved.step(rate, number)

    def settle(self, share: float) -> None:
        """Go this share of the way."""
        for moved in self.moved:
            moved.go(share)

    def harvest(self, parts: Mapping[str, Represented], share: float = 1.0) -> dict[str, Represented]:
        """The parts with their integers after this share of the way; a tensor whose sums would not be exact stays as it was."""
        found = dict(parts)
        for name, low in self.low.items():
            left, right = low.left.integers(share), np.ascontiguousarray(low.right.integers(share).T)
            scales = parts[name].scales
            assert scales is not None
            if is_exact(np.abs(left).max(0), np.abs(right).max(1), scales):
                found[name] = replace(parts[name], left=left, right=right)
        for name, moved in self.plain.items():
            found[self._named[name]] = replace(parts[self._named[name]], dense=moved.integers(share))
        return found

    def close(self) -> None:
        """Give the model its own weights back."""
        for name, place in self._places.items():
            place.data = self._fine[name]
            place.requires_grad_(False)


def _fits(part: Represented, weight: Tensor) -> bool:
    """Whether a part is low-rank alone and spans the whole weight."""
    if part.dense is not None or part.left is None or part.right is None:
        return False
    return part.right.shape[1] == weight.shape[1] and (part.rows is not None or len(part.left) == len(weight))


def _linear_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by their weights' names, but for weights that something else uses, too."""
    places: dict[int, int] = {}
    for _, weight in model.named_parameters(remove_duplicate=False):
        places[id(weight)] = places.get(id(weight), 0) + 1
    found = {f"{name}.weight".lstrip("."): module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if places.get(id(module.weight)) == 1}


def distances(loaded: Loaded, got: Tensor, wanted: Tensor) -> Tensor:
    """How far outputs are from the fine-tune's, (n, outputs) each: KL in nats, of a regression the squared difference; (n,)."""
    if loaded.kind in (TEXT, IMAGE):
        problem = problem_of(loaded.model.config)
        if problem == VALUE:
            return (got - wanted).square().sum(-1)
        if problem == LABELS:
            logs = nn.functional.logsigmoid
            yes = wanted.sigmoid() * (logs(wanted) - logs(got))
            return (yes + (-wanted).sigmoid() * (logs(-wanted) - logs(-got))).sum(-1)
    return nn.functional.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def _hidden_error(ours: Sequence[Tensor], theirs: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """The hidden states' squared error over their squares, summed over layers; padding (by the mask) left out."""
    total = torch.zeros((), device=ours[0].device)
    for mine, wanted in zip(ours[1:], theirs[1:], strict=True):
        counts = mask[..., None].float() if mask is not None and mask.shape == wanted.shape[:2] and wanted.dim() == 3 else 1.0
        squares = (wanted.float().square() * counts).sum().clamp_min(1e-30)
        total = total + ((mine.float() - wanted.float()).square() * counts).sum() / squares
    return total


@dataclass
class Split:
    """Numbers of the examples to learn from, in batches, and of those held out to measure on."""

    batches: list[Array]
    held: Array


def split(lengths: Array, size: int) -> Split:
    """Batches of like lengths, in an order in which any few that follow each other have all lengths."""
    numbers = np.arange(len(lengths))
    every = max(_EVERY, -(-len(numbers) // _MOST_HELD))
    held = numbers[every - 1 :: every] if len(numbers) >= _FEW else numbers
    rest = np.setdiff1d(numbers, held) if len(numbers) >= _FEW else numbers
    rest = rest[np.argsort(lengths[rest], kind="stable")]
    cuts = [rest[start : start + size] for start in range(0, len(rest), size)]
    stride = next(s for s in range(max(round(0.618 * len(cuts)), 1), 0, -1) if math.gcd(s, len(cuts)) == 1)
    return Split([cuts[i * stride % len(cuts)] for i in range(len(cuts))], held)


def measure(student: Student, numbers: Array, size: int) -> Array:
    """`distances` of the artifact's outputs from the fine-tune's, on some examples or all of their tokens."""
    found = []
    with torch.no_grad(), _casting(student):
        for start in range(0, len(numbers), size):
            batch = _batch(student, numbers[start : start + size])
            wanted, _ = student.outputs(batch, False, False)
            got, _ = student.outputs(batch, True, False)
            found.append(distances(student.loaded, got.double(), wanted.double()).cpu().numpy())
    return np.concatenate(found)


def descend(student: Student, batches: Sequence[Array]) -> None:
    """Move the integers' numbers for STEPS steps, a batch each. Mismatch if outputs are not finite."""
    for number, rate in enumerate(_rates(), 1):
        batch = _batch(student, batches[(number - 1) % len(batches)])
        with _casting(student):
            with torch.no_grad():
                wanted, theirs = student.outputs(batch, False, True)
            got, ours = student.outputs(batch, True, True)
        distance = distances(student.loaded, got.float(), wanted.float()).mean()
        if student.loaded.kind in (TEXT, IMAGE) and problem_of(student.loaded.model.config) == VALUE:
            distance = distance / wanted.float().square().mean().clamp_min(1e-30)
        loss = distance + _HIDDEN * _hidden_error(ours, theirs, batch.get("attention_mask"))
        if not bool(torch.isfinite(loss)):
            raise Mismatch(f"{student.loaded.label}: some outputs are NaN or infinite on these examples", "leave --data out")
        loss.backward()  # type: ignore[no-untyped-call]
        student.step(rate, number)


def _rates() -> Iterator[float]:
    for step in range(STEPS):
        yield RATE * min(1.0, (step + 1) / WARM) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))


def _batch(student: Student, numbers: Array) -> dict[str, Tensor]:
    device = next(student.loaded.model.parameters()).device
    return {name: tensor.to(device) for name, tensor in student.loaded.inputs.make(numbers).items()}


def _casting(student: Student) -> torch.autocast:
    """Products in bfloat16, four times as fast, where the processor has them."""
    device = next(student.loaded.model.parameters()).device.type
    has = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    fast = device == "cuda" or bool(has and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.autocast(device, torch.bfloat16, enabled=fast)
