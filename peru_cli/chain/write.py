"""Write links: append a step, or drop steps and put the links that build on them onto earlier ones.

Each change of the folder is one rename or one removal, and leaves a chain in which no step is lost. A kill at any moment leaves
the chain as it was, or complete, or with some of the unwanted steps already dropped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from peru_cli.chain.links import ON, ON_RESULT, STEP, Chain, file_name, read_chain
from peru_cli.chain.read import Nothing, open_step
from peru_cli.checkpoints.checks.unpaired import judge
from peru_cli.checkpoints.digests import checkpoint_digest
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.local.atomic import check_room, partial_path, sync_folder
from peru_cli.checkpoints.pairing import Pairing, Prefix, pair_checkpoints
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch, UsageError
from peru_cli.finetunes.verify import verify_expanded
from peru_cli.prune.run import PruneOptions, PruneTask, prune
from peru_cli.shown import listed
from peru_cli.vectors.family import StreamSettings, TaskVector

Note = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """A link that was written: `on` is the step below, None if it is full."""

    step: int
    on: int | None
    nbytes: int
    entries: int
    changed: int


def place_of(chain: Chain, step: int, every: int, full: bool) -> int | None:
    """The step that a new one builds on: the nearest sound one below. None if the new one must be full.

    A link is full if `full` is set, if nothing is below, or if `every` - 1 deltas lie between it and the last full one."""
    below = max((sound for sound in chain.sound if sound < step), default=None)
    return None if full or below is None or len(chain.way(below)) >= every else below


def is_there(chain: Chain, step: int, source: Checkpoint) -> bool:
    """Whether a step already exists with the same tensors and side files. UsageError if it exists with others."""
    if step not in chain.links or chain.cause(step) is not None:
        return False
    found = checkpoint_digest({name: source.digest(name) for name in source.tensors}).hex()
    if found != chain.links[step].result:
        raise UsageError(f"{chain.place} has another checkpoint as step {step}", "give this one its own number: --step N")
    with open_step(chain, step) as stored:
        there, _ = stored.contents()
    here = {name: path.read_bytes() for name, path in source.side_files.items()}
    if other := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        raise UsageError(
            f"{chain.place} has step {step} with the same weights, but other side files: {listed(other)}",
            "give this one its own number: --step N",
        )
    return True


def append(
    chain: Chain, folder: Path, source: Checkpoint, step: int, on: int | None, how: StreamSettings, sync: bool, note: Note
) -> Written:
    """Append a checkpoint to a chain as a step, on another one or full. The caller holds the chain's lock.

    Raises Mismatch if too little of it pairs with the step below, BadFile if that step is damaged."""
    _clean(folder, file_name(step))
    if on is None:
        return _write(folder / file_name(step), step, source, None, how, sync, note)
    with open_step(chain, on) as below:
        note(f"verifying step {on}")
        verify_expanded([below], how)
        return _write(folder / file_name(step), step, source, below, how, sync, note, on, chain.links[on].result)


def drop(chain: Chain, folder: Path, steps: Collection[int], how: StreamSettings, sync: bool, note: Note) -> list[Written]:
    """Remove steps. Links on them move to the nearest remaining step below, or become full. The caller holds the chain's lock."""
    _clean(folder)
    written = []
    for link in [link for step, link in chain.links.items() if step not in steps and link.on in steps]:
        way = chain.way(link.step)
        on = next((below.step for below in way[-2::-1] if below.step not in steps), None)
        written.append(_rewrite(chain, folder / file_name(link.step), link.step, on, how, sync, note))
        chain = read_chain(folder)
    for step in sorted(steps, reverse=True):  # a link comes before the step below it
        path = folder / file_name(step)
        inputs.forget(path)
        path.unlink()
    if sync:
        sync_folder(folder)
    return written


def squash(chain: Chain, first: int, last: int, target: Path, how: StreamSettings, sync: bool, note: Note) -> Written:
    """Write all changes from one step to another as one artifact."""
    chain.way(first)
    return _rewrite(chain, target, last, first, how, sync, note)


def _rewrite(chain: Chain, target: Path, step: int, on: int | None, how: StreamSettings, sync: bool, note: Note) -> Written:
    """Rewrite a step of a chain as a link on another step, or as a full one."""
    with open_step(chain, step) as source, contextlib.ExitStack() as stack:
        note(f"verifying step {step}")
        verify_expanded([source], how)
        if on is None:
            return _write(target, step, source, None, how, sync, note)
        below = stack.enter_context(open_step(chain, on))
        verify_expanded([below], how)
        return _write(target, step, source, below, how, sync, note, on, chain.links[on].result)


def _write(
    target: Path, step: int, source: Checkpoint, below: Checkpoint | None, how: StreamSettings, sync: bool, note: Note,
    on: int | None = None, on_result: str = "",
) -> Written:  # fmt: skip
    """Write one link, replacing an existing one. Every byte of `below` is already verified."""
    about = {STEP: str(step)}
    if below is None:
        below, pairing = Nothing(), Pairing(Prefix(), whole=[source.tensors[name] for name in sorted(source.tensors)])
    else:
        about |= {ON: str(on), ON_RESULT: on_result}
        pairing = _paired(source, below)
    check_room(target, sum(info.nbytes for info in pairing.whole), "put the chain on another disk")
    task = PruneTask(TaskVector(f"step-{step}", source, pairing), target, None)
    note(f"writing step {step}")
    (result,) = prune(below, [task], PruneOptions(None, about=tuple(about.items())), how, sync)
    return Written(step, on, result.file_bytes, result.entries, result.changed)


def _paired(source: Checkpoint, below: Checkpoint) -> Pairing:
    try:
        pairing = pair_checkpoints(source, below)
        judge(source, below, pairing, None, allowed=False)
    except Mismatch as error:
        raise Mismatch(error.message, "is it of the same run? --full stores it whole") from error
    return pairing


def _clean(folder: Path, name: str | None = None) -> None:
    """Remove what killed commands left, except what the next file of that name can use."""
    ours = partial_path(folder / name).name if name is not None else None
    for path in folder.glob(".step-*.safetensors.peru-partial*"):
        if ours is None or not path.name.startswith(ours):
            path.unlink()
