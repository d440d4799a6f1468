"""Any input of a user or a stranger gets an exit code, a message that names what is wrong, and leaves nothing behind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peru_cli.checkpoints.resolve import open_model
from peru_cli.errors import PeruError
from peru_cli.finetunes.open import open_artifact
from peru_cli.finetunes.verify import verify as verify_source
from peru_cli.streaming.arrays import CPU
from peru_cli.vectors.family import StreamSettings
from tests.conftest import assert_same_tensors, random_pair, run_peru, save

NOISE = torch.Generator()


def tiny() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A pair whose artifact is small: a delta, a copy, a head stored whole."""
    NOISE.manual_seed(7)
    base = {"w": torch.randn(60, generator=NOISE).bfloat16(), "ids": torch.arange(3)}
    fine = {"w": base["w"].clone(), "ids": torch.arange(3), "head": torch.randn(2, generator=NOISE).bfloat16()}
    fine["w"][::4] += 1
    return base, fine


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two files, and their tensors on demand."""
    base, fine = random_pair("bf16")
    return save(base, tmp_path / "base.safetensors"), save(fine, tmp_path / "fine.safetensors")


def nothing_new(folder: Path, before: set[Path]) -> None:
    assert set(folder.rglob("*")) == before


def refused(peru: Callable[..., str], folder: Path, code: int, *arguments: object, says: str | tuple[str, ...]) -> None:
    """The command fails with this code, prints all of this, and leaves the folder unchanged."""
    before = set(folder.rglob("*"))
    peru(*arguments, code=code)
    message = peru.stderr  # type: ignore[attr-defined]
    for text in (says,) if isinstance(says, str) else says:
        assert text in message, message
    assert "Traceback" not in message and "defect" not in message
    nothing_new(folder, before)


# -- wrong bases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["r.safetensors", "folder"])
@pytest.mark.parametrize("wrong", ["contents", "one entry", "copied tensor", "shape", "dtype", "missing"])
def test_a_wrong_base_is_named_and_nothing_is_written(tmp_path: Path, peru, pair, wrong: str, out: str) -> None:
    base_file, fine_file = pair
    peru("prune", fine_file, "-b", base_file, "-o", tmp_path / "a.safetensors", "--keep", "5%", "--no-sync", "--base-id", "org/base@1234")
    base = load_file(base_file)
    if wrong == "contents":
        base = {n: t + 1 for n, t in base.items()}
    elif wrong == "one entry":
        base["layers.1.mlp.weight"][7, 7] += 1
    elif wrong == "copied tensor":
        base["position_ids"][3] = 0
    elif wrong == "shape":
        base["layers.1.mlp.weight"] = base["layers.1.mlp.weight"].T.contiguous()
    elif wrong == "dtype":
        base["layers.1.mlp.weight"] = base["layers.1.mlp.weight"].half()
    else:
        del base["layers.1.mlp.weight"]
    other = save(base, tmp_path / "other.safetensors")
    name = "position_ids" if wrong == "copied tensor" else "embed.weight" if wrong == "contents" else "layers.1.mlp.weight"
    arguments = ["unpack", tmp_path / "a.safetensors", "-b", other, "-o", tmp_path / out, "--no-sync", "--threads", 1]
    refused(peru, tmp_path, 1, *arguments, says=(name, str(other), "a.safetensors", "org/base@1234"))


def test_a_pipe_gets_no_byte_of_a_wrong_result(tmp_path: Path, peru, pair) -> None:
    base_file, fine_file = pair
    peru("prune", fine_file, "-b", base_file, "-o", tmp_path / "a.safetensors", "--keep", "5%", "--no-sync")
    base = load_file(base_file)
    base["scalar"] += 1  # the last tensor by name
    done = run_peru("unpack", tmp_path / "a.safetensors", "-b", save(base, tmp_path / "other.safetensors"), "-o", "-")
    assert done.returncode == 1 and done.stdout == "" and "scalar: different contents" in done.stderr


def test_models_of_other_families_are_refused_with_what_was_compared(tmp_path: Path, peru, pair) -> None:
    _, fine = pair
    other = save({"conv.weight": torch.randn(30, 30), "embed.weight": torch.randn(3, 3)}, tmp_path / "other.safetensors")
    arguments = ["prune", fine, "-b", other, "-o", tmp_path / "a.safetensors", "--keep", "5%"]
    refused(peru, tmp_path, 1, *arguments, says=("embed.weight", "[701, 48] against [3, 3]", "conv.weight", str(other)))


# -- damaged artifacts --------------------------------------------------------------------------------


def test_a_truncated_artifact_is_refused_wherever_it_ends(tmp_path: Path, peru, pair) -> None:
    base, fine = pair
    artifact = tmp_path / "a.safetensors"
    peru("prune", fine, "-b", base, "-o", artifact, "--keep", "5%", "--no-sync")
    whole = artifact.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for size in (0, 1, 7, 8, 9, header, header + 7, header + 8, header + 9, len(whole) // 2, len(whole) - 1):
        artifact.write_bytes(whole[:size])
        refused(peru, tmp_path, 1, "unpack", artifact, "-b", base, "-o", tmp_path / "r.safetensors", "--no-sync", says=str(artifact))
    artifact.write_bytes(whole + b"\0")
    refused(peru, tmp_path, 1, "unpack", artifact, "-b", base, "-o", tmp_path / "r.safetensors", "--no-sync", says="overlong")


def verify(artifact: Path, base: Path) -> None:
    """Read all of an artifact without writing anything."""
    with open_model(str(base)) as model, open_artifact(artifact, str(artifact), model, None) as source:
        source.contents()
        verify_source(source, StreamSettings(CPU, 1, 1 << 14))


@pytest.mark.parametrize("change", ["a bit", "another value"])
def test_every_altered_byte_of_an_artifact_is_detected(tmp_path: Path, peru, change: str) -> None:
    """One bit of every byte, and any other value, through the layers below the command line; one bit of every seventh byte
    through all layers."""
    base, fine = tiny()
    (tmp_path / "model").mkdir()
    save(fine, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"n": 1}')
    save(base, tmp_path / "base.safetensors")
    artifact = tmp_path / "a.safetensors"
    peru("prune", tmp_path / "model", "-b", tmp_path / "base.safetensors", "-o", artifact, "--lossless", "--no-sync")
    whole = artifact.read_bytes()
    assert len(whole) < 4000
    noise = random.Random(3)
    arguments = ["unpack", artifact, "-b", tmp_path / "base.safetensors", "--no-sync", "--quiet", "-o", tmp_path / "r.safetensors"]
    peru(*arguments)
    assert_same_tensors(tmp_path / "r.safetensors", fine)
    (tmp_path / "r.safetensors").unlink()
    before = set(tmp_path.rglob("*"))
    verify(artifact, tmp_path / "base.safetensors")
    for i in range(len(whole)):
        value = whole[i] ^ 1 << noise.randrange(8) if change == "a bit" else (whole[i] + noise.randrange(1, 256)) % 256
        artifact.write_bytes(whole[:i] + bytes([value]) + whole[i + 1 :])
        if change == "a bit" and i % 7 == 0:
            peru(*arguments, code=1)
            assert str(artifact) in peru.stderr and "defect" not in peru.stderr, (i, value, peru.stderr)
            assert set(tmp_path.rglob("*")) == before, (i, value)
        with pytest.raises(PeruError) as caught:
            verify(artifact, tmp_path / "base.safetensors")
        assert str(artifact) in str(caught.value), (i, value)


# -- usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep,says",
    [
        ("0", "keeps nothing"), ("0%", "keeps nothing"), ("0.000", "keeps nothing"), ("5", "5%"), ("101%", "more than 100%"),
        ("1.01", "more than 100%"), ("-5%", "not a density"), ("-0.1", "not a density"), ("lots", "'lots' is not a density"),
        ("", "not a density"), ("10 percent", "not a density"), ("nan", "not a density"), ("inf", "not a density"),
        ("1e-3", "not a density"), ("10%%", "not a density"), ("0x10", "not a density"), ("1/10", "not a density"),
        ("0.0000001%", "keeps nothing"),
    ],
)  # fmt: skip
def test_invalid_densities_are_refused(tmp_path: Path, peru, pair, keep: str, says: str) -> None:
    base, fine = pair
    refused(peru, tmp_path, 2, "prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--keep", keep, says=says)


def test_wrong_options_are_refused_and_write_nothing(tmp_path: Path, peru, pair) -> None:
    base, fine = pair
    to = ["prune", fine, "-b", base, "-o", tmp_path / "a.safetensors"]
    keep = [*to, "--keep", "5%"]
    cases: list[tuple[list[object], str]] = [
        (to, "say how much to keep: --keep DENSITY"),
        ([*keep, "--lossless"], "say how much to keep: --keep DENSITY"),
        ([*to, "--lossless", "--values", "bf16"], "contradict"),
        ([*to, "--lossless", "--values", "log2"], "contradict"),
        ([*to, "--lossless", "--values", "sign"], "contradict"),
        ([*keep, "--scope", "sign", "--executor", "ray"], "run on this machine"),
        ([*keep, "--scope", "layer"], "'layer'"),
        ([*keep, "--values", "fp8"], "'fp8'"),
        ([*keep, "--per-task", "("], "not a regular expression"),
        ([*keep, "--per-task", "nowhere"], "matches no tensor"),
        ([*keep, "--tile-entries", "5"], "16384"),
        ([*keep, "--tile-entries", "0"], "16384"),
        ([*keep, "--threads", "0"], "--threads"),
        ([*keep, "--device", "tpu"], "'tpu'"),
        ([*keep, "--device", "cuda:99"], "no such GPU"),
        ([*keep, "--nonsense"], "--nonsense"),
        (["prune", fine, "-o", tmp_path / "a.safetensors", "--keep", "5%"], "--base"),
        (["prune", fine, "-b", base, "--keep", "5%", "-o", tmp_path / "a.bin"], "should end in .safetensors"),
        (["prune", f"two words={fine}", "-b", base, "-o", tmp_path / "a.safetensors", "--keep", "5%"], "'two words' is not a task name"),
        (["prune", "x=", "-b", base, "-o", tmp_path / "a.safetensors", "--keep", "5%"], "names no model"),
        (["prune", f"Sst={fine}", f"sST={base}", "-b", base, "-o", tmp_path / "all", "--keep", "5%"], "'sST'"),
        (["prune", fine, f"FINE={base}", "-b", base, "-o", tmp_path / "all", "--keep", "5%"], "'FINE'"),
        (["prune", fine, "-b", "bert-base-uncased", "-o", tmp_path / "a.safetensors", "--keep", "5%"], "owner: ORG/bert-base-uncased"),
        (["frobnicate"], "frobnicate"),
    ]
    for arguments, says in cases:
        refused(peru, tmp_path, 2, *arguments, says=says)
    peru(*keep, "--no-sync")
    unpack = ["unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "r.safetensors"]
    for more, says in (
        (["--tile-entries", "5"], "16384"), (["--device", "cuda:99"], "no such GPU"), (["--dtype", "int8"], "'int8'"),
        (["--max-shard-size", "big"], "'big'"), (["--max-shard-size", "0"], "zero bytes"),
    ):  # fmt: skip
        refused(peru, tmp_path, 2, *unpack, *more, says=says)


def test_unpack_calls_a_checkpoint_one(tmp_path: Path, peru, pair) -> None:
    base, fine = pair
    (tmp_path / "model").mkdir()
    to = ["-b", base, "-o", tmp_path / "r.safetensors"]
    refused(peru, tmp_path, 2, "unpack", tmp_path / "model", *to, says="no artifact or adapter in this folder")
    fine.rename(tmp_path / "model" / "model.safetensors")
    refused(peru, tmp_path, 2, "unpack", tmp_path / "model", *to, says=("model: a checkpoint, which needs no unpacking", "`peru prune`"))


def test_targets_that_exist_or_cannot_be_written(tmp_path: Path, peru, pair) -> None:
    base, fine = pair
    artifact = tmp_path / "a.safetensors"
    to = ["prune", fine, "-b", base, "--keep", "5%", "--no-sync"]
    artifact.write_text("precious")
    refused(peru, tmp_path, 2, *to, "-o", artifact, says=(str(artifact), "exists already", "--force"))
    assert artifact.read_text() == "precious"
    peru(*to, "-o", artifact, "--force")
    for folder in (tmp_path / "missing", fine):
        refused(peru, tmp_path, 2, *to, "-o", folder / "a.safetensors", says=(str(folder), "no such folder"))
        refused(peru, tmp_path, 2, *to, fine.with_name("base.safetensors"), "-o", folder / "in" / "all", says="no such folder")
    unpack = ["unpack", artifact, "-b", base, "--no-sync"]
    for target in ("r.safetensors", "folder"):
        peru(*unpack, "-o", tmp_path / target)
        refused(peru, tmp_path, 2, *unpack, "-o", tmp_path / target, says=("exists already", "--force"))
        peru(*unpack, "-o", tmp_path / target, "--force")
        refused(peru, tmp_path, 2, *unpack, "-o", tmp_path / "missing" / target, says="no such folder")
        refused(peru, tmp_path, 2, *unpack, "-o", fine / target, says="no such folder")
    assert (tmp_path / "r.safetensors").read_bytes() == (tmp_path / "folder" / "model.safetensors").read_bytes()
    (tmp_path / "is_a_folder.safetensors").mkdir()
    refused(peru, tmp_path, 2, *unpack, "-o", tmp_path / "is_a_folder.safetensors", "--force", says="is_a_folder.safetensors")


def test_a_folder_of_artifacts_is_created_only_if_something_goes_into_it(tmp_path: Path, peru, pair) -> None:
    base, fine = pair
    out = tmp_path / "deltas"
    to = ["prune", f"one={fine}", f"two={fine}", "-b", base, "-o", out]
    refused(peru, tmp_path, 2, *to, "--keep", "0.0000001%", says="keeps nothing")
    before = set(tmp_path.rglob("*"))
    peru(*to, "--keep", "5%", "--dry-run")
    assert "nothing was written" in peru.stderr and "peru inspect" in peru.stderr
    nothing_new(tmp_path, before)
    peru("prune", f"one={fine}", "-b", base, "-o", f"{out}/", "--keep", "5%", "--no-sync")
    assert [path.name for path in out.iterdir()] == ["one.safetensors"]
    refused(peru, tmp_path, 2, *to, "--keep", "5%", says=("one.safetensors", "exists already"))


# -- what a model may be ------------------------------------------------------------------------------


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Two shards and an index; returns the weight map."""
    folder.mkdir()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, members in shards.items():
        save({name: tensors[name] for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_broken_shards_are_named(tmp_path: Path, peru, pair) -> None:
    base, fine = pair
    folder = tmp_path / "sharded"
    weight_map = sharded(folder, load_file(fine))
    to = ["prune", folder, "-b", base, "-o", tmp_path / "a.safetensors", "--keep", "5%", "--no-sync"]
    peru(*to)
    sound = (tmp_path / "a.safetensors").read_bytes()
    peru("prune", f"sharded={fine}", *to[2:], "--force")
    assert (tmp_path / "a.safetensors").read_bytes() == sound  # one file or two: the same artifact
    (tmp_path / "a.safetensors").unlink()
    first = next(iter(weight_map))
    index = "model.safetensors.index.json"
    for broken, says in (
        ({**weight_map, "ghost": "model-1.safetensors"}, ("ghost", index)),
        ({**weight_map, first: "model-3.safetensors"}, ("model-3.safetensors", index)),
        ({**weight_map, first: "model-2.safetensors"}, (first, index)),
        ({**weight_map, first: "../base.safetensors"}, ("../base.safetensors", first, index)),
        ({**weight_map, first: str(base)}, (str(base), first, index)),
        ({**weight_map, first: 3}, (first, index)),
        ([], ("weight_map",)),
        ({}, ("weight_map",)),
    ):
        write_index(folder, broken)
        refused(peru, tmp_path, 1, *to, says=says)
    for text in ("{", "[]", '{"weight_map": ' + "[" * 100_000, "\udc80"):
        (folder / index).write_bytes(text.encode("utf-8", "surrogateescape"))
        refused(peru, tmp_path, 1, *to, says=(index, "not a shard index"))
    write_index(folder, weight_map)
    (folder / "model-2.safetensors").unlink()
    refused(peru, tmp_path, 1, *to, says=("model-2.safetensors", "not there"))
    save(load_file(fine), folder / "model-2.safetensors")
    refused(peru, tmp_path, 1, *to, says="is in another shard")


def test_odd_configs_do_no_harm(tmp_path: Path, peru, pair) -> None:
    base, fine = pair
    folder = tmp_path / "model"
    folder.mkdir()
    save(load_file(fine), folder / "model.safetensors")
    for text in ("{", "[]", '{"vocab_size": "many", "text_config": [1]}', '{"text_config": "x"}', "[" * 100_000, '{"vocab_size": null}'):
        (folder / "config.json").write_text(text)
        peru("prune", folder, "-b", base, "-o", tmp_path / "a.safetensors", "--keep", "5%", "--no-sync", "--force")
        peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "r", "--no-sync", "--force")
        assert (tmp_path / "r" / "config.json").read_text() == text


def test_inputs_that_are_not_models(tmp_path: Path, peru, pair) -> None:
    base, fine = pair
    artifact = tmp_path / "made.safetensors"
    peru("prune", fine, "-b", base, "-o", artifact, "--keep", "5%", "--no-sync")
    for name in ("empty", "several", "adapter"):
        (tmp_path / name).mkdir()
    for name in ("one", "two"):
        save({"x": torch.ones(3)}, tmp_path / "several" / f"{name}.safetensors")
    save({"base_model.model.x.lora_A.weight": torch.ones(3)}, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for model, code, says in (
        (tmp_path / "nowhere", 2, "no such file"),
        ("org/name", 1, ("org/name", "HF_HUB_OFFLINE")),
        ("hf://org/name", 1, ("org/name", "HF_HUB_OFFLINE")),
        (tmp_path / "empty", 2, ("empty", "without model.safetensors")),
        (tmp_path / "several", 2, ("several", "one.safetensors, two.safetensors")),
        (tmp_path / "adapter", 2, ("adapter", "PEFT adapter", "peru unpack")),
        (artifact, 2, (str(artifact), "is a peru artifact")),
    ):
        out = ["-o", tmp_path / "a.safetensors", "--keep", "5%"]
        if model not in (artifact, tmp_path / "adapter"):  # as fine-tunes, these can be expanded
            refused(peru, tmp_path, code, "prune", model, "-b", base, *out, says=says)
        refused(peru, tmp_path, code, "prune", fine, "-b", model, *out, says=says)
        refused(peru, tmp_path, code, "unpack", artifact, "-b", model, "-o", tmp_path / "r", says=says)
    unpack = ["-b", base, "-o", tmp_path / "r"]
    refused(peru, tmp_path, 1, "unpack", fine, *unpack, says=(str(fine), "not a peru artifact"))
    refused(peru, tmp_path, 2, "unpack", tmp_path / "nowhere", *unpack, says=("nowhere", "no such artifact"))
    refused(peru, tmp_path, 2, "unpack", tmp_path / "empty", *unpack, says="empty: no artifact or adapter")


class Boom:
    """A pickle that creates a file when a trusting reader loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_pickled_code_does_not_run_and_plain_tensors_are_read(tmp_path: Path, peru, pair) -> None:
    """Code is refused and does not run; plain tensors give the same artifact as safetensors."""
    base, fine = pair
    folder = tmp_path / "old"
    folder.mkdir()
    to = ["-b", base, "--keep", "5%", "--no-sync", "-o"]
    target = folder / "pytorch_model.bin"
    for content, says in (
        ({"w": torch.ones(3), "boom": Boom(tmp_path / "executed")}, "cannot load this safely"),
        ([torch.ones(3)], "holds a list"),
        ({"w": 3}, "'w'"),
        ({"../w": torch.ones(3)}, "'../w'"),
        ({"__metadata__": torch.ones(3)}, "__metadata__"),
        ({"w": torch.ones(3, dtype=torch.complex128)}, "complex128"),
    ):
        torch.save(content, target)
        refused(peru, tmp_path, 1, "prune", folder, *to, tmp_path / "a.safetensors", says=(str(target), says))
    assert not (tmp_path / "executed").exists()
    for junk in (b"", b"\x80\x04N.", b"PK\x03\x04" + bytes(100), target.read_bytes()[:-30]):
        target.write_bytes(junk)
        says = "cannot load this safely" if junk else "the file is empty"
        refused(peru, tmp_path, 1, "prune", folder, *to, tmp_path / "a.safetensors", says=(str(target), says))
    torch.save(load_file(fine), target)
    peru("prune", f"t={folder}", *to, tmp_path / "a.safetensors")
    peru("prune", f"t={fine}", *to, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "r.safetensors")
    transposed = {n: t.T.contiguous().T if t.dim() == 2 else t for n, t in load_file(fine).items()}
    torch.save({"state_dict": transposed}, target)
    peru("prune", f"t={target}", *to, tmp_path / "c.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
