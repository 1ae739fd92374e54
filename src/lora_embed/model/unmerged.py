"""Check a merge by what it computes: the golden vectors are compared with those of PEFT's layers, which are not merged.

`proof` compares weights, which is enough only if a layer computes with its weight as it is. This check has no such
assumption, and shares no code with the fold: PEFT puts the adapters beside the base's weights, as in training.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from transformers import PreTrainedModel

from lora_embed.errors import AdapterMismatch, EncoderError
from lora_embed.model import golden
from lora_embed.model.anew import Array
from lora_embed.model.fold import Merge
from lora_embed.model.match import Adapter
from lora_embed.model.peft_private import LoraLayer
from lora_embed.model.proof import change_of, factors_of, initial_of, read_tensors
from lora_embed.text import whole_sentences

BOUND = 1e-5  # relative L2 difference of a vector that rounding may cause
SHARE = 1e-2  # a larger difference than `BOUND` is still rounding if it is below this share of the adapter's own effect

Weights = dict[str, torch.Tensor]
Vectors = NDArray[np.float32]
Embed = Callable[[int], Vectors]  # a number of golden images → their vectors, by the model as it is now
Parts = Sequence[tuple[Adapter, float]]  # adapters with their weights in the recipe


def check_function(merged: Merge, vectors: Vectors, base: PreTrainedModel, embed: Embed) -> float:
    """Compare the golden vectors of a folded model with those of adapters that are not merged; returns the difference.

    `embed` runs `base`, which is changed. For a weighted sum, all adapters together are beside its weights. For a method
    whose merge is no sum of what the adapters compute, the mean of their changes is compared on one image, folded by what the
    proof reads from their files; with DoRA, whose changes cannot be added, each adapter alone. Raises EncoderError for a layer
    that computes with another weight than its own, so that a fold is not the adapter.
    """
    parts = list(zip(merged.adapters, merged.weights, strict=True))
    weights = base.state_dict()  # by their names before PEFT's layers are put around them
    if merged.method == "weighted_sum" and (len(parts) == 1 or not any(_has_dora(adapter) for adapter, _ in parts)):
        return _compare(parts, vectors, base, weights, embed)
    has_dora = any(_has_dora(adapter) for adapter in merged.adapters)
    groups = [[adapter] for adapter in merged.adapters] if has_dora else [list(merged.adapters)]
    differences = []
    for number, adapters in enumerate(groups):
        mean = [(adapter, 1 / len(adapters)) for adapter in adapters]
        with _changed(weights, mean, change_of):
            folded = embed(1)
        differences.append(_compare(mean, folded, base, weights, embed, first=number))
    return max(differences, default=0.0)


def _compare(parts: Parts, vectors: Vectors, base: PreTrainedModel, weights: Weights, embed: Embed, first: int = 0) -> float:
    kinds = {type(base.get_submodule(name.rpartition(".")[0])) for adapter, _ in parts for name in adapter.changes}
    with _changed(weights, parts, initial_of):  # these are changes of weights for PEFT too
        names = [f"adapter{number}" for number in range(first, first + len(parts))]
        for name, (adapter, weight) in zip(names, parts, strict=True):
            _put_beside(base, adapter, weight, name)
        layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            own = [name for name in names if name in layer.scaling]
            layer.enable_adapters(bool(own))
            layer.set_adapter(own)
        expected = embed(len(vectors))
        for layer in layers:
            layer.enable_adapters(False)
    difference = golden.relative_difference(vectors, expected)
    if difference <= BOUND or difference <= SHARE * golden.relative_difference(embed(len(vectors)), expected):
        return difference
    odd = sorted(kind.__name__ for kind in kinds if not kind.__module__.startswith(("torch.", "peft.")))
    reason = f" {type(base).__name__} has layers of its own kind, {', '.join(odd)}, which may change a weight." if odd else ""
    raise EncoderError(
        f"{', '.join(adapter.uri for adapter, _ in parts)}: cannot be folded into {type(base).__name__}: the vectors of the "
        f"golden images then differ by {difference:.1e} (relative L2) from those with the adapter beside the weights, as it "
        f"was trained; at most {BOUND:.0e} is allowed.{reason} Train the adapter on other layers, or name another base."
    )


def _has_dora(adapter: Adapter) -> bool:
    return bool(adapter.saved.config.get("use_dora"))


@contextlib.contextmanager
def _changed(weights: Weights, parts: Parts, change: Callable[[Adapter, str, Array], Array | None]) -> Iterator[None]:
    """A context in which each adapter's change of each weight is added to it, times the adapter's weight in the recipe."""
    kept = {}
    for name in sorted({name for adapter, _ in parts for name in adapter.changes}):
        before = weights[name].double().numpy()
        changes = [
            weight * of_adapter
            for adapter, weight in parts
            if name in adapter.changes and (of_adapter := change(adapter, name, before)) is not None
        ]
        if changes:
            kept[name] = weights[name].clone()
            weights[name].add_(torch.from_numpy(sum(changes[1:], changes[0])))
    yield
    for name, weight in kept.items():
        weights[name].copy_(weight)


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
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there are several adapters
            inject_adapter_in_model(config, model, name)
    except (ValueError, TypeError) as error:  # PEFT has no layer for one of these modules, so it was not trained by PEFT
        reason = whole_sentences(error, 200).rstrip(".")
        raise AdapterMismatch(
            f"{adapter.uri}: PEFT cannot put it beside the weights of {type(model).__name__} ({reason}), so it cannot be "
            "checked. Train it on other layers."
        ) from None
    for place, tensors in lora.items():
        layer = model.get_submodule(place.removesuffix(".weight"))
        assert isinstance(layer, LoraLayer), place
        layer.scaling[name] = weight * factors[place][2]
        _fill(layer, name, tensors)


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
    if "lora_B.bias" not in tensors and name in layer.lora_B and layer.lora_B[name].bias is not None:
        layer.lora_B[name].bias.zero_()  # other modules of the adapter have one
