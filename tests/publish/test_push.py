"""Publishing with the real Hub client to a loopback server: one commit or nothing, cards, rights, kills, and no token anywhere."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import random_pair, save
from tests.support.hub_writes import CUT, READ_TOKEN, TOKEN
from tests.support.push_user import COMMIT, User, hub, user

__all__ = ["hub", "user"]


def front(card: bytes) -> dict:
    """The card's metadata."""
    match = re.match(r"---\n(.*?\n)---\n", card.decode(), re.DOTALL)
    assert match
    return yaml.safe_load(match.group(1))


def test_an_artifact_and_its_card_go_out_in_one_commit(user: User) -> None:
    said = json.loads(user.prune("--push", "me/deltas", "--private", "--commit-message", "First", "--json").stdout)
    repo = user.hub.repos["me/deltas"]
    assert repo.private and len(user.hub.asked("POST", "/commit/")) == 1 and list(repo.titles.values())[-1] == "First"
    files = repo.files()
    assert sorted(files) == ["README.md", "x.safetensors"]
    assert files["x.safetensors"] == (user.folder / "x.safetensors").read_bytes()
    (result,) = said
    assert result["published"]["commit"] == repo.refs["main"] and result["published"]["new"]
    about = front(files["README.md"])
    assert about["base_model"] == "org/base" and about["base_model_relation"] == "adapter" and about["library_name"] == "peru"
    assert {"peru", "sparse-delta"} <= set(about["tags"])
    text = files["README.md"].decode()
    assert f"{len(files['x.safetensors']):,}" in text and "peru unpack me/deltas -o x/" in text and COMMIT in text
    assert str(user.folder) not in text
    for content in files.values():
        assert TOKEN.encode() not in content


def test_the_token_goes_to_the_hub_and_to_no_other_origin(user: User) -> None:
    user.prune("--push", "me/deltas")
    stored = [(token, host) for method, path, token, host in user.hub.log if path.startswith("/store/")]
    assert stored and all(not token and host == "localhost" for token, host in stored)
    assert all(token for _, path, token, _ in user.hub.log if path.startswith("/api/") and path != "/api/verify")
    for path in user.folder.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_several_tasks_share_a_repo_and_a_card(user: User) -> None:
    at = user.folder
    models = (f"sst2={at / 'a.safetensors'}", f"news={at / 'b.safetensors'}")
    (at / "deltas").mkdir()
    (at / "deltas" / "older.safetensors").write_bytes(b"not to be published")
    user.peru("prune", *models, "-b", at / "base.safetensors", "-o", at / "deltas", "--lossless", "--no-sync", "--push", "team/deltas")
    files = user.hub.repos["team/deltas"].files()
    assert sorted(files) == ["README.md", "news.safetensors", "sst2.safetensors"]
    card = files["README.md"].decode()
    assert "base_model" not in front(files["README.md"]) and "do not name their base" in card
    assert "peru unpack team/deltas --task sst2 --base BASE -o sst2/" in card and "lossless" in card


def test_a_merge_is_published_with_its_heads_and_its_card(user: User) -> None:
    at = user.folder
    models = (f"x={at / 'a.safetensors'}", f"y={at / 'b.safetensors'}", "-b", at / "base.safetensors")
    user.peru(
        "merge", *models, "-o", at / "m", "-m", "ties", "--per-task", "layers.10", "--no-sync", "--push", "me/m", "--base-id", "org/base"
    )
    files = user.hub.repos["me/m"].files()
    assert sorted(files) == ["README.md", "heads/x.safetensors", "heads/y.safetensors", "model.safetensors"]
    assert files == {name: (at / "m" / name).read_bytes() for name in files}
    about = front(files["README.md"])
    assert about["base_model"] == "org/base" and about["base_model_relation"] == "merge" and "peru" in about["tags"]
    nbytes = sum(t.nbytes for t in load_file(at / "m" / "model.safetensors").values())
    assert f"{nbytes:,} bytes" in files["README.md"].decode()
    user.peru("merge", *models, "-o", at / "fft", "-m", "ties", "--compress", "5%", "--no-sync", "--push", "me/fft")
    files = user.hub.repos["me/fft"].files()
    assert sorted(files) == ["README.md", "merged/README.md", "merged/model.safetensors", "x.safetensors", "y.safetensors"]
    assert "peru unpack me/fft --task x --base hf://models/me/fft/merged -o x/" in files["README.md"].decode()


def test_adapters_and_unpacked_models(user: User) -> None:
    at = user.folder
    base = ("-b", at / "base.safetensors", "--no-sync")
    user.peru(
        "svd-lora", at / "a.safetensors", *base, "-o", at / "lora", "--rank", 2, "--base-id", f"org/base@{COMMIT}", "--push", "me/lora"
    )
    files = user.hub.repos["me/lora"].files()
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(files)
    about = front(files["README.md"])
    assert about["base_model"] == "org/base" and about["base_model_relation"] == "adapter" and about["library_name"] == "peft"
    assert f"peru unpack me/lora --base org/base@{COMMIT} -o restored/" in files["README.md"].decode()
    user.here(*user.pruning())
    user.peru("unpack", at / "x.safetensors", *base, "-o", at / "full", "--push", "me/full", "--revision", "v1")
    repo = user.hub.repos["me/full"]
    assert sorted(repo.files("v1")) == ["README.md", "model.safetensors"] and not repo.files("main")
    assert front(repo.files("v1")["README.md"])["base_model"] == "org/base"


# -- existing content ----------------------------------------------------------------------------------------


def test_a_repo_with_content_is_left_alone_unless_forced(user: User) -> None:
    repo = user.hub.make("me/deltas", {"model.safetensors": b"old weights", "notes.txt": b"mine"})
    before = repo.refs["main"]
    failed = user.prune("--push", "me/deltas", code=2)
    assert "me/deltas holds 2 files already: model.safetensors, notes.txt" in failed.stderr and "--force" in failed.stderr
    assert not (user.folder / "x.safetensors").exists() and not user.hub.asked("POST") and repo.refs["main"] == before
    user.prune("--push", "me/deltas", "--force")
    assert sorted(repo.files()) == ["README.md", "x.safetensors"]  # no old weights that transformers would mistake for the model
    assert repo.parents[repo.refs["main"]] == before and repo.files(before)["notes.txt"] == b"mine"


def test_existing_content_is_not_published_twice(user: User) -> None:
    user.prune("--push", "me/deltas")
    repo = user.hub.repos["me/deltas"]
    commits = dict(repo.commits)
    said = json.loads(user.peru("push", user.folder / "x.safetensors", "me/deltas", "--json").stdout)
    assert said["published"] == {
        "repo": "me/deltas", "commit": repo.refs["main"], "url": f"{user.hub.endpoint}/me/deltas/commit/{repo.refs['main']}", "new": False,
    }  # fmt: skip
    assert repo.commits == commits
    user.here(*user.pruning("--force", "--keep", "5%"))
    assert "holds 2 files already" in user.peru("push", user.folder / "x.safetensors", "me/deltas", code=2).stderr


def test_a_new_branch_holds_only_the_output(user: User) -> None:
    repo = user.hub.make("me/deltas", {"model.safetensors": b"version 1"})
    main = repo.refs["main"]
    user.prune("--push", "me/deltas", "--revision", "v2")
    assert sorted(repo.files("v2")) == ["README.md", "x.safetensors"] and repo.refs["main"] == main


def test_a_private_output_never_goes_to_a_public_repo(user: User) -> None:
    user.hub.make("me/deltas", {})
    assert "exists and is public" in user.prune("--push", "me/deltas", "--private", code=2).stderr
    user.hub.repos["me/deltas"].private = True
    user.prune("--push", "me/deltas", "--private")


def test_only_what_peru_writes_is_published(user: User) -> None:
    folder = user.folder / "out"
    (folder / ".git").mkdir(parents=True)
    for name in (".env", "secret.key", "notes.txt", "config.json", ".git/config.json"):
        (folder / name).write_text("{}")
    save(random_pair("bf16")[0], folder / "model.safetensors")
    said = user.peru("push", folder, "me/out")
    assert sorted(user.hub.repos["me/out"].files()) == ["README.md", "config.json", "model.safetensors"]
    assert "not published, because peru does not write such files: .env, .git/config.json, notes.txt, secret.key" in said.stderr
    (folder / "model.safetensors").unlink()
    assert "nothing that peru publishes" in user.peru("push", folder, "me/other", code=2).stderr


def test_a_dry_run_asks_and_writes_nothing(user: User) -> None:
    assert "will be published on the Hub: me/deltas" in user.prune("--push", "me/deltas", "--dry-run").stderr
    assert user.hub.log and not user.hub.asked("POST") and not user.hub.asked("PUT")


def test_names_cannot_inject_yaml_or_markdown(user: User) -> None:
    at = user.folder
    user.peru("prune", at / "a.safetensors", "-b", at / "base.safetensors", "-o", at / "x.safetensors", "--keep", "5%", "--no-sync",
              "--base-id", "---\u2028: [x](y) `|", "--push", "me/odd", code=2)  # fmt: skip
    user.peru("prune", at / "a.safetensors", "-b", at / "base.safetensors", "-o", at / "x.safetensors", "--keep", "5%", "--no-sync",
              "--base-id", "---: [x](y) <b>", "--push", "me/odd")  # fmt: skip
    about = front(user.hub.repos["me/odd"].files()["README.md"])
    assert set(about) == {"library_name", "tags"}


# -- what fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "env", "code", "said"),
    [
        (("--push", "me/x"), {"HF_TOKEN": ""}, 1, "there is no token for the Hub\n  create a token"),
        (("--push", "me/x"), {"HF_TOKEN": READ_TOKEN}, 1, "is read-only"),
        (("--push", "me/x"), {"HF_TOKEN": "hf_wrong"}, 1, "does not accept the token"),
        (("--push", "other/x"), {}, 1, "the token belongs to me, who is not a member of other\n  name a repo of me or team: me/x"),
        (("--push", "me/x"), {"HF_HUB_OFFLINE": "1"}, 1, "HF_HUB_OFFLINE is set"),
        (("--push", "me/x"), {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "http://127.0.0.1:9 cannot be reached"),
    ],
    ids=["none", "read", "wrong", "other", "offline", "down"],
)
def test_outputs_that_cannot_be_published_are_refused_before_any_work(user: User, more: tuple, env: dict, code: int, said: str) -> None:
    failed = user.prune(*more, code=code, **env)
    assert said in failed.stderr and "Traceback" not in failed.stderr
    assert not (user.folder / "x.safetensors").exists() and not user.hub.asked("POST")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--push", "x"), "write it as org/name"),
        (("--push", "me/x", "--revision", "a b"), "not the name of a branch"),
        (("--push", "me/x", "--commit-message", " "), "--commit-message is empty"),
        (("--private",), "add --push org/name"),
        (("--revision", "x"), "add --push org/name"),
    ],
)
def test_invalid_options_are_reported_without_asking_the_hub(user: User, more: tuple, said: str) -> None:
    user.here(*user.pruning(*more), code=2)
    assert said in user.here.stderr and not user.hub.log  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "part", "status", "said"),
    [
        ("POST", "/api/repos/create", 403, "no write access"),
        ("POST", "/preupload/", 403, "no write access"),
        ("POST", "objects/batch", 401, "does not accept the token"),
        ("PUT", "/store/", 403, "no write access"),
        ("POST", "/commit/", 500, "the Hub failed with status 500"),
        ("POST", "/commit/", 429, "too many requests"),
    ],
)
def test_a_failed_push_keeps_the_output_and_publishes_nothing(user: User, method: str, part: str, status: int, said: str) -> None:
    user.hub.before = lambda verb, path: status if verb == method and part in path else None
    failed = user.prune("--push", "me/deltas", code=1)
    assert said in failed.stderr and "x.safetensors is complete, but not published" in failed.stderr, failed.stderr
    assert f"then: peru push {user.folder / 'x.safetensors'} me/deltas" in failed.stderr
    assert "me/deltas" not in user.hub.repos or not user.hub.repos["me/deltas"].files()


def test_an_interrupted_upload_is_retried(user: User) -> None:
    user.hub.before = lambda verb, path: CUT if verb == "PUT" and len(user.hub.asked("PUT")) == 1 else None
    user.prune("--push", "me/deltas")
    assert len(user.hub.asked("PUT")) == 2 and sorted(user.hub.repos["me/deltas"].files()) == ["README.md", "x.safetensors"]


def test_somebody_else_publishes_meanwhile(user: User) -> None:
    def before(method: str, path: str) -> None:
        if "/commit/" in path and "me/deltas" in user.hub.repos:
            user.hub.repos["me/deltas"].commit("main", {"theirs.txt": b"theirs"}, "theirs")

    user.hub.before = before
    assert "changed by somebody else" in user.prune("--push", "me/deltas", code=1).stderr
    assert user.hub.repos["me/deltas"].files() == {"theirs.txt": b"theirs"}


class Killed:
    """`peru push`, stopped when it makes a certain request."""

    def __init__(self, user: User, number: int, method: str, part: str, after: bool = False) -> None:
        self.asked, done = threading.Event(), threading.Event()
        process: list[subprocess.Popen[str]] = []

        def before(verb: str, path: str) -> int | None:
            if verb == method and part in path and not self.asked.is_set():
                self.asked.set()
                process[0].send_signal(number)
                done.wait(20)
                return 503
            return None

        user.hub.before = before
        command = [sys.executable, "-m", "peru_cli", "push", str(user.folder / "x.safetensors"), "me/deltas"]
        process.append(subprocess.Popen(command, env={**os.environ, **user.env}, stderr=subprocess.PIPE, text=True))
        try:
            self.stderr = process[0].communicate(timeout=60)[1]
        finally:
            done.set()
            process[0].kill()
        self.code = process[0].returncode
        user.hub.before = lambda verb, path: None
        assert self.asked.is_set(), self.stderr


@pytest.mark.parametrize(
    ("number", "method", "part"),
    [
        (signal.SIGKILL, "POST", "/repos/create"),
        (signal.SIGKILL, "PUT", "/store/"),
        (signal.SIGKILL, "POST", "/commit/"),
        (signal.SIGTERM, "PUT", "/store/"),
        (signal.SIGTERM, "POST", "/commit/"),
    ],
)
def test_a_killed_push_publishes_nothing_and_can_be_repeated(user: User, number: int, method: str, part: str) -> None:
    user.here(*user.pruning())
    killed = Killed(user, number, method, part)
    assert killed.code == (130 if number == signal.SIGTERM else -number)
    assert "me/deltas" not in user.hub.repos or not user.hub.repos["me/deltas"].files()
    if number == signal.SIGTERM:
        assert "x.safetensors is complete" in killed.stderr and "Traceback" not in killed.stderr
    user.peru("push", user.folder / "x.safetensors", "me/deltas")
    repo = user.hub.repos["me/deltas"]
    assert sorted(repo.files()) == ["README.md", "x.safetensors"] and len(repo.commits) == 2
