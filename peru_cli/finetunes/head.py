"""A merge under one task's head: the complete model of that task, from `MERGED/` and `MERGED/heads/TASK.safetensors`."""

from __future__ import annotations

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.checkpoint import SafetensorsCheckpoint, open_directory, open_file
from peru_cli.checkpoints.local.sealed import model_digest
from peru_cli.checkpoints.pairing import Prefix
from peru_cli.checkpoints.places import Place, children
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch, UsageError
from peru_cli.finetunes.fine_tune import FineTune, Witness
from peru_cli.shown import listed

HEADS = "heads"
# Metadata of a head's file: the fine-tune's config.json, how its names become the merge's, and the digest of the merged weights.
CONFIG_KEY, PREFIX_KEY, MERGE_KEY = "peru.config", "peru.prefix", "peru.merge"


def tasks_of(folder: Place) -> list[str]:
    """The tasks whose heads a merge keeps. Empty if it is not a merge, or if its tasks have no tensors of their own."""
    heads = children(folder / HEADS, "*.safetensors") if (folder / HEADS).is_dir() else []
    return [file.name.removesuffix(".safetensors") for file in heads]


class HeadOverMerge(FineTune):
    """The merged tensors under the fine-tune's names, and the head's own tensors."""

    def __init__(self, folder: Place, task: str | None, hint: str = "add --task TASK: ") -> None:
        """Open both. UsageError if there is no such task, with the names of all tasks after the hint."""
        super().__init__()
        known = tasks_of(folder)
        if task not in known:
            said = f"{folder} has no head for {task!r}" if task is not None else f"{folder} is a merge with a head for each task"
            raise UsageError(said, hint + (listed(known) or "none"))
        self._merged = open_directory(folder, str(folder))
        path = folder / HEADS / f"{task}.safetensors"
        try:
            self._head = open_file(path, str(path))
            unbound = check_bound(self._merged, self._head)
        except BaseException:
            self._merged.close()
            raise
        self.label, self.kind, self.metadata = str(folder), f"{self._merged.kind} under the head of {task}", self._merged.metadata
        self.warnings, self.side_files = [*self._merged.warnings, *unbound], self._merged.side_files
        self.files = [*self._merged.files, path]
        self.task, self.heading = task, f"{folder}: {self.kind},"
        prefix = Prefix.decode(self._head.metadata.get(PREFIX_KEY, ""))
        self._merged_name: dict[str, str] = {}
        tensors = dict(self._head.tensors)
        for name, info in self._merged.tensors.items():
            ours = prefix.added + name.removeprefix(prefix.removed)
            if ours not in tensors:
                tensors[ours] = TensorInfo(ours, info.dtype, info.shape)
                self._merged_name[ours] = name
        self.tensors = tensors

    @property
    def has_config(self) -> bool:
        """Whether the head says what its outputs mean."""
        return CONFIG_KEY in self._head.metadata

    def contents(self) -> tuple[dict[str, bytes], list[str]]:
        """The merge's side files, and the fine-tune's own config, which says what its head's outputs mean."""
        own = self._head.metadata.get(CONFIG_KEY)
        files, missing = super().contents()
        return files | ({"config.json": own.encode("utf-8")} if own is not None else {}), missing

    def read_watched(self, name: str, offset: int, buffer: memoryview, witness: Witness | None) -> None:
        if name in self._merged_name:
            self._merged.read_into(self._merged_name[name], offset, buffer)
        else:
            self._head.read_into(name, offset, buffer)

    def close(self) -> None:
        self._merged.close()
        self._head.close()


def check_bound(merged: Checkpoint, head: Checkpoint) -> list[str]:
    """Mismatch if the head belongs to another merge. If that cannot be checked, returns a warning."""
    wanted = head.metadata.get(MERGE_KEY)
    if wanted is None:
        return []
    digests = merged.digests() if isinstance(merged, SafetensorsCheckpoint) else None
    if digests is None:
        return [f"peru cannot tell whether {head.label} belongs to {merged.label}: these weights have no digests"]
    if model_digest(digests) != wanted:
        raise Mismatch(f"{head.label} belongs to another merge than {merged.label}", "fetch or make both again, together")
    return []


def head_metadata(task: str, prefix: Prefix, fine: Checkpoint, merge_digest: str) -> dict[str, str]:
    """Metadata of a head's file."""
    metadata = {"peru.task": task, PREFIX_KEY: prefix.encode(), MERGE_KEY: merge_digest}
    path = fine.side_files.get("config.json")
    if path is not None:
        try:
            metadata[CONFIG_KEY] = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # not a config that anything could read
            return metadata
    return metadata
