"""The tau-Jp regulariser: keep a fine-tune from moving the features of other tasks' inputs.

    loss = task's loss + strength * mean over other tasks j of E_{x in D_j} ||J_{theta_0}(x) (theta - theta_0)||_2

Source: Mastering Task Arithmetic: tau-Jp as a Key Indicator for Weight Disentanglement (ICLR 2025), equations 10 (strict)
and 11 (cyclic). The other tasks' inputs need no labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from peru_cli.errors import UsageError
from peru_cli.inference.taujp import Features, change_norms, features
from peru_cli.training.origin import Base, Origin, forward_mode

Batch = Mapping[str, Any]
_LABELS = ("labels", "label", "label_ids")  # of another task: its classes are not the model's


class TauJp:
    """How far a model in training has moved the features of given inputs, to first order at its base."""

    def __init__(self, model: nn.Module, base: Base, features: Features | None = None) -> None:
        """Make it after the model has its adapters, and its frozen weights are frozen.

        Args:
            model: what is trained: a transformers model, a peft model with LoRA adapters, one that `linearize` returned, or any module.
            base: theta_0: a module, a state dict, or `model` itself before its first step. Names may lack or have a prefix.
            features: called as (module, parameters, batch), returns the features before the head: (batch, features) or
                (batch, positions, features). By default those of a transformers model (see `peru_cli.inference.taujp.features`).

        Raises Mismatch if base and model do not fit, or an adapter is not a plain LoRA."""
        if features is None and not hasattr(model, "base_model"):
            raise UsageError(f"{type(model).__name__} is not a transformers model", "say with features= what comes before its head")
        self.model = model
        # with features of the user's own only the user knows which weights they need
        self._origin = Origin(model, base, (lambda skeleton: skeleton.base_model) if features is None else (lambda _: nn.Module()))
        self._features = features

    def penalty(self, inputs: Batch | Sequence[Batch]) -> torch.Tensor:
        """Mean over the examples of ||J_{theta_0}(x) (theta - theta_0)||_2; a scalar, differentiable in what is trained.

        Of several batches, one a task, it is the mean over the batches. Dropout is off. Features of several positions count with
        the mean of their norms, without padding.

        Args:
            inputs: what the model's forward takes; labels are dropped.

        Raises UsageError if the model's parameters were replaced meanwhile, Mismatch if a layer has no forward mode."""
        batches = [inputs] if isinstance(inputs, Mapping) else inputs
        if not batches:
            raise UsageError("tau-Jp of no batch at all", "give the inputs of at least one other task")
        weights = self._origin.weights()
        tau = self._origin.tau(weights)
        device = next(iter(weights.values())).device
        means = []
        with forward_mode():
            for batch in batches:
                kept = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k not in _LABELS}
                means.append(change_norms(self._origin.skeleton, weights, tau, kept, self._features or features).mean())
        return torch.stack(means).mean()


class OtherTasks:
    """Unlabelled batches of the other tasks, step by step, without end: a loader that ends begins anew."""

    def __init__(self, loaders: Mapping[str, Iterable[Batch]], mode: Literal["cyclic", "strict"] = "cyclic") -> None:
        """
        Args:
            loaders: batches by task, each something that can be iterated again, such as a DataLoader.
            mode: `cyclic` takes one task a step, in turn (equation 11); `strict` takes all of them (equation 10)."""
        if mode not in ("cyclic", "strict"):
            raise UsageError(f"{mode!r} is no mode", "choose cyclic (one task a step) or strict (all of them)")
        if not loaders:
            raise UsageError("no other task was given", "the regulariser needs inputs of at least one")
        self.mode, self._loaders, self._step = mode, dict(loaders), 0
        self._running: dict[str, Iterator[Batch]] = {}

    def next(self) -> list[Batch]:
        """The batches of the next step: one, or one of each task. UsageError if a loader has none left and cannot begin anew."""
        names = list(self._loaders)
        chosen = names if self.mode == "strict" else [names[self._step % len(names)]]
        self._step += 1
        return [self._batch(name) for name in chosen]

    def _batch(self, name: str) -> Batch:
        for attempt in range(2):
            if attempt or name not in self._running:
                self._running[name] = iter(self._loaders[name])
            if (batch := next(self._running[name], None)) is not None:
                return batch
        raise UsageError(f"the inputs of {name} have no batch, or cannot be read twice", "give a DataLoader or a list, not an iterator")
