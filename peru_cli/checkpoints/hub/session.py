"""How one command reads from the Hub: by ranges or through the cache, and how it is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reading:
    """How models are read from the Hub, for a whole command: `stream` by ranges alone, else through the shared cache."""

    stream: bool = False
    repos: dict[tuple[str, str | None], Any] = field(default_factory=dict)  # each revision is resolved once
    interrupted: bool = False  # whoever waits for the Hub gives up
    wake: Callable[[], None] = lambda: None  # breaks off what threads wait for

    def reset(self, stream: bool = False) -> None:
        """Begin a command."""
        self.stream, self.repos, self.interrupted = stream, {}, False

    def interrupt(self) -> None:
        """End all reading from the Hub: only the main thread hears a signal, and others may wait minutes for a server. Takes no lock."""
        self.interrupted = True
        self.wake()


reading = Reading()
