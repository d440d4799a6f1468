"""The models of a command as they were typed: opened here, and again by each worker of a cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from peru_cli.checkpoints.hub.session import stream_hub
from peru_cli.checkpoints.names.translated import bring_together
from peru_cli.checkpoints.resolve import Argument, open_model
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch, PeruError
from peru_cli.finetunes.adapter import as_unpacked
from peru_cli.finetunes.open import open_fine_tune


class Current:
    """The pass that a worker was asked for last, and one thread's buffers for it."""

    def __init__(self) -> None:
        self._key: object = None
        self.step: Any = None
        self.room: Any = None

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        """The pass of this key; the same one until another is asked for."""
        if self._key != key:
            self._key, self.step = key, make()
            self.room = self.step.buffers()
        return self.step


@dataclass
class Models:
    """Opened models: the base, what was given, the same as it is compared with the base, and messages about that."""

    sources: Sources
    base: Checkpoint | None
    given: list[Checkpoint]
    fines: list[Checkpoint]
    said: list[str]

    @property
    def identities(self) -> tuple[str, ...]:
        """Of the base and of each fine-tune."""
        return tuple(model.identity() for model in (*([self.base] if self.base is not None else []), *self.fines))


@dataclass(frozen=True)
class Sources:
    """A base and fine-tunes. With `stored`, quantised weights are left as they are; with `unpacked`, adapters are as unpack writes them."""

    base: str | None
    arguments: tuple[Argument, ...]
    renames: tuple[str, ...] = ()
    stored: bool = False
    unpacked: bool = False

    def open(self) -> Models:
        """Open all of them."""
        base = open_model(self.base, self.stored) if self.base is not None else None
        given = [open_fine_tune(a.model, base, a.task, self.stored) for a in self.arguments]
        fines, said = bring_together([as_unpacked(model) for model in given] if self.unpacked else given, base, self.renames)
        return Models(self, base, given, fines, said)


@dataclass(frozen=True)
class There:
    """What a node needs to open the same models, and to know that they are the same."""

    sources: Sources
    identities: tuple[str, ...]
    folder: str  # where relative paths begin

    @classmethod
    def of(cls, models: Models) -> There:
        """The same models as these."""
        return cls(models.sources, models.identities, os.getcwd())

    def open(self) -> Models:
        """Open them on a node. PeruError names the node that lacks a model, or has another one."""
        node = socket.gethostname()
        with suppress(OSError):  # paths may all be absolute
            os.chdir(self.folder)
        stream_hub()
        try:
            models = self.sources.open()
        except PeruError as error:
            raise PeruError(f"on the node {node}: {error.message}", error.hint) from error
        everyone = [*([models.base] if models.base is not None else []), *models.fines]
        for checkpoint, identity, mine in zip(everyone, self.identities, models.identities, strict=True):
            if mine != identity:
                raise Mismatch(
                    f"{checkpoint.label} on the node {node} is not the same file as here (size, time of change or header)",
                    "put models on storage that all nodes share, name them on the Hub, or copy them with their times (rsync -a)",
                )
        return models
