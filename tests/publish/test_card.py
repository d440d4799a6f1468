"""Model cards, from files alone."""

from __future__ import annotations

from pathlib import Path

from peru_cli.publish.card import Contents, card

ROUTED = Path(__file__).resolve().parents[1] / "golden" / "routed" / "routed.safetensors"


def test_the_card_of_routed_experts_runs_them_and_unpacks_nothing() -> None:
    text = card(Contents({"r.safetensors": ROUTED}, {}, {"r.safetensors": ROUTED}), "me/r")
    assert "peru eval me/r --base example/base@0123abc --data TASK=FILE" in text and "npack" not in text
    assert f"| `r.safetensors` | a, b | {ROUTED.stat().st_size:,} | experts of rank 3 for 3 layers, among which inputs choose |" in text
