"""Tasks of routed artifacts as models: the base's tensors, and the task's own."""

from __future__ import annotations

from peru_cli.artifacts.packs.routed import Routed
from peru_cli.artifacts.packs.superposed import TaskRecord
from peru_cli.checkpoints.places import size_of
from peru_cli.inference.eval_model import Base, EvalModel, Tensors
from peru_cli.live.memory import empty_tensor, raw_bytes


def subject_of(routed: Routed, task: TaskRecord, base: Base, label: str) -> EvalModel:
    """A task's model before anything is installed: the base's tensors under the fine-tune's names, and the task's own."""
    names = {task.fine_name(tensor.info.name): tensor.info for tensor in routed.index.tensors}
    shapes = {name: info.shape for name, info in names.items()} | {own.info.name: own.info.shape for own in task.tensors}

    def read() -> Tensors:
        found = {name: base.table[info.name] for name, info in names.items()}
        for own in task.tensors:
            routed.verify_whole(task, own)
            found[own.info.name] = empty_tensor(label, own.info)
            routed.read_whole(task, own, 0, raw_bytes(found[own.info.name]).data)
        return found

    files, where, nbytes = routed.files_of(task, base.checkpoint.side_files), str(routed.path), size_of(routed.path)
    return EvalModel(label, shapes, files, nbytes, read, where, nbytes, where)
