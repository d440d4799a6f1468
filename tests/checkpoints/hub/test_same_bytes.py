"""The same bytes from files on disk, from the cache and by ranges, for every output made from models on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.hub.test_reading import ok
from tests.conftest import run_peru
from tests.support import models
from tests.support.hub_server import HubServer

COMMANDS = {
    "prune": (("prune",), ("--keep", "5%")),
    "prune tensor": (("prune",), ("--keep", "5%", "--scope", "tensor")),
    "prune lossless": (("prune",), ("--lossless",)),
    "svd-lora": (("svd-lora",), ("--rank", "2")),
    "shuffle-pack": (("shuffle-pack",), ()),
    "tall-masks": (("shuffle-pack",), ("--method", "tall-masks")),
    "merge": (("merge",), ("--method", "ties", "--keep", "20%")),
    "merge, compressed": (("merge",), ("--method", "task-arithmetic", "--compress", "5%")),
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A base and two fine-tunes: tiny real models, local and on the Hub."""
    with HubServer() as server:
        base, fine = models.pair(models.llama, tmp_path)
        _, other = models.pair(models.llama, tmp_path / "b", change=0.03)
        for name, folder in (("meta/base", base), ("org/a", fine), ("org/b", other)):
            server.add(name, folder)
        yield server


@pytest.mark.parametrize("what", COMMANDS)
def test_files_cache_and_ranges_give_the_same_bytes(hub: HubServer, tmp_path: Path, what: str) -> None:
    (verb,), options = COMMANDS[what]
    base_id = f"meta/base@{hub.repos['meta/base'].refs['main']}"
    here = ("fine", "b/fine") if verb != "svd-lora" else ("fine",)
    names = {"files": [tmp_path / f for f in here], "cache": ["org/a", "org/b"][: len(here)], "ranges": ["org/a", "org/b"][: len(here)]}
    made = {}
    for way, given in names.items():
        tasks = [f"{task}={name}" for task, name in zip("ab", given, strict=False)]
        base = ("-b", tmp_path / "base", "--base-id", base_id) if way == "files" else ("-b", "meta/base")
        home = tmp_path / f"hf-{way}"
        out = tmp_path / way / ("out.safetensors" if verb == "shuffle-pack" else "out")
        out.parent.mkdir()
        target = f"{out}/" if verb == "prune" else out
        ok(run_peru(verb, *tasks, *base, "-o", target, *options, *(["--stream"] if way == "ranges" else []), env=hub.env(home)))
        files = [out] if out.is_file() else sorted(p for p in out.rglob("*") if p.is_file() and p.name != "README.md")
        made[way] = {p.relative_to(out.parent): p.read_bytes() for p in files}
        assert [p for p in home.rglob("*") if p.is_file()] == [] or way == "cache"
    assert made["files"] == made["cache"] == made["ranges"] and any(p.suffix == ".safetensors" for p in made["files"])
