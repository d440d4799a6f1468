"""mergekit 0.1.5 in a virtual environment of its own: a program to compare with, no code of it is in peru."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path


def install(folder: Path) -> Path:
    """mergekit in an environment of its own; its `mergekit-pytorch`."""
    program = folder / "bin" / "mergekit-pytorch"
    if not program.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", "mergekit==0.1.5", "torch==2.13.0"], check=True)
    return program
