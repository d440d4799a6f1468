"""adapter_config.json: the kind of adapter, the scale of each module, and the config of a resized adapter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.lora.foreign import PREFIXES, refuse_kind
from peru_cli.checkpoints.places import Place, children
from peru_cli.errors import BadFile, UsageError
from peru_cli.shown import listed

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MODEL_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
MERGED = "merge the adapter into its base with peft (merge_and_unload) and use the result"
# Settings with which the update of a weight is not scale * B @ A, or the base itself is changed, and the values that turn them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "use_qalora": (False, None),
    "use_bdlora": (False, None, {}),
    "kasa_config": (None, {}),
    "arrow_config": (None, {}),
    "monteclora_config": (None, {}),
    "lora_ga_config": (None, {}),
    "megatron_config": (None, {}),
}
# Settings that are not visible in B @ A: an adapter with them can be resized, but not added to its base.
_NOT_ADDED: dict[str, tuple[Any, ...]] = {
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
}
# Initialisations that leave the base unchanged. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Fields that are used, and those without meaning once an adapter is trained: its file lists the modules it has.
_USED = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias", "target_parameters",
    "modules_to_save", "ensure_weight_tying", "init_lora_weights", "base_model_name_or_path", "revision", "peft_type",
)  # fmt: skip
_OF_TRAINING = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "bias", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "velora_config", "runtime_config", "qalora_group_size", "task_type", "auto_mapping", "peft_version",
    "inference_mode", "merge_weights",
)  # fmt: skip
# Must contain every field of peft.LoraConfig (a test asks peft): a new one may change what an adapter means.
HANDLED = frozenset({*_OFF, *_NOT_ADDED, *_USED, *_OF_TRAINING})


def read_config(folder: Place, label: str) -> dict[str, Any]:
    """The config of an adapter of LoRA, or of a method that peft merges. UsageError names any other kind."""
    path = folder / CONFIG
    try:
        config = json.loads(inputs.read_small(path))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise BadFile(f"{path}: not a table")
    kind = config.get("peft_type")
    if kind in PREFIXES:
        return config
    if kind != "LORA":
        raise refuse_kind(kind, label, MERGED)
    odd = _not_plain(config, _OFF)
    odd += [f"{name}={value!r}, which peru does not know" for name, value in sorted(config.items()) if value and name not in HANDLED]
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        odd.append(f"init_lora_weights={init!r}")
    if odd:
        hint = MERGED
        if isinstance(init, str) and init not in _INITS:
            hint = "it changes the base: convert it to plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        raise UsageError(f"{label} is not a plain LoRA adapter: {listed(odd)}", hint)
    for name in ("r", "lora_alpha"):
        value = config.get(name, 8)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BadFile(f"{path}: {name} is {value!r}, not a number")
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(path, name, config.get(name) or {})
    return config


def refuse_model_beside(folder: Place) -> None:
    """UsageError for a folder that holds both an adapter and a whole model: nothing tells which is meant, and loaders differ."""
    adapter = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if adapter is None or not (folder / CONFIG).is_file():
        return
    model = next((child for child in children(folder) if _MODEL_FILE.fullmatch(child.name)), None)
    if model is not None:
        hint = f"name the file that is meant: {adapter}" + (f" or {model}" if model.suffix != ".json" else ", or move the adapter away")
        raise UsageError(f"{folder} holds an adapter, {adapter.name}, and a model, {model.name}", hint)


def _check_pattern(path: Place, name: str, table: Any) -> None:
    if not isinstance(table, dict):
        raise BadFile(f"{path}: {name} is not a table")
    for key, value in table.items():
        try:
            re.compile(key)
            if isinstance(value, bool) or not math.isfinite(value):
                raise TypeError
        except (re.error, TypeError) as error:
            raise BadFile(f"{path}: {name} has the entry {key!r}: {value!r}") from error


def _not_plain(config: Mapping[str, Any], settings: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [f"{name}={config[name]!r}" for name, off in settings.items() if config.get(name) not in off]


def check_can_be_added(config: Mapping[str, Any], label: str) -> None:
    """UsageError for an adapter that is not a sum of base and B @ A."""
    odd = _not_plain(config, _NOT_ADDED)
    if odd:
        raise UsageError(f"{label} cannot be added to its base weight by weight: {listed(odd)}", MERGED)


def _first_match(table: Any, name: str, default: float) -> float:
    """The value of the first pattern that matches the end of a name, as in peft's get_pattern_key."""
    for key, value in (table or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return float(value)
    return default


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """The rank that the config gives a module (or parameter)."""
    return int(_first_match(config.get("rank_pattern"), name, float(config.get("r", 8))))


def scale_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    alpha = _first_match(config.get("alpha_pattern"), name, float(config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def resized_config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The config of the same adapter with the scale baked into its factors: alpha = r for every module.

    Args:
        ranks: the new rank of each module (or parameter) by its full name."""
    largest = max(ranks.values())
    patterns = {"^" + re.escape(name): rank for name, rank in sorted(ranks.items()) if rank != largest}
    return dict(config) | {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "loftq_config": {},
        "eva_config": None,
        "inference_mode": True,
    }


def new_config(
    ranks: Mapping[str, int], modules: Iterable[str], parameters: Iterable[str], base: str | None, **more: Any
) -> dict[str, Any]:
    """The config of an adapter that peru made. `modules` and `parameters` are full names, which match exactly."""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "revision": None,
        "task_type": None,
        "auto_mapping": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "use_dora": False,
        "lora_bias": False,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return resized_config(config, ranks) | more


_ABOUT = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version")  # these change no weight


def sealed_config(config: Mapping[str, Any]) -> bytes:
    """The part of a config that a seal covers: everything that determines the weights, in any layout, but not the base's location."""
    return json.dumps({key: value for key, value in config.items() if key not in _ABOUT}, sort_keys=True).encode()


def encode_config(config: Mapping[str, Any]) -> bytes:
    """adapter_config.json, keys sorted as in peft."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
