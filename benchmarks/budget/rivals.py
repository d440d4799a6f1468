"""Published ways to compress one fine-tune, without data, in plain torch on state dicts, with all bytes counted.

Every function takes the base's and the fine-tune's encoder (float32 tensors with the same names) and returns the rebuilt encoder
and its bytes. What the papers leave open is the same for all, and generous:

- matrices with unchanged rows (word embeddings) are coded by their changed rows; the list of these rows is counted;
- one-dimensional tensors are restored exactly, as entropy-coded differences of bit patterns (0.006 bits a parameter here);
- sparse and quantised values cost their order-0 entropy per tensor and a table of the values, which no real coder beats by
  much; signs that fill a matrix cost one bit, factors their stored width; scales are 16 bits each.

Names, shapes and a container are not counted, although peru's own bytes include them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Result = tuple[Tensors, float]  # the rebuilt encoder, and bytes
SCALE_BYTES = 2
GROUP = 128  # entries that share a scale, as in Delta-CoMe's GPTQ


def each_matrix(base: Tensors, fine: Tensors, code: Callable[[str, Tensor], tuple[Tensor, float]]) -> Result:
    """Code the changed rows of every matrix's difference by `code(name, rows)`; the rest as described above."""
    result, nbytes = dict(base), small_tensors(base, fine)
    for name, tensor in base.items():
        if tensor.dim() < 2:
            result[name] = fine[name]
            continue
        rows = (fine[name] != tensor).any(dim=1)
        if not rows.any():
            continue
        coded, cost = code(name, (fine[name] - tensor)[rows])
        result[name] = tensor.clone()
        result[name][rows] += coded
        nbytes += cost + len(rows) * binary_entropy(rows.float().mean().item()) / 8
    return result, nbytes


def small_tensors(base: Tensors, fine: Tensors) -> float:
    """Bytes of all one-dimensional tensors as differences of their bfloat16 patterns, in one stream."""
    pairs = [(ordered(fine[name]), ordered(tensor)) for name, tensor in base.items() if tensor.dim() < 2]
    return entropy_bytes(torch.cat([ours - theirs for ours, theirs in pairs]))


def ordered(tensor: Tensor) -> Tensor:
    """bfloat16 patterns as integers that ascend with the value."""
    bits = tensor.to(torch.bfloat16).view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def binary_entropy(share: float) -> float:
    """Bits of one entry of a mask."""
    return 0.0 if share in (0.0, 1.0) else -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def entropy_bytes(symbols: Tensor, value_bytes: int = 2) -> float:
    """Bytes of `symbols` at their order-0 entropy, plus a table of every value that occurs and its count."""
    counts = torch.unique(symbols, return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(-(counts * share.log2()).sum() / 8) + len(counts) * (value_bytes + 2)


def bit_delta(base: Tensors, fine: Tensors) -> Result:
    """BitDelta (Liu et al. 2024): signs and the mean magnitude of each matrix. Its scale distillation needs data."""

    def code(_: str, delta: Tensor) -> tuple[Tensor, float]:
        return torch.where(delta > 0, 1.0, -1.0) * delta.abs().mean(), delta.numel() / 8 + SCALE_BYTES

    return each_matrix(base, fine, code)


def d_qrelo(base: Tensors, fine: Tensors, rank: int) -> Result:
    """D-QReLO (Li et al. 2026, from its abstract only): one sign and a mean magnitude a matrix, then its residual's SVD in bfloat16."""

    def code(_: str, delta: Tensor) -> tuple[Tensor, float]:
        coarse = torch.where(delta > 0, 1.0, -1.0) * delta.abs().mean()
        left, right = factors(delta - coarse, rank)
        cost = delta.numel() / 8 + SCALE_BYTES + 2 * (left.numel() + right.numel())
        return coarse + left.bfloat16().float() @ right.bfloat16().float(), cost

    return each_matrix(base, fine, code)


def low_rank(base: Tensors, fine: Tensors, rank: int) -> Result:
    """Low-rank residual, what `peru svd-lora MODEL --base BASE --rank` extracts, of word embeddings too, in bfloat16."""

    def code(_: str, delta: Tensor) -> tuple[Tensor, float]:
        left, right = factors(delta, rank)
        return left.bfloat16().float() @ right.bfloat16().float(), 2 * (left.numel() + right.numel())

    return each_matrix(base, fine, code)


def delta_come(base: Tensors, fine: Tensors, two_bit: float) -> Result:
    """Delta-CoMe (Ping et al. 2024; ranks of its run.sh, "8 + 3 + 2"): singular vectors of 8, 3 and 2 bits, by singular value.

    Its ranks for width 4096 (2, 32 and 968, of which `two_bit` is the share taken) are scaled to the matrix's smaller side. Rounded
    to the nearest level with searched scales: GPTQ, which they use, needs data.
    """

    def code(_: str, delta: Tensor) -> tuple[Tensor, float]:
        side, cost, result = min(delta.shape), 0.0, torch.zeros_like(delta)
        left, right = factors(delta, side)
        start = 0
        for bits, count in ((8, 2), (3, max(1, round(32 * side / 4096))), (2, round(two_bit * 968 * side / 4096))):
            ours, theirs = left[:, start : start + count].T, right[start : start + count]
            start += count
            if not len(ours):
                continue
            result += rounded(ours, bits).T @ rounded(theirs, bits)
            groups = sum(math.ceil(part.shape[1] / GROUP) for part in (ours, theirs))
            cost += (ours.numel() + theirs.numel()) * bits / 8 + len(ours) * groups * SCALE_BYTES
        return result, cost

    return each_matrix(base, fine, code)


def rounded(vectors: Tensor, bits: int) -> Tensor:
    """Each row's groups of GROUP entries at 2^bits uniform levels around zero, with the best of 16 scales (rows, entries)."""
    length = vectors.shape[1]
    groups = torch.nn.functional.pad(vectors, (0, -length % GROUP)).unflatten(1, (-1, GROUP))
    peak, half = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30), 2 ** (bits - 1)
    best, least = torch.zeros_like(groups), torch.full_like(peak, math.inf)
    for shrink in torch.linspace(0.35, 1, 16):
        step = (shrink * peak / (half - 0.5)).half().float().clamp_min(1e-7)
        tried = ((groups / step).floor().clamp(-half, half - 1) + 0.5) * step
        error = (tried - groups).square().sum(dim=-1, keepdim=True)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best.flatten(1)[:, :length]


def factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of at most `rank`: (rows, rank) and (rank, columns), singular values split evenly."""
    turned = delta.shape[0] < delta.shape[1]
    wide = (delta.T if turned else delta).double()
    values, right = torch.linalg.eigh(wide.T @ wide)
    right = right.flip(1)[:, :rank]
    left = wide @ right
    root = values.flip(0)[:rank].clamp_min(1e-30).pow(0.25)
    left, right = (left / root).float(), (right * root).T.float()
    return (right.T, left.T) if turned else (left, right)


def one_scale(base: Tensors, fine: Tensors, share: float) -> Result:
    """Like T-Switch (Qi et al. 2025), with one threshold and one scale for all: the largest `share` of all entries, and their signs.

    The scale preserves the length of the whole task vector. On 200 test examples of sst2 and of agnews this one had a third of the KL
    of the least-squares scale. T-Switch's authors preserve the length of what is kept, tensor by tensor."""
    names = [name for name in base if base[name].dim() > 1]
    delta = torch.cat([(fine[name] - base[name]).flatten() for name in names])
    count = round(share * sum(tensor.numel() for tensor in base.values()))
    threshold = delta.abs().kthvalue(len(delta) - count + 1).values
    scale = delta.norm() / (delta.abs() >= threshold).sum().sqrt()

    def code(_: str, rows: Tensor) -> tuple[Tensor, float]:
        symbols = rows.sign() * (rows.abs() >= threshold)
        return symbols * scale, entropy_bytes(symbols, 1)

    result, nbytes = each_matrix(base, fine, code)
    return result, nbytes + SCALE_BYTES


def ultra_delta(base: Tensors, fine: Tensors, sparsity: float, embeddings: bool, factor: float = 1.0) -> Result:
    """UltraDelta (Wang et al. 2025; order of steps and constants of the authors' code).

    Each matrix is quantised at 16 uniform levels between its extremes. Then entries are dropped at random within each level: in the
    matrices of least deviation, which hold a third of all entries, a share of `sparsity` + 0.01; in the middle third `sparsity`; in the
    last third as much less as preserves the mean. What is left is divided by 1 - `sparsity` and multiplied by `factor` (trace_factors).
    Linear layers only, as published, or with `embeddings`."""
    noise = torch.Generator().manual_seed(0)
    chosen = {name: delta for name, delta in _matrices(base, fine) if embeddings or "embeddings" not in name}
    rates = _rates({name: (delta.std(), delta.numel()) for name, delta in chosen.items()}, sparsity)

    def code(name: str, delta: Tensor) -> tuple[Tensor, float]:
        if name not in chosen:
            return torch.zeros_like(delta), 0.0
        low, high = delta.min(), delta.max()
        levels = ((delta - low) / (high - low) * 15).round().flatten()
        order = torch.randperm(len(levels), generator=noise)
        order = order[levels[order].argsort(stable=True)]
        counts = torch.unique(levels, return_counts=True)[1]
        within = torch.arange(len(levels)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        kept = within >= torch.repeat_interleave((counts * rates[name]).round(), counts)
        mask = torch.zeros(len(levels), dtype=torch.bool)
        mask[order[kept]] = True
        values = (low + levels * (high - low) / 15) * factor / (1 - sparsity)
        return (values * mask).view_as(delta), entropy_bytes(torch.where(mask, levels, -1), 1) + 2 * SCALE_BYTES

    return each_matrix(base, fine, code)


def trace_factors(base: Tensors, pruned: dict[str, Tensors]) -> dict[str, float]:
    """UltraDelta's rescaling by the trace norm, as in its code: the least norm of all tasks / the task's own."""
    norms = {
        task: sum(torch.linalg.matrix_norm(delta, "nuc").item() for name, delta in _matrices(base, tensors) if "embeddings" not in name)
        for task, tensors in pruned.items()
    }
    return {task: min(norms.values()) / norm for task, norm in norms.items()}


def _matrices(base: Tensors, fine: Tensors) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in base.items():
        rows = (fine[name] != tensor).any(dim=-1)
        if tensor.dim() > 1 and rows.any():
            yield name, (fine[name] - tensor)[rows]


def _rates(sizes: dict[str, tuple[Tensor, int]], sparsity: float, step: float = 0.01) -> dict[str, float]:
    """The share of each matrix to drop, from its deviation and number of entries; `step` is smaller if there is no room."""
    total, seen, rates = sum(size for _, size in sizes.values()), 0, {}
    step = min(step, (1 - sparsity) / 2)
    spent, last = 0.0, []
    for name, (_, size) in sorted(sizes.items(), key=lambda item: float(item[1][0])):
        seen += size
        if 3 * seen <= 2 * total:
            rates[name] = sparsity + step if 3 * seen <= total else sparsity
            spent += rates[name] * size
        else:
            last.append((name, size))
    rest = sum(size for _, size in last)
    return rates | {name: max(0.0, (sparsity * total - spent) / rest) for name, _ in last}
