"""The commands of the campaign: their names, what they need, and what they write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from outputs import Command, makers
from running import apart
from safetensors.torch import load_file

from tests.conftest import save
from tests.support import data_family

OPTIONS: Command = ["--no-sync", "--threads", 1]
RECIPE = "models:\n  - model: {0}\n    parameters: {{weight: 0.6}}\n  - model: {1}\n    parameters: {{weight: 0.4}}\nmerge_method: linear\n"


def whole(folder: Path, tasks: list[str]) -> dict[str, tuple[str, Command]]:
    """Commands that write from models alone: by name, the output's name and the command."""
    base: Command = ["-b", folder / "base.safetensors"]
    made = makers(folder, tasks, Path())
    found = {f"{command[0]} {name}": (name, command[:-2]) for name, command in made.items()}
    recipe, plain = folder / "recipe.yml", _without_head(folder, tasks[0])
    recipe.write_text(RECIPE.format(*(task.partition("=")[2] for task in tasks)))
    return found | {
        "prune of two": ("deltas", ["prune", *tasks, "--keep", "5%", *base, *OPTIONS]),
        "prune low-rank": ("x.safetensors", ["prune", tasks[0], "--bits", "0.3", *base, *OPTIONS]),
        "shuffle-pack magnitude-masks": ("x.safetensors", ["shuffle-pack", *tasks, "--method", "magnitude-masks", *base, *OPTIONS]),
        "shuffle-pack emr": ("x.safetensors", ["shuffle-pack", *tasks, "--method", "emr", *base, *OPTIONS]),
        "shuffle-pack smile": ("x.safetensors", ["shuffle-pack", *tasks, "--method", "smile", *base, *OPTIONS]),
        "merge linear": ("x.safetensors", ["merge", f"c={plain}", f"base={base[1]}", "-m", "linear", *OPTIONS]),
        "merge in shards": ("x", ["merge", *tasks, "-m", "dare", "--keep", "50%", "--max-shard-size", "30MB", *base, *OPTIONS]),
        "merge tsv-m": ("x", ["merge", *tasks, "-m", "tsv-m", *base, *OPTIONS]),
        "merge recipe": ("x", ["merge", recipe, "--per-task", "classifier", *OPTIONS]),
        "svd-lora with a delta": ("x", ["svd-lora", tasks[0], "--rank", "2", "--rest", "delta", *base, *OPTIONS]),
    }


def _without_head(folder: Path, task: str) -> Path:
    """A fine-tune with only the base's tensors; and beside it w.safetensors, in which the layers alone differ from the base."""
    tensors = load_file(Path(task.partition("=")[2]) / "model.safetensors")
    layers = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.")}
    save(load_file(folder / "base.safetensors") | layers, folder / "w.safetensors")
    return save({name: tensor for name, tensor in tensors.items() if "classifier" not in name}, folder / "c.safetensors")


def again(folder: Path, task: str, made: Path) -> dict[str, tuple[str, str, Command]]:
    """Commands that read others' outputs: by name, the required output, the output's name and the command."""
    base: Command = ["-b", folder / "base.safetensors"]
    pack, sparse, sync = made / "pack.safetensors", made / "sparse.safetensors", ["--no-sync"]
    unpack = {
        name: ["unpack", made / name, *base, *OPTIONS] for name in ("sparse.safetensors", "lossless.safetensors", "mixed.safetensors")
    }
    return {
        "unpack sparse to a file": (sparse.name, "x.safetensors", unpack[sparse.name]),
        "unpack lossless to a folder": ("lossless.safetensors", "x", unpack["lossless.safetensors"]),
        "unpack mixed": ("mixed.safetensors", "x", unpack["mixed.safetensors"]),
        "unpack a pack": (pack.name, "x", ["unpack", pack, "--task", "a", *base, *OPTIONS]),
        "unpack masks": ("masks.safetensors", "x", ["unpack", made / "masks.safetensors", "--task", "a", *base, *OPTIONS]),
        "unpack an adapter": ("adapter", "x", ["unpack", made / "adapter", *base, *OPTIONS]),
        "unpack a head": ("merged", "x", ["unpack", made / "merged", "--task", "a", *OPTIONS]),
        "shuffle-pack --add-to": (
            "one.safetensors",
            "x.safetensors",
            ["shuffle-pack", task, "--add-to", made / "one.safetensors", *base, *OPTIONS],
        ),
        "svd-lora smaller": ("adapter", "x", ["svd-lora", made / "adapter", "--rank", "1", *OPTIONS]),
        "merge --lora": (
            "loras",
            "x",
            ["merge", f"a={made / 'loras' / 'a'}", f"b={made / 'loras' / 'b'}", "-m", "ties", "--lora", "core-space", *OPTIONS],
        ),
        "export to shira": ("layers.safetensors", "x", ["export", made / "layers.safetensors", "--to", "shira", *base, *sync]),
        "export to sglang": ("plain.safetensors", "weight_v000001", ["export", made / "plain.safetensors", "--to", "sglang", *base, *sync]),
        "export to prime-rl": (
            "plain.safetensors",
            "x",
            ["export", made / "plain.safetensors", "--to", "prime-rl", "--step", "1", *base, *sync],
        ),
    }


def loras(made: Path, size: tuple[int, int, int]) -> None:
    """Two LoRA adapters of rank 8 for models of this size, in PEFT's layout."""
    layers, rows, columns = size
    for number, task in enumerate("ab"):
        folder, noise = made / "loras" / task, torch.Generator().manual_seed(number)
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        table = {}
        for i in range(layers):
            table[f"base_model.model.layers.{i}.lora_A.weight"] = torch.randn(8, columns, generator=noise)
            table[f"base_model.model.layers.{i}.lora_B.weight"] = torch.randn(rows, 8, generator=noise)
        save(table, folder / "adapter_model.safetensors")
        targets = [f"layers.{i}" for i in range(layers)]
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": targets}))


def reading_only(folder: Path, tasks: list[str], made: Path) -> dict[str, tuple[str, Command]]:
    """Commands that write nothing: by name, the required output and the command."""
    base: Command = ["-b", folder / "base.safetensors"]
    sparse = made / "sparse.safetensors"
    return {
        "inspect": (sparse.name, ["inspect", tasks[0].partition("=")[2], *base]),
        "verify": (sparse.name, ["verify", sparse]),
        "eval of weights": (sparse.name, ["eval", sparse, *base, "--against", tasks[0].partition("=")[2]]),
    }


def with_data(folder: Path) -> Iterator[tuple[str, str | None, Command]]:
    """Commands that run models on examples: their names, their outputs' names and the commands."""
    apart(lambda: data_family.write_family(folder, count=4))  # its threads would be missed by the forks of this process
    data = [word for task in data_family.TASKS for word in ("--data", f"{task}={folder / task}.jsonl")]
    yield "merge regmean", "x", data_family.command(folder, "regmean", *OPTIONS)
    yield "merge --search", "x", [*data_family.command(folder, "ties", *OPTIONS, data=False), *data, "--search", "scale=0.5:1:0.5"]
    one: Command = ["prune", f"a={folder / 'a'}", "-b", folder / "base", "--data", folder / "a.jsonl", *OPTIONS]
    yield "prune --data", "x.safetensors", [*one, "--bits", "8"]
    yield "prune --min-quality --data", "x.safetensors", [*one, "--min-quality", "75%"]
    yield "eval on data", None, ["eval", folder / "a", "--data", folder / "a.jsonl"]
