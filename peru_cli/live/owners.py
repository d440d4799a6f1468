"""Track who has changed which weights: one thread at a time, and the last change is restored first."""

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
_claims: dict[tuple[torch.device, int], list[Claim]] = {}  # by storage; the latest claim comes last


class Claim:
    """One change of a set of weights, from before the first write until everything is restored."""

    def __init__(self, tensors: Iterable[Tensor], what: str) -> None:
        """UsageError if another thread has changed any of them."""
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
        """The claims on a storage. Claims on freed memory are dropped: its address may have been reused."""
        _claims[key] = [claim for claim in _claims.get(key, ()) if claim._keys[key]() is not None]
        if not _claims[key]:
            return _claims.pop(key)
        return _claims[key]

    def check_last(self) -> None:
        """UsageError if a later change covers the same weights: what it saved is this change's result."""
        with _lock:
            later = next((c for key in self._keys for c in _claims.get(key, [self])[::-1][:1] if c is not self), None)
        if later is not None and self._is_held():
            raise UsageError(f"{later._what} was applied on top of {self._what}", "restore the later one first")

    def _is_held(self) -> bool:
        return any(self in _claims.get(key, ()) for key in self._keys)

    def release(self) -> None:
        """Call when the weights are restored. A second call does nothing."""
        with _lock:
            for key in self._keys:
                claims = _claims.get(key, [])
                if self in claims:
                    claims.remove(self)
                if not claims:
                    _claims.pop(key, None)
            self._keys = {}
