"""`peru shuffle-pack --method smile`: what it reports, the same bytes however it runs, and options and models that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from peru_cli import demo
from peru_cli.artifacts.packs.smile import Smile
from tests.live.test_routed import bert, write

Peru = Callable[..., str]


def arguments(folder: Path, *more: object) -> list[object]:
    given = [f"{name}={folder / name}" for name in ("t1", "t0")]
    return ["shuffle-pack", *given, "-b", folder / "base", "-o", folder / "r.safetensors", "--method", "smile", "--no-sync", *more]


def test_the_report_gives_the_error_of_the_whole_task_vector(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path)
    told = json.loads(peru(*arguments(tmp_path, "--rank", 2, "--json")))
    base = load_file(tmp_path / "base" / "model.safetensors")
    with Smile(tmp_path / "r.safetensors") as routed:
        assert told["file_bytes"] == (tmp_path / "r.safetensors").stat().st_size and told["layers"] == len(routed.layers) == 13
        for number, task in enumerate(told["packed"]):
            fine = load_file(tmp_path / task["task"] / "model.safetensors")
            squared = error = 0.0
            kept = {layer.weight.name: place for place, layer in enumerate(routed.layers)}
            for name, below in base.items():
                vector = (fine["bert." + name].double() - below.double()).numpy()
                squared += float((vector**2).sum())
                if name in kept:
                    numbers = np.frombuffer(routed.read_expert(kept[name], number), "<f4").astype(np.float64)
                    out, width = vector.shape
                    right, left = numbers[: 2 * width].reshape(2, width), numbers[2 * width : 2 * (width + out)].reshape(2, out)
                    error += float(((left.T @ right - vector) ** 2).sum())
            assert task["norm"] == pytest.approx(squared**0.5, rel=1e-5) and task["error"] == pytest.approx(
                (error / squared) ** 0.5, rel=2e-4
            )
            assert task["cosine"] == pytest.approx((1 - error / squared) ** 0.5, rel=2e-4)
    shown = json.loads(peru("inspect", tmp_path / "r.safetensors", "--json"))
    assert [task["task"] for task in shown["tasks"]] == ["t0", "t1"] and shown["parts"]["experts"] == sum(
        x["bytes"] for x in shown["layers"]
    )


def test_threads_and_order_change_no_byte(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path)
    peru(*arguments(tmp_path, "--threads", 1))
    first = (tmp_path / "r.safetensors").read_bytes()
    turned = arguments(tmp_path, "--threads", 3, "--force", "--tile-entries", 16384)
    turned[1], turned[2] = turned[2], turned[1]
    peru(*turned)
    assert (tmp_path / "r.safetensors").read_bytes() == first and str(tmp_path).encode() not in first


def test_the_plan_is_shown_without_writing(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path)
    told = json.loads(peru(*arguments(tmp_path, "--dry-run", "--json", "--target", "attention")))
    assert not (tmp_path / "r.safetensors").exists() and len(told["layers"]) == 8 and all("attention" in name for name in told["layers"])
    assert "embeddings.word_embeddings.weight" in told["as_in_base"] and told["heads"]["t0"] == ["classifier.bias", "classifier.weight"]


def test_adapters_become_experts_of_their_rank(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path, (3,))
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = bert(3, 0)
        model.bert.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"))
        adapted = get_peft_model(model.bert, LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / f"lora{seed}")
    given = [f"l{seed}={tmp_path / f'lora{seed}'}" for seed in (0, 1)]
    peru("shuffle-pack", *given, "-b", tmp_path / "base", "-o", tmp_path / "r.safetensors", "--method", "smile", "--no-sync", "--rank", 4)
    with Smile(tmp_path / "r.safetensors") as routed:
        ranks = {layer.weight.name: [expert.rank for expert in layer.experts] for layer in routed.layers}
    assert sorted(ranks) == [f"encoder.layer.{i}.attention.self.{name}.weight" for i in (0, 1) for name in ("query", "value")]
    assert all(rank >= 2 for found in ranks.values() for rank in found)


def test_impossible_options_are_refused(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path)
    for more, said in (
        (["--rank", 2, "--gate-rank", 3], "--gate-rank 3 is more than --rank 2"),
        (["--top-k", 3], "--top-k 3 of 2 tasks"),
        (["--seed", 1], "--seed: no meaning with --method smile"),
        (["--scale", "0.5"], "--scale: no meaning with --method smile"),
        (["--threshold", "0.5"], "--threshold: no meaning with --method smile"),
        (["--add-to", tmp_path / "x.safetensors"], "change packs, not routed experts"),
    ):
        peru(*arguments(tmp_path, *more), code=2)
        assert said in peru.stderr  # type: ignore[attr-defined]
    peru(*arguments(tmp_path, "--target", "embeddings"), code=1)
    assert "no linear layer" in peru.stderr  # type: ignore[attr-defined]
    plain = arguments(tmp_path, "--rank", 2)
    plain[plain.index("smile")] = "superpose"
    peru(*plain, code=2)
    assert "--rank: no meaning with --method superpose" in peru.stderr  # type: ignore[attr-defined]
    assert not (tmp_path / "r.safetensors").exists()


def test_merge_points_to_the_command_that_routes(tmp_path: Path, peru: Peru) -> None:
    more = ["-b", demo.BASE, "-o", tmp_path / "smile", "--method", "smile", "--rank", 16, "--gate-rank", 4]
    peru("merge", "a=x", "b=y", *more, code=2)
    assert "`peru shuffle-pack` in place of `peru merge`" in peru.stderr  # type: ignore[attr-defined]
