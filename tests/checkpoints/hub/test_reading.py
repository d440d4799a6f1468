"""Models on the Hub, read through the shared cache by the real client from a loopback Hub."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import assert_same_tensors, random_pair, run_peru, save
from tests.support.hub_server import Handler, HubServer, Request


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "hf"


def model(folder: Path, tensors: dict, shards: int = 1, **config: object) -> Path:
    """A model folder with a config, in one file or in shards with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "test", **config}))
    (folder / "README.md").write_text("not needed")
    if shards == 1:
        save(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    index = {}
    for i in range(shards):
        part = {name: tensors[name] for name in names[i::shards]}
        save(part, folder / f"model-{i + 1}.safetensors")
        index |= dict.fromkeys(part, f"model-{i + 1}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture
def pair(hub: HubServer, tmp_path: Path) -> tuple[Path, Path]:
    """`meta/base` on the Hub in two shards, `org/fine` on the branch v2; their folders."""
    base, fine = random_pair("bf16")
    folders = model(tmp_path / "base", base, shards=2), model(tmp_path / "fine", fine, finetuned=True)
    hub.add("meta/base", folders[0])
    hub.add("org/fine", folders[1], revision="v2")
    return folders


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prune_from_the_cache_is_prune_from_files(hub: HubServer, pair: tuple[Path, Path], home: Path, tmp_path: Path) -> None:
    base, fine = pair
    env = hub.env(home)
    ok(run_peru("prune", f"fine={fine}", "-b", base, "-o", tmp_path / "local.safetensors", "--keep", "5%", "--base-id", "x/y"))
    command = ("prune", "org/fine@v2", "-b", "meta/base", "-o", tmp_path / "hub.safetensors", "--keep", "5%", "--base-id", "x/y")
    ok(run_peru(*command, env=env))
    assert (tmp_path / "hub.safetensors").read_bytes() == (tmp_path / "local.safetensors").read_bytes()
    wanted = sum(f.stat().st_size for folder in pair for f in folder.iterdir() if f.name != "README.md")
    assert hub.fetched() == wanted  # each needed file once, nothing else

    hub.clear()
    ok(run_peru(*command, "--force", env=env))
    assert [r.path for r in hub.requests] == ["/api/models/meta/base", "/api/models/org/fine/revision/v2"]


def test_nothing_is_asked_about_a_cached_commit(hub: HubServer, pair: tuple[Path, Path], home: Path, tmp_path: Path) -> None:
    names = [f"{name}@{hub.repos[name].refs[ref]}" for name, ref in (("org/fine", "v2"), ("meta/base", "main"))]
    command = ("prune", names[0], "-b", names[1], "-o", tmp_path / "a.safetensors", "--keep", "5%", "--force")
    ok(run_peru(*command, env=hub.env(home)))
    hub.clear()
    ok(run_peru(*command, env=hub.env(home)))
    assert not hub.requests


def test_offline_with_and_without_a_warm_cache(hub: HubServer, pair: tuple[Path, Path], home: Path, tmp_path: Path) -> None:
    command = ("prune", "org/fine@v2", "-b", "meta/base", "-o", tmp_path / "a.safetensors", "--keep", "5%", "--force")
    cold = run_peru(*command, env=hub.env(home, HF_HUB_OFFLINE="1"))
    assert cold.returncode == 1 and "meta/base is not in the cache, and HF_HUB_OFFLINE is set" in cold.stderr and "HF_HOME" in cold.stderr
    assert not hub.requests
    ok(run_peru(*command, env=hub.env(home)))
    made = (tmp_path / "a.safetensors").read_bytes()
    hub.clear()
    ok(run_peru(*command, env=hub.env(home, HF_HUB_OFFLINE="1")))
    assert (tmp_path / "a.safetensors").read_bytes() == made and not hub.requests


def test_the_cache_of_other_tools_is_read_offline(hub: HubServer, pair: tuple[Path, Path], home: Path, tmp_path: Path) -> None:
    download = "from huggingface_hub import hf_hub_download as get; get('org/fine', 'model.safetensors', revision='v2')"
    import os
    import sys

    subprocess.run([sys.executable, "-c", download], check=True, env={**os.environ, **hub.env(home)})
    shown = ok(run_peru("inspect", "org/fine@v2", "--json", env=hub.env(home, HF_HUB_OFFLINE="1")))
    assert json.loads(shown)["tensors"] == len(random_pair("bf16")[1])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("hf://models/org/fine@v2/model.safetensors", "safetensors file"), ("hf://org/fine@v2", "directory"), ("org/fine@v2", "directory")],
)
def test_every_form_of_a_name_finds_its_commit(hub: HubServer, pair: tuple[Path, Path], home: Path, name: str, kind: str) -> None:
    shown = json.loads(ok(run_peru("inspect", name, "--json", env=hub.env(home))))
    assert kind in shown["kind"] and hub.repos["org/fine"].refs["v2"][:12] in shown["kind"]


def test_a_mistyped_relative_path_is_not_sent(hub: HubServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    failed = run_peru("inspect", "models/secret-project", env=hub.env(home))
    assert failed.returncode == 2 and "no such file or folder" in failed.stderr and "hf://models/models/secret-project" in failed.stderr
    assert not hub.requests


def test_unpack_an_artifact_repo(hub: HubServer, pair: tuple[Path, Path], home: Path, tmp_path: Path) -> None:
    made = tmp_path / "a.safetensors"
    ok(run_peru("prune", pair[1], "-b", pair[0], "-o", made, "--lossless"))
    hub.add("org/artifact", {"a.safetensors": made, "README.md": b"card"})
    ok(run_peru("unpack", "org/artifact", "-b", "meta/base", "-o", tmp_path / "out", env=hub.env(home)))
    assert_same_tensors(tmp_path / "out" / "model.safetensors", random_pair("bf16")[1])
    assert "task fine" in ok(run_peru("inspect", "org/artifact", env=hub.env(home)))


# -- what the Hub refuses -----------------------------------------------------------------------------------


def refused(hub: HubServer, home: Path, name: str, *parts: str, code: int = 1, **env: str) -> None:
    failed = run_peru("inspect", name, env=hub.env(home, **env))
    assert failed.returncode == code, failed.stderr
    assert all(part in failed.stderr for part in parts), failed.stderr
    assert hub.token not in failed.stderr + failed.stdout and "Traceback" not in failed.stderr


def test_refusals_say_which_repo_file_and_variable(hub: HubServer, pair: tuple[Path, Path], home: Path) -> None:
    refused(hub, home, "org/none", "org/none: no such repo", "HF_TOKEN", "hf auth login")
    refused(hub, home, "org/none", "org/none: no such repo", "the token in use (HF_TOKEN)", HF_TOKEN=hub.token)
    refused(hub, home, "org/fine@v9", "org/fine has no revision 'v9'")
    refused(hub, home, "hf://datasets/org/fine", "is not a model repo", code=2)
    refused(hub, home, "hf://models/org/fine@v2/other.safetensors", "no such file", code=2)
    hub.add("org/gated", pair[1], gated=True)
    refused(hub, home, "org/gated", "org/gated@", "is gated", f"{hub.url}/org/gated", "HF_TOKEN")
    refused(hub, home, "org/fine@v2", "cannot reach http://127.0.0.1:9", "HF_ENDPOINT", HF_ENDPOINT="http://127.0.0.1:9")


def test_private_and_renamed_repos(hub: HubServer, pair: tuple[Path, Path], home: Path) -> None:
    hub.add("org/private", pair[1], private=True)
    refused(hub, home, "org/private", "org/private: no such repo", "or a private one")
    ok(run_peru("inspect", "org/private", env=hub.env(home, HF_TOKEN=hub.token)))
    hub.renamed["org/old"] = "org/private"
    shown = run_peru("inspect", "org/old", env=hub.env(home, HF_TOKEN=hub.token))
    assert "org/old is now called org/private" in shown.stderr and hub.token not in shown.stderr
    assert all(r.token is None for r in hub.requests if r.origin == "cdn")  # the token stays with the Hub


def test_the_cached_login_is_used(hub: HubServer, pair: tuple[Path, Path], home: Path) -> None:
    hub.add("org/private", pair[1], private=True)
    home.mkdir()
    (home / "token").write_text(hub.token)
    ok(run_peru("inspect", "org/private", env=hub.env(home)))


def test_an_index_cannot_leave_its_repo(hub: HubServer, pair: tuple[Path, Path], home: Path) -> None:
    index = json.dumps({"weight_map": {"a": "../../meta/base/model-1.safetensors"}}).encode()
    hub.add("org/evil", {"model.safetensors.index.json": index, "../up.safetensors": b"x", "/etc/passwd": b"y"})
    refused(hub, home, "org/evil", "org/evil@", "model.safetensors.index.json", "not a plain file name")
    assert not hub.fetched(".safetensors")


def test_requests_with_busy_and_broken_answers_are_repeated(hub: HubServer, pair: tuple[Path, Path], home: Path) -> None:
    answers = iter([(429, {"Retry_After": "1"}), (500, {}), (503, {})])

    def busy(handler: Handler, request: Request) -> bool:
        if "/api/" not in request.path or (answer := next(answers, None)) is None:
            return False
        handler.answer(answer[0], **answer[1])
        return True

    hub.fault(busy)
    ok(run_peru("inspect", "org/fine@v2", env=hub.env(home)))
    times = [r.at for r in hub.requests if "/api/" in r.path]
    assert len(times) == 4 and times[1] - times[0] >= 1.0


def test_endpoints_that_are_not_a_hub(hub: HubServer, home: Path) -> None:
    hub.fault(lambda handler, request: handler.answer(200, b"<html>", Content_Type="text/html") is None)
    refused(hub, home, "org/fine", "does not answer as the Hub does", "HF_ENDPOINT")
