"""Read every byte of a chain and compare it with its digests."""

from __future__ import annotations

from dataclasses import dataclass

from peru_cli.chain.links import Chain
from peru_cli.chain.read import damage, open_step
from peru_cli.errors import BadFile
from peru_cli.finetunes.verify import verify_expanded
from peru_cli.vectors.family import StreamSettings


@dataclass(frozen=True)
class Verdict:
    """The result for one step: `lost` says why it cannot be rebuilt, and is empty if it can."""

    step: int
    lost: str


def verify_chain(chain: Chain, how: StreamSettings) -> tuple[Chain, list[Verdict]]:
    """Check each link's own bytes, then rebuild each step that no other builds on: its digests prove all links below it.

    Returns the chain with broken links marked, and a verdict for each step, including missing ones."""
    for link in list(chain.links.values()):
        if not link.problem and (problem := damage(link)):
            chain = chain.broken(link.step, f"is damaged ({problem})")
    below = {link.on for link in chain.links.values()}
    for step in [step for step in chain.sound if step not in below]:
        try:
            with open_step(chain, step) as opened:
                verify_expanded([opened], how)
        except BadFile as error:
            chain = chain.broken(step, f"cannot be rebuilt ({error.message})")
    missing = {cause.step for step in chain.links if (cause := chain.cause(step)) is not None}
    return chain, [_verdict(chain, step) for step in sorted({*chain.links, *missing})]


def _verdict(chain: Chain, step: int) -> Verdict:
    if step not in chain.links:
        return Verdict(step, "it is missing")
    cause = chain.cause(step)
    if cause is None:
        return Verdict(step, "")
    return Verdict(step, f"it {cause.problem}" if cause.step == step else f"it builds on step {cause.step}, which {cause.problem}")
