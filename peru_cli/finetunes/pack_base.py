"""Whether a checkpoint is the base that a pack was made from."""

from __future__ import annotations

from peru_cli.artifacts.packs.pack import Pack
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch

_SHOWN = 5  # tensors named in a message


def check_pack_base(pack: Pack, base: Checkpoint) -> None:
    """Refuse, from headers alone, a base that cannot be the pack's."""
    problems = []
    for record in pack.index.tensors:
        info = base.tensors.get(record.info.name)
        if info is None:
            problems.append(f"{record.info.name}: not in {base.label}")
        elif info.shape != record.info.shape or info.dtype is not record.base_dtype:
            wanted = f"{record.base_dtype.name} {list(record.info.shape)}"
            problems.append(f"{info.name}: {info.dtype.name} {list(info.shape)} in {base.label}, {wanted} when the pack was made")
    refuse_pack_base(problems, pack, base.label)


def refuse_pack_base(problems: list[str], pack: Pack, label: str) -> None:
    """Raise Mismatch if there are problems, naming the first few."""
    if problems:
        wanted = pack.metadata.get("peru.base")
        hint = f"it was made from {wanted}" if wanted else "the pack does not say where its base came from (--base-id records it)"
        if pack.has_own_base:
            hint = f"its base is the one that --merge-base wrote{f', {wanted}' if wanted else ''}"
        raise Mismatch(
            f"{label} is not the base that {pack.path} was made from: {len(problems)} tensor(s) differ\n  "
            + "\n  ".join(problems[:_SHOWN]),
            hint,
        )
