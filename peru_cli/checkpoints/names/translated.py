"""Match names and forms of tensors that changed between versions of transformers, by its own conversion tables.

Used only if too much has no partner, and only as the tables say. Both models are built without weights from their config.json, and
every stored name becomes the one that transformers loads it under. Two stored names of the same tensor count as one. Nothing is
guessed from shapes. Tensors that transformers fuses, splits or transposes on the way are put together by its own operations
(layout.py), in the form that the base stores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peru_cli.checkpoints.architectures import is_tied
from peru_cli.checkpoints.checks.unpaired import REFUSED, unpaired
from peru_cli.checkpoints.names.built import CannotBuild, build
from peru_cli.checkpoints.names.converted import Converted
from peru_cli.checkpoints.names.layout import Layout, Piece, Unknown, inverse
from peru_cli.checkpoints.names.renamed import Renamed, is_full, parse_renames, rename
from peru_cli.checkpoints.pairing import pair_up
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch

# The shared table of an encoder and a decoder, under its stored names.
_SHARED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_ENCODER_DECODERS = frozenset(
    {"t5", "mt5", "umt5", "longt5", "pix2struct", "switch_transformers", "bart", "mbart", "pegasus", "plbart", "led", "m2m_100", "marian"}
)


@dataclass
class _Loaded:
    """A checkpoint as transformers loads it: loaded names by stored names, and of the tensors that change more than their names,
    the layouts by loaded name and the problems by stored name."""

    names: dict[str, str]
    layouts: dict[str, Layout] = field(default_factory=dict)
    changed: dict[str, str | None] = field(default_factory=dict)  # stored names, and why their layout is unknown

    def stored(self) -> dict[str, list[str]]:
        """Stored names by loaded name, of the tensors of which only the name changes."""
        found: dict[str, list[str]] = {}
        for name, loaded in self.names.items():
            if name not in self.changed:
                found.setdefault(loaded, []).append(name)
        return found


def bring_together(models: Sequence[Checkpoint], base: Checkpoint | None, rules: Sequence[str] = ()) -> tuple[list[Checkpoint], list[str]]:
    """The models under the base's names: first by `--rename`'s rules, then by transformers' tables. Also messages about it.
    Without a base, the first model's names.

    Raises UsageError for a rule that is invalid or changes nothing, Mismatch for tensors that the tables cannot bring together."""
    renamed, said = rename(models, rules) if rules else (list(models), [])
    translated, more = translate(renamed, base if base is not None else renamed[0])
    return translated, said + more


def translate(models: Sequence[Checkpoint], base: Checkpoint) -> tuple[list[Checkpoint], list[str]]:
    """The models under the base's names, where transformers' tables say how these changed, and messages about it.

    Raises Mismatch for tensors that transformers changes in a way that is not an arrangement of entries, if one model stores them in
    one form and the other in the other."""
    result: list[Checkpoint] = []
    said = []
    for model in models:
        if is_full(model):
            table = _shared_table(model, base)
            model, lines = _renamed(model, table) if table else (model, [])
            said += lines
            table, layouts = _loaded_table(model, base)
            if layouts:
                model = Converted(model, layouts)
                said.append(f"{model.label}: {len(layouts)} tensors put together as transformers does it, such as {next(iter(layouts))}")
            model, lines = _renamed(model, table) if table else (model, [])
            said += lines
        result.append(model)
    return result, said


def _renamed(model: Checkpoint, table: Mapping[str, str]) -> tuple[Checkpoint, list[str]]:
    old, new = next(iter(table.items()))
    more = f"{len(table)} tensors renamed by transformers' tables, such as " if len(table) > 1 else ""
    return Renamed(model, parse_renames(_rules(table, list(model.tensors)))), [f"{model.label}: {more}{old} to {new}"]


def _loaded_table(model: Checkpoint, base: Checkpoint) -> tuple[dict[str, str], dict[str, Layout]]:
    """Old names to new ones for tensors that transformers loads under one of the base's names, and layouts of the base's tensors
    that it makes of several or of other ones. Both empty if enough has a partner."""
    if model.tensors.keys() == base.tensors.keys() and all(info.shape == base.tensors[name].shape for name, info in model.tensors.items()):
        return {}, {}
    sizes = [sum(info.nbytes for info in side) for side in unpaired(model, pair_up(model, base), None)]
    if max(size / max(side.nbytes, 1) for size, side in zip(sizes, (model, base), strict=True)) <= REFUSED:
        return {}, {}
    ours, theirs = _loaded(model), _loaded(base)
    if ours is None or theirs is None:
        return {}, {}
    table: dict[str, str] = {}
    layouts: dict[str, Layout] = {}
    problems: dict[str, str] = {}
    our_stored, their_stored = ours.stored(), theirs.stored()
    for name, loaded in theirs.names.items():
        if name in model.tensors:
            continue
        found = our_stored.get(loaded, [])
        if name not in theirs.changed and found:
            if len(found) == len(their_stored[loaded]) == 1 and found[0] not in base.tensors:
                table[found[0]] = name
        elif name in theirs.changed or loaded in ours.layouts or any(ours.names[n] == loaded for n in ours.changed):
            try:
                made = _put_together(name, base, ours, theirs, our_stored)
            except Unknown as error:
                problems[name] = str(error)
                continue
            if isinstance(made, str):
                table[made] = name
            elif made is not None and made.shape == base.tensors[name].shape and _one_kind(made, model):
                layouts[name] = made
            elif made is not None:
                problems[name] = f"the shapes {list(made.shape)} and {list(base.tensors[name].shape)}, or different dtypes"
    if problems:
        name, why = next(iter(problems.items()))
        raise Mismatch(
            f"{model.label} and {base.label} store {len(problems)} tensors in different forms, such as the base's {name}:"
            f" transformers' conversion table cannot be followed here ({why})",
            "load both with transformers and save them again: from_pretrained(MODEL).save_pretrained(FOLDER);"
            " --rename changes names, but neither splits nor joins tensors",
        )
    return table, layouts


def _put_together(name: str, base: Checkpoint, ours: _Loaded, theirs: _Loaded, our_stored: Mapping[str, list[str]]) -> Layout | str | None:
    """What our tensors make of the base's tensor `name`: a layout, or one tensor's name. None if we have nothing of it.

    Raises Unknown if an operation is no arrangement of entries, or parts are missing."""
    if name not in theirs.changed:  # stored as it is loaded
        problem = next((why for own, why in ours.changed.items() if why is not None and ours.names[own] == theirs.names[name]), None)
        if problem is not None:
            raise Unknown(problem)
        return ours.layouts.get(theirs.names[name])
    if (why := theirs.changed[name]) is not None:
        if theirs.names[name] not in our_stored:
            return None
        raise Unknown(why)
    shape, missing = base.tensors[name].shape, False
    pieces: list[Piece] = []
    for loaded, layout in theirs.layouts.items():
        if all(piece.source != name for piece in layout.pieces):
            continue
        if loaded in ours.layouts:
            pairs = list(zip(layout.pieces, ours.layouts[loaded].pieces, strict=False))
            if any((a.offset, a.axes) != (b.offset, b.axes) for a, b in pairs) or layout.shape != ours.layouts[loaded].shape:
                raise Unknown("both models store it in forms of their own")
            return next(b.source for a, b in pairs if a.source == name)
        found = our_stored.get(loaded, [])
        missing = missing or len(found) != 1
        pieces += inverse(layout, found[0], name, shape).pieces if len(found) == 1 else []
    if not pieces:
        return None
    whole = Layout(shape, pieces)
    if missing or not whole.complete():
        raise Unknown("parts of it are missing")
    return whole


def _one_kind(layout: Layout, model: Checkpoint) -> bool:
    """Whether all sources have one dtype of whole bytes."""
    kinds = {model.tensors[piece.source].dtype for piece in layout.pieces}
    return len(kinds) == 1 and next(iter(kinds)).bits % 8 == 0


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


def _loaded(model: Checkpoint) -> _Loaded | None:
    """A checkpoint as transformers loads it, by its tables. None if transformers does not have the model, or cannot build it: then
    pairing reports what lacks a partner."""
    try:
        built = build(model.config(), len(model.tensors))
    except CannotBuild:
        return None
    if built is None:
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table = built.state_dict()
    changes = get_model_conversion_mapping(built)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    found = _Loaded({})
    groups: dict[str, list[tuple[str, str]]] = {}  # by loaded name: stored names, and the patterns that they matched
    for name in sorted(model.tensors, key=_natural):
        loaded, pattern = rename_source_key(name, renamings, converters, built.base_model_prefix, table)
        if loaded not in table and name in table:
            loaded, pattern = name, None
        found.names[name] = loaded
        if pattern is not None and loaded in table:
            groups.setdefault(loaded, []).append((name, pattern))
    for loaded, group in groups.items():
        converter = next(change for change in converters if group[0][1] in change.source_patterns)
        layouts, problem = _convert(model, built, converter, loaded, group)
        found.layouts |= layouts
        found.changed |= {name: problem for name, _ in group}
    return found


def _convert(
    model: Checkpoint, built: Any, converter: Any, loaded: str, group: Sequence[tuple[str, str]]
) -> tuple[dict[str, Layout], str | None]:
    """The loaded tensors that a converter makes of stored ones, as layouts; or why there are none."""
    from copy import deepcopy

    converter = deepcopy(converter)
    for name, pattern in group:
        converter.add_tensor(loaded, name, pattern, Layout.of(name, model.tensors[name].shape))
    try:
        made = {
            name: value[0] if isinstance(value, list) else value for name, value in converter.convert(loaded, built, built.config).items()
        }
    except Exception as error:  # Unknown, or whatever an operation raises for tensors that it was not made for
        return {}, str(error) or type(error).__name__
    if not all(isinstance(layout, Layout) and layout.complete() for layout in made.values()):
        return {}, "tensors of unexpected shapes"
    return made, None


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
