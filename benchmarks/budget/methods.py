"""What compare.py compares: rivals.py's functions, and the real commands of peru."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rivals
from judge import Judge, Tensors
from safetensors import safe_open

from peru_cli import cli
from peru_cli.console import console

MERGE_SCALE = 0.3  # of task arithmetic, the usual one for eight tasks
WITH_DATA = ("0.02", "0.03", "0.04", "0.06", "0.1")
TEXTS = 1000  # of a task, for --data
BUDGETS = ("0.02", "0.03", "0.04", "0.045", "0.06", "0.1", "0.3", "1.0", "1.5")
LORA_BUDGETS = ("0.01", "0.02", "0.03", "0.06", "0.1", "0.3")
RANKS = (1, 2, 4, 8, 16, 32)  # of adapters that had 64
SWITCH = ("--scope", "sign", "--values", "sign")  # T-Switch, as its authors' program has it
IMAGE_BUDGETS = ("0.1", "0.2", "0.3", "0.5", "0.7", "1.0", "1.5")  # names and digests of a model of 0.5M parameters take 0.09


class Shop:
    """Makes compressed fine-tunes: knows the base, all tasks, and a folder for what commands write."""

    def __init__(self, judge: Judge, tasks: list[str], folder: Path, data: Path | None = None) -> None:
        self.judge, self.tasks, self.folder, self.data = judge, tasks, folder, data
        self.base = judge.base_folder
        self._trace: dict[float, dict[str, float]] = {}

    def model(self, task: str) -> Path:
        """What commands read: the folder of a fine-tune, or of its adapter."""
        return self.judge.given(task)

    def peru(self, *arguments: object) -> str:
        """Run a command in this process, which spares the imports, and give what it prints; loud if it fails."""
        console.quiet = console.json = console.data_on_stderr = False
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = cli.run([str(argument) for argument in arguments])
        if code:
            raise RuntimeError(f"peru {' '.join(map(str, arguments))} ended with exit code {code}")
        return printed.getvalue()

    def shared(self, name: str, *arguments: object) -> Path:
        """What a command makes of all tasks, once: a folder or a file."""
        path = self.folder / f"{len(self.tasks)}-tasks-{name}"  # a pack's name ends in .safetensors
        if not path.exists():
            models = [f"{task}={self.model(task)}" for task in self.tasks]
            self.folder.mkdir(parents=True, exist_ok=True)
            self.peru(arguments[0], *models, "--base", self.base, "-o", path, *self.judge.heads, *arguments[1:], "--quiet")
        return path

    def unpacked(self, artifact: Path, base: Path, *options: object) -> Tensors:
        """The encoder that `peru unpack` makes."""
        with tempfile.TemporaryDirectory() as scratch:
            self.peru("unpack", artifact, "--base", base, "-o", f"{scratch}/model", "--no-sync", "--quiet", *options)
            return self.judge.tensors(Path(scratch) / "model")

    def pruned(self, task: str, base: Path, *options: object) -> tuple[Tensors, float]:
        """`peru prune` of one task, and back; bytes without head and config, with everything else."""
        with tempfile.TemporaryDirectory() as scratch:
            artifact = Path(scratch) / "artifact.safetensors"
            made = self.peru("prune", self.model(task), "--base", base, "-o", artifact, "--no-sync", "--json", "--quiet", *options)
            report = json.loads(made)
            report = report[0] if isinstance(report, list) else report
            return self.unpacked(artifact, base), float(report["delta_bytes"])

    def texts(self, task: str) -> Path:
        """Texts of the task's training part, some at random, without labels."""
        if self.data is None:
            raise SystemExit("peru with data needs texts: --data FOLDER, of TASK/train.jsonl.gz")
        path = self.folder / f"{task}-texts.jsonl"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with gzip.open(self.data / task / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            order = np.random.default_rng(1).permutation(len(rows))[:TEXTS]
            chosen = [{name: rows[i][name] for name in ("text", "text_pair") if name in rows[i]} for i in order]
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen), encoding="utf-8")
        return path

    def trace_factor(self, task: str, sparsity: float) -> float:
        """UltraDelta's factor of a task."""
        if sparsity not in self._trace:
            base = self.judge.base
            made = {t: rivals.ultra_delta(base, self.judge.fine_tune(t), sparsity, False)[0] for t in self.tasks}
            self._trace[sparsity] = rivals.trace_factors(base, made)
        return self._trace[sparsity][task]


Make = Callable[[Shop, str], tuple[Tensors, float]]


@dataclass(frozen=True)
class Method:
    """One row of the table; rows of one `line` are joined in the picture. Of a `family`, all tasks are stored together."""

    name: str
    line: str
    make: Make
    family: bool = False

    @property
    def key(self) -> str:
        """For names of files."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name)


def rival(function: Callable[..., tuple[Tensors, float]], **options: object) -> Make:
    """A function of rivals.py."""
    return lambda shop, task: function(shop.judge.base, shop.judge.fine_tune(task), **options)


def prune(*options: object) -> Make:
    """`peru prune` against the base."""
    return lambda shop, task: shop.pruned(task, shop.base, *options)


def with_data(bits: str) -> Make:
    """`peru prune --bits --data` on texts of the training part."""
    return lambda shop, task: shop.pruned(task, shop.base, "--bits", bits, "--data", shop.texts(task))


def fft(density: str) -> Make:
    """`peru prune` against a task-arithmetic merge of all tasks, whose own bytes are not counted."""

    def make(shop: Shop, task: str) -> tuple[Tensors, float]:
        merge = shop.shared("merge", "merge", "--method", "task-arithmetic", "--scale", MERGE_SCALE)
        return shop.pruned(task, merge, "--keep", density)

    return make


def merged_first(bits: float, share: float) -> Make:
    """`peru prune` of a task-arithmetic merge of all tasks, and of each task against what comes back of that.

    `share` of the bits of a task pay for the merge."""

    def make(shop: Shop, task: str) -> tuple[Tensors, float]:
        tasks = len(shop.tasks)
        merge = shop.shared("merge", "merge", "--method", "task-arithmetic", "--scale", MERGE_SCALE)
        small = shop.folder / f"{tasks}-tasks-merge-{bits}-{share}"
        report, back = small / "report.json", small / "model"
        if not back.exists():
            small.mkdir(exist_ok=True)
            artifact = small / "merge.safetensors"
            given = ("--base", shop.base, "--quiet")
            report.write_text(shop.peru("prune", merge, "-o", artifact, "--bits", bits * share * tasks, "--force", "--json", *given))
            shop.peru("unpack", artifact, "-o", back, *given)
        found = json.loads(report.read_text())
        tensors, nbytes = shop.pruned(task, back, "--bits", bits * (1 - share))
        return tensors, nbytes + float((found[0] if isinstance(found, list) else found)["delta_bytes"]) / tasks

    return make


def smaller_rank(rank: int) -> Make:
    """`peru svd-lora` of an adapter; bytes of its factors."""

    def make(shop: Shop, task: str) -> tuple[Tensors, float]:
        with tempfile.TemporaryDirectory() as scratch:
            adapter = Path(scratch) / "adapter"
            shop.peru("svd-lora", shop.model(task), "-o", adapter, "--rank", rank, "--dtype", "bf16", "--no-sync", "--quiet")
            with safe_open(adapter / "adapter_model.safetensors", "np") as file:
                entries = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys() if ".lora_" in name)  # noqa: SIM118
            return shop.unpacked(adapter, shop.base), 2.0 * entries

    return make


def pack(name: str, *options: object) -> Make:
    """`peru shuffle-pack` of all tasks; its bytes shared out equally."""

    def make(shop: Shop, task: str) -> tuple[Tensors, float]:
        path = shop.shared(f"{name}.safetensors", "shuffle-pack", *options)
        report = json.loads(shop.peru("inspect", path, "--json"))
        heads = report["parts"].get("whole tensors", 0) + report["parts"].get("side files", 0)
        return shop.unpacked(path, shop.base, "--task", task), (path.stat().st_size - heads) / len(shop.tasks)

    return make


def with_trace(shop: Shop, task: str) -> tuple[Tensors, float]:
    """UltraDelta with its last step, which makes all but one task's vectors shorter."""
    factor = shop.trace_factor(task, 0.99)
    return rivals.ultra_delta(shop.judge.base, shop.judge.fine_tune(task), 0.99, False, factor)


def mixed(budgets: Sequence[str]) -> list[Method]:
    """Mixed artifacts at several budgets."""
    return [Method(f"peru prune --bits {bits}", "peru, mixed", prune("--bits", bits)) for bits in budgets]


TUNED = [Method(f"peru prune --bits {bits} --data", "peru, with data", with_data(bits)) for bits in WITH_DATA]
SPARSE = [Method(f"Post-Pruning {keep}", "Post-Pruning", prune("--keep", keep)) for keep in ("1%", "5%", "10%")]
OCTAVES = [
    Method(f"Post-Pruning {keep}, --values log2", "Post-Pruning, log2", prune("--keep", keep, "--values", "log2"))
    for keep in ("2%", "5%", "10%", "20%")
]
FIRST = [Method(f"merge first, {share:.0%} of the bits, 0.06", "merge first", merged_first(0.06, share), True) for share in (0.1, 0.25)]
LORAS = [Method(f"svd-lora --rank {rank}", "svd-lora", smaller_rank(rank)) for rank in RANKS]
MERGED = [Method(f"PERU-FFT {keep}, merge not counted", "PERU-FFT", fft(keep), True) for keep in ("1%", "5%", "10%")]
LOW_RANK = [Method(f"low-rank residual, rank {rank}", "low rank", rival(rivals.low_rank, rank=rank)) for rank in (1, 4, 16)]
PACKS = [
    Method("STA + Shuffle, scale 0.7", "STA + Shuffle", pack("sta", "--scale", 0.7), True),
    Method("STA + Shuffle, scale 1, residual 10%", "STA + Shuffle + 10%", pack("residual", "--residual", "10%"), True),
    Method("TALL-masks", "TALL-masks", pack("tall", "--method", "tall-masks"), True),
    Method("EMR", "EMR", pack("emr", "--method", "emr"), True),
]
ULTRA = [
    Method(f"UltraDelta, sparsity {s}", "UltraDelta", rival(rivals.ultra_delta, sparsity=s, embeddings=False)) for s in (0.995, 0.99, 0.97)
] + [
    Method("UltraDelta, sparsity 0.99, trace norm", "UltraDelta, rescaled", with_trace, True),
    Method("UltraDelta, sparsity 0.9, embeddings too", "UltraDelta", rival(rivals.ultra_delta, sparsity=0.9, embeddings=True)),
]
OTHERS = [
    Method("BitDelta", "BitDelta", rival(rivals.bit_delta)),
    *(
        Method(f"Delta-CoMe 8 + 3 + 2, {share:.0%} of the 2-bit ranks", "Delta-CoMe", rival(rivals.delta_come, two_bit=share))
        for share in (0, 0.1, 0.5)
    ),
    *(Method(f"D-QReLO, rank {rank}", "D-QReLO", rival(rivals.d_qrelo, rank=rank)) for rank in (1, 8)),
    *(Method(f"T-Switch {keep}", "T-Switch", prune("--keep", keep, *SWITCH)) for keep in ("1%", "5%", "10%", "20%", "40%")),
    *(Method(f"signs of the largest {share:.0%}", "signs", rival(rivals.one_scale, share=share)) for share in (0.01, 0.05, 0.1)),
]
OTHER = [*ULTRA, *OTHERS, *LOW_RANK, *SPARSE, *OCTAVES, *MERGED, *FIRST, *PACKS]
