"""The models of a command as they were typed: opened here, and again by each worker of a cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from peru_cli.checkpoints.hub.session import stream_hub
from peru_cli.checkpoints.names.translated import bring_together
from peru_cli.checkpoints.resolve import Argument, open_model
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch, PeruError
from peru_cli.finetunes.adapter import as_unpacked
from peru_cli.finetunes.open import open_fine_tune
from peru_cli.prune.artifact import PruneOptions, PruneTask
from peru_cli.prune.run import pair_with
from peru_cli.streaming.arrays import CPU
from peru_cli.streaming.cluster import Cluster, ray_cluster
from peru_cli.vectors.family import Family, Station, StreamSettings, TaskVector


@dataclass
class Models:
    """Opened models: the base, what was given, the same as prune compares it, and messages about that."""

    base: Checkpoint
    given: list[Checkpoint]
    fines: list[Checkpoint]
    said: list[str]


@dataclass(frozen=True)
class Sources:
    """A base and fine-tunes. With `stored`, quantised weights are left as they are."""

    base: str
    arguments: tuple[Argument, ...]
    renames: tuple[str, ...] = ()
    stored: bool = False

    def open(self) -> Models:
        """Open all of them."""
        base = open_model(self.base, self.stored)
        given = [open_fine_tune(a.model, base, a.task, self.stored) for a in self.arguments]
        fines, said = bring_together([as_unpacked(model) for model in given], base, self.renames)
        return Models(base, given, fines, said)


@dataclass(frozen=True)
class WorkerSources:
    """What a worker needs to open the same models, and to know that they are the same."""

    sources: Sources
    options: PruneOptions
    names: tuple[str, ...]  # the tasks'
    identities: tuple[str, ...]  # of the base and of each fine-tune
    tile_entries: int
    folder: str  # where relative paths begin

    def open(self) -> Station:
        """A worker's family. PeruError names the node that lacks a model, or has another one."""
        node = socket.gethostname()
        with suppress(OSError):  # paths may all be absolute
            os.chdir(self.folder)
        stream_hub()
        try:
            models = self.sources.open()
        except PeruError as error:
            raise PeruError(f"on the node {node}: {error.message}", error.hint) from error
        for checkpoint, identity in zip((models.base, *models.fines), self.identities, strict=True):
            if checkpoint.identity() != identity:
                raise Mismatch(
                    f"{checkpoint.label} on the node {node} is not the same file as here (size, time of change or header)",
                    "put models on storage that all nodes share, name them on the Hub, or copy them with their times (rsync -a)",
                )
        tasks = [TaskVector(n, fine, pair_with(fine, models.base, self.options)) for n, fine in zip(self.names, models.fines, strict=True)]
        family = Family(models.base, tasks, StreamSettings(CPU, 1, self.tile_entries), self.options.bundled)
        return Station(family, family.buffers())


@contextmanager
def on_cluster(
    address: str | None, sources: Sources, base: Checkpoint, tasks: Sequence[PruneTask], options: PruneOptions, tile_entries: int
) -> Iterator[Cluster | None]:
    """The Ray cluster at an address, whose workers open these models. Without an address None: this machine computes."""
    if address is None:
        yield None
        return
    identities = (base.identity(), *(task.vector.fine.identity() for task in tasks))
    names = tuple(task.vector.name for task in tasks)
    with ray_cluster(address, WorkerSources(sources, options, names, identities, tile_entries, os.getcwd())) as cluster:
        yield cluster
