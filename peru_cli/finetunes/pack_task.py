"""One task of a pack as a checkpoint: the fine-tune that unpack would give, without writing it."""

from __future__ import annotations

from peru_cli.artifacts.container import artifact_kind, is_artifact
from peru_cli.artifacts.index import STORED
from peru_cli.artifacts.packs.masks import KINDS, open_pack
from peru_cli.checkpoints.places import Place, locate
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import UsageError
from peru_cli.finetunes.pack_base import check_pack_base
from peru_cli.finetunes.retrieve import Retrieval, retrieve
from peru_cli.vectors.family import StreamSettings


def only_task(model: str) -> str | None:
    """The task of a pack that holds no other; None for everything else."""
    path = locate(model)
    if not is_artifact(path) or artifact_kind(path) not in KINDS:
        return None
    with open_pack(path) as pack:
        return next(iter(pack.tasks)) if len(pack.tasks) == 1 else None


class ExpandedTask(Checkpoint):
    """A pack's task on the pack's base."""

    expanded = True

    def __init__(self, path: Place, label: str, task: str | None, base: Checkpoint) -> None:
        """Raises UsageError for a task that the pack has not, Mismatch for another base."""
        self.pack = open_pack(path)
        try:
            check_pack_base(self.pack, base)
            self._retrieval = Retrieval(self.pack, self.pack.task(task or None))
        except UsageError as error:
            self.pack.close()
            raise UsageError(error.message, f"write TASK={label}") from error
        except BaseException:
            self.pack.close()
            raise
        self._base, packed = base, self._retrieval.task
        self.part = packed.name
        self.label, self.kind, self.warnings = label, f"task {packed.name} of a peru pack", []
        self.metadata = self.pack.metadata
        self.tensors = {info.name: info for info in self._retrieval.tensors()}
        self._records = {packed.fine_name(record.info.name): record for record in self.pack.index.tensors}
        self._own = {tensor.info.name: tensor for tensor in packed.tensors}
        self.side_files = {f.name: base.side_files[f.name] for f in packed.files if f.origin != STORED and f.name in base.side_files}
        self.files = [*base.files, path]

    def verify(self, how: StreamSettings) -> None:
        """Check base and sums by their digests: reads everything once. Mismatch or BadFile as unpack has them."""
        retrieve(self._retrieval, self._base, self._retrieval.tensors(), None, how)

    def own_files(self) -> dict[str, bytes]:
        """The fine-tune's config, tokenizer and so on."""
        return self._retrieval.side_files(self._base)[0]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name in self._own:
            self.pack.read_whole(self._retrieval.task, self._own[name], offset, buffer)
            return
        record = self._records[name]
        if not record.info.dtype.compressible:
            self._base.read_into(record.info.name, offset, buffer)
        elif len(buffer):
            start, stop = (at * 8 // record.info.dtype.bits for at in (offset, offset + len(buffer)))
            buffer[:] = self._retrieval.read(record, start, stop, self._base).data.cast("B")

    def close(self) -> None:
        self.pack.close()
