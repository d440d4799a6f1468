"""Weight updates of trainers, read as fine-tunes: updates from public writers become the fine-tune's bits, and damage is found."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from blake3 import blake3
from safetensors.torch import load_file, save_file

from tests.export.readers import State
from tests.export.test_export import load, same_bits, states

Peru = Callable[..., str]
HASHES: dict[str, Callable[[bytes], str]] = {
    "blake3": lambda data: blake3(data).hexdigest(),
    "adler32": lambda data: f"{zlib.adler32(data):08x}",
    "xxh3-128": xxhash.xxh3_128_hexdigest,
}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def changed(base: State, fine: State) -> list[str]:
    return [name for name in base if raw(base[name]) != raw(fine[name])]


def write_sglang(folder: Path, base: State, fine: State, encoding: str = "xor", algorithm: str = "blake3") -> None:
    """As SGLang's trainers publish: shards numbered from zero, one zstd stream a tensor."""
    folder.mkdir()
    names, weight_map = changed(base, fine), {}
    for number, name in enumerate(names):
        old, new = (np.frombuffer(raw(state[name]), np.uint8) for state in (base, fine))
        if encoding == "xor":
            delta = (old ^ new).tobytes()
        else:
            places = np.flatnonzero(old != new).astype("<u4")
            delta = struct.pack("<I", len(places)) + places.tobytes() + new[places].tobytes()
        packed = torch.frombuffer(bytearray(zstandard.ZstdCompressor(1).compress(delta)), dtype=torch.uint8)
        shard = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        save_file({name: packed}, folder / shard, {name: HASHES[algorithm](new.tobytes())})
        weight_map[name] = shard
    about = {
        "version": "000002",
        "base_version": "000001",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": algorithm,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": about, "weight_map": weight_map}))


def write_prime_rl(folder: Path, base: State, fine: State) -> None:
    """As `save_sparse_update` does."""
    folder.mkdir()
    tensors, entries = {}, []
    for number, name in enumerate(changed(base, fine)):
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[base[name].element_size()]
        places = (base[name].view(-1).view(width) != fine[name].view(-1).view(width)).nonzero().view(-1)
        places = places.flip(0)  # no order is promised
        tensors[f"tensor_{number}.indices"], tensors[f"tensor_{number}.values"] = places.int(), fine[name].view(-1)[places]
        about = {"name": name, "shape": list(base[name].shape), "dtype": str(base[name].dtype).removeprefix("torch.")}
        entries.append(about | {"indices": f"tensor_{number}.indices", "values": f"tensor_{number}.values"})
    save_file(tensors, folder / "sparse_update_patch.safetensors", {"format": "pt"})
    manifest = {"format": "prime-rl-sparse-update", "version": 1, "step": 2, "base_step": 1, "compressed": False, "tensors": entries}
    (folder / "sparse_update_manifest.json").write_text(json.dumps(manifest | {"patch_file": "sparse_update_patch.safetensors"}))


def write_trl(folder: Path, base: State, fine: State, encoding: str = "gap_delta") -> None:
    """As TRL's delta codec does."""
    folder.mkdir()
    tensors = {}
    for name in changed(base, fine):
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[base[name].element_size()]
        places = (base[name].view(-1).view(width) != fine[name].view(-1).view(width)).nonzero().view(-1)
        gaps = torch.diff(places, prepend=torch.tensor([-1])) - 1
        gaps = gaps.to(torch.uint16 if int(gaps.max()) < 1 << 16 else torch.uint32)
        tensors[f"{name}.idx"] = gaps if encoding == "gap_delta" else places.int()
        tensors[f"{name}.val"] = fine[name].view(-1)[places]
    save_file(tensors, folder / "patch.safetensors", {"format": "sparse_weight_patch", "sparse": "True", "encoding": encoding})


WRITERS: dict[str, Callable[[Path, State, State], None]] = {
    **{f"sglang-xor-{kind}": lambda f, a, b, kind=kind: write_sglang(f, a, b, algorithm=kind) for kind in HASHES},  # type: ignore[misc]
    "sglang-overwrite": lambda f, a, b: write_sglang(f, a, b, "overwrite"),
    "prime-rl": write_prime_rl,
    "trl-gaps": write_trl,
    "trl-raw": lambda f, a, b: write_trl(f, a, b, "raw"),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(states()[0], tmp_path / "base" / "model.safetensors", {"format": "pt"})
    return tmp_path / "base"


@pytest.mark.parametrize("kind", WRITERS)
def test_an_update_becomes_a_verified_artifact_and_a_checkpoint(kind: str, base: Path, tmp_path: Path, peru: Peru) -> None:
    fine, update = states()[1], tmp_path / "update"
    WRITERS[kind](update, load(base), fine)
    peru("prune", update, "--base", base, "-o", tmp_path / "a.safetensors", "--lossless", "--tile-entries", 16384)
    assert ("takes your word" in peru.stderr) == (not kind.startswith("sglang"))  # type: ignore[attr-defined]
    peru("unpack", tmp_path / "a.safetensors", "--base", base, "-o", tmp_path / "one.safetensors")
    peru("unpack", update, "--base", base, "-o", tmp_path / "two.safetensors")
    for name in ("one", "two"):
        assert same_bits({n: t.clone() for n, t in load_file(tmp_path / f"{name}.safetensors").items()}, fine)


def test_peru_reads_its_own_exports(base: Path, tmp_path: Path, peru: Peru) -> None:
    fine = tmp_path / "fine.safetensors"
    save_file(states()[1], fine, {"format": "pt"})
    for to in ("sglang", "prime-rl", "trl"):
        out = tmp_path / to / "weight_v000001"
        out.parent.mkdir()
        peru("export", fine, "--base", base, "--to", to, "--step", 1, "-o", out)
        peru("unpack", out, "--base", base, "-o", tmp_path / f"{to}.safetensors")
        assert same_bits({n: t.clone() for n, t in load_file(tmp_path / f"{to}.safetensors").items()}, states()[1])


def edited(file: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_sglang_checksums_find_another_base_and_altered_bytes(base: Path, tmp_path: Path, peru: Peru) -> None:
    other = load(base)
    other["half"][0] += 1
    save_file(other, tmp_path / "other.safetensors", {"format": "pt"})
    write_sglang(tmp_path / "u", load(base), states()[1])
    peru("unpack", tmp_path / "u", "--base", tmp_path / "other.safetensors", "-o", tmp_path / "x/", code=1)
    assert "half has another checksum" in peru.stderr and not (tmp_path / "x").exists()  # type: ignore[attr-defined]
    shard = next((tmp_path / "u").glob("*.safetensors"))
    for at in range(8, shard.stat().st_size, 3):
        whole = bytearray(shard.read_bytes())
        whole[at] ^= 0x10
        (tmp_path / "v").mkdir(exist_ok=True)
        for file in (tmp_path / "u").iterdir():
            (tmp_path / "v" / file.name).write_bytes(bytes(whole) if file.name == shard.name else file.read_bytes())
        peru_code(tmp_path / "v", base, tmp_path / "y.safetensors")


def peru_code(update: Path, base: Path, out: Path) -> None:
    """Unpack: it fails with a message, or the output is right after all."""
    import contextlib
    import io

    from peru_cli import cli

    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = cli.run(["unpack", str(update), "--base", str(base), "-o", str(out), "--force"])
    assert "defect" not in err.getvalue() and "Traceback" not in err.getvalue()
    assert code in (1, 2) or same_bits({n: t.clone() for n, t in load_file(out).items()}, states()[1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(version=2), "unknown to peru"),
        (lambda m: m.update(compressed=True), "is compressed"),
        (lambda m: m.update(patch_file="../x.safetensors"), "the patch file is called"),
        (lambda m: m.update(tensors="all"), "'tensors' is str"),
        (lambda m: m["tensors"][0].update(name="new"), "new, which"),
        (lambda m: m["tensors"][0].update(shape=[2]), "[2]"),
        (lambda m: m["tensors"][0].update(dtype="float64"), "float64"),
        (lambda m: m["tensors"][0].update(values="nothing"), "nothing is missing"),
        (lambda m: m["tensors"][0].update(values=m["tensors"][1]["values"]), "values of"),
    ],
)
def test_an_invalid_manifest_is_refused(change: Callable[[Any], None], says: str, base: Path, tmp_path: Path, peru: Peru) -> None:
    write_prime_rl(tmp_path / "u", load(base), states()[1])
    edited(tmp_path / "u" / "sparse_update_manifest.json", change)
    code = 2 if says == "is compressed" else 1
    peru("unpack", tmp_path / "u", "--base", base, "-o", tmp_path / "x/", code=code)
    assert says in peru.stderr and not (tmp_path / "x").exists()  # type: ignore[attr-defined]


@pytest.mark.parametrize("places", [[0, 0], [-1, 2], [5, 17]])
def test_positions_outside_the_tensor_or_twice_are_refused(places: list[int], base: Path, tmp_path: Path, peru: Peru) -> None:
    write_prime_rl(tmp_path / "u", load(base), states()[1])
    tensors = {"i": torch.tensor(places, dtype=torch.int32), "v": torch.ones(2)}
    save_file(tensors, tmp_path / "u" / "sparse_update_patch.safetensors")
    entry = {"name": "same", "shape": [17], "dtype": "float32", "indices": "i", "values": "v"}
    edited(tmp_path / "u" / "sparse_update_manifest.json", lambda m: m.update(tensors=[entry]))
    peru("unpack", tmp_path / "u", "--base", base, "-o", tmp_path / "x/", code=1)
    assert "positions of same" in peru.stderr  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["metadata"].update(delta_encoding="zip"), "zip in zstd"),
        (lambda m: m["metadata"].update(checksum_format="md5"), "'md5'"),
        (lambda m: m["weight_map"].update(new=m["weight_map"]["half"]), "lacks it"),
        (lambda m: m["weight_map"].update(half="../x"), "lacks it"),
        (lambda m: m.update(weight_map=[]), "'weight_map' is list"),
    ],
)
def test_an_invalid_index_is_refused(change: Callable[[Any], None], says: str, base: Path, tmp_path: Path, peru: Peru) -> None:
    write_sglang(tmp_path / "u", load(base), states()[1])
    edited(tmp_path / "u" / "model.safetensors.index.json", change)
    peru("unpack", tmp_path / "u", "--base", base, "-o", tmp_path / "x/", code=2 if " in zstd" in says or "md5" in says else 1)
    assert says in peru.stderr  # type: ignore[attr-defined]


def test_an_update_without_its_base_says_what_it_is(base: Path, tmp_path: Path, peru: Peru) -> None:
    write_trl(tmp_path / "u", load(base), states()[1])
    peru("unpack", tmp_path / "u", "-o", tmp_path / "x/", code=2)
    assert "weight update" in peru.stderr and "--base" in peru.stderr  # type: ignore[attr-defined]
