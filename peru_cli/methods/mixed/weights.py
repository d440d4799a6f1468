"""How much an error matters by the kind of tensor, and how to compensate for dropped directions. Uses no data.

Both were measured on fine-tunes of MiniLM (docs/results.md, "Budgets"), by the KL divergence of outputs when only one kind of
tensor has errors. Names that match no pattern have weight 1."""

from __future__ import annotations

import re

VECTOR = 8.0  # an error in a bias reaches every activation whole, one in a matrix is multiplied by an activation that is mostly below one
REGAINED = 0.12  # exponent of `regain`
_KINDS = (
    # Attention scores are compared with each other: the softmax ignores what they all share.
    (re.compile(r"(^|[._])(query|key|[qk]|[qk]_proj|[qk]_lin|w[qk]|to_[qk]|query_proj|key_proj)\.weight$"), 0.5),
    # A row counts only where its token occurs.
    (re.compile(r"(^|[._])(word_embeddings|embed_tokens|tok_embeddings|wte|embed_in)\.weight$"), 0.5),
    # All outputs pass through it, and no later layer evens errors out.
    (re.compile(r"(^|[._])pooler(\.dense)?\.weight$"), 16.0),
)


def weight_of(name: str, is_matrix: bool) -> float:
    """The weight of a squared error in a tensor. `is_matrix` says whether it has singular vectors."""
    if not is_matrix:
        return VECTOR
    return next((weight for pattern, weight in _KINDS if pattern.search(name)), 1.0)


def regain(squared: float, kept: float) -> float:
    """The factor that lengthens kept directions, from the squared norms of a matrix and of its kept part.

    A fine-tune's outputs move along its task vector: dropping parts of it makes them move less. Longer kept directions bring
    outputs nearer, although the weights are slightly further off. Restoring the whole norm would be the exponent 1/2. That
    overshoots: dropped directions are mostly noise."""
    return (squared / kept) ** REGAINED if 0 < kept < squared else 1.0
