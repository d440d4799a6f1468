"""The same recipes on tiny random models of six architectures, run by mergekit and by `peru merge`.

    python benchmarks/oracles/mergekit/architectures.py [--venv /tmp/peru-mergekit] [--only NAME] [--seeds 3]

Models are stored in float32 and in bfloat16, `dtype` is float32 in both, and each is made with several seeds. Recipes that
need tokenizers of their own are left to recipes.py. Prints, for each architecture, the recipes that ran in both and the largest
difference. Differences of bfloat16 numbers are often equal, and which of several equal ones a method keeps is the program's choice:
for those the entries that differ are counted. So they are for arcee_fusion, which compares float32 values with a quantile of themselves,
and for methods that look at whole tensors on Mixtral, whose experts mergekit joins.
Exits with 1 if another difference is above 1e-6 of the largest weight, or if peru refuses what mergekit runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import install
from recipes import RECIPES, SIZES, TOLERANCE, compare, entries_apart, llama, make_family, run_mergekit, run_peru, tensors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
)

_GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen2": lambda: AutoModelForCausalLM.from_config(Qwen2Config(**_GROUPED, tie_word_embeddings=False)),
    "mistral": lambda: AutoModelForCausalLM.from_config(MistralConfig(**_GROUPED)),
    "gemma": lambda: AutoModelForCausalLM.from_config(GemmaConfig(**_GROUPED, head_dim=8)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=64)),
    "mixtral": lambda: AutoModelForCausalLM.from_config(MixtralConfig(**_GROUPED, num_local_experts=2)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANKED = {"ties", "breadcrumbs", "breadcrumbs_ties", "sce"}  # methods that keep the largest entries
# mergekit merges the experts of a block as one tensor, peru as the base has them: only entry by entry can they agree.
FUSED = ("mixtral",)
ENTRYWISE = {"linear", "task_arithmetic", "dare_linear", "passthrough", "nearswap"}
# A filter that matches nothing is an error in peru, so recipes take the names of each architecture.
NAMES = {
    "bert": {
        "self_attn": "attention.self",
        "mlp": "intermediate",
        "q_proj": "query",
        "o_proj": "attention.output",
        "down_proj": "pooler",
        "norm": "LayerNorm",
        "embed_tokens": "word_embeddings",
    },
    "mixtral": {"mlp": "experts", "down_proj": "experts"},
}
CHOSEN = {name: recipe for name, recipe in RECIPES.items() if "tokenizer" not in name and "bf16" not in name and "module" not in name}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model as transformers has them in memory."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def body(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors but the head, which peru averages with `--merge-heads`."""
    return {name: tensor for name, tensor in tensors(folder).items() if not name.startswith("classifier.")}


READ = {"mixtral": weights, "bert": body}
OPTIONS = {"bert": ["--merge-heads"]}


def for_kind(recipe: Any, kind: str) -> Any:
    """The recipe with an architecture's names in its filters."""
    text = json.dumps(recipe)
    for name, theirs in NAMES.get(kind, {}).items():
        text = text.replace(f'"filter": "{name}"', f'"filter": "{theirs}"')
    return json.loads(text)


def is_counted(recipe: Any, kind: str, dtype: torch.dtype) -> bool:
    """Whether entries that differ are counted, because programs may choose or see other tensors."""
    methods = {document["merge_method"] for document in (recipe if isinstance(recipe, list) else [recipe])}
    fused = kind in FUSED and not methods <= ENTRYWISE
    return fused or "arcee_fusion" in methods or (dtype is torch.bfloat16 and bool(methods & RANKED))


def main() -> None:
    """Run all in both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "peru-mergekit")
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    python = install(arguments.venv).with_name("python")
    good = True
    print(f"{len(CHOSEN)} recipes, {arguments.seeds} seeds\n")
    print("| model | stored in | runs in both | largest difference / largest weight | recipe | recipes not compared: entries apart |")
    print("| --- | --- | ---: | ---: | --- | ---: |")
    for kind in [arguments.only] if arguments.only else KINDS:
        read = READ.get(kind, tensors)
        chosen = {name: for_kind(recipe, kind) for name, recipe in CHOSEN.items()}
        for stored, dtype in DTYPES.items():
            runs, worst, where, apart, of = 0, 0.0, "", 0, 0
            for seed in range(arguments.seeds):
                with tempfile.TemporaryDirectory(prefix="peru-architectures-") as place:
                    folder = Path(place)
                    make_family(folder, KINDS[kind], seed, dtype)
                    failed = run_mergekit(python, folder, chosen)
                    for number, name in enumerate(chosen):
                        code, *pair = run_peru(folder, number, *OPTIONS.get(kind, []))
                        if name in failed or code:
                            said = f"mergekit: {failed.get(name, 'runs')}; peru: exit code {code}"
                            print(f"{kind}, {stored}, seed {seed}, {name}: {said}", file=sys.stderr, flush=True)
                            good &= not code
                            continue
                        runs += 1
                        if is_counted(chosen[name], kind, dtype):
                            differ, all_entries = entries_apart(*pair, read)
                            apart, of = apart + differ, of + all_entries
                        elif (found := compare(*pair, read)) > worst:
                            worst, where = found, name
            print(f"| {kind} | {stored} | {runs} | {worst:.2g} | {where} | {apart:,} of {of:,} |", flush=True)
            good &= worst <= TOLERANCE
    if not good:
        sys.exit(f"a difference is above {TOLERANCE}, or a recipe ran in one program only")


if __name__ == "__main__":
    main()
