"""Single-file adapters as trainers write them: where alpha is stored, entries that are not factors, LoHa and LoKr."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lora.test_options import OUTER, save_adapter

NAME = "blocks.0.attn.to_q"
FLAT = "lora_unet_blocks_0_attn_to_q"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    made = {f"{NAME}.weight": torch.randn(12, 10), f"{NAME}.bias": torch.randn(12), "conv.weight": torch.randn(8, 6, 3, 3)}
    made |= {"norm.weight": torch.randn(10), "norm.bias": torch.randn(10), "blocks.0.modulation": torch.randn(6, 10)}
    save_file(made, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def fold(peru, base: Path, adapter: Path, code: int = 0) -> dict[str, torch.Tensor]:
    out = adapter.with_name("out.safetensors")
    peru("unpack", adapter, "-b", base, "-o", out, "--no-sync", "--force", code=code)
    return {} if code else load_file(out)


def pair(rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, 10), torch.randn(12, rank)


def config(**values: object) -> str:
    return json.dumps(values)


@pytest.mark.parametrize(
    ("prefix", "metadata", "scale"),
    [
        ("", {}, 1.0),
        ("", {"alpha": "1"}, 0.25),
        ("", {"lora_alpha": "2.0"}, 0.5),
        ("", {"network_alpha": "8", "ss_network_alpha": "8.0"}, 2.0),
        ("", {"ss_network_alpha": "None", "ss_network_dim": "4"}, 1.0),
        ("", {"ss_network_alpha": "Dynamic"}, 1.0),
        ("transformer.", {"transformer.lora_alpha": "1", "transformer.r": "4"}, 0.25),
        ("transformer.", {"lora_adapter_metadata": config(**{"transformer.r": 4, "transformer.lora_alpha": 2})}, 0.5),
        ("diffusion_model.", {"transformer.lora_alpha": "1"}, 0.25),  # the layout of another program, one component
        ("", {"lora_adapter_metadata": config(r=4, lora_alpha=12, alpha_pattern={"to_q": 2}), "alpha": "12"}, 0.5),
        ("", {"lora_adapter_metadata": config(r=4, lora_alpha=4, use_rslora=True)}, 2.0),
    ],
)
def test_alpha_in_the_metadata_counts(tmp_path: Path, peru, base: Path, prefix: str, metadata: dict[str, str], scale: float) -> None:
    down, up = pair()
    table = {f"{prefix}{NAME}.lora_A.weight": down, f"{prefix}{NAME}.lora_B.weight": up}
    save_file(table, tmp_path / "in.safetensors", metadata=metadata)
    wanted = load_file(base)[f"{NAME}.weight"] + scale * up @ down
    torch.testing.assert_close(fold(peru, base, tmp_path / "in.safetensors")[f"{NAME}.weight"], wanted, rtol=1e-5, atol=1e-5)
    # once the scale is in the factors, no record of it is left
    peru("svd-lora", tmp_path / "in.safetensors", "-o", tmp_path / "small.safetensors", "--rank", 4, "--no-sync")
    torch.testing.assert_close(fold(peru, base, tmp_path / "small.safetensors")[f"{NAME}.weight"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "own", "says"),
    [
        ({"alpha": "1", "ss_network_alpha": "8"}, None, ("alpha 1", "ss_network_alpha 8")),
        ({"alpha": "2", "lora_adapter_metadata": config(r=4, lora_alpha=4)}, None, ("alpha 2", "lora_alpha 4")),
        ({"ss_network_alpha": "8"}, 2.0, (f"{FLAT}.alpha 2", "ss_network_alpha 8 in the metadata")),
        ({"alpha": "many"}, None, ("alpha is 'many', not a number",)),
        ({"lora_adapter_metadata": "{"}, None, ("lora_adapter_metadata is not JSON",)),
        ({"lora_adapter_metadata": config(r=8, lora_alpha=8)}, None, ("rank 4, lora_adapter_metadata says 8",)),
        ({"lora_adapter_metadata": config(r=4)}, None, ("lora_alpha is None, not a number",)),
        ({"a.alpha": "1", "b.alpha": "2"}, None, ("record alpha for a, b", f"{FLAT} belongs to none of them")),
    ],
)
def test_records_of_alpha_that_contradict_each_other(tmp_path: Path, peru, base: Path, metadata, own: float | None, says) -> None:
    down, up = pair()
    table = {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up}
    table |= {} if own is None else {f"{FLAT}.alpha": torch.tensor(own)}
    save_file(table, tmp_path / "in.safetensors", metadata=metadata)
    fold(peru, base, tmp_path / "in.safetensors", code=1)
    assert all(text in peru.stderr for text in (*says, "in.safetensors")), peru.stderr


def test_the_configuration_and_the_metadata_of_a_peft_adapter_must_agree(tmp_path: Path, peru, base: Path) -> None:
    down, up = pair()
    folder = save_adapter(tmp_path / "lora", {f"{NAME}.lora_A.weight": down, f"{NAME}.lora_B.weight": up}, 4)
    table = load_file(folder / "adapter_model.safetensors")
    save_file(table, folder / "adapter_model.safetensors", metadata={"lora_alpha": "4"})
    peru("unpack", folder, "-b", base, "-o", tmp_path / "x", code=1)
    assert "adapter_config.json's lora_alpha 8" in peru.stderr and "lora_alpha 4 in the metadata" in peru.stderr


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_kohyas_alpha_of_any_dtype(tmp_path: Path, peru, base: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    down, up = pair()
    table = {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up, f"{FLAT}.alpha": torch.full(shape, 2, dtype=dtype)}
    save_file(table, tmp_path / "in.safetensors")
    wanted = load_file(base)[f"{NAME}.weight"] + 0.5 * up @ down
    torch.testing.assert_close(fold(peru, base, tmp_path / "in.safetensors")[f"{NAME}.weight"], wanted, rtol=1e-5, atol=1e-5)
    peru("svd-lora", tmp_path / "in.safetensors", "-o", tmp_path / "small.safetensors", "--rank", 1, "--no-sync")
    assert load_file(tmp_path / "small.safetensors")[f"{FLAT}.alpha"].tolist() in (1, [1])


def test_kohyas_alpha_and_rank_differ_by_module(tmp_path: Path, peru, base: Path) -> None:
    """A linear layer of rank 4 with alpha 2, and a convolution of rank 2 with alpha 8, in one file; for LoHa and LoKr, too."""
    origin, (down, up) = load_file(base), pair()
    core, wide = torch.randn(2, 6, 3, 3), torch.randn(8, 2, 1, 1)
    table = {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up, f"{FLAT}.alpha": torch.tensor(2.0)}
    conv = {"lora_unet_conv.lora_down.weight": core, "lora_unet_conv.lora_up.weight": wide, "lora_unet_conv.alpha": torch.tensor(8.0)}
    by_lora = origin["conv.weight"] + 4 * torch.einsum("or,rihw->oihw", wide[:, :, 0, 0], core)
    halves = [torch.randn(8, 2), torch.randn(2, 54), torch.randn(8, 2), torch.randn(2, 54)]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    hada = {f"lora_unet_conv.{name}": half for name, half in zip(names, halves, strict=True)} | {"lora_unet_conv.alpha": torch.tensor(8.0)}
    by_hada = origin["conv.weight"] + 4 * ((halves[0] @ halves[1]) * (halves[2] @ halves[3])).view(8, 6, 3, 3)
    one, a, b = torch.randn(4, 3), torch.randn(2, 2), torch.randn(2, 2 * 9)
    lokr = {"lora_unet_conv.lokr_w1": one, "lora_unet_conv.lokr_w2_a": a, "lora_unet_conv.lokr_w2_b": b}
    by_lokr = origin["conv.weight"] + 4 * torch.kron(one[..., None, None], (a @ b).view(2, 2, 3, 3))
    for other, wanted in ((conv, by_lora), (hada, by_hada), (lokr | {"lora_unet_conv.alpha": torch.tensor(8.0)}, by_lokr)):
        save_file(table | other, tmp_path / "in.safetensors")
        got = fold(peru, base, tmp_path / "in.safetensors")
        torch.testing.assert_close(got[f"{NAME}.weight"], origin[f"{NAME}.weight"] + 0.5 * up @ down, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["conv.weight"], wanted, rtol=1e-5, atol=1e-4)


def test_an_alpha_of_several_entries(tmp_path: Path, peru, base: Path) -> None:
    down, up = pair()
    table = {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up, f"{FLAT}.alpha": torch.ones(2)}
    save_file(table, tmp_path / "in.safetensors")
    fold(peru, base, tmp_path / "in.safetensors", code=1)
    assert f"{FLAT}.alpha has 2 entries" in peru.stderr


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_differences_are_added_where_they_belong(tmp_path: Path, peru, base: Path, layout: str) -> None:
    """ComfyUI's and LyCORIS' meaning: .diff and .w_norm add to weights, .diff_b and .b_norm to biases, .set_weight replaces one."""
    before = load_file(base)
    q, conv, norm = (FLAT, "lora_unet_conv", "lora_unet_norm") if layout == "kohya" else (f"diffusion_model.{NAME}", "conv", "norm")
    down, up = pair()
    factors = (f"{q}.lora_down.weight", f"{q}.lora_up.weight") if layout == "kohya" else (f"{q}.lora_A.weight", f"{q}.lora_B.weight")
    table = dict(zip(factors, (down, up), strict=True)) | {
        f"{q}.diff_b": torch.randn(12), f"{conv}.diff": torch.randn(8, 6, 3, 3), f"{norm}.w_norm": torch.randn(10),
        f"{norm}.b_norm": torch.randn(10),
    }  # fmt: skip
    save_file(table, tmp_path / "in.safetensors")
    got = fold(peru, base, tmp_path / "in.safetensors")
    wanted = dict(before)
    wanted[f"{NAME}.weight"] = before[f"{NAME}.weight"] + up @ down
    wanted[f"{NAME}.bias"] = before[f"{NAME}.bias"] + table[f"{q}.diff_b"]
    wanted["conv.weight"] = before["conv.weight"] + table[f"{conv}.diff"]
    wanted["norm.weight"] = before["norm.weight"] + table[f"{norm}.w_norm"]
    wanted["norm.bias"] = before["norm.bias"] + table[f"{norm}.b_norm"]
    assert sorted(got) == sorted(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5)
    # truncating the factors leaves the differences unchanged
    peru("svd-lora", tmp_path / "in.safetensors", "-o", tmp_path / "small.safetensors", "--rank", 4, "--no-sync")
    small = fold(peru, base, tmp_path / "small.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-5, atol=1e-5)
    # a file with only differences is an adapter, too
    save_file({f"{norm}.set_weight": table[f"{norm}.w_norm"], f"{q}.diff": up @ down}, tmp_path / "alone.safetensors")
    alone = fold(peru, base, tmp_path / "alone.safetensors")
    assert torch.equal(alone["norm.weight"], table[f"{norm}.w_norm"]) and sorted(alone) == sorted(before)
    torch.testing.assert_close(alone[f"{NAME}.weight"], wanted[f"{NAME}.weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("entry", "shape", "code", "says"),
    [
        ("norm.w_norm", (11,), 1, "norm.weight of the base is [10]"),
        ("nowhere.diff", (3,), 1, "the base has no weight of this name"),
        ("conv.diff_b", (8,), 1, "the base has no bias of this name"),
        (f"{NAME}.diff", (12, 10), 1, "has another update"),
        ("blocks.0.diff_m", (6, 10), 2, "modulations"),
        ("conv.reshape_weight", (4,), 2, "a new shape of the base's weight"),
        ("blocks.0.anything", (4,), 2, "nothing says how it applies to the base"),
        ("extra.weight", (4,), 2, "nothing says how it applies to the base"),
    ],
)
def test_no_entry_becomes_a_new_tensor(tmp_path: Path, peru, base: Path, entry: str, shape: tuple[int, ...], code: int, says: str) -> None:
    down, up = pair()
    table = {f"{NAME}.lora_A.weight": down, f"{NAME}.lora_B.weight": up, entry: torch.ones(shape)}
    save_file(table, tmp_path / "in.safetensors")
    fold(peru, base, tmp_path / "in.safetensors", code=code)
    assert says in peru.stderr and entry.rpartition(".")[0] in peru.stderr and not (tmp_path / "out.safetensors").exists(), peru.stderr


def kron(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.kron(a.double().numpy(), b.double().numpy()))


def test_loha_and_lokr_of_lycoris(tmp_path: Path, peru, base: Path) -> None:
    """Closed forms in float64: (a b) * (c d), w1 kron w2, times alpha / rank; two whole factors have no scale."""
    w = {
        n: torch.randn(s)
        for n, s in {"a": (12, 2), "b": (2, 10), "c": (12, 2), "d": (2, 10), "k1": (4, 2), "k2a": (2, 3), "k2b": (3, 27)}.items()
    }
    table = {f"{FLAT}.hada_w1_a": w["a"], f"{FLAT}.hada_w1_b": w["b"], f"{FLAT}.hada_w2_a": w["c"], f"{FLAT}.hada_w2_b": w["d"]}
    table |= {"lora_unet_conv.lokr_w1": w["k1"], "lora_unet_conv.lokr_w2_a": w["k2a"], "lora_unet_conv.lokr_w2_b": w["k2b"]}
    table |= {f"{FLAT}.alpha": torch.tensor(1), "lora_unet_conv.alpha": torch.tensor(6.0)}
    save_file(table, tmp_path / "in.safetensors")
    got, before = fold(peru, base, tmp_path / "in.safetensors"), load_file(base)
    d = {name: tensor.double() for name, tensor in w.items()}
    wanted = before[f"{NAME}.weight"].double() + 0.5 * (d["a"] @ d["b"]) * (d["c"] @ d["d"])
    torch.testing.assert_close(got[f"{NAME}.weight"].double(), wanted, rtol=1e-5, atol=1e-5)
    wanted = before["conv.weight"].double() + 2 * kron(d["k1"], d["k2a"] @ d["k2b"]).view(8, 6, 3, 3)
    torch.testing.assert_close(got["conv.weight"].double(), wanted, rtol=1e-5, atol=1e-5)
    # whole factors of a kernel, and a Tucker core
    whole = torch.randn(2, 3, 3, 3)
    core, ca, cb = torch.randn(3, 3, 3, 3), torch.randn(3, 2), torch.randn(3, 3)
    tucker = torch.einsum("ijkl,jr,ip->prkl", core.double(), cb.double(), ca.double())
    for parts, second, scale in (
        ({"lokr_w2": whole, "alpha": torch.tensor(99.0)}, whole.double(), 1.0),
        ({"lokr_t2": core, "lokr_w2_a": ca, "lokr_w2_b": cb, "alpha": torch.tensor(1.5)}, tucker, 0.5),
    ):
        save_file({"lora_unet_conv.lokr_w1": w["k1"]} | {f"lora_unet_conv.{n}": t for n, t in parts.items()}, tmp_path / "in.safetensors")
        wanted = before["conv.weight"].double() + scale * torch.kron(d["k1"][:, :, None, None], second.contiguous())
        torch.testing.assert_close(fold(peru, base, tmp_path / "in.safetensors")["conv.weight"].double(), wanted, rtol=1e-5, atol=1e-5)
    # their updates are not products of two thin factors: with the base they are factored, without it refused
    peru("svd-lora", tmp_path / "in.safetensors", "-o", tmp_path / "lora", "--rank", 2, code=2)
    assert "LoKr" in peru.stderr and "add --base BASE" in peru.stderr
    peru("svd-lora", tmp_path / "in.safetensors", "-b", base, "-o", tmp_path / "lora", "--rank", 4, "--no-sync")
    peru("unpack", tmp_path / "lora", "-b", base, "-o", tmp_path / "back.safetensors", "--no-sync")
    torch.testing.assert_close(load_file(tmp_path / "back.safetensors")["conv.weight"].double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_loha_whose_halves_do_not_fit(tmp_path: Path, peru, base: Path) -> None:
    parts = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 10), "hada_w2_a": (12, 2), "hada_w2_b": (2, 11)}
    save_file({f"{FLAT}.{name}": torch.ones(shape) for name, shape in parts.items()}, tmp_path / "in.safetensors")
    fold(peru, base, tmp_path / "in.safetensors", code=1)
    assert "the halves of its LoHa are 12 x 10 and 12 x 11" in peru.stderr
    parts["hada_w2_b"] = (2, 10)
    save_file({f"lora_unet_conv.{name}": torch.ones(shape) for name, shape in parts.items()}, tmp_path / "in.safetensors")
    fold(peru, base, tmp_path / "in.safetensors", code=1)
    assert "its LoHa is 12 x 10, and conv.weight of the base is [8, 6, 3, 3]" in peru.stderr


def test_kohya_and_diffusers_agree_about_the_scale(tmp_path: Path, peru, base: Path) -> None:
    """diffusers moves kohya's alpha, stored beside the factors, into both of them: the updates are equal."""
    down, up = pair()
    save_file(
        {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up, f"{FLAT}.alpha": torch.tensor(1.0)}, tmp_path / "k.safetensors"
    )
    # diffusers folds alpha / rank into its factors: scale_down * scale_up = alpha / rank
    scaled = {f"unet.{NAME}.lora_A.weight": down * 0.5, f"unet.{NAME}.lora_B.weight": up * 0.5}
    save_file(scaled, tmp_path / "d.safetensors")
    one = fold(peru, base, tmp_path / "k.safetensors")[f"{NAME}.weight"]
    torch.testing.assert_close(one, fold(peru, base, tmp_path / "d.safetensors")[f"{NAME}.weight"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_adapters_file_can_be_named_instead_of_its_folder(tmp_path: Path, peru, base: Path, suffix: str) -> None:
    down, up = torch.randn(8, 10), torch.randn(12, 8)
    folder = save_adapter(tmp_path / "lora", {f"{NAME}.lora_A.weight": down, f"{NAME}.lora_B.weight": up}, 8, lora_alpha=32)
    file = folder / "adapter_model.safetensors"
    if suffix == "bin":
        torch.save(load_file(file), folder / "adapter_model.bin")
        file.unlink()
        file = folder / "adapter_model.bin"
    for name, what in (("file", file), ("folder", folder)):
        peru("unpack", what, "-b", base, "-o", tmp_path / name, "--no-sync")
        peru("svd-lora", what, "-o", tmp_path / f"{name}-small", "--rank", 3, "--no-sync")
        peru("merge", f"a={what}", "-b", base, "-o", tmp_path / f"{name}-merged", "-m", "task-arithmetic", "--no-sync")
        assert "alpha 32" in peru("inspect", what)
    got = load_file(tmp_path / "file" / "model.safetensors")
    torch.testing.assert_close(got[f"{NAME}.weight"], load_file(base)[f"{NAME}.weight"] + 4 * up @ down, rtol=1e-5, atol=1e-5)
    for one, other in (("file", "folder"), ("file-small", "folder-small"), ("file-merged", "folder-merged")):
        files = sorted(path.name for path in (tmp_path / one).rglob("*") if path.suffix == ".safetensors")
        assert files == sorted(path.name for path in (tmp_path / other).rglob("*") if path.suffix == ".safetensors")
        assert all((tmp_path / one / name).read_bytes() == (tmp_path / other / name).read_bytes() for name in files)


def test_a_peft_file_without_its_config_has_no_scale(tmp_path: Path, peru, base: Path) -> None:
    down, up = pair()
    table = {f"{OUTER}{NAME}.lora_A.weight": down, f"{OUTER}{NAME}.lora_B.weight": up}
    save_file(table, tmp_path / "in.safetensors")
    fold(peru, base, tmp_path / "in.safetensors", code=1)
    assert "no adapter_config.json beside the file gives its scale" in peru.stderr
    save_file(table, tmp_path / "in.safetensors", metadata={"lora_alpha": "2"})
    got = fold(peru, base, tmp_path / "in.safetensors")
    assert sorted(got) == sorted(load_file(base))
    torch.testing.assert_close(got[f"{NAME}.weight"], load_file(base)[f"{NAME}.weight"] + 0.5 * up @ down, rtol=1e-5, atol=1e-5)
