"""Tensors without a partner in the other model. They are stored whole or lost, not compressed, so they are counted and reported."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from peru_cli.checkpoints.architectures import is_embedding
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import Pairing
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch

REFUSED, SAID = 0.10, 0.01  # shares of either side's bytes
# Modules that each task has anew, by the names in transformers, timm and torchvision.
_HEADS = re.compile(
    r"(^|\.)(classifier\d*|score|qa_outputs|qa_classifier|classification_head|regression_head|lm_head|embed_out|cls|pooler|heads?|head_dist"
    r"|predictions|generator_predictions|generator_lm_head|discriminator_predictions|vocab_\w+|pre_classifier|sequence_summary|logits_proj"
    r"|summary|answer_class|start_logits|end_logits|ctc_proj|output_projection|lm_predictions|mlm|v_head|value_head)(\.|$)|^fc\."
)


def is_head_name(name: str) -> bool:
    """Whether a tensor belongs to a head, which differs between tasks by design."""
    return bool(_HEADS.search(name))


def unpaired(fine: Checkpoint, pairing: Pairing, chosen: re.Pattern[str] | None) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Tensors of the fine-tune and of the base without a partner that are not heads and that `chosen` (--per-task) does not name."""
    reshaped = {info.name: other for info, other in pairing.reshaped}
    own = [i for i in pairing.whole if not is_head_name(i.name) and not (chosen and chosen.search(i.name)) and i.name not in reshaped]
    taken = {other.name for other in reshaped.values()}
    named = {pairing.prefix.base_name(i.name) for i in pairing.whole if chosen and chosen.search(i.name)}
    base = [i for i in pairing.base_only if not is_head_name(i.name) and i.name not in taken and i.name not in named]
    strange = [i for i in pairing.whole if i.name in reshaped and not _is_head_shape(i, reshaped[i.name]) and not is_head_name(i.name)]
    return own + [i for i in strange if not (chosen and chosen.search(i.name))], base


def _is_head_shape(info: TensorInfo, other: TensorInfo) -> bool:
    """Whether a different number of classes explains two shapes: only the first dimension differs, and it is not a table of rows."""
    if is_embedding(info.name.removesuffix(".weight")):
        return False
    return bool(info.shape) and len(info.shape) == len(other.shape) and info.shape[1:] == other.shape[1:]


def judge(fine: Checkpoint, base: Checkpoint, pairing: Pairing, chosen: re.Pattern[str] | None, allowed: bool) -> str | None:
    """A message about unpaired tensors. None if they are few. Mismatch if they are more than a tenth of either side's bytes."""
    sides = []
    for model, tensors in zip((fine, base), unpaired(fine, pairing, chosen), strict=True):
        nbytes = sum(info.nbytes for info in tensors)
        share = nbytes / max(model.nbytes, 1)
        if share > SAID:
            sides.append(
                (share, f"{nbytes:,} of {model.nbytes:,} bytes of {model.label} ({100 * share:.0f}%) have no partner: {kinds(tensors)}")
            )
    if not sides:
        return None
    text = "\n  ".join(line for _, line in sides)
    if max(share for share, _ in sides) > REFUSED and not allowed:
        raise Mismatch(
            f"{fine.label} and {base.label} pair only in part ({pairing.prefix})\n  {text}",
            "is this the base? --rename REGEX=NEW matches names, --per-task REGEX marks heads, --allow-unpaired stores all whole",
        )
    return f"{fine.label} and {base.label} pair only in part: {text}"


def lost(fine: Checkpoint, pairing: Pairing, chosen: re.Pattern[str] | None) -> str | None:
    """A message about a fine-tune of which more than a tenth would not be merged. None otherwise."""
    own, _ = unpaired(fine, pairing, chosen)
    nbytes = sum(info.nbytes for info in own)
    if nbytes <= REFUSED * fine.nbytes:
        return None
    share = f"{nbytes:,} of {fine.nbytes:,} bytes of {fine.label} ({100 * nbytes / fine.nbytes:.0f}%)"
    return f"{share} have no partner: {kinds(own)} (--rename REGEX=NEW brings names together, --per-task REGEX keeps them for the task)"


def kinds(tensors: Sequence[TensorInfo]) -> str:
    """Tensors by name with numbers folded, the largest kinds first."""
    sizes: dict[str, int] = defaultdict(int)
    for info in tensors:
        sizes[re.sub(r"\d+", "*", info.name)] += info.nbytes
    ordered = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    more = f", and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(f"{name} ({nbytes:,})" for name, nbytes in ordered[:4]) + more
