"""Documentation is executed: the commands of README and the tour run as written, and generated pages match the commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peru_cli import demo
from tests.conftest import raw, run_peru

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    name: (ROOT / name).read_text("utf-8") for name in ("README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))))
}


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def execute(line: str) -> None:
    """Run one line of a shell block unchanged, with its comments and pipes."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["peru"] and not set(words) & {"|", ">", "&&"}:
        done = run_peru(*words[1:])
    else:
        script = f'set -euo pipefail; peru() {{ "{sys.executable}" -m peru_cli "$@"; }}; {line}'
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A folder with the names that README uses: base, fashion, digits, and images of both tasks."""
    (tmp_path / "base").symlink_to(demo.BASE)
    (tmp_path / "fashion").symlink_to(demo.fine_tune("fashion_mnist"))
    (tmp_path / "digits").symlink_to(demo.fine_tune("digits"))
    (tmp_path / "fashion.npz").symlink_to(demo.images("fashion_mnist"))
    (tmp_path / "digits.npz").symlink_to(demo.images("digits"))
    return tmp_path


def test_readme_has_two_setup_commands_and_its_examples_run(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    setup = [block for block in blocks("README.md", "sh") if "venv" in block]
    assert len(setup) == 2 and all(len(block.splitlines()) == 1 for block in setup)
    for block in blocks("README.md", "sh"):
        for line in block.splitlines() if "venv" not in block else ():
            execute(line)
    assert (family / "restored" / "config.json").exists()


def test_the_tour_runs_as_written(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    for block in blocks("docs/tour.md", "sh"):
        for line in block.splitlines():
            execute(line)
    wanted = load_file(family / "digits" / "model.safetensors")
    restored = load_file(family / "digits-restored.safetensors")
    assert sorted(restored) == sorted(wanted) and (family / "restored" / "config.json").exists()
    # The Python example, after the artifacts exist: the weights are the base's again.
    (example,) = blocks("docs/tour.md", "python")
    done = subprocess.run([sys.executable, "-c", example], cwd=family, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_page_on_engines_runs_as_written(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    for line in "\n".join(blocks("docs/engines.md", "sh")).splitlines():
        execute(line)
    assert (family / "weight_v000001" / "model.safetensors.index.json").exists() and (family / "patch" / "patch.safetensors").exists()


def test_the_page_on_routing_runs_as_written(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    for line in "\n".join(blocks("docs/routing.md", "sh")).splitlines():
        execute(line)
    (example,) = blocks("docs/routing.md", "python")
    done = subprocess.run([sys.executable, "-c", example], cwd=family, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("tensor(") == 2, done.stderr


def test_the_page_on_chains_runs_as_written(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    for line in "\n".join(blocks("docs/chain.md", "sh")).splitlines():
        execute(line)
    assert (family / "restored" / "model.safetensors").exists()


def test_every_command_is_in_the_readme() -> None:
    for command in ("merge", "prune", "shuffle-pack", "svd-lora", "unpack", "push", "inspect", "verify", "eval", "demo"):
        assert f"peru {command}" in PAGES["README.md"]


def test_links_lead_somewhere() -> None:
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page):
            if "://" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


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
    """Checks on every bit what the Python example's last comment promises."""
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
