"""Adapters from full fine-tunes: real tiny models, loaded by peft and by transformers, nothing left out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from peru_cli.checkpoints.names.loaded_names import SAME_NAMES, ask_transformers
from tests.conftest import raw, save
from tests.lora.test_resize import IDS, INPUTS, SMALL, bert, gpt2, gpt_oss, llama, vit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
OUTER = "base_model.model."
REST = "peru-rest.safetensors"


def pair(folder: Path, model: Callable[[], nn.Module], seed: int = 0, bare: bool = False) -> tuple[nn.Module, nn.Module]:
    """A base and a fine-tune that changed everywhere, saved by transformers. `bare` saves the base without its head."""
    torch.manual_seed(seed)
    base = model().eval()
    fine = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    fine.save_pretrained(folder / "fine")
    (base.base_model if bare else base).save_pretrained(folder / "base")
    return base, fine


def best(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation at a rank, float64: of a matrix, a flattened kernel, or each of a stack of experts."""
    matrix = delta.double() if delta.ndim == 3 else delta.double().flatten(1)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return ((u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]).view(delta.shape)


def report(text: str) -> dict[str, object]:
    (one,) = json.loads(text)
    return dict(one)


def targeted(adapter: Path) -> set[str]:
    """Names, in memory, of the weights that an adapter has factors of."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return {f"{module}.weight" for module in config["target_modules"]} | set(config["target_parameters"] or [])


KINDS = {"bert": (bert, True), "vit": (vit, True), "llama": (llama, False), "gpt2": (gpt2, False), "gpt_oss": (gpt_oss, False)}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_and_transformers_load_extracted_adapters(tmp_path: Path, peru, kind: str) -> None:
    model, bare = KINDS[kind]
    base, fine = pair(tmp_path, model, bare=bare)
    rank = 4
    said = report(peru("svd-lora", tmp_path / "fine", "-b", tmp_path / "base", "-o", tmp_path / "a", "--rank", rank, "--json", "--no-sync"))
    before, after = base.state_dict(), fine.state_dict()
    factored = targeted(tmp_path / "a")
    assert len(factored) == len(said["modules"]) > 5
    wanted = {name: before[name] + best(after[name] - before[name], rank) if name in factored else tensor for name, tensor in after.items()}
    # unpacked: everything equals the fine-tune, except the factored weights
    peru("unpack", tmp_path / "a", "-b", tmp_path / "base", "-o", tmp_path / "full", "--no-sync")
    loaded, info = type(fine).from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name].float(), rtol=1e-5, atol=1e-6)
    # loaded by peft: the same, except what only the delta beside the adapter has
    in_delta = set()
    if said["delta_tensors"]:
        renamed, _ = ask_transformers(json.loads((tmp_path / "fine" / "config.json").read_text()), 1000)
        in_delta = {renamed.get(name, name) for name in said["delta_tensors"]}
    if kind == "gpt2":  # tied to the output matrix, which peft would leave unchanged
        assert said["delta_tensors"] == ["transformer.wte.weight"]
        in_delta.add("lm_head.weight")
    with torch.no_grad():
        reference = copy.deepcopy(base)
        reference.load_state_dict({name: before[name] if name in in_delta else tensor for name, tensor in wanted.items()})
        wrapped = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
        torch.testing.assert_close(wrapped(**INPUTS[model]).logits, reference(**INPUTS[model]).logits, rtol=1e-4, atol=1e-4)
    # and everything is counted
    held = factored | in_delta | {f"{m}.bias" for m in (n.removesuffix(".weight") for n in factored) if said["biases"]}
    held |= {name for name in after if name.rpartition(".")[0] in said["modules_to_save"]}
    assert {name for name in after if not torch.equal(after[name], before[name])} <= held


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_remainder_as_a_delta(tmp_path: Path, peru, kind: str) -> None:
    """vLLM and llama.cpp take the adapter alone; all else comes back to the bit."""
    model, bare = KINDS[kind]
    pair(tmp_path, model, bare=bare)
    options = ("-b", tmp_path / "base", "-o", tmp_path / "a", "--rank", 4, "--rest", "delta", "--no-sync", "--json")
    said = report(peru("svd-lora", tmp_path / "fine", *options))
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in written)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and not config["lora_bias"] and config["bias"] == "none"
    assert said["delta_bytes"] == (tmp_path / "a" / REST).stat().st_size
    assert said["bytes"] == said["delta_bytes"] + (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    peru("unpack", tmp_path / "a", "-b", tmp_path / "base", "-o", tmp_path / "full.safetensors", "--no-sync")
    restored, after = load_file(tmp_path / "full.safetensors"), load_file(tmp_path / "fine" / "model.safetensors")
    assert sorted(restored) == sorted(after)
    factored = targeted(tmp_path / "a")
    assert all(raw(restored[name]) == raw(tensor) for name, tensor in after.items() if name not in factored)
    assert sorted(said["delta_tensors"]) == sorted(set(after) - factored)
    # a smaller adapter keeps it
    printed = peru("svd-lora", tmp_path / "a", "-o", tmp_path / "b", "--rank", 2, "--no-sync")
    sizes = [sum((tmp_path / d / f).stat().st_size for f in (REST, "adapter_model.safetensors")) for d in "ab"]
    assert f"{sizes[0] / sizes[1]:.1f}x smaller than the input's" in printed and "delta beside it" in printed
    assert (tmp_path / "b" / REST).read_bytes() == (tmp_path / "a" / REST).read_bytes()
    # the delta knows its base
    other = load_file(tmp_path / "base" / "model.safetensors")
    name = next(n for n in other if "norm" in n.lower())
    save_file({**other, name: other[name] + 1}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    peru("unpack", tmp_path / "a", "-b", tmp_path / "base", "-o", tmp_path / "no.safetensors", code=1)
    assert "is not the base" in peru.stderr and not (tmp_path / "no.safetensors").exists()


def test_unchanged_tensors_are_not_stored(tmp_path: Path, peru) -> None:
    pair(tmp_path, llama)
    table, before = load_file(tmp_path / "fine" / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    kept = {name: tensor for name, tensor in before.items() if "layers.1." not in name}
    save_file(table | kept, tmp_path / "fine" / "model.safetensors", metadata={"format": "pt"})
    said = report(peru("svd-lora", tmp_path / "fine", "-b", tmp_path / "base", "-o", tmp_path / "a", "--rank", 4, "--json", "--no-sync"))
    assert all(module["name"].startswith("model.layers.1.") for module in said["modules"])
    assert said["modules_to_save"] == ["model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm"]
    assert said["unchanged"] == len(kept) and not said["delta_tensors"] and not (tmp_path / "a" / REST).exists()


def test_an_unchanged_expert_has_zero_factors(tmp_path: Path, peru) -> None:
    noise = torch.Generator().manual_seed(0)
    base = {"mlp.experts.up": torch.randn(3, 40, 30, generator=noise), "wide.experts.up": torch.randn(2, 700, 600, generator=noise)}
    fine = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=noise) for name, tensor in base.items()}
    fine["mlp.experts.up"][1], fine["wide.experts.up"][0] = base["mlp.experts.up"][1], base["wide.experts.up"][0]
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    at = ("-b", tmp_path / "base.safetensors", "--no-sync")
    peru("svd-lora", tmp_path / "fine.safetensors", *at, "-o", tmp_path / "a", "--rank", 4)
    peru("unpack", tmp_path / "a", *at, "-o", tmp_path / "r.safetensors")
    for name, tensor in load_file(tmp_path / "r.safetensors").items():
        wanted = base[name] + best(fine[name] - base[name], 4)
        error, optimum = (tensor - fine[name]).norm(), (wanted - fine[name]).norm()
        assert optimum * 0.9999 < error < 1.01 * optimum
    assert torch.equal(load_file(tmp_path / "r.safetensors")["mlp.experts.up"][1], base["mlp.experts.up"][1])


def matrices(folder: Path, dtype: torch.dtype = torch.float32, base_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Plain files of a base and a fine-tune with matrices of falling spectra. Returns the differences by name."""
    noise = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (700, 600), "b.weight": (90, 130), "c.weight": (130, 90), "d.weight": (1200, 560)}
    before = {name: torch.randn(shape, generator=noise).to(base_dtype or dtype) for name, shape in shapes.items()}
    after = {}
    for name, (rows, columns) in shapes.items():
        k = min(rows, columns)
        left, right = torch.randn(rows, k, generator=noise), torch.randn(k, columns, generator=noise)
        after[name] = (before[name].to(dtype).float() + 0.003 * (left * torch.arange(1, k + 1) ** -0.7) @ right).to(dtype)
    save(before | {"norm.weight": torch.ones(20)}, folder / "base.safetensors")
    save(after | {"norm.weight": torch.ones(20) * 1.5}, folder / "fine.safetensors")
    return {name: after[name].double() - before[name].to(dtype).double() for name in shapes}


def product(folder: Path, name: str) -> torch.Tensor:
    table = load_file(folder / "adapter_model.safetensors")
    module = OUTER + name.removesuffix(".weight")
    return table[f"{module}.lora_B.weight"].double() @ table[f"{module}.lora_A.weight"].double()


@pytest.mark.parametrize(
    ("dtype", "base_dtype"), [(torch.float32, None), (torch.bfloat16, None), (torch.float16, torch.float32), (torch.float64, None)]
)
def test_errors_are_measured_and_within_a_percent_of_the_optimum(
    tmp_path: Path, peru, dtype: torch.dtype, base_dtype: torch.dtype | None
) -> None:
    deltas = matrices(tmp_path, dtype, base_dtype)
    at = (tmp_path / "fine.safetensors", "-b", tmp_path / "base.safetensors", "--no-sync", "--json", "--dtype", "fp32")
    said = report(peru("svd-lora", *at, "-o", tmp_path / "a", "--rank", 16))
    exact = report(peru("svd-lora", *at, "-o", tmp_path / "e", "--rank", 16, "--exact"))
    for found, dense in zip(said["modules"], exact["modules"], strict=True):
        delta = deltas[f"{found['name']}.weight"]
        s = torch.linalg.svdvals(delta)
        optimum = float((s[16:].square().sum() / s.square().sum()).sqrt())
        for module, folder in ((found, "a"), (dense, "e")):
            error = float((delta - product(tmp_path / folder, f"{found['name']}.weight")).norm() / delta.norm())
            assert module["relative_error"] == pytest.approx(error, rel=1e-5)
        assert optimum * (1 - 1e-6) < found["relative_error"] < 1.01 * optimum
        assert dense["relative_error"] == pytest.approx(optimum, rel=1e-5)


def test_energy_and_bytes_of_a_full_fine_tune(tmp_path: Path, peru) -> None:
    deltas = matrices(tmp_path)
    at = (tmp_path / "fine.safetensors", "-b", tmp_path / "base.safetensors", "--no-sync", "--json")
    for share in (0.5, 0.9):
        said = report(peru("svd-lora", *at, "-o", tmp_path / str(share), "--energy", share))
        ranks = {module["name"]: module["rank"] for module in said["modules"]}
        for name, delta in deltas.items():
            energies = torch.linalg.svdvals(delta).square()
            least = int((energies.cumsum(0) / energies.sum() < share).sum()) + 1
            most = (delta.numel() - 1) // sum(delta.shape)
            if least > most:  # its factors would be no smaller than the matrix: it is stored whole
                assert name.removesuffix(".weight") in said["modules_to_save"] and name.removesuffix(".weight") not in ranks
            else:
                assert ranks[name.removesuffix(".weight")] in (least, least + 1)  # values from power iterations are a little low
    whole = sum(delta.numel() * 4 for delta in deltas.values())
    errors = []
    for budget in (whole // 50, whole // 8):
        said = report(peru("svd-lora", *at, "-o", tmp_path / str(budget), "--max-bytes", budget))
        assert budget * 0.97 - 4000 < said["file_bytes"] <= budget
        errors.append(said["relative_error"])
        # one rank for all, with as many bytes, is no better
        rank = (said["file_bytes"] - 2000) // (4 * sum(sum(delta.shape) for delta in deltas.values()))
        dropped = sum(float(torch.linalg.svdvals(delta)[rank:].square().sum()) for delta in deltas.values())
        assert said["relative_error"] <= 1.005 * (dropped / sum(float(delta.square().sum()) for delta in deltas.values())) ** 0.5
    assert errors[1] < errors[0]


def test_threads_do_not_change_the_bytes(tmp_path: Path, peru) -> None:
    matrices(tmp_path)
    at = (tmp_path / "fine.safetensors", "-b", tmp_path / "base.safetensors", "--no-sync", "-o", tmp_path / "a", "--force")
    for options in (("--rank", 8), ("--energy", "60%")):
        files = set()
        for threads in (1, 3):
            peru("svd-lora", *at, *options, "--threads", threads)
            files.add((tmp_path / "a" / "adapter_model.safetensors").read_bytes())
        assert len(files) == 1


def test_a_grown_vocabulary_and_a_new_head_are_restored(tmp_path: Path, peru) -> None:
    base, _ = pair(tmp_path, bert, bare=True)
    fine = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, max_position_embeddings=32, num_labels=5))
    fine.load_state_dict({n: t for n, t in base.state_dict().items() if not n.startswith("classifier")}, strict=False)
    fine.resize_token_embeddings(67)
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    fine.save_pretrained(tmp_path / "fine")
    said = report(peru("svd-lora", tmp_path / "fine", "-b", tmp_path / "base", "-o", tmp_path / "a", "--rank", 3, "--json", "--no-sync"))
    assert said["delta_tensors"] == ["bert.embeddings.word_embeddings.weight"]  # peft would need a resized base
    assert "classifier" in said["modules_to_save"]
    peru("unpack", tmp_path / "a", "-b", tmp_path / "base", "-o", tmp_path / "full", "--no-sync")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "full")
    assert loaded.config.vocab_size == 67 and loaded.config.num_labels == 5
    for name in ("bert.embeddings.word_embeddings.weight", "classifier.weight", "bert.embeddings.LayerNorm.bias"):
        assert raw(loaded.state_dict()[name]) == raw(fine.state_dict()[name])
    with torch.no_grad():
        close = (loaded(IDS).logits - fine.eval()(IDS).logits).norm() / fine(IDS).logits.norm()
    assert float(close) < 0.5  # rank 3 of noise is no good approximation, but the head and the rest are there


def test_several_tasks_and_tensors_kept_whole(tmp_path: Path, peru) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        matrices(tmp_path / name)
    at = ("-b", tmp_path / "x" / "base.safetensors", "--no-sync", "--json", "--base-id", "org/base@1234")
    models = [f"{name}={tmp_path / name / 'fine.safetensors'}" for name in "xy"]
    said = json.loads(peru("svd-lora", *models, *at, "-o", tmp_path / "out", "--rank", 4, "--per-task", "^c"))
    assert [one["path"] for one in said] == [str(tmp_path / "out" / name) for name in "xy"]
    for one in said:
        assert "c" in one["modules_to_save"] and {module["name"] for module in one["modules"]} == {"a", "b", "d"}
        config = PeftConfig.from_pretrained(one["path"])
        assert (config.base_model_name_or_path, config.revision) == ("org/base", "1234")


def test_inspect_predicts_error_and_size_of_each_rank(tmp_path: Path, peru) -> None:
    deltas = matrices(tmp_path, torch.bfloat16)
    at = (tmp_path / "fine.safetensors", "-b", tmp_path / "base.safetensors")
    said = json.loads(peru("inspect", *at, "--json"))
    for module in said["ranks"]:
        delta = deltas[module["name"]]
        s = torch.linalg.svdvals(delta)
        assert module["effective_rank"] == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=0.01)
        if min(delta.shape) > 128:
            for rank, error in module["errors"].items():
                assert error == pytest.approx(float((s[int(rank) :].square().sum() / s.square().sum()).sqrt()), rel=0.01)
    for plan in said["rank_plans"][:3]:
        made = report(peru("svd-lora", *at, "-o", tmp_path / str(plan["rank"]), "--rank", plan["rank"], "--json", "--no-sync"))
        assert plan["bytes"] == sum(module["bytes"] for module in made["modules"])
        assert plan["error"] == pytest.approx(made["relative_error"], rel=0.01)
    text = peru("inspect", *at)
    assert "effective rank" in text and "--rank 64" in text and "--keep 10%" in text


def test_adapters_with_a_delta_beside_them_merge_like_the_fine_tune(tmp_path: Path, peru) -> None:
    pair(tmp_path, bert, bare=True)
    at = ("-b", tmp_path / "base", "--no-sync")
    peru("svd-lora", tmp_path / "fine", *at, "-o", tmp_path / "a", "--rank", 4, "--rest", "delta")
    peru("unpack", tmp_path / "a", *at, "-o", tmp_path / "full")
    results = []
    for name in ("a", "full"):
        peru(
            "merge",
            f"x={tmp_path / name}",
            *at,
            "-o",
            tmp_path / f"m-{name}",
            "-m",
            "task-arithmetic",
            "--scale",
            0.5,
            "--per-task",
            "classifier",
        )
        results.append(load_file(tmp_path / f"m-{name}" / "model.safetensors"))
        heads = load_file(tmp_path / f"m-{name}" / "heads" / "x.safetensors")
        assert sorted(heads) == ["classifier.bias", "classifier.weight"]
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(SAME_NAMES))
def test_models_listed_with_the_same_names(kind: str) -> None:
    """The table saves an import of seconds. Here it is checked against transformers."""
    from transformers.models.auto import modeling_auto as auto

    tables = (auto.MODEL_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    config = transformers.CONFIG_MAPPING[kind]().to_dict()
    for table in tables:
        if kind in table:
            assert ask_transformers(config | {"architectures": [table[kind]]}, 10_000) == ({}, None)


def test_nan_in_the_base_names_the_base(tmp_path: Path, peru) -> None:
    base, fine = {"q.weight": torch.randn(16, 16)}, {"q.weight": torch.randn(16, 16)}
    base["q.weight"][1, 2] = float("nan")
    for folder, table in (("base", base), ("fine", fine)):
        (tmp_path / folder).mkdir()
        save(table, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text("{}")
    given = ["-b", tmp_path / "base", "-o", tmp_path / "out", "--rank", 2, "--no-sync"]
    peru("svd-lora", tmp_path / "fine", *given, code=1)
    assert f"{tmp_path / 'base'}: q.weight is NaN or infinite at entry 18" in peru.stderr
    assert r"--per-task '^q\.weight$' keeps it whole" in peru.stderr


def test_too_many_matrices_for_one_file(tmp_path: Path, peru, monkeypatch) -> None:
    pair(tmp_path, llama)
    monkeypatch.setattr("peru_cli.checkpoints.header.MAX_WRITTEN_HEADER_BYTES", 4000)
    peru("svd-lora", tmp_path / "fine", "-b", tmp_path / "base", "-o", tmp_path / "a", "--rank", 4, "--no-sync", code=2)
    assert "one file cannot hold an adapter of 15 matrices" in peru.stderr and "use `peru prune`" in peru.stderr
    assert not (tmp_path / "a").exists()


def test_small_weights_that_share_a_tile(tmp_path: Path, peru) -> None:
    """Ninety weights of two shapes: each gets its best factors, and a bad entry is named as its own tensor's."""
    noise = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.{leaf}.weight": shape for i in range(45) for leaf, shape in (("down", (6, 9)), ("up", (9, 6)))}
    base = {name: torch.randn(shape, generator=noise).bfloat16() for name, shape in shapes.items()}
    fine = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=noise).bfloat16() for name, tensor in base.items()}
    fine["layers.7.up.weight"] = base["layers.7.up.weight"]
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    options = ("-b", tmp_path / "base.safetensors", "--dtype", "fp32", "--no-sync", "--json")
    for more in (("--rank", "2"), ("--rank", "2", "--exact"), ("--energy", "60%")):
        said = report(peru("svd-lora", tmp_path / "fine.safetensors", *options, *more, "-o", tmp_path / "a", "--force"))
        factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert len(said["modules"]) == 89 and said["unchanged"] == 1
        for module in said["modules"]:
            name = f"{module['name']}.weight"
            delta = (fine[name].float() - base[name].float()).double()
            a, b = (factors[f"{OUTER}{module['name']}.lora_{side}.weight"].double() for side in "AB")
            torch.testing.assert_close(b @ a, best(delta, module["rank"]), rtol=1e-5, atol=1e-6)
            assert module["relative_error"] == pytest.approx(float((delta - b @ a).norm() / delta.norm()), rel=1e-5)
    fine["layers.40.down.weight"][2, 3] = torch.inf
    save(fine, tmp_path / "fine.safetensors")
    peru("svd-lora", tmp_path / "fine.safetensors", *options[:2], "--rank", "2", "-o", tmp_path / "b", code=1)
    assert "layers.40.down.weight differs from the base by NaN or infinity at entry 21" in peru.stderr
    fine["layers.40.down.weight"] = base["layers.40.down.weight"] * 1e38
    save(fine, tmp_path / "fine.safetensors")
    peru("svd-lora", tmp_path / "fine.safetensors", *options[:2], "--dtype", "fp16", "--rank", "2", "-o", tmp_path / "b", code=1)
    assert "layers.40.down does not fit F16" in peru.stderr
