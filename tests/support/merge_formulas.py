"""Merge methods of 2024 to 2026 and mergekit's, directly from their formulas, in float64. Shares no code with peru.

A function takes one tensor of every task (task vectors `tau`, or weights), in the tensor's shape."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def rows(x: Array) -> Array:
    return x.reshape(len(x), -1) if x.ndim >= 2 else x.reshape(1, -1)


def slerp_two(a: Array, b: Array, t: float) -> Array:
    a, b = a.ravel(), b.ravel()
    omega = np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))
    if abs(np.sin(omega)) < 1e-8:
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def nuslerp(xs: list[Array], weights: list[float], axis: int | None) -> Array:
    a, b = xs
    t = weights[1] / sum(weights[:2])
    if axis is None or a.ndim < 2:
        return slerp_two(a, b, t).reshape(a.shape)
    x, y = rows(a), rows(b)
    if axis == 0:
        return np.stack([slerp_two(x[:, j], y[:, j], t) for j in range(x.shape[1])], axis=1).reshape(a.shape)
    return np.stack([slerp_two(p, q, t) for p, q in zip(x, y, strict=True)]).reshape(a.shape)


def multislerp(xs: list[Array], weights: list[float], normalize: bool) -> Array:
    w = np.array(weights) / (sum(weights) if normalize else 1)
    units = [x / np.linalg.norm(x) for x in xs]
    mu = sum(c * u for c, u in zip(w, units, strict=True))
    mu = mu / np.linalg.norm(mu)
    v = sum(c * (u - (u * mu).sum() * mu) for c, u in zip(w, units, strict=True))
    norm = np.linalg.norm(v)
    point = mu * np.cos(norm) + (v * np.sin(norm) / norm if norm > 1e-12 else 0)
    return point * sum(c * np.linalg.norm(x) for c, x in zip(w, xs, strict=True))


def karcher(xs: list[Array], steps: int = 200) -> Array:
    """Gradient descent to the mean, on the vectors themselves."""
    units = [x / np.linalg.norm(x) for x in xs]
    mu = sum(units) / np.linalg.norm(sum(units))
    for _ in range(steps):
        step = 0
        for u in units:
            angle = np.arccos(np.clip((u * mu).sum(), -1, 1))
            step = step + (angle / np.sin(angle) if angle > 1e-12 else 1.0) * (u - (u * mu).sum() * mu) / len(units)
        length = np.linalg.norm(step)
        if length < 1e-13:
            break
        mu = np.cos(length) * mu + np.sin(length) * step / length
    return mu * np.mean([np.linalg.norm(x) for x in xs])


def model_stock(tau: list[Array]) -> Array:
    k = len(tau)
    cosines = [(a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(tau) for b in tau[:i]]
    c = np.mean(cosines)
    return k * c / (1 + (k - 1) * c) * sum(tau) / k


def model_stock_rows(tau: list[Array]) -> Array:
    parts = [rows(x) for x in tau]
    return np.stack([model_stock([x[i] for x in parts]) for i in range(len(parts[0]))]).reshape(tau[0].shape)


def nearswap(tau: Array, t: float) -> Array:
    return np.clip(t / np.maximum(np.abs(tau), 1e-6), 0, 1) * tau


def arcee_fusion(base: Array, fine: Array) -> Array:
    def softmax(x: Array) -> Array:
        e = np.exp(x)
        return e / e.sum(-1, keepdims=True)

    a, b = np.atleast_1d(fine), np.atleast_1d(base)
    p, q = softmax(a) + 1e-8, softmax(b) + 1e-8
    importance = np.abs(a - b) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    low, middle, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= middle + 1.5 * (high - low), a, b).reshape(base.shape)


def sce(tau: list[Array], keep: float) -> Array:
    stack = np.stack(tau)
    if keep < 1:
        variance = stack.var(0).ravel()
        mask = np.zeros(variance.size, bool)
        mask[np.argsort(-variance, kind="stable")[: int(keep * np.count_nonzero(variance))]] = True
        stack = stack * mask.reshape(tau[0].shape)
    energy = (stack**2).reshape(len(tau), -1).mean(1)
    w = energy / energy.sum()
    agrees = np.sign(stack) == np.where(stack.sum(0) >= 0, 1, -1)
    weights = agrees * w.reshape(-1, *[1] * tau[0].ndim)
    return (weights * stack).sum(0) / np.maximum(weights.sum(0), 1e-6)


def ram(tau: list[Array], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Array:
    stack = np.stack(tau)
    active = np.abs(stack) > epsilon
    count = active.sum(0)
    parts = []
    for x, on in zip(stack, active, strict=True):
        alone, shared = on & (count == 1), on & (count > 1)
        factor = 1 + r * np.clip(shared.sum() / max(alone.sum(), 1), 0, alpha)
        parts.append(x * (alone * factor + shared / np.maximum(count, 1)))
    return sum(parts)


def breadcrumbs_ties(tau: list[Array], weights: list[float], keep: float, gamma: float, mean: bool) -> Array:
    parts = []
    for x, w in zip(tau, weights, strict=True):
        flat, n = x.ravel(), x.size
        bottom = max(0, n - int(keep * n) - int(gamma * n))
        kept = np.zeros(n)
        order = np.argsort(np.abs(flat), kind="stable")[bottom : bottom + int(keep * n)]
        kept[order] = flat[order]
        parts.append(w * kept.reshape(x.shape))
    p = np.stack(parts)
    agrees = np.sign(p) == np.where(p.sum(0) >= 0, 1, -1)
    divisor = sum(a * w for a, w in zip(agrees, weights, strict=True)) if mean else 1.0
    return (p * agrees).sum(0) / np.where(np.abs(divisor) < 1e-8, 1, divisor)


def pcb(tau: list[Array], keep: float) -> Array:
    def unit(x: Array) -> Array:
        return (x - x.min()) / (x.max() - x.min())

    total, above, below = sum(tau), 0, 0
    for x in tau:
        score = np.exp(len(tau) * unit(np.abs(x)) ** 2) * np.tanh(x * total)
        kept = np.sort(score.ravel())[::-1][max(1, int(keep * x.size)) - 1]
        share = unit(np.maximum(score, kept))
        above, below = above + share * x, below + share
    return above / np.maximum(below, 1e-12)


def tsv_m(tau: list[Array]) -> Array:
    parts = [np.linalg.svd(rows(x), full_matrices=False) for x in tau]
    k = min(rows(tau[0]).shape) // len(tau)
    u, s, v = np.concatenate([p[0][:, :k] for p in parts], 1), np.concatenate([p[1][:k] for p in parts]), [p[2][:k] for p in parts]
    a, _, b = np.linalg.svd(u, full_matrices=False)
    c, _, d = np.linalg.svd(np.concatenate(v), full_matrices=False)
    return (a @ b @ np.diag(s) @ c @ d).reshape(tau[0].shape)


def iso_c(tau: list[Array]) -> Array:
    u, s, v = np.linalg.svd(rows(sum(tau)), full_matrices=False)
    return (s.mean() * u @ v).reshape(tau[0].shape)


def iso_cts(tau: list[Array], common: float) -> Array:
    u, s, v = np.linalg.svd(rows(sum(tau)), full_matrices=False)
    own = min(round((len(s) - int(len(s) * common)) / len(tau)), len(s) // len(tau))
    k = len(s) - own * len(tau)
    left, values, right = [u[:, :k]], [s[:k]], [v[:k]]
    for x in tau:
        p, q, r = np.linalg.svd(rows(x) - u[:, :k] @ u[:, :k].T @ rows(x), full_matrices=False)
        left, values, right = [*left, p[:, :own]], [*values, q[:own]], [*right, r[:own]]
    a, _, b = np.linalg.svd(np.concatenate(left, 1), full_matrices=False)
    c, _, d = np.linalg.svd(np.concatenate(right), full_matrices=False)
    return (np.concatenate(values).mean() * a @ b @ c @ d).reshape(tau[0].shape)


def wudi_gradient(merged: Array, tau: list[Array]) -> Array:
    """Gradient of the loss that WUDI minimises; 0 at its optimum."""
    return sum(2 * (rows(merged) - rows(x)) @ rows(x).T @ rows(x) / (x**2).sum() for x in tau)


def star(tau: list[Array], share: float) -> Array:
    total = 0
    for x in tau:
        u, s, v = np.linalg.svd(rows(x), full_matrices=False)
        rank = int(np.argmax(np.cumsum(s) >= share * s.sum())) + 1
        total = total + u[:, :rank] @ np.diag(s[:rank] * s.sum() / s[:rank].sum()) @ v[:rank]
    return (total / len(tau)).reshape(tau[0].shape)
