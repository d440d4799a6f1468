"""Made-up families: a base and two fine-tunes with some of the Hub's variety, and what each of them means in plain torch."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from quantised import quantise
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
WEIGHTS = "model.safetensors"


@dataclass
class Family:
    """What files hold (`stored`), what they mean (`values`, under the names of the output), and what must or may be refused.

    A command is named in `must` and `may` by its verb: prune, merge, pack. Every command that reads a model of `broken` must refuse it."""

    stored: dict[str, Tensors]
    values: dict[str, Tensors]
    configs: dict[str, dict[str, object]]
    prefix: str = ""
    rename: str | None = None  # the --rename rule that makes the names pair
    must: dict[str, str] = field(default_factory=dict)
    may: set[str] = field(default_factory=set)
    broken: dict[str, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)  # model -> what a command that reads it must print
    left_out: set[str] = field(default_factory=set)  # names that a merge leaves out: tied heads
    traits: list[str] = field(default_factory=list)
    layout: str = ""  # of FP8 weights (quantised.py)
    form: dict[str, str] = field(default_factory=dict)  # the form of a model's files
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # more files of a model, or replacements of its weights

    def bare(self, name: str) -> str:
        """The base's name for a fine-tune's tensor."""
        return name.removeprefix(self.prefix)


def make(rng: random.Random, traits: int | None = None) -> Family:
    """A family with up to three traits."""
    torch.manual_seed(rng.randrange(1 << 30))
    dtype = rng.choice(FLOATS)
    base: Tensors = {}
    for i in range(rng.randint(1, 3)):
        base[f"layers.{i}.up.weight"] = torch.randn(rng.choice([17, 40, 64]), rng.choice([16, 33]))
        base[f"layers.{i}.norm.weight"] = torch.ones(8) + 0.1 * torch.randn(8)
    base["embed_tokens.weight"] = torch.randn(30, 16)
    base = {n: t.to(dtype) for n, t in base.items()}
    models: dict[str, Tensors] = {"base": base}
    for task in "ab":
        models[task] = {n: (t.float() + 0.05 * torch.randn(t.shape) * (torch.rand(t.shape) < 0.5)).to(dtype) for n, t in base.items()}
    config = {"model_type": "made-up", "hidden_size": 16, "torch_dtype": str(dtype)[6:]}
    family = Family({}, models, {n: dict(config) for n in models})
    for trait in rng.sample(sorted(TRAITS), rng.choice([0, 1, 1, 2, 2, 3]) if traits is None else traits):
        TRAITS[trait](rng, family)
        family.traits.append(trait)
    for name, tensors in family.values.items():
        family.stored[name] = dict(tensors)
    if "fp8" in family.traits:
        quantise(rng, family)
        family.form = {name: "bin" if form == "bin old" else form for name, form in family.form.items()}  # torch itself cannot read them
    for name in "ab":
        family.values[name] = {family.prefix + n: t for n, t in family.values[name].items()}
        written = {n.replace("layers.", "blocks.") if family.rename else n: t for n, t in family.stored[name].items()}
        family.stored[name] = {family.prefix + n: t for n, t in written.items()}
    return family


def write(family: Family, folder: Path) -> dict[str, Path]:
    """Write a family's files into a folder. Returns the path of each model."""
    paths = {}
    for name, tensors in family.stored.items():
        path = paths[name] = folder / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(family.configs[name]))
        _save(path, {n: t.contiguous() for n, t in tensors.items()}, family.form.get(name, "one"))
        for file, data in family.files.get(name, {}).items():
            (path / file).write_bytes(data)
    return paths


def _save(path: Path, tensors: Tensors, form: str) -> None:
    if form == "shards":
        names = sorted(tensors)
        parts = [names[: len(names) // 2], names[len(names) // 2 :]]
        shards = {f"model-0000{i + 1}-of-00002.safetensors": part for i, part in enumerate(parts)}
        for file, part in shards.items():
            save_file({n: tensors[n] for n in part}, path / file)
        table = {n: file for file, part in shards.items() for n in part}
        (path / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    elif form.startswith("bin"):
        torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    elif form == "one":
        save_file(tensors, path / WEIGHTS, {"format": "pt"})


def _break(family: Family, reason: str, model: str = "a") -> None:
    family.broken[model] = reason


def buffers(rng: random.Random, family: Family) -> None:
    for name, variance in (("base", 0.2), ("a", 0.05), ("b", 0.03)):
        family.values[name] |= {"bn.running_var": torch.full((8,), variance), "bn.running_mean": torch.randn(8)}
        family.values[name] |= {"rope.inv_freq": 1 / torch.arange(1.0, 9), "position_ids": torch.arange(9)}


def other_buffer(rng: random.Random, family: Family) -> None:
    for name in family.values:
        family.values[name]["x.inv_freq"] = torch.arange(4.0) + (name == "a")
    family.must["merge"] = "inv_freq differs"


def other_integers(rng: random.Random, family: Family) -> None:
    for name in family.values:
        family.values[name]["table"] = torch.arange(4) + (name == "a")
    family.must |= {"merge": "integers differ", "pack": "integers differ"}


def odd_dtypes(rng: random.Random, family: Family) -> None:
    for name in family.values:
        family.values[name] |= {"mask": torch.tensor([True, False]), "small": torch.arange(4, dtype=torch.int8), "step": torch.tensor(7)}


def wide(rng: random.Random, family: Family) -> None:
    for name in family.values:
        family.values[name] = {n: t.double() if "norm" in n else t for n, t in family.values[name].items()}


def shapes(rng: random.Random, family: Family) -> None:
    for name in family.values:
        family.values[name] |= {"scale": torch.tensor(1.0 + len(name)), "none.weight": torch.zeros(0, 16)}
        family.values[name]["conv.weight"] = torch.randn(4, 3, 2, 2)


def heads(rng: random.Random, family: Family) -> None:
    for i, name in enumerate("ab"):
        family.values[name]["classifier.weight"] = torch.randn(2 + i, 16).to(torch.float32)


def tied(rng: random.Random, family: Family) -> None:
    for name in family.values:
        family.configs[name]["tie_word_embeddings"] = True
    for name in rng.choice([["base"], ["a"], ["a", "b"], ["base", "a"]]):
        family.values[name]["lm_head.weight"] = family.values[name]["embed_tokens.weight"].clone()
    family.left_out.add("lm_head.weight")


def untied(rng: random.Random, family: Family) -> None:
    if "tied" not in family.traits:
        family.values["a"]["lm_head.weight"] = torch.randn(30, 16).to(family.values["a"]["embed_tokens.weight"].dtype)
        family.may |= {"merge", "pack"}


def extra(rng: random.Random, family: Family) -> None:
    family.values["a"]["adapter.extra"] = torch.randn(rng.choice([3, 900]))
    family.may |= {"merge", "pack", "prune"}


def missing(rng: random.Random, family: Family) -> None:
    del family.values["b"]["layers.0.up.weight"]
    family.must |= {"merge": "missing in b", "pack": "missing in b"}
    family.may.add("prune")


def dtypes(rng: random.Random, family: Family) -> None:
    other = rng.choice(FLOATS)
    if other is not family.values["base"]["embed_tokens.weight"].dtype:
        family.values["b"] = {n: t.to(other) if t.is_floating_point() else t for n, t in family.values["b"].items()}
        family.may |= {"merge", "pack"}


def prefix(rng: random.Random, family: Family) -> None:
    family.prefix = rng.choice(["model.", "bert.", "model.language_model."])


def renamed(rng: random.Random, family: Family) -> None:
    family.rename = r"(^|\.)blocks\.=\1layers."


def fp8(rng: random.Random, family: Family) -> None:
    pass  # quantise() does it at the end


def grown(rng: random.Random, family: Family) -> None:
    table = family.values["a"]["embed_tokens.weight"]
    family.values["a"]["embed_tokens.weight"] = torch.cat([table, torch.randn(2, 16).to(table.dtype)])
    family.configs["a"]["vocab_size"], family.configs["base"]["vocab_size"] = 32, 30
    family.must |= {"merge": "rows differ", "pack": "rows differ"}


def config(rng: random.Random, family: Family) -> None:
    family.configs["b"][rng.choice(["rope_theta", "num_attention_heads", "hidden_act"])] = 7
    family.must["merge"] = "configs differ"


def tokens(rng: random.Random, family: Family) -> None:
    plain = {f"t{i}": i for i in range(28)}
    other = plain | ({"<a>": 28, "<b>": 29} if rng.random() < 0.5 else {"<b>": 28, "<a>": 29})
    for name in family.values:
        family.files.setdefault(name, {})["vocab.json"] = json.dumps(other if name == "b" else plain | {"<a>": 28, "<b>": 29}).encode()
    if other["<a>"] != 28:
        family.must |= {"merge": "tokens disagree", "pack": "tokens disagree"}


def nans(rng: random.Random, family: Family) -> None:
    for name in ["layers.0.up.weight", "embed_tokens.weight"]:
        if name in family.values["a"]:
            family.values["a"][name][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    family.may |= {"pack", "merge", "prune"}


def husk(rng: random.Random, family: Family) -> None:
    family.values["a"]["layers.0.norm.weight"] = torch.empty(0)
    _break(family, "a husk")


def strange(rng: random.Random, family: Family) -> None:
    kinds = [b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", b"<html>", b"GGUF" + bytes(60), b"", b"{}", bytes(99)]
    if "stray" in family.traits:
        return
    family.form.pop("a", None)
    family.files.setdefault("a", {})[WEIGHTS] = rng.choice(kinds)
    _break(family, "no weights")


UNREAD = "a scheme that is not read"


def foreign(rng: random.Random, family: Family) -> None:
    kinds = [{"z.weight.absmax": torch.ones(2)}, {"z.qweight": torch.zeros(2, 2).int()}, {"z.SCB": torch.ones(2)}]
    kinds += [{"z.weight_packed": torch.zeros(2, 2).int()}, {"z.g_idx": torch.zeros(2).int()}, {"z.W_q": torch.zeros(2, 2).byte()}]
    family.values["a"] |= rng.choice(kinds)
    _break(family, UNREAD)


def forms(rng: random.Random, family: Family) -> None:
    for name in family.values:
        if not {"strange", "stray"} & set(family.traits):
            family.form[name] = rng.choice(["one", "shards", "bin", "bin old"])


def stray(rng: random.Random, family: Family) -> None:
    """Files of a second model beside the first: either peru says which one counts, or both are refused."""
    junk = {n: t + 1 if t.is_floating_point() else t for n, t in family.values["a"].items()}
    here = family.files.setdefault("a", {})
    kind = rng.choice(["index", "indices", "bin", "adapter", "shard lost", "two files"])
    if "a" in family.form or "strange" in family.traits:
        return
    if kind == "index":  # the single file counts, as in transformers
        here["model-00001-of-00001.safetensors"] = _bytes(junk)
        here[f"{WEIGHTS}.index.json"] = _index(junk, "model-00001-of-00001.safetensors")
        family.said["a"] = WEIGHTS
    elif kind == "bin":
        here["pytorch_model.bin"] = b"never read"
    elif kind == "adapter":
        here |= {"adapter_config.json": b'{"peft_type": "LORA", "r": 2}', "adapter_model.safetensors": _bytes({"x": torch.ones(1)})}
        _break(family, "an adapter beside the model")
    else:
        family.form["a"] = "none"
        if kind == "two files":
            here |= {"one.safetensors": _bytes(junk), "two.safetensors": _bytes(junk)}
        elif kind == "indices":
            for variant in ("fp16", "ema"):
                here[f"model.safetensors.index.{variant}.json"] = _index(junk, "model-00001-of-00001.safetensors")
            here["model-00001-of-00001.safetensors"] = _bytes(junk)
        else:
            here[f"{WEIGHTS}.index.json"] = _index(junk, "model-00009-of-00009.safetensors")
        _break(family, kind)


def _bytes(tensors: Tensors) -> bytes:
    from safetensors.torch import save

    return save({n: t.contiguous() for n, t in tensors.items()})


def _index(tensors: Tensors, shard: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}).encode()


TRAITS = {
    f.__name__: f
    for f in (
        buffers, other_buffer, other_integers, odd_dtypes, wide, shapes, heads, tied, untied, extra, missing, dtypes, prefix, renamed, fp8,
        grown, config, tokens, nans, husk, strange, foreign, forms, stray,
    )
}  # fmt: skip
