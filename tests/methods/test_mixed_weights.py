"""The weight of an error by kind of tensor, and kept directions lengthened for dropped ones."""

from __future__ import annotations

import numpy as np
import pytest

from peru_cli.methods.mixed.directions import Spectrum, quantised
from peru_cli.methods.mixed.scales import product
from peru_cli.methods.mixed.weights import REGAINED, VECTOR, weight_of


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("bert.encoder.layer.0.attention.self.query.weight", 0.5),
        ("model.layers.3.self_attn.k_proj.weight", 0.5),
        ("decoder.block.0.layer.0.SelfAttention.q.weight", 0.5),
        ("model.layers.3.self_attn.v_proj.weight", 1.0),
        ("transformer.h.0.attn.c_attn.weight", 1.0),
        ("embeddings.word_embeddings.weight", 0.5),
        ("model.embed_tokens.weight", 0.5),
        ("embeddings.position_embeddings.weight", 1.0),
        ("bert.pooler.dense.weight", 16.0),
    ],
)
def test_errors_count_by_the_kind_of_tensor(name: str, weight: float) -> None:
    assert weight_of(name, True) == weight
    assert weight_of(name.replace("weight", "bias"), False) == VECTOR


def test_kept_directions_are_lengthened_for_dropped_ones() -> None:
    noise = np.random.default_rng(5)
    left, right = (np.linalg.qr(noise.standard_normal((n, 6)))[0] for n in (300, 200))
    values = np.array([80.0, 80.0, 80.0, 1.0, 1.0, 1.0])
    squares = np.square(left * values).sum(1) + 20  # the spectrum holds a part of it
    squared = float(squares.sum())
    spectrum = Spectrum(left, values, right, squared, squares)
    wanted = (left[:, :3] * values[:3]) @ right[:, :3].T
    for longer, factor in ((False, 1.0), (True, (squared / 19200) ** REGAINED)):
        found = quantised(spectrum, 0.008, longer)
        assert found is not None and len(found.scales) == 3
        made = product(found.left, found.right, found.scales)
        assert np.sum(made * wanted) / np.sum(wanted * wanted) == pytest.approx(factor, rel=0.01)
        missed = (left * values) @ right.T - made
        assert found.squared_errors == pytest.approx(np.square(missed).sum(1) + 20, rel=1e-9)
