"""`peru merge --lora` from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from peru_cli import options
from peru_cli.checkpoints.local.atomic import check_target
from peru_cli.checkpoints.resolve import default_task, split_arguments
from peru_cli.errors import UsageError
from peru_cli.merge import output as out
from peru_cli.merge.adapters.run import Asked, merge_adapters
from peru_cli.merge.given import Given, first_parameters, shown
from peru_cli.merge.options import check_follows
from peru_cli.methods.lora.table import SPACES
from peru_cli.methods.parameters import Parameters, Value
from peru_cli.methods.table import Method


def merge_loras(
    models: list[str],
    space: str,
    method: Method,
    typed: tuple[Given, dict[str, Value]],
    given: Mapping[str, str | None],
    run: options.Running,
    **others: object,
) -> dict[str, object]:
    """Merge adapters as the command line says. `given` has --base, --dtype, --then and --output, `others` what does not go with --lora.

    Raises UsageError for impossible options."""
    if space not in SPACES:
        close = get_close_matches(space, SPACES, 1)
        raise UsageError(f"--lora {space!r} is unknown", f"did you mean {close[0]}?" if close else f"there are {' and '.join(SPACES)}")
    both = [f"--{name}" for name, value in others.items() if value]
    if method.statistics is not None:
        both.append(f"--method {method.name}, which runs models on data,")
    if both:
        raise UsageError(f"{', '.join(both)} cannot be combined with --lora, which merges factors only", "leave one of the two out")
    if given["dtype"] == "fp8":
        raise UsageError("--dtype fp8: no program loads such an adapter", "use bf16 or fp32")
    dtype = options.parse_dtype(given["dtype"]) if given["dtype"] is not None else None
    if dtype is not None and dtype.bits > 32:
        raise UsageError("--dtype fp64: no program loads such an adapter", "use fp32")
    varied, values = typed
    arguments = split_arguments(models)
    names = tuple(argument.task or default_task(argument.model) for argument in arguments)
    least, most = method.tasks
    if len(names) < max(least, 2) or (most is not None and len(names) > most):
        raise UsageError(f"{method.name} with --lora takes {max(least, 2)} adapters{'' if most == 2 else ' or more'}, not {len(names)}")
    varied.check_tasks(names)
    parameters = first_parameters(varied, Parameters(names, (1.0,) * len(names), values, has_base=True))
    if given["then"] is not None:
        check_follows(given["then"], method.build(parameters), method.name)
    target = Path(given["output"] or "")
    check_target(target, run.force or run.dry_run)
    typed_values, weights, own = shown(varied, values, parameters.weights, names)
    words = typed_values | {"lora": space} | ({"then": given["then"]} if given["then"] is not None else {})
    extra = ("--dtype", given["dtype"]) if given["dtype"] is not None else ()
    recipe = out.Recipe(method.name, method.paper, names, weights if "weight" in method.options else None, words, None, extra, own=own)
    asked = Asked(
        [(name, argument.model) for name, argument in zip(names, arguments, strict=True)], space, method, parameters, varied,
        given["then"], given["base"], dtype, target, run,
    )  # fmt: skip
    return merge_adapters(asked, recipe)
