"""The merged change of each weight, added to a model's own: what `build` does, and `load_encoder` does again."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lora_embed.errors import ConfigError, EncoderError
from lora_embed.model import merge
from lora_embed.model.change import LowRank
from lora_embed.model.match import Adapter


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Adapters with their weights, and how they become one change."""

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
    kept: LowRank | None  # what a limit left of it, and what was added then


def fold(model: PreTrainedModel, merged: Merge, limit: Limit | None = None) -> Iterator[Folded]:
    """Add the merged change to each weight, in float64, rounded to float32 once; yield weight by weight.

    Under a limit, the change is cut to low rank and its float32 factors are multiplied as `load_encoder` will. Raises
    EncoderError for a weight that is not finite then, ConfigError for one that no limit can be put on.
    """
    parameters = dict(model.named_parameters())
    before = {name: parameter.data for name, parameter in parameters.items()}
    for name, delta in merge.merge(list(merged.adapters), list(merged.weights), merged.method, merged.options, before):
        parameter, old, kept = parameters[name], before.pop(name), None
        added = delta
        if limit is not None:
            _check_storable(model, name)
            up, down = merge.truncate(delta, limit.rank, limit.energy)
            kept = LowRank(down=down.float(), up=up.float(), scale=1.0, shape=old.shape)
            added = merge.weighted_sum([merge.Weighted(1.0, kept)], old)
        parameter.data = (old.double() + added).float()
        if not bool(torch.isfinite(parameter).all()):
            raise EncoderError(
                f"{name} is not finite after the merge. Either the base's own weights are not, or the recipe's weights "
                "are too large for float32: make them smaller."
            )
        yield Folded(name=name, before=old, delta=delta, kept=kept)


def _check_storable(model: PreTrainedModel, name: str) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    if not name.endswith(".weight") or not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
        raise ConfigError(
            f"{name}: this merge changes more than the weights of linear layers and convolutions, which one LoRA adapter "
            "cannot hold. Store the model instead."
        )
