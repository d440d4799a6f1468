"""Models built in memory compute the same as transformers does from the folder, for each kind of artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

from peru_cli import demo
from peru_cli.errors import PeruError
from peru_cli.inference import inputs as evaluation_inputs
from peru_cli.inference.data import Examples
from peru_cli.inference.eval_model import Base, open_eval_model
from peru_cli.inference.inputs import IGNORED, class_logits
from peru_cli.inference.models import CAUSAL, SEQ2SEQ
from peru_cli.inference.prepare import Loaded, Settings, load, prepare
from peru_cli.inference.reading import read_examples
from tests.support import models


def texts(count: int = 41, pairs: bool = False, labels: int | None = 3) -> Examples:
    found = Examples("memory", texts=models.sentences(count), pairs=models.sentences(count, seed=9, most=3) if pairs else None)
    found.labels = [i % labels for i in range(count)] if labels else None
    return found


def logits(loaded: Loaded, batch_size: int = 7) -> np.ndarray[Any, Any]:
    return class_logits(loaded.model, loaded.inputs, batch_size)


def plain_loop(folder: Path, examples: Examples, tokenizer: Path | None = None) -> np.ndarray[Any, Any]:
    """The obvious way: one example after the other."""
    model = tr.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    read = tr.AutoTokenizer.from_pretrained(tokenizer or folder)
    rows = []
    with torch.no_grad():
        for i, text in enumerate(examples.texts or []):
            second = examples.pairs[i] if examples.pairs else None
            rows.append(model(**read(text, second, truncation=True, max_length=24, return_tensors="pt")).logits[0].numpy())
    return np.stack(rows)


# Batches pad: sums over keys then contain zeros and may be split differently, so float32 differs in its last bits.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("pairs", [False, True])
def test_logits_equal_those_of_a_plain_loop(tmp_path: Path, pairs: bool) -> None:
    _, fine = models.pair(models.bert, tmp_path)
    examples = texts(pairs=pairs)
    loaded = load(open_eval_model(str(fine), "", None), examples, [], Settings())
    wanted = plain_loop(fine, examples)
    assert np.ptp(wanted, axis=0).min() > 0.1 and len(set(wanted.argmax(1))) > 1  # it distinguishes inputs
    np.testing.assert_allclose(logits(loaded), wanted, **CLOSE)
    np.testing.assert_array_equal(logits(loaded, 1000).argmax(1), wanted.argmax(1))


def test_a_tokenizer_is_read_again_only_if_it_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels do not matter; a vocabulary in another order does, and so does what a config says about its tokenizer."""
    _, fine = models.pair(models.bert, tmp_path)
    renamed, shuffled, older = (shutil.copytree(fine, tmp_path / name) for name in ("renamed", "shuffled", "older"))
    config = json.loads((fine / "config.json").read_text())
    named = {"id2label": {"0": "x", "1": "y", "2": "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    (renamed / "config.json").write_text(json.dumps(config | named))
    (older / "config.json").write_text(json.dumps(config | {"transformers_version": "4.40.0"}))
    vocabulary = json.loads((fine / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    vocabulary["model"]["vocab"] = {word: n if word.startswith("[") else len(ids) + 3 - n for word, n in ids.items()}
    (shuffled / "tokenizer.json").write_text(json.dumps(vocabulary))
    read, examples = [], texts()
    from_pretrained = tr.AutoTokenizer.from_pretrained

    def count(*arguments: Any, **options: Any) -> Any:
        read.append(arguments)
        return from_pretrained(*arguments, **options)

    monkeypatch.setattr(evaluation_inputs, "_TOKENIZER", [])
    monkeypatch.setattr(tr.AutoTokenizer, "from_pretrained", count)
    for folder, times in ((fine, 1), (renamed, 1), (shuffled, 2), (fine, 3), (older, 4)):
        inputs = prepare(open_eval_model(str(folder), "", None), examples, []).inputs
        assert len(read) == times
        ids = {int(number): batch["input_ids"][0] for (number,), batch in inputs.batches(1, torch.device("cpu"))}
        wanted = from_pretrained(folder)(examples.texts)["input_ids"]
        assert [ids[n].tolist() for n in range(len(wanted))] == wanted


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_artifact_equals_what_unpack_would_write(tmp_path: Path, peru: Callable[..., str], dtype: str) -> None:
    base, fine = models.pair(models.bert, tmp_path)
    if dtype == "bf16":
        for folder in (base, fine):
            tensors = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--keep", "30%", "--no-sync")
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "restored", "--no-sync")
    opened = Base(str(base))
    before = {name: tensor.clone() for name, tensor in opened.table.items()}
    loaded = load(open_eval_model(str(tmp_path / "a.safetensors"), "", opened), texts(), [], Settings())
    restored = load(open_eval_model(str(tmp_path / "restored"), "", None), texts(), [], Settings())
    np.testing.assert_array_equal(logits(loaded), logits(restored))  # the same weights in the same batches: every bit
    np.testing.assert_allclose(logits(loaded), plain_loop(tmp_path / "restored", texts()), **CLOSE)
    assert all(torch.equal(opened.table[name], tensor) for name, tensor in before.items())
    with pytest.raises(PeruError, match=r"add --base"):
        open_eval_model(str(tmp_path / "a.safetensors"), "", None)


def test_an_adapter_equals_pefts_result(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, fine = models.pair(models.bert, tmp_path)
    model = tr.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.mul_(4)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load(open_eval_model(str(tmp_path / "adapter"), "", Base(str(base))), texts(), [], Settings())
    read = tr.AutoTokenizer.from_pretrained(fine)
    batch = read(texts().texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        wanted = adapted(**batch).logits.numpy()
    np.testing.assert_allclose(logits(loaded), wanted, **CLOSE)


def test_a_merge_is_run_under_each_tasks_head(tmp_path: Path, peru: Callable[..., str]) -> None:
    tasks = {"digits": demo.fine_tune("digits"), "fashion": demo.fine_tune("fashion_mnist")}
    named = [f"{task}={folder}" for task, folder in tasks.items()]
    peru("merge", *named, "-b", demo.BASE, "-o", tmp_path / "m", "--method", "linear", "--per-task", "classifier", "--no-sync")
    for task, folder in tasks.items():
        images = read_examples(str(demo.images(folder.name)), most=100)
        others = [open_eval_model(str(folder), "", None).files]
        loaded = load(open_eval_model(str(tmp_path / "m"), task, None), images, others, Settings())
        body = {f"vit.{name}": tensor for name, tensor in load_file(tmp_path / "m" / "model.safetensors").items()}
        shutil.copytree(folder, tmp_path / task)
        save_file(body | load_file(tmp_path / "m" / "heads" / f"{task}.safetensors"), tmp_path / task / "model.safetensors")
        model = tr.ViTForImageClassification.from_pretrained(tmp_path / task, dtype=torch.float32).eval()
        with torch.no_grad():
            wanted = model(pixel_values=torch.from_numpy(images.images).unsqueeze(1).float() / 127.5 - 1).logits.numpy()
        np.testing.assert_allclose(logits(loaded, 100), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(PeruError, match=r"no head for 'letters'.*\n.*it has digits, fashion"):
        open_eval_model(str(tmp_path / "m"), "letters", None)


def test_language_models_get_windows_and_targets(tmp_path: Path) -> None:
    _, fine = models.pair(models.llama, tmp_path / "llama", marks=False)
    words = models.sentences(1, most=60)[0] + " " + " ".join(models.sentences(20))
    running = load(open_eval_model(str(fine), "", None), Examples("memory", texts=[words]), [], Settings(context=10))
    ids = models.tokenizer(False)(words)["input_ids"]
    assert running.kind == CAUSAL
    windows = {int(i): batch["labels"][row] for i_s, batch in running.inputs.batches(3, torch.device("cpu")) for row, i in enumerate(i_s)}
    flat = torch.cat([windows[i][windows[i] != IGNORED] for i in sorted(windows)]).tolist()
    assert flat == ids[: len(ids) - (len(ids) % 10 == 1)]  # a last window of one token predicts nothing
    both = Examples("memory", texts=["w1 w2 w3", "w4"], targets=["w5 w6", "w7 w8 w9"])
    prompted = load(open_eval_model(str(fine), "", None), both, [], Settings())
    ((_, batch),) = prompted.inputs.batches(2, torch.device("cpu"))
    w = {word: i for i, word in enumerate(models.WORDS)}
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [w["w5"], w["w6"]], [IGNORED, w["w7"], w["w8"], w["w9"], IGNORED]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 4 + [0]]
    _, fine = models.pair(models.t5, tmp_path / "t5")
    ((_, batch),) = (loaded := load(open_eval_model(str(fine), "", None), both, [], Settings())).inputs.batches(2, torch.device("cpu"))
    assert loaded.kind == SEQ2SEQ and batch["labels"].shape == (2, 5)  # [CLS] w7 w8 w9 [SEP]


def refused(subject: Path, examples: Examples, base: Path | None = None) -> str:
    with pytest.raises(PeruError) as caught:
        prepare(open_eval_model(str(subject), "", None if base is None else Base(str(base))), examples, [])  # no weights are read
    return str(caught.value)


def test_mismatches_are_reported_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a forward pass")

    base, fine = models.pair(models.bert, tmp_path / "bert")
    _, lm = models.pair(models.llama, tmp_path / "llama", marks=False)
    _, seq2seq = models.pair(models.t5, tmp_path / "t5")
    images = Examples("pixels.npz", images=np.zeros((2, 8, 8), np.uint8))
    monkeypatch.setattr(torch.nn.Linear, "forward", never)
    assert "no weights for classifier.bias, classifier.weight" in refused(base, texts())
    assert "memory has labels, so a classifier is needed" in refused(lm, texts()) and "LlamaForCausalLM" in refused(lm, texts())
    assert "memory has targets, so a language model is needed" in refused(fine, Examples("memory", texts=["a"], targets=["b"]))
    assert "it needs targets, and memory has none" in refused(seq2seq, texts(labels=None))
    assert "no such model for image classification" in refused(fine, images)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (fine / name).unlink(missing_ok=True)
    assert "no tokenizer beside the model or its base" in refused(fine, texts())
    config = json.loads((fine / "config.json").read_text())
    (fine / "config.json").write_text(json.dumps({**config, "model_type": "no-such"}))
    assert "transformers does not know its config.json" in refused(fine, texts())
    (fine / "config.json").unlink()
    assert "no config.json" in refused(fine, texts())


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    _, fine = models.pair(models.vit, tmp_path)
    assert "no preprocessor_config.json" in refused(fine, Examples("pixels.npz", images=np.zeros((2, 8, 8), np.uint8)))
    shutil.copy(demo.fine_tune("digits") / "preprocessor_config.json", fine)
    said = refused(fine, Examples("pixels.npz", images=np.zeros((2, 9, 8), np.uint8)))
    assert "pixels.npz: 9x8 pixels" in said and "takes 8x8" in said
    assert "images are [1, 9, 8]" in refused(fine, Examples("pixels.npz", images=np.zeros((2, 1, 9, 8), np.float32)))
    (tmp_path / "set" / "0").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "set" / "0" / f"{i}.png")
    from_files = load(open_eval_model(str(fine), "", None), read_examples(str(tmp_path / "set")), [], Settings())
    from_array = load(open_eval_model(str(fine), "", None), Examples("pixels.npz", images=pixels), [], Settings())
    np.testing.assert_array_equal(logits(from_files), logits(from_array))
    Image.fromarray(pixels[0][:5]).save(tmp_path / "set" / "0" / "3.png")
    assert "set, 0/3.png: 5x8 pixels" in refused(fine, read_examples(str(tmp_path / "set")))
    (tmp_path / "set" / "0" / "3.png").write_bytes(b"no image")
    assert "set, 0/3.png: not an image" in refused(fine, read_examples(str(tmp_path / "set")))
