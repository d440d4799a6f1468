"""README's first command: `peru demo` works with nothing installed except peru's own requirements, no extras."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def required() -> dict[str, metadata.Distribution]:
    """peru's distribution and all that it needs, by name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = ["peru-cli"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        needs = [Requirement(text) for text in found[name].requires or []]
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def only_required(folder: Path) -> Path:
    """A folder of packages with links to the required ones."""
    folder.mkdir()
    for distribution in required().values():
        for top in {Path(file).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).absolute())
    return folder


def test_the_demo_needs_only_the_required_packages(tmp_path: Path) -> None:
    packages = only_required(tmp_path / "packages")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"}
    alone = [sys.executable, "-S"]  # without the environment's own packages
    hidden = subprocess.run([*alone, "-c", "import pytest"], env=environment, capture_output=True, text=True, timeout=60)
    assert "No module named 'pytest'" in hidden.stderr
    done = subprocess.run([*alone, "-m", "peru_cli", "demo"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (fine,) = (line.split() for line in done.stdout.splitlines() if line.startswith("fine-tunes "))
    assert fine[1:3] == ["4.15", "MB"] and fine[-1] == "100.00"
