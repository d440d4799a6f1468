"""Train the routers of gated MLPs: the entropy of each task's predictions becomes small, under the task's own head. No labels.

Source: Tang et al. 2024, https://arxiv.org/abs/2402.00433, section 3.3 (test-time adaptation). Everything but the routers stays. Each step
takes one batch of every task, adds up the entropies, and moves the routers by Adam. The model is in evaluation mode: no dropout.
Each input has gates of its own; the authors' program takes the mean over the batch while it trains, and not afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peru_cli.artifacts.packs.wemoe import Seen, Wemoe
from peru_cli.checkpoints.digests import SHORT
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch
from peru_cli.inference.data import Examples
from peru_cli.inference.eval_model import Base
from peru_cli.inference.inputs import Batch, counted_logits
from peru_cli.inference.models import CAUSAL, CLASSES, IMAGE, TEXT, problem_of
from peru_cli.inference.prepare import Prepared, Settings, prepare
from peru_cli.inference.routed import subject_of
from peru_cli.inference.task_models import digest_inputs
from peru_cli.live.applied import as_saved
from peru_cli.live.routed import AppliedRouted, install
from peru_cli.live.wemoe import GatedMlps
from peru_cli.methods.compact.wemoe import Known, Router, shares_of
from peru_cli.methods.examples.adamerging import entropy, shuffled
from peru_cli.prune.mixed.with_data import one_thread


@dataclass(frozen=True)
class Training:
    """How routers are trained."""

    steps: int = 200
    rate: float = 1e-3
    batch: int = 16
    seed: int = 0


@dataclass
class Trained:
    """The routers; the entropy at the first and the last steps (mean over tasks, in nats); what became of each task's examples."""

    routers: list[Router]
    before: float = 0.0
    after: float = 0.0
    seen: list[Seen] = field(default_factory=list)


def entropy_of(applied: AppliedRouted, model: torch.nn.Module, kind: str, task: str, batch: Batch) -> torch.Tensor:
    """The mean entropy of a task's predictions for a batch under its own head, in nats."""
    applied.head = task
    logits = counted_logits(model, batch, kind)[0]
    return entropy(logits.float() if logits.dtype != torch.float64 else logits)


def descend(
    applied: AppliedRouted, model: torch.nn.Module, gated: GatedMlps, prepared: Mapping[str, Prepared], how: Training,
    advance: Callable[[int], None],
) -> list[float]:  # fmt: skip
    """Train the routers of a model in place. Returns the entropy at every step, as a mean over tasks."""
    learned = [tensor for router in gated.routers for tensor in router.train()]
    optimizer = torch.optim.Adam(learned, lr=how.rate)
    streams = {task: shuffled(how.seed, task, len(ready.inputs), how.batch) for task, ready in prepared.items()}
    history = []
    for _ in range(how.steps):
        total = 0.0
        for task, ready in prepared.items():  # gradients add up over tasks: one batch in memory at a time
            numbers = next(streams[task])
            loss = entropy_of(applied, model, ready.kind, task, ready.inputs.make(numbers))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            advance(len(numbers))
        if not torch.isfinite(torch.tensor(total)):
            raise Mismatch("the entropy is not finite: the routers cannot be trained", "a smaller --learning-rate or --scale may help")
        optimizer.step()
        optimizer.zero_grad()
        history.append(total / len(prepared))
    for tensor in learned:
        tensor.requires_grad_(False)
    return history


def prepare_tasks(routed: Wemoe, base: Base, examples: Mapping[str, Examples], label: str) -> dict[str, Prepared]:
    """Each task's inputs without labels. Mismatch for models that predict neither classes nor tokens."""
    of_base = {name: file.read_bytes() for name, file in base.checkpoint.side_files.items()}
    prepared = {}
    for task, record in routed.tasks.items():
        ready = prepare(subject_of(routed, record, base, label), examples[task], [of_base])
        if ready.kind != CAUSAL and (ready.kind not in (TEXT, IMAGE) or problem_of(ready.config) != CLASSES):
            raise Mismatch(
                f"the task {task} predicts no single class: its entropy says nothing", "WEMoE needs classifiers or causal models"
            )
        prepared[task] = ready
    return prepared


def train(draft: Path, base: Checkpoint, examples: Mapping[str, Examples], how: Training, advance: Callable[[int], None]) -> Trained:
    """Train the routers of an artifact that has them as they start. One thread, so that any --threads gives the same.

    Mismatch or BadFile where models and examples do not fit."""
    with Wemoe(draft) as routed, one_thread():
        prepared = prepare_tasks(routed, Base(base), examples, base.label)
        model = next(iter(prepared.values())).build(Settings()).model.requires_grad_(False)
        with install(model, as_saved(model), routed) as applied:
            gated: GatedMlps = applied.installed
            history = descend(applied, model, gated, prepared, how, advance)
            edge = max(1, len(history) // 10)
            found = Trained(gated.routers, sum(history[:edge]) / edge, sum(history[-edge:]) / edge)
            applied.head = None
            kind = getattr(torch, routed.dtype.torch_name or "")
            for tensor in (tensor for router in gated.routers for tensor in router.tensors):
                tensor.copy_(tensor.to(kind))  # what follows is true of routers as they are stored
            found.seen = send(model, gated, examples, prepared, how.batch)
    return found


def send(
    model: torch.nn.Module, gated: GatedMlps, examples: Mapping[str, Examples], prepared: Mapping[str, Prepared], size: int
) -> list[Seen]:
    """Learn what each router says of each task's inputs, and count which tasks these inputs would go to."""
    gates: list[list[torch.Tensor]] = []  # for each task, for each MLP: (inputs, tasks)
    for ready in prepared.values():
        for mlp in gated.mlps:
            mlp.record = []
        with torch.inference_mode():
            for _, batch in ready.inputs.batches(size, torch.device("cpu")):
                model(**batch)
        gates.append([torch.cat(mlp.record or []) for mlp in gated.mlps])
    shares = [torch.zeros(len(found[0]), len(gates)) for found in gates]
    for number, mlp in enumerate(gated.mlps):
        mlp.record = None
        mlp.router.known = Known.of([found[number].clone() for found in gates])
        for total, found in zip(shares, gates, strict=True):
            total += shares_of(found[number], mlp.router.known)
    seen = []
    for task, total in zip(prepared, shares, strict=True):
        sent = torch.bincount(total.argmax(1), minlength=len(shares))
        seen.append(Seen(bytes.fromhex(digest_inputs(examples[task]))[:SHORT], int(sent.sum()), sent.tolist()))
    return seen
