"""The GitHub Action's own scripts, run as a runner does, and `--summary`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from peru_cli import demo

GATE = "--fail-above error=0.01"
ROOT = Path(__file__).resolve().parents[2]
ACTION = yaml.safe_load((ROOT / ".github" / "actions" / "compress" / "action.yml").read_text("utf-8"))


def run_action(folder: Path, **given: str) -> tuple[int, dict[str, str], str]:
    """Exit code, outputs and summary of the action's steps in a folder, given inputs and their defaults."""
    inputs = {name: given.get(name, str(about.get("default", ""))) for name, about in ACTION["inputs"].items()}
    (folder / "bin").mkdir()
    (folder / "bin" / "peru").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m peru_cli "$@"\n')
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "bin" / "peru").chmod(0o755)
    files = {name: folder / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.touch()
    code = 0
    for step in ACTION["runs"]["steps"]:
        if step["id"] == "install" or code:
            continue
        variables = {name: inputs[value.removeprefix("${{ inputs.").removesuffix(" }}")] for name, value in step["env"].items()}
        paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        environment = os.environ | variables | {name: str(file) for name, file in files.items()} | paths
        shell = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
        code = subprocess.run(shell, cwd=folder, env=environment, timeout=300).returncode
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return code, outputs, files["GITHUB_STEP_SUMMARY"].read_text()


def test_the_action_compresses_measures_and_passes_its_gate(tmp_path: Path) -> None:
    model, base, data = (str(path) for path in (demo.fine_tune("digits"), demo.BASE, demo.images("digits")))
    gate = "--fail-below normalised=90% --fail-above kl=0.5"
    code, outputs, summary = run_action(tmp_path, model=model, base=base, data=data, budget="--max-bytes 40kB", gate=gate)
    assert code == 0
    size = (tmp_path / "compressed.safetensors").stat().st_size
    assert int(outputs["bytes"]) == size <= 40_000 and 0.9 <= float(outputs["quality"]) <= 1.1
    assert "| digits |" in summary and "accuracy %" in summary and summary.count("###") == 2


def test_a_missed_gate_fails_the_action_and_is_in_the_summary(tmp_path: Path) -> None:
    code, outputs, summary = run_action(tmp_path, model=str(demo.fine_tune("digits")), base=str(demo.BASE), budget="--bits 0.5", gate=GATE)
    assert code == 3 and 0 < float(outputs["quality"]) < 0.99
    assert "**Error:**" in summary and "error=0.01" in summary


def test_a_model_that_is_not_there_fails_the_action(tmp_path: Path) -> None:
    code, outputs, summary = run_action(tmp_path, model=str(tmp_path / "nothing"), base=str(demo.BASE))
    assert code == 2 and not outputs and "**Error:**" in summary


def test_a_summary_is_appended_as_markdown_without_markup_of_others(tmp_path: Path, peru: Callable[..., str]) -> None:
    file, hostile = tmp_path / "s.md", tmp_path / "a|b<script>_x_.safetensors"
    file.write_text("before\n")
    peru("prune", demo.fine_tune("digits"), "--base", demo.BASE, "-o", hostile, "--keep", "1%", "--summary", file, "--json")
    lines = file.read_text("utf-8").splitlines()
    assert lines[0] == "before" and lines[1].startswith("### peru prune ")
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) == 3 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "<script>" not in "".join(lines).replace("\\<script\\>", "")


def test_a_summary_that_cannot_be_written_is_an_error(tmp_path: Path, peru: Callable[..., str]) -> None:
    peru("inspect", demo.BASE, "--summary", tmp_path, code=1)
    assert "the summary could not be written" in peru.stderr  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["bytes", "quality"])
def test_outputs_refer_to_existing_steps(name: str) -> None:
    step = ACTION["outputs"][name]["value"].split(".")[1]
    assert f"{name}=" in next(one["run"] for one in ACTION["runs"]["steps"] if one["id"] == step)
