"""`shuffle-pack`: sums against a plain program, retrieved tasks to half a step, adding and removing, always the same bytes."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file

from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.packs.superposed import PackMode
from tests.conftest import FLOATS, raw, run_peru, save
from tests.methods.test_superpose import plain_moves, plain_signs

Peru = Callable[..., str]
Table = dict[str, torch.Tensor]
DEPTH = 5
SHAPES = {"embed.weight": (70, 12), "norm.weight": (12,), "scalar": (), "empty": (0, 5)}
SHAPES |= {f"layers.{i}.mlp.weight": (40, 12) for i in range(DEPTH)} | {f"layers.{i}.attn.weight": (12, 3, 4) for i in range(DEPTH)}
SHAPES |= {f"layers.{i}.bias": (40,) for i in range(DEPTH)}


def family(tasks: str, dtype: str = "fp32", shared: float = 0.0, size: int = 1) -> tuple[Table, dict[str, Table]]:
    """A base and fine-tunes by name. `shared` is the share of variance that their task vectors have in common."""
    noise = torch.Generator().manual_seed(5)
    shapes = {name: (shape[0] * size, *shape[1:]) if shape else shape for name, shape in SHAPES.items()}
    base = {name: (torch.randn(shape, generator=noise) * 0.1).to(FLOATS[dtype]) for name, shape in shapes.items()}
    common = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    fine = {}
    for task in tasks:
        own = torch.Generator().manual_seed(ord(task))
        fine[task] = {
            name: (base[name].float() + 0.01 * (shared**0.5 * common[name] + (1 - shared) ** 0.5 * torch.randn(shape, generator=own))).to(
                FLOATS[dtype]
            )
            for name, shape in shapes.items()
        }
        fine[task]["head.weight"] = torch.randn(3, 12, generator=own)
    base["ids"] = torch.arange(9)
    for table in fine.values():
        table["ids"] = torch.arange(9)
    return base, fine


class Packs:
    """Saves a family and runs commands on it."""

    def __init__(self, folder: Path, peru: Peru, base: Table, fine: dict[str, Table]) -> None:
        self.folder, self.peru, self.base, self.fine = folder, peru, base, fine
        self.at = {"base": save(base, folder / "base.safetensors")}
        self.at |= {task: save(table, folder / f"{task}.safetensors") for task, table in fine.items()}

    def run(self, tasks: str, *options: object, name: str = "pack", code: int = 0) -> Path:
        out = self.folder / f"{name}.safetensors"
        models = [f"{task}={self.at[task]}" for task in tasks]
        self.text = self.peru("shuffle-pack", *models, "-b", self.at["base"], "-o", out, "--no-sync", "--force", *options, code=code)
        return out

    def unpack(self, pack: Path, task: str, *options: object) -> Table:
        out = self.folder / "unpacked.safetensors"
        self.peru("unpack", pack, "--task", task, "-b", self.at["base"], "-o", out, "--no-sync", "--force", *options)
        return load_file(out)


@pytest.fixture
def packs(tmp_path: Path, peru: Peru) -> Callable[..., Packs]:
    return lambda tasks, *rest, **more: Packs(tmp_path, peru, *family(tasks, *rest, **more))


def plain_place(name: str, moves: list[int]) -> str:
    """Where a block's tensor goes."""
    block = re.search(r"layers\.(\d+)\.", name)
    return name if block is None else name.replace(block.group(), f"layers.{moves[int(block.group(1))]}.")


def plain_pack(
    fine: dict[str, Table], base: Table, steps: dict[str, float], seed: int, decorrelate: str, signs: bool
) -> dict[str, np.ndarray]:
    """The sums, as in ALGORITHMS: whole tensors, one after the other."""
    sums = {name: np.zeros(tensor.shape, np.int64) for name, tensor in base.items() if tensor.is_floating_point()}
    for number, task in enumerate(sorted(fine)):
        moves = {"shuffle": plain_moves(seed, task, "layers.", DEPTH), "none": list(range(DEPTH))}
        moves["shift"] = [(b + number) % DEPTH for b in range(DEPTH)]
        for name in sums:
            tau = (fine[task][name].float() - base[name].float()).numpy()
            target = name.startswith("layers.") and tau.ndim >= 2
            place = plain_place(name, moves[decorrelate]) if target else name
            if target and signs:
                flat = tau.reshape(len(tau), -1)
                tau = (flat * np.array(plain_signs(seed, task, place, flat.shape[1]), np.float32)).reshape(tau.shape)
            sums[place] = sums[place] + np.rint(tau / np.float32(steps[place])).astype(np.int64)
    return sums


@pytest.mark.parametrize("decorrelate", ["shuffle", "shift", "none"])
@pytest.mark.parametrize("signs", ["--signs", "--no-signs"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sums_and_tasks_match_a_plain_program(packs: Callable[..., Packs], decorrelate: str, signs: str, dtype: str) -> None:
    made = packs("abc", dtype)
    path = made.run("cab", "--seed", 7, "--decorrelate", decorrelate, signs, "--scale", "0.7", "--tile-entries", 16384)
    with Pack(path) as pack:
        steps = {record.info.name: 2.0**record.exponent for record in pack.index.tensors if record.is_sum}
        modes = {record.info.name: record.mode for record in pack.index.tensors}
        found = {r.info.name: pack.sums(r, 0, r.info.entries).reshape(r.info.shape) for r in pack.index.tensors if r.is_sum}
    expected = plain_pack(made.fine, made.base, steps, 7, decorrelate, signs == "--signs")
    assert sorted(found) == sorted(expected)
    for name, sums in expected.items():
        target = name.startswith("layers.") and not name.endswith("bias")
        assert modes[name] == (PackMode.TARGET if target else PackMode.SUM) and np.array_equal(found[name], sums), name
    for number, task in enumerate("abc"):
        moves = {"shuffle": plain_moves(7, task, "layers.", DEPTH), "none": list(range(DEPTH))}
        moves["shift"] = [(b + number) % DEPTH for b in range(DEPTH)]
        back = made.unpack(path, task)
        assert sorted(back) == sorted(made.fine[task])
        for name in expected:
            target = modes[name] == PackMode.TARGET
            place = plain_place(name, moves[decorrelate]) if target else name
            vector = expected[place].astype(np.float32) * np.float32(0.7 * steps[place])
            if target and signs == "--signs":
                flat = vector.reshape(len(vector), -1)
                vector = (flat * np.array(plain_signs(7, task, place, flat.shape[1]), np.float32)).reshape(vector.shape)
            wanted = (made.base[name].float() + torch.from_numpy(np.asarray(vector))).to(FLOATS[dtype])
            assert raw(back[name]) == raw(wanted), (task, name)
        for name in ("head.weight", "ids"):
            assert raw(back[name]) == raw(made.fine[task][name])


def test_a_single_task_is_retrieved_to_half_a_step(packs: Callable[..., Packs]) -> None:
    made = packs("a")
    path = made.run("a", "--seed", 3)
    back = made.unpack(path, "a")
    with Pack(path) as pack:
        for record in pack.index.tensors:
            if record.is_sum and record.info.entries:
                name = record.info.name
                error = float((back[name].double() - made.fine["a"][name].double()).abs().max())
                assert error <= 2.0**record.exponent / 2 + 1e-8, name  # plus one rounding of base + tau^ to float32
    assert "precision 10" in made.text


def test_without_shuffle_and_signs_it_is_task_arithmetic(packs: Callable[..., Packs]) -> None:
    made = packs("abc")
    path = made.run("abc", "--decorrelate", "none", "--no-signs", "--scale", "0.3")
    made.peru(
        "merge", *(f"{t}={made.at[t]}" for t in "abc"), "-b", made.at["base"], "-o", made.folder / "ta", "--method", "task-arithmetic",
        "--scale", "0.3", "--no-sync",
    )  # fmt: skip
    merged = load_file(made.folder / "ta" / "model.safetensors")
    back = made.unpack(path, "b")
    with Pack(path) as pack:
        for record in pack.index.tensors:
            if record.is_sum and record.info.entries:
                error = float((back[record.info.name].double() - merged[record.info.name].double()).abs().max())
                assert error <= 0.3 * 3 * 2.0**record.exponent / 2 + 1e-7


def test_neither_order_threads_tiles_nor_hash_seed_change_a_byte(packs: Callable[..., Packs]) -> None:
    made = packs("abc", size=30)
    expected = made.run("abc", "--seed", 1).read_bytes()
    assert made.run("bca", "--seed", 1, "--threads", 1, "--tile-entries", 16384, name="other").read_bytes() == expected
    out = made.folder / "fresh.safetensors"
    models = [f"{t}={made.at[t]}" for t in "cba"]
    done = run_peru(
        "shuffle-pack",
        *models,
        "-b",
        made.at["base"],
        "-o",
        out,
        "--seed",
        1,
        "--threads",
        5,
        "--tile-entries",
        32768,
        env={"PYTHONHASHSEED": "77"},
    )
    assert done.returncode == 0 and out.read_bytes() == expected, done.stderr
    assert made.run("abc", "--seed", 2, name="other").read_bytes() != expected
    here = made.unpack(out, "b")
    restored = made.folder / "r.safetensors"
    done = run_peru(
        "unpack",
        out,
        "--task",
        "b",
        "-b",
        made.at["base"],
        "-o",
        restored,
        "--threads",
        3,
        "--tile-entries",
        16384,
        env={"PYTHONHASHSEED": "3"},
    )
    assert done.returncode == 0, done.stderr
    there = load_file(restored)
    assert {name: raw(tensor) for name, tensor in there.items()} == {name: raw(tensor) for name, tensor in here.items()}


@pytest.mark.parametrize("decorrelate", ["shuffle", "shift"])
def test_adding_then_removing_restores_the_earlier_bytes(packs: Callable[..., Packs], decorrelate: str) -> None:
    made = packs("abcd")
    first = made.run("ac", "--seed", 1, "--decorrelate", decorrelate, name="first")
    second = made.run("d", "--add-to", first, name="second")
    third = made.run("b", "--add-to", second, name="third")
    assert list(Pack(third).tasks) == ["a", "b", "c", "d"]
    made.run("d", "--remove-from", third, name="fourth")
    fifth = made.run("b", "--remove-from", made.folder / "fourth.safetensors", name="fifth")
    assert fifth.read_bytes() == first.read_bytes()
    assert made.run("bd", "--remove-from", third, name="sixth").read_bytes() == first.read_bytes()
    both = made.run("bd", "--add-to", first, name="both")
    with Pack(third) as a, Pack(both) as b:  # the same sums and tasks; shifts depend on the order of adding
        if decorrelate == "shuffle":
            assert a.metadata["peru.sums"] == b.metadata["peru.sums"]
        assert [task.digest for task in a.index.tasks] == [task.digest for task in b.index.tasks]
    smaller = made.run("a", "--remove-from", first, name="smaller")
    assert smaller.stat().st_size < first.stat().st_size  # the sums are narrower
    back = made.unpack(smaller, "c")
    tau = (made.fine["c"]["layers.0.mlp.weight"] - made.base["layers.0.mlp.weight"]).norm()
    assert (back["layers.0.mlp.weight"] - made.fine["c"]["layers.0.mlp.weight"]).norm() < 0.03 * tau  # 2^-4 / sqrt(12)


def test_shifts_are_the_smallest_free_ones(packs: Callable[..., Packs]) -> None:
    made = packs("abcd")
    first = made.run("abc", "--decorrelate", "shift", name="first")
    assert [task.shift for task in Pack(first).index.tasks] == [0, 1, 2]
    second = made.run("b", "--remove-from", first, name="second")
    third = made.run("d", "--add-to", second, name="third")
    assert {task.name: task.shift for task in Pack(third).index.tasks} == {"a": 0, "c": 2, "d": 1}


def test_measured_error_is_that_of_the_unpacked_model(packs: Callable[..., Packs]) -> None:
    made = packs("abc", size=5)
    path = made.run("abc", "--json", "--scale", "0.5")
    for task in json.loads(made.text)["packed"]:
        name, back = task["task"], made.unpack(path, task["task"])
        missed = norm = dot = square = 0.0
        for key in back:
            if key in made.base and back[key].is_floating_point():
                tau, got = (made.fine[name][key] - made.base[key]).double(), (back[key] - made.base[key]).double()
                missed, norm = missed + float((tau - got).square().sum()), norm + float(tau.square().sum())
                dot, square = dot + float((tau * got).sum()), square + float(got.square().sum())
        assert task["error"] == pytest.approx(math.sqrt(missed / norm), rel=1e-4)  # the weights are float32: 2^-24 of 0.1 against 0.01
        assert task["cosine"] == pytest.approx(dot / math.sqrt(norm * square), rel=1e-4)
        assert task["norm"] == pytest.approx(math.sqrt(norm), rel=1e-6)


def test_max_error_leaves_out_the_worst(packs: Callable[..., Packs]) -> None:
    made = packs("abcd", size=10)
    b = made.fine["b"]
    quiet = b | {name: t + (b[name] - t) / 10 for name, t in made.base.items() if t.is_floating_point()}
    save(quiet, made.at["b"])
    path = made.run("abcd", "--max-error", "1.5", "--json")
    report = json.loads(made.text)
    assert list(report["left_out"]) == ["b"] and report["left_out"]["b"] > 10 and report["tasks"] == ["a", "c", "d"]
    assert all(task["error"] < 1.5 for task in report["packed"])
    assert path.read_bytes() == made.run("acd", name="other").read_bytes()
    out = made.run("abcd", "--max-error", "0.0001", "--precision", 1, name="none", code=1)
    assert not out.exists() and "no task stays below --max-error" in made.peru.stderr  # type: ignore[attr-defined]


def test_skip_target_and_exclude(packs: Callable[..., Packs]) -> None:
    made = packs("ab")

    def targets(*options: object) -> set[str]:
        with Pack(made.run("ab", *options)) as pack:
            return {record.info.name for record in pack.index.tensors if record.mode == PackMode.TARGET}

    every = {f"layers.{i}.{kind}.weight" for i in range(DEPTH) for kind in ("mlp", "attn")}
    assert targets() == every
    assert targets("--skip", 2) == {name for name in every if int(name.split(".")[1]) % 2 == 0}
    assert targets("--exclude", "attn") == {name for name in every if "mlp" in name}
    assert targets("--target", r"bias$|^embed") == {f"layers.{i}.bias" for i in range(DEPTH)} | {"embed.weight"}
    made.run("ab", "--target", "nothing", code=2)
    made.run("ab", "--exclude", "(", code=2)


def test_dry_run_shows_groups_and_writes_nothing(packs: Callable[..., Packs]) -> None:
    made = packs("ab")
    made.run("ab", "--dry-run")
    assert not (made.folder / "pack.safetensors").exists()
    assert [line.split() for line in made.text.splitlines()[1:]] == [
        ["layers.*.attn.weight", "12x3x4", "5", "720"],
        ["layers.*.mlp.weight", "40x12", "5", "2,400"],
    ]


def test_real_classifiers_on_a_bare_encoder(tmp_path: Path, peru: Peru) -> None:
    """Heads, prefix, configs and tokenizer: the unpacked model loads, and equals the fine-tune except for interference."""
    config = tr.BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, num_labels=3)
    torch.manual_seed(0)
    base = tr.BertModel(config)
    base.save_pretrained(tmp_path / "base")
    for number, task in enumerate("ab"):
        model = tr.BertForSequenceClassification(config)
        model.bert.load_state_dict(base.state_dict())
        torch.manual_seed(10 + number)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(torch.randn_like(tensor) * 0.002)
        model.save_pretrained(tmp_path / task)
        (tmp_path / task / "vocab.txt").write_text("shared")
    pack = tmp_path / "p.safetensors"
    peru("shuffle-pack", tmp_path / "a", tmp_path / "b", "-b", tmp_path / "base", "-o", pack, "--seed", 7)
    with Pack(pack) as opened:
        assert [size for size, _ in opened.index.contents].count(6) == 1  # vocab.txt of both tasks, stored once
        assert {group.prefix for group in opened.index.groups} == {"encoder.layer."}
    peru("unpack", pack, "--task", "b", "-b", tmp_path / "base", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "shared"
    back, fine = (tr.BertForSequenceClassification.from_pretrained(tmp_path / name) for name in ("out", "b"))
    assert raw(back.classifier.weight.data) == raw(fine.classifier.weight.data)
    wanted = fine.state_dict()
    missed = math.sqrt(sum(float((t - wanted[n]).square().sum()) for n, t in back.state_dict().items() if t.is_floating_point()))
    count = sum(t.numel() for t in base.parameters())
    assert missed == pytest.approx(0.002 * math.sqrt(count), rel=0.05)
    folder = peru("inspect", pack)
    assert "encoder.layer.*.attention.output.dense.weight" in folder and "b" in folder


def test_wide_and_narrow_dtypes(packs: Callable[..., Packs]) -> None:
    made = packs("ab", "fp64")
    back = made.unpack(made.run("ab"), "a")
    assert back["layers.0.mlp.weight"].dtype == torch.float64
    half = made.unpack(made.run("ab", "--dtype", "fp16"), "a")
    assert half["layers.0.mlp.weight"].dtype == torch.float16
    assert made.unpack(made.run("ab"), "a", "--dtype", "bf16")["layers.0.mlp.weight"].dtype == torch.bfloat16


def test_a_lora_adapter_and_an_artifact_are_tasks_too(tmp_path: Path, peru: Peru, packs: Callable[..., Packs]) -> None:
    made = packs("ab")
    artifact = tmp_path / "delta.safetensors"
    peru("prune", made.at["b"], "-b", made.at["base"], "-o", artifact, "--lossless")
    whole = made.run("ab").read_bytes()
    out = tmp_path / "mixed.safetensors"
    peru("shuffle-pack", f"a={made.at['a']}", f"b={artifact}", "-b", made.at["base"], "-o", out)
    assert out.read_bytes() == whole


def test_copies_leave_no_trace_of_paths(packs: Callable[..., Packs], tmp_path: Path) -> None:
    made = packs("ab")
    path = made.run("ab", "--base-id", "org/name@abc")
    assert str(tmp_path).encode() not in path.read_bytes() and b"org/name@abc" in path.read_bytes()
    shutil.copy(path, tmp_path / "copy.safetensors")
    assert "org/name@abc" in made.peru("inspect", tmp_path / "copy.safetensors")
