"""A merge's fine-tunes as models in memory, each with the examples of its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from peru_cli.inference.data import Examples
from peru_cli.inference.prepare import Loaded
from peru_cli.inference.task_models import load_fine_tune
from peru_cli.merge.plan import MergePlan
from peru_cli.vectors.family import TaskVector


@dataclass
class TaskParts:
    """A fine-tune's model, with the names of its checkpoint's tensors and of the merge's, by the names in the model."""

    loaded: Loaded
    own: dict[str, str]
    merged: dict[str, str]

    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Use merged weights, given by the merge's names. The model shares their memory; its other weights stay."""
        tensors: Mapping[str, torch.Tensor] = dict(self.loaded.model.named_parameters()) | dict(self.loaded.model.named_buffers())
        for name, merged in self.merged.items():
            if name in tensors and merged in weights:
                tensors[name].data = weights[merged]


def load_task(plan: MergePlan, vector: TaskVector, examples: Examples, device: torch.device, attention: str | None = None) -> TaskParts:
    """Build a fine-tune's model in float32. Mismatch or BadFile where model and examples do not fit."""
    loaded, own = load_fine_tune(vector.fine, plan.reference, examples, device, attention)
    number = plan.vectors.index(vector)
    merged = {slot.inputs[number].name: slot.base.name for slot in plan.slots}
    return TaskParts(loaded, own, {name: merged[ours] for name, ours in own.items() if ours in merged})
