"""FP8 weights and their scales belong together: converted to floats to the bit, or kept together, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from peru_cli.checkpoints.quantized.fp8 import VALUES
from peru_cli.checkpoints.resolve import open_model
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from tests.conftest import assert_same_tensors, raw

Tensors = dict[str, torch.Tensor]
NOISE = torch.Generator().manual_seed(5)
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=NOISE)


def quantise(weight: torch.Tensor, block: tuple[int, int] = (128, 128)) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float32 scales by block, the last blocks cut short; (rows, columns)."""
    rows, columns = weight.shape
    blocks = -(-rows // block[0]), -(-columns // block[1])
    scales, codes = torch.empty(blocks), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def expanded(scales: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    """A scale for every entry."""
    return scales.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def folder(path: Path, tensors: Tensors, **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"hidden_size": 8, **config}))
    return path


def values(model: Checkpoint, name: str) -> torch.Tensor:
    info = model.tensors[name]
    return torch.frombuffer(bytearray(model.read(name)), dtype=TORCH[info.dtype.name]).view(info.shape)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("name", "kind"), [("F8_E4M3", "e4m3fn"), ("F8_E5M2", "e5m2"), ("F8_E4M3FNUZ", "e4m3fnuz"), ("F8_E5M2FNUZ", "e5m2fnuz")]
)
def test_every_code_has_the_same_value_as_in_torch(name: str, kind: str) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(getattr(torch, f"float8_{kind}")).float()
    torch.testing.assert_close(torch.from_numpy(VALUES[name].copy()), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_blocks_equal_transformers_own_to_the_bit(tmp_path: Path, dtype: str | None) -> None:
    codes, scales = quantise(normal(256, 384))
    config = {"quantization_config": FP8} | ({"torch_dtype": dtype} if dtype else {})
    path = folder(tmp_path / "m", {"w.weight": codes, "w.weight_scale_inv": scales, "norm.weight": normal(8)}, **config)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, getattr(torch, dtype) if dtype else None)
    with open_model(str(path)) as model:
        assert sorted(model.tensors) == ["norm.weight", "w.weight"]
        assert raw(values(model, "w.weight")) == raw(expected)
        assert "quantization_config" not in model.config() and model.config()["hidden_size"] == 8
        part = bytearray(model.tensors["w.weight"].dtype.nbytes(1000))  # any run of entries
        model.read_into("w.weight", model.tensors["w.weight"].dtype.nbytes(300), memoryview(part))
        assert bytes(part) == raw(expected.reshape(-1)[300:1300])


def test_last_blocks_may_be_short(tmp_path: Path) -> None:
    # 1000 rows over 8 scales are not 125 rows each, as a block derived from the shapes would be.
    codes, scales = quantise(normal(1000, 200))
    path = folder(tmp_path / "m", {"w.weight": codes, "w.weight_scale_inv": scales}, quantization_config=FP8, torch_dtype="bfloat16")
    with open_model(str(path)) as model:
        assert raw(values(model, "w.weight")) == raw((codes.float() * expanded(scales, (1000, 200), (128, 128))).bfloat16())


ROW, COLUMNS = normal(48, 1).abs() + 0.1, 64
LAYOUTS = {
    "tensor": (torch.tensor(0.3), lambda s: s),
    "tensor, one entry": (torch.tensor([0.3]), lambda s: s),
    "row": (ROW, lambda s: s),
    "row, flat": (ROW.view(-1), lambda s: s.view(-1, 1)),
    "row, bf16": (ROW.bfloat16(), lambda s: s.float()),
    "blocks of 32 columns, powers of two as bytes": (
        torch.randint(120, 130, (48, 2), generator=NOISE).byte(),
        lambda s: (2.0 ** (s.float() - 127)).repeat_interleave(32, 1),
    ),
    "powers of two in E8M0": (
        torch.tensor([[1.0, 4.0], [0.5, 0.25], [2.0, 8.0]]).to(torch.float8_e8m0fnu),
        lambda s: s.float().repeat_interleave(16, 0).repeat_interleave(32, 1),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
def test_scales_of_every_layout(tmp_path: Path, layout: str, name: str) -> None:
    scale, of_entries = LAYOUTS[layout]
    codes = normal(48, COLUMNS).to(torch.float8_e4m3fn)
    extra = {"w.input_scale": torch.tensor(2.0), "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    path = folder(tmp_path / "m", {"w.weight": codes, f"w.{name}": scale, **extra})
    with open_model(str(path)) as model:
        got = values(model, "w.weight")
        assert list(model.tensors) == ["w.weight"]
        assert got.dtype == (scale.dtype if scale.dtype in TORCH.values() else torch.bfloat16)
        assert raw(got) == raw((codes.float() * of_entries(scale)).to(got.dtype))


def test_stacked_experts_are_read_one_by_one(tmp_path: Path) -> None:
    experts = [quantise(normal(130, 260)) for _ in range(3)]
    codes, scales = (torch.stack([pair[i] for pair in experts]) for i in (0, 1))
    tensors = {"experts.up_proj": codes, "experts.up_proj_scale_inv": scales}
    path = folder(tmp_path / "m", tensors, quantization_config=FP8, torch_dtype="bfloat16")
    with open_model(str(path)) as model:
        expected = [(c.float() * expanded(s, (130, 260), (128, 128))).bfloat16() for c, s in experts]
        assert raw(values(model, "experts.up_proj")) == raw(torch.stack(expected))


def test_compressed_tensors_layouts_equal_its_own_decompression(tmp_path: Path) -> None:
    """By their formula: codes in the scale's type, times the scale (compressed_tensors.quantization.lifecycle.forward._dequantize)."""
    tensors, expected = {}, {}
    for kind, codes in (("f", normal(40, 60).to(torch.float8_e4m3fn)), ("i", torch.randint(-127, 128, (40, 60), generator=NOISE).char())):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            scale = (normal(40, 1).abs() * 0.01).to(dtype)
            name = f"{kind}{str(dtype)[6:]}"
            tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
            expected[f"{name}.weight"] = codes.to(dtype) * scale
    said = {"quant_method": "compressed-tensors", "format": "naive-quantized"}
    tensors["table"] = torch.arange(-3, 4, dtype=torch.int8)  # a buffer, which has no scale
    path = folder(tmp_path / "m", {n: t.clone() for n, t in tensors.items()}, quantization_config=said, torch_dtype="bfloat16")
    with open_model(str(path)) as model:
        for name, tensor in expected.items():
            assert raw(values(model, name)) == raw(tensor), name
        assert model.tensors["table"].dtype.name == "I8" and bytes(model.read("table")) == raw(tensors["table"])
    del tensors["ibfloat16.weight_scale"]  # but a weight has one
    lost = folder(tmp_path / "lost", {n: t.clone() for n, t in tensors.items()}, quantization_config=said)
    with pytest.raises(BadFile, match=r"ibfloat16\.weight: I8 without its scale"):
        open_model(str(lost))


def family(tmp_path: Path) -> tuple[Path, Path, Tensors, Tensors]:
    """A base and two files of one fine-tune: halved codes with doubled scales are the same weights. Also both as bf16."""
    weights = [normal(256, 130)]
    weights.append(weights[0] + 0.05 * normal(256, 130))
    made = []
    for name, weight in zip(("base", "fine"), weights, strict=True):
        codes, scales = quantise(weight)
        tensors = {"w.weight": codes, "w.weight_scale_inv": scales, "norm.weight": normal(256).bfloat16()}
        path = folder(tmp_path / name, tensors, quantization_config=FP8, torch_dtype="bfloat16")
        plain = (codes.float() * expanded(scales, (256, 130), (128, 128))).bfloat16()
        made.append((path, {"w.weight": plain, "norm.weight": tensors["norm.weight"]}))
    return made[0][0], made[1][0], made[0][1], made[1][1]


def test_codes_halved_and_scales_doubled_change_nothing(tmp_path: Path, peru) -> None:
    base, _, plain, _ = family(tmp_path)
    tensors = load_file(base / "model.safetensors")
    scales = tensors["w.weight_scale_inv"] * 2
    halved = (tensors["w.weight"].float() / 2).to(torch.float8_e4m3fn)  # subnormal codes are rounded, so those weights differ
    same = {"w.weight": halved, "w.weight_scale_inv": scales, "norm.weight": tensors["norm.weight"]}
    fine = folder(tmp_path / "same", same, quantization_config=FP8, torch_dtype="bfloat16")
    expected = (halved.float() * expanded(scales, (256, 130), (128, 128))).bfloat16()
    changed = int((expected != plain["w.weight"]).sum())
    out = json.loads(peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--keep", "50%", "--no-sync", "--json"))
    assert out[0]["changed"] == out[0]["kept"] == changed < 0.05 * expected.numel()
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "r.safetensors", "--no-sync")
    assert_same_tensors(tmp_path / "r.safetensors", {"w.weight": expected, "norm.weight": plain["norm.weight"]})


def test_commands_give_the_same_as_for_the_same_weights_in_bf16(tmp_path: Path, peru) -> None:
    base, fine, plain_base, plain_fine = family(tmp_path)
    bf16 = [folder(tmp_path / name, t, torch_dtype="bfloat16") for name, t in (("pb", plain_base), ("pf", plain_fine))]
    for number, (b, f) in enumerate(((base, fine), bf16)):
        at = ["-b", b, "--no-sync", "--tile-entries", 16384]
        peru("prune", f, *at, "-o", tmp_path / f"a{number}.safetensors", "--keep", "10%")
        peru("unpack", tmp_path / f"a{number}.safetensors", *at, "-o", tmp_path / f"r{number}")
        peru("merge", f"x={f}", *at, "-o", tmp_path / f"m{number}", "-m", "task-arithmetic", "--scale", 0.5)
        peru("shuffle-pack", f"x={f}", *at, "-o", tmp_path / f"p{number}.safetensors")
        peru("unpack", tmp_path / f"p{number}.safetensors", "--task", "x", *at, "-o", tmp_path / f"t{number}.safetensors")
        peru("svd-lora", f, "-b", b, "--no-sync", "-o", tmp_path / f"l{number}", "--rank", 4)
    for name in ("r{}/model.safetensors", "m{}/model.safetensors", "t{}.safetensors", "l{}/adapter_model.safetensors"):
        a, b = (load_file(tmp_path / name.format(i)) for i in (0, 1))
        assert sorted(a) == sorted(b) and all(raw(a[n]) == raw(b[n]) for n in a), name
    for out in ("r0", "m0"):
        assert "quantization_config" not in json.loads((tmp_path / out / "config.json").read_text())


def test_lossless_keeps_codes_and_scales_unchanged(tmp_path: Path, peru) -> None:
    base, fine, _, _ = family(tmp_path)
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--lossless", "--no-sync")
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "r", "--no-sync")
    assert_same_tensors(tmp_path / "r" / "model.safetensors", load_file(fine / "model.safetensors"))
    assert (tmp_path / "r" / "config.json").read_bytes() == (fine / "config.json").read_bytes()


def test_lossless_stores_the_codes_that_changed(tmp_path: Path, peru) -> None:
    """One in a hundred: a few bytes each, whatever the codes and scales, and the same bits back."""
    codes = torch.randint(0, 256, (512, 512), generator=NOISE).byte()
    others = torch.randint(0, 256, codes.shape, generator=NOISE).byte()
    changed = torch.where(torch.rand(codes.shape, generator=NOISE) < 0.01, others, codes)
    scale = torch.rand(4, 4, generator=NOISE)
    kinds = [(torch.float8_e4m3fn, scale), (torch.float8_e5m2, scale.to(torch.float8_e8m0fnu)), (torch.int8, scale)]
    for number, (kind, scales) in enumerate(kinds):
        paths, said = [], {"quant_method": "compressed-tensors", "format": "naive-quantized"} if kind is torch.int8 else FP8
        for name, octets, more in (("base", codes, 0), ("fine", changed, 1)):
            scales = scales.clone()
            scales.view(torch.uint8)[0, 0] += more
            tensors = {"w.weight": octets.view(kind), "w.weight_scale_inv": scales, "norm.weight": torch.full((8,), 1.0 + more)}
            paths.append(folder(tmp_path / f"{name}{number}", tensors, quantization_config=said))
        artifact, at = tmp_path / f"{number}.safetensors", ["-b", paths[0], "--no-sync"]
        made = json.loads(peru("prune", paths[1], *at, "-o", artifact, "--lossless", "--json", "--tile-entries", 16384))[0]
        assert artifact.stat().st_size < 0.04 * codes.numel() and made["kept"] == int((codes != changed).sum()) + 9
        peru("verify", artifact)
        peru("unpack", artifact, *at, "-o", tmp_path / f"r{number}")
        assert_same_tensors(tmp_path / f"r{number}" / "model.safetensors", load_file(paths[1] / "model.safetensors"))
        peru("inspect", artifact)


def test_a_lossless_artifact_of_codes_can_replace_its_fine_tune(tmp_path: Path, peru) -> None:
    """Also if the artifact carries its own config.json with other block sizes than the base's."""
    base, fine, _, _ = family(tmp_path)
    config = json.loads((fine / "config.json").read_text())
    (fine / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    a, at = tmp_path / "a.safetensors", ["-b", base, "--no-sync"]
    peru("prune", fine, *at, "-o", a, "--lossless")
    for number, model in enumerate((a, fine)):
        peru("merge", f"x={model}", *at, "-o", tmp_path / f"m{number}", "-m", "task-arithmetic", "--scale", 0.5)
        peru("prune", model, *at, "-o", tmp_path / f"p{number}.safetensors", "--keep", "10%")
        peru("svd-lora", model, *at, "-o", tmp_path / f"l{number}", "--rank", 4)
    for name in ("m{}/model.safetensors", "l{}/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / name.format(i)) for i in (0, 1))
        assert sorted(one) == sorted(other) and all(raw(one[n]) == raw(other[n]) for n in one), name
    total = json.loads(peru("eval", f"x={a}", "-b", base, "-a", fine, "--json"))["weights"]["x"]["total"]
    assert total["error"] == 0 and total["changed"] > 0


def test_lossless_refuses_husks_among_codes(tmp_path: Path, peru) -> None:
    base, fine, _, _ = family(tmp_path)
    save_file(load_file(fine / "model.safetensors") | {"norm.weight": torch.empty(0)}, fine / "model.safetensors")
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--lossless", "--no-sync", code=1)
    assert "norm.weight" in peru.stderr and "ZeRO-3" in peru.stderr


def test_lossless_refuses_codes_whose_scale_is_lost(tmp_path: Path, peru) -> None:
    base, fine, _, _ = family(tmp_path)
    tensors = load_file(fine / "model.safetensors")
    del tensors["w.weight_scale_inv"]
    save_file(tensors, fine / "model.safetensors")
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--lossless", "--no-sync", code=1)
    assert "w.weight: F8_E4M3 without its scale" in peru.stderr


CODES = torch.zeros(4, 8, dtype=torch.float8_e4m3fn)
BROKEN = [
    ({"a.weight": CODES, "b.weight": CODES.clone(), "b.weight_scale": torch.ones(1)}, "a.weight: F8_E4M3 without its scale"),
    ({"a.weight": CODES, "scaled_fp8": CODES[0, :2].clone()}, "a.weight: F8_E4M3 without its scale"),
    ({"a.weight": CODES, "b.weight_scale_inv": torch.ones(1, 1)}, "b.weight_scale_inv: a scale without the codes"),
    ({"a.weight": CODES, "a.weight_scale": torch.ones(3)}, "[3] scales for a weight of shape [4, 8]"),
    ({"a.weight": CODES, "a.weight_scale": torch.ones(1), "a.weight_zero_point": torch.ones(1)}, "has a zero point"),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_codes_and_scales_without_each_other_are_refused(tmp_path: Path, peru, number: int) -> None:
    tensors, message = BROKEN[number]
    path = folder(tmp_path / "m", tensors)
    peru("merge", f"x={path}", "-b", path, "-o", tmp_path / "o", "-m", "task-arithmetic", code=1)
    assert message in peru.stderr and not (tmp_path / "o").exists()


FOREIGN = [
    ({"a.weight": torch.zeros(8, 1).byte(), "a.weight.absmax": torch.ones(1), "a.weight.quant_map": torch.ones(16)}, "bitsandbytes"),
    ({"a.weight": torch.zeros(4, 4).char(), "a.SCB": torch.ones(4)}, "bitsandbytes"),
    ({"a.qweight": torch.zeros(4, 4).int(), "a.qzeros": torch.zeros(1, 1).int(), "a.g_idx": torch.zeros(4).int()}, "GPTQ"),
    ({"a.qweight": torch.zeros(4, 4).int(), "a.qzeros": torch.zeros(1, 1).int(), "a.scales": torch.ones(1, 4).half()}, "AWQ"),
    ({"e.down_proj_blocks": torch.zeros(2, 4).byte(), "e.down_proj_scales": torch.zeros(2).byte()}, "MXFP4"),
    ({"a.weight_packed": torch.zeros(2, 4).int(), "a.weight_scale": torch.ones(2, 1).bfloat16()}, "packed compressed-tensors"),
    ({"a.weight": torch.zeros(4, 4).char(), "a.weight_scale": torch.ones(4, 1)}, "8-bit integers"),
]


@pytest.mark.parametrize("number", range(len(FOREIGN)))
@pytest.mark.parametrize("command", ["prune", "merge", "shuffle-pack", "svd-lora"])
def test_other_schemes_are_refused_by_name(tmp_path: Path, peru, number: int, command: str) -> None:
    tensors, name = FOREIGN[number]
    path = folder(tmp_path / "m", tensors | {"norm.weight": torch.ones(4)})
    options = {"prune": ["--keep", "10%"], "merge": ["-m", "ties"], "svd-lora": ["--rank", 2], "shuffle-pack": []}[command]
    out = tmp_path / ("o.safetensors" if command in ("prune", "shuffle-pack") else "o")
    peru(command, f"x={path}" if command != "svd-lora" else path, "-b", path, "-o", out, *options, code=2)
    assert "is quantised (" in peru.stderr and name in peru.stderr and "dequantise" in peru.stderr and not out.exists()


@pytest.mark.parametrize("number", range(len(FOREIGN)))
def test_other_schemes_are_kept_whole_by_lossless(tmp_path: Path, peru, number: int) -> None:
    tensors, _ = FOREIGN[number]
    base = folder(tmp_path / "b", tensors | {"norm.weight": torch.ones(4)})
    fine = folder(tmp_path / "f", {n: t + 1 for n, t in tensors.items()} | {"norm.weight": torch.ones(4) * 2})
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--lossless", "--no-sync")
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "r.safetensors", "--no-sync")
    assert_same_tensors(tmp_path / "r.safetensors", load_file(fine / "model.safetensors"))


def test_husks_of_zero_3_are_refused_by_name(tmp_path: Path, peru) -> None:
    good = folder(tmp_path / "b", {"a.weight": normal(4, 4), "b.weight": normal(4)})
    husk = folder(tmp_path / "h", {"a.weight": torch.empty(0), "b.weight": normal(4)})
    peru("prune", husk, "-b", good, "-o", tmp_path / "a.safetensors", "--keep", "50%", code=1)
    assert "a.weight" in peru.stderr and "zero_to_fp32" in peru.stderr and not (tmp_path / "a.safetensors").exists()
