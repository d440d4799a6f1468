"""PEFT's other methods (LoHa, LoKr, OFT, IA3, VeRA and so on): peft itself merges them, one module at a time.

A model of each module alone is built, with the base's own weight in float32. peft wraps its layer around it, loads the module's
tensors from the file, and merges. Methods that share parameters between modules get all modules of the adapter, but only the
current one has weights in memory. So mathematics, defaults and initial values are peft's own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peru_cli.checkpoints.architectures import is_conv1d, is_embedding
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.lora.keys import OUTER
from peru_cli.errors import BadFile, UsageError

if TYPE_CHECKING:
    import torch

# PEFT's prefixes of a method's parameter names (its PEFT_TYPE_TO_PREFIX_MAPPING, which a test asks).
PREFIXES = {
    "ADALORA": "lora_", "BOFT": "boft_", "C3A": "c3a_", "DEFT": "deft_", "DELORA": "delora_", "FOURIERFT": "fourierft_",
    "GLORA": "glora_", "GRALORA": "gralora_", "HIRA": "hira_", "HRA": "hra_", "IA3": "ia3_", "LN_TUNING": "ln_tuning_", "LOHA": "hada_",
    "LOKR": "lokr_", "MISS": "miss_", "OFT": "oft_", "PEANUT": "peanut_", "ROAD": "road_", "SHIRA": "shira_",
    "SUPERTUNING": "supertuning_", "VBLORA": "vblora_", "VERA": "vera_lambda_", "WAVEFT": "waveft_",
}  # fmt: skip
_SHARED = {"VBLORA": "vblora_", "VERA": "vera_"}  # methods whose modules share parameters, and the prefix of their names
_ALIASES = ("vblora_vector_bank", "vera_A", "vera_B")  # each module's entry of these is one shared object
# Why adapters of other methods cannot become weights of a model.
_REASONS = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT"),
        "it adds to the input, not to weights",
    ),
    **dict.fromkeys(("XLORA", "POLY", "LILY"), "which update counts depends on the input"),
    **dict.fromkeys(("ADAMSS", "FROD", "OSF", "PSOFT", "TINYLORA"), "its parameters belong to a decomposition of the base"),
    **dict.fromkeys(("PVERA", "RANDLORA", "UNILORA"), "its parameters are shared by all modules, and come from a generator"),
    "SHADOW": "it is a network beside the model",
    "BEFT": "peft does not merge its biases into layers that have none",
    "TRAINABLE_TOKENS": "its rows belong to tokens that its configuration lists",
}


def refuse_kind(kind: object, label: str, hint: str) -> UsageError:
    """The error for an adapter of an unsupported method."""
    reason = _REASONS.get(str(kind))
    said = f"{label} is a PEFT adapter of type {kind}" + (f": {reason}" if reason else ", a method that peru does not know")
    return UsageError(said, hint)


@dataclass(frozen=True)
class Foreign:
    """A module that peft merges: the names of its tensors in the file."""

    name: str
    keys: tuple[str, ...]


def sort_foreign(names: Sequence[str], kind: str) -> tuple[list[Foreign], list[str], dict[str, str]]:
    """The modules of a file, the tensors that they share, and tensors held whole, by their plain name."""
    modules: dict[str, list[str]] = {}
    shared, whole = [], {}
    own, common = re.compile(rf"(.+?)\.{PREFIXES[kind]}"), _SHARED.get(kind)
    for name in sorted(names):
        plain = name.removeprefix(OUTER)
        if common is not None and plain.startswith(f"base_model.{common}"):
            shared.append(name)
        elif match := own.match(plain):
            modules.setdefault(match[1], []).append(name)
        else:
            whole[plain] = name
    return [Foreign(name, tuple(keys)) for name, keys in sorted(modules.items())], shared, whole


@dataclass(frozen=True)
class Around:
    """A module's surroundings that peft needs: its place in the base, the model's type, and the other modules by name."""

    config: Mapping[str, Any]  # adapter_config.json
    model: Mapping[str, Any]  # config.json
    fellows: Mapping[str, tuple[TensorInfo, TensorInfo | None]]  # weight and bias of each module of the adapter


def merge(
    module: Foreign,
    around: Around,
    weights: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    shared: Sequence[str],
    label: str,
) -> dict[str, torch.Tensor]:
    """Weight and bias (if there is one) of a module merged with the adapter, float32.

    Args:
        weights: "weight" and "bias" of the base, float32. read: returns a tensor of the adapter by its name.
        shared: names of the tensors that the adapter's modules share.

    Raises BadFile if the file lacks tensors that peft needs, or has more."""
    import torch
    from peft import PeftModel, set_peft_model_state_dict

    kind = str(around.config["peft_type"])
    names = list(around.fellows) if kind in _SHARED else [module.name]
    parts = {}
    for name in names:
        weight, bias = around.fellows[name]
        own = weights if name == module.name else {
            "weight": torch.zeros(()).expand(weight.shape), **({"bias": torch.zeros(()).expand(bias.shape)} if bias is not None else {})
        }  # fmt: skip
        parts[name] = _layer(name, own, around.model)
    table = {name: read(name) for name in (*module.keys, *shared)}
    settings = _peft_config(around.config, names, module.name)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            wrapped: Any = PeftModel(_nest(parts), settings)
            found: Any = set_peft_model_state_dict(wrapped, table)
            mine = [key for key in found.missing_keys if f".{module.name}.{PREFIXES[kind]}" in key]
            missing = [key for key in mine if not any(f".{name}" in key for name in _ALIASES)]
            odd = [*(f"no {name}" for name in missing), *(f"{name}, which it does not know" for name in found.unexpected_keys)]
            if odd:
                hint = "the file is incomplete, or of another version of peft"
                raise BadFile(f"{label}: peft, which merges {kind}, finds {odd[0]}", hint)
            layer = wrapped.base_model.model.get_submodule(module.name)
            layer.merge()
            layer = layer.get_base_layer()
        except (RuntimeError, ValueError, KeyError, AttributeError, NotImplementedError, TypeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)  # some errors say nothing
            raise BadFile(f"{label}: peft cannot merge the {kind} of {module.name}: {reason}") from error
    merged = {part: getattr(layer, part).detach().float().contiguous() for part in weights}
    for part, tensor in merged.items():
        if tensor.shape != weights[part].shape or not bool(tensor.isfinite().all()):
            raise BadFile(f"{label}: the {kind} of {module.name} comes to a {part} with NaN or infinite values")
    return merged


def _peft_config(config: Mapping[str, Any], names: Sequence[str], own: str) -> Any:
    """The adapter's config for only some of its modules. UsageError for settings that the installed peft does not know."""
    import dataclasses

    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(config["peft_type"])]
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(name for name in config if name not in known):
        hint = "install the version of peft that wrote it"
        raise UsageError(f"adapter_config.json has {unknown[0]}={config[unknown[0]]!r}, which peft {peft.__version__} does not know", hint)
    left_out = ("peft_type", "target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", "task_type", "auto_mapping")
    given = {name: value for name, value in config.items() if name not in left_out}
    if config["peft_type"] == "ADALORA" and given.get("rank_pattern"):
        given["rank_pattern"] = {name: value for name, value in given["rank_pattern"].items() if f".{own}." in f".{name}"}
    feedforward = given.pop("feedforward_modules", None)
    made: Any = cls(**given)
    made.target_modules = "|".join(re.escape(name) for name in names)
    made.inference_mode = True
    if feedforward is not None:
        made.feedforward_modules = feedforward if isinstance(feedforward, str) else set(feedforward)
    return made


def _layer(name: str, weights: Mapping[str, torch.Tensor], model: Mapping[str, Any]) -> Any:
    """A module of torch or transformers around a weight and a bias."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    shape, bias = tuple(weights["weight"].shape), "bias" in weights
    layer: Any
    with torch.device("meta"):
        if len(shape) == 1:
            layer = nn.LayerNorm(shape[0]) if bias else nn.RMSNorm(shape[0])
        elif len(shape) in (3, 4):
            layer = (nn.Conv1d if len(shape) == 3 else nn.Conv2d)(shape[1], shape[0], shape[2:], bias=bias)  # type: ignore[arg-type]
        elif is_embedding(name):
            layer = nn.Embedding(shape[0], shape[1])
        elif is_conv1d(name, model):
            layer = Conv1D(shape[1], shape[0])
        else:
            layer = nn.Linear(shape[1], shape[0], bias=bias)
    for part, tensor in weights.items():
        setattr(layer, part, nn.Parameter(tensor, requires_grad=False))
    return layer


def _nest(modules: Mapping[str, Any]) -> Any:
    """A model in which modules have these full names."""
    from torch import nn

    root = nn.Module()
    for name, module in modules.items():
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(leaf, module)
    return root
