"""What competing processes do: write one target again and again. Imports no more than that takes."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from peru_cli.checkpoints.local.atomic import PartialDirectory, PartialFile
from peru_cli.errors import PeruError


def write_until(kind: str, target: str, letter: int, until: float) -> None:
    """Write a `file` or a folder of this letter until a time. Another writer's lock is no error."""
    while time.time() < until:
        with contextlib.suppress(PeruError):
            if kind == "file":
                with PartialFile(Path(target), sync=False) as file:
                    for part in range(4):
                        file.write_at(part * 1000, bytes([letter]) * 1000)
                    file.commit()
            else:
                with PartialDirectory(Path(target), sync=False) as folder:
                    for part in range(4):
                        (folder.path / str(part)).write_bytes(bytes([letter]))
                    folder.commit()
