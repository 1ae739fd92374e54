"""The change that one adapter makes to one weight of the base, in float64, for every kind of LoRA in PEFT.

Products of LoRA factors are summed in the same order on every processor. A linear algebra library chooses the order by the
processor, so its products differ in their last bits. Then a weight may be rounded to another float32, and one such weight
gives the encoder another space id.
"""

from dataclasses import dataclass
from typing import Literal

import torch

_BLOCK = 2**16  # entries of a product that are summed at a time, so that they stay in a core's cache


def multiply(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`up @ down` of factors (rows, rank) and (rank, columns) → float64 (rows, columns), the same bits on every processor.

    Each step multiplies or adds entry by entry, and IEEE 754 allows only one rounding for that.
    """
    up, down = up.double(), down.double()
    product = torch.zeros(len(up), down.shape[1], dtype=torch.float64)
    rows = max(1, _BLOCK // max(1, down.shape[1]))
    for block, factor in zip(torch.split(product, rows), torch.split(up, rows), strict=True):
        for column, row in zip(factor.T, down, strict=True):
            block += column[:, None] * row
    return product


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """`scale · up @ down` in the shape of the weight: LoRA (arXiv 2106.09685) on linear, convolution or embedding."""

    down: torch.Tensor  # (rank, columns): LoRA's A, its kernel flattened; an embedding's B, transposed
    up: torch.Tensor  # (rows, rank): LoRA's B; an embedding's A, transposed
    scale: float
    shape: torch.Size

    def delta(self, before: torch.Tensor | None = None) -> torch.Tensor:
        """The change of the weight, in its shape. The weight `before` is not used."""
        return (self.scale * multiply(self.up, self.down)).reshape(self.shape)

    def norm(self) -> float:
        """Frobenius norm of the change, from rank-sized products: ‖B·A‖² is the sum of (BᵀB) ∘ (A·Aᵀ)."""
        up, down = self.up.double(), self.down.double()
        return abs(self.scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


@dataclass(frozen=True, kw_only=True)
class Residual:
    """LoRA on the rest of a weight, after its leading part was moved into the factors before training.

    PEFT subtracts that part from the base whenever it loads the adapter, so it belongs to the change. With `pissa` it is the
    best approximation of the factors' rank (arXiv 2404.02948); with `olora`, the first columns of the weight's QR
    decomposition (arXiv 2406.01775), times the scale.
    """

    lora: LowRank
    kind: Literal["pissa", "olora"]

    def delta(self, before: torch.Tensor) -> torch.Tensor:
        """The change of the weight, in its shape."""
        weight, rank = before.double(), self.lora.down.shape[0]
        if self.kind == "pissa":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            initial = (u[:, :rank] * s[:rank]) @ vh[:rank]
        else:
            q, r = torch.linalg.qr(weight)
            initial = self.lora.scale * (q[:, :rank] @ r[:rank])
        change: torch.Tensor = self.lora.delta() - initial
        return change


@dataclass(frozen=True, kw_only=True)
class Normed:
    """DoRA (arXiv 2402.09353): after the change, the weights of each output are scaled to a learned length."""

    inner: LowRank | Residual
    magnitude: torch.Tensor  # (rows,)

    def delta(self, before: torch.Tensor) -> torch.Tensor:
        """The change of the weight, in its shape."""
        moved = (before.double() + self.inner.delta(before)).flatten(1)
        scaled: torch.Tensor = moved * (self.magnitude.double() / moved.norm(dim=1))[:, None]
        return scaled.reshape(before.shape) - before.double()


@dataclass(frozen=True, kw_only=True)
class Shift:
    """`scale · bias`, added to the layer's own bias: LoRA's `lora_bias`."""

    bias: torch.Tensor
    scale: float

    def delta(self, before: torch.Tensor | None = None) -> torch.Tensor:
        """The change of the bias, in its shape."""
        return self.scale * self.bias.double()


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """A weight that was trained whole and saved beside LoRA: by `bias="all"`, or named in `modules_to_save`."""

    trained: torch.Tensor

    def delta(self, before: torch.Tensor) -> torch.Tensor:
        """The change of the weight, in its shape."""
        return self.trained.double() - before.double()


Change = LowRank | Residual | Normed | Shift | Replaced
