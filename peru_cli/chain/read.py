"""Read a step of a chain: apply its links one after another, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from peru_cli.chain.links import Chain, Link, form
from peru_cli.checkpoints.local.inputs import Changed
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, Mismatch
from peru_cli.finetunes.fine_tune import FromArtifact
from peru_cli.finetunes.open import open_artifact
from peru_cli.verify.run import CHANGED, verify_artifact


class Nothing(Checkpoint):
    """The base of a full link: no tensors."""

    def __init__(self) -> None:
        self.label, self.kind = "nothing", "no checkpoint"
        self.tensors, self.metadata, self.side_files, self.warnings = {}, {}, {}, []

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        raise KeyError(name)


@contextmanager
def open_step(chain: Chain, step: int) -> Iterator[FromArtifact]:
    """A step as a checkpoint. BadFile if it is lost. If it proves wrong while it is used, BadFile names the broken link and the lost steps.

    Memory: some decoded blocks for each link up to the step."""
    with _naming(chain, step), ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="peru-chain-")))
        below: Checkpoint = Nothing()
        for link in chain.way(step):
            opened = open_artifact(link.place, f"step {link.step}", below, None)
            stack.callback(opened.close)
            opened.heading = f"step {link.step}, {form(link.on)}:"
            opened.side_files = dict(opened.side_files) | _carried(opened, link, folder / str(link.step))
            below = opened
        assert isinstance(below, FromArtifact)
        yield below


def _carried(opened: FromArtifact, link: Link, folder: Path) -> dict[str, Path]:
    """Write side files that a link stores into a folder, so that the next link can refer to them."""
    contents, missing = opened.contents()
    if missing:
        raise BadFile(f"{link.place}: its side file {missing[0]} is not in the step below")
    folder.mkdir()
    stored = {name: folder / name for name in contents if name not in opened.side_files}
    for name, path in stored.items():
        path.write_bytes(contents[name])
    return stored


@contextmanager
def _naming(chain: Chain, step: int) -> Iterator[None]:
    """If a step proves wrong, say which link is broken, which steps are lost with it, and which are left."""
    try:
        yield
    except Changed:
        raise
    except (BadFile, Mismatch) as error:
        for link in chain.way(step):
            if problem := damage(link):
                losses = chain.broken(link.step, f"is damaged ({problem})").losses()
                raise BadFile(
                    "\n  ".join(losses), "add it again if you still have it, or start over with `peru chain add --full`"
                ) from error
        raise


def damage(link: Link) -> str:
    """What is wrong with a link's own bytes. Empty if they are unchanged."""
    found = verify_artifact(link.place)
    return found.said if found.verdict == CHANGED else ""
