"""README's first command: `peru demo` works with nothing installed except peru's own requirements, no extras."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]

# `peru` with the first images of each task only: which ones are classified makes no difference here.
FEWER_IMAGES = """
import sys
from peru_cli.demo import run
read = run.read_examples
run.read_examples = lambda path: read(path, most=50)
from peru_cli.__main__ import main
sys.argv[0] = "peru"
main()
"""


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


def test_the_demo_needs_only_the_required_packages_and_counts_like_inspect(tmp_path: Path, peru: Callable[..., str]) -> None:
    packages = only_required(tmp_path / "packages")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"}
    alone = [sys.executable, "-S"]  # without the environment's own packages
    hidden = subprocess.run([*alone, "-c", "import pytest"], env=environment, capture_output=True, text=True, timeout=60)
    assert "No module named 'pytest'" in hidden.stderr
    command = [*alone, "-c", FEWER_IMAGES, "demo", "--json", "-o", str(tmp_path / "demo")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout)["rows"]}
    fine = rows["fine-tunes"]
    assert fine["bytes"] == 4_147_088 and fine["normalised"] == 1 and 16 < fine["bits_per_parameter"] < 16.3  # headers count
    for method, folder in (("Post-Pruning, 5%", "pruned"), ("mixed, 0.7 bits", "mixed")):
        shown = [json.loads(peru("inspect", file, "--json")) for file in sorted((tmp_path / "demo" / folder).glob("*.safetensors"))]
        assert len(shown) == 4 and sum(one["delta_bytes"] for one in shown) == rows[method]["delta_bytes"]
        assert sum(one["bits_per_parameter"] for one in shown) / 4 == pytest.approx(rows[method]["bits_per_parameter"], rel=1e-6)
    pack = json.loads(peru("inspect", tmp_path / "demo" / "pack.safetensors", "--json"))
    assert pack["delta_bytes"] == rows["STA + Shuffle"]["delta_bytes"]
