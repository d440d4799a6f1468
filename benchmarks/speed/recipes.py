"""Ten recipes, run by mergekit and by `peru merge` on the same files: seconds and memory, all in one run.

    python benchmarks/models/make_pair.py /tmp/family --layers 4 --fine-tunes 3        (0.3B; 22 layers are 1.1B)
    python benchmarks/speed/recipes.py /tmp/family [--mergekit /tmp/venv/bin/mergekit-yaml] [--only NAME] [--runs 1]

Every run is a process of its own, start-up included, with a warm page cache and without syncing. The aim is 10 times as fast for
methods that trim or elect, 5 for the others, in at most 400 MB. mergekit is 0.1.5, in a virtual environment of its own, with
torch 2.13.0; without it only peru's columns are filled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from measured import PERU, best

from peru_cli.checkpoints.local.files import RandomAccessFile, read_header

MODELS = ("base", "fine1", "fine2", "fine3")
HEAD = 64  # entries of an attention head
MOST_MB = 400


def config(model: Path) -> dict[str, Any]:
    """The config.json of a Llama, from the shapes of its tensors."""
    file = RandomAccessFile(model)
    shapes = {name: info.shape for name, info in read_header(file).tensors.items()}
    file.close()
    layers = {match.group(1) for name in shapes if (match := re.search(r"layers\.(\d+)\.", name))}
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0], "num_hidden_layers": len(layers),
        "num_attention_heads": hidden // HEAD, "num_key_value_heads": shapes["model.layers.0.self_attn.k_proj.weight"][0] // HEAD,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip


def as_folders(family: Path) -> dict[str, str]:
    """Each model as a folder with a config, of links to the same files. Returns their paths."""
    found = {}
    for name in MODELS:
        folder = family / "folders" / name
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "model.safetensors"
        if not weights.exists():
            os.link(family / f"{name}.safetensors", weights)
        (folder / "config.json").write_text(json.dumps(config(weights)))
        found[name] = str(folder)
    return found


def recipes(at: dict[str, str], layers: int) -> dict[str, tuple[dict[str, Any], int]]:
    """Ten recipes by name, each with how many times as fast as mergekit it should be."""

    def models(*parameters: dict[str, Any], base: bool = False) -> dict[str, Any]:
        names = MODELS[1 : 1 + len(parameters)]
        listed: list[dict[str, Any]] = [{"model": at["base"]}] if base else []
        return {
            "models": listed
            + [{"model": at[n], "parameters": p} if p else {"model": at[n]} for n, p in zip(names, parameters, strict=True)]
        }

    onto, half = {"base_model": at["base"]}, layers // 2 or 1
    by_module = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]
    kept = [{"density": [1, 0.7, 0.1], "weight": 1.0}, {"density": 0.5, "weight": [0, 0.3, 0.7, 1]}, {"density": 0.33, "weight": 0.5}]
    filtered = [{"density": 0.53, "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0.2}]}, {"density": 0.53, "weight": 0.4}]
    plain, one = {"density": 0.5, "weight": 0.4}, {"weight": 1.0}
    parts = [(at["fine1"], 0, half + layers // 4), (at["fine2"], half, layers)]
    return {
        "ties, gradients": ({"merge_method": "ties", **onto, **models(*kept), "parameters": {"normalize": True, "int8_mask": True}}, 10),
        "dare_ties, filters": ({"merge_method": "dare_ties", **onto, **models(*filtered)}, 10),
        "della": ({"merge_method": "della", **onto, **models(plain, plain, plain), "parameters": {"epsilon": 0.05, "lambda": 0.9}}, 10),
        "breadcrumbs": ({"merge_method": "breadcrumbs", **onto, **models(*[plain | {"gamma": 0.01}] * 3)}, 10),
        "sce": ({"merge_method": "sce", **onto, **models({}, {}, {}), "parameters": {"select_topk": 0.1}}, 10),
        "model_stock": ({"merge_method": "model_stock", **onto, **models({}, {}, {})}, 5),
        "slerp, gradients and filters": ({"merge_method": "slerp", **onto, **models({}, base=True), "parameters": {"t": by_module}}, 5),
        "nearswap": ({"merge_method": "nearswap", **onto, **models({}, base=True), "parameters": {"t": 0.0001}}, 5),
        "linear": ({"merge_method": "linear", **models(one, one, one)}, 5),
        "passthrough, slices": (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": m, "layer_range": [a, b]}]} for m, a, b in parts]}, 5
        ),
    }  # fmt: skip


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--mergekit", type=Path, metavar="PROGRAM", help="mergekit-yaml; without it peru runs alone")
    parser.add_argument("--only", metavar="NAME", help="only recipes whose names contain this")
    parser.add_argument("--runs", type=int, default=1, help="runs of peru, of which the least counts; mergekit runs once")
    arguments = parser.parse_args()
    at = as_folders(arguments.family)
    for folder in at.values():
        with open(Path(folder) / "model.safetensors", "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    layers = config(Path(at["base"]) / "model.safetensors")["num_hidden_layers"]
    print("| recipe | peru s | CPU s | MB | mergekit s | CPU s | MB | times as fast | aim |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (recipe, aim) in recipes(at, layers).items():
        if arguments.only is not None and arguments.only not in name:
            continue
        written, ours_out, theirs_out = (arguments.family / part for part in ("recipe.yml", "ours", "theirs"))
        written.write_text(json.dumps(recipe | {"dtype": "bfloat16"}, indent=1))  # JSON is YAML
        ours = best([*PERU, "merge", written, "-o", ours_out, "--no-sync", "--force"], arguments.runs)
        if ours.code:
            raise SystemExit(f"{name}: peru failed with exit code {ours.code}")
        told = "| | | |"
        if arguments.mergekit is not None:
            theirs = best([arguments.mergekit, written, theirs_out, "--no-copy-tokenizer"], 1)
            shown = f"{theirs.wall / ours.wall:.1f}" if not theirs.code else f"failed, exit code {theirs.code}"
            told = f"{theirs.wall:.1f} | {theirs.cpu:.1f} | {theirs.peak_mb} | {shown}"
        over = f" (aim {MOST_MB})" if ours.peak_mb > MOST_MB else ""
        print(f"| {name} | {ours.wall:.2f} | {ours.cpu:.2f} | {ours.peak_mb}{over} | {told} | {aim} |", flush=True)
        for folder in (ours_out, theirs_out):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
