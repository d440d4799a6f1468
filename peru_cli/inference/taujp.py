"""How much one task's vector moves the features of another task's inputs, to first order (tau-Jp).

    tau-Jp(i -> j) = mean over x in D_j of ||J_{theta_0}(x) tau_i||_2,    J the Jacobian of the features before the head

Source: the tau-Jp paper on task arithmetic by regularised linearisation. The smaller it is, the less task i disturbs task j.
The product is one forward-mode pass (`torch.func.jvp`), exact up to rounding. The model must use eager attention, because
fused attention has no forward mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.func import functional_call, jvp

Tensors = Mapping[str, torch.Tensor]
Features = Callable[[Any, Tensors, Tensors], torch.Tensor]  # (model, parameters, batch) -> features


class _Seen(Exception):
    """Ends a forward pass where the head begins: the rest is not needed."""


def features(model: Any, parameters: Tensors, batch: Tensors) -> torch.Tensor:
    """The inputs of the head with these parameters; (batch, features), or (batch, positions, features).

    The head is the first module after the encoder (`model.base_model`) that runs and is not a dropout. Nothing runs from there
    on. A model without one returns its last hidden state."""
    encoder, seen = model.base_model, []
    heads = [child for child in model.children() if child is not encoder and not isinstance(child, torch.nn.Dropout)]

    def keep(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.append(arguments[0])
        raise _Seen

    hooks = [head.register_forward_pre_hook(keep) for head in heads] if encoder is not model else []
    try:
        found: torch.Tensor = functional_call(model, dict(parameters), (), dict(batch)).last_hidden_state
    except _Seen:
        (found,) = seen
    finally:
        for hook in hooks:
            hook.remove()
    return found


def change_norms(model: Any, origin: Tensors, tau: Tensors, batch: Tensors, features: Features = features) -> torch.Tensor:
    """||J(x) tau||_2 of each example, over the feature axis; (batch,). It can be differentiated in tau.

    Features of several positions count with the mean of their norms, without padding (by the attention mask).

    Args:
        origin: all parameters at which J is taken, by the model's names, each tied one once.
        tau: the direction; parameters missing from it do not move."""
    moving = {name: value for name, value in origin.items() if name in tau}
    direction = {name: tau[name] for name in moving}
    _, change, *_ = jvp(lambda parameters: features(model, {**origin, **parameters}, batch), (moving,), (direction,))
    norms: torch.Tensor = (change.float() if change.dtype in (torch.bfloat16, torch.float16) else change).norm(dim=-1)
    if norms.dim() == 1:
        return norms
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != norms.shape:
        return norms.flatten(1).mean(1)
    return (norms * mask).sum(1) / mask.sum(1)
