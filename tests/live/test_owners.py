"""Who shares a model, and what happens to it while an artifact is applied: the base comes back, or an error says that it did not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peru_cli
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.errors import Mismatch, UsageError
from tests.conftest import save


@pytest.fixture
def made(tmp_path: Path, peru) -> Iterator[tuple[nn.Module, list[SparseDelta | Pack]]]:
    """A module, two sparse deltas and a pack of the same fine-tunes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)).bfloat16()
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save(base, tmp_path / "base.safetensors")
    tasks = []
    for task in "ab":
        fine = {name: (tensor + 0.1 * torch.randn(tensor.shape)).bfloat16() for name, tensor in base.items()}
        tasks.append(f"{task}={save(fine, tmp_path / f'{task}.safetensors')}")
    peru("prune", *tasks, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "deltas", "--keep", "20%", "--no-sync")
    peru("shuffle-pack", *tasks, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "pack.safetensors", "--no-sync")
    opened = [peru_cli.open_artifact(tmp_path / name) for name in ("deltas/a.safetensors", "deltas/b.safetensors", "pack.safetensors")]
    yield model, opened
    for artifact in opened:
        artifact.close()


def base_of(made: tuple[nn.Module, list[SparseDelta | Pack]]) -> dict[str, torch.Tensor]:
    return load_file(Path(made[1][2].path).parent / "base.safetensors")


def is_base(model: nn.Module, base: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> bool:
    state = model.state_dict()
    return all(state[name].dtype == dtype and torch.equal(state[name], tensor.to(dtype)) for name, tensor in base.items())


def apply(model: nn.Module | dict[str, torch.Tensor], artifact: SparseDelta | Pack, verify: bool = True) -> peru_cli.live.applied.Applied:
    return peru_cli.apply(model, artifact, task="a" if isinstance(artifact, Pack) else None, verify=verify)


@pytest.mark.parametrize("number", [1, 2])
def test_another_thread_gets_an_error_while_weights_are_in_use(made, number: int) -> None:
    """Only while they are in use: afterwards the other thread may apply."""
    model, artifacts = made
    base, said = base_of(made), []

    def other() -> None:
        try:
            with apply(model, artifacts[number]):
                said.append("applied")
        except UsageError as error:
            said.append(error.message)

    with apply(model, artifacts[0]):
        now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert "a.safetensors" in said[0] and "another thread" in said[0]
        assert is_base(model, now)
    assert is_base(model, base)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert said[1] == "applied" and is_base(model, base)


def test_threads_that_race_leave_the_base(made) -> None:
    """In every round, each of four threads either has the model to itself or is refused."""
    model, artifacts = made
    base, applied = base_of(made), [0]
    wrong = []

    def race(number: int) -> None:
        for _ in range(25):
            try:
                with apply(model, artifacts[number % 3], verify=False):
                    applied[0] += 1
            except UsageError:
                continue
            except Exception as error:  # shown by the test
                wrong.append(error)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and applied[0] > 0 and is_base(model, base)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_cast_meanwhile_is_restored_to_the_cast_base(made, number: int, dtype: torch.dtype) -> None:
    model, artifacts = made
    base = base_of(made)
    with apply(model, artifacts[number]):
        model.to(dtype)
    assert is_base(model, base, dtype)


@pytest.mark.parametrize("number", [0, 2])
def test_replaced_tensors_are_an_error(made, number: int) -> None:
    """Replaced by others, or moved to where there is no data."""
    model, artifacts = made
    fresh = nn.Linear(40, 30).bfloat16().weight
    with pytest.raises(Mismatch, match="the base was not restored"), apply(model, artifacts[number]):
        model[0].weight = fresh
    model.load_state_dict(base_of(made))
    with pytest.raises(Mismatch, match="the base was not restored"), apply(model, artifacts[number]):
        model.to("meta")


def test_nested_applies_to_a_state_dict_are_restored_in_reverse_order(made) -> None:
    _, artifacts = made
    base = base_of(made)
    state = {name: tensor.clone() for name, tensor in base.items()}
    first = apply(state, artifacts[0])
    second = apply(state, artifacts[1], verify=False)
    with pytest.raises(UsageError, match="restore the later one first"):
        first.restore()
    second.restore()
    first.restore()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())


def test_freed_weights_belong_to_nobody(made) -> None:
    """Claims were found by address. New weights at the address of freed ones belonged to the thread that had changed those."""
    _, artifacts = made
    base = base_of(made)
    refused: list[UsageError] = []

    def other(state: dict[str, torch.Tensor]) -> None:
        try:
            apply(state, artifacts[0]).restore()
        except UsageError as error:
            refused.append(error)

    seen: set[int] = set()
    for _ in range(50):
        state = {name: tensor.clone() for name, tensor in base.items()}
        again = seen & {tensor.data_ptr() for tensor in state.values()}
        thread = threading.Thread(target=other, args=(state,))
        thread.start()
        thread.join()
        if again or refused:
            break
        seen |= {tensor.data_ptr() for tensor in state.values()}
        apply(state, artifacts[0])  # dropped with the weights, never restored
        del state
    assert again and not refused
