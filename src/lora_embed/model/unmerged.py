"""Check a merge by what it computes: the golden vectors are compared with those of PEFT's layers, which are not merged.

`proof` compares weights, which is enough only if a layer computes with its weight as it is. This check has no such
assumption, and shares no code with the fold: PEFT puts the adapters beside the base's weights, as in training.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from lora_embed.errors import AdapterMismatch, EncoderError
from lora_embed.model import golden
from lora_embed.model.anew import Array
from lora_embed.model.fold import Merge
from lora_embed.model.match import Adapter
from lora_embed.model.proof import change_of, factors_of, initial_of, read_tensors
from lora_embed.text import in_one_line

BOUND = 1e-5  # relative L2 difference of a vector that rounding may cause
SHARE = 1e-2  # a larger difference than `BOUND` is still rounding if it is below this share of the adapter's own effect

Embed = Callable[[PreTrainedModel], NDArray[np.float32]]  # a model → the golden images' vectors


def check_function(merged: Merge, saved: PreTrainedModel, open_base: Callable[[], PreTrainedModel], embed: Embed) -> float:
    """Compare the golden vectors of a folded model with those of adapters that are not merged; returns the difference.

    For a weighted sum, all adapters together are compared with the saved model. For a method whose merge is no sum of
    what the adapters compute, each adapter is compared alone, folded by the change that the proof reads from its file.
    Raises EncoderError for a layer that computes with another weight than its own, so that a fold is not the adapter.
    """
    is_sum = merged.method == "weighted_sum" and (len(merged.adapters) == 1 or not any(map(_has_dora, merged.adapters)))
    if is_sum:
        return _compare(merged, embed(saved), open_base, embed)
    differences = []
    for adapter in merged.adapters:
        alone = Merge(adapters=(adapter,), weights=(1.0,), options={})
        folded = open_base()
        _add_changes(folded, [(adapter, 1.0)], change_of)
        differences.append(_compare(alone, embed(folded), open_base, embed))
    return max(differences, default=0.0)


def _compare(merged: Merge, vectors: NDArray[np.float32], open_base: Callable[[], PreTrainedModel], embed: Embed) -> float:
    model = open_base()
    layers = {type(model.get_submodule(name.rpartition(".")[0])) for adapter in merged.adapters for name in adapter.changes}
    parts = list(zip(merged.adapters, merged.weights, strict=True))
    _add_changes(model, parts, initial_of)  # what is a change of weights for PEFT too
    for number, (adapter, weight) in enumerate(parts):
        _put_beside(model, adapter, weight, f"adapter{number}")
    expected = embed(model)
    difference = golden.relative_difference(vectors, expected)
    if difference <= BOUND or difference <= SHARE * golden.relative_difference(embed(open_base()), expected):
        return difference
    own = sorted(layer.__name__ for layer in layers if not layer.__module__.startswith("torch."))
    reason = f" {type(model).__name__} has layers of its own kind, {', '.join(own)}, which may change a weight." if own else ""
    raise EncoderError(
        f"{', '.join(adapter.uri for adapter in merged.adapters)}: cannot be folded into {type(model).__name__}: the vectors "
        f"of the golden images then differ by {difference:.1e} (relative L2) from those with the adapter beside the weights, "
        f"as it was trained; at most {BOUND:.0e} is allowed.{reason} Train the adapter on other layers, or name another base."
    )


def _has_dora(adapter: Adapter) -> bool:
    return bool(adapter.saved.config.get("use_dora"))


def _add_changes(
    model: PreTrainedModel, parts: list[tuple[Adapter, float]], change: Callable[[Adapter, str, Array], Array | None]
) -> None:
    """Add each adapter's change of each weight, times the adapter's weight in the recipe."""
    weights = model.state_dict()
    before = {name: weights[name].double().numpy() for adapter, _ in parts for name in adapter.changes}
    for adapter, weight in parts:
        for name in adapter.changes:
            added = change(adapter, name, before[name])
            if added is not None:
                weights[name].copy_(weights[name].double() + weight * torch.from_numpy(added))


def _put_beside(model: PreTrainedModel, adapter: Adapter, weight: float, name: str) -> None:
    """Let PEFT put one adapter's LoRA beside the model's weights, times the adapter's weight in the recipe."""
    read = {place: read_tensors(adapter, place) for place in adapter.changes}
    lora = {place: tensors for place, (_, tensors) in read.items() if place.endswith(".weight") and "whole" not in tensors}
    if not lora:
        return
    factors = {place: factors_of(adapter, *read[place]) for place in lora}
    ranks = {place.removesuffix(".weight"): len(down) for place, (down, _, _) in factors.items()}
    biased = any("lora_B.bias" in tensors for tensors in lora.values())
    config = LoraConfig(
        r=max(ranks.values()),
        rank_pattern={f"^{re.escape(module)}": rank for module, rank in ranks.items()},
        target_modules="|".join(map(re.escape, ranks)),
        init_lora_weights=False,
        use_dora=_has_dora(adapter),
        lora_bias=biased,
    )
    try:
        inject_adapter_in_model(config, model, name)
    except (ValueError, TypeError) as error:  # PEFT has no layer for one of these modules, so it was not trained by PEFT
        raise AdapterMismatch(
            f"{adapter.uri}: PEFT cannot put it beside the weights of {type(model).__name__} ({in_one_line(error, 200)}), so "
            "it cannot be checked. Train it on other layers."
        ) from None
    for place, tensors in lora.items():
        layer = model.get_submodule(place.removesuffix(".weight"))
        assert isinstance(layer, LoraLayer), place
        layer.scaling[name] = weight * factors[place][2]
        _fill(layer, name, tensors)
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        layer.set_adapter(list(layer.scaling))


@torch.no_grad()
def _fill(layer: Any, name: str, tensors: dict[str, Array]) -> None:
    """Copy one module's tensors from the file into PEFT's layer."""
    for kind, values in tensors.items():
        if kind in ("lora_embedding_A", "lora_embedding_B"):
            target = getattr(layer, kind)[name]
        elif kind == "lora_magnitude_vector":
            target = layer.lora_magnitude_vector[name].weight
        else:
            part, _, is_bias = kind.partition(".")
            target = getattr(getattr(layer, part)[name], is_bias or "weight")
        target.copy_(torch.from_numpy(values).reshape(target.shape))
