"""Superposition as pure functions: which tensors repeat, which blocks and signs, against plain programs of a few lines."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tr

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.kernels.random import words
from peru_cli.methods.compact import superpose as sp

TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**TINY, "vocab_size": 60, "max_position_embeddings": 20}


def infos(shapes: dict[str, tuple[int, ...]]) -> list[TensorInfo]:
    return [TensorInfo(name, BY_NAME["F32"], shape) for name, shape in shapes.items()]


def groups_of(model: torch.nn.Module, **options) -> dict[str, set[int]]:
    """Depths of the groups by prefix."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if t.is_floating_point()}
    found: dict[str, set[int]] = {}
    for group in sp.find_groups(infos(shapes), **options):
        assert len({shapes[name] for name in group.members}) == 1
        assert len({re.sub(r"\d+", "*", name) for name in group.members}) == 1
        found.setdefault(group.prefix, set()).add(group.depth)
    return found


@pytest.mark.parametrize(
    "make,expected",
    [
        (lambda: tr.BertModel(tr.BertConfig(**TEXT, num_hidden_layers=3)), {"encoder.layer.": {3}}),
        (lambda: tr.RobertaModel(tr.RobertaConfig(**TEXT, num_hidden_layers=3)), {"encoder.layer.": {3}}),
        (
            lambda: tr.DistilBertModel(tr.DistilBertConfig(dim=16, hidden_dim=24, n_heads=2, n_layers=3, vocab_size=60)),
            {"transformer.layer.": {3}},
        ),
        (lambda: tr.GPT2Model(tr.GPT2Config(n_embd=16, n_head=2, n_layer=4, vocab_size=60, n_positions=20)), {"h.": {4}}),
        (lambda: tr.LlamaModel(tr.LlamaConfig(**TEXT, num_hidden_layers=12)), {"layers.": {12}}),
        (
            lambda: tr.T5Model(tr.T5Config(d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=3, num_decoder_layers=5, vocab_size=60)),
            {"encoder.block.": {3}, "decoder.block.": {5}},
        ),
        (
            lambda: tr.CLIPModel(
                tr.CLIPConfig(
                    text_config={**TEXT, "num_hidden_layers": 3},
                    vision_config={**TINY, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4},
                )
            ),
            {"text_model.encoder.layers.": {3}, "vision_model.encoder.layers.": {3}},
        ),
    ],
    ids=["bert", "roberta", "distilbert", "gpt2", "llama", "t5", "clip"],
)
def test_structure_is_found(make, expected: dict[str, set[int]]) -> None:
    found = groups_of(make())
    assert found == expected


def test_structure_of_vit_in_its_checkpoints() -> None:
    model = tr.ViTModel(tr.ViTConfig(**TINY, num_hidden_layers=4, image_size=8, patch_size=4))
    ((prefix, depths),) = groups_of(model).items()
    assert depths == {4} and prefix.endswith(("layer.", "layers."))


def test_structure_of_convnext_stages_by_depth() -> None:
    model = tr.ConvNextModel(tr.ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[2, 2, 3, 2], image_size=32))
    found = groups_of(model)
    depths = [found[prefix] for prefix in sorted(found)]
    assert len(found) == 4 and depths == [{2}, {2}, {3}, {2}], found


def test_mixtral_experts_move_with_their_layer() -> None:
    """As in Mixtral's checkpoints; transformers fuses them in memory."""
    shapes = {f"model.layers.{i}.block_sparse_moe.experts.{j}.w1.weight": (6, 4) for i in range(3) for j in range(8)}
    groups = sp.find_groups(infos(shapes))
    assert len(groups) == 8 and {(g.prefix, g.depth) for g in groups} == {("model.layers.", 3)}
    alone = {name: shape for name, shape in shapes.items() if ".layers.1." in name}
    (group,) = sp.find_groups(infos(alone))
    assert group.prefix == "model.layers.1.block_sparse_moe.experts." and group.depth == 8


def test_order_of_members_skip_target_and_exclude() -> None:
    shapes = {f"h.{i}.w": (2, 3) for i in range(12)} | {f"h.{i}.b": (3,) for i in range(12)} | {"wte": (5, 3), "h.12.w": (9, 9)}
    (group,) = sp.find_groups(infos(shapes))
    assert group.members == tuple(f"h.{i}.w" for i in range(12))  # 10 comes after 9, not after 1
    (group,) = sp.find_groups(infos(shapes), skip=4)
    assert group.members == ("h.0.w", "h.4.w", "h.8.w")
    assert sp.find_groups(infos(shapes), exclude=re.compile(r"\.w$")) == []
    by_name = {g.members[0]: g for g in sp.find_groups(infos(shapes), target=re.compile("w|b$"))}
    assert {name: g.depth for name, g in by_name.items()} == {"h.0.w": 12, "h.0.b": 12, "wte": 1, "h.12.w": 1}
    assert by_name["h.0.w"].prefix == by_name["h.0.b"].prefix == "h."  # whole blocks move together


def plain_word(seed: int, parts: list[str], number: int) -> int:
    """docs/random.md in plain integers."""
    digest = hashlib.sha256("\0".join(["peru random 1", str(seed), *parts]).encode()).digest()
    k = [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")]
    block = number // 4
    c = [block % 2**32, block >> 32, 0, 0]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b % 2**32, a >> 32 ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[number % 4]


def plain_moves(seed: int, task: str, prefix: str, depth: int) -> list[int]:
    order = list(range(depth))
    for drawn, i in enumerate(reversed(range(1, depth))):
        j = plain_word(seed, [task, "order", prefix, str(depth)], drawn) * (i + 1) // 2**32
        order[i], order[j] = order[j], order[i]
    return order


def plain_signs(seed: int, task: str, tensor: str, count: int) -> list[int]:
    return [-1 if plain_word(seed, [task, "signs", tensor], j // 32) >> j % 32 & 1 else 1 for j in range(count)]


@pytest.mark.parametrize("depth", [1, 2, 6, 12, 80])
def test_permutations_match_the_document(depth: int) -> None:
    for seed in (0, 7, 2**63):
        got = sp.permutation(seed, "news", "encoder.layer.", depth)
        assert sorted(got) == list(range(depth)) and got == plain_moves(seed, "news", "encoder.layer.", depth)


def test_permutations_are_uniform() -> None:
    """Each of the 24 orders occurs about equally often: chi squared with 23 degrees of freedom exceeds 49.7 once in a thousand."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        order = tuple(sp.permutation(seed, "t", "layers.", 4))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24 and sum((n - 200) ** 2 / 200 for n in counts.values()) < 49.7


@pytest.mark.parametrize("count", [1, 31, 32, 33, 130, 1000])
def test_signs_match_the_document(count: int) -> None:
    got = sp.signs(7, "news", "encoder.layer.0.weight", count)
    assert got.dtype == np.float32 and got.tolist() == plain_signs(7, "news", "encoder.layer.0.weight", count)
    assert abs(sp.signs(7, "a", "w", 10_000).mean()) < 0.04  # four standard deviations


def test_vectors_of_the_document() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "random.md").read_text("utf-8")
    task, prefix, tensor = "t0", "encoder.layer.", "encoder.layer.0.weight"
    order = ", ".join(map(str, sp.permutation(3, task, prefix, 12)))
    row = "".join("+" if sign > 0 else "-" for sign in sp.signs(3, task, tensor, 64))
    first = " ".join(f"{word:08x}" for word in words((0, 0), 0, 4))
    assert order in page and row in page and first in page
    assert first == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"  # Random123's known answer


@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4), (40,), (64, 1), (1, 9)])
def test_signs_are_one_a_column_in_any_piece(shape: tuple[int, ...]) -> None:
    width = sp.columns(shape)
    row = sp.signs(0, "t", "w", width)
    values = np.random.default_rng(0).normal(size=math.prod(shape)).astype(np.float32)
    expected = (values.reshape(-1, width) * row).reshape(-1)
    for cut in range(0, len(values) + 1, 3):
        parts = [sp.flip(values[:cut].copy(), row, 0), sp.flip(values[cut:].copy(), row, cut)]
        assert np.array_equal(np.concatenate(parts), expected)


def test_blocks_move_whole_and_shifts_wrap_round() -> None:
    shapes = {f"h.{i}.{kind}": shape for i in range(5) for kind, shape in (("w", (2, 3)), ("v", (3, 3)))}
    arrangement = sp.Arrangement(sp.find_groups(infos(shapes)), 7)
    sources = arrangement.sources("a", 0)
    assert sorted(sources) == sorted(sources.values()) == sorted(shapes)
    assert all(sources[f"h.{i}.w"].removesuffix("w") == sources[f"h.{i}.v"].removesuffix("v") for i in range(5))
    shifted = sp.Arrangement(arrangement.groups, 7, "shift").sources("a", 7)
    assert all(shifted[f"h.{(i + 7) % 5}.w"] == f"h.{i}.w" for i in range(5))
    assert all(a == b for a, b in sp.Arrangement(arrangement.groups, 7, "none").sources("a", 3).items())
    assert [sp.free_shift(taken) for taken in ([], [0, 1, 2], [0, 2], [1, 2])] == [0, 3, 1, 0]


def test_steps_are_powers_of_two_below_the_mean_square_root() -> None:
    for mean_square, exponent in ((1.0, 0), (3.99, 0), (4.0, 1), (0.25, -1), (0.2499, -2), (2.0**-40, -20)):
        assert sp.step_exponent(mean_square, 4) == exponent - 4, mean_square
    assert sp.step_exponent(0.0, 4) == 0


@pytest.mark.parametrize("tasks", [2, 3, 8, 20])
def test_error_and_cosine_of_independent_vectors(tasks: int) -> None:
    """||retrieved - tau|| / ||tau|| = sqrt(T - 1), cosine 1 / sqrt(T); the default step does not show in three digits."""
    rng = np.random.default_rng(tasks)
    vectors = rng.normal(size=(tasks, 400_000))
    products = vectors @ vectors.T
    for quality in sp.predict(products, np.zeros_like(products), 0.0, 1.0):
        assert quality.error == pytest.approx(math.sqrt(tasks - 1), rel=0.01)  # norms differ by 1 / sqrt(400,000) each
        assert quality.cosine == pytest.approx(1 / math.sqrt(tasks), rel=0.01)
    step = 2.0 ** -sp.default_precision(tasks)
    total = (np.rint(vectors / step) * step).sum(axis=0)
    for exact, rounded in zip(vectors.sum(axis=0) - vectors, total - vectors, strict=True):
        before, after = np.linalg.norm(exact), np.linalg.norm(rounded)
        assert after / before - 1 < 5e-4
    coarser = (np.rint(vectors / (4 * step)) * 4 * step).sum(axis=0)
    assert np.linalg.norm(coarser - vectors[0]) / np.linalg.norm(vectors.sum(axis=0) - vectors[0]) - 1 > 5e-4


def test_the_best_scale_equals_least_squares() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(3, 1000)) * [[1.0], [2.0], [0.5]]
    total = vectors.sum(axis=0)
    best = sp.best_scale([float(total @ v) for v in vectors], float(total @ total))
    stacked = np.concatenate(vectors), np.tile(total, 3)
    assert best == pytest.approx(np.linalg.lstsq(stacked[1][:, None], stacked[0], rcond=None)[0][0])
    quality = sp.quality(float(vectors[1] @ vectors[1]), float(total @ total), float(total @ vectors[1]), 0.7)
    assert quality.error == pytest.approx(np.linalg.norm(0.7 * total - vectors[1]) / np.linalg.norm(vectors[1]))
