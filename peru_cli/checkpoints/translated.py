"""Match names that changed between versions of transformers, by its own conversion tables.

Used only if too much has no partner, and only as the tables say. Both models are built without weights from their config.json, and
every stored name becomes the one that transformers loads it under. Two stored names of the same tensor count as one. Nothing is
guessed from shapes. Tensors that transformers fuses, splits or transposes on the way are refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from peru_cli.checkpoints.architectures import is_tied
from peru_cli.checkpoints.checks.unpaired import REFUSED, unpaired
from peru_cli.checkpoints.pairing import pair_up
from peru_cli.checkpoints.renamed import Renamed, is_full, parse_renames
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch

# The shared table of an encoder and a decoder, under its stored names.
_SHARED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_ENCODER_DECODERS = frozenset(
    {"t5", "mt5", "umt5", "longt5", "pix2struct", "switch_transformers", "bart", "mbart", "pegasus", "plbart", "led", "m2m_100", "marian"}
)
_Names = dict[str, tuple[str, bool]]  # by stored name: the loaded name, and whether more than the name changes


def translate(models: Sequence[Checkpoint], base: Checkpoint) -> tuple[list[Checkpoint], list[str]]:
    """The models under the base's names, where transformers' tables say how these changed, and messages about it.

    Raises Mismatch for tensors that transformers fuses or splits, if one model stores them in one form and the other in the other."""
    result: list[Checkpoint] = []
    said = []
    for model in models:
        for find in (_shared_table, _loaded_table) if is_full(model) else ():
            table = find(model, base)
            if table:
                model = Renamed(model, parse_renames(_rules(table, list(model.tensors))))
                old, new = next(iter(table.items()))
                more = f"{len(table)} tensors renamed by transformers' tables, such as " if len(table) > 1 else ""
                said.append(f"{model.label}: {more}{old} to {new}")
        result.append(model)
    return result, said


def _loaded_table(model: Checkpoint, base: Checkpoint) -> dict[str, str]:
    """Old names to new ones, for tensors that transformers loads under one of the base's names. Empty if enough has a partner."""
    sizes = [sum(info.nbytes for info in side) for side in unpaired(model, pair_up(model, base), None)]
    if max(size / max(side.nbytes, 1) for size, side in zip(sizes, (model, base), strict=True)) <= REFUSED:
        return {}
    ours, theirs = _loaded_names(model), _loaded_names(base)
    stored: dict[str, list[str]] = {}
    for name, (loaded, _) in (theirs or {}).items():
        stored.setdefault(loaded, []).append(name)
    table, converted = {}, {}
    for name, (loaded, changed) in (ours or {}).items():
        found = stored.get(loaded, [])
        if name in base.tensors or not found or found[0] in model.tensors:
            continue
        if changed or len(found) > 1 or (theirs or {})[found[0]][1]:
            converted[name] = found[0]
        else:
            table[name] = found[0]
    if converted:
        name, other = next(iter(converted.items()))
        raise Mismatch(
            f"{model.label} and {base.label} store {len(converted)} tensors in different forms, such as {name} and {other}:"
            " transformers fuses, splits or transposes them when it loads the one",
            "load both with transformers and save them again: from_pretrained(MODEL).save_pretrained(FOLDER)",
        )
    return table


def _shared_table(model: Checkpoint, base: Checkpoint) -> dict[str, str]:
    """The shared embedding of an encoder and a decoder, if each model stores it once, under different names."""
    found = []
    for checkpoint in (model, base):
        config = checkpoint.config()
        names = [*_SHARED, *(f"model.{name}" for name in _SHARED), *(["lm_head.weight"] if is_tied(config) else [])]
        if config.get("model_type") not in _ENCODER_DECODERS:
            return {}
        found.append([name for name in names if name in checkpoint.tensors])
    ours, theirs = found
    if len(ours) != 1 or len(theirs) != 1 or ours == theirs or model.tensors[ours[0]].shape[1:] != base.tensors[theirs[0]].shape[1:]:
        return {}
    return {ours[0]: theirs[0]}


def _loaded_names(model: Checkpoint) -> _Names | None:
    """A checkpoint's names according to transformers' tables. None if transformers does not have the model."""
    config = model.config()
    architectures, kind = config.get("architectures"), config.get("model_type")
    if not isinstance(architectures, list) or not architectures or not isinstance(kind, str) or config.get("auto_map"):
        return None
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    cls: Any = getattr(transformers, str(architectures[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)) or kind not in transformers.CONFIG_MAPPING:
        return None  # a stranger's config may name anything that transformers has
    try:
        with torch.device("meta"):
            built = cls(transformers.CONFIG_MAPPING[kind].from_dict(dict(config)))
    except Exception:  # whatever a model's own code raises for an unusual config; then pairing reports what lacks a partner
        return None
    table = built.state_dict()
    changes = get_model_conversion_mapping(built)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    names = {}
    for name in sorted(model.tensors, key=_natural):
        loaded, converter = rename_source_key(name, renamings, converters, built.base_model_prefix, table)
        if loaded not in table and name in table:
            loaded, converter = name, None
        names[name] = loaded, converter is not None
    return names


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _rules(table: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """`--rename` rules that do what a table says and leave all other names unchanged. They match beginnings of names if that is enough."""
    short: dict[str, None] = {}
    for old, new in table.items():
        a, b = old.split("."), new.split(".")
        same = 0
        while same < min(len(a), len(b)) - 1 and a[-same - 1] == b[-same - 1]:
            same += 1
        kept = a[len(a) - same : len(a) - same + 1]  # the first common part, so that no other name begins like it
        before, after = ([*parts[: len(parts) - same], *kept] for parts in (a, b))
        dot = "." if len(before) < len(a) else ""
        short[f"^{re.escape('.'.join(before) + dot)}{'' if dot else '$'}={'.'.join(after)}{dot}"] = None
    rules = list(short)
    parsed = parse_renames(rules)

    def renamed(name: str) -> str:
        for pattern, replacement in parsed:
            name = pattern.sub(replacement, name)
        return name

    if all(renamed(name) == table.get(name, name) for name in names):
        return rules
    return [f"^{re.escape(old)}$={new}" for old, new in table.items()]
