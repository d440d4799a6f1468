"""Packs of small T5 and GPT-2 fine-tunes: the packing paper's rows for other architectures.

    python benchmarks/papers/architectures.py CACHE --data ../shared/data/text [--only t5 gpt2] [--base-steps 240] [--steps 100]

Trains what it needs into CACHE, once: a tokenizer of words, and for each architecture a base and four fine-tunes, with their shapes
but few parameters. `t5` is an encoder-decoder that answers with a word, the label's name; any other word of the vocabulary is wrong. Its
base has seen a little of all tasks, as Flan-T5 has. `gpt2` has a head on the last token; its base has modelled the tasks' texts without
labels, and heads start as a logistic regression on its features. Packs are made by `peru shuffle-pack` and unpacked by
`peru unpack`, the sum is made by `peru merge`, and transformers loads what they write. Scales are chosen on 200 held-out training
examples a task, accuracies are of 400 test examples."""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

import peru_cli
from peru_cli.cli import run

sys.path.insert(0, str(Path(__file__).resolve().parent))
TASKS = ("snips", "clinc_domains", "agnews", "sst2")
DEV, TEST, LENGTH, BATCH, WORDS, LAYERS, WIDTH = 200, 400, 20, 32, 3000, 4, 64
SCALES = (0.3, 0.5, 0.7, 1.0)
VARIANTS = {
    "TA + Shuffle": ["--seed", 7, "--no-signs"],
    "STA": ["--seed", 7, "--decorrelate", "none"],
    "STA + Shuffle": ["--seed", 7],
    "TALL-masks": ["--method", "tall-masks"],
}


class Texts:
    """The tasks' texts and labels by part, and a tokenizer whose vocabulary has every label's name as one word."""

    def __init__(self, data: Path) -> None:
        self.names, self.parts = {}, {}
        for task in TASKS:
            labels = json.loads((data / task / "labels.json").read_text())["labels"]
            self.names[task] = [re.sub(r"\W|_", "", label).lower() for label in labels]
            rng = torch.Generator().manual_seed(0)
            for part in ("train", "test"):
                with gzip.open(data / task / f"{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
                    found = [json.loads(line) for line in lines]
                order = torch.randperm(len(found), generator=rng).tolist()
                self.parts[task, part] = [(found[i]["text"], found[i]["label"]) for i in order]
            train = self.parts[task, "train"]
            self.parts |= {(task, "dev"): train[:DEV], (task, "train"): train[DEV:], (task, "test"): self.parts[task, "test"][:TEST]}
        words = Tokenizer(models.WordLevel(unk_token="<unk>"))
        words.normalizer = normalizers.Lowercase()
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        texts = (text for task in TASKS for text, _ in self.parts[task, "train"])
        often = [name for task in TASKS for name in (task, *self.names[task])] * 1000  # so that they are among the words
        words.train_from_iterator([*texts, *often], trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=["<pad>", "</s>", "<unk>"]))
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LENGTH, padding_side="right", **special)

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Ids and mask, padded to the longest."""
        return {k: v for k, v in self.tokenizer(texts, truncation=True, padding=True, return_tensors="pt").items() if k != "token_type_ids"}

    def stream(self, task: str, size: int = BATCH) -> Iterator[tuple[str, list[str], Tensor]]:
        """Endless random batches of the training part."""
        rng, train = torch.Generator().manual_seed(0), self.parts[task, "train"]
        while True:
            some = [train[i] for i in torch.randint(len(train), (size,), generator=rng).tolist()]
            yield task, [text for text, _ in some], torch.tensor([label for _, label in some])

    def mixed(self) -> Iterator[tuple[str, list[str], Tensor]]:
        """Batches of each task in turn."""
        streams = [self.stream(task) for task in TASKS]
        while True:
            yield from (next(stream) for stream in streams)


class T5:
    """An encoder-decoder that answers with the label's name."""

    def __init__(self, texts: Texts, root: Path) -> None:
        self.texts, self.root = texts, root
        self.words = {task: torch.tensor(texts.tokenizer.convert_tokens_to_ids(names)) for task, names in texts.names.items()}

    def make_base(self, steps: int) -> nn.Module:
        """Briefly trained on all tasks."""
        shape = {"d_model": WIDTH, "d_kv": WIDTH // 4, "d_ff": 4 * WIDTH, "num_layers": LAYERS, "num_heads": 4, "dropout_rate": 0.0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **shape))
        fit(model, (lambda b=batch: self.loss(model, b) for batch in self.texts.mixed()), steps)
        return model

    def start(self, task: str) -> Any:
        """What a fine-tune begins with."""
        return self.load(self.root / "base")

    def load(self, folder: Path, task: str = "") -> Any:
        """A model that peru or a training wrote."""
        return T5ForConditionalGeneration.from_pretrained(folder).eval()

    def inputs(self, task: str, found: list[str]) -> dict[str, Tensor]:
        return self.texts.tokens([f"{task} : {text}" for text in found])

    def loss(self, model: Any, batch: tuple[str, list[str], Tensor]) -> Tensor:
        task, found, labels = batch
        answer = torch.stack([self.words[task][labels], torch.ones_like(labels)], 1)  # the word and </s>
        return model(**self.inputs(task, found), labels=answer).loss

    def right(self, model: Any, task: str, found: list[str], labels: Tensor) -> Tensor:
        start = torch.zeros(len(found), 1, dtype=torch.long)
        logits = model(**self.inputs(task, found), decoder_input_ids=start).logits[:, 0]
        return logits.argmax(-1) == self.words[task][labels]


class GPT2:
    """A decoder with a head on the last token."""

    def __init__(self, texts: Texts, root: Path) -> None:
        self.texts, self.root = texts, root

    def make_base(self, steps: int) -> nn.Module:
        """A language model of the tasks' texts, without its head (which is tied)."""
        shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": LENGTH}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, pad_token_id=0, bos_token_id=1, eos_token_id=1, **shape, **off))

        def loss(texts: list[str]) -> Tensor:
            tokens = self.texts.tokens(texts)
            return model(**tokens, labels=tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)).loss

        fit(model, (lambda b=batch: loss(b[1]) for batch in self.texts.mixed()), steps)
        return model.transformer

    def start(self, task: str) -> Any:
        """The base with a head fitted to its features of 512 examples."""
        from finetunes import fit_head

        classes = len(self.texts.names[task])
        model = GPT2ForSequenceClassification.from_pretrained(self.root / "base", num_labels=classes).eval()
        _, found, labels = next(self.texts.stream(task, 512))
        tokens = self.texts.tokens(found)
        with torch.no_grad():
            hidden = model.transformer(**tokens).last_hidden_state
        fit_head(model.score, hidden[torch.arange(len(found)), tokens["attention_mask"].sum(1) - 1], labels)
        return model

    def load(self, folder: Path, task: str = "") -> Any:
        """A model that peru or a training wrote; a merge has its heads beside it."""
        if not (head := folder / "heads" / f"{task}.safetensors").exists():
            return GPT2ForSequenceClassification.from_pretrained(folder).eval()
        model = GPT2ForSequenceClassification.from_pretrained(self.root / task).eval()
        merged = load_file(folder / "model.safetensors") | load_file(head)
        model.load_state_dict({n if n.startswith(("score", "transformer")) else f"transformer.{n}": t for n, t in merged.items()})
        return model

    def loss(self, model: Any, batch: tuple[str, list[str], Tensor]) -> Tensor:
        return model(**self.texts.tokens(batch[1]), labels=batch[2]).loss

    def right(self, model: Any, task: str, found: list[str], labels: Tensor) -> Tensor:
        return model(**self.texts.tokens(found)).logits.argmax(-1) == labels


def fit(model: nn.Module, losses: Iterator[Callable[[], Tensor]], steps: int, rate: float = 2e-3) -> None:
    """AdamW, one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    model.train()
    for _, loss in zip(range(steps), losses, strict=False):
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def peru(*arguments: object) -> Any:
    """Run a command, in this process. Returns its report."""
    with redirect_stdout(StringIO()) as out:
        if run([*map(str, arguments), "--json", "--quiet", "--no-sync", "--force"]):
            raise SystemExit(f"peru {' '.join(map(str, arguments))} failed")
    return json.loads(out.getvalue())


class Bench:
    """One architecture: its models, and the rows of its table."""

    def __init__(self, family: T5 | GPT2, scratch: Path, base_steps: int, steps: int) -> None:
        self.family, self.scratch, self.base = family, scratch, family.root / "base"
        for task in ("base", *TASKS):
            if ((folder := family.root / task) / "model.safetensors").exists():
                continue
            begin = time.process_time()
            torch.manual_seed(0)
            if task == "base":
                model = family.make_base(base_steps)
            else:
                model = family.start(task)
                fit(model, (lambda b=batch, m=model: family.loss(m, b) for batch in family.texts.stream(task)), steps)
            family.texts.tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
            count = sum(p.numel() for p in model.parameters())
            print(f"{folder}: {count:,} parameters, {time.process_time() - begin:.0f} CPU seconds", file=sys.stderr, flush=True)
        self.models = [*(f"{task}={family.root / task}" for task in TASKS), "--base", str(self.base)]
        self.own = {(t, part): self.accuracy(family.load(family.root / t), t, part) for t in TASKS for part in ("dev", "test")}

    def accuracy(self, model: Any, task: str, part: str) -> float:
        """Percent right."""
        found = sorted(self.family.texts.parts[task, part], key=lambda e: len(e[0]))
        with torch.inference_mode():
            right = [
                self.family.right(model, task, [text for text, _ in some], torch.tensor([label for _, label in some]))
                for some in (found[at : at + 100] for at in range(0, len(found), 100))
            ]
        return 100 * torch.cat(right).double().mean().item()

    def best(self, at: Callable[[str, float], float]) -> float:
        """The scale with the highest mean normalised accuracy on dev; `at` gives a task's accuracy."""
        return max(SCALES, key=lambda scale: sum(at(task, scale) / self.own[task, "dev"] for task in TASKS))

    def rows(self) -> Iterator[tuple[str, float, dict[str, float]]]:
        """Name, bits a parameter of all tasks together, test accuracy of each task."""
        yield "base", 0, {t: self.accuracy(self.family.start(t), t, "test") for t in TASKS}
        yield "fine-tunes", 32 * len(TASKS), {t: self.own[t, "test"] for t in TASKS}
        merged = self.merged(1)
        scale = self.best(lambda task, scale: self.accuracy(self.between(self.family.load(merged, task), scale), task, "dev"))
        merged = self.merged(scale)
        yield f"task arithmetic, scale {scale:g}", 32, {t: self.accuracy(self.family.load(merged, t), t, "test") for t in TASKS}
        for name, options in VARIANTS.items():
            path = self.scratch / "pack.safetensors"
            peru("shuffle-pack", *self.models, "-o", path, *options)
            with peru_cli.open_artifact(path) as pack:
                scale = self.best(lambda task, scale: self.applied(pack, task, scale))
            report = peru("shuffle-pack", *self.models, "-o", path, "--scale", scale, *options)
            found = {}
            for task in TASKS:
                peru("unpack", path, "--task", task, "--base", self.base, "-o", self.scratch / "restored")
                found[task] = self.accuracy(self.family.load(self.scratch / "restored"), task, "test")
            bits = report["bits_per_parameter"] + sum(task.get("mask_bits_per_parameter", 0) for task in report["packed"])
            yield f"{name}, scale {scale:g}", bits, found

    def merged(self, scale: float) -> Path:
        """The sum at a scale."""
        peru("merge", *self.models, "-o", self.scratch / "sum", "--method", "task-arithmetic", "--scale", scale)
        return self.scratch / "sum"

    def between(self, model: Any, scale: float) -> Any:
        """The base plus a share of what a model is apart from it."""
        base = load_file(self.base / "model.safetensors")
        for name, parameter in model.named_parameters():
            if (start := base.get(name, base.get(name.removeprefix("transformer.")))) is not None:
                parameter.data = torch.lerp(start, parameter.data, scale)
        return model

    def applied(self, pack: Any, task: str, scale: float) -> float:
        """Dev accuracy of a task that is retrieved at a scale, in memory."""
        pack.scale = scale
        model = self.family.start(task)
        with peru_cli.apply(model, pack, task=task, verify=False):
            return self.accuracy(model, task, "dev")


def main() -> None:
    """Train what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="of the tasks, as ../shared/data/text")
    parser.add_argument("--only", nargs="+", choices=("t5", "gpt2"), default=("t5", "gpt2"))
    parser.add_argument("--base-steps", type=int, default=240)
    parser.add_argument("--steps", type=int, default=100, help="of a fine-tune")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    texts = Texts(options.data)
    for name in options.only:
        print(f"\n| {name} | bits/param | {' | '.join(TASKS)} | mean | normalised |\n| --- | {' | '.join(['---:'] * (len(TASKS) + 3))} |")
        with tempfile.TemporaryDirectory(prefix="peru-architectures-") as scratch:
            family = {"t5": T5, "gpt2": GPT2}[name](texts, options.cache.resolve() / name)
            bench = Bench(family, Path(scratch), options.base_steps, options.steps)
            for row, bits, found in bench.rows():
                share = sum(100 * found[t] / bench.own[t, "test"] for t in TASKS) / len(TASKS)
                cells = [f"{bits:.2f}", *(f"{found[t]:.1f}" for t in TASKS), f"{sum(found.values()) / len(TASKS):.1f}", f"{share:.1f}"]
                print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
