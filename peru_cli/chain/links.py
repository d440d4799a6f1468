"""The links of a chain: one lossless artifact for each step, which records the step below it and that step's digest.

There is no index beside the links that could disagree with them. A link is a sparse delta (docs/format.md) with three more entries:

peru.chain.step       its step, which its file's name has, too: step-1200.safetensors
peru.chain.on         the step below; absent if it stores every tensor whole
peru.chain.on_result  the digest of that step's checkpoint: its `peru.result`"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from peru_cli.checkpoints.local.files import open_random, read_header
from peru_cli.checkpoints.places import Place, children, size_of
from peru_cli.errors import BadFile, UsageError
from peru_cli.shown import listed

STEP, ON, ON_RESULT = "peru.chain.step", "peru.chain.on", "peru.chain.on_result"
_NUMBER = "0|[1-9][0-9]{0,17}"
_FILE = re.compile(f"step-({_NUMBER})\\.safetensors")


@dataclass(frozen=True)
class Link:
    """One link, from its header. `on` is the step below, None if the link is full; `problem` says why it cannot be used."""

    step: int
    place: Place
    nbytes: int
    result: str = ""  # hexadecimal digest of the checkpoint
    on: int | None = None
    on_result: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Cause:
    """Why a step is lost: the link that is missing or broken, and what is wrong with it."""

    step: int
    problem: str


class Chain:
    """All links of a folder by step, in ascending order."""

    def __init__(self, place: Place, links: Mapping[int, Link]) -> None:
        self.place, self.links = place, dict(sorted(links.items()))
        self._causes: dict[int, Cause | None] = {}
        for step in self.links:  # the step below a link comes before it
            self._causes[step] = self._cause(self.links[step])

    def _cause(self, link: Link) -> Cause | None:
        if link.problem:
            return Cause(link.step, link.problem)
        if link.on is None:
            return None
        below = self.links.get(link.on)
        if below is None:
            return Cause(link.on, "is missing")
        if self._causes[link.on] is None and below.result != link.on_result:
            return Cause(link.on, f"is not the checkpoint that step {link.step} builds on")
        return self._causes[link.on]

    @property
    def sound(self) -> list[int]:
        """Steps that can be rebuilt, according to the headers."""
        return [step for step, cause in self._causes.items() if cause is None]

    def cause(self, step: int) -> Cause | None:
        """Why a step is lost. None if it is not."""
        return self._causes[step]

    def way(self, step: int) -> list[Link]:
        """The links from a full one up to a step. UsageError if the step does not exist, BadFile if it is lost."""
        if step not in self.links:
            if any(cause is not None and cause.step == step for cause in self._causes.values()):
                raise BadFile("\n  ".join(self.losses()))
            raise UsageError(f"{self.place} has no step {step}", f"it has {spans(self.links, self.links) or 'none'}")
        if (cause := self._causes[step]) is not None:
            raise BadFile(f"step {step} is lost: {self._said(cause)}", self._left())
        way = [self.links[step]]
        while (on := way[-1].on) is not None:
            way.append(self.links[on])
        return way[::-1]

    def broken(self, step: int, problem: str) -> Chain:
        """The same chain with a link marked as broken."""
        return Chain(self.place, {**self.links, step: replace(self.links[step], problem=problem)})

    def losses(self) -> list[str]:
        """What is missing or broken, what is lost with it, and what is left. Empty if all is well."""
        causes = {cause: None for cause in self._causes.values() if cause is not None}
        return [*map(self._said, causes), self._left()] if causes else []

    def _said(self, cause: Cause) -> str:
        lost = [step for step, found in self._causes.items() if found == cause and step != cause.step]
        with_it = f"; {spans(lost, self.links)} {'builds' if len(lost) == 1 else 'build'} on it and cannot be rebuilt" if lost else ""
        return f"step {cause.step} {cause.problem}{with_it}"

    def _left(self) -> str:
        return f"not lost: {spans(self.sound, self.links)}" if self.sound else "nothing is left"


def spans(steps: Iterable[int], among: Iterable[int]) -> str:
    """Steps in words; adjacent ones are joined: `steps 100 to 500, 700`."""
    places = {step: i for i, step in enumerate(sorted(among))}
    runs: list[list[int]] = []
    for step in sorted(steps):
        if runs and places[step] == places[runs[-1][-1]] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ("step " if sum(map(len, runs)) == 1 else "steps ") + listed(words) if runs else ""


def form(on: int | None) -> str:
    """How a step is stored, in words."""
    return "whole" if on is None else f"on step {on}"


def file_name(step: int) -> str:
    """The file name of a step."""
    return f"step-{step}.safetensors"


def read_chain(place: Place) -> Chain:
    """Read the headers of all links. UsageError if the folder does not exist."""
    if not place.is_dir():
        raise UsageError(f"{place}: no such chain", "`peru chain add` creates one")
    found = ((file, _FILE.fullmatch(file.name)) for file in children(place, "step-*.safetensors"))
    return Chain(place, {int(name[1]): _read(file, int(name[1])) for file, name in found if name})


def _read(place: Place, step: int) -> Link:
    nbytes = size_of(place)
    try:
        file = open_random(place)
        try:
            metadata = read_header(file).metadata
        finally:
            file.close()
    except BadFile as error:
        return Link(step, place, nbytes, problem=f"is damaged ({error.message})")
    result = metadata.get("peru.result", "")
    link = Link(step, place, nbytes, result)
    if metadata.get(STEP) != str(step):
        return replace(link, problem=f"is not what its file's name says ({place.name} holds step {metadata.get(STEP, 'of no chain')})")
    if ON not in metadata:
        return link
    on, on_result = metadata[ON], metadata.get(ON_RESULT, "")
    if not re.fullmatch(_NUMBER, on) or int(on) >= step or not re.fullmatch("[0-9a-f]{64}", on_result):
        return replace(link, problem="is damaged (its header names no step below it)")
    return replace(link, on=int(on), on_result=on_result)
