"""The right result, in plain torch and float64, compared with peru's output."""

from __future__ import annotations

import torch
from families import Family, Tensors

STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23, torch.float64: 2**-52}


class Wrong(Exception):
    """peru's result is not right."""


def close(got: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> None:
    """Equal shapes, NaN and infinities in the same places, all other entries within the tolerance."""
    if got.shape != expected.shape:
        raise Wrong(f"{what}: shape {list(got.shape)}, not {list(expected.shape)}")
    a, b = got.double(), expected.double()
    odd = ~b.isfinite()
    if not torch.equal(a[odd].nan_to_num(7, 8, 9), b[odd].nan_to_num(7, 8, 9)):
        raise Wrong(f"{what}: other values that are not finite")
    error = (a - b)[~odd].abs().max().item() if (~odd).any() else 0.0
    if not error <= tolerance:
        raise Wrong(f"{what}: off by {error}")


def rounded(got: torch.Tensor, expected: torch.Tensor, what: str, extra: float = 0.0) -> None:
    """Equal up to two roundings of the output's dtype."""
    finite = expected[expected.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    close(got, expected, what, 2 * STEP.get(got.dtype, 0) * size + 1e-6 * max(size, 1) + extra)


def octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(got: Tensors, expected: Tensors, what: str) -> None:
    """The same names, dtypes, shapes and bytes."""
    names(got, set(expected), what)
    for name, tensor in expected.items():
        alike = got[name].dtype is tensor.dtype and got[name].shape == tensor.shape
        if not alike or not torch.equal(octets(got[name]), octets(tensor)):
            raise Wrong(f"{what}: {name} differs")


def names(got: Tensors, expected: set[str], what: str) -> None:
    if set(got) != expected:
        raise Wrong(f"{what}: other tensors {sorted(set(got) ^ expected)}")


def is_buffer(name: str) -> bool:
    return name.endswith(("running_var", "running_mean", "inv_freq", "position_ids"))


def pairs(family: Family, task: str, got: Tensors, what: str) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Name, result, fine-tune and base (cast), flat, of every difference. Checks that all other tensors were restored whole."""
    found = []
    names(got, set(family.values[task]), what)
    for name, tensor in family.values[task].items():
        other = family.values["base"].get(family.bare(name))
        if got[name].dtype is not tensor.dtype:
            raise Wrong(f"{what}: {name} is {got[name].dtype}, not {tensor.dtype}")
        whole = other is None or is_buffer(name) or not tensor.is_floating_point() or tensor.shape[1:] != other.shape[1:]
        if whole or (tensor.shape[:1] != other.shape[:1] and not any(part in name for part in ("embed", "lm_head"))):
            close(got[name], tensor, f"{what}: {name}", 0)
            continue
        rows = other.shape[0] if other.ndim else None
        close(
            got[name][rows:] if rows is not None else got[name][None][1:], tensor[rows:] if rows is not None else tensor[None][1:], name, 0
        )
        parts = [(t[:rows] if rows is not None else t).reshape(-1) for t in (got[name], tensor, other.to(tensor.dtype))]
        found.append((name, *parts))
    return found


def pruned(family: Family, got: Tensors, task: str, density: float, by_tensor: bool) -> None:
    """Kept entries are the fine-tune's, the others the base's, and the largest changes were kept. Unpaired tensors are whole."""
    found = pairs(family, task, got, "prune")
    groups = [[pair] for pair in found] if by_tensor else [found]
    for group in groups:
        kept, changed, entries, least, most = 0, 0, 0, float("inf"), 0.0
        for name, a, b, c in group:
            bits = [t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]) for t in (a, b, c)]
            here = bits[0] != bits[2]
            step = 2**-8 if a.element_size() > 2 else 0.0
            size = (b.double() - c.double()).abs()
            close(a[here], b[here], f"prune: kept entries of {name}", step * float(size.nan_to_num(0, 0, 0).max()) if len(size) else 0)
            keys = (b.double() - c.double() if b.dtype is torch.float64 else b.float() - c.float()).abs().double()
            keys = torch.where(keys.isfinite(), keys, torch.full_like(keys, float("inf")))
            kept, changed, entries = kept + int(here.sum()), changed + int((bits[1] != bits[2]).sum()), entries + len(b)
            least = min(least, float(keys[here].min()) if here.any() else least)
            most = max(most, float(keys[~here].max()) if (~here).any() else most)
        lost = 2 if any(a.element_size() > 2 for _, a, _, _ in group) else 0  # a rounded value may equal the base's
        wanted = min(int(density * entries), changed)
        if not wanted - lost <= kept <= wanted or (most > least and not lost):
            raise Wrong(f"prune: {kept} of {changed} changed entries kept, not {wanted}, from {least} up; the largest left out is {most}")


def nearer(family: Family, got: Tensors, task: str) -> None:
    """A mixed artifact is closer to the fine-tune than the base is. Unpaired tensors are whole."""
    before = after = 0.0
    for _, a, b, c in pairs(family, task, got, "bits"):
        odd = ~(b.isfinite() & c.isfinite())
        after += float((a.double() - b.double())[~odd].square().sum())
        before += float((b.double() - c.double())[~odd].square().sum())
    if not after <= before * 1.0001 + 1e-9:
        raise Wrong(f"bits: squared distance {after}, the base's is {before}")


def on_base(task: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Base + task vector in float64. The base is cast to the fine-tune's dtype before it is subtracted (docs/format.md)."""
    if task.dtype is base.dtype:
        return task.double()
    return base.double() + (task.double() - base.to(task.dtype).double())


def merged(family: Family, got: Tensors, method: str, step: float = 0.0) -> None:
    """A merge of a and b on the base. Buffers follow their own rule; tensors that only the base has are copied.

    `step` is the rounding error, relative to the largest weight of a tensor."""
    base = {n: t for n, t in family.values["base"].items() if n not in family.left_out}
    names(got, set(base), f"merge {method}")
    for name, tensor in base.items():
        tasks = [family.values[t].get(family.prefix + name) for t in "ab"]
        what = f"merge {method}: {name}"
        if any(t is None or t.shape != tensor.shape for t in tasks):
            close(got[name], tensor, what, 0)
            continue
        a, b = (t.double() if method == "linear" or "running" in name else on_base(t, tensor) for t in tasks)
        if not tensor.is_floating_point() or name.endswith("inv_freq"):
            close(got[name], tensor, what, 0)
        else:
            mean = "running" in name
            weights = (0.75, 0.25) if method == "linear" else (0.5, 0.5)
            expected = weights[0] * a + weights[1] * b if mean else METHODS[method](a, b, tensor.double())
            open_ = expected.isnan() & got[name].isfinite() if method == "ties" else None  # the whole model's majority decides these
            finite = expected[expected.isfinite()]
            lost = step * float(finite.abs().max()) + step if finite.numel() and step else 0.0
            rounded(got[name], expected if open_ is None else torch.where(open_, got[name].double(), expected), what, lost)


def _ties(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """TIES that keeps everything: elect by the sum, mean of those that agree. NaN where the sum is 0 and elects nothing."""
    tau = torch.stack([a - c, b - c])
    total = tau.sum(0)
    agree = (tau * total.sign() > 0).double()
    merged = c + (tau * agree).sum(0) / agree.sum(0).clamp(min=1)
    return torch.where((total.abs() < 1e-6) & (tau != 0).any(0), torch.full_like(merged, float("nan")), merged)


METHODS = {
    "task-arithmetic": lambda a, b, c: c + 0.5 * (a + b - 2 * c),
    "linear": lambda a, b, c: 0.75 * a + 0.25 * b,
    "ties": _ties,
}
OPTIONS = {
    "task-arithmetic": ["--scale", "0.5"],
    "linear": ["--weight", "a=0.75", "--weight", "b=0.25"],
    "ties": ["--keep", "100%", "--scale", "1"],
}


def packed(family: Family, got: Tensors, task: str) -> None:
    """The sum of all differences on the base, for each task, with its own tensors whole."""
    fine = {n: t for n, t in family.values[task].items() if family.bare(n) not in family.left_out}
    names(got, set(fine), "pack")
    for name, tensor in fine.items():
        base = family.values["base"].get(family.bare(name))
        tasks = [family.values[t].get(name) for t in "ab"]
        whole = base is None or is_buffer(name) or any(t is None or t.shape != base.shape for t in tasks)
        if whole or not tensor.is_floating_point():
            close(got[name], tensor, f"pack: {name}", 0)
            continue
        a, b, c = (*(on_base(t, base) for t in tasks), base.double())
        expected = c + a + b - 2 * c
        vectors = torch.stack([(t - c).nan_to_num(0, 0, 0) for t in (a, b)])
        size = float(vectors.square().mean().sqrt()) if c.numel() else 0.0  # the step of sums is a sixteenth of this, over like tensors
        most = float(vectors.sum(0).abs().max()) if c.numel() else 0.0
        rounded(got[name], expected, f"pack: {name}", 0.1 * size + 2**-8 * most)
