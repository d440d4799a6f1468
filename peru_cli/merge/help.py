"""`peru merge --help`: without a method, the options that many methods have; `peru merge --method ties --help` shows that method's."""

from __future__ import annotations

from collections import Counter
from copy import copy
from typing import Any

from peru_cli.errors import UsageError
from peru_cli.methods.compact.routed import ROUTED  # methods of `peru shuffle-pack` that people look for here
from peru_cli.methods.table import FLAGS, METHODS, Method, find_method, shown
from peru_cli.options import Command

_TYPED = "peru.typed"
_ALWAYS, _OF_DATA = ("help", "models", "base", "output"), ("data", "stats")
_COMMON = 10  # an option is shown without a method if this many methods have it


class HelpByMethod(Command):
    """A command with an option for every flag of every method. Its help shows those that matter."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep what was typed: --help runs before other options are read. UsageError for methods that are another command's."""
        ctx.meta[_TYPED] = list(args)
        if _value(args, "--method", "-m") in ROUTED:
            raise UsageError(
                f"--method {_value(args, '--method', '-m')} keeps the tasks apart and routes inputs among them: that is no merge",
                "write `peru shuffle-pack` in place of `peru merge`, with the same options and -o OUT.safetensors",
            )
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Raises UsageError for an unknown method."""
        name = _value(ctx.meta.get(_TYPED, []), "--method", "-m")
        method = find_method(name) if name is not None else None
        view = copy(self)
        view.params = [found for parameter in self.params if (found := _seen(parameter, method)) is not None]
        if method is not None:
            view.help = f"{method.name}: {method.title}.\n\n{method.paper}"
            view.epilog = "All other options: peru merge --help"
        else:
            view.epilog = "The other options of a method, and its defaults: peru merge --method ties --help"
        super(HelpByMethod, view).format_help(ctx, formatter)


def _value(arguments: list[str], *names: str) -> str | None:
    for i, argument in enumerate(arguments):
        for name in names:
            if argument == name and i + 1 < len(arguments):
                return arguments[i + 1]
            if name.startswith("--") and argument.startswith(f"{name}="):
                return argument.partition("=")[2]
    return None


def _seen(parameter: Any, method: Method | None) -> Any:
    """The option as the help shows it, or None."""
    name = str(parameter.name).replace("_", "-")
    if name not in FLAGS and name != "weight":
        of_data = method is not None and method.statistics is not None
        return parameter if method is None or name in (*_ALWAYS, *(_OF_DATA if of_data else ())) else None
    having = Counter(option for one in METHODS.values() for option in one.options)
    if (name not in method.options) if method is not None else having[name] < _COMMON:
        return None
    changed = copy(parameter)
    if name in FLAGS:
        changed.help = FLAGS[name].help
        if method is None:
            changed.help += " The default depends on the method."
        elif (default := shown(method.options[name].default)) != "none":
            changed.help += f" Default: {default}."
    return changed
