"""`peru route`: the base runs on the inputs, and the routers of all layers vote on each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from peru_cli.artifacts.packs.routed import open_routed
from peru_cli.checkpoints.places import Place
from peru_cli.evaluate.run import threads_for
from peru_cli.finetunes.fine_tune import check_base
from peru_cli.finetunes.pack_task import base_of_pack
from peru_cli.inference.data import Examples
from peru_cli.inference.eval_model import Base
from peru_cli.inference.inputs import BATCH_SIZES, encode_each
from peru_cli.inference.models import IMAGE, ITSELF, TEXT, build_model, load_config
from peru_cli.inference.prepare import fill_files
from peru_cli.live.applied import as_saved, verify_base
from peru_cli.live.routed import install


@dataclass
class Answer:
    """The task that should answer an input, its share of the votes, and the shares of all tasks, which add up to 1."""

    task: str
    share: float
    shares: dict[str, float]


def answer(
    place: Place, base: str, examples: Examples, device: torch.device, threads: int | None, batch_size: int | None,
    advance: Callable[[int], None],
) -> list[Answer]:  # fmt: skip
    """Route inputs by the base's own activations: the mean over layers and tokens of what each layer's router says.

    Raises Mismatch for another base, BadFile for a damaged artifact or a base without a tokenizer."""
    found: list[Answer | None] = [None] * len(examples)
    with Base(base) as opened, open_routed(place) as routed:
        origins = {origin.info.name: origin for origin in base_of_pack(routed)}
        check_base(origins.values(), routed, opened.checkpoint)
        own = {name: file.read_bytes() for name, file in opened.checkpoint.side_files.items()}
        files = fill_files(own, [routed.files_of(task, opened.checkpoint.side_files) for task in routed.index.tasks])
        config = load_config(files, base)
        inputs = encode_each(examples, files, config, base)
        verify_base(opened.memory, origins, {name: name for name in origins}, routed)
        model = build_model(opened.table, config, ITSELF, base, dtype=torch.float32, device=device)
        size = batch_size or BATCH_SIZES[IMAGE if examples.images is not None else TEXT]
        parameters = sum(tensor.numel() for tensor in opened.table.values())
        applied = install(model, as_saved(model), routed, experts=False)
        with threads_for(parameters, threads), applied, torch.inference_mode():
            for numbers, batch in inputs.batches(size, device):
                model(**batch)
                assert applied.routing is not None
                for number, shares in zip(numbers.tolist(), applied.routing.shares.tolist(), strict=True):
                    best = max(range(len(shares)), key=shares.__getitem__)
                    found[number] = Answer(applied.tasks[best], shares[best], dict(zip(applied.tasks, shares, strict=True)))
                advance(len(numbers))
    return [one for one in found if one is not None]
