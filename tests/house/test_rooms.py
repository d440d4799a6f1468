"""The house's one rule: imports point down. Reads the imports of every file without running peru."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "peru_cli"

# From the ground up: a room may import from itself and from the rooms before it.
ROOMS = [
    "version",
    "errors",
    "shown",
    "console",
    "kernels",
    "checkpoints",
    "streaming",
    "methods",
    "artifacts",
    "vectors",
    "finetunes",
    "live",
    "inference",
    "training",
    "reports",
    "options",
    "publish",
    "prune",
    "merge",
    "unpack",
    "lora",
    "export",
    "pack",
    "evaluate",
    "route",
    "inspect",
    "verify",
    "chain",
    "demo",
    "cli",
    "__main__",
]


def test_the_architecture_page_names_every_room() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    diagram = page.split("```")[3]
    named = set(re.findall(r"\b([a-z_]+)(?:/|\.py)", diagram))
    folders = {path.parent.name for path in PACKAGE.rglob("__init__.py")} - {PACKAGE.name, "recipe", "masks", "packs"}
    assert set(ROOMS) <= named and folders <= named
    assert named <= {path.stem for path in PACKAGE.rglob("*")}, "named, and not there"


def modules() -> dict[str, Path]:
    """Every module under its dotted name without the package's own; "" is the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> list[tuple[str, int]]:
    """What a file imports from the package, anywhere in the file: (module, line)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peru_cli":
            inside = (node.module or "").removeprefix("peru_cli").lstrip(".")
            for alias in node.names:
                deeper = f"{inside}.{alias.name}".lstrip(".")
                found.append((deeper if deeper in known else inside, node.lineno))
        elif isinstance(node, ast.Import):
            found += [
                (alias.name.removeprefix("peru_cli").lstrip("."), node.lineno) for alias in node.names if alias.name.startswith("peru_cli")
            ]
    return found


def broken(known: dict[str, Path]) -> list[str]:
    """Every import that points up, and every circle of files, as sentences."""
    problems, below = [], {name: [m for m, _ in imports(path, known)] for name, path in known.items() if name}
    for name, path in known.items():
        room = name.split(".")[0]
        for target, line in imports(path, known) if name else []:
            other = target.split(".")[0]
            if ROOMS.index(other) > ROOMS.index(room):
                problems.append(f"{path.relative_to(PACKAGE.parent)}:{line} imports {target}: {other} lies above {room}")
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            problems.append("a circle of imports: " + " -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for target in below.get(name, ()):
                follow(target, (*way, name))
            done.add(name)

    for name in below:
        follow(name, ())
    return problems


def test_every_room_is_listed() -> None:
    """A new room must be placed in the list."""
    assert {name.split(".")[0] for name in modules() if name} == set(ROOMS)


def test_imports_point_down_and_never_in_a_circle() -> None:
    """Violations are named with file and line."""
    assert broken(modules()) == []


def test_the_import_check_finds_violations(tmp_path: Path, monkeypatch) -> None:
    """An import that points up and a circle are both found."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "peru_cli")
    for name, text in {
        "methods/a.py": "from peru_cli.prune import run",
        "prune/run.py": "import peru_cli.prune.plan",
        "prune/plan.py": "def later():\n    from peru_cli.prune.run import x",
    }.items():
        file = tmp_path / "peru_cli" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    found = broken(modules())
    assert "peru_cli/methods/a.py:1 imports prune.run: prune lies above methods" in found
    assert (
        "a circle of imports: prune.run -> prune.plan -> prune.run" in found
        or "a circle of imports: prune.plan -> prune.run -> prune.plan" in found
    )


def test_every_folder_has_a_description() -> None:
    """One sentence at the top of each room."""
    assert [str(p) for p in PACKAGE.rglob("__init__.py") if not ast.get_docstring(ast.parse(p.read_text("utf-8")))] == []
    assert [str(d) for d in PACKAGE.rglob("*") if d.is_dir() and list(d.glob("*.py")) and not (d / "__init__.py").exists()] == []
