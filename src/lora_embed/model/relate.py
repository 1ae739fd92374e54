"""Compare the changes of several adapters: cosine, sign conflicts, overlap of their subspaces."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from lora_embed.model.base import load_headless
from lora_embed.model.base_files import Base
from lora_embed.model.change import LowRank
from lora_embed.model.fold import Merge
from lora_embed.model.match import Adapter
from lora_embed.model.weights import weights_of

Square = NDArray[np.float64]
Kind = Literal["cosine", "sign_conflicts", "subspace_overlap"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_BLOCK = 2**18  # entries of a weight that are compared at a time


@dataclass
class Relations:
    """Sums over all weights added so far. Each figure is a (k, k) table over k adapters, weighted as in the merge."""

    products: Square  # ⟨wᵢΔᵢ, wⱼΔⱼ⟩
    conflicts: Square  # number of entries that both adapters change, in opposite directions
    shared: Square  # number of entries that both adapters change
    overlaps: Square  # sum over weights of ‖UᵢᵀUⱼ‖² / smaller rank
    overlapping: Square  # number of weights in that sum

    @classmethod
    def of(cls, adapters: int) -> "Relations":
        """Sums over no weights, for this number of adapters."""
        return cls(*(np.zeros((adapters, adapters)) for _ in range(5)))

    def add(self, merged: Merge, name: str, before: torch.Tensor) -> list[float]:
        """Add one weight of the base. Returns the norm of each adapter's weighted change of it; 0 for adapters without one."""
        changing = [number for number, adapter in enumerate(merged.adapters) if name in adapter.changes]
        rows = torch.empty(len(changing), before.numel(), dtype=torch.float32)
        for row, number in zip(rows, changing, strict=True):
            delta = merged.weights[number] * merged.adapters[number].changes[name].delta(before)
            row.copy_(delta.flatten())
        at, squares = np.ix_(changing, changing), np.zeros(len(merged.adapters))
        for block in torch.split(
            rows, _BLOCK, dim=1
        ):  # in blocks: a copy of 20 adapters' changes has 20 times the weight's size
            products, signs, present = _gram(block), _gram(block.sign()), _gram(block.ne(0).float())
            self.products[at] += products
            self.conflicts[at] += (present - signs) / 2
            self.shared[at] += present
            squares[changing] += np.diag(products)
        self._add_overlaps(merged, name, changing)
        return [float(norm) for norm in np.sqrt(squares)]

    def include(self, others: "Relations") -> None:
        """Add the sums of another `Relations`."""
        for name in ("products", "conflicts", "shared", "overlaps", "overlapping"):
            setattr(self, name, getattr(self, name) + getattr(others, name))

    def _add_overlaps(self, merged: Merge, name: str, changing: list[int]) -> None:
        changes = {number: merged.adapters[number].changes[name] for number in changing}
        bases = {
            number: torch.linalg.qr(change.up.double()).Q for number, change in changes.items() if isinstance(change, LowRank)
        }
        for i, basis_i in bases.items():
            for j, basis_j in bases.items():
                self.overlaps[i, j] += float((basis_i.T @ basis_j).square().sum()) / min(basis_i.shape[1], basis_j.shape[1])
                self.overlapping[i, j] += 1

    def norms(self) -> list[float]:
        """Frobenius norm of each adapter's weighted change, over all weights."""
        return [float(norm) for norm in np.sqrt(np.diag(self.products))]

    def tables(self) -> dict[str, Any]:
        """The tables for the report, with None for pairs of adapters that share no weight."""
        norms = np.sqrt(np.diag(self.products))
        return {
            "cosine": _ratio(self.products, np.outer(norms, norms)),
            "sign_conflicts": _ratio(self.conflicts, self.shared),
            "subspace_overlap": _ratio(self.overlaps, self.overlapping),
        }


def relate_adapters(base: Base, adapters: list[Adapter]) -> Iterator[tuple[Kind, int, int, str | None, float]]:
    """Compare adapters of one base by their changes alone: over all weights together (None), and for each weight.

    Yields (kind, adapter, other adapter, weight name or None, value) for each pair that both change the weight, at weight 1.
    """
    whole = Relations.of(len(adapters))
    merged = Merge(adapters=tuple(adapters), weights=(1.0,) * len(adapters), options={})
    by_layer: list[tuple[str | None, Relations]] = [(None, whole)]
    for name, before in weights_of(load_headless(base.folder, base.uri)).items():
        if sum(name in adapter.changes for adapter in adapters) > 1:
            by_layer.append((name, Relations.of(len(adapters))))
            by_layer[-1][1].add(merged, name, before.detach())
            whole.include(by_layer[-1][1])
        elif any(name in adapter.changes for adapter in adapters):  # counts in the norms, and so in the cosine over all weights
            whole.add(merged, name, before.detach())
    for layer, relations in by_layer:
        tables = relations.tables()
        for kind in KINDS:
            for i, j in itertools.combinations(range(len(adapters)), 2):
                if (value := tables[kind][i][j]) is not None:
                    yield kind, i, j, layer, value


def _gram(rows: torch.Tensor) -> Square:
    products: Square = (rows @ rows.T).double().numpy()
    return products


def _ratio(above: Square, below: Square) -> list[list[float | None]]:
    return [
        [round(float(a / b), 6) if b else None for a, b in zip(row, divisors, strict=True)]
        for row, divisors in zip(above, below, strict=True)
    ]
