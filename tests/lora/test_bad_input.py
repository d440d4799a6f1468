"""Invalid adapters: messages name file and module, and nothing is left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import save
from tests.lora.test_options import OUTER, SHAPES, factors, save_adapter

Q = "model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


def refused(folder: Path, peru, *arguments: object, code: int, says: tuple[str, ...]) -> str:
    """The command fails with this code, prints all of this, and leaves the folder unchanged."""
    before = sorted(folder.rglob("*"))
    peru(*arguments, code=code)
    for text in says:
        assert text in peru.stderr, peru.stderr
    assert sorted(folder.rglob("*")) == before
    return str(peru.stderr)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "lora", factors(4), 4)


def change(adapter: Path, tensors: dict[str, torch.Tensor | None], **config: object) -> None:
    """Replace or remove (None) tensors of an adapter, and entries of its configuration."""
    table = load_file(adapter / WEIGHTS)
    for name, tensor in tensors.items():
        table.pop(OUTER + name, None)
        if tensor is not None:
            table[OUTER + name] = tensor
    save_file(table, adapter / WEIGHTS, metadata={"format": "pt"})
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(
    ("tensors", "config", "code", "says"),
    [
        ({f"{Q}.lora_B.weight": None}, {}, 1, ("half of a pair is missing", f"{Q} has", "no lora_B")),
        ({f"{Q}.lora_A.weight": None}, {}, 1, ("half of a pair is missing", f"{Q} has", "no lora_A")),
        ({f"{Q}.lora_A.weight": torch.zeros(0, 40), f"{Q}.lora_B.weight": torch.zeros(48, 0)}, {}, 1, (f"{Q}: its rank is 0",)),
        ({f"{Q}.lora_A.weight": torch.zeros(3, 40)}, {}, 1, (f"{Q}: lora_A has rank 3, lora_B 4",)),
        ({f"{Q}.lora_A.weight": torch.zeros(40)}, {}, 1, (f"{Q}: its factors are [40] and [48, 4]",)),
        ({}, {"r": 8}, 1, ("up_proj: its factors have rank 4, adapter_config.json says 8",)),
        ({}, {"r": 0}, 1, ("its factors have rank 4, adapter_config.json says 0",)),
        ({}, {"r": "four"}, 1, ("r is 'four', not a number",)),
        ({}, {"rank_pattern": {"(": 4}}, 1, ("rank_pattern has the entry",)),
        ({}, {"use_dora": True}, 1, ("up_proj: it has no magnitudes", "use_dora=True")),
        ({f"{Q}.lora_magnitude_vector": torch.ones(48)}, {}, 1, (f"{Q}: it has magnitudes",)),
        ({f"{Q}.lora_diag": torch.ones(4)}, {}, 2, (f"{Q}.lora_diag", "KaSA")),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 40, dtype=torch.int32)}, {}, 1, (f"{Q}.lora_A.weight is I32, not floating-point",)),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 5, 3), f"{Q}.lora_B.weight": torch.zeros(8, 2, 1)}, {}, 2, (Q, "grouped convolution")),
        ({}, {"init_lora_weights": "pissa"}, 2, ("init_lora_weights='pissa'", "path_initial_model_for_weight_conversion")),
        ({}, {"use_qalora": True}, 2, ("use_qalora=True",)),
    ],
)  # fmt: skip
def test_broken_and_strange_adapters(tmp_path: Path, peru, adapter: Path, tensors, config, code: int, says: tuple[str, ...]) -> None:
    change(adapter, tensors, **config)
    said = refused(tmp_path, peru, "svd-lora", adapter, "-o", tmp_path / "out", "--rank", 2, code=code, says=says)
    assert str(adapter) in said


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("PREFIX_TUNING", "adds to the input"),
        ("XLORA", "depends on the input"),
        ("OSF", "a decomposition of the base"),
        ("NEW", "peru does not know"),
        (None, ""),
    ],
)
def test_other_tuners_are_refused_by_name(tmp_path: Path, peru, adapter: Path, kind: str | None, says: str) -> None:
    change(adapter, {}, peft_type=kind)
    refused(tmp_path, peru, "svd-lora", adapter, "-o", tmp_path / "out", "--rank", 2, code=2, says=(f"of type {kind}", says, "merge the"))
    refused(tmp_path, peru, "inspect", adapter, code=2, says=(f"of type {kind}",))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora_unet_x.hada_w1_a", "has two updates"),
        ("lora_unet_x.lokr_w1", "has two updates"),
        ("lora_unet_z.hada_w1_a", "its LoHa has hada_w1_a only"),
        ("lora_unet_z.lokr_w1", "its LoKr has lokr_w1 only"),
        ("lora_unet_x.diff_m", "modulations"),
        ("lora_unet_x.reshape_weight", "a new shape of the base's weight"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.a1.weight", "GLoRA"),
        ("lora_unet_x.lora_mid.weight", "LoCon"),
        ("lora_unet_y.alpha", "no pair of LoRA factors"),
    ],
)
def test_other_kinds_of_files_are_refused_by_name(tmp_path: Path, peru, name: str, says: str) -> None:
    table = {"lora_unet_x.lora_down.weight": torch.ones(2, 5), "lora_unet_x.lora_up.weight": torch.ones(5, 2), name: torch.ones(2, 2)}
    save_file(table, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    code = 1 if re.search("alpha|hada|lokr", name) else 2
    refused(
        tmp_path,
        peru,
        "svd-lora",
        tmp_path / "in.safetensors",
        "-o",
        out,
        "--rank",
        2,
        code=code,
        says=(says, name.partition(".")[0] if "_w1" in name else name, "in.safetensors"),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_that_are_not_finite(tmp_path: Path, peru, adapter: Path, factor: str, value: float) -> None:
    name = f"{Q}.lora_{factor}.weight"
    table = load_file(adapter / WEIGHTS)
    table[OUTER + name][1, 2] = value
    change(adapter, {name: table[OUTER + name]})
    base = {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()}
    save(base, tmp_path / "base.safetensors")
    says = (f"{WEIGHTS}: {OUTER}{name} holds NaN or infinite values",)
    refused(tmp_path, peru, "svd-lora", adapter, "-o", tmp_path / "out", "--rank", 2, code=1, says=says)
    refused(tmp_path, peru, "svd-lora", adapter, "-o", tmp_path / "out", "--energy", "90%", code=1, says=says)
    refused(tmp_path, peru, "inspect", adapter, code=1, says=says)
    refused(tmp_path, peru, "unpack", adapter, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "out", code=1, says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rank", 0), "--rank 0 keeps nothing"),
        (("--rank", -3), "--rank -3 keeps nothing"),
        ((), "one of --rank, --energy and --max-bytes, not nothing"),
        (("--rank", 2, "--energy", "90%"), "not --rank and --energy"),
        (("--energy", "0"), "keeps nothing"),
        (("--energy", "99"), "did you mean --energy 99%?"),
        (("--max-bytes", "lots"), "is not a size"),
        (("--rank", 2, "--dtype", "fp64"), "no program loads such an adapter"),
        (("--rank", 2, "--rest", "away"), "not modules or delta"),
        (("--rank", 2, "--base-id", "org/x"), "add --base BASE"),
        (("--rank", 2, "--per-task", "x"), "add --base BASE"),
    ],
)
def test_invalid_options_are_refused(tmp_path: Path, peru, adapter: Path, options: tuple[object, ...], says: str) -> None:
    refused(tmp_path, peru, "svd-lora", adapter, "-o", tmp_path / "out", *options, code=2, says=(says,))


def test_an_adapter_of_another_base(tmp_path: Path, peru, adapter: Path) -> None:
    """All problems are reported at once, from headers alone, wherever an adapter meets a base."""
    base = {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()}
    up = "model.layers.0.mlp.up_proj"
    save(base | {f"{Q}.weight": torch.zeros(48, 41)}, tmp_path / "shape.safetensors")
    save({name: tensor for name, tensor in base.items() if "up_proj" not in name}, tmp_path / "lacks.safetensors")
    shape = ("does not fit", f"{Q} in {WEIGHTS}: factors [4, 40] and [48, 4]", f"{Q}.weight of the base is [48, 41]")
    lacks = ("does not fit", f"{up} in {WEIGHTS}: the base has no {up}.weight")
    for name, says in (("shape", shape), ("lacks", lacks)):
        at = ("-b", tmp_path / f"{name}.safetensors", "-o", tmp_path / "out")
        refused(tmp_path, peru, "unpack", adapter, *at, code=1, says=says)
        refused(tmp_path, peru, "svd-lora", adapter, *at, "--rank", 2, code=1, says=says)
        refused(tmp_path, peru, "merge", f"a={adapter}", *at, "-m", "task-arithmetic", code=1, says=says)
    save(base, tmp_path / "base.safetensors")
    peru("svd-lora", adapter, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "out", "--rank", 2, "--no-sync")


def test_a_bias_without_a_place(tmp_path: Path, peru, adapter: Path) -> None:
    change(adapter, {f"{Q}.lora_B.bias": torch.ones(48)}, lora_bias=True)
    base = {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()}
    save(base, tmp_path / "base.safetensors")
    says = (f"{Q}.lora_B.bias: the base has no bias {Q}.bias",)
    refused(tmp_path, peru, "unpack", adapter, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "out", code=1, says=says)


def test_adapters_that_can_be_resized_but_not_folded(tmp_path: Path, peru, adapter: Path) -> None:
    base = {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()}
    save(base, tmp_path / "base.safetensors")
    for name, value in (("trainable_token_indices", [1, 2]), ("layer_replication", [[0, 1], [0, 1]])):
        change(adapter, {}, **{"trainable_token_indices": None, name: value})
        at = ("-b", tmp_path / "base.safetensors", "-o", tmp_path / "out")
        refused(tmp_path, peru, "unpack", adapter, *at, code=2, says=(name, "cannot be added to its base"))
        peru("svd-lora", adapter, "-o", tmp_path / name, "--rank", 2, "--no-sync")
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())[name] == value


def test_folders_and_models_that_are_not_adapters(tmp_path: Path, peru, adapter: Path) -> None:
    base = {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()}
    save(base, tmp_path / "model.safetensors")
    at = ("-o", tmp_path / "out", "--rank", 2)
    refused(tmp_path, peru, "svd-lora", tmp_path / "model.safetensors", *at, code=2, says=("is not a LoRA adapter", "add --base BASE"))
    refused(tmp_path, peru, "svd-lora", tmp_path / "nothing", *at, code=2, says=("no such file or folder",))
    (tmp_path / "empty").mkdir()
    refused(tmp_path, peru, "svd-lora", tmp_path / "empty", *at, code=2, says=("a folder without model.safetensors",))
    (adapter / WEIGHTS).rename(adapter / "other.safetensors")
    refused(tmp_path, peru, "svd-lora", adapter, *at, code=1, says=("has adapter_config.json, but neither", WEIGHTS))
    (adapter / "adapter_config.json").write_text("[1]")
    refused(tmp_path, peru, "svd-lora", adapter, *at, code=1, says=("adapter_config.json: not a table",))
    (adapter / "adapter_config.json").write_text("{")
    refused(tmp_path, peru, "svd-lora", adapter, *at, code=1, says=("adapter_config.json: not JSON",))
    # several by name, none of them the default: svd-lora takes all, unpack needs one
    save_adapter(tmp_path / "many" / "x", factors(4), 4)
    save_adapter(tmp_path / "many" / "y", factors(4), 4)
    says = ("holds several adapters", str(tmp_path / "many" / "x"), "name one of them")
    refused(tmp_path, peru, "unpack", tmp_path / "many", "-b", tmp_path / "model.safetensors", "-o", tmp_path / "out", code=2, says=says)
    # and where a full model is needed
    good = tmp_path / "many" / "x"
    says = ("is a PEFT adapter, but a full checkpoint is needed here", "peru unpack")
    at = ("-b", good, "-o", tmp_path / "a.safetensors", "--keep", "10%")
    refused(tmp_path, peru, "prune", tmp_path / "model.safetensors", *at, code=2, says=says)


def test_full_fine_tunes_that_cannot_become_adapters(tmp_path: Path, peru) -> None:
    noise = torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(shape, generator=noise) for name, shape in SHAPES.items()}
    save(base, tmp_path / "base.safetensors")
    at = ("-b", tmp_path / "base.safetensors", "-o", tmp_path / "out", "--rank", 2)
    fine = tmp_path / "fine.safetensors"
    save({f"other.{i}": torch.ones(90, 90) for i in range(3)}, fine)
    refused(tmp_path, peru, "svd-lora", fine, *at, code=1, says=("share only 0 of the fine-tune's", "is this the base"))
    save(base, fine)
    refused(tmp_path, peru, "svd-lora", fine, *at, code=2, says=("every weight matrix that changed",))
    broken = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=noise) for name, tensor in base.items()}
    broken[f"{Q}.weight"][3, 5] = float("nan")
    save(broken, fine)
    says = (f"{Q}.weight differs from the base by NaN or infinity at entry {3 * 40 + 5}", "--per-task")
    refused(tmp_path, peru, "svd-lora", fine, *at, code=1, says=says)
    # stored whole, it is no problem
    peru("svd-lora", fine, *at, "--per-task", "q_proj", "--no-sync")
    peru("unpack", tmp_path / "out", "-b", tmp_path / "base.safetensors", "-o", tmp_path / "r.safetensors", "--no-sync")
    assert torch.equal(load_file(tmp_path / "r.safetensors")[f"{Q}.weight"].nan_to_num(7), broken[f"{Q}.weight"].nan_to_num(7))


def test_results_that_do_not_fit_their_dtype(tmp_path: Path, peru, adapter: Path) -> None:
    base = {f"{name}.weight": torch.full(shape, 6e4) for name, shape in SHAPES.items()}
    save({name: tensor.half() for name, tensor in base.items()}, tmp_path / "base.safetensors")
    table = load_file(adapter / WEIGHTS)
    change(adapter, {f"{Q}.lora_B.weight": table[f"{OUTER}{Q}.lora_B.weight"] * 1e6})
    at = ("-b", tmp_path / "base.safetensors", "-o", tmp_path / "out")
    refused(tmp_path, peru, "unpack", adapter, *at, code=1, says=(f"{Q}.weight does not fit F16", "--dtype bf16 or fp32"))
    peru("unpack", adapter, *at, "--dtype", "fp32", "--no-sync")
    change(adapter, {f"{Q}.lora_B.weight": table[f"{OUTER}{Q}.lora_B.weight"] * 1e30})
    at = ("-o", tmp_path / "small", "--rank", 2, "--dtype", "fp16")
    refused(tmp_path, peru, "svd-lora", adapter, *at, code=1, says=(f"{Q} does not fit F16", "--dtype bf16 or fp32"))
