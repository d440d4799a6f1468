"""Checks that a checkpoint can be computed with: no empty weights, no codes without their scales."""

from __future__ import annotations

from peru_cli.checkpoints.quantized.fp8 import Dequantized
from peru_cli.checkpoints.quantized.layout import is_quantized, recognise
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile


def usable(checkpoint: Checkpoint, stored: bool = False) -> Checkpoint:
    """The checkpoint, its FP8 weights as floats unless `stored`. If it cannot be used, closes it and raises UsageError or BadFile."""
    try:
        refuse_husks(checkpoint)
        if isinstance(checkpoint, Dequantized) or not is_quantized(checkpoint.tensors):
            return checkpoint
        layout = recognise(checkpoint.tensors, checkpoint.config(), checkpoint.label, stored)
        return checkpoint if stored or layout is None or not layout.weights else Dequantized(checkpoint, layout)
    except BaseException:
        checkpoint.close()
        raise


def refuse_husks(checkpoint: Checkpoint) -> None:
    """Refuse floating tensors of shape [0]: DeepSpeed ZeRO-3 saves these for weights that were not gathered."""
    husks = sorted(n for n, info in checkpoint.tensors.items() if info.shape == (0,) and info.dtype.compressible)
    if husks:
        raise BadFile(
            f"{checkpoint.label}: {len(husks)} of {len(checkpoint.tensors)} tensors are empty (shape [0]): {', '.join(husks[:3])}",
            "saving under ZeRO-3 without gathering leaves empty tensors: consolidate them with zero_to_fp32.py or accelerate merge-weights",
        )
