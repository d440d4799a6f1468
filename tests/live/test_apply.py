"""Artifacts applied to weights in memory: the fine-tune's bits while applied, the base's own afterwards."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

import peru_cli
from peru_cli.errors import BadFile, Mismatch
from tests.checkpoints.test_real_models import KINDS, load, logits, make_pair
from tests.conftest import FLOATS, random_pair, raw, save

Peru = Callable[..., str]


def everything(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Names, dtypes, shapes and bits."""
    return {name: (tensor.dtype, tuple(tensor.shape), raw(tensor)) for name, tensor in state.items()}


def pruned(peru: Peru, folder: Path, base: Path, fine: Path, *mode: object, name: str = "a") -> tuple[Path, Path]:
    """An artifact and the checkpoint that unpack makes of it."""
    peru("prune", fine, "-b", base, "-o", folder / f"{name}.safetensors", "--no-sync", *(mode or ("--lossless",)))
    peru("unpack", folder / f"{name}.safetensors", "-b", base, "-o", folder / f"out-{name}", "--no-sync")
    return folder / f"{name}.safetensors", folder / f"out-{name}"


@pytest.mark.parametrize("mode", [("--lossless",), ("--keep", "10%"), ("--keep", "5%", "--scope", "tensor")])
@pytest.mark.parametrize("name,dtype", [("llama-tied", "bf16"), ("llama-untied", "fp32"), ("t5", "bf16"), ("clip", "fp32")])
def test_a_module_becomes_the_unpacked_checkpoint_and_the_base_again(tmp_path: Path, peru: Peru, name: str, dtype: str, mode: Any) -> None:
    kind = KINDS[name]
    if kind.prefix:
        kind = kind._replace(base=kind.fine, prefix="")  # the head is in the base too
    base, fine, _ = make_pair(kind, tmp_path, dtype)
    artifact, out = pruned(peru, tmp_path, base, fine, *mode)
    model = load(kind, base)
    before, expected = everything(model.state_dict()), load(kind, out)
    applied = peru_cli.apply(model, peru_cli.open_artifact(artifact))
    assert everything(model.state_dict()) == everything(expected.state_dict()) != before
    assert logits(model, kind.inputs) == logits(expected, kind.inputs)
    applied.restore()
    assert everything(model.state_dict()) == before
    applied.restore()  # a second time changes nothing
    assert everything(model.state_dict()) == before


def test_a_classifier_takes_its_head_from_the_artifact(tmp_path: Path, peru: Peru) -> None:
    """The base is a bare encoder; the module is a classifier on it, with a random head at first."""
    kind = KINDS["bert"]
    base, fine, _ = make_pair(kind, tmp_path, "bf16")
    artifact, out = pruned(peru, tmp_path, base, fine, "--keep", "10%")
    model = tr.BertForSequenceClassification.from_pretrained(base, dtype="auto")
    before = everything(model.state_dict())
    with peru_cli.apply(model, peru_cli.open_artifact(artifact)):
        assert everything(model.state_dict()) == everything(load(kind, out).state_dict())
    assert everything(model.state_dict()) == before
    with pytest.raises(Mismatch, match=r"classifier.weight: BF16 \[2, 32\], the module has no such tensor"):
        peru_cli.apply(tr.BertModel.from_pretrained(base, dtype="auto"), peru_cli.open_artifact(artifact))


def test_a_head_of_another_dtype_is_refused_not_omitted(tmp_path: Path, peru: Peru) -> None:
    base, fine = random_pair("bf16")
    fine["head.weight"] = torch.randn(3, 48)
    model = Tiny({**base, "head.weight": torch.zeros(3, 48, dtype=torch.bfloat16)})
    artifact, out = pruned(peru, tmp_path, save(base, tmp_path / "b.safetensors"), save(fine, tmp_path / "f.safetensors"))
    before = everything(model.state_dict())
    with pytest.raises(Mismatch, match=r"head.weight: F32 .3, 48., the module has BF16"):
        peru_cli.apply(model, peru_cli.open_artifact(artifact))
    assert everything(model.state_dict()) == before
    state = dict(model.state_dict())
    with peru_cli.apply(state, peru_cli.open_artifact(artifact)):
        assert everything(state) == everything(load_file(out / "model.safetensors"))
    assert everything(state) == before


class Tiny(torch.nn.Module):
    """A module with given tensors; dots in names become submodules."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            at: torch.nn.Module = self
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, torch.nn.Module())
                at = at.get_submodule(part)
            if tensor.is_floating_point():
                at.register_parameter(last, torch.nn.Parameter(tensor.clone()))
            else:
                at.register_buffer(last, tensor.clone())


@pytest.mark.parametrize("dtype", list(FLOATS))
def test_odd_bits_are_applied_and_restored(tmp_path: Path, peru: Peru, dtype: str) -> None:
    base, fine = random_pair(dtype)
    odd = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), float("-inf"), 1e-45, 1.0, -1.0], dtype=torch.float64).to(FLOATS[dtype])
    base["odd"], fine["odd"] = odd, odd.flip(0)
    fine["position_ids"] = fine["position_ids"] + 1
    artifact, _ = pruned(peru, tmp_path, save(base, tmp_path / "b.safetensors"), save(fine, tmp_path / "f.safetensors"))
    model = Tiny(base)
    with peru_cli.apply(model, peru_cli.open_artifact(artifact)):
        assert everything(model.state_dict()) == everything(fine)
    assert everything(model.state_dict()) == everything(base)


@pytest.mark.parametrize("pair", [("fp32", "bf16"), ("bf16", "fp32"), ("fp64", "fp16")])
def test_a_state_dict_takes_other_dtypes_shapes_and_heads(tmp_path: Path, peru: Peru, pair: tuple[str, str]) -> None:
    base_dtype, dtype = pair
    base, fine = random_pair(dtype, base_dtype=base_dtype)
    noise = torch.Generator().manual_seed(4)
    base["words"] = torch.randn(4096, 6, generator=noise).to(FLOATS[base_dtype])
    fine["words"] = torch.cat((base["words"].double() + 0.25, torch.randn(9, 6, generator=noise).double())).to(FLOATS[dtype])
    fine["head.weight"] = torch.randn(3, 48, generator=noise).to(FLOATS[dtype])
    artifact, out = pruned(peru, tmp_path, save(base, tmp_path / "b.safetensors"), save(fine, tmp_path / "f.safetensors"), "--keep", "30%")
    assert "more rows than the base, new rows stored whole: words" in _plan(peru, tmp_path)
    state = load_file(tmp_path / "b.safetensors")
    state["layers.0.mlp.weight"] = state["layers.0.mlp.weight"].T.contiguous().T  # equal values, other strides
    own = dict(state)
    applied = peru_cli.apply(state, peru_cli.open_artifact(artifact))
    assert everything(state) == everything(load_file(out / "model.safetensors"))
    applied.restore()
    assert everything(state) == everything(base)
    assert all(state[name] is own[name] for name in own)
    with pytest.raises(Mismatch, match="another shape or dtype"):
        peru_cli.apply(Tiny(base | {"head.weight": fine["head.weight"]}), peru_cli.open_artifact(artifact))


def _plan(peru: Peru, folder: Path) -> str:
    peru("prune", folder / "f.safetensors", "-b", folder / "b.safetensors", "-o", folder / "n.safetensors", "--keep", "30%", "--dry-run")
    return peru.stderr  # type: ignore[attr-defined, no-any-return]


def test_names_of_the_fine_tune_and_of_the_base_both_work(tmp_path: Path, peru: Peru) -> None:
    base, fine = random_pair("bf16")
    fine = {f"bert.{name}": tensor for name, tensor in fine.items()}
    artifact, _ = pruned(peru, tmp_path, save(base, tmp_path / "b.safetensors"), save(fine, tmp_path / "f.safetensors"))
    for prefix in ("bert.", "", "net.bert."):
        state = {prefix + name: tensor.clone() for name, tensor in base.items()}
        peru_cli.apply(state, peru_cli.open_artifact(artifact))
        assert everything(state) == everything({prefix + name.removeprefix("bert."): tensor for name, tensor in fine.items()})


def test_swapping_tasks_and_forgetting_models(tmp_path: Path, peru: Peru) -> None:
    base, first = random_pair("fp32", seed=1)
    second = {n: t.flip(0) if t.is_floating_point() and t.ndim else t for n, t in first.items()}
    at = save(base, tmp_path / "b.safetensors")
    a, out_a = pruned(peru, tmp_path, at, save(first, tmp_path / "f1.safetensors"), "--keep", "20%", name="one")
    b, out_b = pruned(peru, tmp_path, at, save(second, tmp_path / "f2.safetensors"), "--keep", "20%", name="two")
    model = Tiny(base)
    earlier = peru_cli.apply(model, peru_cli.open_artifact(a))
    assert everything(model.state_dict()) == everything(load_file(out_a / "model.safetensors"))
    applied = peru_cli.apply(model, peru_cli.open_artifact(b))
    assert everything(model.state_dict()) == everything(load_file(out_b / "model.safetensors"))
    earlier.restore()  # it was taken off already and must not disturb b
    assert everything(model.state_dict()) == everything(load_file(out_b / "model.safetensors"))
    applied.restore()
    assert everything(model.state_dict()) == everything(base)
    peru_cli.apply(model, peru_cli.open_artifact(a))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None  # an applied artifact does not keep the model in memory


@pytest.mark.parametrize("as_module", [True, False])
def test_a_wrong_base_is_refused_and_nothing_changed(tmp_path: Path, peru: Peru, as_module: bool) -> None:
    base, fine = random_pair("bf16")
    artifact, _ = pruned(peru, tmp_path, save(base, tmp_path / "b.safetensors"), save(fine, tmp_path / "f.safetensors"))
    shorter = {**base, "layers.10.mlp.weight": base["layers.10.mlp.weight"][:32]}
    lacking = {n: t for n, t in base.items() if n != "layers.0.mlp.weight"}
    off = {**base, "layers.1.mlp.weight": base["layers.1.mlp.weight"].clone()}
    off["layers.1.mlp.weight"].view(-1)[7777] += 1
    wider = {n: t.float() if t.is_floating_point() else t for n, t in base.items()}
    for wrong, name in ((shorter, "layers.10.mlp.weight"), (lacking, "layers.0.mlp.weight"), (off, "layers.1.mlp.weight"), (wider, "BF16")):
        target: Any = Tiny(wrong) if as_module else dict(wrong)
        before = everything(wrong)
        with pytest.raises(Mismatch, match=name):
            peru_cli.apply(target, peru_cli.open_artifact(artifact))
        assert everything(target.state_dict() if as_module else target) == before
    unchecked = dict(off)
    with peru_cli.apply(unchecked, peru_cli.open_artifact(artifact), verify=False):
        assert everything(unchecked)["embed.weight"] == everything(fine)["embed.weight"]
    assert everything(unchecked) == everything(off)


@pytest.mark.parametrize("as_module", [True, False])
def test_a_damaged_artifact_leaves_the_model_unchanged(tmp_path: Path, peru: Peru, as_module: bool) -> None:
    """Blocks and whole tensors are checked when they are reached: the first ones are on the model by then."""
    noise = torch.Generator().manual_seed(2)
    base = {f"t{i}": torch.randn(200_000, generator=noise).bfloat16() for i in range(3)} | {"z.head": torch.zeros(40, dtype=torch.int64)}
    fine = {n: t * 2 if t.is_floating_point() else t + 1 for n, t in base.items()}
    artifact, _ = pruned(peru, tmp_path, save(base, tmp_path / "b.safetensors"), save(fine, tmp_path / "f.safetensors"))
    data = bytearray(artifact.read_bytes())
    opened = peru_cli.open_artifact(artifact)
    assert len(opened.index.blocks) > 3
    refused = 0
    for at in range(len(data) // 50, len(data), len(data) // 25):
        hurt = bytes(data[:at]) + bytes([data[at] ^ 16]) + bytes(data[at + 1 :])
        (tmp_path / "hurt.safetensors").write_bytes(hurt)
        target: Any = Tiny(base) if as_module else dict(base)
        with pytest.raises(BadFile):
            peru_cli.apply(target, peru_cli.open_artifact(tmp_path / "hurt.safetensors"))
        refused += 1
        assert everything(target.state_dict() if as_module else target) == everything(base)
    assert refused >= 25


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_tied_weights_that_a_checkpoint_holds_twice_change_once(tmp_path: Path, peru: Peru, name: str) -> None:
    """torch.save of a state dict writes tied weights under both names; the delta must not be added twice."""
    kind = KINDS[name]._replace(base=KINDS[name].fine, prefix="")
    base, fine, expected = make_pair(kind, tmp_path, "bf16")
    for folder, model in ((base, kind.fine.from_pretrained(base, dtype="auto")), (fine, expected)):
        torch.save(model.state_dict(), folder / "both.bin")
    artifact, _ = pruned(peru, tmp_path, base / "both.bin", fine / "both.bin")
    model = load(kind, base)
    before = everything(model.state_dict())
    with peru_cli.apply(model, peru_cli.open_artifact(artifact)):
        assert everything(model.state_dict()) == everything(expected.state_dict())
        assert logits(model, "text") == logits(expected, "text")
    assert everything(model.state_dict()) == before
    state = model.state_dict()  # the same memory under two names
    with peru_cli.apply(state, peru_cli.open_artifact(artifact)):
        assert everything(model.state_dict()) == everything(expected.state_dict())
    assert everything(model.state_dict()) == before


def test_an_untied_fine_tune_of_a_tied_base(tmp_path: Path, peru: Peru) -> None:
    base, _, _ = make_pair(KINDS["llama-tied"], tmp_path / "tied", "bf16")
    tied = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tied
    untied = {n: t + 1 for n, t in tied.items()} | {"lm_head.weight": tied["model.embed_tokens.weight"] * 3}
    fine = tmp_path / "fine"
    tr.LlamaConfig.from_pretrained(base, tie_word_embeddings=False).save_pretrained(fine)
    save_file(untied, fine / "model.safetensors", metadata={"format": "pt"})
    artifact, out = pruned(peru, tmp_path, base, fine)
    kind = KINDS["llama-untied"]
    assert everything(load(kind, out).state_dict()) == everything(untied)  # unpack returns it whole
    model = load(KINDS["llama-tied"], base)
    before = everything(model.state_dict())
    with pytest.raises(Mismatch, match=r"lm_head.weight and model.embed_tokens.weight are tied in this model"):
        peru_cli.apply(model, peru_cli.open_artifact(artifact))
    assert everything(model.state_dict()) == before
    model = tr.LlamaForCausalLM.from_pretrained(base, tie_word_embeddings=False, dtype="auto")  # head missing: random
    with peru_cli.apply(model, peru_cli.open_artifact(artifact)):
        assert logits(model, "text") == logits(load(kind, out), "text")


def test_a_tied_vocabulary_grows_under_both_names(tmp_path: Path, peru: Peru) -> None:
    kind = KINDS["llama-tied"]
    base, _, model = make_pair(kind, tmp_path, "bf16")
    model.resize_token_embeddings(101, mean_resizing=False)
    model.save_pretrained(tmp_path / "grown")
    artifact, out = pruned(peru, tmp_path, base, tmp_path / "grown")
    assert everything(load(kind, out).state_dict()) == everything(model.state_dict())
    state = dict(load(kind, base).state_dict())
    before = everything(state)
    applied = peru_cli.apply(state, peru_cli.open_artifact(artifact))
    assert everything(state) == everything(model.state_dict())
    model.load_state_dict(state)
    applied.restore()
    assert everything(state) == before


def test_unchanged_tensors_that_the_model_lacks_do_not_matter(tmp_path: Path, peru: Peru) -> None:
    base, fine = random_pair("bf16")
    artifact, _ = pruned(peru, tmp_path, save(base, tmp_path / "b.safetensors"), save(fine, tmp_path / "f.safetensors"))
    model = Tiny({n: t for n, t in base.items() if n != "position_ids"})
    model.register_buffer("position_ids", torch.zeros(5), persistent=False)  # current models compute their own
    with peru_cli.apply(model, peru_cli.open_artifact(artifact)):
        assert everything(model.state_dict()) == everything({n: t for n, t in fine.items() if n != "position_ids"})


def test_layer_norms_of_old_files_have_other_names_in_memory(tmp_path: Path, peru: Peru) -> None:
    """bert-base-uncased says gamma and beta; transformers loads them as weight and bias, and saves them under the old names."""
    kind = KINDS["bert"]
    base, _, _ = make_pair(kind, tmp_path, "bf16")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {next((n.replace(a, b) for a, b in old.items() if a in n), n): t for n, t in load_file(base / "model.safetensors").items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    tuned = kind.fine.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.5)
    tuned.save_pretrained(tmp_path / "tuned")
    assert "bert.embeddings.LayerNorm.gamma" in load_file(tmp_path / "tuned" / "model.safetensors")
    artifact, out = pruned(peru, tmp_path, base, tmp_path / "tuned")
    assert everything(load(kind, out).state_dict()) == everything(tuned.state_dict())
    model = kind.fine.from_pretrained(base, dtype="auto")
    before = everything(model.state_dict())
    with peru_cli.apply(model, peru_cli.open_artifact(artifact)):
        assert everything(model.state_dict()) == everything(tuned.state_dict())
    assert everything(model.state_dict()) == before


def test_fused_experts_are_refused_with_nothing_changed(tmp_path: Path, peru: Peru) -> None:
    """transformers 5 fuses Mixtral's experts in memory and splits them in files: names differ, so unpack is needed."""
    kind = KINDS["mixtral"]
    base, fine, _ = make_pair(kind, tmp_path, "bf16")
    artifact, _ = pruned(peru, tmp_path, base, fine, "--keep", "10%")
    model = load(kind, base)
    before = everything(model.state_dict())
    with pytest.raises(Mismatch, match=r"experts.0.w1.weight: the model has no such tensor"):
        peru_cli.apply(model, peru_cli.open_artifact(artifact))
    assert everything(model.state_dict()) == before


def test_importing_peru_cli_does_not_import_torch() -> None:
    code = "import sys, peru_cli; assert not {'torch', 'numpy'} & set(sys.modules); peru_cli.apply; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="nothing"):
        peru_cli.nothing  # noqa: B018


def test_names_that_transformers_renames_while_loading(tmp_path: Path, peru) -> None:
    """A ViT's checkpoint says `encoder.layer.0.attention...`, the module in memory does not."""
    from transformers import AutoModelForImageClassification

    from peru_cli import demo

    task = tmp_path / "task"
    shutil.copytree(demo.fine_tune("digits"), task)
    tensors = load_file(task / "model.safetensors")
    tensors.update({demo.PREFIX + name: tensor for name, tensor in load_file(demo.BASE / "model.safetensors").items()})
    save(tensors, task / "model.safetensors")
    model = AutoModelForImageClassification.from_pretrained(task, dtype="auto").eval()
    peru("prune", demo.fine_tune("digits"), "-b", demo.BASE, "-o", tmp_path / "a.safetensors", "--keep", "10%", "--no-sync")
    peru("unpack", tmp_path / "a.safetensors", "-b", demo.BASE, "-o", tmp_path / "r", "--no-sync")
    pixels = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        before = model(pixels).logits
        with peru_cli.apply(model, peru_cli.open_artifact(tmp_path / "a.safetensors")):
            applied = model(pixels).logits
        wanted = AutoModelForImageClassification.from_pretrained(tmp_path / "r", dtype="auto").eval()(pixels).logits
        assert torch.equal(applied, wanted) and not torch.equal(applied, before)
        assert torch.equal(model(pixels).logits, before)
