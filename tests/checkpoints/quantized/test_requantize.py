"""`merge --dtype fp8`: codes and scales as transformers and compressed-tensors make them of the same floats."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from peru_cli.checkpoints.quantized import requantize
from tests.conftest import raw

Tensors = dict[str, torch.Tensor]
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
MERGE = ["-m", "task-arithmetic", "--scale", 0.7, "--no-sync", "--tile-entries", 16384]


def folder(path: Path, tensors: Tensors, quantization: dict[str, object] | None, **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    said = {"torch_dtype": "bfloat16", **config} | ({"quantization_config": quantization} if quantization else {})
    (path / "config.json").write_text(json.dumps(said))
    return path


def models(tmp_path: Path, names: Tensors, scale: torch.Tensor | None, end: str, quantization: dict[str, object] | None) -> list[Path]:
    """A base and two fine-tunes; `names` gives codes, and every weight has the same scale."""
    made = []
    for number, name in enumerate(("base", "a", "b")):
        noise = torch.Generator().manual_seed(number)
        tensors: Tensors = {"norm.weight": torch.randn(200, generator=noise).bfloat16()}
        for weight, like in names.items():
            tensors[weight] = torch.randn(like.shape, generator=noise).mul(20).to(like.dtype)
            if scale is not None:
                tensors[weight + end] = scale.clone()
            tensors[f"{weight.removesuffix('weight')}input_scale"] = torch.tensor(1.5 + number)
        made.append(folder(tmp_path / name, tensors, quantization))
    return made


def merged(peru, tmp_path: Path, paths: list[Path], *more: object) -> tuple[Tensors, Tensors]:
    """The merge as float32, and what `--dtype fp8` writes."""
    base, a, b = paths
    for dtype in ("fp32", "fp8"):
        peru("merge", f"a={a}", f"b={b}", "-b", base, "-o", tmp_path / dtype, *MERGE, "--dtype", dtype, *more)
    return load_file(tmp_path / "fp32" / "model.safetensors"), load_file(tmp_path / "fp8" / "model.safetensors")


def by_transformers(weight: torch.Tensor, **config: object) -> list[torch.Tensor]:
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(**{"scale_fmt": None, "weight_block_size": (128, 128), **config}))
    return list(Fp8Quantize(quantizer)._quantize_one("w.weight", weight).values())


def by_compressed_tensors(weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """calculate_qparams and _quantize (compressed_tensors.quantization) of float32 weights with `scale_dtype`: its lines, by block."""
    rows, columns = weight.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(down * block[0], across * block[1])
    padded[:rows, :columns] = weight
    blocks = padded.view(down, block[0], across, block[1])
    scales = (blocks.abs().amax((1, 3)) / 448.0).to(dtype).float()
    scales[scales == 0] = torch.finfo(dtype).eps
    codes = (blocks / scales[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn).reshape(padded.shape)
    return codes[:rows, :columns], scales.to(dtype)


def test_blocks_are_those_of_transformers_quantiser_to_the_bit(tmp_path: Path, peru) -> None:
    paths = models(tmp_path, {"w.weight": torch.zeros(256, 384, dtype=torch.float8_e4m3fn)}, torch.rand(2, 3) / 100, "_scale_inv", BLOCKS)
    floats, got = merged(peru, tmp_path, paths)
    codes, scales = by_transformers(floats["w.weight"])
    assert raw(got["w.weight"]) == raw(codes) and raw(got["w.weight_scale_inv"]) == raw(scales)
    assert got["norm.weight"].dtype is torch.bfloat16 and raw(got["norm.weight"]) == raw(floats["norm.weight"].bfloat16())
    assert raw(got["w.input_scale"]) == raw(torch.tensor(1.5))
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == BLOCKS and config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", [torch.float32, torch.float8_e8m0fnu])
def test_powers_of_two_match_transformers(tmp_path: Path, peru, kind: torch.dtype) -> None:
    said = BLOCKS | {"scale_fmt": "ue8m0"}
    like = {"w.weight": torch.zeros(128, 256, dtype=torch.float8_e4m3fn)}
    floats, got = merged(peru, tmp_path, models(tmp_path, like, torch.tensor([[1.0, 0.5]]).to(kind), "_scale_inv", said))
    codes, scales = by_transformers(floats["w.weight"], scale_fmt="ue8m0")
    assert raw(got["w.weight"]) == raw(codes) and got["w.weight_scale_inv"].dtype is kind
    assert got["w.weight_scale_inv"].float().equal(scales.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "block"), [((), (300, 200)), ((1,), (300, 200)), ((300, 1), (1, 200)), ((300,), (1, 200)), ((3, 2), (128, 128))]
)
def test_scales_match_compressed_tensors(tmp_path: Path, peru, shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype):
    like = {"w.weight": torch.zeros(300, 200, dtype=torch.float8_e4m3fn)}
    floats, got = merged(peru, tmp_path, models(tmp_path, like, torch.full(shape, 0.01, dtype=dtype), "_scale", COMPRESSED))
    codes, scales = by_compressed_tensors(floats["w.weight"], block, dtype)
    assert raw(got["w.weight"]) == raw(codes) and raw(got["w.weight_scale"]) == raw(scales.reshape(shape))
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"] == COMPRESSED


def test_stacked_experts_are_quantised_one_by_one(tmp_path: Path, peru) -> None:
    like = {"e.up_proj": torch.zeros(3, 130, 260, dtype=torch.float8_e4m3fn)}
    floats, got = merged(peru, tmp_path, models(tmp_path, like, torch.full((3, 1, 1), 0.01), "_scale_inv", BLOCKS))
    for number in range(3):
        codes, scales = by_transformers(floats["e.up_proj"][number], weight_block_size=(130, 260))
        assert raw(got["e.up_proj"][number]) == raw(codes) and raw(got["e.up_proj_scale_inv"][number]) == raw(scales)


def test_a_block_of_zeros(tmp_path: Path, peru) -> None:
    for end, said, scale in (("_scale_inv", BLOCKS, 1.0), ("_scale", COMPRESSED, 2.0**-23)):
        place = tmp_path / end
        place.mkdir()
        zeros = {"w.weight": torch.zeros(4, 8, dtype=torch.float8_e4m3fn), f"w.weight{end}": torch.ones(1, 1)}
        paths = [folder(place / name, zeros, said, number=number) for number, name in enumerate("xyz")]
        _, got = merged(peru, place, paths, "--config", "base")
        assert got[f"w.weight{end}"].item() == scale and not got["w.weight"].view(torch.uint8).any()


def test_small_weights_beside_small_tensors_of_another_dtype(tmp_path: Path, peru) -> None:
    """Small tensors share tiles, but weights arrive as float32 and norms as bfloat16."""
    paths = models(tmp_path, {"up.weight": torch.empty(40, 16, dtype=torch.float8_e4m3fn)}, torch.full((1, 1), 0.01), "_scale_inv", BLOCKS)
    plain, found = merged(peru, tmp_path, paths)
    scale = found["up.weight_scale_inv"]
    error = (found["up.weight"].float() * scale - plain["up.weight"]).abs()
    assert plain["up.weight"].abs().max() > 0.1
    assert (error <= plain["up.weight"].abs() * 2**-4 + scale * 2**-10).all()  # three bits of mantissa, and subnormal codes
    assert torch.equal(found["norm.weight"].float(), plain["norm.weight"].bfloat16().float())


def test_the_same_bytes_for_any_tiles_threads_and_groups(tmp_path: Path, peru, monkeypatch) -> None:
    """A matrix with one scale waits in a file where it is large; rows of blocks wait for each other in memory."""
    like = {"w.weight": torch.zeros(300, 500, dtype=torch.float8_e4m3fn)}
    for end, scale in (("_scale", torch.tensor(0.01)), ("_scale_inv", torch.full((3, 4), 0.01)), ("_scale_2", None)):
        place = tmp_path / end
        place.mkdir()
        base, a, b = models(place, like, scale, end, BLOCKS if scale is not None else None)
        found = set()
        for number, (tile, threads, group, held) in enumerate(
            [(1 << 18, 1, 1 << 18, 1 << 22), (1 << 14, 2, 1 << 18, 1000), (1 << 15, 2, 7000, 1000)]
        ):
            monkeypatch.setattr(requantize, "_GROUP", group)
            monkeypatch.setattr(requantize, "_HELD", held)
            out = place / str(number)
            how = ["-m", "linear", "--no-sync", "--tile-entries", tile, "--threads", threads, "--dtype", "fp8"]
            peru("merge", f"a={a}", f"b={b}", "-b", base, "-o", out, *how)
            found.add((out / "model.safetensors").read_bytes())
        assert len(found) == 1


def test_tensors_that_only_the_base_has_keep_their_codes(tmp_path: Path, peru) -> None:
    base, a, b = models(tmp_path, {"w.weight": torch.zeros(128, 128, dtype=torch.float8_e4m3fn)}, torch.ones(1, 1), "_scale_inv", BLOCKS)
    more = {"z.weight": torch.randn(8, 8).to(torch.float8_e4m3fn), "z.weight_scale_inv": torch.tensor([[0.3]])}
    save_file(load_file(base / "model.safetensors") | more, base / "model.safetensors", {"format": "pt"})
    peru("merge", f"a={a}", f"b={b}", "-b", base, "-o", tmp_path / "o", *MERGE, "--dtype", "fp8")
    got = load_file(tmp_path / "o" / "model.safetensors")
    assert all(raw(got[name]) == raw(tensor) for name, tensor in more.items())


def test_transformers_loads_the_output(tmp_path: Path, peru) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    paths = []
    for number, name in enumerate(("base", "a", "b")):
        torch.manual_seed(number)
        model = LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(tmp_path / name)
        tensors, out = load_file(tmp_path / name / "model.safetensors"), {}
        for key, tensor in tensors.items():
            if "_proj" in key:
                out[key], out[key + "_scale_inv"] = by_transformers(tensor)
            else:
                out[key] = tensor
        save_file(out, tmp_path / name / "model.safetensors", {"format": "pt"})
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": BLOCKS}))
        paths.append(path.parent)
    _, got = merged(peru, tmp_path, paths)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    for key, weight in loaded.state_dict().items():
        scales = got.get(key + "_scale_inv")
        expected = got[key] if scales is None else Fp8Dequantize(None)._dequantize_one(got[key], scales, torch.bfloat16)
        assert raw(weight) == raw(expected), key


def test_invalid_requests_are_refused(tmp_path: Path, peru) -> None:
    base, a, b = models(tmp_path, {"w.weight": torch.zeros(128, 128, dtype=torch.float8_e4m3fn)}, torch.ones(1, 1), "_scale_inv", BLOCKS)
    plain = folder(tmp_path / "plain", {"w.weight": torch.randn(128, 128).bfloat16(), "norm.weight": torch.ones(200).bfloat16()}, None)
    models_ = [f"a={a}", f"b={b}"]

    def refused(*arguments: object) -> str:
        peru("merge", *arguments, *MERGE[:2], "--dtype", "fp8", "-o", tmp_path / "o", code=2)
        assert not (tmp_path / "o").exists()
        return str(peru.stderr)

    assert "is not quantised" in refused(*models_, "-b", plain)
    assert "--compress" in refused(*models_, "-b", base, "--compress", "5%")
    wrong = {"w.weight": torch.ones(128, 128).char(), "w.weight_scale": torch.ones(1), "norm.weight": torch.ones(200).bfloat16()}
    int8 = folder(tmp_path / "int8", wrong, COMPRESSED | {"format": "int-quantized"})
    assert "are I8, not FP8" in refused(*models_, "-b", int8)
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {a}, parameters: {{weight: 1}}}}]\n")
    peru("merge", recipe, "--dtype", "fp8", "-o", tmp_path / "o", code=2)
    assert "recipe" in peru.stderr
