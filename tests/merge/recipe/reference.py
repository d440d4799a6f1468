"""mergekit's formulas in plain torch and float64, tensor by tensor, with values by level, filters and gradients.

Written only from the mathematics (the tables of the papers and of mergekit's documentation), without peru's code."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def value(setting: Any, name: str, depth: float) -> Any:
    """A scalar, a gradient, a table or a list of tables at one tensor. None if no filter matches."""
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, list) and isinstance(setting[0], dict):
        for table in setting:
            if table.get("filter") in (None, "*") or table["filter"] in name:
                return value(table["value"], name, depth)
        return None
    if isinstance(setting, list):
        at = depth * (len(setting) - 1)
        low = min(int(at), len(setting) - 2) if len(setting) > 1 else 0
        high = min(low + 1, len(setting) - 1)
        return setting[low] + (at - low) * (setting[high] - setting[low])
    return setting


def look_up(key: str, levels: list[dict[str, Any]], name: str, depth: float, default: Any = None) -> Any:
    """The value of the nearest level that has one."""
    for level in levels:
        if key in level and (found := value(level[key], name, depth)) is not None:
            return found
    return default


def depth_of(name: str, layers: int) -> float:
    """i / (L - 1); 0 outside of layers, 1 in a run of one."""
    match = re.search(r"layers\.(\d+)\.", name)
    if match is None:
        return 0.0
    return int(match.group(1)) / (layers - 1) if layers > 1 else 1.0


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """On the great circle from a (t = 0) to b, or on the line if they are nearly parallel."""
    x, y = a.flatten(), b.flatten()
    cosine = float(x @ y / (x.norm() * y.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def trimmed(tau: torch.Tensor, density: float) -> torch.Tensor:
    """The largest max(1, floor(d n)) entries."""
    kept = max(1, int(density * tau.numel())) if density > 0 else 0
    flat = tau.flatten()
    mask = torch.zeros_like(flat)
    mask[flat.abs().argsort(descending=True, stable=True)[:kept]] = 1
    return (flat * mask).view(tau.shape)


def combine(deltas: list[torch.Tensor], weights: list[float], elect: bool, normalize: bool) -> torch.Tensor:
    """sum m p / (normalize ? sum m w : 1), p = w delta; m: the sign of p is that of the sum."""
    parts = torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)])
    mask = torch.ones_like(parts)
    if elect:
        sign = torch.where(parts.sum(0) >= 0, 1.0, -1.0).double()
        mask = (parts.sign() == sign).double()
    total = (parts * mask).sum(0)
    if not normalize:
        return total
    divisor = (mask * torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * deltas[0].dim())).sum(0)
    return total / torch.where(divisor.abs() < 1e-8, 1.0, divisor)


def merge(recipe: dict[str, Any], family: dict[str, Tensors], layers: int) -> Tensors:
    """A recipe with `models`, by the formulas."""
    whole = [recipe.get("parameters", {})]
    method, base_name = recipe["merge_method"], recipe.get("base_model")
    merged = {}
    for name in family["a"]:
        depth = depth_of(name, layers)
        models = [m for m in recipe["models"] if method in ("linear", "slerp") or m["model"] != base_name]
        tensors = [family[m["model"]][name].double() for m in models]
        own = [[m.get("parameters", {}), *whole] for m in models]
        weights = [look_up("weight", levels, name, depth) for levels in own]
        normalize = look_up("normalize", whole, name, depth, method in ("linear", "ties"))
        if method == "linear":
            total = sum(w * t for w, t in zip(weights, tensors, strict=True))
            merged[name] = total / sum(weights) if normalize else total
            continue
        base = family[base_name][name].double()
        if method == "slerp":
            other = next(t for m, t in zip(models, tensors, strict=True) if m["model"] != base_name)
            merged[name] = slerp(base, other, look_up("t", whole, name, depth))
            continue
        taus = [t - base for t in tensors]
        if method == "ties":
            taus = [trimmed(tau, look_up("density", levels, name, depth, 1.0)) for tau, levels in zip(taus, own, strict=True)]
        merged[name] = base + look_up("lambda", whole, name, depth, 1.0) * combine(taus, weights, method == "ties", normalize)
    return merged
