"""The engines' own readers apply what peru writes: vLLM's patch loader and SGLang's `/pull_weights`.

    python benchmarks/oracles/engines.py --vllm checkpoint_weight_patch.py --sglang local_checkpoint.py

Each is one file of the engine's public source, run alone, without the engine and without a GPU:

vLLM    vllm/model_executor/model_loader/checkpoint_weight_patch.py, in the sdist of vllm 0.33 (`pip download --no-deps --no-binary
        :all: vllm`). It imports one function of vLLM, which lists tied embeddings; the model here has none.
SGLang  python/sglang/srt/weight_sync/local_checkpoint.py, from its repository (commit 01d5bfe or later); needs zstandard. It is all that
        /pull_weights does with files; the engine then loads the folder as any checkpoint.

The model is a small Llama in bfloat16 of which 1% of the entries change, once more in a second step. Bits and
logits must be the fine-tune's; exits with 1 if they are not."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import peru_cli
from peru_cli import cli


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def models(folder: Path) -> list[Path]:
    """Three steps of a run."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    for step in range(3):
        model.save_pretrained(folder / f"step-{step}", max_shard_size="400KB" if step == 0 else "50GB")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[torch.rand(parameter.shape) < 0.01] *= 1.02
    return [folder / f"step-{step}" for step in range(3)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.int16), b[name].view(torch.int16)) for name in a)


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(64)[None]).logits
    return found


def peru(*arguments: object) -> None:
    assert cli.run([str(argument) for argument in arguments]) == 0, arguments


class Served(torch.nn.Module):
    """A model with the loader that vLLM's models have: whole tensors by their checkpoint names, written with `copy_`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        table = self.model.state_dict()
        for name, tensor in weights:
            table[name].copy_(tensor)
        return {name for name, _ in weights}


def with_vllm(module: Any, steps: list[Path], artifacts: list[Path], dense: bool) -> str:
    served = Served(steps[0])
    for base, artifact in zip(steps, artifacts, strict=False):
        found = peru_cli.patches(artifact, base, dense=dense)
        module.load_checkpoint_weight_patches(served, [module.CheckpointWeightPatch(*patch) for patch in found])
    fine = LlamaForCausalLM.from_pretrained(steps[-1], dtype=torch.bfloat16)
    bits = same(dict(served.model.state_dict()), dict(fine.state_dict()))
    return verdict(bits, torch.equal(logits(served.model), logits(fine)))


def with_sglang(module: Any, steps: list[Path], artifacts: list[Path], folder: Path) -> str:
    source, local = folder / "published", folder / "local"
    source.mkdir()
    for number, (base, artifact) in enumerate(zip(steps, artifacts, strict=False), start=1):
        peru("export", artifact, "--base", base, "--to", "sglang", "-o", source / f"weight_v{number:06d}", "--quiet")
    arguments = str(local), str(steps[0]), str(source)
    for version in (*range(1, len(artifacts) + 1), len(artifacts)):  # one after another, and once more: nothing is left to do
        module.pull(*arguments, version)
        assert same(tensors(local), tensors(steps[version])), version
    module.pull(*arguments, 0)  # back to the base
    assert same(tensors(local), tensors(steps[0]))
    module.pull(str(folder / "another"), *arguments[1:], len(artifacts))  # a host that begins with the last version
    assert same(tensors(folder / "another"), tensors(steps[-1]))
    module.pull(*arguments, len(artifacts))
    loaded, fine = (LlamaForCausalLM.from_pretrained(where, dtype=torch.bfloat16) for where in (local, steps[-1]))
    return verdict(same(tensors(local), tensors(steps[-1])), torch.equal(logits(loaded), logits(fine)))


def verdict(bits: bool, outputs: bool) -> str:
    return f"bits {'equal' if bits else 'DIFFER'}, logits {'equal' if outputs else 'DIFFER'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--sglang", type=Path)
    options = parser.parse_args()
    said = list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = models(folder)
        artifacts = [folder / f"{step.name}.safetensors" for step in steps[1:]]
        for base, fine, artifact in zip(steps, steps[1:], artifacts, strict=False):
            peru("prune", fine, "--base", base, "-o", artifact, "--lossless", "--quiet")
        if options.vllm is not None:
            stub = ModuleType("vllm.model_executor.models.utils")
            stub._get_tied_embedding_params = lambda model: {}  # type: ignore[attr-defined]
            sys.modules[stub.__name__] = stub
            module = load(options.vllm)
            said += [
                f"vLLM, {'dense' if dense else 'sparse'} patches: {with_vllm(module, steps, artifacts, dense)}" for dense in (False, True)
            ]
        if options.sglang is not None:
            said.append(f"SGLang, two versions of /pull_weights: {with_sglang(load(options.sglang), steps, artifacts, folder)}")
    print("\n".join(said) or "nothing to do: --vllm FILE or --sglang FILE")
    sys.exit(int(not said or any("DIFFER" in line for line in said)))


if __name__ == "__main__":
    main()
