"""`peru unpack` of one task of a pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peru_cli.console import console, plural, si_bytes

if TYPE_CHECKING:
    from peru_cli.checkpoints.dtypes import Dtype
    from peru_cli.checkpoints.header import TensorInfo
    from peru_cli.checkpoints.local.writer import CheckpointWriter
    from peru_cli.checkpoints.places import Place


def unpack_task(
    path: Place,
    task: str | None,
    base_name: str | None,
    output: str,
    dtype: Dtype | None,
    make_writer: Callable[[list[TensorInfo], dict[str, bytes]], CheckpointWriter],
    dry_run: bool,
    how: tuple[int | None, int | None],
    finished: Callable[[str | None], dict[str, Any]],
) -> None:
    """Write what a pack gives back of a task; `how` is the number of threads and the size of tiles.

    `finished` is told the base's name when the output is in place, and adds to what --json says.
    """
    from peru_cli.artifacts.packs.masks import open_pack
    from peru_cli.checkpoints.base_name import find_base
    from peru_cli.checkpoints.resolve import open_recorded_base
    from peru_cli.finetunes.pack_base import check_pack_base
    from peru_cli.finetunes.rebuild import config_with_dtype
    from peru_cli.finetunes.retrieve import Retrieval, retrieve_to
    from peru_cli.vectors.settings import streaming

    with open_pack(path) as pack:
        retrieval = Retrieval(pack, pack.task(task))
        recorded = {record.info.name: record.base_dtype for record in pack.index.tensors}
        base = open_recorded_base(find_base(path, pack.metadata, base_name), recorded)
        check_pack_base(pack, base)
        tensors = retrieval.tensors(dtype)
        files, missing = retrieval.side_files(base)
        if dtype is not None and "config.json" in files:
            files["config.json"] = config_with_dtype(files["config.json"], dtype)
        nbytes, name = sum(info.nbytes for info in tensors), retrieval.task.name
        console.note(f"base {base.label}: {base.kind}; {name}: {plural(len(tensors), 'tensor')}, {si_bytes(nbytes)}")
        if dry_run:
            console.result({"task": name, "bytes": nbytes, "tensors": len(tensors), "files": sorted(files)})
            return
        if missing and output != "-" and not output.endswith(".safetensors"):
            console.warn(f"{base.label} lacks the {', '.join(missing)} that it had when the pack was made: {output} will lack them too")
        writer = make_writer(tensors, files)
        total = sum(info.entries for info in tensors) * (2 if writer.ordered else 1)
        with console.progress(total, "unpack") as progress, streaming("cpu", *how, progress.advance) as streams:
            retrieve_to(retrieval, base, writer, streams, progress.step)
        if output != "-":
            console.note(f"wrote {output}: base and sums verified")
            named = pack.metadata.get("peru.base", base.public_name)
            console.result({"task": name, "output": output, "bytes": nbytes} | finished(named))
