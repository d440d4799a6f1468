"""Published files come back by name, on the base that they name; a base that moved is refused."""

from __future__ import annotations

import shlex

from safetensors.torch import load_file

from tests.conftest import assert_same_tensors
from tests.support.push_user import User, hub, user

__all__ = ["hub", "user"]


def test_published_outputs_are_read_by_name(user: User) -> None:
    """Several artifacts in a repo. Each unpacks without --base, with the base downloaded at the commit that it names."""
    at = user.folder
    first = user.hub.make("org/base", {"model.safetensors": (at / "base.safetensors").read_bytes(), "config.json": b"{}"}).refs["main"]
    user.hub.repos["org/base"].commit("main", {"model.safetensors": b"moved on"}, "newer")
    models = (f"a={at / 'a.safetensors'}", f"b={at / 'b.safetensors'}")
    named = ("-b", f"org/base@{first}", "-o", at / "hub/", "--lossless", "--no-sync", "--push", "me/deltas", "--private")
    user.peru("prune", *models, *named)
    local = ("-b", at / "base.safetensors", "--base-id", f"org/base@{first}", "-o", at / "local/", "--lossless", "--no-sync")
    user.here("prune", *models, *local)
    for name in "ab":
        assert (at / "hub" / f"{name}.safetensors").read_bytes() == (at / "local" / f"{name}.safetensors").read_bytes()
    several = user.peru("unpack", "me/deltas", "-o", at / "x", code=2).stderr
    assert "holds 2 artifacts: a, b" in several and "--task" in several and "such as hf://models/me/deltas@" in several
    user.hub.log.clear()
    user.peru("unpack", "me/deltas", "--task", "a", "-o", at / "back/", "--no-sync")
    assert_same_tensors(at / "back" / "model.safetensors", load_file(at / "a.safetensors"))
    assert not any("b.safetensors" in path for _, path, _, _ in user.hub.log)


def test_the_card_of_a_branch_names_the_branch(user: User) -> None:
    """Its command runs as it stands; the main branch is empty."""
    at = user.folder
    first = user.hub.make("org/base", {"model.safetensors": (at / "base.safetensors").read_bytes()}).refs["main"]
    user.peru("prune", f"a={at / 'a.safetensors'}", f"b={at / 'b.safetensors'}", "-b", f"org/base@{first}", "-o", at / "d/", "--lossless",
              "--no-sync", "--push", "me/deltas", "--revision", "v2")  # fmt: skip
    text = user.hub.repos["me/deltas"].files("v2")["README.md"].decode()
    command = shlex.split(next(line for line in text.splitlines() if line.startswith("peru unpack") and "--task b" in line))
    out = command.index("-o") + 1
    user.peru(*command[1:out], at / "back/", *command[out + 1 :], "--no-sync")
    assert_same_tensors(at / "back" / "model.safetensors", load_file(at / "b.safetensors"))


def test_a_base_that_moved_is_refused_before_it_is_downloaded(user: User) -> None:
    at = user.folder
    weights = (at / "base.safetensors").read_bytes()
    repo = user.hub.make("org/base", {"model.safetensors": weights})
    old = repo.refs["main"]
    user.here("prune", at / "a.safetensors", "-b", at / "base.safetensors", "--base-id", "org/base", "-o", at / "x.safetensors",
              "--keep", "5%", "--no-sync")  # fmt: skip
    repo.commit("main", {"model.safetensors": weights[:-2] + b"!!"}, "retrained")
    for base in ((), ("-b", "org/base"), ("-b", "org/base@main")):
        failed = user.peru("unpack", at / "x.safetensors", *base, "-o", at / "r.safetensors", code=1)
        assert "its weight files have changed" in failed.stderr and "it was made from org/base" in failed.stderr
    assert not user.hub.asked("GET", "/resolve/") and not user.hub.asked("HEAD", "/resolve/")
    user.peru("unpack", at / "x.safetensors", "-b", f"org/base@{old}", "-o", at / "r.safetensors", "--no-sync")
    user.here("unpack", at / "x.safetensors", "-b", at / "base.safetensors", "-o", at / "s.safetensors", "--no-sync")
    assert (at / "r.safetensors").read_bytes() == (at / "s.safetensors").read_bytes()
    del user.hub.repos["org/base"]
    gone = user.peru("unpack", at / "x.safetensors", "-o", at / "t.safetensors", code=1, HF_HOME=str(at / "other"))
    assert "was made from org/base, which cannot be read: " in gone.stderr and "--base BASE" in gone.stderr


def test_without_a_named_base(user: User) -> None:
    at = user.folder
    models = (f"x={at / 'a.safetensors'}", f"y={at / 'b.safetensors'}", "-b", at / "base.safetensors", "--no-sync")
    user.here("prune", at / "a.safetensors", "-b", at / "base.safetensors", "-o", at / "x.safetensors", "--keep", "5%", "--no-sync")
    user.here("unpack", at / "x.safetensors", "-o", at / "r.safetensors", code=2)
    assert "it does not name its base\n  add --base BASE" in user.here.stderr  # type: ignore[attr-defined]
    user.here("unpack", at / "x.safetensors", "--task", "b", "-o", at / "r.safetensors", code=2)
    assert "x.safetensors holds a" in user.here.stderr  # type: ignore[attr-defined]
    user.here("merge", *models, "-o", at / "fft", "-m", "ties", "--compress", "100%")
    user.here("unpack", at / "fft", "--task", "x", "-o", at / "x", "--no-sync")  # the merged model is beside it
    assert_same_tensors(at / "x" / "model.safetensors", load_file(at / "a.safetensors"))
    user.here("unpack", at / "fft", "--task", "z", "-o", at / "z", code=2)
    assert "no artifact of the task 'z'\n  it holds x, y: name one of these, or its file" in user.here.stderr  # type: ignore[attr-defined]
    user.peru("push", at / "fft", "me/fft")
    user.peru("unpack", "me/fft", "--task", "y", "-o", at / "y", "--no-sync")
    assert_same_tensors(at / "y" / "model.safetensors", load_file(at / "b.safetensors"))


def test_an_adapter_is_unpacked_on_the_base_that_it_names(user: User) -> None:
    at = user.folder
    commit = user.hub.make("org/base", {"model.safetensors": (at / "base.safetensors").read_bytes()}).refs["main"]
    user.peru("svd-lora", at / "a.safetensors", "-b", f"org/base@{commit}", "-o", at / "lora", "--rank", 2, "--push", "me/lora")
    user.peru("unpack", "me/lora", "-o", at / "r.safetensors", "--no-sync")
    user.here("unpack", at / "lora", "-b", at / "base.safetensors", "-o", at / "s.safetensors", "--no-sync")
    assert (at / "r.safetensors").read_bytes() == (at / "s.safetensors").read_bytes()
