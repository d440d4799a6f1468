"""The tests of the Hub with huggingface_hub 1.x, which transformers and peru allow beside 2.x.

    python benchmarks/oracles/hub_1x.py [--version "1.*"] [TEST...]

Installs that version into a separate folder, which takes precedence over the environment's packages. The environment is unchanged.
Needs a package index."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = [str(ROOT / "tests" / name) for name in ("checkpoints/hub", "publish", "prune/test_resume.py")]


def main() -> None:
    """Install, print the version that the tests use, run them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", default="1.*")
    parser.add_argument("tests", nargs="*", default=TESTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, f"huggingface_hub=={options.version}"]
        subprocess.run(install, check=True)
        env = {**os.environ, "PYTHONPATH": folder}
        shown = (
            "import huggingface_hub as h; from huggingface_hub.utils import httpx; print('huggingface_hub', h.__version__, httpx.__name__)"
        )
        subprocess.run([sys.executable, "-c", shown], check=True, env=env)
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "2", *options.tests], cwd=ROOT, env=env)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
