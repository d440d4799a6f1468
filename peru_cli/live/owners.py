"""Keep track of who has changed which weights: one thread at a time, and the last change is restored first."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from peru_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, UntypedStorage

_lock = threading.Lock()
_claims: dict[tuple[torch.device, int], list[Claim]] = {}  # by storage: who is on it, the last one at the end


class Claim:
    """One change of a set of weights, from before its first entry is written until the last is back."""

    def __init__(self, tensors: Iterable[Tensor], what: str) -> None:
        """UsageError if another thread's change is on any of them."""
        self._thread = threading.current_thread()
        self._what = what
        storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor) and t.device.type != "meta"]
        self._keys: dict[tuple[torch.device, int], weakref.ref[UntypedStorage]] = {
            (s.device, s.data_ptr()): weakref.ref(s) for s in storages if s.data_ptr()
        }
        with _lock:
            for key in self._keys:
                for other in self._others(key):
                    if other._thread is not self._thread and other._thread.is_alive():
                        raise UsageError(
                            f"another thread has applied {other._what} to these weights",
                            "restore it there first (`with apply(...)` does), or give each thread its own weights",
                        )
            for key in self._keys:
                _claims.setdefault(key, []).append(self)

    def _others(self, key: tuple[torch.device, int]) -> list[Claim]:
        """The claims on a storage. Those on freed memory, whose address was given out again, are dropped."""
        _claims[key] = [claim for claim in _claims.get(key, ()) if claim._keys[key]() is not None]
        if not _claims[key]:
            return _claims.pop(key)
        return _claims[key]

    def check_last(self) -> None:
        """UsageError if a later change is on the same weights: what it keeps aside is this one's work."""
        with _lock:
            later = next((c for key in self._keys for c in _claims.get(key, [self])[::-1][:1] if c is not self), None)
        if later is not None and self._is_held():
            raise UsageError(f"{later._what} was applied on top of {self._what}", "restore the later one first")

    def _is_held(self) -> bool:
        return any(self in _claims.get(key, ()) for key in self._keys)

    def release(self) -> None:
        """The weights are what they were; a second call does nothing."""
        with _lock:
            for key in self._keys:
                claims = _claims.get(key, [])
                if self in claims:
                    claims.remove(self)
                if not claims:
                    _claims.pop(key, None)
            self._keys = {}
