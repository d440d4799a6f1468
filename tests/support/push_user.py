"""Somebody who publishes with the real Hub client on a loopback server."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import random_pair, run_peru, save
from tests.support.hub_writes import READ_TOKEN, TOKEN, HubServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


class User:
    """Somebody with a token and a folder."""

    def __init__(self, hub: HubServer, folder: Path, here: Callable[..., str]) -> None:
        self.hub, self.folder, self.here = hub, folder, here  # `here` runs a command in this process, which asks no Hub
        self.env = {
            "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        base, fine = random_pair("bf16")
        save(base, folder / "base.safetensors")
        save(fine, folder / "a.safetensors")
        save(random_pair("bf16", seed=0)[1] | {"scalar": fine["scalar"] * 3}, folder / "b.safetensors")

    def peru(self, *arguments: object, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = run_peru(*arguments, env=self.env | env)
        assert done.returncode == code, done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr and READ_TOKEN not in done.stdout + done.stderr
        return done

    def pruning(self, *more: object) -> list[object]:
        base = ("--base", self.folder / "base.safetensors", "--base-id", f"org/base@{COMMIT}", "--no-sync")
        return ["prune", self.folder / "a.safetensors", *base, "-o", self.folder / "x.safetensors", "--keep", "10%", *more]

    def prune(self, *more: object, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        return self.peru(*self.pruning(*more), code=code, **env)


@pytest.fixture
def user(hub: HubServer, tmp_path: Path, peru) -> User:
    return User(hub, tmp_path, peru)
