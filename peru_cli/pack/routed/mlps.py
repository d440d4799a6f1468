"""Find a model's MLPs by the names and shapes of its linear layers.

The layers of one MLP lie in the same repeated block: the part of their names up to the last number before the module itself. Some widen
(h -> m), one narrows (m -> h), and m is larger than h. Attention is left out by its name: in some models it widens and narrows, too."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peru_cli.artifacts.packs.routed import LinearLayer
from peru_cli.artifacts.packs.wemoe import GatedMlp
from peru_cli.errors import Mismatch, UsageError
from peru_cli.shown import listed

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
_HINT = "--target REGEX chooses the layers of MLPs by name: in each block some that widen, and one that narrows"
_SHOWN = 4


def find_mlps(layers: Sequence[LinearLayer], targeted: bool, label: str) -> list[GatedMlp]:
    """The MLPs, in the order of their first weights.

    Args:
        layers: linear layers in the order of their weights.
        targeted: --target chose them: attention may be among them, and each must belong to an MLP.

    Raises UsageError for layers that were chosen and belong to none, Mismatch if there is no MLP."""
    blocks: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        if targeted or not _ATTENTION.search(layer.weight.name):
            blocks.setdefault(_block(layer.weight.name), []).append(layer)
    mlps, left = [], []
    for members in blocks.values():
        found = _mlps_of(members)
        mlps += found
        used = {layer.weight.name for mlp in found for layer in mlp.layers}
        left += [layer.weight.name for layer in members if layer.weight.name not in used]
    if targeted and left:
        raise UsageError(f"--target chooses layers that are no part of an MLP: {listed(left[:_SHOWN])}", _HINT)
    if not mlps:
        raise Mismatch(f"{label} has no MLP that can be found: no block has layers that widen and one that narrows again", _HINT)
    return sorted(mlps, key=lambda mlp: mlp.layers[0].weight.name)


def _block(name: str) -> str:
    """The repeated block that a weight lies in: its name up to the last number, without its module's own name."""
    parts = name.split(".")[:-2]
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[: last + 1])


def _mlps_of(members: Sequence[LinearLayer]) -> list[GatedMlp]:
    """The MLPs of one block: one for each pair of widths that exactly one layer narrows."""
    found = []
    for narrows in members:
        inner, outer = narrows.inputs, narrows.outputs
        if inner <= outer:
            continue
        entries = [layer for layer in members if (layer.inputs, layer.outputs) == (outer, inner)]
        rivals = [layer for layer in members if (layer.inputs, layer.outputs) == (inner, outer)]
        if not entries or len(rivals) != 1:
            continue
        together = sorted([*entries, narrows], key=lambda layer: layer.weight.name)
        found.append(GatedMlp(together, [layer is not narrows for layer in together]))
    return found
