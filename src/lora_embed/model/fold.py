"""Add the merged change of each weight to a model. A build does it, and `load_encoder` for an encoder stored as an adapter."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lora_embed.errors import ConfigError, EncoderError
from lora_embed.model import merge
from lora_embed.model.change import LowRank
from lora_embed.model.match import Adapter
from lora_embed.model.statistics import check_variance
from lora_embed.model.weights import weights_of


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Adapters with their weights, and the method that merges them to one change."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    method: str = "weighted_sum"
    options: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How much of a merged change one adapter may keep: a rank, and a share of the squared norm."""

    rank: int | None = None
    energy: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Folded:
    """One weight of the model after the fold."""

    name: str
    before: torch.Tensor  # float32
    delta: torch.Tensor  # float64, the merged change
    kept: LowRank | None  # under a limit: the low-rank change that was added instead of `delta`


def fold(model: PreTrainedModel, merged: Merge, limit: Limit | None = None) -> Iterator[Folded]:
    """Add the merged change to each weight, in float64 with one rounding to float32; yield one weight at a time.

    Under a limit, the change is cut to low rank: exactly the change that `load_encoder` will add on any machine. Raises
    EncoderError for a weight that is not finite afterwards, and ConfigError for one whose change cannot be cut.
    """
    parameters = weights_of(model)
    before = {name: parameter.data for name, parameter in parameters.items()}
    for name, delta in merge.merge(list(merged.adapters), list(merged.weights), merged.method, merged.options, before):
        parameter, base_weight, low_rank = parameters[name], before.pop(name), None
        added = delta
        if limit is not None:
            _check_storable(model, name)
            up, down = merge.truncate(delta, limit.rank, limit.energy)
            low_rank = LowRank(down=on_grid(down, len(down)), up=on_grid(up, len(down)), scale=1.0, shape=base_weight.shape)
            added = merge.weighted_sum([merge.Weighted(1.0, low_rank)], base_weight)
        parameter.data = (base_weight.double() + added).float()
        if not bool(torch.isfinite(parameter).all()):
            raise EncoderError(
                f"{name} is not finite after the merge: an adapter's values times its weight in the recipe are too large for "
                "float32. Make the adapter's weight in the recipe smaller, or leave the adapter out."
            )
        check_variance(name, parameter)
        yield Folded(name=name, before=base_weight, delta=delta, kept=low_rank)


def on_grid(factor: torch.Tensor, rank: int) -> torch.Tensor:
    """A factor of a product of this rank, rounded to so few bits that float64 multiplies and adds it without rounding.

    So the order of a sum does not matter, and an encoder stored as an adapter has the same space id on every processor. All
    entries are multiples of one step, at most 2**bits of it, and rank · 2**(2·bits) is at most 2**53.
    """
    bits = min(24, (53 - math.ceil(math.log2(rank))) // 2)
    largest = float(factor.abs().max())
    step = 2.0 ** (math.frexp(largest)[1] - bits) if largest else 1.0
    return (factor / step).round().mul(step).float()


def _check_storable(model: PreTrainedModel, name: str) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    if not name.endswith(".weight") or not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
        raise ConfigError(
            f"{name}: this merge also changes this weight, which is not one of a linear layer or a convolution, so one LoRA "
            "adapter cannot hold it. Store the whole model: leave out --store adapter."
        )
