"""What a user waits for: version and help load nothing heavy, and every option is documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import peru_cli
from peru_cli.cli import build_app
from peru_cli.methods.table import METHODS

APP = build_app()
HEAVY = {"torch", "numpy", "transformers", "peft", "huggingface_hub", "safetensors", "matplotlib", "pcodec", "yaml", "markdown_it"}
COMMANDS = sorted(command.name or command.callback.__name__ for command in APP.registered_commands if command.callback)
PINNED = {"_TYPER_FORCE_DISABLE_TERMINAL": "1", "TERMINAL_WIDTH": "120", "COLUMNS": "120"}
# Runs the command line as `peru` does, then says on stderr which modules were loaded.
PROBE = """
import sys
sys.argv[0] = "peru"
from peru_cli.__main__ import main
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print("LOADED", *sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(code)
"""


def probe(*arguments: str) -> tuple[str, set[str]]:
    """Stdout of a run in its own process, and the top-level modules that it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **PINNED},
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.splitlines()[-1].split()[1:])
    return probe(*arguments) if "numba" in loaded else (done.stdout, loaded)  # it compiled a loop, once for this machine


def test_few_modules_are_loaded_for_version_and_help() -> None:
    """Each costs the user about half a millisecond: half of these are Python's own and typer's."""
    count = PROBE.replace('*sorted({name.split(".")[0] for name in sys.modules})', "len(sys.modules)")
    for argument, most in (("--version", 100), ("--help", 320)):
        done = subprocess.run([sys.executable, "-c", count, argument], capture_output=True, text=True, timeout=120, check=True)
        assert int(done.stderr.split()[-1]) <= most, argument


def options_of(text: str) -> set[str]:
    """Long and short options named in a help text."""
    return set(re.findall(r"(?<![\w-])(--?[a-z][a-z0-9-]*)(?![\w])", text))


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make help in this process as wide as in its own process."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 120)


def test_the_known_commands_exist() -> None:
    assert {"prune", "unpack"} <= set(COMMANDS)


def test_version_is_answered_at_once() -> None:
    out, loaded = probe("--version")
    assert out == f"peru {peru_cli.__version__}\n"
    assert not loaded & (HEAVY | {"typer", "click", "rich"})


def test_version_before_a_command_prints_the_same() -> None:
    out, loaded = probe("--version", "prune")
    assert out == f"peru {peru_cli.__version__}\n" and not loaded & HEAVY


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["peru", *COMMANDS])
def test_help_loads_nothing_heavy(command: list[str], peru: Callable[..., str], wide: None) -> None:
    out, loaded = probe(*command, "--help")
    assert not loaded & HEAVY, loaded & HEAVY
    assert "\x1b" not in out and " ".join(["Usage: peru", *command]) in out
    if not command:
        assert set(COMMANDS) <= set(re.findall(r"[a-z-]+", out)) and "130 interrupted" in out
    assert peru(*command, "-h") == peru(*command, "--help")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_declared_option_is_in_the_help(name: str, peru: Callable[..., str], wide: None) -> None:
    """Every option must be in the help: nothing cut off at 120 columns, and every method's options in that method's help."""
    import typer.main

    command = typer.main.get_command(APP).commands[name]  # type: ignore[attr-defined]
    declared = {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
    said = peru(name, "--help")
    assert not re.search(r"<[a-z]", said)  # of types, only what is to be typed: `--json <bool>` reads as if it took a value
    found = options_of(said)
    if name == "merge":
        found |= {option for method in METHODS for option in options_of(peru("merge", "--help", "--method", method))}
    assert declared - {"--help", "-h"} <= found


@pytest.mark.parametrize("method", ["ties", "karcher", "regmean"])
def test_the_help_of_a_method_has_its_options_and_no_others(method: str, peru: Callable[..., str], wide: None) -> None:
    found = options_of(peru("merge", "--method", method, "--help"))
    own = {f"--{name}" for name in METHODS[method].options}
    others = {f"--{name}" for one in METHODS.values() for name in one.options} - own
    assert own <= found and not others & found


def test_pruning_on_a_cpu_needs_no_torch(tmp_path: Path) -> None:
    """Importing torch takes longer than pruning a small model, and pydantic as long."""
    from peru_cli import demo

    arguments = [str(demo.fine_tune("digits")), "--base", str(demo.BASE), "--device", "cpu"]
    for command in (["prune", *arguments, "-o", str(tmp_path / "a.safetensors"), "--keep", "10%", "--force"], ["inspect", arguments[0]]):
        assert not probe(*command)[1] & {"torch", "transformers", "peft", "huggingface_hub", "matplotlib", "pydantic", "yaml"}
    _, loaded = probe("unpack", str(tmp_path / "a.safetensors"), "--base", str(demo.BASE), "-o", str(tmp_path / "r"), "--force")
    assert not loaded & {"torch", "pydantic"}
    others = [f"{name}={demo.fine_tune(name)}" for name in ("digits", "notmnist")]
    merge = ["merge", *others, *arguments[1:3], "-m", "linear", "-o", str(tmp_path / "merged"), "--force"]
    assert not probe(*merge)[1] & {"torch", "pydantic", "yaml", "transformers"}
    for kind in ("tiny/artifact", "mixed/artifact", "pack/pack", "masks/masks"):
        _, loaded = probe("inspect", str(Path(__file__).parents[1] / "golden" / f"{kind}.safetensors"))
        assert not loaded & {"torch", "transformers", "peft", "huggingface_hub", "safetensors", "matplotlib"}


def test_lora_adapters_need_no_peft(tmp_path: Path) -> None:
    """peru imports transformers through peft, which takes seconds: only the methods that peft merges need it."""
    import json

    import torch
    from safetensors.torch import save_file

    name = "base_model.model.layer.lora_"
    (tmp_path / "lora").mkdir()
    save_file({f"{name}A.weight": torch.ones(2, 6), f"{name}B.weight": torch.ones(8, 2)}, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    save_file({"layer.weight": torch.zeros(8, 6)}, tmp_path / "base.safetensors")
    _, loaded = probe(
        "unpack", str(tmp_path / "lora"), "--base", str(tmp_path / "base.safetensors"), "-o", str(tmp_path / "full"), "--force"
    )
    assert not loaded & {"peft", "transformers"}


def test_a_typing_error_loads_nothing_heavy_either() -> None:
    code = PROBE.replace("sys.exit(code)", "assert code == 2, code")
    for arguments in (["prune", "x", "--kep", "5%"], ["nosuch"], ["prune", "x", "-b", "y", "-o", "z.safetensors", "--keep", "5"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert not set(done.stderr.splitlines()[-1].split()) & HEAVY, arguments
    assert "did you mean --keep 5%?" in done.stderr
