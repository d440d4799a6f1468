"""Linearised fine-tuning: the model's first-order Taylor expansion at its base is trained in its place.

    f_lin(x; theta) = f(x; theta_0) + J_{theta_0}(x) (theta - theta_0)

Source: Ortiz-Jimenez et al., Task Arithmetic in the Tangent Space (https://arxiv.org/abs/2305.12827), equation 7."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.utils import _pytree as pytree

from peru_cli.errors import UsageError
from peru_cli.training.adapters import without_wrapper
from peru_cli.training.origin import Base, Origin, OwnForward, forward_mode

_Model = TypeVar("_Model", bound=nn.Module)


class _Tangent(OwnForward):
    """The forward pass of f_lin in a module's place."""

    def __init__(self, module: nn.Module, base: Base) -> None:
        self.module, self.origin = module, Origin(module, base)
        functools.update_wrapper(self, module.forward)  # the Trainer reads its signature
        if any(module.p for layer in self.origin.layers.values() for module in layer.modules() if isinstance(module, nn.Dropout)):
            raise UsageError("a linearised model knows merged weights only: LoRA's dropout has no place in them", "set lora_dropout=0")
        self.caches = "use_cache" in inspect.signature(module.forward).parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(getattr(module, "gradient_checkpointing", False) for module in self.module.modules()):
            raise UsageError(
                "a linearised model cannot use gradient checkpointing: it has no forward mode",
                "call gradient_checkpointing_disable(), and use smaller batches or linearise fewer weights",
            )
        if self.caches:
            kwargs["use_cache"] = False  # keys and values of theta_0 are no tensors of f_lin
        weights = self.origin.weights()
        tau = self.origin.tau(weights)
        skeleton = self.origin.skeleton.train(self.module.training)
        rest: list[Any] = []

        def run(moving: dict[str, torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
            leaves, shape = pytree.tree_flatten(functional_call(skeleton, {**weights, **moving}, args, kwargs))
            is_float = [isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in leaves]
            is_other = [isinstance(leaf, torch.Tensor) and not chosen for leaf, chosen in zip(leaves, is_float, strict=True)]
            others = tuple(leaf for leaf, chosen in zip(leaves, is_other, strict=True) if chosen)
            rest[:] = [[None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], shape, is_float, is_other]
            return tuple(leaf for leaf, chosen in zip(leaves, is_float, strict=True) if chosen), others

        with forward_mode():
            found: Any = jvp(run, ({name: weights[name] for name in tau},), (tau,), has_aux=True)
        (values, changes, others), (leaves, shape, is_float, is_other) = found, rest
        moved, kept = iter([value + change for value, change in zip(values, changes, strict=True)]), iter(others)
        whole = [next(moved) if a else next(kept) if b else leaf for leaf, a, b in zip(leaves, is_float, is_other, strict=True)]
        return pytree.tree_unflatten(whole, shape)


def linearize(model: _Model, base: Base | None = None) -> _Model:
    """Turn a model, in place, into its linear expansion at the base. Returns it.

    Of a transformers model with a head the encoder (`model.base_model`) is linearised, as in the paper, and the head stays as it is;
    of any other module all of it. Names, parameters and `save_pretrained` stay the same: what is saved is an ordinary checkpoint of
    theta. Loaded again it is the usual model; `linearize(model, base)` makes it the linear one again, a merge of such checkpoints
    too. A step takes about twice the time and memory. Attention becomes eager: a warning says so.

    Args:
        base: theta_0, a module or a state dict; None: the weights that the model has now. Not after training was resumed.

    Raises Mismatch if base and model do not fit, UsageError if the model is linearised already; its forward pass raises
    UsageError under gradient checkpointing."""
    plain = without_wrapper(model)
    target: Any = getattr(plain, "base_model", plain)
    if isinstance(vars(target).get("forward"), OwnForward):
        raise UsageError("the model is linearised already")
    attention = getattr(getattr(target, "config", None), "_attn_implementation", "eager")
    if attention != "eager":
        warnings.warn(f"linearize: attention is eager now, not {attention}, which has no forward mode", stacklevel=2)
    target.forward = _Tangent(target, target if base is None else base)
    return model
