"""What one adapter does to one weight of the base, in float64: the ways in which PEFT's LoRA changes a weight."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """`scale · up @ down` in the shape of the weight: LoRA (arXiv 2106.09685) on linear, convolution or embedding."""

    down: torch.Tensor  # (rank, columns): LoRA's A, its kernel flattened; an embedding's B, transposed
    up: torch.Tensor  # (rows, rank): LoRA's B; an embedding's A, transposed
    scale: float
    shape: torch.Size

    def delta(self, before: torch.Tensor | None = None) -> torch.Tensor:
        """The change of the weight, in its shape; the weight before plays no part."""
        return (self.scale * (self.up.double() @ self.down.double())).reshape(self.shape)

    def norm(self) -> float:
        """Frobenius norm of the change, from rank-sized products: ‖B·A‖² is the sum of (BᵀB) ∘ (A·Aᵀ)."""
        up, down = self.up.double(), self.down.double()
        return abs(self.scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


@dataclass(frozen=True, kw_only=True)
class Residual:
    """LoRA on what is left of a weight after its leading part was moved into the factors before training.

    PEFT takes that part out of the base again whenever it loads the adapter, so it belongs to the change:
    `pissa` the best approximation of the factors' rank (arXiv 2404.02948), `olora` the first columns of the weight's
    QR decomposition (arXiv 2406.01775), times the scale.
    """

    lora: LowRank
    kind: Literal["pissa", "olora"]

    def delta(self, before: torch.Tensor) -> torch.Tensor:
        """The change of the weight, in its shape."""
        weight, rank = before.double(), self.lora.down.shape[0]
        if self.kind == "pissa":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            taken = (u[:, :rank] * s[:rank]) @ vh[:rank]
        else:
            q, r = torch.linalg.qr(weight)
            taken = self.lora.scale * (q[:, :rank] @ r[:rank])
        change: torch.Tensor = self.lora.delta() - taken
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
