"""What `peru svd-lora` promises about ranks, bytes, dtypes and folders, on random adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import raw

SHAPES = {"model.layers.0.self_attn.q_proj": (48, 40), "model.layers.0.mlp.up_proj": (90, 40), "model.layers.10.mlp.down_proj": (40, 90)}
OUTER = "base_model.model."


def factors(
    r: int, dtype: torch.dtype = torch.float32, seed: int = 0, shapes: dict[str, tuple[int, int]] = SHAPES
) -> dict[str, torch.Tensor]:
    """Random factors whose columns fall off, so that the ranks matter; some modules more than others."""
    noise = torch.Generator().manual_seed(seed)
    table = {}
    for i, (name, (rows, columns)) in enumerate(shapes.items()):
        table[f"{name}.lora_A.weight"] = torch.randn(r, columns, generator=noise).to(dtype)
        falling = torch.exp(-torch.arange(r) / (1 + 2 * i))
        table[f"{name}.lora_B.weight"] = (torch.randn(rows, r, generator=noise) * falling * 0.1).to(dtype)
    return table


def save_adapter(folder: Path, table: dict[str, torch.Tensor], r: int, **config: object) -> Path:
    """A PEFT adapter with a minimal config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({OUTER + name: tensor for name, tensor in table.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    base = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(base | config))
    return folder


def product(folder: Path, name: str) -> torch.Tensor:
    """alpha / r * B @ A of an adapter, float64, with patterns resolved as in peft."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    config = LoraConfig.from_pretrained(folder)
    table = load_file(folder / "adapter_model.safetensors")
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    a, b = table[f"{OUTER}{name}.lora_A.weight"].double(), table[f"{OUTER}{name}.lora_B.weight"].double()
    assert len(a) == r == b.shape[1]
    return alpha / (math.sqrt(r) if config.use_rslora else r) * b @ a


def spectrum(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double())


def report(text: str) -> dict[str, object]:
    (one,) = json.loads(text)
    return dict(one)


def test_the_report_is_true(tmp_path: Path, peru) -> None:
    source = save_adapter(tmp_path / "in", factors(8), 8)
    said = report(peru("svd-lora", source, "-o", tmp_path / "out", "--rank", 3, "--json", "--no-sync"))
    squared = missed = 0.0
    for module in said["modules"]:
        before, after = product(source, module["name"]), product(tmp_path / "out", module["name"])
        s = spectrum(before)
        assert module["relative_error"] == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-4)
        assert module["relative_error"] ** 2 == pytest.approx(float(s[3:].square().sum() / s.square().sum()), rel=1e-4)
        assert module["energy"] == pytest.approx(float(s[:3].square().sum() / s.square().sum()), rel=1e-6)
        assert (module["rank_before"], module["rank"]) == (8, 3)
        rows, columns = SHAPES[module["name"]]
        assert module["parameters"] == 3 * (rows + columns) and module["papers_count"] == 3 * (rows + columns + 1)
        assert module["bytes"] == 4 * module["parameters"]
        squared, missed = squared + float(before.square().sum()), missed + float((before - after).square().sum())
    assert said["relative_error"] == pytest.approx(math.sqrt(missed / squared), rel=1e-4)
    assert said["file_bytes"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert said["bytes_before"] == (source / "adapter_model.safetensors").stat().st_size
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3 and config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["lora_dropout"] == 0 and config["use_rslora"] is False and config["task_type"] == "CAUSAL_LM"
    text = peru("svd-lora", source, "-o", tmp_path / "out", "--rank", 3, "--force", "--no-sync")
    assert "relative error" in text and "q (d_out + d_in + 1)" in text


@pytest.mark.parametrize("share", ["0.5", "90%", "0.9999", "100%"])
def test_energy_keeps_the_least_rank_that_suffices(tmp_path: Path, peru, share: str) -> None:
    source = save_adapter(tmp_path / "in", factors(8), 8)
    said = report(peru("svd-lora", source, "-o", tmp_path / "out", "--energy", share, "--json", "--no-sync"))
    wanted = float(share.rstrip("%")) / (100 if "%" in share else 1)
    for module in said["modules"]:
        energies = spectrum(product(source, module["name"])).square()
        shares = energies.cumsum(0) / energies.sum()
        least = int((shares < wanted * (1 - 1e-12)).sum()) + 1
        assert module["rank"] == min(least, 8)
        assert product(tmp_path / "out", module["name"]).shape == SHAPES[module["name"]]
    if share == "90%":  # ranks differ: patterns name modules exactly, the same for both, and the largest is r
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        ranks = {module["name"]: module["rank"] for module in said["modules"]}
        assert config["r"] == config["lora_alpha"] == max(ranks.values())
        assert config["rank_pattern"] == config["alpha_pattern"]
        assert sorted(config["rank_pattern"].values()) == sorted(rank for rank in ranks.values() if rank != config["r"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_byte_budget_is_kept_and_spent(tmp_path: Path, peru, dtype: torch.dtype) -> None:
    source = save_adapter(tmp_path / "in", factors(16, dtype) | {"score.weight": torch.randn(3, 40)}, 16, modules_to_save=["score"])
    whole = (source / "adapter_model.safetensors").stat().st_size
    errors = []
    for budget in (whole // 4, whole // 2, whole * 9 // 10):
        out = tmp_path / str(budget)
        said = report(peru("svd-lora", source, "-o", out, "--max-bytes", budget, "--json", "--no-sync"))
        cheapest = min(module["bytes"] // module["rank"] for module in said["modules"])
        # the rest is less than one more rank of the cheapest module, except for the digits of the header
        assert budget - cheapest - 200 < said["file_bytes"] <= budget
        errors.append(said["relative_error"])
        one = report(
            peru("svd-lora", source, "-o", tmp_path / f"u{budget}", "--max-bytes", budget, "--uniform-rank", "--json", "--no-sync")
        )
        assert len({module["rank"] for module in one["modules"]}) == 1 and one["file_bytes"] <= budget
        assert said["relative_error"] <= one["relative_error"] * 1.0001  # choosing over all modules together is no worse
    assert errors == sorted(errors, reverse=True)
    peru("svd-lora", source, "-o", tmp_path / "none", "--max-bytes", 400, code=2)
    assert "at rank 1, but --max-bytes is 400" in peru.stderr


def test_uniform_rank_fills_with_zeros(tmp_path: Path, peru) -> None:
    table = factors(8)
    small = "model.layers.0.self_attn.q_proj"
    table[f"{small}.lora_A.weight"], table[f"{small}.lora_B.weight"] = torch.randn(2, 40), torch.randn(48, 2)
    source = save_adapter(tmp_path / "in", table, 8, rank_pattern={"q_proj": 2})
    peru("svd-lora", source, "-o", tmp_path / "out", "--rank", 5, "--uniform-rank", "--no-sync")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(len(t) == 5 for n, t in written.items() if "lora_A" in n)
    assert not written[f"{OUTER}{small}.lora_A.weight"][2:].any() and not written[f"{OUTER}{small}.lora_B.weight"][:, 2:].any()
    torch.testing.assert_close(product(tmp_path / "out", small), product(source, small), rtol=1e-5, atol=1e-6)
    assert 'rank_pattern": {}' in (tmp_path / "out" / "adapter_config.json").read_text()
    # llama.cpp divides the global alpha by each tensor's own rank, vLLM by the global r: both are 1 now
    peru("svd-lora", source, "-o", tmp_path / "varied", "--rank", 5, "--no-sync")
    assert "llama.cpp needs --uniform-rank" in peru.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rank_that_a_module_already_has_loses_nothing(tmp_path: Path, peru, dtype: torch.dtype) -> None:
    """alpha / r = 2 moves into the factors by powers of two alone."""
    source = save_adapter(tmp_path / "in", factors(8, dtype), 8)
    for rank in (8, 50):
        said = report(peru("svd-lora", source, "-o", tmp_path / f"{rank}", "--rank", rank, "--json", "--no-sync"))
        for name in SHAPES:
            assert torch.equal(product(tmp_path / f"{rank}", name), product(source, name))
        assert all(module["rank"] == 8 and module["energy"] == 1 for module in said["modules"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_factors_of_any_dtype_neither_under_nor_overflow(tmp_path: Path, peru, dtype: str, scale: float) -> None:
    table = factors(8)
    table = {name: tensor * (scale if "lora_B" in name else 1.0) for name, tensor in table.items()}
    source = save_adapter(tmp_path / "in", table, 8, use_rslora=True, lora_alpha=32)
    said = report(peru("svd-lora", source, "-o", tmp_path / "out", "--rank", 4, "--dtype", dtype, "--json", "--no-sync"))
    precision = {"bf16": 2.0**-8, "fp16": 2.0**-10, "fp32": 2.0**-22}[dtype]
    for module in said["modules"]:
        before, after = product(source, module["name"]), product(tmp_path / "out", module["name"])
        u, s, vt = torch.linalg.svd(before, full_matrices=False)
        best = (u[:, :4] * s[:4]) @ vt[:4]
        assert float((after - best).norm() / best.norm()) < precision
        assert module["relative_error"] == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-3)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    sizes = [float(t.float().norm()) for _, t in sorted(stored.items())]
    assert all(0.9 < a / b < 1.1 for a, b in zip(sizes[::2], sizes[1::2], strict=True))  # the square root is in each


def test_rslora_is_right_although_pefts_own_resize_is_not(tmp_path: Path, peru) -> None:
    """peft 0.21.2 keeps use_rslora when it resizes, and scales by sqrt(r) once more."""
    import copy

    import peft
    from torch import nn

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 30, bias=False))
    settings = peft.LoraConfig(target_modules=["0"], r=8, lora_alpha=16, use_rslora=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(base), settings)
    wrapped.save_pretrained(tmp_path / "in")
    delta = wrapped.base_model.model[0].get_delta_weight("default").detach()
    u, s, vt = torch.linalg.svd(delta.double())
    best = (u[:, :4] * s[:4]) @ vt[:4]
    peru("svd-lora", tmp_path / "in", "-o", tmp_path / "out", "--rank", 4, "--no-sync")
    ours = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    torch.testing.assert_close(ours.base_model.model[0].get_delta_weight("default").double(), best, rtol=1e-4, atol=1e-5)
    if peft.__version__ == "0.21.2":
        # it does not resize a single adapter at all, so it is given twice
        wrapped.add_weighted_adapter(["default", "default"], [0.5, 0.5], "small", combination_type="svd", svd_rank=4)
        theirs = wrapped.base_model.model[0].get_delta_weight("small").detach().double()
        torch.testing.assert_close(theirs, 2 * best, rtol=1e-4, atol=1e-4)  # sqrt(4) too large


def test_weights_in_a_bin_file_are_read_too(tmp_path: Path, peru) -> None:
    source = save_adapter(tmp_path / "in", factors(8), 8)
    peru("svd-lora", source, "-o", tmp_path / "a", "--rank", 3, "--no-sync")
    torch.save(load_file(source / "adapter_model.safetensors"), source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    peru("svd-lora", source, "-o", tmp_path / "b", "--rank", 3, "--no-sync")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert sorted(a) == sorted(b) and all(raw(a[name]) == raw(b[name]) for name in a)


def test_exact_gives_the_same_result_from_the_dense_product(tmp_path: Path, peru) -> None:
    source = save_adapter(tmp_path / "in", factors(8), 8)
    peru("svd-lora", source, "-o", tmp_path / "a", "--rank", 3, "--no-sync")
    peru("svd-lora", source, "-o", tmp_path / "b", "--rank", 3, "--exact", "--no-sync")
    for name in SHAPES:
        torch.testing.assert_close(product(tmp_path / "a", name), product(tmp_path / "b", name), rtol=1e-5, atol=1e-6)


def test_threads_do_not_change_the_bytes(tmp_path: Path, peru) -> None:
    shapes = {f"layers.{i}.fc": (700 + i, 500) for i in range(9)}
    source = save_adapter(tmp_path / "in", factors(32, torch.bfloat16, shapes=shapes), 32)
    for options in (("--rank", 4), ("--energy", "95%"), ("--max-bytes", "100kB")):
        files = set()
        for threads in (1, 2, 3):
            peru("svd-lora", source, "-o", tmp_path / "out", *options, "--threads", threads, "--force", "--no-sync")
            files.add((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
        assert len(files) == 1


def test_several_adapters_and_folders_of_several(tmp_path: Path, peru) -> None:
    a, b = (save_adapter(tmp_path / name, factors(8, seed=i), 8) for i, name in enumerate("ab"))
    said = json.loads(peru("svd-lora", f"x={a}", b, "-o", tmp_path / "out", "--rank", 2, "--json", "--no-sync"))
    assert [(one["task"], one["path"]) for one in said] == [("x", str(tmp_path / "out" / "x")), ("b", str(tmp_path / "out" / "b"))]
    # the layout of PeftModel.save_pretrained for several: the default adapter in the folder itself, others by name
    save_adapter(a / "other", factors(4, seed=5), 4)
    (a / "tokenizer.json").write_text("{}")
    peru("svd-lora", a, "-o", tmp_path / "two", "--rank", 2, "--no-sync")
    files = ["adapter_config.json", "adapter_model.safetensors"]
    wanted = sorted([*files, "tokenizer.json", *(f"other/{name}" for name in files)])
    assert sorted(str(p.relative_to(tmp_path / "two")) for p in (tmp_path / "two").rglob("*.*")) == wanted
    for source, out in ((a, tmp_path / "two"), (a / "other", tmp_path / "two" / "other")):
        for name in SHAPES:
            s = spectrum(product(source, name))
            error = (product(source, name) - product(out, name)).square().sum()
            assert float(error) == pytest.approx(float(s[2:].square().sum()), rel=1e-4)
    (a / "adapter_config.json").unlink()
    (a / "adapter_model.safetensors").unlink()
    peru("svd-lora", a, "-o", tmp_path / "one", "--rank", 2, "--no-sync")
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["other"]
    peru("svd-lora", a, b, "-o", tmp_path / "mixed", "--rank", 2, "--no-sync")
    assert sorted(str(p.parent.relative_to(tmp_path / "mixed")) for p in (tmp_path / "mixed").rglob("*.json")) == ["a/other", "b"]
    peru("svd-lora", f"A={b}", f"a={b}", "-o", tmp_path / "no", "--rank", 2, code=2)
    assert "stands for both" in peru.stderr


def test_outputs_are_refused_replaced_or_not_written_at_all(tmp_path: Path, peru) -> None:
    source = save_adapter(tmp_path / "in", factors(8), 8)
    peru("svd-lora", source, "-o", tmp_path / "out", "--rank", 2, "--dry-run")
    assert not (tmp_path / "out").exists()
    peru("svd-lora", source, "-o", tmp_path / "out", "--rank", 2, "--no-sync")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    peru("svd-lora", source, "-o", tmp_path / "out", "--rank", 3, code=2)
    assert "exists already" in peru.stderr and (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    table = factors(8)
    table["model.layers.10.mlp.down_proj.lora_A.weight"][0, 0] = float("nan")
    save_adapter(source, table, 8)
    peru("svd-lora", source, "-o", tmp_path / "out", "--rank", 3, "--force", code=1)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    peru("svd-lora", source, "-o", tmp_path / "x.safetensors", "--rank", 3, code=2)
    assert "a PEFT adapter is a folder" in peru.stderr


def test_inspect_shows_the_error_of_each_rank(tmp_path: Path, peru) -> None:
    source = save_adapter(tmp_path / "in", factors(20), 20, use_rslora=True)
    text = peru("inspect", source)
    assert "LoRA adapter, rank 20, on 3 modules" in text and "effective rank" in text and "--rank 16" in text
    said = json.loads(peru("inspect", source, "--json", "--plot", tmp_path / "s.png"))
    assert (tmp_path / "s.png").stat().st_size > 5000
    total = dict.fromkeys((4, 8, 16), 0.0)
    squared = 0.0
    for module in said["modules"]:
        before = product(source, module["name"])
        s = spectrum(before)[:20]
        np.testing.assert_allclose(module["singular_values"], s, rtol=1e-5, atol=1e-6)
        assert module["scale"] == pytest.approx(40 / math.sqrt(20))
        assert module["norm"] == pytest.approx(float(before.norm()))
        assert module["effective_rank"] == pytest.approx(float(s.square().sum() / s[0] ** 2))
        for rank in total:
            total[rank] += float(s[rank:].square().sum())
        squared += float(s.square().sum())
    for plan in said["rank_plans"]:
        error = math.sqrt(total[plan["rank"]] / squared) if plan["rank"] in total else 0.0
        assert plan["error"] == pytest.approx(error, rel=1e-4, abs=1e-7)
        out = tmp_path / str(plan["rank"])
        made = report(peru("svd-lora", source, "-o", out, "--rank", plan["rank"], "--json", "--no-sync"))
        assert plan["bytes"] == sum(module["bytes"] for module in made["modules"])
