"""`peru chain`: every step comes back bit for bit, whatever was done to the others."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import integers
from safetensors.torch import load_file, save_file

from tests.conftest import random_pair, raw, run_peru
from tests.support.chain_model import Modelled, State, call, same
from tests.support.hub_server import HubServer

Peru = Callable[..., str]


class ChainMachine(RuleBasedStateMachine):
    """Random operations against a dictionary of the steps."""

    @initialize(seed=integers(0, 1000))
    def begin(self, seed: int) -> None:
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        self.model = Modelled(self.folder, seed)

    @rule()
    def add(self) -> None:
        command, step, holds = self.model.to_add()
        code, _, err = call(*command)
        assert code == 0, err
        self.model.steps[step] = holds

    @precondition(lambda self: self.model.steps)
    @rule(every=integers(1, 7))
    def prune(self, every: int) -> None:
        kept = self.model.kept_by_prune(every)
        code, _, err = call("chain", "prune", self.model.run, "--keep-every", every, "--no-sync")
        assert code == 0, err
        self.model.steps = {step: holds for step, holds in self.model.steps.items() if step in kept}

    @precondition(lambda self: self.model.steps)
    @rule()
    def read(self) -> None:
        assert self.model.wrong(self.model.chance.choice(sorted(self.model.steps))) == ""

    @invariant()
    def lists_what_it_holds(self) -> None:
        if hasattr(self, "model"):
            assert self.model.listed() == sorted(self.model.steps)

    def teardown(self) -> None:
        if hasattr(self, "model"):
            for step in self.model.steps:
                assert self.model.wrong(step) == ""
            shutil.rmtree(self.folder)


TestAgainstAModel = ChainMachine.TestCase
TestAgainstAModel.settings = settings(max_examples=6, stateful_step_count=12, deadline=None, derandomize=True)


@pytest.fixture
def chain(tmp_path: Path, peru: Peru) -> tuple[Path, dict[int, State]]:
    """Steps 10 to 60, whole at 10 and 40."""
    states, noise = {}, torch.Generator().manual_seed(1)
    state, _ = random_pair("bf16")
    for step in range(10, 70, 10):
        state = {n: torch.where(torch.rand(t.shape, generator=noise) < 0.1, t * 2, t) for n, t in state.items()}
        states[step] = state
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text('{"hidden_size": 48}')
        peru("chain", "add", tmp_path / "run", folder, "--lossless", "--full-every", 3, "--no-sync")
    return tmp_path / "run", states


def got(peru: Peru, run: Path, step: int | str, out: Path) -> State:
    peru("chain", "get", run, step, "-o", out, "--no-sync")
    return load_file(out / "model.safetensors")


def links(peru: Peru, run: Path) -> dict[int, int | None]:
    return {link["step"]: link["on"] for link in json.loads(peru("chain", "list", run, "--json"))}


def test_one_step_is_whole_and_the_next_ones_build_on_it(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, states = chain
    assert links(peru, run) == {10: None, 20: 10, 30: 20, 40: None, 50: 40, 60: 50}
    for step, state in states.items():
        assert same(got(peru, run, step, tmp_path / f"back-{step}"), state)
        assert (tmp_path / f"back-{step}" / "config.json").read_text() == '{"hidden_size": 48}'
    assert same(got(peru, run, "last", tmp_path / "last"), states[60])
    assert os.path.getsize(run / "step-50.safetensors") < os.path.getsize(run / "step-40.safetensors") / 3


def test_a_link_is_an_artifact_as_prune_writes_it(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, states = chain
    peru("prune", tmp_path / "step-30", "--base", tmp_path / "step-20", "-o", tmp_path / "a.safetensors", "--lossless")
    link, artifact = (load_file(path) for path in (run / "step-30.safetensors", tmp_path / "a.safetensors"))
    assert link.keys() == artifact.keys() and all(raw(link[role]) == raw(artifact[role]) for role in link)
    peru("unpack", run / "step-30.safetensors", "--base", tmp_path / "step-20", "-o", tmp_path / "b.safetensors")
    assert same(load_file(tmp_path / "b.safetensors"), states[30])


def test_side_files_are_stored_once(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, _ = chain
    assert "files" in load_file(run / "step-40.safetensors") and "files" not in load_file(run / "step-50.safetensors")


def test_a_missing_link_is_named_with_the_lost_and_the_remaining_steps(
    chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path
) -> None:  # fmt: skip
    run, states = chain
    away = tmp_path / "away.safetensors"
    (run / "step-20.safetensors").rename(away)
    for command in (["get", run, 30, "-o", tmp_path / "x"], ["get", run, 20, "-o", tmp_path / "x"], ["verify", run]):
        peru("chain", *command, code=1)
        said = " ".join(peru.stderr.split())  # type: ignore[attr-defined]
        assert "step 20 is missing; step 30 builds on it and cannot be rebuilt" in said and "not lost: steps 10, 40 to 60" in said
    assert same(got(peru, run, 60, tmp_path / "y"), states[60])
    peru("chain", "prune", run, "--keep-every", 20, code=1)
    assert "step 20 is missing" in peru.stderr  # type: ignore[attr-defined]
    peru("chain", "add", run, tmp_path / "step-20", "--no-sync")  # the same weights once more: nothing is lost any longer
    assert same(got(peru, run, 30, tmp_path / "z"), states[30])


def test_a_step_whose_side_files_alone_changed_is_kept(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, states = chain
    (tmp_path / "step-60" / "config.json").write_text('{"hidden_size": 48, "new": 1}')
    peru("chain", "add", run, tmp_path / "step-60", "--no-sync", code=2)
    assert "same weights, but other side files: config.json" in peru.stderr  # type: ignore[attr-defined]
    peru("chain", "add", run, tmp_path / "step-60", "--step", 70, "--no-sync")
    for step, config in ((60, '{"hidden_size": 48}'), (70, '{"hidden_size": 48, "new": 1}')):
        assert same(got(peru, run, step, tmp_path / f"out-{step}"), states[60])
        assert (tmp_path / f"out-{step}" / "config.json").read_text() == config


@pytest.mark.parametrize("where", [0.3, 0.7, 0.999])
@pytest.mark.parametrize("step", [40, 50])
def test_a_damaged_link_is_named_with_the_lost_and_the_remaining_steps(
    chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path, step: int, where: float
) -> None:  # fmt: skip
    run, states = chain
    path = run / f"step-{step}.safetensors"
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)
    for command in (["get", run, 60, "-o", tmp_path / "x"], ["verify", run]):
        peru("chain", *command, code=1)
        said = peru.stderr  # type: ignore[attr-defined]
        lost = "steps 50, 60 build" if step == 40 else "step 60 builds"
        assert f"step {step} is damaged" in said and f"; {lost} on it and cannot be rebuilt" in said
        assert "not lost: steps 10 to " + ("30" if step == 40 else "40") in said
    assert not (tmp_path / "x").exists()
    assert same(got(peru, run, 30, tmp_path / "y"), states[30])
    peru("chain", "add", run, tmp_path / "step-60", "--step", 70, code=1)
    assert f"step {step} is damaged" in peru.stderr  # type: ignore[attr-defined]
    peru("chain", "add", run, tmp_path / "step-60", "--step", 70, "--full")
    assert same(got(peru, run, 70, tmp_path / "z"), states[60])


def test_a_link_of_another_run_does_not_pass_for_the_one_below(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, _ = chain
    peru("chain", "add", tmp_path / "other", tmp_path / "step-50", "--step", 20, "--no-sync")
    shutil.copy(tmp_path / "other" / "step-20.safetensors", run / "step-20.safetensors")
    peru("chain", "get", run, 30, "-o", tmp_path / "x", code=1)
    assert "step 20 is not the checkpoint that step 30 builds on" in peru.stderr  # type: ignore[attr-defined]
    shutil.copy(run / "step-10.safetensors", run / "step-20.safetensors")
    peru("chain", "get", run, 20, "-o", tmp_path / "x", code=1)
    assert "step-20.safetensors holds step 10" in peru.stderr  # type: ignore[attr-defined]


def test_squashing_is_exact(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, states = chain
    for out, last in (("to-30", 30), ("to-50", 50)):
        peru("chain", "squash", run, 10, last, "-o", tmp_path / f"{out}.safetensors")
        peru("unpack", tmp_path / f"{out}.safetensors", "--base", tmp_path / "step-10", "-o", tmp_path / f"{out}-back.safetensors")
        assert same(load_file(tmp_path / f"{out}-back.safetensors"), states[last])
    assert len(links(peru, run)) == 6
    peru("chain", "squash", run, 10, 30)
    assert links(peru, run) == {10: None, 30: 10, 40: None, 50: 40, 60: 50}
    assert same(got(peru, run, 30, tmp_path / "x"), states[30])
    peru("chain", "squash", run, 10, 60, code=2)
    assert "does not build on step 10" in peru.stderr  # type: ignore[attr-defined]


def test_pruning_keeps_every_nth_and_the_last(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, states = chain
    peru("chain", "prune", run, "--keep-every", 25, "--dry-run")
    assert len(links(peru, run)) == 6
    peru("chain", "prune", run, "--keep-every", 25)
    assert links(peru, run) == {50: None, 60: 50}
    assert same(got(peru, run, 60, tmp_path / "x"), states[60]) and same(got(peru, run, 50, tmp_path / "y"), states[50])
    peru("chain", "verify", run)


def test_a_killed_command_leaves_no_trace(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    """What a kill leaves lies under hidden names, and the next command removes it."""
    run, states = chain
    left = [run / ".step-70.safetensors.peru-partial", run / ".step-70.safetensors.peru-partial-journal"]
    for path in left:
        path.write_bytes(b"torn")
    assert len(links(peru, run)) == 6
    peru("chain", "add", run, tmp_path / "step-60", "--step", 80)
    assert not any(path.exists() for path in left)
    left[0].write_bytes(b"torn")
    peru("chain", "add", run, tmp_path / "step-60", "--step", 70)
    assert same(got(peru, run, 70, tmp_path / "x"), states[60])


def test_a_second_writer_gets_an_error_and_readers_do_not(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, states = chain
    held = os.open(run, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        for command in (["add", run, tmp_path / "step-60", "--step", 70], ["prune", run, "--keep-every", 20], ["squash", run, 10, 30]):
            peru("chain", *command, code=1)
            assert "is being written by another peru" in peru.stderr  # type: ignore[attr-defined]
        assert same(got(peru, run, 60, tmp_path / "x"), states[60])
    finally:
        os.close(held)


def test_a_step_is_added_once(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, _ = chain
    before = (run / "step-60.safetensors").read_bytes()
    assert json.loads(peru("chain", "add", run, tmp_path / "step-60", "--json"))["written"] is False
    peru("chain", "add", run, tmp_path / "step-50", "--step", 60, code=2)
    assert "has another checkpoint as step 60" in peru.stderr and (run / "step-60.safetensors").read_bytes() == before  # type: ignore[attr-defined]


def test_another_model_is_refused_unless_it_is_stored_whole(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, _ = chain
    other = {"something.else": torch.randn(50, 50)}
    save_file(other, tmp_path / "other.safetensors", {"format": "pt"})
    peru("chain", "add", run, tmp_path / "other.safetensors", "--step", 70, code=1)
    assert "--full stores it whole" in peru.stderr and 70 not in links(peru, run)  # type: ignore[attr-defined]
    peru("chain", "add", run, tmp_path / "other.safetensors", "--step", 70, "--full")
    assert same(got(peru, run, 70, tmp_path / "x"), other)


def test_quantised_codes_are_restored_unchanged(peru: Peru, tmp_path: Path) -> None:
    codes = {"w": torch.randn(64, 64).to(torch.float8_e4m3fn), "n": torch.randn(300).bfloat16()}
    changed = {"w": codes["w"].clone(), "n": codes["n"] * 2}
    changed["w"].view(torch.uint8)[3, 4] ^= 1
    for step, state in enumerate((codes, changed), 1):
        save_file(state, tmp_path / f"{step}.safetensors", {"format": "pt"})
        peru("chain", "add", tmp_path / "run", tmp_path / f"{step}.safetensors")
    assert same(got(peru, tmp_path / "run", 2, tmp_path / "x"), changed)


def test_a_chain_on_the_hub_is_read(chain: tuple[Path, dict[int, State]], tmp_path: Path) -> None:
    run, states = chain
    with HubServer() as server:
        server.add("org/run", run)
        for how in ([], ["--stream"]):
            out = tmp_path / f"x{len(how)}"
            done = run_peru("chain", "get", "org/run", 50, "-o", out, *how, env=server.env(tmp_path / "hf"))
            assert done.returncode == 0, done.stderr
            assert same(load_file(out / "model.safetensors"), states[50])
        done = run_peru("chain", "list", "org/run", env=server.env(tmp_path / "hf"))
        assert done.returncode == 0 and "on step 50" in done.stdout, done.stderr


def test_invalid_arguments_are_refused_by_name(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, _ = chain
    for arguments, said in (
        (["add", run, tmp_path / "step-60" / "model.safetensors"], "add --step N"),
        (["get", run, 65, "-o", tmp_path / "x"], "has no step 65"),
        (["get", run, "first", "-o", tmp_path / "x"], "not a step's number"),
        (["get", tmp_path / "none", 1, "-o", tmp_path / "x"], "no such chain"),
        (["squash", run, 30, 10], "does not come after"),
        (["squash", run, 10, 30, "-o", tmp_path / "x.bin"], "should end in .safetensors"),
    ):
        peru("chain", *arguments, code=2)
        assert said in peru.stderr  # type: ignore[attr-defined]
    peru("chain", "add", tmp_path / "new", tmp_path / "step-60", "--dry-run")
    assert not (tmp_path / "new").exists()


def test_the_bytes_do_not_depend_on_threads_and_tiles(chain: tuple[Path, dict[int, State]], peru: Peru, tmp_path: Path) -> None:
    run, _ = chain
    for step in range(10, 70, 10):
        peru("chain", "add", tmp_path / "again", tmp_path / f"step-{step}", "--full-every", 3, "--threads", 3, "--tile-entries", 16384)
    for path in run.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
