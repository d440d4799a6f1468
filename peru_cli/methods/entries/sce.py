"""SCE: select the entries that differ most between tasks, weight tasks by their energy, erase the minority's sign.

    select  the top `keep` of the entries with non-zero variance over tasks, in each tensor
    w_t     mean of tau_t^2 over the selected entries, divided by its sum over tasks: a weight for each tensor
    erase   the sign of sum_t tau_t wins, where 0 is positive;   tau = sum w_t m_t tau_t / max(sum w_t m_t, 1e-6)

Source: Wan et al., FuseChat (2024), https://arxiv.org/abs/2408.07990, section 3.3: SCE; the paper selects 10%. Equal
variances are taken in canonical order."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from peru_cli.kernels.merging.panels import erased, spread
from peru_cli.kernels.merging.sums import halved_sum
from peru_cli.kernels.merging.verbs import Flags
from peru_cli.methods.matrices import Matrices, MatrixRule, Panels
from peru_cli.methods.order import Counts, Keys, Taken, kept, largest
from peru_cli.methods.parameters import Parameters
from peru_cli.streaming.arrays import Host

_LEAST = 1e-6


@dataclass(frozen=True)
class _Selected:
    """Which entries of a tensor are selected (None: all, False: none), and each task's weight."""

    taken: Taken | bool | None
    weights: list[float]


class Sce(MatrixRule):
    """See the module."""

    by_rows = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.studies = 3 if parameters.share("keep") < 1 else 1

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def _count(self, share: Fraction, n: int) -> int:
        """floor(share * n). mergekit multiplies a tensor's count by a number, which torch does in float32."""
        return int(np.float32(n) * np.float32(share)) if self.parameters.in_doubles else int(share * n)

    def _select(self, panels: Panels) -> Taken | bool | None:
        share = self.parameters.share("keep")
        if share >= 1:
            return None
        counts: dict[str, Counts] = {}

        def count(panel: Matrices) -> int:
            keys = _keys(_vectors(panel))
            counts.setdefault(keys.dtype.str[1:], Counts(keys.dtype.str[1:])).add(keys)
            return int(np.count_nonzero(keys))

        k = self._count(share, sum(panels.each(count)))
        (counted,) = counts.values()
        return largest(panels, counted, lambda panel: _keys(_vectors(panel)), [k])[0] if k else False

    def study(self, panels: Panels) -> _Selected:
        taken = self._select(panels)

        def energies(panel: Matrices) -> tuple[int, list[float]]:
            vectors = _vectors(panel)
            flags = _flags(vectors, taken, panel.number)
            return len(flags), [halved_sum(vector, "square", flags) for vector in vectors]

        found = panels.each(energies)
        n, sums = sum(n for n, _ in found), [0.0] * len(found[0][1])
        for _, more in found:
            sums = [a + b for a, b in zip(sums, more, strict=True)]
        total = sum(sums)
        return _Selected(taken, [energy / total if total / n >= _LEAST else 1 / len(sums) for energy in sums])

    def merge_matrix(self, matrices: Matrices) -> Host:
        chosen, vectors = matrices.studied, _vectors(matrices)
        flags = _flags(vectors, chosen.taken, matrices.number)
        return erased(vectors, flags, chosen.weights, _LEAST, self.parameters.number("scale"))


def _vectors(panel: Matrices) -> list[Host]:
    return [panel[task].reshape(-1) for task in range(panel.tasks)]


def _keys(vectors: list[Host]) -> Keys:
    """Keys of the variances, which are never negative: their patterns."""
    variance = spread(vectors)
    return variance.view(f"i{variance.itemsize}")


def _flags(vectors: list[Host], taken: Taken | bool | None, panel: int) -> Flags:
    if not isinstance(taken, Taken):
        return np.full(len(vectors[0]), taken is None)
    return kept(_keys(vectors), taken, panel)
