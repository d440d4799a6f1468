"""`peru unpack` of a merge: the merged weights under one task's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peru_cli.console import console, plural, si_bytes

if TYPE_CHECKING:
    from peru_cli.checkpoints.dtypes import Dtype
    from peru_cli.checkpoints.header import TensorInfo
    from peru_cli.checkpoints.local.writer import CheckpointWriter
    from peru_cli.checkpoints.places import Place


def unpack_head(
    folder: Place,
    task: str | None,
    output: str,
    dtype: Dtype | None,
    make_writer: Callable[[list[TensorInfo], dict[str, bytes]], CheckpointWriter],
    dry_run: bool,
    how: tuple[str, int | None, int | None],
    finished: Callable[[], dict[str, Any]],
) -> None:
    """Write the complete model of one task.

    `how` is the device, the number of threads and the size of tiles; `finished` publishes, and says what it did.
    """
    from peru_cli.finetunes.head import UnderHead
    from peru_cli.finetunes.rebuild import config_with_dtype
    from peru_cli.vectors.copy import copy_checkpoint, in_dtype
    from peru_cli.vectors.settings import streaming

    opened = UnderHead(folder, task)
    with opened:
        outputs = [in_dtype(info, dtype) for _, info in sorted(opened.tensors.items())]
        files = opened.contents()
        if dtype is not None and "config.json" in files:
            files["config.json"] = config_with_dtype(files["config.json"], dtype)
        nbytes = sum(info.nbytes for info in outputs)
        console.note(f"{folder}: {opened.kind}, {plural(len(outputs), 'tensor')}, {si_bytes(nbytes)}")
        for warning in opened.warnings:
            console.warn(warning)
        result = {"task": task, "output": output, "bytes": nbytes, "tensors": len(outputs), "files": sorted(files)}
        if dry_run:
            console.result(result)
            return
        total = sum(info.entries for info in outputs)
        with console.progress(total, "unpack") as progress, streaming(*how, progress.advance) as settings:
            progress.step("unpacking")
            with make_writer(outputs, files) as writer:
                copy_checkpoint(opened, writer, settings)
                writer.commit()
    if output != "-":
        console.note(f"wrote {output}")
        console.result(result | finished())
