"""What a worker of a cluster opens for `peru prune`."""

from __future__ import annotations

from dataclasses import dataclass

from peru_cli.finetunes.nodes import There
from peru_cli.prune.artifact import PruneOptions
from peru_cli.prune.run import pair_with
from peru_cli.streaming.arrays import CPU
from peru_cli.vectors.family import Family, Station, StreamSettings, TaskVector


@dataclass(frozen=True)
class WorkerSources:
    """The models, and how they are compared."""

    there: There
    options: PruneOptions
    names: tuple[str, ...]  # the tasks'
    tile_entries: int

    def open(self) -> Station:
        """A worker's family."""
        models = self.there.open()
        assert models.base is not None
        tasks = [TaskVector(n, fine, pair_with(fine, models.base, self.options)) for n, fine in zip(self.names, models.fines, strict=True)]
        family = Family(models.base, tasks, StreamSettings(CPU, 1, self.tile_entries), self.options.bundled)
        return Station(family, family.buffers())
