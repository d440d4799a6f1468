"""The scale of files without adapter_config.json: alpha as a tensor of the module, or in the file's metadata.

`alpha`, `lora_alpha`, `network_alpha` and sd-scripts' `ss_network_alpha` are for all modules; `COMPONENT.lora_alpha`
(SimpleTuner) and diffusers' `lora_adapter_metadata`, a LoraConfig in JSON, are for a component or for all. A tensor of the module
itself comes first, as in diffusers and ComfyUI. If some modules have one, the metadata apply to none. Two records that
contradict each other are an error: nothing tells which one was used in training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from peru_cli.checkpoints.lora.config import rank_of, scale_of
from peru_cli.errors import BadFile
from peru_cli.shown import listed

DIFFUSERS_METADATA = "lora_adapter_metadata"
_NAMES = ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha")
_ABSENT = ("", "none", "null", "dynamic")  # sd-scripts writes str(None), and "Dynamic" if modules differ
_CLOSE = 1e-3  # tolerance: an alpha in 16 bits is rounded


class Alphas:
    """Alpha according to a file's metadata. Raises BadFile if they cannot be read, or contradict each other."""

    def __init__(self, metadata: Mapping[str, str], modules: Iterable[str], label: str) -> None:
        self._label = label
        self._components = {module.partition(".")[0] for module in modules}
        self._configs = _diffusers_configs(metadata, label)  # by component, "" for the whole file
        self._said: dict[str, dict[str, float]] = {}  # alpha by its source, by component
        for key, text in metadata.items():
            component, _, name = key.rpartition(".")
            if name in _NAMES and text.strip().lower() not in _ABSENT:
                self._said.setdefault(component, {})[key] = _number(text, f"{label}: its metadata's {key}")
        for component, config in self._configs.items():
            key = DIFFUSERS_METADATA + (f"'s {component}.lora_alpha" if component else "'s lora_alpha")
            self._said.setdefault(component, {})[key] = float(config["lora_alpha"])
        for component, said in self._said.items():
            self._check(said | (self._said.get("", {}) if component else {}))
        self._blocks = "block_" in metadata.get("ss_network_args", "")  # sd-scripts' block_alphas: each block has its own

    def _check(self, said: Mapping[str, float]) -> None:
        items = sorted(said.items())
        for key, value in items[1:]:
            if not math.isclose(value, items[0][1], rel_tol=_CLOSE):
                raise self._contradiction(f"{items[0][0]} {items[0][1]:g}", f"{key} {value:g}")

    def _contradiction(self, one: str, other: str) -> BadFile:
        return BadFile(
            f"{self._label}: two records of its alpha contradict each other: {one}, and {other}",
            "the trainer's log says which is right; correct the other",
        )

    def scale(self, module: str, rank: int) -> float | None:
        """alpha / rank of a module, given its full name. None if nothing is recorded.

        BadFile if records exist only for components that the file does not have, and they differ."""
        component, _, rest = module.partition(".")
        for known, name in ((component, rest), ("", module)):
            if (found := self._scale_in(known, name, rank)) is not None:
                return found
        scales = {self._scale_in(known, module, rank): known for known in self._said if known not in self._components}
        if len(scales) > 1:
            names = listed(sorted(scales.values()))
            raise BadFile(f"{self._label}: its metadata record alpha for {names}, and {module} belongs to none of them")
        return next(iter(scales), None)

    def _scale_in(self, component: str, name: str, rank: int) -> float | None:
        if component in self._configs:
            return scale_of(self._configs[component], name, rank)
        said = self._said.get(component)
        return next(iter(said.values())) / rank if said else None

    def check_tensors(self, alphas: Mapping[str, float]) -> None:
        """BadFile if modules have an alpha of their own, and none of them equals the metadata's."""
        said = {key: value for by_key in self._said.values() for key, value in by_key.items()}
        if not alphas or not said or self._blocks or any(config.get("alpha_pattern") for config in self._configs.values()):
            return
        if not any(math.isclose(alpha, value, rel_tol=_CLOSE) for alpha in alphas.values() for value in said.values()):
            name, alpha = next(iter(sorted(alphas.items())))
            key, value = next(iter(said.items()))
            raise self._contradiction(f"{name} {alpha:g}", f"{key} {value:g} in the metadata")

    def check_config(self, config: Mapping[str, Any], name: str) -> None:
        """BadFile if the metadata and adapter_config.json have different alphas."""
        for said in self._said.values():
            for key, value in said.items():
                if not math.isclose(value, float(config.get("lora_alpha", 8)), rel_tol=_CLOSE):
                    raise self._contradiction(f"{name}'s lora_alpha {config.get('lora_alpha', 8):g}", f"{key} {value:g} in the metadata")

    def check_rank(self, module: str, rank: int) -> None:
        """BadFile if a recorded config gives a module another rank than its factors have."""
        component, _, rest = module.partition(".")
        for known, name in ((component, rest), ("", module)):
            if known in self._configs:
                recorded = rank_of(self._configs[known], name)
                if recorded != rank:
                    raise BadFile(f"{self._label}: {module}: its factors have rank {rank}, {DIFFUSERS_METADATA} says {recorded}")
                return


def without_alpha(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without any record of alpha or rank, for factors that include the scale."""
    gone = (*_NAMES, DIFFUSERS_METADATA, "r", "rank", "lora_rank", "network_dim", "ss_network_dim")
    return {key: value for key, value in metadata.items() if key.rpartition(".")[2] not in gone}


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise BadFile(f"{what} is {value!r}, not a number") from error
    if not math.isfinite(number):
        raise BadFile(f"{what} is {value!r}, not a number")
    return number


def _diffusers_configs(metadata: Mapping[str, str], label: str) -> dict[str, dict[str, Any]]:
    """LoRA configs by component (`unet.r`, ...) from a diffusers file's metadata; "" is that of a single model's file."""
    if DIFFUSERS_METADATA not in metadata:
        return {}
    try:
        table = json.loads(metadata[DIFFUSERS_METADATA])
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{label}: its metadata's {DIFFUSERS_METADATA} is not JSON ({error})") from error
    configs: dict[str, dict[str, Any]] = {}
    for key, value in table.items() if isinstance(table, dict) else ():
        component, dot, name = str(key).partition(".")
        component, name = (component, name) if dot else ("", component)
        configs.setdefault(component, {})[name] = value
    for component, config in configs.items():
        where = f"{label}: {DIFFUSERS_METADATA}'s {component + '.' if component else ''}"
        for name in ("r", "lora_alpha"):
            _number(config.get(name), where + name)
    return configs
