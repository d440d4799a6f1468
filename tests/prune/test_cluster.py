# ruff: noqa: F811 - fixtures of another file
"""`prune --executor ray`: the same bytes, messages and exit codes as on one machine."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch

from peru_cli.artifacts import index
from peru_cli.checkpoints.local import sealed
from peru_cli.errors import BadFile
from peru_cli.finetunes import nodes
from peru_cli.streaming import workers
from peru_cli.vectors import orders, selection, thresholds
from tests.conftest import random_pair, run_peru, save
from tests.prune.test_resume import BASE, FINE, SMALL, VARIANTS, arguments, figures, files, hub, local, models, noted_at_once  # noqa: F401
from tests.support.fake_ray import FakeRay, RayActorError, RayError, RayTaskError, installed
from tests.support.hub_server import HubServer


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Ray in this process, with small batches."""
    return installed(monkeypatch, 1 << 17)


RAY = ["--executor", "ray"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("processors", [1, 5])
def test_same_bytes_as_one_machine(models: Path, peru, ray: FakeRay, monkeypatch, variant: str, processors: int) -> None:
    """Figures, too. If it is not foreseen where a threshold's quota ends, some tiles counted on equals that earlier ones had taken.

    Blocks are smaller than what a batch keeps here, so workers encode most of them."""
    monkeypatch.setattr(index.Stream, "__init__", partialmethod(index.Stream.__init__, block_entries=3000))
    ray.processors = processors
    if processors == 5:
        monkeypatch.setattr(thresholds, "FORESEEN", 0)
    again: list[bool] = []
    blocks: list[int] = []
    compute = orders.Encoding.compute

    def watched(self, station, tiles):
        again.append(self.again)
        reply = compute(self, station, tiles)
        blocks.append(sum(len(part.blocks) for parts in reply.parts for part in parts.values()))
        return reply

    monkeypatch.setattr(orders.Encoding, "compute", watched)
    name = "out" if variant == "several" else "out.safetensors"
    (models / "here").mkdir()
    (models / "there").mkdir()
    said = figures(peru(*arguments(models, models / "here" / name, *VARIANTS[variant], "--json")))
    assert not ray.tasks
    assert figures(peru(*arguments(models, models / "there" / name, *VARIANTS[variant], *RAY, "--json"))) == said
    assert files(models / "there") == files(models / "here")
    assert ray.tasks > 10
    if processors == 1 or variant not in ("lossless", "exact"):
        assert any(again) == (processors == 5)
    assert sum(blocks) > 3


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_same_bytes_for_other_dtypes(tmp_path: Path, peru, ray: FakeRay, dtype: str) -> None:
    for name, tensors in zip(("base", "fine"), random_pair(dtype), strict=True):
        save(tensors, tmp_path / f"{name}.safetensors")
    for out, more in (("here", []), ("there", RAY)):
        given = (tmp_path / "fine.safetensors", "-b", tmp_path / "base.safetensors", "-o", tmp_path / f"{out}.safetensors")
        peru("prune", *given, "--keep", "20%", "--tile-entries", 16384, *more)
    assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "there.safetensors").read_bytes()


def test_positions_are_sent_in_few_bytes(models: Path, peru, ray: FakeRay) -> None:
    """No message holds a batch's tensors: an entry that is kept takes at most 4 bytes of position and 4 of value."""
    peru(*arguments(models, models / "out.safetensors", "--keep", "15%", *RAY))
    assert ray.largest < 1 << 20


def test_models_from_the_hub_are_read_by_ranges(hub: HubServer, models: Path) -> None:
    """By workers, too; nothing is downloaded."""
    command = ["prune", f"a={FINE}", "-b", BASE, "-o", models / "hub.safetensors", "--base-id", "x/y", "--keep", "15%", *RAY]
    before = f"{SMALL}\nfrom tests.support.fake_ray import install\ninstall()"
    done = run_peru(*command, "--no-sync", "--tile-entries", 16384, env=hub.env(models / "hf"), before=before)
    assert done.returncode == 0, done.stderr
    assert (models / "hub.safetensors").read_bytes() == local(models)
    assert not list((models / "hf").rglob("*.safetensors"))


@pytest.mark.parametrize("first", ["here", "there"])
def test_what_one_way_has_finished_the_other_continues(models: Path, peru, ray: FakeRay, monkeypatch, first: str) -> None:
    """Interrupted on the cluster and continued here, and the other way round."""
    peru(*arguments(models, models / "whole.safetensors", "--keep", "15%"))
    out = models / "out.safetensors"
    with monkeypatch.context() as patch:
        name = "commit" if first == "here" else "done"
        real = getattr(selection.Select, name)

        def stopped(self, tile, result):
            if (tile if first == "here" else tile[-1]).tensor > 8:
                raise KeyboardInterrupt
            return real(self, tile, result)

        patch.setattr(selection.Select, name, stopped)
        peru(*arguments(models, out, "--keep", "15%", *(RAY if first == "there" else [])), code=130)
        assert "run the same command again" in peru.stderr
    peru(*arguments(models, out, "--keep", "15%", *(RAY if first == "here" else [])))
    assert "continuing after" in peru.stderr
    assert out.read_bytes() == (models / "whole.safetensors").read_bytes()


def test_an_error_of_a_worker_is_told_as_here(models: Path, peru, ray: FakeRay, monkeypatch) -> None:
    def fails(self, station, tiles):
        raise BadFile("layers.3: the file ends too early", "fetch it again")

    monkeypatch.setattr(thresholds._Counting, "compute", fails)
    peru(*arguments(models, models / "out.safetensors", "--keep", "15%", *RAY), code=1)
    assert peru.stderr.endswith("error: layers.3: the file ends too early\n  fetch it again\n")


def test_a_base_with_digests(models: Path, peru, ray: FakeRay, monkeypatch) -> None:
    """A merge tells its tensors' digests. Workers read all of it, so it is not read again here; and what was altered is refused."""
    tensors = {"layers.0.weight": torch.randn(900, 512), "layers.1.weight": torch.randn(300, 512)}
    save(tensors, models / "x.safetensors")
    save({name: tensor + 0.01 for name, tensor in tensors.items()}, models / "y.safetensors")
    peru("merge", models / "x.safetensors", models / "y.safetensors", "-o", models / "merged", "--method", "linear")
    given = ("prune", models / "x.safetensors", "-b", models / "merged", "--keep", "15%", "--tile-entries", 16384, "--threads", 1)
    peru(*given, "-o", models / "here.safetensors")
    read: list[int] = []
    ray.processors = 1  # here all workers are in one process, which asks each of them at the end whether it has read all
    complete = sealed.complete
    monkeypatch.setattr(sealed, "complete", lambda *args: read.append(1) or complete(*args))
    peru(*given, "-o", models / "there.safetensors", *RAY)
    assert (models / "there.safetensors").read_bytes() == (models / "here.safetensors").read_bytes() and not read
    file = models / "merged" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    peru(*given, "-o", models / "altered.safetensors", *RAY, code=1)
    assert "was altered after it was written" in peru.stderr and not (models / "altered.safetensors").exists()


def test_an_error_that_cannot_be_sent_names_the_node(models: Path, peru, ray: FakeRay, monkeypatch) -> None:
    class OddError(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} and {b}")

    def fails(self, station, tiles):
        raise OddError(1, 2)

    monkeypatch.setattr(thresholds._Counting, "compute", fails)
    peru(*arguments(models, models / "out.safetensors", "--keep", "15%", *RAY), code=1)
    assert "OddError on the node" in peru.stderr and "1 and 2" in peru.stderr


def on_a_node(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let relative paths begin in another folder for workers."""
    real = nodes.There.open
    monkeypatch.setattr(nodes.There, "open", lambda self: real(replace(self, folder=str(folder))))


def test_a_node_with_another_file_of_that_name_is_refused(models: Path, peru, ray: FakeRay, monkeypatch) -> None:
    (models / "node").mkdir()
    for name in ("base", "a"):
        (models / "node" / f"{name}.safetensors").write_bytes((models / f"{name}.safetensors").read_bytes())
    monkeypatch.chdir(models)
    on_a_node(monkeypatch, models / "node")
    given = ("prune", "a.safetensors", "-b", "base.safetensors", "-o", models / "out.safetensors", "--keep", "15%")
    peru(*given, *RAY, code=1)
    assert "base.safetensors on the node" in peru.stderr and "rsync -a" in peru.stderr


def test_a_node_without_the_file_is_named(models: Path, peru, ray: FakeRay, monkeypatch) -> None:
    (models / "node").mkdir()
    monkeypatch.chdir(models)
    on_a_node(monkeypatch, models / "node")
    peru("prune", "a.safetensors", "-b", "base.safetensors", "-o", models / "out.safetensors", "--keep", "15%", *RAY, code=1)
    assert "on the node" in peru.stderr and "base.safetensors: no such file" in peru.stderr


def test_a_node_with_another_version_is_refused(models: Path, peru, ray: FakeRay, monkeypatch) -> None:
    monkeypatch.setattr(
        FakeRay, "sent", lambda self, value, sent=FakeRay.sent: sent(self, "0.0.9" if value == workers.__version__ else value)
    )
    peru(*arguments(models, models / "out.safetensors", "--keep", "15%", *RAY), code=1)
    assert "this is peru 0.0.9, and the node" in peru.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RayError("the node died\nmore"), "the Ray cluster failed (RayError): the node died"),
        (RayActorError("died\nNo module named 'peru_cli'"), "a worker of the Ray cluster cannot run peru: No module named"),
        (RayTaskError(ModuleNotFoundError("No module named 'peru_cli'")), "a worker of the Ray cluster cannot run peru: No module named"),
    ],
)
def test_errors_of_ray_itself(models: Path, peru, ray: FakeRay, error: Exception, told: str) -> None:
    ray.lost = error
    peru(*arguments(models, models / "out.safetensors", "--keep", "15%", *RAY), code=1)
    assert told in peru.stderr


def test_workers_that_die_are_replaced(models: Path, peru, ray: FakeRay) -> None:
    """While they start, while they compute and while they encode; their jobs are given to others."""
    peru(*arguments(models, models / "here.safetensors", "--keep", "15%"))
    ray.deadly = {1, *range(4, 60, 7)}
    peru(*arguments(models, models / "there.safetensors", "--keep", "15%", *RAY))
    assert (models / "there.safetensors").read_bytes() == (models / "here.safetensors").read_bytes()
    assert ray.actors > 6


def test_a_job_that_kills_every_worker(models: Path, peru, ray: FakeRay) -> None:
    ray.deadly = range(6, 1000, 2)  # every actor begins, and dies of its first job
    peru(*arguments(models, models / "out.safetensors", "--keep", "15%", *RAY), code=1)
    assert "the Ray cluster failed (RayActorError)" in peru.stderr and ray.actors < 300


def test_a_cluster_without_processors(models: Path, peru, ray: FakeRay) -> None:
    ray.processors = 0
    peru(*arguments(models, models / "out.safetensors", "--keep", "15%", *RAY), code=1)
    assert "offers no processors" in peru.stderr


def test_without_ray(models: Path, peru, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    peru(*arguments(models, models / "out.safetensors", "--keep", "15%", *RAY), code=2)
    assert "pip install 'peru-cli[ray]'" in peru.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--keep", "5%", "--executor", "dask"], "neither local nor ray"),
        (["--keep", "5%", "--ray-address", "auto"], "goes with --executor ray"),
        (["--keep", "5%", *RAY, "--device", "cuda"], "not on GPUs"),
        (["--bits", "0.1", *RAY], "goes with --keep or --lossless"),
        (["--keep", "5%", *RAY, "--ray-address", "ray://host:10001"], "does not go through Ray's client"),
    ],
)
def test_options_that_do_not_go_together(models: Path, peru, ray: FakeRay, options: list[str], told: str) -> None:
    peru(*arguments(models, models / "out.safetensors", *options), code=2)
    assert told in peru.stderr


# -- lists of fine-tunes ----------------------------------------------------------------------------------


def test_a_list_of_fine_tunes(models: Path, peru) -> None:
    """The same files as with the models as arguments; other arguments may stand beside it."""
    text = f"# two tasks\n\n  one={models / 'a.safetensors'}  \n{models / 'b.safetensors'}\n"
    (models / "list.txt").write_text("\ufeff" + text, "utf-8")
    given = ("-b", models / "base.safetensors", "--keep", "15%", "--base-id", "x/y", "--json")
    said = json.loads(peru("prune", f"@{models / 'list.txt'}", f"c={models / 'b.safetensors'}", "-o", f"{models / 'listed'}/", *given))
    models_given = (f"one={models / 'a.safetensors'}", models / "b.safetensors", f"c={models / 'b.safetensors'}")
    peru("prune", *models_given, "-o", f"{models / 'named'}/", *given)
    assert [task["task"] for task in said] == ["one", "b", "c"]
    assert files(models / "listed") == files(models / "named")


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "there is no list"), (b"\n# nothing\n", "names no model"), (b"\xff\xfe\x00", "not a text file in UTF-8")],
)
def test_lists_that_are_refused(models: Path, peru, content: bytes | None, told: str) -> None:
    if content is not None:
        (models / "list.txt").write_bytes(content)
    given = ("-b", models / "base.safetensors", "-o", f"{models / 'out'}/", "--keep", "15%")
    peru("prune", f"@{models / 'list.txt'}", *given, code=2)
    assert told in peru.stderr


def test_a_file_whose_name_begins_with_an_at_sign(models: Path, peru, monkeypatch) -> None:
    """An argument that exists as a path is a path."""
    monkeypatch.chdir(models)
    (models / "a.safetensors").rename(models / "@a.safetensors")
    peru("prune", "@a.safetensors", "-b", "base.safetensors", "-o", "out.safetensors", "--keep", "15%")
    assert (models / "out.safetensors").exists()


# -- the real one -----------------------------------------------------------------------------------------


def test_on_a_cluster_of_its_own(tmp_path: Path) -> None:
    """benchmarks/speed/cluster.py does the same with two nodes, and kills workers."""
    pytest.importorskip("ray", reason="needs peru-cli[ray]")
    noise = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(700, 1024, generator=noise).bfloat16() for i in range(4)}
    fine = {k: (t.float() + torch.randint(-3, 4, t.shape, generator=noise) / 256).bfloat16() for k, t in base.items()}
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    for out, more in (("here", []), ("there", [*RAY, "--ray-address", "local"])):
        given = (tmp_path / "fine.safetensors", "-b", tmp_path / "base.safetensors", "-o", tmp_path / f"{out}.safetensors")
        done = run_peru("prune", *given, "--keep", "20%", *more, env={"PYTHONPATH": str(Path(__file__).parents[2])})
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "there.safetensors").read_bytes()
