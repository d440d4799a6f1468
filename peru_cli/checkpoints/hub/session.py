"""How one command reads from the Hub: by ranges or through the cache, and how reading is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Session:
    """How a command reads models from the Hub: `stream` by ranges alone, else through the shared cache."""

    stream: bool = False
    repos: dict[tuple[str, str | None], Any] = field(default_factory=dict)  # each revision is resolved once
    interrupted: bool = False  # whoever waits for the Hub gives up
    waiting: dict[object, Callable[[], None]] = field(default_factory=dict)  # by connection: breaks off what a thread waits for

    def interrupt(self) -> None:
        """End all reading from the Hub: only the main thread hears a signal, and others may wait minutes for a server. Takes no lock."""
        self.interrupted = True
        for break_off in list(self.waiting.values()):
            break_off()


_sessions = [Session()]  # the one of programs that import peru, then those of the commands that run


@contextmanager
def hub_session(stream: bool = False) -> Iterator[Session]:
    """A session of its own for what is opened inside."""
    session = Session(stream)
    _sessions.append(session)
    try:
        yield session
    finally:
        _sessions.remove(session)


def current_session() -> Session:
    """The session that models are opened in. What was opened keeps its own."""
    return _sessions[-1]


def interrupt() -> None:
    """Interrupt all sessions. For signal handlers: takes no lock."""
    for session in list(_sessions):
        session.interrupt()
