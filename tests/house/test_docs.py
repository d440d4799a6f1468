"""Documentation is executed: README's commands run as written, generated pages are what the commands say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peru_cli import demo
from tests.conftest import raw

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of README.md."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A folder with the names that README uses: base, fashion, digits, and images of both tasks."""
    (tmp_path / "base").symlink_to(demo.BASE)
    (tmp_path / "fashion").symlink_to(demo.fine_tune("fashion_mnist"))
    (tmp_path / "digits").symlink_to(demo.fine_tune("digits"))
    (tmp_path / "fashion.npz").symlink_to(demo.images("fashion_mnist"))
    (tmp_path / "digits.npz").symlink_to(demo.images("digits"))
    return tmp_path


def test_readme_has_two_setup_commands_and_its_examples_run(family: Path) -> None:
    setup = [block for block in blocks("sh") if "venv" in block]
    assert len(setup) == 2 and all(len(block.splitlines()) == 1 for block in setup)
    examples = [line for block in blocks("sh") if "venv" not in block for line in block.splitlines()]
    assert {line.split()[1] for line in examples} >= {"merge", "prune", "unpack", "inspect"}
    script = "\n".join(["set -euo pipefail", f'peru() {{ "{sys.executable}" -m peru_cli "$@"; }}', *examples])
    done = subprocess.run(["bash", "-c", script], cwd=family, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    wanted = load_file(family / "digits" / "model.safetensors")
    restored = load_file(family / "digits-restored.safetensors")
    assert sorted(restored) == sorted(wanted) and (family / "restored" / "config.json").exists()
    # The Python example, after the artifacts exist: the weights are the base's again.
    (example,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", example], cwd=family, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_command_is_in_the_readme_or_says_itself_what_it_does() -> None:
    for command in ("merge", "prune", "shuffle-pack", "svd-lora", "unpack", "push", "inspect", "eval", "demo"):
        assert f"peru {command}" in README


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_generated_pages_and_completions_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "generate.py", tmp_path], check=True)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 4
    for path in made:
        assert (tmp_path / path).read_text("utf-8") == (ROOT / path).read_text("utf-8"), f"run python docs/generate.py for {path}"


def test_completion_works_live() -> None:
    environment = {**os.environ, "_PERU_COMPLETE": "complete_bash", "COMP_WORDS": "peru pru", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "peru_cli"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["prune"], done.stderr


def test_apply_of_the_readme_restores_the_base(family: Path) -> None:
    """What the Python example promises in its last comment, checked on every bit."""
    import peru_cli

    done = subprocess.run(
        [sys.executable, "-m", "peru_cli", "prune", "fashion", "-b", "base", "-o", "f.safetensors", "--keep", "5%"], cwd=family, check=True
    )
    assert done.returncode == 0
    model = load_file(family / "base" / "model.safetensors")
    before = {name: raw(tensor) for name, tensor in model.items()}
    with peru_cli.apply(model, peru_cli.open_artifact(family / "f.safetensors")):
        assert any(raw(model[name]) != bits for name, bits in before.items())
    assert {name: raw(tensor) for name, tensor in model.items()} == before
