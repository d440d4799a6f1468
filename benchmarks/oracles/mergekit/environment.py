"""mergekit 0.1.5 in its own virtual environment: a program to compare with; peru contains no code of it."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path


def install(folder: Path) -> Path:
    """Install mergekit into its own environment. Returns its `mergekit-pytorch`."""
    program = folder / "bin" / "mergekit-pytorch"
    if not program.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", "mergekit==0.1.5", "torch==2.13.0"], check=True)
    return program
