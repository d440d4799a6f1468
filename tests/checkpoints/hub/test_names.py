"""Hub names wherever a model or an artifact is named: each command prints and writes the same as for the same files on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.hub.test_reading import ok
from tests.conftest import run_peru
from tests.support import models
from tests.support.hub_server import HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def family(tmp_path: Path, peru, hub: HubServer) -> Path:
    """Two fine-tunes of a tiny BERT with their own heads, their artifacts, pack and merge, local and on the Hub."""
    base, fine = models.pair(models.bert, tmp_path)
    _, other = models.pair(models.bert, tmp_path / "b", change=0.03)
    (tmp_path / "both").mkdir()
    for task, folder in (("a", fine), ("b", other)):
        peru("prune", f"{task}={folder}", "-b", base, "-o", tmp_path / "both" / f"{task}.safetensors", "--keep", "10%", "--no-sync")
    hub.add("org/base", base)
    hub.add("org/fine", fine)
    hub.add("org/other", other)
    hub.add("org/artifact", {"a.safetensors": tmp_path / "both" / "a.safetensors"})
    hub.add("org/artifacts", tmp_path / "both", revision="v1")
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(models.sentences(24))]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


ARTIFACTS = {
    "a repo with one": ("org/artifact", "both/a.safetensors"),
    "one of several": ("a=org/artifacts@v1", "a=both"),
    "a file": ("hf://models/org/artifacts@v1/a.safetensors", "both/a.safetensors"),
}


def numbers(said: str) -> Any:
    """The output of --json without names."""
    found = json.loads(said)
    for task in found["tasks"]:
        for name in ("model", "against", "label"):
            task.pop(name, None)
        task.pop("seconds", None)
    return [{k: v for k, v in task.items() if not isinstance(v, str)} for task in found["tasks"]], list(found["weights"].values())


@pytest.mark.parametrize("name", ARTIFACTS)
def test_eval_finds_the_same_on_the_hub_as_in_files(hub: HubServer, family: Path, name: str) -> None:
    """On weights, outputs and tasks."""
    remote, local = ARTIFACTS[name]
    local = f"a={family / local.removeprefix('a=')}" if "=" in local else family / local
    data = ("--data", f"a={family / 'test.jsonl'}" if "=" in str(local) else family / "test.jsonl", "--json")
    env = hub.env(family / "hf")
    here = ok(run_peru("eval", local, "-b", family / "base", "--against", family / "fine", *data))
    there = ok(run_peru("eval", remote, "-b", "org/base", "--against", "org/fine", *data, env=env))
    assert numbers(here) == numbers(there)
    assert numbers(here)[0][0]["bytes"] == (family / "both/a.safetensors").stat().st_size
    ranged = ok(run_peru("eval", remote, "-b", "org/base", "--against", "org/fine", *data, "--stream", env=hub.env(family / "empty")))
    assert numbers(ranged) == numbers(there) and not [path for path in (family / "empty").rglob("*") if path.is_file()]
    hub.clear()
    again = ok(run_peru("eval", remote, "-b", "org/base", "--against", "org/fine", *data, env=hub.env(family / "hf", HF_HUB_OFFLINE="1")))
    assert numbers(again) == numbers(there) and not hub.requests


def test_prune_and_merge_of_artifacts_in_repos(hub: HubServer, family: Path) -> None:
    env = hub.env(family / "hf")
    for verb, more in (("prune", ("--lossless", "--base-id", "x/y")), ("merge", ("-m", "task-arithmetic", "--base-id", "x/y"))):
        here, there = family / f"{verb}-here", family / f"{verb}-there"
        mine = [f"{task}={family / 'both' / task}.safetensors" for task in "ab"]
        ok(run_peru(verb, *mine, "-b", family / "base", "-o", f"{here}/", *more))
        ok(run_peru(verb, "a=org/artifact", "b=org/artifacts@v1", "-b", "org/base", "-o", f"{there}/", *more, "--stream", env=env))
        found = [{p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("*.safetensors"))} for f in (here, there)]
        assert found[0] == found[1] and found[0]
    several = run_peru("prune", "org/artifacts@v1", "-b", "org/base", "-o", family / "c.safetensors", "--lossless", env=env)
    assert several.returncode == 2 and "holds 2 artifacts: a, b" in several.stderr


def test_a_merge_with_heads_is_unpacked_and_evaluated(hub: HubServer, family: Path) -> None:
    merged = family / "merged"
    tasks = (f"a={family / 'fine'}", f"b={family / 'b' / 'fine'}")
    ok(run_peru("merge", *tasks, "-b", family / "base", "-o", merged, "-m", "linear", "--per-task", "^classifier"))
    hub.add("org/merged", merged)
    env = hub.env(family / "hf")
    ok(run_peru("unpack", merged, "--task", "b", "-o", family / "here"))
    ok(run_peru("unpack", "org/merged", "--task", "b", "-o", family / "there", env=env))
    files = [{p.name: p.read_bytes() for p in sorted((family / f).iterdir())} for f in ("here", "there")]
    assert files[0] == files[1] and "model.safetensors" in files[0]
    data = ("--data", f"b={family / 'test.jsonl'}", "--json")
    assert numbers(ok(run_peru("eval", merged, *data))) == numbers(ok(run_peru("eval", "org/merged", *data, env=env)))


def test_a_pack_is_inspected_unpacked_and_compared(hub: HubServer, family: Path) -> None:
    pack = family / "pack.safetensors"
    tasks = (f"a={family / 'fine'}", f"b={family / 'b' / 'fine'}")
    ok(run_peru("shuffle-pack", *tasks, "-b", family / "base", "-o", pack, "--base-id", "org/base"))
    hub.add("org/pack", {"pack.safetensors": pack})
    env = hub.env(family / "hf")
    here, there = (json.loads(ok(run_peru("inspect", name, "--json", env=env))) for name in (pack, "org/pack"))
    assert here == there
    for name, out in ((pack, "here"), ("org/pack", "there")):
        ok(run_peru("unpack", name, "--task", "a", "-b", family / "base", "-o", family / out, env=env))
    assert (family / "here/model.safetensors").read_bytes() == (family / "there/model.safetensors").read_bytes()
    data = ("--data", f"a={family / 'test.jsonl'}", "--json", "-b", family / "base", "--against", f"a={family / 'fine'}")
    on_disk = numbers(ok(run_peru("eval", pack, *data)))
    assert on_disk == numbers(ok(run_peru("eval", "org/pack", *data, env=env)))
    assert on_disk == numbers(ok(run_peru("eval", "org/pack", *data, "--stream", env=hub.env(family / "empty"))))
    assert not [path for path in (family / "empty").rglob("*") if path.is_file()]


def test_a_merge_in_a_repo_is_a_base(hub: HubServer, family: Path) -> None:
    """PERU-FFT: a folder of a repo as the base."""
    ok(run_peru("merge", f"a={family / 'fine'}", "-b", family / "base", "-o", family / "fft", "-m", "task-arithmetic", "--compress", "10%"))
    hub.add("org/fft", family / "fft")
    env = hub.env(family / "hf")
    given = ("--keep", "5%", "--base-id", "x/y")
    ok(run_peru("prune", f"a={family / 'fine'}", "-b", family / "fft/merged", "-o", family / "here.safetensors", *given))
    ok(run_peru("prune", "a=org/fine", "-b", "org/fft@main/merged", "-o", family / "there.safetensors", *given, env=env))
    assert (family / "here.safetensors").read_bytes() == (family / "there.safetensors").read_bytes()
    ok(run_peru("unpack", "org/fft", "--task", "a", "-o", family / "a", env=env))  # the base is beside the artifact
    ok(run_peru("unpack", family / "fft/a.safetensors", "-o", family / "b2"))
    assert (family / "a/model.safetensors").read_bytes() == (family / "b2/model.safetensors").read_bytes()
