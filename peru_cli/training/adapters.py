"""LoRA adapters of peft in training: the model without them, and what they add to its weights."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from peru_cli.errors import Mismatch, UsageError


def without_wrapper(model: Any) -> Any:
    """The transformers model inside a peft model; any other model itself."""
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def take_off(model: nn.Module, skeleton: nn.Module) -> dict[str, Any]:
    """Take the adapters off `skeleton`, a copy of `model` with the same module names.

    Returns the adapted layers of `model` by the name that their weight has in the skeleton now.

    Raises Mismatch for an adapter that is not a plain LoRA of a linear layer, embedding or convolution."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    live, layers = dict(model.named_modules()), {}
    for name, module in list(skeleton.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = live[name]
            plain = isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper) and hasattr(layer, "get_delta_weight")
            if not plain or layer.lora_variant or any(getattr(layer, "lora_bias", {}).values()):
                kind = ", ".join(type(variant).__name__ for variant in getattr(layer, "lora_variant", {}).values()) or type(layer).__name__
                raise Mismatch(
                    f"{name} has an adapter of kind {kind}", "tau-Jp and linearize know plain LoRA, without bias, and full fine-tuning"
                )
            layers[f"{name}.weight"] = layer
            skeleton.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            skeleton.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise Mismatch(f"{name} is trained by {type(module).__name__}", "use modules_to_save, or train all tokens")
    return layers


def added(layer: Any, name: str) -> torch.Tensor | None:
    """What the active adapters add to a layer's weight, differentiable in their factors. None if they are switched off.

    Raises UsageError if they are merged into the weight: then nobody can tell what they add."""
    if layer.merged:
        raise UsageError(f"the adapter of {name} is merged into the weight", "call unmerge_adapter() before training goes on")
    deltas = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.scaling]
    return None if layer.disable_adapters or not deltas else sum(deltas[1:], deltas[0])
