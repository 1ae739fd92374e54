"""Factors and weights of several adapters → the change of each weight of the base; one function per method."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from lora_embed.errors import AdapterMismatch
from lora_embed.model.adapter import Adapter, Factors

VERSION = 1  # part of the recipe id: raise it when a method's numbers change


@dataclass(frozen=True)
class Weighted:
    """One adapter's factors at one weight of the base, with the recipe's weight."""

    weight: float
    factors: Factors


def weighted_sum(parts: list[Weighted]) -> torch.Tensor:
    """The exact sum of all changes, `Σ w·s·B@A`, in float64; PEFT reaches it as `cat`.

    An adapter at weight 0 takes no part, so weights [1, 0] give adapter one bit for bit.
    """
    deltas = [part.weight * part.factors.delta() for part in parts if part.weight != 0]
    total = deltas[0] if deltas else torch.zeros_like(parts[0].factors.delta())
    for delta in deltas[1:]:
        total = total + delta
    return total


def linear(parts: list[Weighted]) -> torch.Tensor:
    """PEFT's `linear`: factors are summed before they are multiplied, `(Σ √(w·s)·B) @ (Σ √(w·s)·A)`.

    Source: `LoraModel._generalized_task_arithmetic_weighted_adapter` of PEFT 0.21. The product holds the cross terms
    `B_i @ A_j`, which belong to no adapter; `weighted_sum` has none. As there, a negative weight's sign goes to A.
    Raises AdapterMismatch for unequal ranks, which cannot be added.
    """
    ranks = {part.factors.down.shape[0] for part in parts}
    if len(ranks) > 1:
        raise AdapterMismatch(
            f"merge_method 'linear' adds LoRA factors and needs equal ranks, found {sorted(ranks)}; use 'weighted_sum'"
        )
    scales = [part.weight * part.factors.scale for part in parts]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    down = torch.stack([root * part.factors.down.double() for root, part in zip(signed, parts, strict=True)]).sum(dim=0)
    up = torch.stack([root * part.factors.up.double() for root, part in zip(roots, parts, strict=True)]).sum(dim=0)
    return up @ down


METHODS: dict[str, Callable[[list[Weighted]], torch.Tensor]] = {"weighted_sum": weighted_sum, "linear": linear}


def merge(adapters: list[Adapter], weights: list[float], method: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (weight name, merged change in float64), one weight at a time so that memory does not grow with adapters.

    Adapters are taken in the order of their content hashes, whatever the recipe's: float sums depend on it.
    """
    ordered = sorted(zip(adapters, weights, strict=True), key=lambda pair: (pair[0].content_hash, pair[1]))
    for name in sorted({name for adapter in adapters for name in adapter.factors}):
        parts = [Weighted(weight, adapter.factors[name]) for adapter, weight in ordered if name in adapter.factors]
        yield name, METHODS[method](parts)
