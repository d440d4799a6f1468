"""--rename: names that changed between versions are matched by the user's rules; printed, recorded, never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from peru_cli.publish.card import card, contents
from tests.conftest import assert_same_tensors, save

NOISE = torch.Generator().manual_seed(2)


def layers(*names: str) -> dict[str, torch.Tensor]:
    return {f"{name}.{i}.weight": torch.randn(12, 12, generator=NOISE) for name in names for i in range(3)}


def family(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    base = layers("visual.blocks", "model.layers")
    new = {"visual.blocks": "model.visual.blocks", "model.layers": "model.language_model.layers"}
    fine = {n: t + 0.1 * torch.randn(t.shape, generator=NOISE) for n, t in base.items()}
    renamed = {next(n.replace(old, now) for old, now in new.items() if n.startswith(old)): t for n, t in fine.items()}
    return save(base, tmp_path / "base.safetensors"), save(renamed, tmp_path / "fine.safetensors"), base, fine


RULES = ["--rename", r"^model\.(visual)=\1", "--rename", r"language_model\.="]


def test_a_renamed_model_merges_and_is_pruned_under_the_bases_names(tmp_path: Path, peru) -> None:
    b, f, base, fine = family(tmp_path)
    at = ["-b", b, "--no-sync"]
    peru("prune", f, *at, "-o", tmp_path / "a.safetensors", "--lossless", code=1)
    assert "--rename" in peru.stderr or "share only" in peru.stderr
    half = ["--rename", r"^model\.(visual)=\1"]
    for command, out, method in (
        ("merge", "m", ["-m", "linear"]),
        ("merge", "m", ["-m", "ties"]),
        ("prune", "a.safetensors", ["--lossless"]),
    ):
        models = [f"a={f}", f"b={b}"] if "linear" in method else [f"a={f}"]
        peru(command, *models, *at, "-o", tmp_path / out, *method, *half, code=1)
        assert "bytes of" in peru.stderr and "have no partner: model.language_model.layers.*.weight" in peru.stderr
        assert not (tmp_path / out).exists()
    peru("merge", f"a={f}", *at, "-o", tmp_path / "m", "-m", "task-arithmetic", "--scale", 0.5, *RULES)
    assert "6 tensors renamed, such as" in peru.stderr
    got = load_file(tmp_path / "m" / "model.safetensors")
    assert sorted(got) == sorted(base)
    for name in base:
        torch.testing.assert_close(got[name], (base[name] + fine[name]) / 2, rtol=1e-5, atol=1e-6)
    assert r"--rename 'language_model\.='" in (tmp_path / "m" / "README.md").read_text()
    peru("prune", f, *at, "-o", tmp_path / "a.safetensors", "--lossless", *RULES)
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "r.safetensors")
    assert_same_tensors(tmp_path / "r.safetensors", fine)


def test_rules_that_do_nothing_or_too_much_are_refused(tmp_path: Path, peru) -> None:
    b, f, _, _ = family(tmp_path)
    merge = ["merge", f"a={f}", "-b", b, "-o", tmp_path / "m", "-m", "task-arithmetic"]
    for rule, code, says in (
        ("nothing=x", 2, "changes no tensor's name"),
        ("no sign", 2, "is not REGEX=REPLACEMENT"),
        ("(=x", 2, "is not REGEX=REPLACEMENT"),
        (r"visual=\3", 2, "is not REGEX=REPLACEMENT"),
        (r"\d=0", 1, "the same name"),
        ("^model=../x", 2, "--rename would give"),
    ):
        peru(*merge, "--rename", rule, code=code)
        assert says in peru.stderr and not (tmp_path / "m").exists(), (rule, peru.stderr)


def test_a_pack_of_renamed_models_unpacks_under_the_bases_names(tmp_path: Path, peru) -> None:
    b, f, base, fine = family(tmp_path)
    peru("shuffle-pack", f"a={f}", "-b", b, "-o", tmp_path / "p.safetensors", "--no-sync", code=1)
    peru("shuffle-pack", f"a={f}", "-b", b, "-o", tmp_path / "p.safetensors", "--no-sync", *RULES)
    assert "6 tensors renamed, such as" in peru.stderr
    peru("unpack", tmp_path / "p.safetensors", "--task", "a", "-b", b, "-o", tmp_path / "a.safetensors", "--no-sync")
    got = load_file(tmp_path / "a.safetensors")
    assert sorted(got) == sorted(base)
    for name in base:
        torch.testing.assert_close(got[name], fine[name], rtol=0, atol=0.01)


def test_artifacts_and_their_cards_record_the_rules(tmp_path: Path, peru) -> None:
    b, f, _, _ = family(tmp_path)
    for command, out, more in (
        ("prune", "a.safetensors", ["--lossless"]),
        ("prune", "b.safetensors", ["--min-quality", "50%"]),
        ("shuffle-pack", "p.safetensors", []),
    ):
        peru(command, f"a={f}", "-b", b, "-o", tmp_path / out, "--no-sync", *more, *RULES)
        with safe_open(tmp_path / out, "np") as file:
            assert json.loads(file.metadata()["peru.rename"]) == RULES[1::2]
        text = card(contents({out: tmp_path / out}), "me/deltas")
        assert r"--rename '^model\.(visual)=\1' --rename 'language_model\.='" in text, text
