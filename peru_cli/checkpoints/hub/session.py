"""How one command reads from the Hub: by ranges or through the cache, and how reading is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Session:
    """How a command reads models from the Hub: only by ranges if `stream`, otherwise through the shared cache."""

    stream: bool = False
    repos: dict[tuple[str, str | None], Any] = field(default_factory=dict)  # each revision is resolved once
    interrupted: bool = False  # threads that wait for the Hub give up
    waiting: dict[object, Callable[[], None]] = field(default_factory=dict)  # by connection: how to abort its request

    def interrupt(self) -> None:
        """Stop all reading from the Hub: only the main thread gets signals, and others may wait for minutes. Takes no lock."""
        self.interrupted = True
        for break_off in list(self.waiting.values()):
            break_off()


_sessions = [Session()]  # first the one for programs that import peru, then those of running commands


@contextmanager
def hub_session(stream: bool = False) -> Iterator[Session]:
    """A new session for everything opened inside."""
    session = Session(stream)
    _sessions.append(session)
    try:
        yield session
    finally:
        _sessions.remove(session)


def current_session() -> Session:
    """The session for models that are opened now. Opened models keep their own."""
    return _sessions[-1]


def stream_hub() -> None:
    """Read what is opened from now on by ranges: who computes on other machines has no use for a copy here."""
    current_session().stream = True


def interrupt() -> None:
    """Interrupt all sessions. For signal handlers: takes no lock."""
    for session in list(_sessions):
        session.interrupt()
