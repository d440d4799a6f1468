"""Ranks in `peru inspect`: the spectra of an adapter, and what an adapter of a fine-tune would keep and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError

if TYPE_CHECKING:
    from peru_cli.checkpoints.source import Checkpoint
    from peru_cli.lora.spectra import RankPlan, Spectrum


def show_adapter(model: str, base: str | None, plot: Path | None, device: str, threads: int | None, every: bool) -> None:
    """Print ranks, scales, spectra and the error by rank of an adapter."""
    from peru_cli.checkpoints.lora.adapter import REST, Adapter
    from peru_cli.checkpoints.places import locate, size_of
    from peru_cli.lora.spectra import RANKS, adapter_spectra, rank_plans
    from peru_cli.reports.plots import plot_spectra
    from peru_cli.vectors.settings import streaming

    if base is not None:
        raise UsageError(f"{model} is an adapter; --base goes with a checkpoint", "`peru unpack` folds it into its base")
    with Adapter(locate(model), model) as adapter:
        if not adapter.modules:
            size = size_of(adapter.weights)
            console.line(f"{model}: {adapter.kind}, {si_bytes(size)}; its updates are not pairs of factors, so they have no ranks")
            console.result({"kind": adapter.kind, "layout": adapter.layout, "file_bytes": size, "modules": []})
            return
        total = sum(module.down.entries + module.up.entries for module in adapter.modules)
        with console.progress(total, "inspect") as progress, streaming(device, threads, None, progress.advance) as how:
            spectra = adapter_spectra(adapter, how)
        size = size_of(adapter.weights)
        console.line(f"{model}: {adapter.kind}, {si_bytes(size)}")
        facts = {
            "base": adapter.config.get("base_model_name_or_path"),
            "r": adapter.config.get("r"),
            "alpha": adapter.config.get("lora_alpha"),
            "rsLoRA": adapter.config.get("use_rslora") or None,
        }
        if shown := ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None):
            console.line(shown)
        whole = sum(adapter.file.tensors[name].nbytes for name in adapter.whole.values())
        if whole:
            console.line(
                f"stored whole, {si_bytes(whole)}: {', '.join(sorted(adapter.whole)[:4])}{', ...' if len(adapter.whole) > 4 else ''}"
            )
        rest = locate(model) / REST
        if rest.is_file():
            console.line(f"beside it, {si_bytes(size_of(rest))}: {REST}, for what the adapter cannot hold (see `peru inspect`)")
        most = max(module.rank for module in adapter.modules)
        ranks = [rank for rank in RANKS if rank < most]
        plans = rank_plans(spectra, [*ranks, most])
        console.line()
        _spectra(spectra, ranks, with_scale=True, every=every)
        console.line()
        _plans(plans, size - sum(module.nbytes for module in adapter.modules), size)
        console.result(
            {
                "kind": adapter.kind,
                "layout": adapter.layout,
                "file_bytes": size,
                "whole_bytes": whole,
                **facts,
                "modules": [spectrum.json() for spectrum in spectra],
                "rank_plans": [vars(plan) for plan in plans],
            }
        )
        if plot is not None:
            values = [[float(energy) ** 0.5 for energy in spectrum.energies if energy > 0] for spectrum in spectra]
            plot_spectra(
                plot, [s.name for s in spectra], values, [p.rank for p in plans], [p.bytes / 1e6 for p in plans], [p.error for p in plans]
            )
            console.note(f"drew {plot}")


def show_ranks(fine: Checkpoint, base: Checkpoint, per_task: str | None, device: str, threads: int | None, every: bool) -> dict[str, Any]:
    """Print effective ranks of a fine-tune's task vectors, and cost and error of ranks 4 to 64. Returns what --json adds."""
    from peru_cli.lora.extract_plan import plan_extraction
    from peru_cli.lora.spectra import RANKS, rank_plans, task_spectra
    from peru_cli.vectors.settings import streaming

    try:
        plan = plan_extraction("fine-tune", fine, base, per_task, for_peft=False)
    except UsageError:  # no weight matrix: there are no ranks
        return {"ranks": [], "rank_plans": []}
    total = sum(weight.pair.entries for weight in plan.weights)
    with console.progress(total, "ranks") as progress, streaming(device, threads, None, progress.advance) as how:
        spectra = task_spectra(plan, how)
    plans = rank_plans(spectra)
    console.line()
    _spectra(spectra, RANKS, with_scale=False, every=every)
    console.line()
    console.table(
        ["peru svd-lora", ">bytes of factors", ">relative error"], [[f"--rank {p.rank}", count(p.bytes), f"{p.error:.3f}"] for p in plans]
    )
    others = sum(info.nbytes for info in fine.tensors.values()) - sum(weight.pair.fine.nbytes for weight in plan.weights)
    console.line(
        f"factors of {plural(len(spectra), 'weight')} alone; {si_bytes(others)} of other tensors are stored whole where they changed"
    )
    return {"ranks": [spectrum.json() for spectrum in spectra], "rank_plans": [vars(plan) for plan in plans]}


def _spectra(spectra: Sequence[Spectrum], ranks: Sequence[int], with_scale: bool, every: bool) -> None:
    from peru_cli.reports.fold import fold

    rows = []
    for name, members in fold(spectra, lambda s: s.name, lambda s: s.name if every else (s.blocks, s.rows, s.columns, s.rank, s.scale)):
        s, squared = members[0], sum(s.squared for s in members)
        row = [name, str(len(members)), "x".join(map(str, [*([s.blocks] if s.blocks > 1 else []), s.rows, s.columns]))]
        row += [str(s.rank), f"{s.scale:.4g}"] if with_scale else []
        row += [f"{math.sqrt(squared):.4g}", f"{sum(s.effective_rank for s in members) / len(members):.1f}"]
        errors = {rank: math.sqrt(sum(s.dropped(rank) for s in members) / squared) if squared else 0.0 for rank in ranks}
        rows.append([*row, *("" if s.rank is not None and rank >= s.rank else f"{error:.3f}" for rank, error in errors.items())])
    names = ["module", "?>count", ">shape", *([">rank", ">scale"] if with_scale else []), "?>norm", "?>effective rank"]
    console.table([*names, *(f">error at {rank}" for rank in ranks)], rows)


def _plans(plans: Sequence[RankPlan], more: int, before: int) -> None:
    rows = [
        [f"--rank {p.rank}", count(p.bytes), f"{before / max(p.bytes + more, 1):.1f}x", f"{p.error:.3f}"]
        for p in plans
    ]  # fmt: skip
    console.table(["peru svd-lora", ">bytes of factors", ">smaller", ">relative error"], rows)
