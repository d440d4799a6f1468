"""Which tensors belong together: prefixes, heads, grown vocabularies, other dtypes, unrelated models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peru_cli.artifacts.index import Mode
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.checkpoints.pairing import Pairing, Prefix, find_prefix, pair_checkpoints
from peru_cli.checkpoints.resolve import open_model
from peru_cli.errors import Mismatch, UsageError
from tests.conftest import FLOATS, assert_same_tensors, random_pair, raw, save
from tests.prune.test_exact import expected_result
from tests.support.reference import bits, post_prune

Peru = Callable[..., str]
Tensors = dict[str, torch.Tensor]


def numbers(*shape: int, seed: int = 0, dtype: str = "bf16") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(FLOATS[dtype])


def paired(folder: Path, base: Tensors, fine: Tensors, per_task: str | None = None) -> Pairing:
    """The pairing of two real files."""
    for name, tensors in (("base", base), ("fine", fine)):
        save(tensors, folder / f"{name}.safetensors")
    with open_model(str(folder / "fine.safetensors")) as f, open_model(str(folder / "base.safetensors")) as b:
        return pair_checkpoints(f, b, per_task)


def pairs_of(pairing: Pairing) -> dict[str, str]:
    return {pair.fine.name: pair.base.name for pair in pairing.pairs}


def round_trip(peru: Peru, folder: Path, base: Tensors | Path, fine: Tensors | Path, *mode: object) -> SparseDelta:
    """Prune and unpack. Without a mode, lossless, and compared with the fine-tune bit for bit."""
    b = base if isinstance(base, Path) else save(base, folder / "base.safetensors")
    f = fine if isinstance(fine, Path) else save(fine, folder / "fine.safetensors")
    peru("prune", f"t={f}", "-b", b, "-o", folder / "a.safetensors", "--force", "--no-sync", *(mode or ("--lossless",)))
    peru("unpack", folder / "a.safetensors", "-b", b, "-o", folder / "r.safetensors", "--force", "--no-sync")
    if not mode:
        assert_same_tensors(folder / "r.safetensors", load_file(f / "model.safetensors" if f.is_dir() else f))
    return SparseDelta(folder / "a.safetensors")


def modes(artifact: SparseDelta) -> dict[str, int]:
    return {name: record.mode for name, record in artifact.records.items()}


PREFIXES = [("", ""), ("bert.", ""), ("", "model."), ("model.language_model.", ""), ("", "transformer.h."), ("ünï.", "")]


@pytest.mark.parametrize("added,removed", PREFIXES)
def test_one_prefix_is_found_used_and_recorded(tmp_path: Path, peru: Peru, added: str, removed: str) -> None:
    base, fine = random_pair("bf16")
    wanted = {added + n: t for n, t in fine.items()} | {"classifier.weight": numbers(3, 48)}
    given = {removed + n: t for n, t in base.items()} | {"pooler.weight": numbers(9, 9)}
    pairing = paired(tmp_path, given, wanted)
    assert pairing.prefix == Prefix(added, removed)
    assert pairs_of(pairing) == {added + n: removed + n for n in fine}
    assert [i.name for i in pairing.whole] == ["classifier.weight"] and [i.name for i in pairing.base_only] == ["pooler.weight"]
    artifact = round_trip(peru, tmp_path, given, wanted)
    assert artifact.prefix == pairing.prefix and artifact.metadata["peru.prefix"] == (
        f"+{added}" if added else f"-{removed}" if removed else ""
    )
    round_trip(peru, tmp_path, given, wanted, "--keep", "10%")
    renamed = {added + n.removeprefix(removed): t for n, t in given.items()}
    assert_same_tensors(tmp_path / "r.safetensors", expected_result(renamed, wanted, post_prune(renamed, wanted, Fraction(1, 10))))


def infos(tmp_path: Path, tensors: Tensors) -> Mapping[str, Any]:
    with open_model(str(save({n: t.clone() for n, t in tensors.items()}, tmp_path / "x.safetensors"))) as checkpoint:
        return dict(checkpoint.tensors)


@pytest.mark.parametrize("flip", [False, True])
def test_most_bytes_decide_and_ties_prefer_no_prefix(tmp_path: Path, flip: bool) -> None:
    a, b = numbers(20, 10), numbers(10, 10)

    def found(fine: Tensors, base: Tensors) -> Prefix:
        """With `flip`, the roles are swapped: what was added must then be removed."""
        prefix = find_prefix(infos(tmp_path, base if flip else fine), infos(tmp_path, fine if flip else base))
        return Prefix(prefix.removed, prefix.added) if flip else prefix

    assert found({"w": a, "x.w": a}, {"w": a}) == Prefix()  # a tie
    assert found({"w": b, "x.w": a, "x.v": b}, {"w": a, "v": b}) == Prefix("x.")  # `w` has another shape without it
    # 400 bytes pair as they are, 600 under `x.`: equal names must not count from both sides.
    assert found({"w": a, "x.w": a, "x.v": b}, {"w": a, "v": b}) == Prefix("x.")
    assert found({"other": a}, {"w": a}) == Prefix()
    assert found({"w": a.float(), "x.v": b, "x.u": b}, {"w": a, "v": b, "u": b}) == Prefix()  # 800 or 400 bytes


def test_only_the_fine_tunes_bytes_count(tmp_path: Path) -> None:
    a, b = numbers(20, 10), numbers(15, 10)
    base = {"w": b.double(), "x.v": a, "v": a}  # the base's own widths must not outweigh
    assert find_prefix(infos(tmp_path, {"v": a.float(), "w": b}), infos(tmp_path, base)) == Prefix()
    assert find_prefix(infos(tmp_path, {"q.v": a.float(), "w": b}), infos(tmp_path, base)) == Prefix("q.")


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_grows_as_the_configs_say(tmp_path: Path, peru: Peru, tied: bool) -> None:
    """500 rows are few: vocab_size distinguishes a grown vocabulary from a new head."""
    base, fine = random_pair("bf16")
    base |= {"wte.weight": numbers(500, 12), "bias": numbers(500, seed=3)}
    fine |= {
        "wte.weight": torch.cat((base["wte.weight"] + 1, numbers(7, 12, seed=9))),
        "bias": torch.cat((base["bias"], numbers(7, seed=8))),
    }
    if not tied:
        base["lm_head.weight"], fine["lm_head.weight"] = base["wte.weight"] * 2, fine["wte.weight"] * 3
    plain = round_trip(peru, tmp_path, base, fine)
    assert modes(plain)["wte.weight"] == modes(plain)["bias"] == Mode.WHOLE
    folders = tmp_path / "base", tmp_path / "fine"
    for nested in (False, True):
        for folder, tensors, rows in zip(folders, (base, fine), (500, 507), strict=True):
            folder.mkdir(exist_ok=True)
            save(tensors, folder / "model.safetensors")
            config = {"vocab_size": rows}
            (folder / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
        artifact = round_trip(peru, tmp_path, *folders)
        for name in ("wte.weight", "bias", *(["lm_head.weight"] if not tied else [])):
            record = artifact.records[name]
            assert (record.mode, record.base_rows, record.whole_bytes) == (
                Mode.DELTA,
                500,
                raw(fine[name])[500 * 2 * fine[name][0].numel() :].__len__(),
            )
    # Only shared rows compete; new rows always come back.
    round_trip(peru, tmp_path, *folders, "--keep", "20%")
    shared = {n: t[: len(base[n])] if t.ndim else t for n, t in fine.items()}
    expected = expected_result(base, shared, post_prune(base, shared, Fraction(1, 5)))
    got = load_file(tmp_path / "r.safetensors")
    for name, tensor in fine.items():
        whole = torch.cat((expected[name], tensor[len(base[name]) :])) if tensor.ndim else expected[name]
        assert raw(got[name]) == raw(whole), name


@pytest.mark.parametrize("rows,grown", [(4095, False), (4096, True), (50_000, True)])
def test_without_configs_many_rows_are_a_vocabulary(tmp_path: Path, peru: Peru, rows: int, grown: bool) -> None:
    base, fine = random_pair("bf16")
    base["words"] = numbers(rows, 2)
    fine["words"] = torch.cat((base["words"].flip(1), numbers(16_500, 2, seed=2)))
    fine["body"] = base["body"] = numbers(60_000, 4)
    base["none"], fine["none"] = numbers(rows, 0), numbers(rows + 3, 0)
    artifact = round_trip(peru, tmp_path, base, fine)
    assert modes(artifact)["words"] == (Mode.DELTA if grown else Mode.WHOLE)
    for threads, tile in ((1, 2**14), (3, 2**15)):  # tiles with old and new rows, tiles with new rows only
        again = tmp_path / "again.safetensors"
        more = ["-b", tmp_path / "base.safetensors", "--no-sync", "--threads", threads, "--tile-entries", tile]
        peru("unpack", tmp_path / "a.safetensors", *more, "-o", again, "--force")
        assert_same_tensors(again, fine)


def test_a_shrunk_vocabulary_is_stored_whole(tmp_path: Path, peru: Peru) -> None:
    base, fine = random_pair("bf16")
    base["words"], fine["words"] = numbers(5000, 2), numbers(4999, 2, seed=1)
    assert modes(round_trip(peru, tmp_path, base, fine))["words"] == Mode.WHOLE


def test_a_head_of_other_classes_is_stored_whole(tmp_path: Path, peru: Peru) -> None:
    base, fine = random_pair("fp32")
    base |= {"head.weight": numbers(1000, 24, dtype="fp32"), "head.bias": numbers(1000, dtype="fp32")}
    fine |= {"head.weight": numbers(10, 24, seed=5, dtype="fp32"), "head.bias": numbers(10, seed=6, dtype="fp32")}
    artifact = round_trip(peru, tmp_path, base, fine, "--keep", "1%")
    assert "head.weight has shape [10, 24], [1000, 24] in the base" in _prune_notes(peru, tmp_path)
    got = load_file(tmp_path / "r.safetensors")
    for name in ("head.weight", "head.bias"):  # float32 heads come back exactly, though the delta is rounded
        assert artifact.records[name].mode == Mode.WHOLE and raw(got[name]) == raw(fine[name])


def _prune_notes(peru: Peru, folder: Path) -> str:
    at = ["-b", folder / "base.safetensors", "-o", folder / "n.safetensors", "--lossless", "--dry-run"]
    peru("prune", folder / "fine.safetensors", *at)
    return peru.stderr  # type: ignore[attr-defined, no-any-return]


def test_per_task_tensors_are_whole_and_do_not_compete(tmp_path: Path, peru: Peru) -> None:
    base, fine = random_pair("fp32")
    fine["layers.10.mlp.weight"] = fine["layers.10.mlp.weight"] + 100  # by far the largest changes
    artifact = round_trip(peru, tmp_path, base, fine, "--keep", "1%", "--values", "exact", "--per-task", r"layers\.10|norm")
    own = {"layers.10.mlp.weight", "layers.0.norm.weight"}
    assert {n for n, mode in modes(artifact).items() if mode == Mode.WHOLE} == own
    rest = {n: t for n, t in fine.items() if n not in own}
    expected = expected_result(base, rest, post_prune(base, rest, Fraction(1, 100))) | {n: fine[n] for n in own}
    assert_same_tensors(tmp_path / "r.safetensors", expected)
    with pytest.raises(UsageError, match="matches no tensor"):
        paired(tmp_path, base, fine, "nothing-like-it")
    with pytest.raises(UsageError, match="not a regular expression"):
        paired(tmp_path, base, fine, "(")


def test_unrelated_models_are_refused_with_what_was_compared(tmp_path: Path, peru: Peru) -> None:
    base, fine = random_pair("bf16")
    other = {f"decoder.{i}": numbers(150, 150, seed=i) for i in range(4)} | {"embed.weight": numbers(701, 47), "scalar": fine["scalar"]}
    save(base, tmp_path / "base.safetensors")
    save(other, tmp_path / "other.safetensors")
    at = ["-b", tmp_path / "base.safetensors", "-o", tmp_path / "a.safetensors", "--keep", "5%"]
    peru("prune", tmp_path / "other.safetensors", *at, code=1)
    said: str = peru.stderr  # type: ignore[attr-defined]
    total = sum(len(raw(t)) for t in other.values())
    for part in (f"share only 2 of the fine-tune's {total:,} bytes (same names)", "embed.weight: [701, 47] against [701, 48] in the base"):
        assert part in said
    assert "decoder.0: not in the base" in said and "the base has, for example, embed.weight" in said and "is this the base" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "other.safetensors"]


def test_exactly_half_is_enough(tmp_path: Path) -> None:
    base = {"a": numbers(10, 10)}
    assert pairs_of(paired(tmp_path, base, {"a": numbers(10, 10), "new": numbers(10, 10)})) == {"a": "a"}
    with pytest.raises(Mismatch):
        paired(tmp_path, base, {"a": numbers(10, 10), "new": numbers(101)})


def test_dtypes_may_differ_tensor_by_tensor(tmp_path: Path, peru: Peru) -> None:
    base, fine = random_pair("bf16")
    kinds = {"embed.weight": ("bf16", "fp32"), "layers.0.mlp.weight": ("fp32", "bf16"), "layers.1.mlp.weight": ("fp16", "bf16")}
    for name, (before, after) in kinds.items():
        base[name], fine[name] = base[name].to(FLOATS[before]), (fine[name] * 1.5).to(FLOATS[after])
    round_trip(peru, tmp_path, base, fine)
    artifact = round_trip(peru, tmp_path, base, fine, "--keep", "10%", "--values", "exact")
    assert_same_tensors(tmp_path / "r.safetensors", expected_result(base, fine, post_prune(base, fine, Fraction(1, 10))))
    assert {n: (r.base_dtype.name, r.info.dtype.name) for n, r in artifact.records.items() if r.base_dtype}["embed.weight"] == (
        "BF16",
        "F32",
    )


def test_tensors_that_are_not_floats(tmp_path: Path, peru: Peru) -> None:
    base, fine = random_pair("bf16")
    base |= {"same.int": torch.arange(40_000), "new.int": torch.arange(5), "mask": torch.ones(9, dtype=torch.bool), "step": torch.tensor(3)}
    fine |= {
        "same.int": torch.arange(40_000),
        "new.int": torch.arange(5) + 1,
        "mask": torch.zeros(9, dtype=torch.bool),
        "step": torch.tensor(4),
    }
    base["last.int"], fine["last.int"] = torch.zeros(300_000, dtype=torch.int8), torch.zeros(300_000, dtype=torch.int8)
    fine["last.int"][-1] = 1
    base["was.float"], fine["was.float"] = numbers(6), torch.arange(6)
    base["was.int"], fine["was.int"] = torch.arange(6), numbers(6)
    base["int.type"], fine["int.type"] = torch.arange(6), torch.arange(6, dtype=torch.int32)
    base["f8"] = fine["f8"] = numbers(30).to(torch.float8_e4m3fn)
    found = modes(round_trip(peru, tmp_path, base, fine))
    for name in ("same.int", "position_ids"):
        assert found[name] == Mode.COPY, name
    for name in ("f8", "last.int"):  # what may be codes of quantised weights is compared byte by byte
        assert found[name] == Mode.DELTA, name
    for name in ("new.int", "mask", "step", "was.float", "was.int", "int.type"):
        assert found[name] == Mode.WHOLE, name


def test_tensors_that_the_fine_tune_lacks_are_not_written(tmp_path: Path, peru: Peru) -> None:
    base, fine = random_pair("bf16")
    del fine["layers.1.mlp.weight"]
    round_trip(peru, tmp_path, base, fine, "--lossless", "--allow-unpaired")
    assert_same_tensors(tmp_path / "r.safetensors", fine)
    assert "layers.1.mlp.weight" not in load_file(tmp_path / "r.safetensors")


def test_old_names_of_layer_norms_are_stored_whole_and_restored(tmp_path: Path, peru: Peru) -> None:
    """BERT's LayerNorm.gamma and beta became weight and bias. They are small, so they are stored whole; there is no table of renamings."""
    base, fine = random_pair("bf16")
    base |= {"LayerNorm.gamma": numbers(48), "LayerNorm.beta": numbers(48)}
    fine |= {"bert.LayerNorm.weight": numbers(48), "bert.LayerNorm.bias": numbers(48)}
    fine = {n if n.startswith("bert.") else f"bert.{n}": t for n, t in fine.items()}
    found = modes(round_trip(peru, tmp_path, base, fine))
    assert {n for n, mode in found.items() if mode == Mode.WHOLE} == {"bert.LayerNorm.weight", "bert.LayerNorm.bias"}


NAMES = ["größe.weight", "层.0.权重", "a b", "\U0001f600.x", "\uffee.x", "z", "Z", "é", "e\u0301", "x/y", 'quo"te', "%s{}", "d" * 300]


def test_names_of_all_kinds_in_the_order_of_code_points(tmp_path: Path, peru: Peru) -> None:
    """Every entry changes by the same amount, so the first ones are kept."""
    base = {name: torch.zeros(100, dtype=torch.bfloat16) for name in NAMES}
    fine = {name: torch.ones(100, dtype=torch.bfloat16) for name in NAMES}
    assert list(round_trip(peru, tmp_path, base, fine).records) == sorted(NAMES)
    round_trip(peru, tmp_path, base, fine, "--keep", "55%")
    got, left = load_file(tmp_path / "r.safetensors"), 55 * len(NAMES)
    for name in sorted(NAMES):
        here = max(0, min(100, left))
        assert bits(got[name]).tolist() == [0x3F80] * here + [0] * (100 - here), name
        left -= 100


@pytest.mark.parametrize("mode", [("--keep", "3%"), ("--keep", "3%", "--scope", "tensor"), ("--lossless",)])
def test_the_order_of_shards_and_of_bytes_does_not_matter(tmp_path: Path, peru: Peru, mode: tuple[str, ...]) -> None:
    base, fine = random_pair("fp32")
    fine["head"], fine["extra.int"] = numbers(4, 48), torch.arange(9)
    round_trip(peru, tmp_path, base, fine, *mode)
    wanted = (tmp_path / "a.safetensors").read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    shards: list[Tensors] = [dict(sorted(fine.items(), key=lambda item: item[0][::-1])[i::3]) for i in range(3)]
    for i, shard in enumerate(shards):
        save(shard, cut / f"part-{2 - i}.safetensors")
    index = {"weight_map": {n: f"part-{2 - i}.safetensors" for i, shard in enumerate(shards) for n in shard}}
    (cut / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(dict(reversed(fine.items())), tmp_path / "fine.bin")
    for other in (cut, tmp_path / "fine.bin"):
        peru("prune", f"t={other}", "-b", tmp_path / "base.safetensors", "-o", tmp_path / "a.safetensors", "--force", "--no-sync", *mode)
        assert (tmp_path / "a.safetensors").read_bytes() == wanted
