"""Post-Pruning written out directly: sort by key, then position. Shares no code with peru."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's entries as integers of its width, flat."""
    size = tensor.element_size()
    return np.frombuffer(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), dtype=INTEGERS[size])


def post_prune(
    base: dict[str, torch.Tensor], fine: dict[str, torch.Tensor], density: Fraction, scope: str = "global"
) -> dict[str, np.ndarray]:
    """For each paired floating tensor, a bool mask (flat) of the entries to keep.

    Keys are |fine - base| in float32 (float64 if any tensor is float64), with the base first cast to the fine-tune's dtype. Differences
    that are not finite tie as the largest. Only entries whose bits differ compete. Ties are broken by tensor name, then flat
    index. Keeps floor(density * n) of them, or all changed ones."""
    names = sorted(n for n in fine if n in base and fine[n].is_floating_point() and fine[n].shape == base[n].shape)
    wide = any(t[n].dtype == torch.float64 for n in names for t in (base, fine))
    kind = torch.float64 if wide else torch.float32
    masks = {n: np.zeros(fine[n].numel(), dtype=bool) for n in names}
    for group in [names] if scope == "global" else [[n] for n in names]:
        found = []
        for order, name in enumerate(group):
            cast = base[name].to(fine[name].dtype)
            keys = (fine[name].to(kind) - cast.to(kind)).abs().view(-1).numpy().astype(np.float64)
            keys[~np.isfinite(keys)] = np.inf
            changed = np.flatnonzero(bits(cast) != bits(fine[name]))
            found.append((keys[changed], np.full(len(changed), order), changed))
        key, order, place = (np.concatenate(column) for column in zip(*found, strict=True)) if found else (np.empty(0, int),) * 3
        k = int(density * sum(fine[n].numel() for n in group))
        for i in np.lexsort((place, order, -key))[:k]:
            masks[group[order[i]]][place[i]] = True
    return masks
