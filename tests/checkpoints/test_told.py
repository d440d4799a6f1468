"""Files that are not what their names say, and folders with more than one model: messages call each what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from peru_cli.checkpoints.resolve import open_model
from peru_cli.errors import BadFile, PeruError, UsageError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(3)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def torch_file(new: bool) -> Callable[[Path], None]:
    return lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=new)


def holds(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


STRANGE = [
    ("model.safetensors", holds(POINTER), "a Git LFS pointer, not the file", "git lfs pull"),
    ("model.safetensors", holds(b"\n<!DOCTYPE html><html>"), "a web page", "/resolve/"),
    ("model.safetensors", holds(b"GGUF\x03\0\0\0" + bytes(40)), "a GGUF file", "converted from"),
    ("model.safetensors", torch_file(True), "a PyTorch or zip file", "rename it to .bin"),
    ("model.safetensors", torch_file(False), "a pickle", "rename it to .bin"),
    ("model.safetensors", holds(b""), "the file is empty", "fetch it again"),
    ("model.safetensors", holds(bytes(5000)), "zeros only", "fetch it again"),
    ("model.safetensors", holds(b'{"weight_map": {}}'), "a JSON file", "name the file with the weights"),
    ("model.safetensors", holds(b"\x1f\x8b" + bytes(40)), "a compressed archive", "unpack it"),
    ("pytorch_model.bin", holds(POINTER), "a Git LFS pointer, not the file", "git lfs pull"),
    ("pytorch_model.bin", holds(b"<html>"), "a web page", "/resolve/"),
    ("pytorch_model.bin", holds(save(WEIGHTS)), "a safetensors file", "rename it to .safetensors"),
    ("pytorch_model.bin", holds(b""), "the file is empty", "fetch it again"),
]


@pytest.mark.parametrize("number", range(len(STRANGE)))
@pytest.mark.parametrize("named", ["folder", "file"])
def test_files_are_called_what_they_are(tmp_path: Path, number: int, named: str) -> None:
    name, make, what, hint = STRANGE[number]
    make(tmp_path / name)
    with pytest.raises(BadFile) as error:
        open_model(str(tmp_path if named == "folder" else tmp_path / name))
    assert what in error.value.message and name in error.value.message and hint in (error.value.hint or "")


def test_a_torch_file_from_before_the_zip_format_is_read(tmp_path: Path) -> None:
    torch_file(False)(tmp_path / "pytorch_model.bin")
    with open_model(str(tmp_path)) as model:
        assert {n: torch.frombuffer(bytearray(model.read(n)), dtype=torch.float32).tolist() for n in model.tensors} == {
            n: t.flatten().tolist() for n, t in WEIGHTS.items()
        }


def shards(folder: Path, index: str, shard: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / shard)
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))


def test_a_single_file_beside_shards_is_taken_as_transformers_does(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    state = {n: t.clone() for n, t in BertModel(config).state_dict().items()}
    config.save_pretrained(tmp_path)
    shards(tmp_path, "model.safetensors.index.json", "model-00001-of-00001.safetensors", {n: t + 1 for n, t in state.items()})
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = BertModel.from_pretrained(tmp_path).state_dict()["embeddings.LayerNorm.bias"]
    with open_model(str(tmp_path)) as model:
        assert model.read("embeddings.LayerNorm.bias") == loaded.numpy().tobytes()
        assert "the single file is read, as in transformers" in model.warnings[0]


def test_an_index_of_the_single_file_causes_no_warning(tmp_path: Path) -> None:
    shards(tmp_path, "model.safetensors.index.json", "model.safetensors", WEIGHTS)
    with open_model(str(tmp_path)) as model:
        assert not model.warnings and len(model.tensors) == 2


@pytest.mark.parametrize("names", [("model.fp16", "model.bf16"), ("diffusion_model", "text_encoder")])
def test_two_indices_are_refused_by_name(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        shards(tmp_path, f"{name}.safetensors.index.json", f"{name}-1.safetensors", WEIGHTS)
    with pytest.raises(UsageError, match="several shard indices") as error:
        open_model(str(tmp_path))
    assert all(name in error.value.message for name in names)


def test_the_index_of_a_variant_is_ignored_with_a_note(tmp_path: Path) -> None:
    shards(tmp_path, "model.safetensors.index.json", "model-1.safetensors", WEIGHTS)
    shards(tmp_path, "model.safetensors.index.fp16.json", "model.fp16-1.safetensors", {n: t.half() for n, t in WEIGHTS.items()})
    with open_model(str(tmp_path)) as model:
        assert {info.dtype.name for info in model.tensors.values()} == {"F32"}
        assert "not model.safetensors.index.fp16.json" in model.warnings[0]


def test_a_name_that_is_not_a_folder_says_where_it_was_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, said in (("models/missing", True), ("hf://models/org/missing", False)):
        with pytest.raises(PeruError) as error:
            open_model(name)
        assert ("on the Hub because no folder models/missing is here" in error.value.message) == said
