"""How several adapters' changes lie to each other: cosine, sign conflicts, overlap of their subspaces."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lora_embed.model.base import Base, load_headless
from lora_embed.model.change import LowRank
from lora_embed.model.fold import Merge
from lora_embed.model.match import Adapter

Square = NDArray[np.float64]
Kind = Literal["cosine", "sign_conflicts", "subspace_overlap"]
KINDS: tuple[Kind, ...] = ("cosine", "sign_conflicts", "subspace_overlap")
_BLOCK = 2**18  # entries of a weight that are compared at a time


@dataclass
class Relations:
    """Sums over all weights seen so far; each figure is a (k, k) table over k adapters, weighted as in the merge."""

    products: Square  # ⟨wᵢΔᵢ, wⱼΔⱼ⟩
    conflicts: Square  # entries that both change, in opposite directions
    shared: Square  # entries that both change
    overlaps: Square  # sum over weights of ‖UᵢᵀUⱼ‖² / smaller rank
    overlapping: Square  # weights with an overlap

    @classmethod
    def of(cls, adapters: int) -> "Relations":
        """Nothing seen yet."""
        return cls(*(np.zeros((adapters, adapters)) for _ in range(5)))

    def add(self, merged: Merge, name: str, before: torch.Tensor) -> list[float]:
        """Take in one weight of the base; returns the norm of each adapter's share in it, 0 where it has none."""
        taking = [number for number, adapter in enumerate(merged.adapters) if name in adapter.changes]
        rows = torch.empty(len(taking), before.numel(), dtype=torch.float32)
        for row, number in zip(rows, taking, strict=True):
            delta = merged.weights[number] * merged.adapters[number].changes[name].delta(before)
            row.copy_(delta.flatten())
        at, squares = np.ix_(taking, taking), np.zeros(len(merged.adapters))
        for block in torch.split(rows, _BLOCK, dim=1):  # copies of 20 adapters' changes are 20 weights' size
            products, signs, present = _gram(block), _gram(block.sign()), _gram(block.ne(0).float())
            self.products[at] += products
            self.conflicts[at] += (present - signs) / 2
            self.shared[at] += present
            squares[taking] += np.diag(products)
        self._add_overlaps(merged, name, taking)
        return [float(norm) for norm in np.sqrt(squares)]

    def include(self, others: "Relations") -> None:
        """Add what another has seen."""
        for name in ("products", "conflicts", "shared", "overlaps", "overlapping"):
            setattr(self, name, getattr(self, name) + getattr(others, name))

    def _add_overlaps(self, merged: Merge, name: str, taking: list[int]) -> None:
        changes = {number: merged.adapters[number].changes[name] for number in taking}
        bases = {
            number: torch.linalg.qr(change.up.double()).Q for number, change in changes.items() if isinstance(change, LowRank)
        }
        for i, one in bases.items():
            for j, other in bases.items():
                self.overlaps[i, j] += float((one.T @ other).square().sum()) / min(one.shape[1], other.shape[1])
                self.overlapping[i, j] += 1

    def norms(self) -> list[float]:
        """Frobenius norm of each adapter's share over all weights."""
        return [float(norm) for norm in np.sqrt(np.diag(self.products))]

    def tables(self) -> dict[str, Any]:
        """The figures for the report; None where there is nothing to compare."""
        norms = np.sqrt(np.diag(self.products))
        return {
            "cosine": _ratio(self.products, np.outer(norms, norms)),
            "sign_conflicts": _ratio(self.conflicts, self.shared),
            "subspace_overlap": _ratio(self.overlaps, self.overlapping),
        }


def relate_adapters(base: Base, adapters: list[Adapter]) -> Iterator[tuple[Kind, int, int, str | None, float]]:
    """How adapters of one base lie to each other, by their weights alone: over all layers (None), and by weight.

    Yields (kind, one, other, weight, value) for each pair that both change something there, each at weight 1.
    """
    whole = Relations.of(len(adapters))
    merged = Merge(adapters=tuple(adapters), weights=(1.0,) * len(adapters), options={})
    by_layer: list[tuple[str | None, Relations]] = [(None, whole)]
    for name, before in load_headless(base.folder, base.uri).named_parameters():
        if sum(name in adapter.changes for adapter in adapters) > 1:
            by_layer.append((name, Relations.of(len(adapters))))
            by_layer[-1][1].add(merged, name, before.detach())
            whole.include(by_layer[-1][1])
        elif any(name in adapter.changes for adapter in adapters):  # its norm counts in the cosine of all
            whole.add(merged, name, before.detach())
    for layer, relations in by_layer:
        tables = relations.tables()
        for kind in KINDS:
            for one, other in itertools.combinations(range(len(adapters)), 2):
                if (value := tables[kind][one][other]) is not None:
                    yield kind, one, other, layer, value


def _gram(rows: torch.Tensor) -> Square:
    products: Square = (rows @ rows.T).double().numpy()
    return products


def _ratio(above: Square, below: Square) -> list[list[float | None]]:
    return [
        [round(float(a / b), 6) if b else None for a, b in zip(row, divisors, strict=True)]
        for row, divisors in zip(above, below, strict=True)
    ]
