"""Inputs of a merge: adapters, artifacts, heads; and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peru_cli import demo
from tests.conftest import raw, save


class Small(nn.Module):
    """One of each kind of layer that plain LoRA supports."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.query = nn.Linear(24, 24)
        self.up = nn.Linear(24, 40, bias=False)
        self.conv = nn.Conv2d(3, 8, 3)
        self.score = nn.Linear(24, 4)


class Transposed(nn.Module):
    """GPT-2's layers, whose weights are stored transposed; square and not."""

    def __init__(self) -> None:
        super().__init__()
        self.square = Conv1D(24, 24)
        self.wide = Conv1D(72, 24)


def adapter(folder: Path, model: nn.Module, **settings: object) -> dict[str, torch.Tensor]:
    """Save a random adapter of the model with peft. Returns the result of peft's own merge_and_unload."""
    wrapped = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    return {name: tensor.detach().clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()}


LORAS = [
    ({"target_modules": ["query", "up", "embed", "conv"], "r": 4, "lora_alpha": 6}, Small),
    ({"target_modules": ["query", "up"], "r": 8, "lora_alpha": 3, "use_rslora": True}, Small),
    ({"target_modules": ["query", "up", "embed"], "r": 4, "rank_pattern": {"up": 2}, "alpha_pattern": {"query": 9}}, Small),
    ({"target_modules": ["query"], "r": 4, "modules_to_save": ["score"]}, Small),
    ({"target_modules": ["square", "wide"], "r": 4, "lora_alpha": 2, "fan_in_fan_out": True}, Transposed),
]


@pytest.mark.parametrize("number", range(len(LORAS)))
def test_adapters_equal_pefts_own_merge(tmp_path: Path, peru, number: int) -> None:
    settings, kind = LORAS[number]
    torch.manual_seed(number)
    model = kind()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(base, tmp_path / "base.safetensors")
    expected = adapter(tmp_path / "lora", model, **settings)
    peru("merge", f"a={tmp_path / 'lora'}", "-b", tmp_path / "base.safetensors", "-o", tmp_path / "m.safetensors", "-m",
         "task-arithmetic", "--scale", 1, "--no-sync")  # fmt: skip
    got = load_file(tmp_path / "m.safetensors")
    assert sorted(got) == sorted(base)
    for name in base:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=2e-6)
    assert any(not torch.equal(base[name], got[name]) for name in base)


def test_adapter_bytes_do_not_depend_on_tiles(tmp_path: Path, peru) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(300, 700), "b": nn.Embedding(900, 70)})
    save({n: t.clone().bfloat16() for n, t in model.state_dict().items()}, tmp_path / "base.safetensors")
    adapter(tmp_path / "lora", model, target_modules=["a", "b"], r=8)
    results = set()
    for options in ((), ("--tile-entries", 16384, "--threads", 1), ("--tile-entries", 49152, "--threads", 3)):
        peru("merge", f"a={tmp_path / 'lora'}", "-b", tmp_path / "base.safetensors", "-o", tmp_path / "m.safetensors", "-m",
             "ties", "--no-sync", "--force", *options)  # fmt: skip
        results.add((tmp_path / "m.safetensors").read_bytes())
    assert len(results) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "XLORA"}, "of type XLORA"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path: Path, peru, change: dict[str, object], message: str) -> None:
    model = Small()
    save(dict(model.state_dict()), tmp_path / "base.safetensors")
    adapter(tmp_path / "lora", model, target_modules=["query"], r=2)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | change))
    peru("merge", f"a={tmp_path / 'lora'}", "-b", tmp_path / "base.safetensors", "-o", tmp_path / "m", "-m", "ties", code=2)
    assert message in peru.stderr


def test_artifacts_and_adapters_and_models_mix(tmp_path: Path, peru) -> None:
    torch.manual_seed(1)
    model = Small()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    full = {name: tensor + torch.randn(tensor.shape) * 0.1 for name, tensor in base.items()}
    save(base, tmp_path / "base.safetensors")
    save(full, tmp_path / "full.safetensors")
    save({n: t * 1.5 for n, t in full.items()}, tmp_path / "other.safetensors")
    merged = adapter(tmp_path / "lora", model, target_modules=["query", "conv"], r=4)
    at = ["-b", tmp_path / "base.safetensors", "--no-sync"]
    peru("prune", tmp_path / "other.safetensors", *at, "-o", tmp_path / "o.safetensors", "--keep", "30%")
    peru("unpack", tmp_path / "o.safetensors", *at, "-o", tmp_path / "restored.safetensors")
    save(merged, tmp_path / "merged.safetensors")
    results = []
    for out, a, b in (("x", "lora", "o.safetensors"), ("y", "merged.safetensors", "restored.safetensors")):
        models = [f"a={tmp_path / a}", f"b={tmp_path / b}", f"c={tmp_path / 'full.safetensors'}"]
        peru("merge", *models, *at, "-o", tmp_path / f"{out}.safetensors", "-m", "task-arithmetic")
        results.append(load_file(tmp_path / f"{out}.safetensors"))
    for name in base:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)
    # the digests show an artifact of another base, before there is any output
    save({n: t * 2 for n, t in base.items()}, tmp_path / "wrong.safetensors")
    peru("merge", f"a={tmp_path / 'o.safetensors'}", f"c={tmp_path / 'full.safetensors'}", "-b", tmp_path / "wrong.safetensors",
         "-o", tmp_path / "z.safetensors", "-m", "ties", code=1)  # fmt: skip
    assert "is not the base" in peru.stderr and not (tmp_path / "z.safetensors").exists()


def encoder(seed: int, classes: int | None, prefix: str = "enc.") -> dict[str, torch.Tensor]:
    """A bare encoder, or a classifier on it."""
    noise = torch.Generator().manual_seed(0)
    tensors = {f"{i}.weight": torch.randn(40, 40, generator=noise) for i in range(4)}
    if classes is None:
        return tensors
    noise.manual_seed(seed)
    tensors = {prefix + n: t + torch.randn(t.shape, generator=noise) * 0.01 for n, t in tensors.items()}
    return tensors | {"head.weight": torch.randn(classes, 40, generator=noise), "head.bias": torch.randn(classes, generator=noise)}


def test_heads_are_kept_and_found_again(tmp_path: Path, peru) -> None:
    save(encoder(0, None), tmp_path / "base.safetensors")
    fine = {task: encoder(i, classes) for i, (task, classes) in enumerate((("a", 3), ("b", 5)), 1)}
    models = [f"{task}={save(table, tmp_path / f'{task}.safetensors')}" for task, table in fine.items()]
    peru("merge", *models, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "m", "-m", "task-arithmetic", "--no-sync")
    assert sorted(load_file(tmp_path / "m" / "model.safetensors")) == sorted(encoder(0, None))
    for task, table in fine.items():
        heads = load_file(tmp_path / "m" / "heads" / f"{task}.safetensors")
        assert sorted(heads) == ["head.bias", "head.weight"] and all(raw(heads[n]) == raw(table[n]) for n in heads)
    peru("merge", *models, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "m.safetensors", "-m", "ties", code=2)
    assert "cannot hold per-task tensors" in peru.stderr
    # PERU-FFT: both in one command equals merge, then prune; unpack returns the heads
    at = ["-b", tmp_path / "base.safetensors", "--no-sync"]
    peru("merge", *models, *at, "-o", tmp_path / "fft", "-m", "task-arithmetic", "--compress", "10%")
    peru("prune", models[0], "-b", tmp_path / "m", "-o", tmp_path / "pa.safetensors", "--keep", "10%", "--no-sync")
    assert (tmp_path / "fft" / "a.safetensors").read_bytes() == (tmp_path / "pa.safetensors").read_bytes()
    merged = (tmp_path / "fft" / "merged" / "model.safetensors").read_bytes()
    assert merged == (tmp_path / "m" / "model.safetensors").read_bytes()
    assert sorted(p.name for p in (tmp_path / "fft").iterdir()) == ["a.safetensors", "b.safetensors", "merged"]
    peru("unpack", tmp_path / "fft" / "b.safetensors", "-b", tmp_path / "fft" / "merged", "-o", tmp_path / "b2.safetensors", "--no-sync")
    restored = load_file(tmp_path / "b2.safetensors")
    assert all(raw(restored[n]) == raw(fine["b"][n]) for n in ("head.weight", "head.bias"))


def test_heads_that_the_base_has_too(tmp_path: Path, peru) -> None:
    """Three classes in one task as in the base, five in the other: no head is merged, the base's is copied."""
    base = encoder(9, 3)
    save(base, tmp_path / "base.safetensors")
    fine = {"a": encoder(1, 3), "b": encoder(2, 5)}
    models = [f"{task}={save(table, tmp_path / f'{task}.safetensors')}" for task, table in fine.items()]
    peru("merge", *models, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "m", "-m", "ties", "--no-sync")
    got = load_file(tmp_path / "m" / "model.safetensors")
    assert raw(got["head.weight"]) == raw(base["head.weight"])
    assert raw(load_file(tmp_path / "m" / "heads" / "a.safetensors")["head.bias"]) == raw(fine["a"]["head.bias"])


def test_without_a_base_heads_need_an_option(tmp_path: Path, peru) -> None:
    models = [f"{task}={save(encoder(i, c), tmp_path / f'{task}.safetensors')}" for i, (task, c) in enumerate((("a", 3), ("b", 5)), 1)]
    peru("merge", *models, "-o", tmp_path / "m", "-m", "linear", code=1)
    assert "head.weight: [5, 40] in b, [3, 40]" in peru.stderr and "--per-task" in peru.stderr
    peru("merge", *models, "-o", tmp_path / "m", "-m", "linear", "--per-task", "^head", "--no-sync")
    assert sorted(load_file(tmp_path / "m" / "model.safetensors")) == [f"enc.{i}.weight" for i in range(4)]
    same = [f"{name}={demo.fine_tune(name)}" for name in demo.tasks()[:2]]
    peru("merge", *same, "-o", tmp_path / "n", "-m", "linear", code=1)
    assert "--merge-heads" in peru.stderr
    peru("merge", *same, "-o", tmp_path / "n", "-m", "linear", "--merge-heads", "--no-sync")
    assert "classifier.weight" in load_file(tmp_path / "n" / "model.safetensors")


def test_transformers_loads_the_merge(tmp_path: Path, peru) -> None:
    from transformers import AutoModel

    models = [f"{name}={demo.fine_tune(name)}" for name in demo.tasks()]
    peru("merge", *models, "-b", demo.BASE, "-o", tmp_path / "m", "-m", "ties", "--max-shard-size", "300kB", "--no-sync", "--dtype", "fp32")
    loaded, info = AutoModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    _, of_base = AutoModel.from_pretrained(demo.BASE, output_loading_info=True)
    assert info["missing_keys"] == of_base["missing_keys"] and not info["unexpected_keys"] and loaded.dtype == torch.float32
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1


def problem(folder: Path, peru, *options: object, code: int, base: bool = True, models: list[str] | None = None) -> str:
    """The error of a merge that must leave nothing behind."""
    before = sorted(p.name for p in folder.iterdir())
    given = models or [f"a={folder / 'a.safetensors'}", f"b={folder / 'b.safetensors'}"]
    at = ["-b", folder / "base.safetensors"] if base else []
    peru("merge", *given, *at, "-o", folder / "out.safetensors", *options, code=code)
    assert sorted(p.name for p in folder.iterdir()) == before
    return str(peru.stderr)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    for i, name in enumerate(("base", "a", "b")):
        table = encoder(i, 3, prefix="")
        save({n: t for n, t in table.items() if not n.startswith("head")}, tmp_path / f"{name}.safetensors")
    return tmp_path


def test_unknown_options_and_words(pair: Path, peru) -> None:
    assert "its options are --weight, --normalize" in problem(pair, peru, "-m", "linear", "--keep", "20%", "--seed", 1, code=2)
    assert "slerp does not know --weight" in problem(pair, peru, "-m", "slerp", "--weight", "a=1", code=2)
    assert "did you mean ties?" in problem(pair, peru, "-m", "tie", code=2)
    assert "is not mean or sum" in problem(pair, peru, "-m", "ties", "--reduce", "max", code=2)
    assert "no --reduce sum" in problem(pair, peru, "-m", "ties", "--variant", "peft", "--reduce", "sum", code=2)
    assert "the tasks are a, b" in problem(pair, peru, "-m", "ties", "--weight", "c=1", code=2)
    assert "not a number" in problem(pair, peru, "-m", "ties", "--weight", "a=nan", code=2)
    assert "did you mean --keep 20%" in problem(pair, peru, "-m", "ties", "--keep", "20", code=2)
    assert "keeps nothing" in problem(pair, peru, "-m", "ties", "--keep", "0.0000001", code=2)
    assert "sum to 0" in problem(pair, peru, "-m", "linear", "--weight", "b=-1", code=2)
    assert "add --base" in problem(pair, peru, "-m", "ties", base=False, code=2)
    assert "matches no tensor" in problem(pair, peru, "-m", "ties", "--per-task", "nothing", code=2)


def test_wrong_models_are_refused(pair: Path, peru) -> None:
    a, b, base = (str(pair / f"{name}.safetensors") for name in ("a", "b", "base"))
    (pair / "link.safetensors").symlink_to(a)
    assert "the same model" in problem(pair, peru, "-m", "ties", code=1, models=[f"a={a}", f"b={b}", f"c={pair / 'link.safetensors'}"])
    assert "is the base itself" in problem(pair, peru, "-m", "ties", code=1, models=[f"a={a}", f"b={base}"])
    assert "takes at least 2 models, not 1" in problem(pair, peru, "-m", "linear", code=2, models=[f"a={a}"])
    assert "takes 2 models, not 3" in problem(pair, peru, "-m", "slerp", code=2, models=[f"a={a}", f"b={b}", f"c={base}"])
    assert "stands for both" in problem(pair, peru, "-m", "ties", code=2, models=[f"a={a}", f"A={b}"])


def test_other_shapes_vocabularies_and_dtypes_are_reported_together(tmp_path: Path, peru) -> None:
    shapes = {"embed.weight": (5000, 8), "1.weight": (90, 30), "2.weight": (90, 30), "3.weight": (90, 30)}
    save({n: torch.zeros(s) for n, s in shapes.items()}, tmp_path / "base.safetensors")
    save({n: torch.ones(s) for n, s in shapes.items()}, tmp_path / "a.safetensors")
    odd = {n: torch.ones(s) for n, s in shapes.items()}
    odd["embed.weight"] = torch.ones(5002, 8)
    odd["1.weight"] = torch.ones(90, 31)
    odd["3.weight"] = odd["3.weight"].bfloat16()
    del odd["2.weight"]
    save(odd, tmp_path / "b.safetensors")
    said = problem(tmp_path, peru, "-m", "ties", code=1)
    assert "vocabularies differ: embed.weight has b 5,002 rows" in said
    assert "1.weight: [90, 31] in b, [90, 30]" in said and "2.weight: in a, not in b" in said
    assert "dtypes differ: a F32, b BF16 in 1 tensor, such as 3.weight" in said
    # completely different models
    save({f"{i}.weight": torch.ones(7, 7) for i in range(9)}, tmp_path / "b.safetensors")
    assert "share only" in problem(tmp_path, peru, "-m", "ties", code=1)


@pytest.mark.parametrize("method", ["task-arithmetic", "linear", "ties", "dare", "dare-ties", "breadcrumbs", "consensus", "slerp"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_one_input_is_never_merged(pair: Path, peru, method: str, value: float) -> None:
    broken = load_file(pair / "b.safetensors")
    broken["2.weight"][3, 4] = value
    save_file(broken, pair / "b.safetensors")
    said = problem(pair, peru, "-m", method, code=1)
    assert "b.safetensors: '2.weight' is NaN or infinite at entry 124" in said


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "dare"])
def test_nan_in_the_base_names_the_base(pair: Path, peru, method: str) -> None:
    broken = load_file(pair / "base.safetensors")
    broken["2.weight"][3, 4] = float("nan")
    save_file(broken, pair / "base.safetensors")
    said = problem(pair, peru, "-m", method, code=1)
    assert "base.safetensors: '2.weight' is NaN or infinite at entry 124" in said


@pytest.mark.parametrize("method", ["task-arithmetic", "linear", "ties", "dare", "breadcrumbs", "consensus"])
def test_infinities_that_all_models_share_stay(pair: Path, peru, method: str) -> None:
    for name in ("base", "a", "b"):
        table = load_file(pair / f"{name}.safetensors")
        table["1.weight"][0, :3] = torch.tensor([float("-inf"), float("inf"), float("nan")])
        save_file(table, pair / f"{name}.safetensors")
    at = ["-b", pair / "base.safetensors", "-o", pair / "m.safetensors", "--no-sync"]
    peru("merge", f"a={pair / 'a.safetensors'}", f"b={pair / 'b.safetensors'}", *at, "-m", method)
    assert raw(load_file(pair / "m.safetensors")["1.weight"][0, :3]) == raw(load_file(pair / "base.safetensors")["1.weight"][0, :3])


def test_overflow_is_an_error(pair: Path, peru) -> None:
    said = problem(pair, peru, "-m", "task-arithmetic", "--scale", "1e9", "--dtype", "fp16", code=1)
    assert "does not fit F16" in said and "--dtype bf16 or fp32" in said


def test_different_integers_are_refused(pair: Path, peru) -> None:
    for i, name in enumerate(("base", "a", "b")):
        table = load_file(pair / f"{name}.safetensors")
        save_file(table | {"ids": torch.arange(5), "steps": torch.tensor(i)}, pair / f"{name}.safetensors")
    at = ["-b", pair / "base.safetensors", "--no-sync", "-m", "ties"]
    peru("merge", f"a={pair / 'a.safetensors'}", f"b={pair / 'b.safetensors'}", *at, "-o", pair / "m.safetensors")
    assert [peru.stderr.count(f"steps differs in {task}") for task in "ab"] == [1, 1]
    assert int(load_file(pair / "m.safetensors")["steps"]) == 0
    save_file(load_file(pair / "b.safetensors") | {"ids": torch.ones(5, dtype=torch.int64)}, pair / "b.safetensors")
    assert "ids: I64, differs in b" in problem(pair, peru, "-m", "ties", code=1)


def test_dry_run_writes_nothing(pair: Path, peru) -> None:
    at = ["-b", pair / "base.safetensors", "-o", pair / "m"]
    printed = peru("merge", f"a={pair / 'a.safetensors'}", f"b={pair / 'b.safetensors'}", *at, "-m", "ties", "--dry-run", "--json")
    assert json.loads(printed)["options"]["variant"] == "authors"
    assert not (pair / "m").exists()


def test_mixed_dtypes_merge_when_asked_to(pair: Path, peru) -> None:
    """The base is cast to a fine-tune's dtype before it is subtracted, so unchanged entries stay unchanged."""
    base, a, b = (load_file(pair / f"{name}.safetensors") for name in ("base", "a", "b"))
    b = {name: (base[name] if name == "1.weight" else tensor).bfloat16() for name, tensor in b.items()}
    save_file(b, pair / "b.safetensors")
    models = [f"a={pair / 'a.safetensors'}", f"b={pair / 'b.safetensors'}", "-b", pair / "base.safetensors"]
    peru("merge", *models, "-o", pair / "m.safetensors", "-m", "task-arithmetic", "--scale", 1, "--dtype", "fp32", "--no-sync")
    got = load_file(pair / "m.safetensors")
    for name, tensor in base.items():
        change = (a[name] - tensor) + (b[name].float() - tensor.bfloat16().float())
        assert raw(got[name]) == raw(tensor + change)
    assert raw(got["1.weight"]) == raw(base["1.weight"] + (a["1.weight"] - base["1.weight"]))


def test_a_shape_error_names_every_problem_before_anything_is_read(pair: Path, peru, monkeypatch) -> None:
    from peru_cli.checkpoints.local.checkpoint import SafetensorsCheckpoint

    save({n: t for n, t in load_file(pair / "b.safetensors").items() if n != "0.weight"}, pair / "b.safetensors")

    def fail(*args: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsCheckpoint, "read_into", fail)
    assert "0.weight: in a, not in b" in problem(pair, peru, "-m", "ties", code=1)


def named(folder: Path, labels: list[str]) -> Path:
    """A classifier's folder; its head has a row with its own number for each class."""
    folder.mkdir()
    torch.manual_seed(len(list(folder.parent.iterdir())))
    save({"encoder.weight": torch.randn(4, 4), "classifier.weight": torch.randn(3, 4)}, folder / "model.safetensors")
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {str(i): name for i, name in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_heads_with_the_same_classes_in_another_order_are_not_averaged(tmp_path: Path, peru) -> None:
    names = ["negative", "neutral", "positive"]
    base, a, b = named(tmp_path / "base", names), named(tmp_path / "a", names), named(tmp_path / "b", names[::-1])
    given = [f"a={a}", f"b={b}", "--no-sync"]
    for options in (["-m", "linear", "--merge-heads"], ["-m", "task-arithmetic", "-b", base]):
        peru("merge", *given, *options, "-o", tmp_path / "m", code=1)
        assert "classes are in different orders: negative, neutral, positive in" in peru.stderr and "--per-task" in peru.stderr
    peru("merge", *given, "-m", "task-arithmetic", "-b", base, "--per-task", "^classifier", "-o", tmp_path / "m")
    assert raw(load_file(tmp_path / "m" / "heads" / "b.safetensors")["classifier.weight"]) == raw(
        load_file(b / "model.safetensors")["classifier.weight"]
    )
