"""`peru merge --lora`: against the full products in float64, KnOTS' and Core Space's formulas with dense SVDs, and PEFT."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lora.test_options import OUTER, SHAPES, factors, product, save_adapter
from tests.support.merge_formulas import iso_c, tsv_m
from tests.support.merge_reference import ties_authors

RANKS = {"a": 3, "b": 5, "c": 4}
SPACES = ["knots", "core-space"]


def three(folder: Path, ranks: dict[str, int] = RANKS, **config: object) -> dict[str, Path]:
    """Three adapters of different ranks and scales, one of them rsLoRA's."""
    made = {}
    for seed, (task, r) in enumerate(ranks.items()):
        more = {"lora_alpha": 2 + seed, "use_rslora": task == "c"} | config
        made[task] = save_adapter(folder / task, factors(r, seed=seed), r, **more)
    return made


def words(adapters: dict[str, Path]) -> list[str]:
    return [f"{task}={path}" for task, path in adapters.items()]


def coordinates(space: str, adapters: dict[str, Path], name: str) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
    """left, right and M_t by dense SVDs, as in the authors' programs; float64."""
    deltas = [product(path, name) for path in adapters.values()]
    tables = [load_file(path / "adapter_model.safetensors") for path in adapters.values()]
    if space == "knots":
        u, s, v = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
        there = s > 1e-9 * s[0]
        return u[:, there], None, [s[there, None] * part for part in v[there].chunk(len(deltas), dim=1)]
    left = torch.linalg.svd(torch.cat([t[f"{OUTER}{name}.lora_B.weight"].double() for t in scaled(tables, adapters)], 1), False)[0]
    right = torch.linalg.svd(torch.cat([t[f"{OUTER}{name}.lora_A.weight"].double() for t in tables], 0), False)[2]
    return left, right, [left.T @ delta @ right.T for delta in deltas]


def scaled(tables: list[dict[str, torch.Tensor]], adapters: dict[str, Path]) -> list[dict[str, torch.Tensor]]:
    """B times the adapter's scale: the bases are of the updates' own factors."""
    found = []
    for table, path in zip(tables, adapters.values(), strict=True):
        name = next(iter(SHAPES))
        plain = table[f"{OUTER}{name}.lora_B.weight"].double() @ table[f"{OUTER}{name}.lora_A.weight"].double()
        scale = float((product(path, name) * plain).sum() / (plain * plain).sum())
        found.append({key: value.double() * scale for key, value in table.items()})
    return found


def back(left: torch.Tensor, merged: torch.Tensor, right: torch.Tensor | None) -> torch.Tensor:
    return left @ merged if right is None else left @ merged @ right


@pytest.mark.parametrize("space", SPACES)
def test_weighted_averages_equal_those_of_the_updates(space: str, tmp_path: Path, peru) -> None:
    adapters = three(tmp_path)
    weights = {"a": 0.5, "b": 2.0, "c": -0.25}
    given = [word for task, weight in weights.items() for word in ("-w", f"{task}={weight}")]
    peru("merge", *words(adapters), "-o", tmp_path / "out", "-m", "linear", "--lora", space, *given)
    for name in SHAPES:
        expected = sum(weights[task] * product(path, name) for task, path in adapters.items()) / sum(weights.values())
        torch.testing.assert_close(product(tmp_path / "out", name), expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("space", SPACES)
def test_ties_in_a_space_equals_the_authors_over_all_modules(space: str, tmp_path: Path, peru) -> None:
    adapters = three(tmp_path)
    peru("merge", *words(adapters), "-o", tmp_path / "out", "-m", "ties", "--keep", "30%", "--scale", "0.6", "--lora", space)
    found = {name: coordinates(space, adapters, name) for name in sorted(SHAPES)}
    vectors = [torch.cat([parts[task].reshape(-1) for _, _, parts in found.values()]) for task in range(3)]
    merged, at = 0.6 * ties_authors(vectors, int(0.3 * len(vectors[0]))), 0
    for name, (left, right, parts) in found.items():
        small = merged[at : at + parts[0].numel()].view(parts[0].shape)
        at += small.numel()
        expected = back(left, small, right)
        torch.testing.assert_close(product(tmp_path / "out", name), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("method", "formula"), [("tsv-m", tsv_m), ("iso-c", iso_c)])
@pytest.mark.parametrize("space", SPACES)
def test_methods_on_matrices_work_on_the_small_ones(space: str, method: str, formula, tmp_path: Path, peru) -> None:
    adapters = three(tmp_path, dict.fromkeys("abc", 4))  # with other ranks, tsv-m takes directions that a task does not have
    peru("merge", *words(adapters), "-o", tmp_path / "out", "-m", method, "--lora", space)
    for name in SHAPES:
        left, right, parts = coordinates(space, adapters, name)
        expected = back(left, torch.from_numpy(np.asarray(formula([part.numpy() for part in parts]))), right)
        torch.testing.assert_close(product(tmp_path / "out", name), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("space", SPACES)
def test_svc_follows_and_weights_by_layer_are_honoured(space: str, tmp_path: Path, peru) -> None:
    adapters = three(tmp_path)
    some = ["merge", *words(adapters), "-m", "task-arithmetic", "--lora", space]
    peru(*some, "-o", tmp_path / "plain")
    peru(*some, "-o", tmp_path / "svc", "--then", "svc")
    peru(*some, "-o", tmp_path / "layers", "-w", "a=mlp:0,1")
    up = "model.layers.0.mlp.up_proj"
    assert not torch.allclose(product(tmp_path / "plain", up), product(tmp_path / "svc", up))
    expected = 0.3 * (product(adapters["b"], up) + product(adapters["c"], up))
    torch.testing.assert_close(product(tmp_path / "layers", up), expected, rtol=1e-5, atol=1e-7)


def test_peft_loads_what_is_written_with_the_same_updates(tmp_path: Path, peru) -> None:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    sizes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if name.endswith(("q_proj", "down_proj"))}
    first = {name: shape for name, shape in sizes.items() if "q_proj" in name}
    a = save_adapter(tmp_path / "a", factors(2, seed=1, shapes=sizes), 2, target_modules=["q_proj", "down_proj"])
    b = save_adapter(tmp_path / "b", factors(3, seed=2, shapes=first), 3, target_modules=["q_proj"])
    ids = torch.arange(12).view(1, -1)
    for order in ((a, b), (b, a)):
        out = tmp_path / f"out-{order[0].name}"
        said = peru("merge", *order, "-b", tmp_path / "base", "-o", out, "-m", "task-arithmetic", "-s", 1, "--lora", "core-space", "--json")
        assert json.loads(said)["modules"] == len(sizes)
        got = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), out)
        assert sum("lora_A" in name for name, _ in got.named_parameters()) == len(sizes)
        expected = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            for name in sizes:
                weight = expected.get_submodule(name).weight
                weight += (product(a, name) + (product(b, name) if name in first else 0)).float()
            torch.testing.assert_close(got(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


def test_each_task_keeps_the_head_that_its_adapter_holds(tmp_path: Path, peru) -> None:
    heads = {"a": torch.randn(3, 40), "b": torch.randn(5, 40)}
    adapters = {}
    for seed, task in enumerate("ab"):
        table = factors(2, seed=seed) | {"classifier.weight": heads[task]}
        adapters[task] = save_adapter(tmp_path / task, table, 2, modules_to_save=["classifier"])
    peru("merge", *words(adapters), "-o", tmp_path / "out", "-m", "linear", "--lora", "knots")
    factors_of = []
    for task in "ab":
        table = load_file(tmp_path / "out" / task / "adapter_model.safetensors")
        assert torch.equal(table.pop(f"{OUTER}classifier.weight"), heads[task])
        assert json.loads((tmp_path / "out" / task / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
        factors_of.append(table)
    assert factors_of[0].keys() == factors_of[1].keys()
    assert all(torch.equal(tensor, factors_of[1][name]) for name, tensor in factors_of[0].items())


@pytest.mark.parametrize("space", SPACES)
def test_kohya_files_become_one_file_at_the_right_scale(space: str, tmp_path: Path, peru) -> None:
    noise = torch.Generator().manual_seed(3)
    deltas = {}
    for task, (rank, alpha) in {"a": (4, 1.0), "b": (2, 8.0)}.items():
        table = {}
        for name, side in (("lora_unet_down_attn_to_q", ()), ("lora_unet_mid_conv", (3, 3))):
            down, up = torch.randn((rank, 6, *side), generator=noise), torch.randn((9, rank, *(1 for _ in side)), generator=noise)
            table |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
            deltas[task, name] = alpha / rank * up.flatten(1).double() @ down.flatten(1).double()
        save_file(table, tmp_path / f"{task}.safetensors", metadata={"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)})
    out = tmp_path / "out.safetensors"
    peru("merge", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "-o", out, "-m", "linear", "--lora", space, "-w", "a=3")
    got = load_file(out)
    for _, name in list(deltas)[:2]:
        down, up = got[f"{name}.lora_down.weight"], got[f"{name}.lora_up.weight"]
        assert float(got[f"{name}.alpha"]) == len(down) == 6
        assert up.shape == (9, 6, *(1 for _ in down.shape[2:]))
        expected = (3 * deltas["a", name] + deltas["b", name]) / 4
        torch.testing.assert_close(up.flatten(1).double() @ down.flatten(1).double(), expected, rtol=1e-5, atol=1e-5)


def test_each_expert_is_merged_by_itself(tmp_path: Path, peru) -> None:
    experts, rows, columns, name = 3, 6, 5, f"{OUTER}model.layers.0.mlp.experts"

    def product_of(table: dict[str, torch.Tensor], r: int) -> torch.Tensor:
        """As peft's ParamWrapper has it: A stacks experts outermost, B innermost."""
        a, b = table[f"{name}.lora_A.weight"].double(), table[f"{name}.lora_B.weight"].double()
        return torch.einsum("ore,erc->eoc", b.view(rows, r, experts), a.view(experts, r, columns))

    made, expected = [], torch.zeros(experts, rows, columns, dtype=torch.float64)
    for seed, r in enumerate((2, 1)):
        noise = torch.Generator().manual_seed(seed)
        table = {"lora_A.weight": torch.randn(experts * r, columns, generator=noise)}
        table |= {"lora_B.weight": torch.randn(rows, experts * r, generator=noise)}
        named = {f"{name.removeprefix(OUTER)}.{key}": value for key, value in table.items()}
        more = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "lora_alpha": r}
        made.append(save_adapter(tmp_path / f"in{seed}", named, r, **more))
        expected += product_of({OUTER + key: value for key, value in named.items()}, r) / 2
    peru("merge", *made, "-o", tmp_path / "out", "-m", "linear", "--lora", "core-space")
    got = product_of(load_file(tmp_path / "out" / "adapter_model.safetensors"), 3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_threads_and_tiles_change_no_byte(tmp_path: Path, peru) -> None:
    adapters = three(tmp_path)
    seen = set()
    for i, more in enumerate((["--threads", 1], ["--threads", 3, "--tile-entries", 16384])):
        peru("merge", *words(adapters), "-o", tmp_path / f"o{i}", "-m", "ties", "--lora", "knots", "--dtype", "bf16", *more)
        seen.add(hashlib.sha256((tmp_path / f"o{i}" / "adapter_model.safetensors").read_bytes()).hexdigest())
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora", "knot"], "did you mean knots?"),
        (["--lora", "knots", "--per-task", "x"], "--per-task cannot be combined with --lora"),
        (["--lora", "knots", "--dtype", "fp64"], "no program loads such an adapter"),
        (["--lora", "knots", "--keep", "0.01%"], "keeps nothing"),
    ],
)
def test_options_that_do_not_go_together_are_refused(more: list[str], said: str, tmp_path: Path, peru) -> None:
    peru("merge", *words(three(tmp_path)), "-o", tmp_path / "out", "-m", "ties", *more, code=2)
    assert said in peru.stderr
    assert not (tmp_path / "out").exists()


def test_adapters_that_cannot_be_merged_are_refused_by_name(tmp_path: Path, peru) -> None:
    good = save_adapter(tmp_path / "good", factors(2), 2)
    dora = factors(2, seed=1) | {f"{name}.lora_magnitude_vector": torch.ones(rows) for name, (rows, _) in SHAPES.items()}
    other = {name: (rows + 1, columns) for name, (rows, columns) in SHAPES.items()}
    elsewhere = {f"encoder.{name}": shape for name, shape in SHAPES.items()}
    cases = {
        "DoRA's magnitudes": save_adapter(tmp_path / "dora", dora, 2, use_dora=True),
        "49 x 40": save_adapter(tmp_path / "shape", factors(2, shapes=other), 2),
        "no module in common": save_adapter(tmp_path / "names", factors(2, shapes=elsewhere), 2),
    }
    for said, path in cases.items():
        peru("merge", good, path, "-o", tmp_path / "out", "-m", "linear", "--lora", "knots", code=2 if "DoRA" in said else 1)
        assert said in peru.stderr
    peru("merge", good, good, "-o", tmp_path / "out", "-m", "knots", code=2)
    assert "write --lora knots --method ties" in peru.stderr
