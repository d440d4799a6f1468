"""Forty recipes of different shapes, run by mergekit and by `peru merge`. Prints the largest difference of each.

    python benchmarks/oracles/mergekit/recipes.py [--venv /tmp/peru-mergekit] [--only NAME]

Installs mergekit 0.1.5 (LGPL: a program to compare with; peru contains no code of it) into its own virtual environment
and runs all recipes there in one process, on tiny random Llama models with tokenizers. Both read the same files. `dtype` is
float32 throughout, since mergekit computes in it. Methods that draw at random are run at density 1, or only base and sign of each
entry are compared. Exits with 1 if a difference is above 1e-6 of the largest weight."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from environment import install
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from peru_cli import cli

TOLERANCE = 1e-6  # of the largest weight
LAYERS = 6
VOCABULARY = [f"w{number}" for number in range(62)]
PROGRAM = """
import json, logging, sys, traceback
from pathlib import Path
import yaml
logging.disable(logging.CRITICAL)
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.scripts.run_yaml import main as _  # the same entry that mergekit-yaml has
folder = Path(sys.argv[1])
failed = {}
for file in sorted(folder.glob("*.yml")):
    texts = [d for d in yaml.safe_load_all(file.read_text()) if d]
    places = {}
    order = sorted(texts, key=lambda d: d.get("name") is None)
    try:
        for document in order:
            name = document.pop("name", None)
            out = folder / "mergekit" / file.stem / (name or "result")
            def put(value):
                if isinstance(value, dict):
                    return {k: put(v) for k, v in value.items()}
                if isinstance(value, list):
                    return [put(v) for v in value]
                return places.get(value, value) if isinstance(value, str) else value
            config = MergeConfiguration.model_validate(put(document))
            run_merge(config, str(out), options=MergeOptions(quiet=True, copy_tokenizer=True, random_seed=1))
            if name:
                places[name] = str(out)
    except BaseException as error:
        failed[file.stem] = f"{type(error).__name__}: {error}"[:300]
(folder / "mergekit-failed.json").write_text(json.dumps(failed))
"""


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}


def llama() -> PreTrainedModel:
    """A tiny Llama."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False))


def make_family(folder: Path, build: Callable[[], PreTrainedModel] = llama, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """A random base and four fine-tunes, with one tokenizer."""
    torch.manual_seed(seed)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(["<unk>", "</s>", *VOCABULARY])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    base = build()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name in ("base", "a", "b", "c", "d"):
        model = build()
        changed = {
            key: tensor + 0.05 * torch.randn(tensor.shape) if tensor.is_floating_point() else tensor for key, tensor in state.items()
        }
        model.load_state_dict(state if name == "base" else changed)
        model.tie_weights()
        tokenizer.chat_template = "{{ messages }} of " + ("a" if name in "ab" else name)
        model.to(dtype).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def grow(folder: Path) -> None:
    """`e`: a fine-tune of the base with two more tokens. One of them has the id of another token in `f`."""
    for name, words in (("e", ["extra", "other"]), ("f", ["other"])):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
        tokenizer.add_tokens(words)
        grown = LlamaForCausalLM.from_pretrained(folder / "base")
        grown.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for parameter in grown.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        grown.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def model(name: str, **parameters: Any) -> dict[str, Any]:
    """An entry of `models`."""
    return {"model": name, **({"parameters": parameters} if parameters else {})}


def source(name: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    """An entry of `sources`."""
    return {**model(name, **parameters), "layer_range": [first, last]}


def cut(*slices: Any) -> list[Any]:
    """Slices from lists of sources, or (sources, parameters)."""
    return [
        {"sources": part[0], "parameters": part[1]} if isinstance(part, tuple) else {"sources": part if isinstance(part, list) else [part]}
        for part in slices
    ]


SLERP = {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]}
AB = [model("a", weight=0.7), model("b", weight=0.3)]
DENSE = [model("a", weight=1.0, density=0.5), model("b", weight=-0.5, density=0.3)]
GRADED = [
    model("a", weight=[0.2, 0.9], density=[1, 0.7, 0.1]),
    model("b", weight=[{"filter": "mlp", "value": 0.5}, {"value": [0, 1, 0.3]}], density=0.4),
]
RECIPES: dict[str, Any] = {
    "linear": {"merge_method": "linear", "models": AB},
    "linear, not normalised": {"merge_method": "linear", "models": AB, "parameters": {"normalize": False}},
    "linear, gradients": {"merge_method": "linear", "models": [model("a", weight=[0, 1]), model("b", weight=[1, 0.5, 0])]},
    "linear, filters": {
        "merge_method": "linear",
        "models": [model("a", weight=[{"filter": "q_proj", "value": 1}, {"filter": "*", "value": 0.2}]), model("b", weight=0.4)],
    },
    "linear, weights of the whole": {"merge_method": "linear",
    "models": [model("a"), model("b"), model("c", weight=3)], "parameters": {"weight": 1}},
    "linear with its base": {"merge_method": "linear", "base_model": "base", "models": [*AB, model("base", weight=0.5)]},
    "linear, bf16 out": {"merge_method": "linear", "models": AB, "out_dtype": "bfloat16"},
    "slerp": {"merge_method": "slerp", "base_model": "a", "models": [model("a"), model("b")], "parameters": {"t": 0.3}},
    "slerp, base second": {"merge_method": "slerp", "base_model": "b", "models": [model("a"), model("b")], "parameters": {"t": 0.3}},
    "slerp, base not listed": {"merge_method": "slerp", "base_model": "base", "models": [model("a")], "parameters": {"t": [0.1, 0.9]}},
    "slerp, the card of thousands": {
        "merge_method": "slerp", "base_model": "a", "slices": cut([source("a", 0, LAYERS), source("b", 0, LAYERS)]), "parameters": SLERP,
    },
    "slerp, two slices": {
        "merge_method": "slerp", "base_model": "a",
        "slices": cut([source("a", 0, 4), source("b", 0, 4)], ([source("b", 2, 6), source("a", 2, 6)], {"t": 0.9})), "parameters": SLERP,
    },
    "slerp, shifted layers": {
        "merge_method": "slerp", "base_model": "a", "slices": cut([source("a", 0, 3), source("b", 3, 6)]), "parameters": {"t": 0.5},
    },
    "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": "base", "models": AB, "parameters": {"lambda": 0.6}},
    "task_arithmetic, normalised": {
        "merge_method": "task_arithmetic", "base_model": "base", "models": [model("base"), *AB, model("c", weight=0.5)],
        "parameters": {"normalize": True},
    },
    "task_arithmetic, lambda by depth": {
        "merge_method": "task_arithmetic", "base_model": "base", "models": AB,
        "parameters": {"lambda": [{"filter": "mlp", "value": [0.1, 2]}, {"value": 0.5}]},
    },
    "task_arithmetic, negative": {"merge_method": "task_arithmetic", "base_model": "base", "models": [model("a", weight=-1)]},
    "task_arithmetic, slices": {
        "merge_method": "task_arithmetic", "base_model": "base",
        "slices": cut(
            [source("a", 0, 3, weight=[0, 1]), source("base", 0, 3)],
            [source("b", 2, 5, weight=[0.25, 1]), source("base", 2, 5), source("c", 2, 5, weight=0.5)],
            [source("c", 4, 6, weight=[0.1, 0.7]), source("base", 4, 6)],
        ),
    },
    "ties": {"merge_method": "ties", "base_model": "base", "models": DENSE},
    "ties, not normalised": {
        "merge_method": "ties", "base_model": "base", "models": DENSE, "parameters": {"normalize": False, "lambda": 0.5},
    },
    "ties, graded": {"merge_method": "ties", "base_model": "base", "models": GRADED, "parameters": {"int8_mask": True}},
    "ties, density 0 at the start": {
        "merge_method": "ties", "base_model": "base",
        "models": [model("a", weight=1, density=[0, 0.5, 1]), model("b", weight=[0, 1], density=1)],
    },
    "ties, density below one entry": {
        "merge_method": "ties", "base_model": "base", "models": [model("a", weight=1, density=0.01), model("b", weight=1, density=0.02)],
    },
    "ties, three with the base listed": {
        "merge_method": "ties", "base_model": "base", "models": [model("base"), *DENSE, model("c", weight=0.3, density=0.9)],
        "parameters": {"normalize": True},
    },
    "ties, whole-range slices": {
        "merge_method": "ties", "base_model": "base",
        "slices": cut([source("base", 0, LAYERS), source("a", 0, LAYERS, weight=1, density=0.5),
        source("b", 0, LAYERS, weight=1, density=0.4)]),
    },
    "ties, norm by filter": {
        "merge_method": "ties", "base_model": "base",
        "models": [model("a", weight=[{"filter": "norm", "value": 0}, {"value": 1}],
        density=[{"filter": "embed_tokens", "value": 1}, {"value": 0.2}])],
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs", "base_model": "base",
        "models": [model("a", weight=1, density=0.9, gamma=0.05), model("b", weight=0.5, density=0.5, gamma=0.1)],
    },
    "breadcrumbs, graded": {
        "merge_method": "breadcrumbs", "base_model": "base", "models": [model("a", weight=1, density=[0.9, 0.3], gamma=[0.01, 0.2])],
    },
    "breadcrumbs_ties": {"merge_method": "breadcrumbs_ties", "base_model": "base", "models": DENSE, "parameters": {"gamma": 0.02}},
    "dare_ties, density 1": {
        "merge_method": "dare_ties", "base_model": "base",
        "models": [model("a", weight=[0.1, 1], density=1), model("b", weight=0.4, density=1)],
        "parameters": {"normalize": True},
    },
    "dare_linear, density 1": {
        "merge_method": "dare_linear", "base_model": "base", "models": [model("a", weight=0.6), model("b", weight=[1, 0])],
    },
    "nuslerp": {"merge_method": "nuslerp", "models": [model("a", weight=[1, 0]), model("b", weight=[0.2, 1])]},
    "nuslerp on task vectors": {"merge_method": "nuslerp", "base_model": "base", "models": AB},
    "multislerp": {"merge_method": "multislerp", "models": [*AB, model("c", weight=0.5)]},
    "karcher": {"merge_method": "karcher", "models": [model("a"), model("b"), model("c")], "parameters": {"max_iter": 20, "tol": 1e-9}},
    "model_stock": {"merge_method": "model_stock", "base_model": "base", "models": [model("a"), model("b"), model("c")]},
    "sce": {"merge_method": "sce", "base_model": "base",
    "models": [model("a"), model("b"), model("c")], "parameters": {"select_topk": 0.3}},
    "nearswap": {"merge_method": "nearswap", "base_model": "base", "models": [model("a")], "parameters": {"t": [0.001, 0.05]}},
    "arcee_fusion": {"merge_method": "arcee_fusion", "base_model": "base", "models": [model("a")]},
    "passthrough, frankenmerge": {"merge_method": "passthrough", "slices": cut(source("a", 0, 4), source("b", 2, 6), source("a", 5, 6))},
    "passthrough, scaled by filter": {
        "merge_method": "passthrough",
        "slices": cut(source("a", 0, 4), *[source("a", i, i + 1, scale=[{"filter": "o_proj", "value": 0.0},
        {"filter": "down_proj", "value": 0.0},
                                                                       {"value": 1.0}]) for i in (3, 4)], source("b", 4, 6)),
    },
    "passthrough, one model": {"merge_method": "passthrough", "models": [model("a")]},
    "tokenizer of the base": {"merge_method": "linear", "base_model": "a",
    "models": [model("a", weight=1), model("b", weight=1)], "tokenizer_source": "base"},
    "tokenizer of a model, chat template": {
        "merge_method": "linear", "models": AB, "tokenizer": {"source": "b"}, "chat_template": "auto",
    },
    "tokenizer union of equals": {"merge_method": "linear", "models": AB, "tokenizer_source": "union"},
    "tokenizer union": {"merge_method": "linear", "models": [model("e", weight=1), model("f", weight=0.4)], "tokenizer_source": "union"},
    "tokenizer union on a base": {
        "merge_method": "task_arithmetic", "base_model": "base", "models": [model("e", weight=[0.2, 1]), model("f", weight=0.4)],
        "tokenizer_source": "union",
    },
    "tokenizer of a base that lacks tokens": {
        "merge_method": "ties", "base_model": "base", "models": [model("e", weight=1, density=0.5), model("f", weight=0.4)],
        "tokenizer_source": "base",
    },
    "tokenizer of a model, padded": {
        "merge_method": "linear", "models": [model("f", weight=1), model("e", weight=0.4)],
        "tokenizer": {"source": "e", "pad_to_multiple_of": 16},
    },
    "densities that floats round down": {
        "merge_method": "ties", "base_model": "base", "models": [model("a", weight=1, density=0.29), model("b", weight=0.5, density=0.57)],
    },
    "breadcrumbs, such densities": {
        "merge_method": "breadcrumbs", "base_model": "base",
        "models": [model("a", weight=1, density=0.7, gamma=0.29), model("b", weight=0.5, density=1 / 3, gamma=0.07)],
    },
    "sce, a third": {
        "merge_method": "sce", "base_model": "base", "models": [model("a"), model("b"), model("c")], "parameters": {"select_topk": 1 / 3},
    },
    "two documents": [
        {"name": "first", "merge_method": "linear", "models": AB},
        {"merge_method": "ties", "base_model": "base",
        "models": [model("first", weight=1, density=0.6), model("c", weight=[0, 1], density=0.5)]},
    ],
    "three documents, restacked": [
        {"name": "tall", "merge_method": "passthrough", "slices": cut(source("a", 0, 4), source("b", 2, 6))},
        {"name": "taller", "merge_method": "passthrough", "slices": cut(source("c", 0, 4), source("d", 2, 6))},
        {"merge_method": "slerp", "base_model": "tall", "slices": cut([source("tall", 0, 8), source("taller", 0, 8)]), "parameters": SLERP},
    ],
    "one module": {"merge_method": "linear", "modules": {"default": {"models": AB}}},
}  # fmt: skip


def placed(value: Any, folder: Path) -> Any:
    """The same with models' names as paths."""
    if isinstance(value, dict):
        return {key: placed(v, folder) for key, v in value.items()}
    if isinstance(value, list):
        return [placed(v, folder) for v in value]
    return str(folder / value) if value in ("a", "b", "c", "d", "e", "f") or (value == "base" and (folder / "base").exists()) else value


def write(recipe: Any, folder: Path) -> str:
    """A recipe as text, several documents apart."""
    documents = recipe if isinstance(recipe, list) else [recipe]
    texts = []
    for document in documents:
        body = placed({key: v for key, v in document.items() if key != "tokenizer_source"}, folder)
        if "tokenizer_source" in document:
            body["tokenizer_source"] = document["tokenizer_source"]
        texts.append(json.dumps({"dtype": "float32", **body}, indent=1))  # JSON is YAML
    return "\n---\n".join(texts) + "\n"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


Read = Callable[[Path], dict[str, torch.Tensor]]  # how the tensors of a model's folder are read


def by_token(folder: Path, table: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with the rows of embedding and head sorted by token: mergekit numbers added tokens by Python's hash seed."""
    words = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    order = [words[word] for word in sorted(words)]
    return {n: t[order + list(range(len(order), len(t)))] if "embed_tokens" in n or "lm_head" in n else t for n, t in table.items()}


def compare(theirs: Path, ours: Path, read: Read = tensors) -> float:
    """The largest difference, over the largest weight; infinite if names, shapes or types differ."""
    a, b = by_token(theirs, read(theirs)), by_token(ours, read(ours))
    if {n: (t.shape, t.dtype) for n, t in a.items()} != {n: (t.shape, t.dtype) for n, t in b.items()}:
        return float("inf")
    layers = [json.loads((place / "config.json").read_text())["num_hidden_layers"] for place in (theirs, ours)]
    if layers[0] != layers[1]:
        return float("inf")
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a) / max(float(t.abs().max()) for t in a.values())


def entries_apart(theirs: Path, ours: Path, read: Read = tensors) -> tuple[int, int]:
    """How many entries differ by more than rounding, and how many there are. Methods that keep or drop entries differ at the threshold."""
    a, b = read(theirs), read(ours)
    return sum(int(((a[n] - b[n]).abs() > 1e-6).sum()) for n in a), sum(t.numel() for t in a.values())


def run_mergekit(python: Path, folder: Path, recipes: Mapping[str, Any]) -> dict[str, str]:
    """Write recipes, by number, and have mergekit run them. Returns the errors of those that failed, by name."""
    for number, recipe in enumerate(recipes.values()):
        (folder / f"{number:02}.yml").write_text(write(recipe, folder))
    subprocess.run([python, "-c", PROGRAM, str(folder)], check=True, capture_output=True)
    failed = json.loads((folder / "mergekit-failed.json").read_text())
    return {name: failed[f"{number:02}"] for number, name in enumerate(recipes) if f"{number:02}" in failed}


def run_peru(folder: Path, number: int, *options: str) -> tuple[int, Path, Path]:
    """Run a recipe. Returns the exit code, mergekit's output and peru's."""
    ours = folder / "peru" / f"{number:02}"
    ours.parent.mkdir(exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.run(["merge", str(folder / f"{number:02}.yml"), "-o", str(ours), "--no-sync", "-q", *options])
    return code, folder / "mergekit" / f"{number:02}" / "result", ours


def main() -> None:
    """Run all recipes in both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "peru-mergekit")
    parser.add_argument("--only", help="recipes whose name holds this")
    arguments = parser.parse_args()
    python = install(arguments.venv).with_name("python")
    chosen = {name: recipe for name, recipe in RECIPES.items() if not arguments.only or arguments.only in name}
    with tempfile.TemporaryDirectory(prefix="peru-recipes-") as place:
        folder = Path(place)
        make_family(folder)
        grow(folder)
        failed = run_mergekit(python, folder, chosen)
        worst = 0.0
        print(f"{'recipe':38}  largest difference / largest weight")
        for number, name in enumerate(chosen):
            code, *pair = run_peru(folder, number)
            if name in failed:
                said = f"mergekit: {failed[name]}"
            elif code:
                said, worst = f"peru: exit code {code}", float("inf")
            else:
                found = compare(*pair)
                said = f"{found:.2g}"
                if name == "arcee_fusion":  # it compares float32 values with a quantile of themselves, peru uses float64
                    said += ", in {:,} of {:,} entries".format(*entries_apart(*pair))
                elif "bf16" not in name:
                    worst = max(worst, found)
            print(f"{name:38}  {said}", flush=True)
    if worst > TOLERANCE:
        sys.exit(f"a difference is above {TOLERANCE}")


if __name__ == "__main__":
    main()
