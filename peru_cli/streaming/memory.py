"""Memory available for work that cannot be cut into tiles."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_UNKNOWN = 4 << 30  # bytes, if the system does not say


def free_memory() -> int:
    """Bytes that can be used without swapping: what the kernel reports as available, within the control group's limit."""
    found = _UNKNOWN
    with suppress(OSError, ValueError, AttributeError):
        found = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) << 10
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text("ascii"))
        used = int((group / "memory.current").read_text("ascii"))
        found = min(found, max(limit - used, 0))
    return found
