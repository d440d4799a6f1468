"""Each command on a case: whether it should have succeeded, and whether its output is right."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import families
import quantised
import right
import torch
from right import Wrong
from safetensors.torch import load_file

from peru_cli import cli
from peru_cli.console import console

Tensors = dict[str, torch.Tensor]
FIXED = ["--no-sync", "--threads", 1, "--force"]


def peru(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process: its exit code, standard output, and messages."""
    console.quiet = console.json = console.data_on_stderr = False
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


def judge(command: str, answer: tuple[int, str, str], named: list[str], must: str | None = None, may: bool = False) -> bool:
    """Whether the command succeeded, as it should have. Wrong if it should not have, or if it failed badly or without a name."""
    code, _, said = answer
    if "Traceback" in said or "defect" in said:
        raise Wrong(f"{command}: a traceback or a defect\n{said}")
    if code and must is None and not may:
        raise Wrong(f"{command}: refused for no reason\n{said}")
    if not code and must is not None:
        raise Wrong(f"{command}: should have been refused ({must})\n{said}")
    if code:
        error = said[said.find("error:") :].replace("\n", "")
        if not any(name in error for name in named) or len(error) < 40:
            raise Wrong(f"{command}: names neither file nor tensor\n{said}")
    return not code


def done(command: str, answer: tuple[int, str, str]) -> str:
    """Standard output of a command that must succeed."""
    if answer[0]:
        raise Wrong(f"{command}: failed\n{answer[2]}")
    return answer[1]


class Run:
    """One family in a folder, and commands on it."""

    def __init__(self, rng: random.Random, folder: Path, count: Counter[str]) -> None:
        self.family, self.folder, self.rng, self.count = families.make(rng), folder, rng, count
        self.paths = families.write(self.family, folder)
        self.base = ["-b", self.paths["base"]]
        every = {n for t in (*self.family.stored.values(), *self.family.values.values()) for n in t}
        self.named = [str(folder), *every]
        self.renames = self.family.rename is not None and rng.random() < 0.7

    def judge(self, verb: str, command: str, answer: tuple[int, str, str], models: str) -> bool:
        """Like `judge`, for a command that reads some of the models and the base."""
        family = self.family
        broken = [family.broken[m] for m in models if m in family.broken]
        must = broken[0] if broken else family.must.get(verb)
        if family.rename is not None and not self.renames and not (verb == "prune" and "missing" in family.traits and models == "b"):
            must = must or "names differ"
        fine = judge(command, answer, self.named, must, verb in family.may)
        if fine and any(family.said.get(m, "") not in answer[2] for m in models):
            raise Wrong(f"{command}: a word is missing\n{answer[2]}")
        self.count[command if fine else f"{command} refused"] += 1
        return fine

    def rename(self) -> list[object]:
        return ["--rename", self.family.rename] if self.renames else []

    def out(self, name: str) -> Path:
        return self.folder / f"out-{name}"

    def unpack(self, artifact: Path, *more: object) -> Tensors:
        """The unpacked artifact."""
        place = self.out("unpacked")
        done("unpack", peru("unpack", artifact, *self.base, *FIXED, "-o", place, *more))
        if "quantization_config" in json.loads((place / "config.json").read_text()):
            raise Wrong("unpack: the config speaks of quantisation")
        return load_file(place / families.WEIGHTS)

    def prune(self) -> None:
        task, density, scope = self.rng.choice("ab"), self.rng.choice([0.05, 0.3, 0.9]), self.rng.choice(["global", "tensor"])
        place = self.out("p.safetensors")
        answer = peru("prune", self.paths[task], *self.base, *FIXED, *self.rename(), "-o", place, "-k", density, "--scope", scope)
        if self.judge("prune", "prune", answer, task):
            right.pruned(self.family, self.unpack(place), task, density, scope == "tensor")

    def lossless(self) -> None:
        task, place, family = self.rng.choice("ab"), self.out("l.safetensors"), self.family
        unread = family.broken.get(task) == families.UNREAD
        if unread and quantised.has_codes(family.stored["base"]):
            del family.broken[task]  # codes of any scheme are kept unchanged if the base has codes, too
        answer = peru("prune", self.paths[task], *self.base, *FIXED, *self.rename(), "-o", place, "--lossless")
        if not self.judge("prune", "lossless", answer, task):
            return
        out = self.out("lossless")
        done("unpack", peru("unpack", place, *self.base, *FIXED, "-o", out))
        got = load_file(out / families.WEIGHTS)
        renamed = {n.replace("blocks.", "layers."): t for n, t in family.stored[task].items()}
        raw = got.keys() == renamed.keys() and all(got[n].dtype is renamed[n].dtype for n in got)
        right.same_bits(got, renamed if raw else family.values[task], "lossless")
        if self.rng.random() < 0.3 and not unread:  # and the artifact replaces the fine-tune elsewhere
            self.compare(place, task)

    def bits(self) -> None:
        task, place = self.rng.choice("ab"), self.out("b.safetensors")
        answer = peru("prune", self.paths[task], *self.base, *FIXED, *self.rename(), "-o", place, "--min-quality", "70%")
        if self.judge("prune", "bits", answer, task):
            right.nearer(self.family, self.unpack(place), task)

    def merge(self) -> None:
        method = self.rng.choice(sorted(right.METHODS))
        models = [f"{t}={self.paths[t]}" for t in "ab"]
        place, family = self.out("m"), self.family
        fp8 = quantised.has_codes(family.stored["base"]) and family.layout != "int8" and self.rng.random() < 0.5
        dtype = ["--dtype", "fp8"] if fp8 else []
        answer = peru("merge", *models, *self.base, *FIXED, *self.rename(), "-o", place, "-m", method, *right.OPTIONS[method], *dtype)
        if "nans" in family.traits and fp8:
            family.may.add("merge")
        if self.judge("merge", f"merge {method}{' fp8' * fp8}", answer, "ab"):
            got = load_file(place / families.WEIGHTS)
            if not fp8:
                right.merged(family, got, method)
                return
            right.names(got, set(family.stored["base"]) - family.left_out, "merge fp8")
            right.merged(family, quantised.decoded(got, family.layout), method, 2**-3 if family.layout == "e5m2" else 2**-4)

    def merge_others(self) -> None:
        """Methods without a reference here: names, shapes and finite values."""
        method = self.rng.choice(["slerp", "dare", "breadcrumbs", "model-stock", "tsv-m", "sce", "karcher", "consensus", "della"])
        place = self.out("m")
        answer = peru("merge", *[f"{t}={self.paths[t]}" for t in "ab"], *self.base, *FIXED, *self.rename(), "-o", place, "-m", method)
        if self.judge("merge", f"merge {method}", answer, "ab"):
            got = load_file(place / families.WEIGHTS)
            base = {n: t for n, t in self.family.values["base"].items() if n not in self.family.left_out}
            right.names(got, set(base), method)
            for name, tensor in base.items():
                if got[name].shape != tensor.shape or ("nans" not in self.family.traits and not got[name].double().isfinite().all()):
                    raise Wrong(f"merge {method}: {name} is not finite, or of another shape")

    def pack(self) -> None:
        place = self.out("pack.safetensors")
        how = ["--decorrelate", "none", "--no-signs"]
        answer = peru("shuffle-pack", *[f"{t}={self.paths[t]}" for t in "ab"], *self.base, *FIXED, *self.rename(), "-o", place, *how)
        if self.judge("pack", "pack", answer, "ab"):
            for task in "ab":
                right.packed(self.family, self.unpack(place, "--task", task), task)

    def svd_lora(self) -> None:
        """Factors of every worthwhile matrix and the rest as a delta together give the fine-tune, except for the error of the rank."""
        task, place = self.rng.choice("ab"), self.out("lora")
        how = ["--rank", "2", "--rest", "delta"]
        answer = peru("svd-lora", self.paths[task], *self.base, "--no-sync", "--force", "-o", place, *how)
        renames, self.renames = self.renames, False
        self.family.may.add("svd")  # nothing may be left to factor, or not as an adapter
        fine = self.judge("svd", "svd-lora", answer, task)
        self.renames = renames
        if fine:
            family = self.family
            got, fine = self.unpack(place), family.values[task]
            kept = "warning:" in answer[2] and "kept as in the base" in answer[2]
            stay = {family.prefix + n for n in family.values["base"]} if kept else set()
            right.names({n: t for n, t in got.items() if n in fine or n not in stay}, set(fine), "svd-lora")
            for name, tensor in fine.items():
                if not any(part in name for part in ("up", "embed", "conv", "lm_head")):
                    right.rounded(got[name], tensor.double(), f"svd-lora: {name}")

    def inspect(self) -> None:
        task = self.rng.choice(["base", "a", "b"])
        answer = peru("inspect", self.paths[task], "--json")
        broken = task in self.family.broken
        if judge("inspect", answer, self.named, None, broken):
            json.loads(answer[1])
        if task != "base":
            answer = peru("inspect", self.paths[task], *self.base, "--json")
            must = self.family.broken.get(task)
            if judge("inspect", answer, self.named, must, "prune" in self.family.may or self.family.rename is not None):
                changes = {c["name"]: c for c in json.loads(answer[1])["changes"]}
                self.changes(task, changes)
        self.count["inspect"] += 1

    def changes(self, task: str, changes: dict[str, Any]) -> None:
        """Changed entries, counted by tensor."""
        for name, tensor in self.family.values[task].items():
            other = self.family.values["base"].get(self.family.bare(name))
            if name in changes and other is not None and other.shape == tensor.shape and tensor.is_floating_point():
                bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
                count = int((tensor.contiguous().view(bits) != other.to(tensor.dtype).contiguous().view(bits)).sum())
                if changes[name]["changed"] != count:
                    raise Wrong(f"inspect: {name} has {changes[name]['changed']} changed entries, not {count}")

    def compare(self, artifact: Path, task: str) -> None:
        """A lossless artifact is the fine-tune for eval and merge."""
        if self.renames or "nans" in self.family.traits:
            return
        said = done("eval", peru("eval", f"x={artifact}", *self.base, "-a", self.paths[task], "--json"))
        total = json.loads(said)["weights"]["x"]["total"]
        if total["error"] not in (0, None):
            raise Wrong(f"eval: a lossless artifact has the error {total['error']}")
        self.count["eval"] += 1


class AdapterRun:
    """One adapter in a folder, and the commands that read adapters."""

    def __init__(self, rng: random.Random, folder: Path, count: Counter[str]) -> None:
        self.made, self.folder, self.count = adapters.make(rng), folder, count
        self.base, self.adapter = adapters.write(self.made, folder)
        # kohya and others name modules without dots
        self.named = [str(folder), *self.made.tensors, "adapter_config.json"]

    def judge(self, command: str, answer: tuple[int, str, str], may: bool = False) -> bool:
        fine = judge(command, answer, self.named, self.made.broken, may)
        self.count[f"{command} {self.made.layout}" + ("" if fine else " refused")] += 1
        return fine

    def check(self, got: Tensors, what: str, scale: float = 1.0, extra: float = 0.0) -> None:
        right.names(got, set(self.made.base), what)
        for name, wanted in self.made.wanted.items():
            base = self.made.base[name].double()
            whole = got[name].dtype is torch.float32 and what != "merge"  # saved modules and .set_weight keep their own type
            if got[name].dtype is not self.made.base[name].dtype and not whole:
                raise Wrong(f"{what}: {name} is {got[name].dtype}")
            size = float((wanted - base).abs().max()) if wanted.numel() else 0.0
            right.rounded(got[name], base + scale * (wanted - base), f"{what} of {self.made.layout}: {name}", extra * size)

    def unpack(self) -> None:
        place = self.folder / "out"
        if self.judge("unpack", peru("unpack", self.adapter, "-b", self.base, *FIXED, "-o", place)):
            self.check(load_file(place / families.WEIGHTS), "unpack")

    def merge(self) -> None:
        place = self.folder / "out"
        answer = peru("merge", f"a={self.adapter}", "-b", self.base, *FIXED, "-o", place, "-m", "task-arithmetic", "--scale", "0.5")
        if self.judge("merge", answer):
            self.check(load_file(place / families.WEIGHTS), "merge", 0.5)

    def prune(self) -> None:
        place, out = self.folder / "p.safetensors", self.folder / "out"
        if self.judge("lossless", peru("prune", self.adapter, "-b", self.base, *FIXED, "-o", place, "--lossless")):
            done("unpack", peru("unpack", place, "-b", self.base, *FIXED, "-o", out))
            self.check(load_file(out / families.WEIGHTS), "lossless")

    def resize(self) -> None:
        """At its own rank, svd-lora gives an adapter with the same product."""
        made = self.made
        small = self.folder / ("small" if made.config is not None else "small.safetensors")
        base = [] if made.low_rank else ["-b", self.base]
        answer = peru("svd-lora", self.adapter, *base, "--no-sync", "--force", "-o", small, "--rank", "4")
        keeps = made.broken in (None, "key", "module", "shape", "no config")  # without a base it cannot tell
        fine = judge("svd-lora", answer, self.named, None if keeps else made.broken, made.broken is not None or not made.low_rank)
        if not fine or made.broken or not made.low_rank:
            return
        self.count[f"svd-lora {made.layout}"] += 1
        done("unpack", peru("unpack", small, "-b", self.base, *FIXED, "-o", self.folder / "out"))
        self.check(load_file(self.folder / "out" / families.WEIGHTS), "svd-lora", extra=0.02)

    def inspect(self) -> None:
        answer = peru("inspect", self.adapter, "--json")
        if judge("inspect", answer, self.named, None, self.made.broken is not None or not self.made.low_rank):
            json.loads(answer[1])
        self.count["inspect adapter"] += 1

    def evaluate(self) -> None:
        """Compared with unpack's output, the adapter has no error."""
        if self.made.broken is None:
            out = self.folder / "out"
            done("unpack", peru("unpack", self.adapter, "-b", self.base, *FIXED, "-o", out))
            said = done("eval", peru("eval", f"x={self.adapter}", "-b", self.base, "-a", out, "--json"))
            error = json.loads(said)["weights"]["x"]["total"]["error"]
            kind = {n: t.dtype for n, t in self.made.base.items()}
            lost = sum(float((w - w.to(kind[n]).double()).square().sum()) for n, w in self.made.wanted.items())
            added = sum(float((w - self.made.base[n].double()).square().sum()) for n, w in self.made.wanted.items())
            if error is not None and error > 1.1 * (lost / added) ** 0.5 + 1e-3:  # the rounding of unpack
                raise Wrong(f"eval: an adapter has the error {error} against what unpack makes of it")
            self.count["eval adapter"] += 1


def one(rng: random.Random, folder: Path, count: Counter[str]) -> tuple[Callable[[], None], object]:
    """A case with its files: what to run, and its description for failures."""
    if rng.random() < 0.35:
        adapter = AdapterRun(rng, folder, count)
        action = rng.choice([adapter.unpack, adapter.merge, adapter.prune, adapter.resize, adapter.inspect, adapter.evaluate])
        return action, (action.__name__, adapter.made.layout, adapter.made.broken, adapter.made.config, adapter.made.metadata)
    run = Run(rng, folder, count)
    action = rng.choice([run.prune, run.lossless, run.bits, run.merge, run.merge, run.merge_others, run.pack, run.svd_lora, run.inspect])
    return action, (action.__name__, run.family.traits, run.family.form)
