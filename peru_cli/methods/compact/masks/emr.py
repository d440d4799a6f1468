"""EMR puts another vector u in place of the sum, and gives each task a scale l_t of its own.

    s = sign(sum_t tau_t)      u = s * max over t of |tau_t| where tau_t has the sign s      m_t = [tau_t s > 0]
    theta_t^ = theta_0 + scale * l_t * m_t * u      l_t = sum |tau_t| / sum |m_t u|

Source: Huang et al., EMR-Merging (2024), https://arxiv.org/abs/2405.17461, section 3.2. A sum of 0 has the sign -, as in the
authors' program; that adds up the means of each tensor for l_t, where the paper's equation adds up entries, as here."""

from __future__ import annotations

import numpy as np

from peru_cli.methods.compact.masking import Doubles, Flags, add_up
from peru_cli.methods.compact.masks.table import MaskMethod


def unify(rows: Doubles) -> Doubles:
    """EMR's u: the elected sign, and the largest magnitude of a task that has it; (tasks, n) -> (n,)."""
    sign = np.where(add_up(rows) > 0, 1.0, -1.0)
    largest = np.zeros_like(rows[0])
    for row in rows:
        np.maximum(largest, row * sign, out=largest)
    unified: Doubles = largest * sign
    return unified


def emr_mask(vector: Doubles, unified: Doubles) -> Flags:
    """[tau_t has the sign of u], never zeros; bools (n,)."""
    agrees: Flags = ((vector > 0) & (unified > 0)) | ((vector < 0) & (unified < 0))
    return agrees


class Emr(MaskMethod):
    """There is no threshold."""

    def shared(self, rows: Doubles) -> Doubles:
        return unify(rows)

    def stored(self, rows: Doubles) -> Doubles | None:
        return unify(rows)

    def parts(self, vector: Doubles, shared: Doubles | None) -> tuple[Doubles, ...]:
        assert shared is not None
        return vector, shared

    def mask(self, parts: tuple[Doubles, ...], threshold: float, equals: bool) -> Flags:
        return emr_mask(*parts)
