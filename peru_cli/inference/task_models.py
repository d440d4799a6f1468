"""Fine-tunes as models in memory, each with the examples of its task, for whatever looks at data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from blake3 import blake3

from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch, UsageError
from peru_cli.finetunes.adapter import fine_name
from peru_cli.finetunes.fine_tune import FineTune
from peru_cli.inference.data import Examples
from peru_cli.inference.eval_model import EvalModel, in_memory
from peru_cli.inference.models import build_model, pick_device
from peru_cli.inference.prepare import Loaded, Settings, load, prepare
from peru_cli.inference.reading import read_examples, split_data
from peru_cli.live.memory import read_tensors
from peru_cli.shown import listed


@dataclass(frozen=True)
class Running:
    """How and on what models run. Labels are read only if they are needed."""

    examples: Mapping[str, Examples]
    device: torch.device
    batch_size: int


def read_data(
    texts: list[str], tasks: tuple[str, ...], device: str, batch_size: int, why: str, most: int | None = None, every: bool = True
) -> Running:
    """Read the examples of tasks, the first `most` of each. UsageError if a name is not a task's, or with `every` a task has none."""
    files = split_data(texts)
    if list(files) == [""] and len(tasks) == 1:
        files = {tasks[0]: files[""]}
    strangers, lacking = [task for task in files if task not in tasks], [task for task in tasks if task not in files]
    if strangers:
        raise UsageError(f"--data {strangers[0]}=...: no model is called {strangers[0]!r}", f"the tasks are {listed(tasks)}")
    if lacking and every:
        raise UsageError(f"{why} needs examples of every task", " ".join(f"--data {task}=FILE" for task in lacking))
    return Running({task: read_examples(file, most) for task, file in files.items()}, pick_device(device), batch_size)


def digest_inputs(examples: Examples) -> str:
    """A digest of the parts of the examples that models see: no labels, no file names."""
    total = blake3(b"peru examples 1\0")
    for part in (examples.texts, examples.pairs, examples.targets):
        total.update(b"-" if part is None else len(part).to_bytes(8, "little"))
        for text in part or ():
            encoded = text.encode("utf-8", "surrogatepass")
            total.update(len(encoded).to_bytes(8, "little") + encoded)
    if isinstance(examples.images, list):
        for path in examples.images:
            total.update(blake3(path.read_bytes()).digest())
    elif examples.images is not None:
        total.update(f"{examples.images.dtype} {examples.images.shape}".encode() + examples.images.tobytes())
    return total.hexdigest()


def own_files(fine: Checkpoint) -> dict[str, bytes]:
    """A fine-tune's config, tokenizer and so on."""
    if isinstance(fine, FineTune):
        return fine.contents()[0]
    return _files_of(fine)


def trace_names(state: Mapping[str, torch.Tensor], loaded: Loaded) -> dict[str, str]:
    """Map each name in the model to the name of the checkpoint's tensor that was loaded there.

    transformers renames tensors on loading, differently for each architecture. So a second model is loaded from tensors that are
    each filled with a number of their own. Mismatch if tensors were joined or split."""
    names = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()]
    dyed = dict(state) | {name: torch.full(state[name].shape, float(number)) for number, name in enumerate(names, 1)}
    model, traced = loaded.model, {}
    config = type(model.config).from_dict(model.config.to_dict())
    probe = build_model(dyed, config, loaded.kind, loaded.label, dtype=torch.float32, device=torch.device("cpu"))
    for name, tensor in probe.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            number = float(tensor.flatten()[0])
            if not bool((tensor == number).all()) or not number.is_integer() or not 1 <= number <= len(names):
                raise Mismatch(
                    f"{loaded.label}: transformers joins or cuts tensors to make {name!r}", "methods with data cannot follow them"
                )
            traced[name] = names[int(number) - 1]
    return traced


def check_fine_tune(fine: Checkpoint, beside: Checkpoint, examples: Examples) -> None:
    """What of `load_fine_tune` can go wrong by headers and side files alone; no weights are read."""
    shapes = {fine_name(fine, name): info.shape for name, info in fine.tensors.items()}
    prepare(EvalModel(fine.label, shapes, own_files(fine), fine.nbytes, dict), examples, [_files_of(beside)])


def _files_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in checkpoint.side_files.items()}


def load_fine_tune(
    fine: Checkpoint, beside: Checkpoint, examples: Examples, device: torch.device, attention: str | None = None
) -> tuple[Loaded, dict[str, str]]:
    """Build a fine-tune's model in float32; and the names of its checkpoint's tensors by those in the model.

    Side files that it lacks come from the model `beside` it. Mismatch or BadFile where model and examples do not fit.
    """
    called = {name: fine_name(fine, name) for name in fine.tensors}  # an adapter's tensors have the base's names
    state = {called[name]: tensor for name, tensor in read_tensors(fine).items()}
    subject = in_memory(fine.label, state, own_files(fine), fine.nbytes)
    loaded = load(subject, examples, [_files_of(beside)], Settings(device=device, attention=attention))
    called_back = {name: ours for ours, name in called.items()}
    return loaded, {name: called_back[found] for name, found in trace_names(state, loaded).items()}


def read_floats(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A floating tensor in float32."""
    info = checkpoint.tensors[name]
    data = bytearray(info.nbytes)
    if not data:
        return torch.empty(info.shape)
    checkpoint.read_into(name, 0, memoryview(data))
    return torch.frombuffer(data, dtype=getattr(torch, info.dtype.torch_name or "")).view(info.shape).float()
