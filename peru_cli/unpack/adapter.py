"""`peru unpack` of a LoRA adapter: the base with the adapter folded into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peru_cli.console import console, plural, si_bytes
from peru_cli.errors import UsageError

if TYPE_CHECKING:
    from peru_cli.checkpoints.dtypes import Dtype
    from peru_cli.checkpoints.header import TensorInfo
    from peru_cli.checkpoints.local.writer import CheckpointWriter
    from peru_cli.checkpoints.source import Checkpoint


def unpack_adapter(
    adapter: str,
    base: Checkpoint,
    output: str,
    dtype: Dtype | None,
    make_writer: Callable[[list[TensorInfo], dict[str, bytes]], CheckpointWriter],
    dry_run: bool,
    how: tuple[str, int | None, int | None],
    finished: Callable[[], dict[str, Any]],
) -> None:
    """Write the fine-tune that an adapter makes of its base; updated weights in the base's dtype unless `dtype` is given.

    `how` is the device, the number of threads and the size of tiles, as the command line has them.
    `finished` is called when the output is in place, and adds to what --json says.
    """
    from peru_cli.checkpoints.lora.expand import LoraCheckpoint
    from peru_cli.finetunes.expand import Overlaid, RoundedAdapter, open_fine_tune
    from peru_cli.finetunes.rebuild import config_with_dtype
    from peru_cli.vectors.copy import copy_checkpoint, in_dtype
    from peru_cli.vectors.settings import streaming

    opened = open_fine_tune(adapter, base)
    if not isinstance(opened, (LoraCheckpoint, Overlaid)):
        raise UsageError(f"{adapter} is neither an artifact nor an adapter", "unpack takes what `peru prune` or `peru svd-lora` wrote")
    with opened:
        under = opened.adapter if isinstance(opened, Overlaid) else opened
        unpacked = RoundedAdapter(opened)
        outputs = [in_dtype(info, dtype) for info in unpacked.tensors.values()]
        files = {name: path.read_bytes() for name, path in opened.side_files.items()}
        if dtype is not None and "config.json" in files:
            files["config.json"] = config_with_dtype(files["config.json"], dtype)
        nbytes = sum(info.nbytes for info in outputs)
        console.note(f"{adapter}: {opened.kind}, on {base.label}; {plural(len(outputs), 'tensor')}, {si_bytes(nbytes)}")
        for warning in opened.warnings:
            console.warn(warning)
        result = {"output": output, "bytes": nbytes, "tensors": len(outputs), "updated": sorted(under.updates), "files": sorted(files)}
        if dry_run:
            console.result(result)
            return
        total = sum(info.entries for info in outputs)
        with console.progress(total, "unpack") as progress, streaming(*how, progress.advance) as settings:
            if isinstance(opened, Overlaid):
                progress.step("verifying")
                opened.verify(settings)
            progress.step("unpacking")
            with make_writer(outputs, files) as writer:
                copy_checkpoint(opened, writer, settings, unpacked.names)
                writer.commit()
    if output != "-":
        console.note(f"wrote {output}")
        console.result(result | finished())
