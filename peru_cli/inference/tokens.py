"""What language models make of tokens: likelihoods, and how far two models are apart, in float64."""

from __future__ import annotations

import numpy as np
import torch

from peru_cli.inference.data import Array
from peru_cli.inference.inputs import IGNORED, counted_logits, counted_tokens
from peru_cli.inference.prepare import Loaded

_SLICE = 1 << 24  # logits processed together


def token_logits(loaded: Loaded, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, vocabulary) and actual next tokens (n,), for the n tokens of a batch that count."""
    labels = counted_tokens(batch, loaded.kind)
    return counted_logits(loaded.model, batch, loaded.kind)[0], labels[labels != IGNORED]


class TokenSums:
    """For each token: negative log-likelihood of both models, KL divergence, whether their top choices agree."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Array]] = {"ours": [], "theirs": [], "kl": [], "same": []}

    def add(self, came: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor | None) -> None:
        """Add some tokens, in float64: a KL near zero is a difference of nearly equal numbers."""
        step = max(1, _SLICE // ours.shape[1])
        for start in range(0, len(came), step):
            part, tokens = slice(start, start + step), came[start : start + step].unsqueeze(1)
            mine = torch.log_softmax(ours[part].double(), dim=-1)
            self._put("ours", -mine.gather(1, tokens))
            if theirs is not None:
                logs = torch.log_softmax(theirs[part].double(), dim=-1)
                self._put("theirs", -logs.gather(1, tokens))
                self._put("kl", (logs.exp() * (logs - mine)).sum(-1))
                self._put("same", logs.argmax(-1) == mine.argmax(-1))

    def _put(self, name: str, values: torch.Tensor) -> None:
        self.columns[name].append(values.flatten().cpu().numpy())

    def all(self, name: str) -> Array:
        """One column."""
        return np.concatenate(self.columns[name])
