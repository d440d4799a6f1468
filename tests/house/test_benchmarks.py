"""Benchmarks and oracles are not run by the suite. What they use of peru and of the tests must exist all the same."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))


def lacking(tree: ast.Module) -> list[str]:
    """Names of peru's, or of a module of it, that do not exist."""
    modules: dict[str, ModuleType] = {}
    found = []
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("peru_cli", "tests"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ImportError:
                        found.append(f"{node.module}.{alias.name}")
                        continue
                value = getattr(module, alias.name)
                if isinstance(value, ModuleType) and (alias.asname or alias.name) not in own:
                    modules[alias.asname or alias.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            if not hasattr(module, node.attr):
                found.append(f"{module.__name__}.{node.attr}")
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT / "benchmarks")))
def test_what_a_script_uses_of_peru_exists(script: Path) -> None:
    assert lacking(ast.parse(script.read_text("utf-8"))) == []


def test_a_missing_name_is_found() -> None:
    source = "from peru_cli import cli\nfrom peru_cli.errors import NoSuchError, PeruError\ncli.no_such_thing()\n"
    assert lacking(ast.parse(source)) == ["peru_cli.errors.NoSuchError", "peru_cli.cli.no_such_thing"]
