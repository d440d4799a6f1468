"""How much an error matters by the kind of tensor that it is in, and what makes up for directions that are left out; no data.

Both were measured on fine-tunes of MiniLM (docs/results.md, "Budgets"): by the KL of outputs that an error in one kind of
tensor causes, the others being exact. Names that fit no pattern weigh 1.
"""

from __future__ import annotations

import re

VECTOR = 8.0  # an error in a bias reaches every activation whole, one in a matrix times an activation that is mostly below one
REGAINED = 0.12  # exponent of `regain`
_KINDS = (
    # Scores of attention are compared with each other: what all of them share is lost on the softmax.
    (re.compile(r"(^|[._])(query|key|[qk]|[qk]_proj|[qk]_lin|w[qk]|to_[qk]|query_proj|key_proj)\.weight$"), 0.5),
    # A row counts only where its token occurs.
    (re.compile(r"(^|[._])(word_embeddings|embed_tokens|tok_embeddings|wte|embed_in)\.weight$"), 0.5),
    # All outputs go through it, and nothing behind it evens errors out.
    (re.compile(r"(^|[._])pooler(\.dense)?\.weight$"), 16.0),
)


def weight_of(name: str, is_matrix: bool) -> float:
    """What a squared error in a tensor counts; `is_matrix` where it has singular vectors."""
    if not is_matrix:
        return VECTOR
    return next((weight for pattern, weight in _KINDS if pattern.search(name)), 1.0)


def regain(squared: float, kept: float) -> float:
    """The factor by which kept directions are made longer; from squared norms of a matrix and of what is kept of it.

    A fine-tune's outputs move along its task vector: whatever is left out of it makes them move less. So longer kept
    directions bring outputs nearer, though the weights themselves are a little further off. All of the norm back would be
    the exponent 1/2. That overshoots: directions that are left out are mostly noise.
    """
    return (squared / kept) ** REGAINED if 0 < kept < squared else 1.0
