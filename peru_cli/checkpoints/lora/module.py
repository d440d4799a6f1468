"""One LoRA module: a pair of factors, its update, and how to split it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peru_cli.checkpoints.header import TensorInfo

if TYPE_CHECKING:
    import torch

LINEAR, EMBEDDING, CONVOLUTION, PARAMETER = "linear", "embedding", "convolution", "parameter"


@dataclass(frozen=True)
class LoraModule:
    """One pair of factors.

    `path` is the module's name in the file (with `.base_layer` if PEFT nests), `name` the same without it. `parameter` is the full
    name of a targeted parameter, if it is known without the base. `blocks` is the number of experts, `rank` the rank of each.
    `magnitude` and `bias` are names of tensors of DoRA and of `lora_bias`."""

    path: str
    name: str
    kind: str
    down: TensorInfo
    up: TensorInfo
    rank: int
    scale: float
    blocks: int = 1
    parameter: str | None = None
    magnitude: str | None = None
    bias: str | None = None
    alpha: str | None = None

    @property
    def target(self) -> str:
        """What rank and alpha patterns are matched against: the module, or the parameter."""
        return self.parameter or self.name

    @property
    def rows(self) -> int:
        """d_out: rows of B @ A."""
        return self.up.shape[0]

    @property
    def columns(self) -> int:
        """d_in: columns of B @ A, with a convolution's kernel flattened."""
        return self.down.entries // max(self.down.shape[0], 1)

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.down.nbytes + self.up.nbytes

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at another rank."""
        total = rank * self.blocks
        return (total, *self.down.shape[1:]), (self.up.shape[0], total, *self.up.shape[2:])

    def split(self, down: torch.Tensor, up: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """left (rows, rank), right (rank, columns) of each block, without the scale."""
        if self.kind != PARAMETER:
            return [(up.reshape(self.rows, -1), down.reshape(down.shape[0], -1))]
        # peft: A stacks experts outermost, B innermost (ParamWrapper.get_delta_weight)
        lefts = up.reshape(self.rows, -1, self.blocks).permute(2, 0, 1)
        rights = down.reshape(self.blocks, -1, self.columns)
        return list(zip(lefts, rights, strict=True))

    def join(self, blocks: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, in the file's shapes, from the blocks' factors (all of one rank): the inverse of `split`."""
        import torch

        down_shape, up_shape = self.shapes(blocks[0][1].shape[0])
        if self.kind != PARAMETER:
            return blocks[0][1].reshape(down_shape), blocks[0][0].reshape(up_shape)
        down = torch.cat([right for _, right in blocks])
        up = torch.stack([left for left, _ in blocks], dim=2)
        return down.reshape(down_shape), up.reshape(up_shape)
