"""The weights theta_0 that a task vector starts from, beside the model that is being trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from peru_cli.checkpoints.pairing import find_prefix
from peru_cli.errors import Mismatch, UsageError
from peru_cli.live.memory import infos
from peru_cli.training.adapters import added, take_off, without_wrapper

Base = nn.Module | Mapping[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]


class OwnForward:
    """A forward pass that was put in a module's place."""


class Origin:
    """theta_0, tau = theta - theta_0 as the model is now, and a copy of the model's structure to run at theta_0.

    The copy holds no weights. Its attention is eager and it keeps all activations, because neither fused attention nor
    gradient checkpointing has a forward mode; the model itself may use both. theta_0 is copied, so `base` may be dropped, but for
    frozen weights that equal it: those are the model's own. With LoRA tau is what the adapters add."""

    def __init__(self, model: nn.Module, base: Base, inside: Callable[[Any], Any] = lambda model: model) -> None:
        """`inside` picks the module whose weights must be the base's; what else the base lacks, a head, does not move.

        Raises Mismatch if the base lacks one of those weights, has another shape, or the model is quantised."""
        plain = without_wrapper(model)
        metas = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in plain.parameters()}
        own = [vars(module)["forward"] for module in plain.modules() if isinstance(vars(module).get("forward"), OwnForward)]
        self.skeleton: Any = copy.deepcopy(plain, metas | {id(forward): None for forward in own})
        self.layers = take_off(plain, self.skeleton)
        for module in self.skeleton.modules():
            if vars(module).get("forward", module) is None:
                del module.forward  # the usual one again
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", "") == "make_inputs_require_grads":  # of checkpointing, and no use in forward mode
                    del module._forward_hooks[key]
        if hasattr(self.skeleton, "set_attn_implementation"):
            self.skeleton.set_attn_implementation("eager")
        self.skeleton.eval()
        self._owner, by_meta = plain, {id(metas[id(p)]): p for p in plain.parameters()}
        self._parameters: dict[str, nn.Parameter] = {name: by_meta[id(meta)] for name, meta in self.skeleton.named_parameters()}
        self._known = list(plain.parameters())
        self._stored: Tensors = {}
        self._fixed: Tensors = {}  # heads that the base lacks
        self._take(base, {id(p) for p in inside(self.skeleton).parameters()})

    def _take(self, base: Base, needed: set[int]) -> None:
        found: Mapping[str, torch.Tensor] = {}
        if base is self._owner or (isinstance(base, nn.Module) and without_wrapper(base) is self._owner):
            found = self._parameters  # under the copy's names, without those of adapters
        elif isinstance(base, nn.Module):
            found = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers())
        else:
            found = base
        metas = dict(self.skeleton.named_parameters())
        prefix = find_prefix(infos(metas), infos({name: tensor.detach() for name, tensor in found.items()}))
        missing: list[str] = []
        wrong: list[str] = []
        for name, parameter in self._parameters.items():
            tensor = found.get(prefix.base_name(name) or "")
            if tensor is None or tensor.shape != parameter.shape:
                if id(metas[name]) in needed:
                    (missing if tensor is None else wrong).append(name)
                self._fixed[name] = parameter.detach().clone() if parameter.requires_grad else parameter.detach()
                continue
            if not parameter.is_floating_point():
                raise Mismatch(f"{name} is stored as {parameter.dtype}", "quantised models have no derivatives: load the model in floats")
            value = tensor.detach().to(parameter.device, parameter.dtype)
            if parameter.requires_grad or not torch.equal(value, parameter.detach()):
                self._stored[name] = value.clone()
        if missing or wrong:
            names = ", ".join([*missing, *wrong][:3])
            reason = "the base lacks" if missing else "the base has other shapes of"
            raise Mismatch(
                f"{reason} {len(missing) + len(wrong)} tensors of the model: {names}", "give the checkpoint that training starts from"
            )
        if not self._stored and not self.layers:
            raise Mismatch(
                "nothing is trained: all weights are frozen and equal the base's", "make it after the weights to train are chosen"
            )

    def weights(self) -> Tensors:
        """theta_0 by the names of the copy, on the model's device and in its dtype."""
        found = {}
        for name, parameter in self._parameters.items():
            table = self._stored if name in self._stored else self._fixed
            if name in table:
                table[name] = table[name].to(parameter.device, parameter.dtype)
            found[name] = table[name] if name in table else parameter.detach()
        for module in self.skeleton.modules():  # buffers follow the model to its device
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(parameter.device)
        return found

    def tau(self, weights: Tensors) -> Tensors:
        """theta - theta_0 of all that may differ, differentiable in what is trained; `weights` are `self.weights()`.

        Raises UsageError if parameters were replaced or unfrozen after this was made."""
        if {id(p) for p in self._owner.parameters()} != {id(p) for p in self._known}:
            raise UsageError("the model's parameters were replaced after tau-Jp or linearize saw them", "add adapters and tokens first")
        found: Tensors = {}
        for name, parameter in self._parameters.items():
            if name in self._stored:
                found[name] = parameter - weights[name]
            elif parameter.requires_grad and name not in self._fixed:
                raise UsageError(f"{name} was frozen when tau-Jp or linearize saw it, and is trained now", "unfreeze weights first")
        for name, layer in self.layers.items():
            delta = added(layer, name)
            delta = torch.zeros_like(weights[name]) if delta is None else delta.to(weights[name].dtype)
            found[name] = found[name] + delta if name in found else delta
        return found


@contextmanager
def forward_mode() -> Iterator[None]:
    """Attention of torch itself by plain products, and an error that says what to do where a kernel has no forward mode."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except (NotImplementedError, RuntimeError) as error:
        if not any(word in str(error) for word in ("forward AD", "forward mode", "jvp", "functorch")):
            raise
        reason = str(error).splitlines()[0]
        raise Mismatch(
            f"a layer of the model has no forward mode: {reason}", "use plain torch operations there, as eager attention does"
        ) from error
