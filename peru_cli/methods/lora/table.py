"""The table of coordinates for LoRAs, which the command line reads without torch. A new one is a function and its shape in spaces.py,
and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Listed:
    """One line of the table."""

    title: str
    paper: str


SPACES: Mapping[str, Listed] = {
    "knots": Listed("merge LoRAs in the left singular vectors of all updates side by side", "https://arxiv.org/abs/2410.19735"),
    "core-space": Listed("merge LoRAs as small matrices in common bases of both factors", "https://arxiv.org/abs/2509.17786"),
}
