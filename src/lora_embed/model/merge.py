"""The changes of several adapters, with their weights → one change of each weight of the base; one function per method.

To add a method, write its function and list it in `METHODS`. Its keyword arguments are the options that a recipe may set,
with their types and bounds. An option named `seed` gets another value for each weight of the base.
"""

import contextlib
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, Literal

import torch
from peft.utils import merge_utils
from pydantic import Field

from lora_embed.config.models import check_options
from lora_embed.config.values import check_method
from lora_embed.errors import AdapterMismatch, ConfigError
from lora_embed.model.change import LowRank, Normed, Replaced, Residual, Shift, multiply
from lora_embed.model.match import Adapter

CONCAT = "concat"  # does not merge: each adapter gets its own model, see `build.py`

_BLOCK = 2**18  # entries of a weight that are merged at a time

Options = dict[str, Any]
Rank = Annotated[int, Field(ge=1)] | None
Energy = Annotated[float, Field(gt=0, le=1, strict=False)]
Density = Annotated[float, Field(gt=0, le=1, strict=False)]
Seed = Annotated[int, Field(ge=0)]
MajoritySign = Literal["total", "frequency"]


_NOT_FACTORS = {
    Normed: "DoRA's magnitudes",
    Replaced: "weights that were trained whole",
    Residual: "a change of the base by PiSSA or OLoRA",
    Shift: "biases of lora_bias",
}


@dataclass(frozen=True)
class Weighted:
    """One adapter's change of one weight of the base, with the recipe's weight."""

    weight: float
    change: Any  # a Change, or an object with the same `delta`


def weighted_sum(parts: list[Weighted], before: torch.Tensor) -> torch.Tensor:
    """The exact sum of all changes, `Σ w·Δ`, in float64; PEFT's `cat` gives the same where it is correct.

    Task arithmetic (arXiv 2212.04089). An adapter of weight 0 is left out, so weights [1, 0] give the first adapter bit for
    bit. Low-rank changes are added as one product of their concatenated factors, `[w·s·B …] @ [A …]`.
    """
    parts = [part for part in parts if part.weight != 0]
    products = [part for part in parts if isinstance(part.change, LowRank)]
    total = torch.zeros_like(before, dtype=torch.float64)
    if products:
        up = torch.cat([part.weight * part.change.scale * part.change.up.double() for part in products], dim=1)
        down = torch.cat([part.change.down.double() for part in products])
        total = multiply(up, down).reshape(before.shape)
    for part in parts:
        if not isinstance(part.change, LowRank):
            total = total + part.weight * part.change.delta(before)
    return total


def linear(parts: list[Weighted], before: torch.Tensor) -> torch.Tensor:
    """PEFT's `linear`: factors are summed before they are multiplied, `(Σ √(w·s)·B) @ (Σ √(w·s)·A)`.

    Source: `LoraModel._generalized_task_arithmetic_weighted_adapter` of PEFT 0.21. The product contains cross terms
    `B_i @ A_j`, which belong to no adapter; `weighted_sum` has none. As in PEFT, the sign of a negative weight goes to A.
    Raises AdapterMismatch for unequal ranks, which cannot be added. All changes must be of LoRA factors alone.
    """
    ranks = {part.change.down.shape[0] for part in parts}
    if len(ranks) > 1:
        raise AdapterMismatch(
            f"merge_method 'linear' needs adapters of equal ranks, found {sorted(ranks)}. Use 'weighted_sum'."
        )
    scales = [part.weight * part.change.scale for part in parts]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    downs = [root * part.change.down.double() for root, part in zip(signed, parts, strict=True)]
    ups = [root * part.change.up.double() for root, part in zip(roots, parts, strict=True)]
    return multiply(reduce(torch.add, ups), reduce(torch.add, downs)).reshape(before.shape)


def svd(parts: list[Weighted], before: torch.Tensor, *, rank: Rank = None, energy: Energy = 1.0) -> torch.Tensor:
    """The exact sum, then its best approximation of low rank: `U·S·Vᵀ` cut after `rank`, or where `energy` is reached.

    `energy` is the share of the squared Frobenius norm to keep. Eckart–Young; PEFT's `svd` with full deltas.
    """
    total = weighted_sum(parts, before)
    if total.ndim < 2:
        return total
    up, down = truncate(total, rank, energy)
    return (up @ down).reshape(before.shape)


def ties(
    parts: list[Weighted], before: torch.Tensor, *, density: Density = 0.2, majority_sign: MajoritySign = "total"
) -> torch.Tensor:
    """TIES (arXiv 2306.01708): keep the largest `density` of each delta, elect a sign, average what agrees with it.

    As PEFT's `merge_utils.ties` on full deltas in float32; the paper keeps a fifth.
    """
    return _elected(_pruned(parts, before, density, "magnitude"), majority_sign, before)


def dare_linear(parts: list[Weighted], before: torch.Tensor, *, density: Density = 0.5, seed: Seed = 0) -> torch.Tensor:
    """DARE (arXiv 2311.03099): drop all but `density` of each delta at random, rescale by 1/density, add.

    As PEFT's `merge_utils.dare_linear` on full deltas in float32.
    """
    with _seeded(seed):
        return _added(_pruned(parts, before, density, "random"), before)


def dare_ties(
    parts: list[Weighted],
    before: torch.Tensor,
    *,
    density: Density = 0.5,
    majority_sign: MajoritySign = "total",
    seed: Seed = 0,
) -> torch.Tensor:
    """DARE's random dropping (arXiv 2311.03099), then the sign election of TIES (arXiv 2306.01708).

    As PEFT's `merge_utils.dare_ties` on full deltas in float32.
    """
    with _seeded(seed):
        return _elected(_pruned(parts, before, density, "random"), majority_sign, before)


def magnitude_prune(parts: list[Weighted], before: torch.Tensor, *, density: Density = 0.5) -> torch.Tensor:
    """Keep the largest `density` of each delta, then add: TIES without its election.

    As PEFT's `merge_utils.magnitude_prune` on full deltas in float32.
    """
    return _added(_pruned(parts, before, density, "magnitude"), before)


def iso_c(parts: list[Weighted], before: torch.Tensor) -> torch.Tensor:
    """Iso-C (arXiv 2502.04959): the sum's singular values are replaced by their mean, `σ̄·U·Vᵀ`, so that no task dominates.

    The mean is over the rank of the sum, not of the weight, since a sum of LoRA changes has no other directions. Biases and
    norms, which have no singular values, are added unchanged.
    """
    total = weighted_sum(parts, before)
    if total.ndim < 2 or not bool(total.any()):
        return total
    u, s, vh = torch.linalg.svd(total.flatten(1), full_matrices=False)
    rank = _rank_of(s, total.flatten(1).shape)
    change: torch.Tensor = s[:rank].mean() * (u[:, :rank] @ vh[:rank])
    return change.reshape(before.shape)


METHODS: dict[str, Callable[..., torch.Tensor]] = {
    method.__name__: method for method in (weighted_sum, linear, svd, ties, dare_linear, dare_ties, magnitude_prune, iso_c)
}


def options_of(method: str, settings: Options) -> Options:
    """A method's options: the given ones, checked, and the others at their defaults.

    Raises ConfigError for an unknown method, an unknown option, or a value that the option cannot have.
    """
    try:
        check_method(method, settings)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    parameters = inspect.signature(METHODS[method]).parameters.values() if method in METHODS else ()
    types_and_defaults = {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
    return check_options(f"merge_options of {method}", types_and_defaults, settings)


def merge(
    adapters: list[Adapter], weights: list[float], method: str, options: Options, before: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (weight name, merged change in float64), one weight at a time so that memory does not grow with adapters.

    `before` holds the base's weights. Adapters are summed in the order of their content hashes, not of the recipe, since the
    result of a float sum depends on the order.
    """
    if METHODS.get(method) is linear:
        _check_factors(adapters)
    ordered = sorted(zip(adapters, weights, strict=True), key=lambda pair: (pair[0].content_hash, pair[1]))
    for name in sorted({name for adapter in adapters for name in adapter.changes}):
        parts = [Weighted(weight, adapter.changes[name]) for adapter, weight in ordered if name in adapter.changes]
        yield name, merge_one(name, parts, before[name], method, options)


def _check_factors(adapters: list[Adapter]) -> None:
    """Raises AdapterMismatch for an adapter that does not only have LoRA factors, which `linear` adds."""
    for adapter in adapters:
        other = next((change for change in adapter.changes.values() if not isinstance(change, LowRank)), None)
        if other is not None:
            raise AdapterMismatch(
                f"merge_method 'linear' adds LoRA factors alone, but {adapter.uri} also holds {_NOT_FACTORS[type(other)]}. Use "
                "'weighted_sum'."
            )


def merge_one(name: str, parts: list[Weighted], before: torch.Tensor, method: str, options: Options) -> torch.Tensor:
    """The merged change of the weight of that name, in float64."""
    if "seed" in options:
        digest = hashlib.sha256(f"{options['seed']} {name}".encode()).digest()
        options = options | {"seed": int.from_bytes(digest[:7], "big")}
    return METHODS[method](parts, before, **options)


def truncate(matrix: torch.Tensor, rank: int | None, energy: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (rows, r) and (r, columns), float64, of a matrix's best approximation, with r as in `svd`, but at least 1."""
    flat = matrix.flatten(1)
    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    factors = _rank_of(s, flat.shape)
    if energy < 1:
        squares = s.square().cumsum(0)
        factors = min(factors, int((squares < energy * squares[-1]).sum()) + 1)
    factors = max(1, min(factors, rank or factors))
    root = s[:factors].sqrt()
    return u[:, :factors] * root, root[:, None] * vh[:factors]


def _rank_of(singular_values: torch.Tensor, shape: torch.Size) -> int:
    """Numerical rank: the number of singular values above the usual bound for rounding errors."""
    return int((singular_values > singular_values[0] * max(shape) * torch.finfo(torch.float64).eps).sum())


@dataclass(frozen=True)
class _Pruned:
    """Full deltas after PEFT's `prune`, (adapters, entries) in float32, and the weights of the adapters."""

    deltas: torch.Tensor
    weights: torch.Tensor

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Deltas and weights for `merge_utils`, in blocks of entries, since it copies its arguments."""
        for block in torch.split(self.deltas, _BLOCK, dim=1):
            yield block, self.weights


def _pruned(parts: list[Weighted], before: torch.Tensor, density: float, kind: Literal["magnitude", "random"]) -> _Pruned:
    """All deltas, pruned. Those of weight 0 are left out, so that they take no part in an election of signs."""
    parts = [part for part in parts if part.weight != 0] or parts
    deltas = torch.empty(len(parts), before.numel())
    for row, part in zip(deltas, parts, strict=True):
        delta = part.change.delta(before).float()
        row.copy_((delta if density == 1 else merge_utils.prune(delta, density, kind, rescale=kind == "random")).flatten())
    return _Pruned(deltas, torch.tensor([part.weight for part in parts]))


def _added(pruned: _Pruned, before: torch.Tensor) -> torch.Tensor:
    sums = [merge_utils.task_arithmetic(list(block), weights) for block, weights in pruned.blocks()]
    return torch.cat(sums).reshape(before.shape).double()


def _elected(pruned: _Pruned, majority_sign: MajoritySign, before: torch.Tensor) -> torch.Tensor:
    merged = []
    for block, weights in pruned.blocks():
        mask = merge_utils.calculate_majority_sign_mask(block, majority_sign)
        merged.append(merge_utils.disjoint_merge(block * weights[:, None], mask))
    return torch.cat(merged).reshape(before.shape).double()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A context with random numbers from a seed. Afterwards, the generator continues as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
