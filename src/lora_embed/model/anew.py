"""A second implementation of the merge methods, in NumPy from their formulas: the proof compares each fold with it.

It uses no code of `merge` or PEFT. Two things come from torch, so that they equal those of the fold: random numbers of a
seed, and the choice among equally large entries.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Entries = NDArray[np.float32]
Parts = Sequence[tuple[float, Array]]  # weight in the recipe and full change of each adapter


def merge_anew(method: str, options: Mapping[str, Any], parts: Parts, name: str) -> Array:
    """The merged change of the weight `name`, by any method but `linear`, which works on LoRA factors."""
    parts = [(weight, change) for weight, change in parts if weight != 0] or parts
    if method in ("weighted_sum", "svd", "iso_c"):
        total = sum((weight * change for weight, change in parts), np.zeros(parts[0][1].shape))
        if method == "weighted_sum" or total.ndim < 2 or not total.any():
            return total
        return _low_rank(total, **options) if method == "svd" else _with_equal_singular_values(total)
    if method in ("ties", "magnitude_prune"):
        thinned = [_largest(change.astype(np.float32), options["density"]) for _, change in parts]
    elif method in ("dare_linear", "dare_ties"):
        thinned = _random([change.astype(np.float32) for _, change in parts], options["density"], options["seed"], name)
    else:
        raise NotImplementedError(f"merge method {method!r} has no formula here, so no build by it can be checked")
    weights = np.array([weight for weight, _ in parts], np.float32)
    if method in ("ties", "dare_ties"):
        return _elected(np.stack(thinned), weights, options["majority_sign"]).astype(np.float64)
    return np.tensordot(weights, np.stack(thinned), axes=1).astype(np.float64)


def _low_rank(total: Array, rank: int | None, energy: float) -> Array:
    """Eckart–Young: the leading singular vectors that reach the share `energy` of the squared norm, at most `rank`."""
    u, s, vh = np.linalg.svd(total.reshape(len(total), -1), full_matrices=False)
    is_enough = np.cumsum(s**2) >= energy * np.sum(s**2)
    leading = int(is_enough.argmax()) + 1 if energy < 1 else len(s)
    leading = min(leading, rank) if rank is not None else leading
    product: Array = (u[:, :leading] * s[:leading] @ vh[:leading]).reshape(total.shape)
    return product


def _with_equal_singular_values(total: Array) -> Array:
    """Iso-C (arXiv 2502.04959, equation 6) over the sum's own rank: all singular values are replaced by their mean."""
    u, s, vh = np.linalg.svd(total.reshape(len(total), -1), full_matrices=False)
    rank = np.linalg.matrix_rank(total.reshape(len(total), -1))
    product: Array = (s[:rank].mean() * (u[:, :rank] @ vh[:rank])).reshape(total.shape)
    return product


def _largest(change: Entries, density: float) -> Entries:
    """TIES's trimming (arXiv 2306.01708, section 3): all but the largest entries become 0."""
    if density == 1:
        return change
    flat = change.reshape(-1)
    largest = torch.topk(torch.from_numpy(np.abs(flat)), int(density * flat.size), sorted=False).indices.numpy()
    thinned = np.zeros_like(flat)
    thinned[largest] = flat[largest]
    return thinned.reshape(change.shape)


def _random(changes: list[Entries], density: float, seed: int, name: str) -> list[Entries]:
    """DARE (arXiv 2311.03099, section 3.2): random entries become 0, the others are multiplied by 1/density."""
    if density == 1:
        return changes
    weight_seed = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    random = torch.Generator().manual_seed(weight_seed)
    masks = [torch.bernoulli(torch.full(change.shape, density), generator=random).numpy() for change in changes]
    return [change * mask / np.float32(density) for change, mask in zip(changes, masks, strict=True)]


def _elected(changes: Entries, weights: Entries, majority_sign: str) -> Entries:
    """TIES's election and merge: the sign with the larger sum, or more votes, and the mean of the entries with that sign."""
    votes = changes if majority_sign == "total" else np.sign(changes)
    elected = np.where(votes.sum(axis=0) >= 0, np.float32(1), np.float32(-1))
    agrees = np.sign(changes) == elected
    weighted = changes * weights.reshape(-1, *[1] * (changes.ndim - 1))
    mean: Entries = np.where(agrees, weighted, np.float32(0)).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1).astype(np.float32)
    return mean
