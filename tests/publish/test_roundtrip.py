"""Every kind of output, published with the real client and read again from a Hub with the card's commands: the same tensors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import raw, run_peru, save
from tests.pack.test_superpose import family
from tests.support.hub_server import HubServer as ReadServer
from tests.support.hub_writes import TOKEN
from tests.support.hub_writes import HubServer as WriteServer

Peru = Callable[..., str]


class Hub:
    """Publishes on one server, reads from another that holds what was published; a base and two fine-tunes."""

    def __init__(self, writes: WriteServer, reads: ReadServer, folder: Path, here: Peru) -> None:
        self.writes, self.reads, self.folder, self.here = writes, reads, folder, here
        base, self.fine = family("ab", "bf16")
        self.base = save(base, folder / "base.safetensors")
        self.at = {task: save(table, folder / f"{task}.safetensors") for task, table in self.fine.items()}
        self.names = [f"{task}={self.at[task]}" for task in "ab"]

    def push(self, output: Path, repo: str) -> str:
        """Publish, and copy the repo to the other server. Returns the card."""
        env = {"HF_ENDPOINT": self.writes.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(self.folder / "w"), "HF_HUB_OFFLINE": "0"}
        done = run_peru("push", output, repo, env=env | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})
        assert done.returncode == 0, done.stderr
        files = self.writes.repos[repo].files()
        self.reads.add(repo, dict(files))
        assert str(self.folder).encode() not in files["README.md"]
        return files["README.md"].decode()

    def pull(self, *arguments: object) -> None:
        done = run_peru(*arguments, env=self.reads.env(self.folder / "r"))
        assert done.returncode == 0, done.stderr

    def follow(self, card: str, task: str) -> dict[str, bytes]:
        """Run the card's command for a task, with our base in place of BASE. Returns its tensors."""
        lines = [line for line in card.splitlines() if line.startswith("peru unpack") and re.search(rf"-o ({task}|restored)/$", line)]
        assert len(lines) == 1, card
        words = ["" if word == "peru" else str(self.base) if word == "BASE" else word for word in shlex.split(lines[0])][1:]
        out = self.folder / "pulled"
        self.pull(*words[:-1], out, "--force", "--no-sync")
        return {name: raw(tensor) for name, tensor in load_file(out / "model.safetensors").items()}

    def unpacked(self, *arguments: object) -> dict[str, bytes]:
        self.here("unpack", *arguments, "-o", self.folder / "local.safetensors", "--force", "--no-sync")
        return {name: raw(tensor) for name, tensor in load_file(self.folder / "local.safetensors").items()}


@pytest.fixture
def hub(tmp_path: Path, peru: Peru) -> Iterator[Hub]:
    with WriteServer() as writes, ReadServer() as reads:
        yield Hub(writes, reads, tmp_path, peru)


@pytest.mark.parametrize(
    "options", [["--lossless"], ["--keep", "10%"], ["--keep", "10%", "--values", "log2"], ["--max-bytes", "4kB"]], ids=" ".join
)
def test_a_pushed_artifact_comes_back_by_its_cards_command(hub: Hub, options: list[str]) -> None:
    out = hub.folder / "x.safetensors"
    hub.here("prune", hub.names[0], "-b", hub.base, "-o", out, *options)
    found = hub.follow(hub.push(out, "me/x"), "a|x")
    assert found == hub.unpacked(out, "-b", hub.base)
    if options == ["--lossless"]:
        assert found == {name: raw(tensor) for name, tensor in hub.fine["a"].items()}


def test_each_of_several_pushed_artifacts_comes_back(hub: Hub) -> None:
    hub.here("prune", *hub.names, "-b", hub.base, "-o", f"{hub.folder}/deltas/", "--keep", "5%")
    card = hub.push(hub.folder / "deltas", "me/deltas")
    assert hub.follow(card, "b") == hub.unpacked(hub.folder / "deltas" / "b.safetensors", "-b", hub.base)


def test_a_pushed_adapter_comes_back(hub: Hub) -> None:
    hub.here("svd-lora", hub.at["a"], "-b", hub.base, "-o", hub.folder / "lora", "--rank", 2)
    card = hub.push(hub.folder / "lora", "me/lora")
    assert hub.follow(card, "a") == hub.unpacked(hub.folder / "lora", "-b", hub.base)


def test_a_pushed_merge_comes_back_under_each_head(hub: Hub) -> None:
    merged = hub.folder / "m"
    hub.here("merge", *hub.names, "-b", hub.base, "-o", merged, "-m", "task-arithmetic")
    hub.push(merged, "me/m")
    hub.pull("prune", hub.names[0], "-b", "me/m", "-o", hub.folder / "d.safetensors", "--lossless")  # it holds digests of what was pulled
    assert hub.unpacked(hub.folder / "d.safetensors", "-b", merged) == {name: raw(tensor) for name, tensor in hub.fine["a"].items()}
    files = hub.writes.repos["me/m"].files()
    assert files["heads/b.safetensors"] == (merged / "heads" / "b.safetensors").read_bytes()


def test_a_merge_with_deltas_of_it(hub: Hub) -> None:
    hub.here("merge", *hub.names, "-b", hub.base, "-o", hub.folder / "fft", "-m", "task-arithmetic", "--compress", "5%")
    card = hub.push(hub.folder / "fft", "me/fft")
    assert hub.follow(card, "b") == hub.unpacked(hub.folder / "fft" / "b.safetensors")


@pytest.mark.parametrize("options", [[], ["--residual", "5%"], ["--method", "tall-masks"]], ids=["pack", "residual", "masks"])
def test_each_task_of_a_pushed_pack_comes_back(hub: Hub, options: list[str]) -> None:
    out = hub.folder / "pack.safetensors"
    hub.here("shuffle-pack", *hub.names, "-b", hub.base, "-o", out, *options)
    card = hub.push(out, "me/pack")
    assert "| `pack.safetensors` | a, b |" in card
    for task in "ab":
        assert f"peru unpack me/pack --task {task} --base BASE -o {task}/" in card
        assert hub.follow(card, task) == hub.unpacked(out, "--task", task, "-b", hub.base)


def test_a_pack_whose_base_is_published_too(hub: Hub) -> None:
    out, merged = hub.folder / "pack.safetensors", hub.folder / "merged"
    hub.here("shuffle-pack", *hub.names, "-b", hub.base, "-o", out, "--merge-base", merged, "--base-id", "me/merged")
    hub.push(merged, "me/merged")
    card = hub.push(out, "me/pack")
    assert "peru unpack me/pack --task b -o b/" in card and 'base_model: "me/merged"' in card
    assert hub.follow(card, "b") == hub.unpacked(out, "--task", "b", "-b", merged)
