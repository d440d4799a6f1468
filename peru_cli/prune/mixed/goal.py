"""The goals `--max-bytes`, `--bits` and `--min-quality`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from peru_cli import options
from peru_cli.errors import UsageError


@dataclass(frozen=True)
class Goal:
    """`kind` is bytes (of all artifacts together), bits (a parameter), quality (the kept share of the squared norm) or agreement (the
    share of examples with the fine-tune's answer)."""

    kind: str
    value: float

    def encode(self) -> str:
        """The goal as the artifact records it."""
        return f"{self.kind} {int(self.value) if self.kind == 'bytes' else repr(float(self.value))}"

    def __str__(self) -> str:
        if self.kind == "bytes":
            return f"at most {int(self.value):,} bytes"
        if self.kind == "bits":
            return f"{self.value:g} bits/param"
        return f"{100 * self.value:g}% of the {'energy' if self.kind == 'quality' else 'answers of each fine-tune on its examples'}"


def parse_goal(max_bytes: str | None, bits: str | None, min_quality: str | None, with_data: bool) -> Goal | None:
    """The goal that the options name; --min-quality means answers `with_data`, else energy. None if there is none.

    UsageError for an impossible value, or for two goals.
    """
    if sum(option is not None for option in (max_bytes, bits, min_quality)) > 1:
        raise UsageError("--max-bytes, --bits and --min-quality exclude each other", "give one of them")
    if max_bytes is not None:
        return Goal("bytes", options.parse_size(max_bytes, "--max-bytes"))
    if bits is not None:
        return Goal("bits", _number(bits, "--bits", 64, "such as 0.1: bits per parameter of the base"))
    if min_quality is None:
        return None
    text = min_quality.strip()
    percent = text.endswith("%")
    value = _number(text.removesuffix("%"), "--min-quality", 100 if percent else 1, "as 99% or 0.99") / (100 if percent else 1)
    if value >= 1:
        raise UsageError("--min-quality 100% means that nothing is lost", "use --lossless instead")
    return Goal("agreement" if with_data else "quality", value)


def _number(text: str, option: str, most: float, how: str) -> float:
    if not re.fullmatch(r"(\d+(\.\d*)?|\.\d+)", text.strip()) or not 0 < float(text) <= most:
        raise UsageError(f"{option} {text!r} is not a number above 0 and at most {most:g}", f"write it {how}")
    return float(text)
