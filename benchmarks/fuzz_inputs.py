"""Made-up inputs against prune, unpack, merge and shuffle-pack: right values, or a message; never a traceback, never a wrong answer.

    python benchmarks/fuzz_inputs.py --cases 500 --seed 0

Each case is a base and two fine-tunes with some of what the Hub has: other dtypes, FP8 in several layouts, prefixes, heads, tied heads
stored once or twice, buffers, integers, missing and extra tensors, grown vocabularies, husks, scales without codes, other configs, files
that are something else. What is right is computed here in plain torch, in float64, from the tensors before they were written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from peru_cli import cli
from peru_cli.console import console

Tensors = dict[str, torch.Tensor]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


@dataclass
class Case:
    """One family: what files hold (`stored`), what they mean (`values`), configs, and what must, or may, be refused and why."""

    stored: dict[str, Tensors]
    values: dict[str, Tensors]
    configs: dict[str, dict[str, object]]
    prefix: str = ""
    must: dict[str, str] = field(default_factory=dict)  # command -> why it must not succeed
    may: set[str] = field(default_factory=set)  # commands that may be refused
    merged: set[str] = field(default_factory=set)  # names that only the base has, or are left out
    traits: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)  # replaces a model's weights


def quantised(weight: torch.Tensor, layout: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Codes, companions by suffix of `weight`, and the float32 values that they stand for."""
    rows, columns = weight.shape
    if layout == "block":
        grid = -(-rows // 16), -(-columns // 16)
        scale = torch.rand(grid) * 0.02 + 0.001
        spread = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
        name, extra = "_scale_inv", {}
    elif layout == "row":
        scale = torch.rand(rows, 1) * 0.02 + 0.001
        spread, name, extra = scale, "_scale", {}
    else:
        scale = torch.rand(()) * 0.02 + 0.001
        spread, name, extra = scale, "_scale", {"#input_scale": torch.tensor(1.5)}
    codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, {name: scale, **extra}, codes.float() * spread


def make(rng: random.Random) -> Case:
    """A family with a few traits."""
    torch.manual_seed(rng.randrange(1 << 30))
    dtype = rng.choice(FLOATS)
    base: Tensors = {}
    for i in range(rng.randint(1, 3)):
        base[f"layers.{i}.up.weight"] = torch.randn(rng.choice([17, 40, 64]), rng.choice([16, 33]))
        base[f"layers.{i}.norm.weight"] = torch.ones(8) + 0.1 * torch.randn(8)
    base["embed_tokens.weight"] = torch.randn(30, 16)
    base = {n: t.to(dtype) for n, t in base.items()}
    fine = {}
    for task in "ab":
        fine[task] = {n: (t.float() + 0.05 * torch.randn(t.shape) * (torch.rand(t.shape) < 0.5)).to(dtype) for n, t in base.items()}
    models: dict[str, Tensors] = {"base": base, **fine}
    case = Case({}, models, {n: {"model_type": "made-up", "hidden_size": 16, "torch_dtype": str(dtype)[6:]} for n in models})
    for trait in rng.sample(sorted(TRAITS), rng.choice([0, 1, 1, 2, 2, 3])):
        TRAITS[trait](rng, case)
        case.traits.append(trait)
    for name, tensors in case.values.items():
        case.stored.setdefault(name, dict(tensors))
    if "fp8" in case.traits:
        quantise(rng, case)
    if case.prefix:
        for name in "ab":
            case.values[name] = {case.prefix + n: t for n, t in case.values[name].items()}
            case.stored[name] = {case.prefix + n: t for n, t in case.stored[name].items()}
    return case


def buffers(rng: random.Random, case: Case) -> None:
    for name, variance in (("base", 0.2), ("a", 0.05), ("b", 0.03)):
        case.values[name] |= {"bn.running_var": torch.full((8,), variance), "bn.running_mean": torch.randn(8)}
        case.values[name] |= {"rope.inv_freq": 1 / torch.arange(1.0, 9), "position_ids": torch.arange(9)}


def other_buffer(rng: random.Random, case: Case) -> None:
    for name in case.values:
        case.values[name]["x.inv_freq"] = torch.arange(4.0) + (name == "a")
    case.must["merge"] = "inv_freq differs"


def heads(rng: random.Random, case: Case) -> None:
    for i, name in enumerate("ab"):
        case.values[name]["classifier.weight"] = torch.randn(2 + i, 16).to(torch.float32)


def tied(rng: random.Random, case: Case) -> None:
    holders = rng.choice([["base"], ["a"], ["a", "b"], ["base", "a"]])
    for name in case.values:
        case.configs[name]["tie_word_embeddings"] = True
    for name in holders:
        case.values[name]["lm_head.weight"] = case.values[name]["embed_tokens.weight"].clone()
    case.merged.add("lm_head.weight")


def untied(rng: random.Random, case: Case) -> None:
    if "tied" in case.traits:
        return
    case.values["a"]["lm_head.weight"] = torch.randn(30, 16).to(case.values["a"]["embed_tokens.weight"].dtype)
    case.may |= {"merge", "pack"}


def extra(rng: random.Random, case: Case) -> None:
    case.values["a"]["adapter.extra"] = torch.randn(3)
    case.may |= {"merge", "pack", "prune"}


def missing(rng: random.Random, case: Case) -> None:
    del case.values["b"]["layers.0.up.weight"]
    case.must |= {"merge": "missing in b", "pack": "missing in b"}
    case.may.add("prune")


def dtypes(rng: random.Random, case: Case) -> None:
    other = rng.choice(FLOATS)
    if other is not case.values["base"]["embed_tokens.weight"].dtype:
        case.values["b"] = {n: t.to(other) if t.is_floating_point() else t for n, t in case.values["b"].items()}
        case.may |= {"merge", "pack"}


def prefix(rng: random.Random, case: Case) -> None:
    case.prefix = rng.choice(["model.", "bert.", "model.language_model."])


def fp8(rng: random.Random, case: Case) -> None:
    pass  # quantise() does it when all else is settled


def quantise(rng: random.Random, case: Case) -> None:
    layout = rng.choice(["block", "row", "tensor"])
    for name in rng.choice([["base", "a", "b"], ["a"], ["a", "b"]]):
        case.configs[name]["quantization_config"] = FP8
        kind = getattr(torch, str(case.configs[name]["torch_dtype"]))
        for n in [n for n in case.values[name] if n.endswith("up.weight")]:
            codes, companions, values = quantised(case.values[name][n].float(), layout)
            case.stored[name][n] = codes
            for suffix, tensor in companions.items():
                case.stored[name][n.removesuffix("weight") + suffix[1:] if suffix.startswith("#") else n + suffix] = tensor
            case.values[name][n] = values.to(kind)
    if rng.random() < 0.15:
        lost = rng.choice(sorted(n for n in case.stored["a"] if n.endswith(("_scale", "_scale_inv")) and "input" not in n))
        del case.stored["a"][lost]
        case.must |= dict.fromkeys(("prune a", "merge", "pack"), f"{lost} is lost")


def grown(rng: random.Random, case: Case) -> None:
    table = case.values["a"]["embed_tokens.weight"]
    case.values["a"]["embed_tokens.weight"] = torch.cat([table, torch.randn(2, 16).to(table.dtype)])
    case.configs["a"]["vocab_size"], case.configs["base"]["vocab_size"] = 32, 30
    case.must |= {"merge": "rows differ", "pack": "rows differ"}


def config(rng: random.Random, case: Case) -> None:
    case.configs["b"][rng.choice(["rope_theta", "num_attention_heads", "hidden_act"])] = 7
    case.must["merge"] = "configs differ"


def husk(rng: random.Random, case: Case) -> None:
    case.values["a"]["layers.0.norm.weight"] = torch.empty(0)
    case.must |= dict.fromkeys(("prune a", "merge", "pack"), "a husk")


def strange(rng: random.Random, case: Case) -> None:
    case.files["a"] = rng.choice(
        [b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", b"<html>", b"GGUF" + bytes(60), b"", b"{}"]
    )
    case.must |= dict.fromkeys(("prune a", "merge", "pack"), "no weights")


def foreign(rng: random.Random, case: Case) -> None:
    case.values["a"] |= rng.choice([{"z.weight.absmax": torch.ones(2)}, {"z.qweight": torch.zeros(2, 2).int()}, {"z.SCB": torch.ones(2)}])
    case.must |= dict.fromkeys(("prune a", "merge", "pack"), "a scheme that is not read")


TRAITS = {
    f.__name__: f
    for f in (buffers, other_buffer, heads, tied, untied, extra, missing, dtypes, prefix, fp8, grown, config, husk, strange, foreign)
}  # fmt: skip


def peru(*arguments: object) -> tuple[int, str]:
    """Run a command in this process: its exit code, and what it says."""
    console.quiet = console.json = console.data_on_stderr = False
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(a) for a in arguments])
    return code, err.getvalue()


class Wrong(Exception):
    """What peru did is not right."""


def judge(case: Case, command: str, code: int, said: str) -> bool:
    """Whether the command succeeded, as it should have; Wrong if it should not have, or failed badly."""
    if "Traceback" in said or "defect" in said:
        raise Wrong(f"{command}: a traceback or a defect\n{said}")
    if code and command not in case.must and command.split()[0] not in case.may:
        raise Wrong(f"{command}: refused for no reason\n{said}")
    if not code and command in case.must:
        raise Wrong(f"{command}: should have been refused ({case.must[command]})")
    return not code


def bare(case: Case, name: str) -> str:
    return name.removeprefix(case.prefix)


def close(got: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> None:
    if got.shape != expected.shape:
        raise Wrong(f"{what}: shape {list(got.shape)}, not {list(expected.shape)}")
    error = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    if not error <= tolerance:
        raise Wrong(f"{what}: off by {error}")


def octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def is_buffer(name: str) -> bool:
    return name.endswith(("running_var", "running_mean", "inv_freq", "position_ids"))


def check_pruned(case: Case, got: Tensors, task: str, density: float) -> None:
    """Kept entries are the fine-tune's, the others the base's, and the largest changes were kept; what does not pair is whole."""
    fine, base = case.values[task], case.values["base"]
    if sorted(got) != sorted(fine):
        raise Wrong(f"prune: other tensors {sorted(set(got) ^ set(fine))}")
    kept, changed, entries, least, most = 0, 0, 0, float("inf"), 0.0
    for name, tensor in fine.items():
        other = base.get(bare(case, name))
        if got[name].dtype is not tensor.dtype:
            raise Wrong(f"prune: {name} is {got[name].dtype}, not {tensor.dtype}")
        if other is None or is_buffer(name) or not tensor.is_floating_point():
            close(got[name], tensor, f"prune: {name}", 0)
            continue
        rows = other.shape[0]
        if tensor.shape[1:] != other.shape[1:] or (tensor.shape[0] != rows and "embed" not in name):
            close(got[name], tensor, f"prune: {name}", 0)
            continue
        close(got[name][rows:], tensor[rows:], f"prune: new rows of {name}", 0)
        a, b, c = (t.reshape(-1).double() for t in (got[name][:rows], tensor[:rows], other.to(tensor.dtype)))
        wide = tensor.dtype is torch.float32
        here = (a - c).abs() > 0
        close(a[here], b[here], f"prune: kept entries of {name}", 2**-8 * float((b - c).abs().max()) if wide else 0)
        keys = (b.float() - c.float()).abs()
        kept, changed, entries = kept + int(here.sum()), changed + int((b != c).sum()), entries + len(b)
        least = min(least, float(keys[here].min()) if here.any() else least)
        most = max(most, float(keys[~here].max()) if (~here).any() else most)
    if kept != min(int(density * entries), changed) or most > least:
        raise Wrong(f"prune: {kept} of {changed} changed entries kept, from {least} up; the largest left out is {most}")


def check_merged(case: Case, got: Tensors, scale: float | None) -> None:
    """base + scale (a + b - 2 base), or with None the mean of a and b; buffers by their own rule."""
    base = {n: t for n, t in case.values["base"].items() if n not in case.merged}
    if sorted(got) != sorted(base):
        raise Wrong(f"merge: other tensors {sorted(set(got) ^ set(base))}")
    for name, tensor in base.items():
        tasks = [case.values[t].get(case.prefix + name) for t in "ab"]
        if any(t is None or t.shape != tensor.shape for t in tasks):
            close(got[name], tensor, f"merge: {name}", 0)
            continue
        a, b = (t.double() for t in tasks)
        if not tensor.is_floating_point() or name.endswith("inv_freq"):
            expected = tensor.double()
        elif is_buffer(name):
            expected = (a + b) / 2
        else:
            expected = tensor.double() + scale * (a + b - 2 * tensor.double())
        step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(got[name].dtype, 2**-22)
        close(got[name], expected, f"merge: {name}", 2 * step * float(expected.abs().max()) + 1e-6)


def check_packed(case: Case, got: Tensors, task: str) -> None:
    """The sum of all differences on the base, for each task; its own tensors whole."""
    fine = {n: t for n, t in case.values[task].items() if bare(case, n) not in case.merged}
    lacking = set(fine) ^ set(got)
    if lacking:
        raise Wrong(f"pack: other tensors {sorted(lacking)}")
    for name, tensor in fine.items():
        base = case.values["base"].get(bare(case, name))
        tasks = [case.values[t].get(name) for t in "ab"]
        if base is None or is_buffer(name) or any(t is None or t.shape != base.shape for t in tasks) or not tensor.is_floating_point():
            close(got[name], tensor, f"pack: {name}", 0)
            continue
        a, b, c = (t.double() for t in (*tasks, base))
        expected = c + a + b - 2 * c
        step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(got[name].dtype, 2**-22)
        size = float((expected - c).square().mean().sqrt())
        close(got[name], expected, f"pack: {name}", 2 * step * float(expected.abs().max()) + 0.05 * size + 1e-6)


def run(case: Case, folder: Path, density: float) -> Counter[str]:
    """All commands on a case; how many succeeded and were refused."""
    paths = {}
    for name, tensors in case.stored.items():
        paths[name] = folder / name
        paths[name].mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, paths[name] / "model.safetensors", {"format": "pt"})
        (paths[name] / "config.json").write_text(json.dumps(case.configs[name]))
        if name in case.files:
            (paths[name] / "model.safetensors").write_bytes(case.files[name])
    count: Counter[str] = Counter()
    at = ["-b", paths["base"], "--no-sync", "--threads", 1, "--force"]
    for task in "ab":
        code, said = peru("prune", paths[task], *at, "-o", folder / "x.safetensors", "--keep", density)
        fine = judge(case, f"prune {task}", code, said)
        count["prune" if fine else "prune refused"] += 1
        if fine:
            code, said = peru("unpack", folder / "x.safetensors", *at, "-o", folder / "x")
            if code:
                raise Wrong(f"unpack: {said}")
            check_pruned(case, load_file(folder / "x" / "model.safetensors"), task, density)
            if "quantization_config" in json.loads((folder / "x" / "config.json").read_text()):
                raise Wrong("unpack: the config speaks of quantisation")
            code, said = peru("prune", paths[task], *at, "-o", folder / "l.safetensors", "--lossless")
            if code:
                raise Wrong(f"lossless: {said}")
            code, said = peru("unpack", folder / "l.safetensors", *at, "-o", folder / "l")
            got = load_file(folder / "l" / "model.safetensors") if not code else {}
            raw = got.keys() == case.stored[task].keys()
            for name, tensor in (case.stored if raw else case.values)[task].items():
                if name not in got or not torch.equal(octets(got[name]), octets(tensor)):
                    raise Wrong(f"lossless: {name} differs {said}")
    models = [f"{t}={paths[t]}" for t in "ab"]
    scale = 0.5
    code, said = peru("merge", *models, *at, "-o", folder / "m", "-m", "task-arithmetic", "--scale", scale)
    fine = judge(case, "merge", code, said)
    count["merge" if fine else "merge refused"] += 1
    if fine:
        check_merged(case, load_file(folder / "m" / "model.safetensors"), scale)
    code, said = peru("shuffle-pack", *models, *at, "-o", folder / "p.safetensors", "--decorrelate", "none", "--no-signs")
    fine = judge(case, "pack", code, said)
    count["pack" if fine else "pack refused"] += 1
    for task in "ab" if fine else "":
        code, said = peru("unpack", folder / "p.safetensors", "--task", task, *at, "-o", folder / "p")
        if code:
            raise Wrong(f"unpack of a pack: {said}")
        check_packed(case, load_file(folder / "p" / "model.safetensors"), task)
    return count


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count: Counter[str] = Counter()
    wrong = 0
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        rng = random.Random(seed)
        folder = Path(tempfile.mkdtemp(prefix="peru-fuzz-"))
        case = None
        try:
            case = make(rng)
            count += run(case, folder, rng.choice([0.05, 0.3, 0.9]))
        except Wrong as error:
            wrong += 1
            print(f"seed {seed} {case.traits if case else ''}: {error}\n", flush=True)
        except Exception:
            wrong += 1
            print(f"seed {seed} {case.traits if case else ''}:\n{traceback.format_exc()}", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{arguments.cases} cases, {wrong} wrong; " + ", ".join(f"{n} {name}" for name, n in sorted(count.items())))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
