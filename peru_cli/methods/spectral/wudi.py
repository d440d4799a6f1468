"""WUDI: the task vector that interferes least with every task's own, which stands in for the task's inputs.

    minimise sum_t |(tau - tau_t) tau_t^T|^2 / |tau_t|^2:   tau (sum_t G_t) = sum_t tau_t G_t,   G_t = tau_t^T tau_t / |tau_t|^2

Source: Cheng et al., Whoever Started the Interference Should End It (2025), https://arxiv.org/abs/2503.08099, equation 12. The
authors take 300 steps of Adam from sum_t tau_t. This is the optimum, which is RegMean's solve. In directions that matter little
to every task, the authors' iteration stays near its start; `--ridge`, a share of the mean diagonal of sum_t G_t, has
the same effect: it pulls towards sum_t tau_t. Tensors that are not matrices are averaged. The method collapses if task
vectors differ much in norm: give the long ones a smaller `--weight`."""

from __future__ import annotations

import torch

from peru_cli.methods.matrices import Matrices, SpectralRule

_TINY = 1e-300


class Wudi(SpectralRule):
    """See the module."""

    def held(self, rows: int, columns: int, tasks: int, itemsize: int) -> int:
        return 8 * (4 * rows * columns + 4 * columns**2)

    def merge_matrix(self, matrices: Matrices) -> torch.Tensor:
        grams = above = total = matrices.tensor(0).new_zeros(())
        for task in range(matrices.tasks):
            vector = self.vector(matrices, task)
            gram = vector.T @ vector
            gram /= gram.diagonal().sum().clamp(min=_TINY)
            grams, above, total = grams + gram, above + vector @ gram, total + vector
        pull = self.parameters.number("ridge") * float(grams.diagonal().mean())
        if not float(grams.diagonal().sum()):
            return total  # nothing has changed
        grams.diagonal().add_(pull or 1e-15)
        solved: torch.Tensor = torch.linalg.solve(grams, (above + pull * total).T).T  # the Gram matrices are symmetric
        return solved * self.parameters.number("scale")
