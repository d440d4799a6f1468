"""Show how a recipe was understood: models, method, effective parameters, groups of tensors, bytes to read, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from peru_cli.console import console, count, si_bytes
from peru_cli.merge.layers import layer_of
from peru_cli.merge.output import show
from peru_cli.merge.plan import MergePlan
from peru_cli.merge.recipe.plan import Stage
from peru_cli.merge.recipe.resolve import inputs_of
from peru_cli.methods.parameters import Parameters, Value
from peru_cli.methods.rules import Rule
from peru_cli.shown import listed

_PROCESS = 150_000_000  # bytes for the interpreter and its libraries
_SAMPLE = 16 << 20  # keys for each task during the threshold search


def spread(values: Sequence[Value]) -> Value:
    """One value, or the range of all tensors' values as text."""
    distinct = list(dict.fromkeys(values))
    if len(distinct) == 1:
        return distinct[0]
    numbers = [value for value in distinct if not isinstance(value, (str, bool))]
    if len(numbers) < len(distinct):
        return " or ".join(show(value) for value in distinct)
    return f"{_short(min(numbers))} to {_short(max(numbers))}, by tensor"


def _short(value: Value) -> str:
    assert not isinstance(value, str)
    return f"{100 * float(value):g}%" if isinstance(value, Fraction) else f"{float(value):g}"


def effective(stage: Stage) -> tuple[dict[str, Value], tuple[Value, ...] | None]:
    """Effective options over all tensors, and each task's weight."""
    options: dict[str, Value] = {}
    for name in stage.parameters[0].values:
        own = [each.own[name] for each in stage.parameters if name in each.own]
        if not own:
            options[name] = spread([each.values[name] for each in stage.parameters])
            continue
        by_task: dict[str, list[Value]] = {}
        for each in stage.parameters:
            for task, value in zip(each.tasks, each.own[name], strict=True):
                by_task.setdefault(task, []).append(value)
        spreads = {task: spread(values) for task, values in by_task.items()}
        if len(set(spreads.values())) == 1:
            options[name] = next(iter(spreads.values()))
        else:
            options |= {f"{name} {task}": value for task, value in spreads.items()}
    if "weight" not in stage.method.options:
        return options, None
    weights: dict[str, list[Value]] = {}
    for each in stage.parameters:
        for task, weight in zip(each.tasks, each.weights, strict=True):
            weights.setdefault(task, []).append(weight)
    return options, tuple(spread(weights[name]) for name, _ in stage.layout.tasks)


@dataclass(frozen=True)
class Group:
    """Tensors with the same parameters."""

    names: tuple[str, ...]  # names that differ only in the layer are joined
    tensors: int
    entries: int
    parameters: Parameters


def _folded(names: Sequence[str]) -> tuple[str, ...]:
    """Join names that differ only in the layer: `layers.0..3.mlp`, with # if some layers are missing."""
    layers: dict[str, list[int]] = {}
    for name in names:
        layer = layer_of(name)
        layers.setdefault(name if layer is None else f"{layer[0]}.#{name[len(layer[0]) + 1 + len(str(layer[1])) :]}", []).append(
            -1 if layer is None else layer[1]
        )
    shown = []
    for name, numbers in layers.items():
        first, last = min(numbers), max(numbers)
        span = str(first) if first == last else f"{first}..{last}" if last - first + 1 == len(numbers) else "#"
        shown.append(name.replace("#", span, 1))
    return tuple(shown)


def groups(stage: Stage) -> list[Group]:
    """The groups of tensors by their parameters, in order of their first tensor."""
    found: dict[object, list[int]] = {}
    for number, each in enumerate(stage.parameters):
        found.setdefault((each.tasks, each.weights, tuple(each.values.items()), tuple(each.own.items())), []).append(number)
    result = []
    for numbers in found.values():
        slots = [stage.plan.slots[number] for number in numbers]
        folded = _folded([slot.info.name for slot in slots])
        result.append(Group(folded, len(slots), sum(slot.info.entries for slot in slots), stage.parameters[numbers[0]]))
    return result


def bytes_to_read(plan: MergePlan, rule: Rule) -> int:
    """Bytes read by all passes over the inputs: one pass, and one more each for thresholds, inner products and studies."""
    once = sum(info.nbytes for slot in plan.slots for info in slot.inputs)
    once += sum(slot.base.nbytes for slot in plan.slots) if rule.on_vectors else 0
    return once * (1 + len(rule.trims) + rule.wants_products + rule.wants_signs + rule.studies) + sum(info.nbytes for info in plan.copied)


def peak_memory(plan: MergePlan, rule: Rule, threads: int, tile_entries: int) -> int:
    """Estimated peak memory of the merge, in bytes."""
    tasks = max(len(slot.inputs) for slot in plan.slots)
    arrays = 2 * (tasks + 1) + 6  # bits and floats of every input, and the results
    longest = min(tile_entries, max(slot.info.entries for slot in plan.slots))
    held = threads * longest * 4 * arrays + (_SAMPLE * len(plan.vectors) if rule.trims else 0)
    return _PROCESS + held


def say(stage: Stage, label: str) -> None:
    """Print notes before a merge: models, and effective options."""
    recipe = stage.recipe
    title = f"document {recipe.name}" if recipe.name is not None else label
    base = f", base {stage.layout.base.label}" if stage.layout.base is not None and stage.plan.base is not None else ""
    console.note(f"{title}: {recipe.method.name} of {listed(name for name, _ in stage.layout.tasks)}{base}")
    for model in stage.opened.values():
        for warning in model.warnings:
            console.warn(warning)
        console.note(f"  {model.label}: {model.kind}, {len(model.tensors):,} tensors, {si_bytes(model.nbytes)}")
    for line in stage.said:
        console.note(f"  {line}")
    console.note("  in force: " + ", ".join(_in_force(stage)))
    for word in recipe.ignored:
        console.note(f"  {word} is accepted without effect, as in mergekit")
    if recipe.dtype is not None and recipe.dtype.name != "F32":
        console.note("  dtype is the output dtype: peru computes in float32 and rounds once, where mergekit computes in dtype")
    if stage.layout.config.get("num_hidden_layers"):
        console.note(f"  config.json: num_hidden_layers {stage.layout.config['num_hidden_layers']}")


def _in_force(stage: Stage) -> Iterator[str]:
    """mergekit's parameters; defaults are marked."""
    given = _given(stage)
    options, weights = effective(stage)
    if weights is not None:
        for (task, _), weight in zip(stage.layout.tasks, weights, strict=True):
            yield f"weight {task} {_word(weight)}"
    named = dict(stage.method.mergekit.own) | dict(stage.method.mergekit.whole) if stage.method.mergekit is not None else {}
    for name, parameter in stage.recipe.method.parameters.items():
        if name in ("weight", "rescale_norm"):
            continue
        shown = [f"{option[len(ours):]} {_word(value)}".strip() for ours, theirs in named.items() if theirs == name
                 for option, value in options.items() if option == ours or option.startswith(f"{ours} ")]  # fmt: skip
        if name == "normalize" and "reduce" in options:
            shown = [_word(options["reduce"] == "mean")]
        if name not in given:
            yield f"{name} {_word(parameter.default) if parameter.default is not None else ''} (default)"
        else:
            yield f"{name} {'; '.join(shown) if shown else 'as given'}"


def _word(value: Value | None) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else show(value) if value is not None else ""


def _given(stage: Stage) -> set[str]:
    recipe = stage.recipe
    found = set(recipe.settings)
    for module in recipe.modules:
        found |= set(module.settings)
        for part in module.slices:
            found |= set(part.settings)
            for source in inputs_of(recipe, module, part).merged:
                found |= set(source.settings)
    return found


def print_plan(stage: Stage, threads: int, tile_entries: int) -> dict[str, object]:
    """Print the tables of `--dry-run`, and return what `--json` prints instead."""
    listed = groups(stage)
    rows = []
    for group in listed:
        values = group.parameters
        weights = ", ".join(f"{task} {_short(weight)}" for task, weight in zip(values.tasks, values.weights, strict=True))
        own = {name: ", ".join(f"{t} {_short(v)}" for t, v in zip(values.tasks, found, strict=True)) for name, found in values.own.items()}
        rest = ", ".join(f"{name} {own.get(name) or _word(value)}" for name, value in values.values.items())
        names = ", ".join(group.names[:2]) + (f" and {len(group.names) - 2} more" if len(group.names) > 2 else "")
        rows.append([names, str(group.tensors), count(group.entries), weights if "weight" in stage.method.options else "", rest])
    console.table(["tensors", ">number", ">entries", "weights", "options"], rows)
    read, memory = bytes_to_read(stage.plan, stage.rule), peak_memory(stage.plan, stage.rule, threads, tile_entries)
    written = sum(info.nbytes for info in stage.plan.outputs)
    console.line(f"reads {si_bytes(read)}, writes {si_bytes(written)}, holds about {si_bytes(memory)} at once")
    options, shown = effective(stage)
    return {
        "document": stage.recipe.name,
        "method": stage.method.name,
        "mergekit_method": stage.recipe.method.name,
        "tasks": [name for name, _ in stage.layout.tasks],
        "options": {name: _word(value) for name, value in options.items()},
        "weights": [_word(weight) for weight in shown] if shown is not None else None,
        "groups": [_as_json(group) for group in listed],
        "bytes_read": read,
        "bytes": written,
        "peak_memory": memory,
    }


def _as_json(group: Group) -> Mapping[str, object]:
    own = {name: [_word(value) for value in found] for name, found in group.parameters.own.items()}
    return {
        "tensors": group.tensors, "entries": group.entries, "names": list(group.names), "tasks": list(group.parameters.tasks),
        "weights": list(group.parameters.weights), "options": {n: _word(v) for n, v in group.parameters.values.items()}, "own": own,
    }  # fmt: skip
