"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Optional

import typer

from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.checkpoints.hub.session import reading
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
    """`5GB`, `500MB`, `64MiB` or plain bytes as a number of bytes; MB is 10^6, MiB 2^20."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match.group(2) not in _UNITS or match.group(2) == "i":
        raise UsageError(f"{option} {text!r} is not a size", "write it as 500MB, 5GB or 64MiB")
    size = int(Fraction(match.group(1)) * _UNITS[match.group(2)])
    if size < 1:
        raise UsageError(f"{option} {text!r} is no bytes at all")
    return size


def parse_density(text: str, option: str = "--keep") -> Fraction:
    """`10%` or `0.1` as an exact fraction in (0, 1]; UsageError otherwise, with what was probably meant."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text.strip())
    if match is None:
        raise UsageError(f"{option} {text!r} is not a density", f"write a share of the entries: {option} 10% or {option} 0.1")
    density = Fraction(match.group(1)) / (100 if match.group(2) else 1)
    if density == 0:
        raise UsageError(f"{option} {text} keeps nothing", f"write a share above 0: {option} 1%")
    if density > 1:
        hint = f"at most {option} 100%" if match.group(2) else f"did you mean {option} {match.group(1)}%?"
        raise UsageError(f"{option} {text} is more than all entries", hint)
    return density


def parse_dtype(text: str) -> Dtype:
    """`bf16`, `fp16`, `fp32` or `fp64`; UsageError otherwise."""
    if text not in DTYPES:
        raise UsageError(f"--dtype {text!r} is not one of {', '.join(DTYPES)}")
    return BY_NAME[DTYPES[text]]


def check_base_id(text: str | None) -> None:
    """Refuse a base's name that cannot be printed."""
    if text is not None and not text.isprintable():
        raise UsageError(f"--base-id {text!r} holds characters that cannot be printed", "write it as org/name@commit")


def _quiet(value: bool) -> bool:
    console.quiet = console.quiet or value
    return value


def _json(value: bool) -> bool:
    console.json = console.json or value
    return value


def _stream(value: bool) -> bool:
    reading.stream = value
    return value


Base = Annotated[str, typer.Option("--base", "-b", metavar="BASE", help="The checkpoint that deltas are taken against.")]
OptionalBase = Annotated[Optional[str], typer.Option("--base", "-b", metavar="BASE", help="The checkpoint that deltas are taken against.")]
Json = Annotated[bool, typer.Option("--json", callback=_json, help="Print one JSON value instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_quiet, help="No notes, no progress bar.")]
Stream = Annotated[
    bool, typer.Option("--stream", callback=_stream, help="Read models on the Hub by ranges: nothing of them is written to disk.")
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda[:N]", help="Where the tensor work runs.")]
Threads = Annotated[Optional[int], typer.Option("--threads", min=1, help="CPU threads. Default: all that this process may use.")]
NoSync = Annotated[bool, typer.Option("--no-sync", help="Do not wait for the disk: faster, for scratch files.")]
Push = Annotated[Optional[str], typer.Option("--push", metavar="ORG/NAME", help="Then publish the output on the Hub, in one commit.")]
Private = Annotated[bool, typer.Option("--private", help="Publish in a private repo.")]
PushRevision = Annotated[
    Optional[str], typer.Option("--revision", metavar="BRANCH", help="Publish on this branch, made if need be. Default: main.")
]
CommitMessage = Annotated[Optional[str], typer.Option("--commit-message", metavar="TEXT", help="What the commit says.")]
ForcePush = Annotated[bool, typer.Option("--force", "-f", help="Put this in the place of what the repo holds.")]
TileEntries = Annotated[
    Optional[int],
    typer.Option("--tile-entries", metavar="N", help="Entries streamed at once, a multiple of 16384. Changes no result."),
]
