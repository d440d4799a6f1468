"""Which tensor of a fine-tune belongs to which tensor of the base.

Names pair after one prefix is added or removed: a bare encoder as base and a classifier built on it as fine-tune is the common
case (`encoder.layer.0...` and `bert.encoder.layer.0...`)."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

from peru_cli.checkpoints.checks.buffers import is_buffer
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch, UsageError

# Without a config.json, a first dimension that grew counts as a vocabulary from this size on: the usual image head (1,000 classes)
# is smaller, the usual vocabulary larger.
MIN_VOCABULARY_ROWS = 4096


@dataclass(frozen=True)
class Prefix:
    """How a fine-tune's names become the base's: `added` precedes the fine-tune's names, `removed` the base's."""

    added: str = ""
    removed: str = ""

    def base_name(self, name: str) -> str | None:
        """The base's name for a fine-tune's tensor. None if the prefix rules it out."""
        if self.added:
            return name[len(self.added) :] if name.startswith(self.added) else None
        return self.removed + name

    def __str__(self) -> str:
        if self.added:
            return f"fine-tune = {self.added!r} + base"
        if self.removed:
            return f"base = {self.removed!r} + fine-tune"
        return "same names"

    def encode(self) -> str:
        """The form that an artifact records: `+bert.` or `-bert.`, empty for equal names."""
        return f"+{self.added}" if self.added else f"-{self.removed}" if self.removed else ""

    @classmethod
    def decode(cls, text: str) -> Prefix:
        """Inverse of `encode`."""
        return cls(added=text[1:]) if text.startswith("+") else cls(removed=text[1:]) if text.startswith("-") else cls()


@dataclass(frozen=True, slots=True)
class Pair:
    """A fine-tune's tensor and the base's. With `grown`, the base has only its first rows.

    With `is_delta` the pair is compressed as a difference. Otherwise (integers, buffers) it is kept or stored whole.
    """

    fine: TensorInfo
    base: TensorInfo
    grown: bool = False
    coded: bool = False  # codes, whose differences are stored byte by byte
    is_delta: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        delta = self.coded or (self.fine.dtype.compressible and self.base.dtype.compressible and not is_buffer(self.base))
        object.__setattr__(self, "is_delta", delta)

    @property
    def entries(self) -> int:
        """Entries that both have: the first ones of the fine-tune's tensor, in flat order."""
        return self.base.entries


@dataclass
class Pairing:
    """All pairs in canonical order (the fine-tune's names by code point) and all tensors without a partner."""

    prefix: Prefix
    pairs: list[Pair] = field(default_factory=list)
    whole: list[TensorInfo] = field(default_factory=list)  # stored whole: heads, new tensors, other shapes
    reshaped: list[tuple[TensorInfo, TensorInfo]] = field(default_factory=list)  # the part of `whole` that has a namesake
    base_only: list[TensorInfo] = field(default_factory=list)

    @cached_property
    def deltas(self) -> dict[str, Pair]:
        """Pairs with a difference, by the base's names."""
        return {pair.base.name: pair for pair in self.pairs if pair.is_delta}

    @property
    def float_entries(self) -> int:
        """The paper's d: floating entries of all paired tensors (the n of `--keep`)."""
        return sum(pair.entries for pair in self.pairs if pair.is_delta)


def find_prefix(fine: dict[str, TensorInfo], base: dict[str, TensorInfo]) -> Prefix:
    """The prefix under which most bytes of the fine-tune pair (equal names and shapes). The empty one wins ties."""
    if all((other := base.get(name)) is not None and other.shape == info.shape for name, info in fine.items()):
        return Prefix()  # no other prefix pairs more
    candidates: dict[Prefix, int] = defaultdict(int)
    for longer, shorter, added in ((fine, base, True), (base, fine, False)):
        for name, info in longer.items():
            cuts = [0] * added + [i + 1 for i, character in enumerate(name) if character == "."]  # equal names count once
            for cut in cuts:
                other = shorter.get(name[cut:])
                if other is not None and other.shape == info.shape:
                    prefix = Prefix(added=name[:cut]) if added else Prefix(removed=name[:cut])
                    candidates[prefix] += (info if added else other).nbytes
                if cut > 64:
                    break
    return max(candidates, key=lambda p: (candidates[p], -len(p.added) - len(p.removed), p.encode()), default=Prefix())


def _vocabulary(checkpoint: Checkpoint) -> int | None:
    config = checkpoint.config()
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else None


def _is_grown(fine: TensorInfo, base: TensorInfo, vocabularies: tuple[int | None, int | None]) -> bool:
    if not base.shape or not base.entries or len(fine.shape) != len(base.shape) or fine.shape[1:] != base.shape[1:]:
        return False
    rows, base_rows = fine.shape[0], base.shape[0]
    if rows <= base_rows:
        return False
    return vocabularies == (rows, base_rows) or base_rows >= MIN_VOCABULARY_ROWS


def pair_checkpoints(fine: Checkpoint, base: Checkpoint, per_task: str | None = None) -> Pairing:
    """Pair the tensors of `fine` with those of `base`.

    Args:
        per_task: a regular expression. Tensors of the fine-tune with a match anywhere in their names are stored whole for the task
            and never paired.

    Raises:
        Mismatch: less than half of the fine-tune's bytes pair. The message says what was compared.
        UsageError: `per_task` is not a regular expression, or matches nothing."""
    try:
        own = re.compile(per_task) if per_task is not None else None
    except re.error as error:
        raise UsageError(f"--per-task {per_task!r} is not a regular expression: {error}") from error
    if own is not None and not any(own.search(name) for name in fine.tensors):
        raise UsageError(f"--per-task {per_task!r} matches no tensor of {fine.label}", "`peru inspect` lists the names")
    pairing = pair_up(fine, base, own)
    _require_half(fine, base, pairing)
    return pairing


def pair_up(fine: Checkpoint, base: Checkpoint, own: re.Pattern[str] | None = None) -> Pairing:
    """Pair the tensors of `fine` with those of `base`, even if few do. Tensors that `own` matches are not paired."""
    prefix = find_prefix(dict(fine.tensors), dict(base.tensors))
    pairing = Pairing(prefix)
    vocabularies = (_vocabulary(fine), _vocabulary(base))
    claimed = set()
    for name in sorted(fine.tensors):
        info = fine.tensors[name]
        base_name = prefix.base_name(name)
        other = base.tensors.get(base_name) if base_name is not None else None
        if other is None or (own is not None and own.search(name)):
            pairing.whole.append(info)
            continue
        if info.shape == other.shape:
            pairing.pairs.append(Pair(info, other))
        elif _is_grown(info, other, vocabularies) and info.dtype.compressible and other.dtype.compressible:
            pairing.pairs.append(Pair(info, other, grown=True))
        else:
            pairing.whole.append(info)
            pairing.reshaped.append((info, other))
            continue
        claimed.add(other.name)
    pairing.base_only = [base.tensors[name] for name in sorted(base.tensors) if name not in claimed]
    return pairing


def _require_half(fine: Checkpoint, base: Checkpoint, pairing: Pairing) -> None:
    paired = sum(pair.fine.nbytes for pair in pairing.pairs)
    if fine.tensors and paired * 2 >= fine.nbytes and pairing.pairs:
        return
    lines = [f"{fine.label} and {base.label} share only {paired:,} of the fine-tune's {fine.nbytes:,} bytes ({pairing.prefix})"]
    for info, other in pairing.reshaped[:3]:
        lines.append(f"  {info.name}: {list(info.shape)} against {list(other.shape)} in the base")
    strangers = [info for info in pairing.whole if info.name not in {i.name for i, _ in pairing.reshaped}]
    for info in strangers[:3]:
        lines.append(f"  {info.name}: not in the base")
    if pairing.base_only:
        lines.append(f"  the base has, for example, {', '.join(info.name for info in pairing.base_only[:3])}")
    raise Mismatch("\n".join(lines), "is this the base that the fine-tune was made from?")
