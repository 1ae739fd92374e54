"""The weights of a model: everything that training may change and its files hold."""

from collections.abc import Sequence

import torch
from torch import nn


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name, and buffers of float numbers that are saved, such as the statistics of batch normalisation."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()}
    return dict(model.named_parameters()) | buffers


def shape_of(shape: Sequence[int]) -> str:
    """A shape for a message: 64×32."""
    return "×".join(map(str, shape)) or "scalar"
