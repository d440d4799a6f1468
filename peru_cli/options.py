"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from fractions import Fraction
from functools import cache, partial, wraps
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.checkpoints.hub.session import hub_session
from peru_cli.console import console
from peru_cli.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?)B?")
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp64": "F64"}
_UNITS = {
    "": 1,
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def parse_size(text: str, option: str) -> int:
    """Parse `5GB`, `500MB`, `64MiB` or plain bytes as a number of bytes; MB is 10^6, MiB 2^20."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match.group(2) not in _UNITS or match.group(2) == "i":
        raise UsageError(f"{option} {text!r} is not a size", "write it as 500MB, 5GB or 64MiB")
    size = int(Fraction(match.group(1)) * _UNITS[match.group(2)])
    if size < 1:
        raise UsageError(f"{option} {text!r} is zero bytes")
    return size


def parse_density(text: str, option: str = "--keep") -> Fraction:
    """Parse `10%` or `0.1` as an exact fraction in (0, 1]. UsageError otherwise, with what was probably meant."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text.strip())
    if match is None:
        raise UsageError(f"{option} {text!r} is not a density", f"write a share of the entries: {option} 10% or {option} 0.1")
    density = Fraction(match.group(1)) / (100 if match.group(2) else 1)
    if density == 0:
        raise UsageError(f"{option} {text} keeps nothing", f"write a share above 0: {option} 1%")
    if density > 1:
        hint = f"at most {option} 100%" if match.group(2) else f"did you mean {option} {match.group(1)}%?"
        raise UsageError(f"{option} {text} is more than 100%", hint)
    return density


def parse_dtype(text: str) -> Dtype:
    """Parse `bf16`, `fp16`, `fp32` or `fp64`. UsageError otherwise."""
    if text not in DTYPES:
        raise UsageError(f"--dtype {text!r} is not one of {', '.join(DTYPES)}")
    return BY_NAME[DTYPES[text]]


def dtype_word(dtype: Dtype) -> str:
    """The inverse of `parse_dtype`."""
    return next(word for word, name in DTYPES.items() if name == dtype.name)


def check_base_id(text: str | None) -> None:
    """UsageError for a base name that cannot be printed."""
    if text is not None and not text.isprintable():
        raise UsageError(f"--base-id {text!r} holds characters that cannot be printed", "write it as org/name@commit")


@contextmanager
def from_stdin(artifact: str) -> Iterator[str]:
    """The file that an argument names; for `-`, a temporary one that holds what comes from stdin. UsageError on a terminal."""
    if artifact != "-":
        yield artifact
        return
    if sys.stdin.isatty():
        raise UsageError("- reads an artifact from stdin, and stdin is a terminal", "pipe an artifact into it, or name a file")
    with tempfile.TemporaryDirectory(prefix="peru-") as folder:
        path = Path(folder) / "stdin.safetensors"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        if not path.stat().st_size:
            raise UsageError("nothing came from stdin, where - expects an artifact", "see why the command before the pipe wrote nothing")
        yield str(path)


@contextmanager
def to_stdout(output: str) -> Iterator[str]:
    """The file to write for -o; for `-`, a temporary one that goes to stdout when it is finished. UsageError on a terminal."""
    if output != "-":
        yield output
        return
    if sys.stdout.isatty():
        raise UsageError("-o - writes an artifact to stdout, and stdout is a terminal", "redirect it to a pipe or a file")
    console.data_on_stderr = True
    with tempfile.TemporaryDirectory(prefix="peru-") as folder:
        path = Path(folder) / "stdout.safetensors"
        yield str(path)
        if path.exists():  # not after --dry-run
            with path.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()


def written_to(path: Path) -> str:
    """An output's path for reports: `-` if it goes to stdout."""
    return "-" if console.data_on_stderr else str(path)


def _quiet(value: bool) -> bool:
    console.quiet = console.quiet or value
    return value


def _json(value: bool) -> bool:
    console.json = console.json or value
    return value


def _summary(value: Optional[Path]) -> Optional[Path]:
    console.summary = value if value is not None else console.summary
    return value


Base = Annotated[str, typer.Option("--base", "-b", metavar="BASE", help="The checkpoint that deltas are taken against.")]
OptionalBase = Annotated[Optional[str], typer.Option("--base", "-b", metavar="BASE", help="The checkpoint that deltas are taken against.")]
Rename = Annotated[
    Optional[list[str]],
    typer.Option("--rename", metavar="REGEX=NEW", help="Rename tensors of the fine-tunes to match the base. Repeatable."),
]
_PANEL = "Running"
Json = Annotated[bool, typer.Option("--json", callback=_json, rich_help_panel=_PANEL, help="Print one JSON value instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_quiet, rich_help_panel=_PANEL, help="No notes and no progress bar.")]
Summary = Annotated[
    Optional[Path],
    typer.Option("--summary", metavar="FILE.md", callback=_summary, help="Append the tables to FILE.md as Markdown, for CI."),
]
Stream = Annotated[bool, typer.Option("--stream", help="Read Hub models in byte ranges instead of downloading them.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code beside a model that its config.json names. Default: never."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda[:N]", help="Where to compute.")]
Threads = Annotated[Optional[int], typer.Option("--threads", min=1, metavar="N", help="CPU threads. Default: all available.")]
NoSync = Annotated[bool, typer.Option("--no-sync", help="Do not wait until the output is on the disk. Faster, for scratch files.")]
Push = Annotated[Optional[str], typer.Option("--push", metavar="ORG/NAME", help="Publish the output on the Hub, in one commit.")]
Private = Annotated[bool, typer.Option("--private", help="Make the repo private.")]
PushRevision = Annotated[
    Optional[str], typer.Option("--revision", metavar="BRANCH", help="Branch to publish on; created if it is missing. Default: main.")
]
CommitMessage = Annotated[Optional[str], typer.Option("--commit-message", metavar="TEXT", help="The commit message.")]
ForcePush = Annotated[bool, typer.Option("--force", "-f", help="Replace what the repo holds.")]
Executor = Annotated[str, typer.Option("--executor", metavar="local|ray", help="Where to compute: on this machine, or on a Ray cluster.")]
RayAddress = Annotated[
    Optional[str],
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="With --executor ray: HOST:PORT of the cluster, or local to start one here. Default: auto, the one of this machine.",
    ),
]
TileEntries = Annotated[
    Optional[int],
    typer.Option("--tile-entries", metavar="N", help="Entries per tile, a multiple of 16384. Results do not depend on it."),
]


@dataclass(frozen=True)
class Publishing:
    """Where to publish the output."""

    push: Push = None
    private: Private = False
    revision: PushRevision = None
    commit_message: CommitMessage = None


@dataclass(frozen=True)
class Cluster:
    """Where tiles are computed."""

    executor: Executor = "local"
    ray_address: RayAddress = None

    def address(self, device: str) -> str | None:
        """The address of a Ray cluster; None for this machine. UsageError for options that do not go together."""
        if self.executor not in ("local", "ray"):
            raise UsageError(f"--executor {self.executor!r} is neither local nor ray")
        if self.executor == "ray":
            if device.startswith("cuda"):
                raise UsageError("--executor ray computes on processors, not on GPUs", "leave --device out")
            return self.ray_address or "auto"
        if self.ray_address is not None:
            raise UsageError("--ray-address goes with --executor ray", "add --executor ray, or leave it out")
        return None


@dataclass(frozen=True)
class Running:
    """How to run. Nothing here changes a result."""

    force: Force = False
    dry_run: DryRun = False
    no_sync: NoSync = False
    stream: Stream = False
    device: Device = "auto"
    threads: Threads = None
    tile_entries: TileEntries = None
    json: Json = False
    summary: Summary = None
    quiet: Quiet = False

    def __post_init__(self) -> None:
        if self.tile_entries is not None and self.tile_entries < 1:  # commands take 0 for what was not given
            raise UsageError(f"--tile-entries {self.tile_entries} is not a multiple of 16384", "leave it out: results do not depend on it")

    @property
    def sync(self) -> bool:
        """Whether to wait for the disk."""
        return not self.no_sync


Function = Callable[..., None]


def shared(
    lacks: Collection[str] = (), panels: Mapping[str, str] | None = None, pipes: bool = False, **other: Any
) -> Callable[[Function], Function]:
    """Give a command the shared options after its own. It gets them as `run: Running` and, if it has that parameter,
    `publishing: Publishing`. Any other parameter that is a dataclass of options becomes a group of its own, too.

    Each command runs in its own Hub session. `lacks` names shared options to omit, `other` redeclares some. `panels` groups
    the command's own options in its help: it maps a title to the parameters' names, separated by spaces. With `pipes`, `-o -`
    writes the command's one output file to stdout (`to_stdout`)."""
    of_panel = {name: title for title, names in (panels or {}).items() for name in names.split()}

    def decorate(command: Function) -> Function:
        signature = inspect.signature(command, eval_str=True)
        own = dict(signature.parameters)
        rest = [own.pop(name) for name, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
        groups = {name: own.pop(name).annotation for name, parameter in list(own.items()) if is_dataclass(parameter.annotation)}
        names = {group: [field.name for field in fields(kind) if field.name not in lacks] for group, kind in groups.items()}
        added = [_parameter(kind, name, other) for group, kind in groups.items() for name in names[group]]

        @wraps(command)
        def with_groups(**given: Any) -> None:
            values = {group: kind(**{name: given.pop(name) for name in names[group]}) for group, kind in groups.items()}
            with hub_session(values["run"].stream), to_stdout(given["output"]) if pipes else nullcontext() as file:
                command(**given, **values) if file is None else command(**given | {"output": file}, **values)
            if values["run"].dry_run and given.get("write_recipe") is None:
                console.note("--dry-run: nothing was written")

        del with_groups.__wrapped__  # its annotations differ
        for name, title in of_panel.items():
            own[name] = in_panel(own[name], title)
        named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.values()]
        parameters = [*named, *added, *rest]
        with_groups.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_groups.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_groups

    return decorate


class Command(TyperCommand):
    """A command whose --help is listed with the options of how to run."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters and the option that prints the help."""
        return without_types(converted_quickly(super().get_params(ctx)))

    def get_help_option(self, ctx: Any) -> Any:
        """The option that prints the help."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = _PANEL
        return option


class Group(TyperGroup):
    """The command line, whose own options are read as those of its commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters and the option that prints the help."""
        return without_types(converted_quickly(super().get_params(ctx)))


def converted_quickly(parameters: list[Any]) -> list[Any]:
    """Parameters whose values go through pydantic only if they must be converted: loading it takes longer than a small model."""
    for parameter in parameters:
        vars(parameter).setdefault("get_runtime_param", partial(_Conversion, parameter.get_runtime_param))
    return parameters


def without_types(parameters: list[Any]) -> list[Any]:
    """Parameters whose help shows no type where none is typed: `--json <bool>` reads as if it took a value."""
    for parameter in parameters:
        if parameter.param_type_name == "argument" or parameter.is_flag:
            vars(parameter).setdefault("display_type_rich", lambda ctx: None)
    return parameters


class _Conversion(NamedTuple):
    """How a parameter's value becomes one of its type; `of_typer` does the same for all values."""

    of_typer: Callable[[], Any]

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value in its type. Strings that are to be strings, defaults, and what was not given stay as they are."""
        kind, many = param.type_descriptor.annotation, param.multiple or param.nargs != 1
        if value is None:
            return () if many else None
        if not many and (value is param.default or (kind is str and isinstance(value, str))):
            return value
        if kind == list[str] and isinstance(value, list | tuple):
            return list(value)
        return self.of_typer().coerce(value, param=param, ctx=ctx)


def in_panel(parameter: inspect.Parameter, title: str) -> inspect.Parameter:
    """The option in a group of the help. Commands that share it can have it in other groups."""
    kind, declared, *_ = get_args(parameter.annotation)
    moved = copy(declared)
    moved.rich_help_panel = title
    return parameter.replace(annotation=Annotated[kind, moved])


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _parameter(kind: type, name: str, other: dict[str, Any]) -> inspect.Parameter:
    annotation = other.get(name, _hints(kind)[name])
    parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(kind, name), annotation=annotation)
    return in_panel(parameter, kind.__name__)
