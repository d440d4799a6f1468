"""`peru svd-lora MODEL --base BASE`: a full fine-tune as an adapter, the best low-rank approximation of its task vector.

Every weight's task vector is streamed in panels, several weights at once. If all singular values are wanted or the
smaller side is short, its Gram matrix is decomposed. Otherwise power iterations find the leading ones. Either way the
error is measured on the stored factors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peru_cli.checkpoints.base_name import BaseName, hub_repo
from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.atomic import PartialDirectory
from peru_cli.checkpoints.local.writer import CheckpointWriter, header_bytes
from peru_cli.checkpoints.lora.bound import BASE_TENSORS, bound_to
from peru_cli.checkpoints.lora.config import new_config
from peru_cli.checkpoints.lora.keys import OUTER
from peru_cli.checkpoints.lora.module import LINEAR, PARAMETER
from peru_cli.checkpoints.lora.writer import adapter_writer, as_bytes, beside, round_to
from peru_cli.checkpoints.pairing import Pair
from peru_cli.errors import BadFile, UsageError
from peru_cli.lora.extract_plan import Extraction, Rest, Weight, plan_rest
from peru_cli.lora.passes import FactorPass, TargetPass, each_named
from peru_cli.lora.ranks import AdapterReport, Array, ModuleReport, Wanted, choose_ranks
from peru_cli.lora.remainder import write_delta
from peru_cli.lora.weights import Weights, grouped
from peru_cli.prune import doubts
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings
from peru_cli.vectors.task_matrix import TaskMatrix
from peru_cli.version import __version__

_FIRST_GUESS = 64  # singular values computed at first, if the number is not given


@dataclass
class Options:
    """Options of the command line besides ranks."""

    in_modules: bool = True
    base_name: BaseName | None = None


class Energies(TargetPass):
    """Squared singular values of every weight, as many as requested, summed over blocks."""

    def __init__(
        self, plan: Extraction, weights: Sequence[Weight], wanted: Wanted, how: StreamSettings, enough: int = _FIRST_GUESS
    ) -> None:
        self._matrices = Weights(plan, weights, wanted, how)
        super().__init__(how, [weight.pair.entries for weight in weights])
        self.weights = weights
        self.enough: list[int] = [enough] * len(weights)
        self.energies: list[Array] = [np.zeros(0)] * len(weights)
        self.squared = [0.0] * len(weights)
        self.ask(range(len(weights)))

    def ask(self, numbers: Sequence[int]) -> None:
        """Choose the weights of the next run."""
        self.groups: Sequence[Sequence[int]] = grouped(self.weights, numbers, self.enough)

    def apply(self, tile: Tile, buffers: None) -> list[tuple[Array, float]]:
        group = self.groups[tile.tensor]
        first = self.weights[group[0]]
        most = min(self.enough[group[0]], first.rows, first.columns)
        result = [(np.zeros(most), 0.0) for _ in group]
        for part in self._matrices.parts(group):
            found = self._matrices.leading(part, most)
            values, norms = found.values.square().cpu().numpy()[:, :most], iter(found.squared)
            for i, mine in enumerate(np.split(values, len(group))):
                total, squared = result[i]
                for each in mine:
                    total[: len(each)] += each
                    squared += next(norms)
                result[i] = total, squared
        return result

    def commit(self, tile: Tile, result: list[tuple[Array, float]]) -> None:
        for number, found in zip(self.groups[tile.tensor], result, strict=True):
            self.energies[number], self.squared[number] = found

    def more(self, numbers: Sequence[int]) -> bool:
        """Request twice as many values of some weights, if there are more. Returns whether there are any."""
        left = [n for n in numbers if self.enough[n] < min(self.weights[n].rows, self.weights[n].columns)]
        for number in left:
            self.enough[number] *= 2
        self.ask(left)
        return bool(left)


def choose(plan: Extraction, weights: Sequence[Weight], wanted: Wanted, dtype: Dtype, fixed_bytes: int, how: StreamSettings) -> list[int]:
    """The rank of each weight; 0 if its factors would be no smaller than the weight."""
    if wanted.rank is not None:
        ranks = [min(wanted.rank, weight.rows, weight.columns) for weight in weights]
        return [rank if rank <= weight.largest_rank else 0 for rank, weight in zip(ranks, weights, strict=True)]
    search = Energies(plan, weights, wanted, how)
    costs = [dtype.nbytes(weight.blocks * (weight.rows + weight.columns)) for weight in weights]
    while True:
        run(search, search.tiles(), how.threads, how.advance)
        energies = search.energies
        if wanted.energy is not None:
            # values not computed count as one more: it is chosen only if all computed values are not enough
            padded = [np.append(e, max(s - e.sum(), 0.0)) for e, s in zip(energies, search.squared, strict=True)]
            ranks = choose_ranks(wanted, padded, costs, fixed_bytes, plan.fine.label)
            short = [i for i, rank in enumerate(ranks) if rank > len(energies[i])]
        else:
            capped = [e[: weight.largest_rank] for e, weight in zip(energies, weights, strict=True)]
            ranks = choose_ranks(wanted, capped, costs, fixed_bytes, plan.fine.label)
            short = [i for i, rank in enumerate(ranks) if rank == len(energies[i]) < weights[i].largest_rank]
        if not search.more(short):
            break
    ranks = [min(rank, weight.rows, weight.columns) for rank, weight in zip(ranks, weights, strict=True)]
    return [rank if rank <= weight.largest_rank else 0 for rank, weight in zip(ranks, weights, strict=True)]


class _Write(FactorPass):
    """Computes the factors of every weight, writes them and measures their error."""

    def __init__(
        self, plan: Extraction, weights: Sequence[Weight], wanted: Wanted, ranks: Sequence[int], stored: Sequence[int], dtype: Dtype,
        writer: CheckpointWriter, how: StreamSettings,
    ) -> None:  # fmt: skip
        self._matrices = Weights(plan, weights, wanted, how)
        groups = grouped(weights, range(len(weights)), ranks)
        super().__init__(how, [weight.pair.entries for weight in weights], ranks, stored, writer, groups)
        self._plan, self._weights, self._dtype = plan, weights, dtype

    def apply(self, tile: Tile, buffers: None) -> list[ModuleReport]:
        group = self.groups[tile.tensor]
        weights, first, stored = [self._weights[n] for n in group], self._weights[group[0]], self._stored[group[0]]
        reports = [
            ModuleReport(w.name, w.rows, w.columns, w.blocks, None, stored, self._dtype.nbytes(stored * w.blocks * (w.rows + w.columns)))
            for w in weights
        ]
        names = [weight.name for weight in weights]
        ups, downs, kept = [], [], [0.0] * len(weights)
        for part in self._matrices.parts(group):
            found = self._matrices.leading(part, self._ranks[group[0]])
            fitted = self._matrices.fit(part, found, self._ranks[group[0]], each_named(self._rounded, names))
            left, right = (fitted.right.mT, fitted.left.mT) if first.transposed else (fitted.left, fitted.right)
            up, down = self.padded(left, right, stored)
            ups.append(up.view(len(weights), len(up) // len(weights), *up.shape[1:]))
            downs.append(down.view(len(weights), len(down) // len(weights), *down.shape[1:]))
            each = len(fitted.squared) // len(weights)
            energies = [float(values.sum()) for values in found.values[:, : self._ranks[group[0]]].square().unbind()]
            for i, (squared, error, energy) in enumerate(zip(fitted.squared, fitted.squared_error, energies, strict=True)):
                report = reports[i // each]
                report.squared += squared
                report.squared_error += error
                kept[i // each] += energy
        for report, energy in zip(reports, kept, strict=True):
            report.energy = min(energy / report.squared, 1.0) if report.squared else 1.0
        n, shapes = len(weights), first.shapes(stored)
        up = torch.cat(ups, 1).permute(0, 2, 3, 1)  # (n, rows, rank, blocks): experts innermost, as in peft
        joined = torch.cat(downs, 1).reshape(n, *shapes[0]), up.reshape(n, *shapes[1])
        self.write([_factor_names(weight, self._plan) for weight in weights], joined, self._dtype, names)
        return reports

    def _rounded(self, factor: torch.Tensor, what: str) -> torch.Tensor:
        return round_to(factor, self._dtype, what).double()


def _factor_names(weight: Weight, plan: Extraction) -> tuple[str, str]:
    path = weight.name
    if weight.kind == PARAMETER:
        path = _nested(weight, plan)
    return f"{OUTER}{path}.lora_A.weight", f"{OUTER}{path}.lora_B.weight"


def _nested(weight: Weight, plan: Extraction) -> str:
    """The path under which PEFT stores a parameter's factors: one `.base_layer` for each parameter that is wrapped later."""
    module = weight.name.rpartition(".")[0]
    leaves = [w.name.rpartition(".")[2] for w in plan.weights if w.kind == PARAMETER and w.name.rpartition(".")[0] == module]
    leaves.sort(key=lambda leaf: ("down" in leaf, leaf))
    return module + ".base_layer" * (len(leaves) - 1 - leaves.index(weight.name.rpartition(".")[2]))


# -- the job --------------------------------------------------------------------------------------------


def factor_dtype(plan: Extraction, wanted: Wanted) -> Dtype:
    """Dtype of the factors: the requested one, or that of most of the weights, at most float32."""
    if wanted.dtype is not None:
        return wanted.dtype
    dtypes = [weight.pair.fine.dtype for weight in plan.weights]
    most = max(dict.fromkeys(dtypes), key=dtypes.count)
    return BY_NAME["F32"] if most.bits > 32 else most


def extract(
    plan: Extraction, target: Path, wanted: Wanted, options: Options, how: StreamSettings, sync: bool, note: Callable[[str], None]
) -> AdapterReport:
    """Write one adapter into a new folder (below a PartialDirectory)."""
    note(f"{plan.name}: comparing with the base")
    changed = {info.name for info in plan.pairing.whole}
    changed |= {pair.fine.name for pair in plan.pairing.pairs if pair.grown}
    changed |= doubts.changed(plan.fine, plan.base, [pair for pair in plan.pairing.pairs if not pair.grown])
    weights = [weight for weight in plan.weights if weight.tensor in changed]
    dtype = factor_dtype(plan, wanted)
    note(f"{plan.name}: choosing ranks")
    fixed = _fixed_bytes(plan, weights, changed, options, dtype) if wanted.max_bytes is not None else 0
    ranks = choose(plan, weights, wanted, dtype, fixed, how)
    weights, ranks = [w for w, r in zip(weights, ranks, strict=True) if r], [r for r in ranks if r]
    if not weights:
        raise UsageError(f"{plan.fine.label}: every weight matrix that changed is smaller than its factors would be", "use `peru prune`")
    stored = [max(ranks)] * len(ranks) if wanted.uniform else ranks
    rest = plan_rest(plan, weights, changed, options.in_modules)
    tensors = _tensors(plan, weights, stored, rest, dtype)
    config = _config(plan, weights, stored, rest, options)
    metadata = {"peru.svd-lora.version": __version__, "peru.svd-lora.options": wanted.words()}
    metadata |= bound_to(plan.base, _under_factors(plan, weights))
    try:
        header_bytes(tensors, metadata, beside({}, _small_files(plan)))
    except BadFile as error:  # PEFT reads an adapter from one file
        problem = f"{plan.fine.label}: one file cannot hold an adapter of {len(weights):,} matrices: {error}"
        raise UsageError(problem, "use `peru prune`, whose artifacts hold any number of tensors") from error
    note(f"{plan.name}: factoring")
    with adapter_writer(target, tensors, config, _small_files(plan), metadata, sync) as writer:
        step = _Write(plan, weights, wanted, ranks, stored, dtype, writer, how)
        run(step, step.tiles(), how.threads, how.advance)
        for info in rest.saved:
            writer.copy(OUTER + plan.in_memory(info.name), plan.fine, info.name)
        for pair in rest.biases:
            matrix = TaskMatrix(plan.fine, plan.base, pair, pair.entries, 1, 0, torch.device("cpu"))
            difference = torch.cat([panel.view(-1) for _, panel in matrix.row_panels()])
            writer.write(_bias_name(plan, pair), 0, as_bytes(round_to(difference, dtype, pair.fine.name)))
        writer.commit()
    report = AdapterReport(plan.name, target, writer.nbytes, step.reports, plan.fine.nbytes)
    report.kept_bytes = sum(info.nbytes for info in rest.saved) + sum(dtype.nbytes(pair.entries) for pair in rest.biases)
    report.rest_bytes = write_delta(plan, rest.delta, target, options.base_name, how, sync) if rest.delta else 0
    report.notes = {
        "modules_to_save": list(rest.modules),
        "modules_to_save_bytes": sum(info.nbytes for info in rest.saved),
        "biases": len(rest.biases),
        "delta_tensors": [info.name for info in rest.delta],
        "unchanged": len(plan.fine.tensors) - len(changed),
    }
    return report


def _bias_name(plan: Extraction, pair: Pair) -> str:
    return f"{OUTER}{plan.in_memory(pair.fine.name).removesuffix('.bias')}.lora_B.bias"


def _tensors(plan: Extraction, weights: Sequence[Weight], ranks: Sequence[int], rest: Rest, dtype: Dtype) -> list[TensorInfo]:
    tensors = [TensorInfo(OUTER + plan.in_memory(info.name), info.dtype, info.shape) for info in rest.saved]
    tensors += [TensorInfo(_bias_name(plan, pair), dtype, pair.fine.shape) for pair in rest.biases]
    for weight, rank in zip(weights, ranks, strict=True):
        names = _factor_names(weight, plan)
        tensors += [TensorInfo(name, dtype, shape) for name, shape in zip(names, weight.shapes(rank), strict=True)]
    return tensors


def _fixed_bytes(plan: Extraction, weights: Sequence[Weight], changed: set[str], options: Options, dtype: Dtype) -> int:
    """Bytes of the adapter that do not depend on ranks."""
    rest = plan_rest(plan, weights, changed, options.in_modules)
    tensors = _tensors(plan, weights, [w.largest_rank for w in weights], rest, dtype)
    biases = sum(dtype.nbytes(pair.entries) for pair in rest.biases)
    told = {module: [info.dtype.name, list(info.shape), "0" * 32] for module, info in _under_factors(plan, weights).items()}
    metadata = {"peru.svd-lora.options": " " * 200, BASE_TENSORS: json.dumps(told)}
    header = header_bytes(tensors, metadata, beside({}, _small_files(plan)))
    return header + sum(info.nbytes for info in rest.saved) + biases


def _under_factors(plan: Extraction, weights: Sequence[Weight]) -> dict[str, TensorInfo]:
    """The base's tensors under the factors, by PEFT's module path."""
    paths = [_nested(weight, plan) if weight.kind == PARAMETER else weight.name for weight in weights]
    return {path: weight.pair.base for path, weight in zip(paths, weights, strict=True)}


def _config(plan: Extraction, weights: Sequence[Weight], ranks: Sequence[int], rest: Rest, options: Options) -> dict[str, Any]:
    modules = [weight.name for weight in weights if weight.kind != PARAMETER]
    parameters = [weight.name for weight in weights if weight.kind == PARAMETER]
    architectures = plan.config.get("architectures")
    causal = isinstance(architectures, list) and any(isinstance(a, str) and a.endswith("ForCausalLM") for a in architectures)
    name = options.base_name.name if options.base_name is not None else None
    repo, revision = (hub_repo(name) if name is not None else None) or (name, None)
    return new_config(
        {weight.name: rank for weight, rank in zip(weights, ranks, strict=True)},
        modules,
        parameters,
        repo,
        revision=revision,
        modules_to_save=list(rest.modules) or None,
        lora_bias=bool(rest.biases),
        fan_in_fan_out=any(weight.transposed and weight.kind == LINEAR for weight in weights),
        task_type="CAUSAL_LM" if causal else None,
    )


def _small_files(plan: Extraction) -> dict[str, bytes]:
    """Config and tokenizer files that differ from the base's."""
    found = {}
    for name, path in plan.fine.side_files.items():
        other = plan.base.side_files.get(name)
        content = path.read_bytes()
        if other is None or other.read_bytes() != content:
            found[name] = content
    return found


def extract_all(
    plans: Sequence[tuple[Extraction, Path]], target: Path, wanted: Wanted, options: Options, how: StreamSettings, sync: bool,
    note: Callable[[str], None],
) -> list[AdapterReport]:  # fmt: skip
    """Write several adapters below a folder (`.` for the folder itself). They appear at once."""
    with PartialDirectory(target, sync) as folder:
        reports = [extract(plan, folder.path / where, wanted, options, how, sync, note) for plan, where in plans]
        folder.commit()
    for report, (_, where) in zip(reports, plans, strict=True):
        report.path = target / where
    return reports
