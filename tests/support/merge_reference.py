"""Merge methods written out directly on whole tensors. Shares no code with peru."""

from __future__ import annotations

import math

import torch

Table = dict[str, torch.Tensor]


def flatten(table: Table) -> torch.Tensor:
    """All floating tensors by name, one after the other, float32."""
    return torch.cat([table[n].float().view(-1) for n in sorted(table) if table[n].is_floating_point()])


def top(vector: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest entries by magnitude, ties in order; the rest is 0."""
    order = torch.sort(vector.abs(), descending=True, stable=True).indices
    kept = torch.zeros_like(vector)
    kept[order[:k]] = vector[order[:k]]
    return kept


def ties_authors(vectors: list[torch.Tensor], k: int, reduce: str = "mean") -> torch.Tensor:
    """The authors' resolve_sign, resolve_zero_signs("majority") and disjoint_merge, with exactly k entries kept."""
    stacked = torch.stack([top(v, k) for v in vectors])
    sign = torch.sign(stacked.sum(dim=0))
    sign[sign == 0] = torch.sign(sign.sum())
    keep = torch.where(sign.unsqueeze(0) > 0, stacked > 0, stacked < 0)
    chosen = stacked * keep
    if reduce == "sum":
        return chosen.sum(dim=0)
    return chosen.sum(dim=0) / (chosen != 0).sum(dim=0).float().clamp(min=1)


def ties_mergekit(vectors: list[torch.Tensor], weights: list[float], k: int, normalize: bool = True) -> torch.Tensor:
    """Weights before the election; a sum of 0 elects +; divided by the agreeing weights."""
    w = torch.tensor(weights).unsqueeze(1)
    deltas = torch.stack([top(v, k) for v in vectors]) * w
    majority = (deltas.sum(dim=0) >= 0).float() * 2 - 1
    mask = (deltas.sign() == majority).float()
    mixed = (deltas * mask).sum(dim=0)
    if not normalize:
        return mixed
    divisor = (w * mask).sum(dim=0)
    divisor[divisor.abs() < 1e-8] = 1
    return mixed / divisor


def breadcrumbs(vector: torch.Tensor, k: int, outliers: int) -> torch.Tensor:
    """Without the `outliers` largest entries, the next k."""
    return top(vector, k + outliers) - top(vector, outliers)


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Spherical interpolation of two flat tensors, float64."""
    a, b = a.double(), b.double()
    cosine = float((a * b).sum() / (a.norm() * b.norm())) if a.norm() and b.norm() else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    omega = math.acos(cosine)
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)


def consensus(vectors: list[torch.Tensor], share: float, least: int) -> torch.Tensor:
    """Entries of the sum that at least `least` tasks use."""
    total = torch.stack(vectors).sum(dim=0)
    uses = sum((v.abs() > share * (total - v).abs()).int() for v in vectors)
    return total * (uses >= least)
