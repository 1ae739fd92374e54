"""Which merge to try next: a pure function of what was tried, so that a search that was stopped goes on as it would have."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_embed.model.merge import METHODS

STEPS = (0.2, 0.1, 0.05)  # of a weight, times 2 / adapters: how far a refinement looks, coarse to fine
REFINED = 2  # methods that are refined side by side
SCALES = (0.7, 1.0, 1.5)  # sums of weights that are tried at once; 1 averages, more adds
HEAVIEST = 2.0  # a weight
# What each method is tried with at first: its options, and the sums of equal weights that suit it. Methods that add take
# 1, the mean; those that average what agrees with an elected sign take each adapter at 1, as their authors do.
_ADDING, _ELECTING, _BOTH = ("mean",), ("ones",), ("mean", "ones")
VARIANTS: dict[str, tuple[tuple[dict[str, Any], tuple[str, ...]], ...]] = {
    "weighted_sum": (({}, _ADDING),),
    "linear": (({}, _ADDING),),
    "svd": (({"energy": 0.9}, _ADDING),),
    "ties": (({"density": 0.2}, _ELECTING), ({"density": 0.5}, _ELECTING)),
    "dare_linear": (({"density": 0.5}, _ADDING),),
    "dare_ties": (({"density": 0.5}, _ELECTING),),
    "magnitude_prune": (({"density": 0.5}, _ADDING),),
    "iso_c": (({}, _BOTH),),
}
assert set(VARIANTS) == set(METHODS)

Rank = tuple[float, float]  # the objective, and what decides between equals


@dataclass(frozen=True)
class Point:
    """One merge: weights in the recipe's order of adapters, options as sorted pairs."""

    method: str
    weights: tuple[float, ...]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def family(self) -> tuple[str, tuple[tuple[str, Any], ...]]:
        """What a refinement leaves as it is."""
        return self.method, self.options


def references(adapters: int) -> list[Point]:
    """Each adapter alone, then all at equal weights: what others are measured by, and so what is tried first."""
    alone = [point_of("weighted_sum", tuple(float(one == other) for other in range(adapters))) for one in range(adapters)]
    return [*alone, equal(adapters)]


def equal(adapters: int) -> Point:
    """The mean of all changes."""
    return point_of("weighted_sum", _even(adapters, 1.0))


def starts(adapters: int, methods: tuple[str, ...]) -> list[Point]:
    """What is tried before anything is refined: a coarse grid of weighted sums, and each method as it is meant to be used."""
    mixtures = [_even(adapters, 1.0)]
    for favoured in range(adapters):  # half is shared evenly, half is one adapter’s
        even = 0.5 / adapters
        mixtures.append(tuple(even + 0.5 * (place == favoured) for place in range(adapters)))
    grid = [point_of("weighted_sum", tuple(scale * weight for weight in mixture)) for scale in SCALES for mixture in mixtures]
    found = grid if "weighted_sum" in methods else []
    for method in methods:
        for options, sums in VARIANTS[method]:
            for kind in sums:
                weights = _even(adapters, 1.0 if kind == "mean" else float(adapters))
                found.append(point_of(method, weights, options))
    return list(dict.fromkeys(point for point in found if point not in references(adapters)))


def next_point(ranks: Mapping[Point, Rank], first: list[Point], methods: tuple[str, ...], seed: int) -> Point | None:
    """The next merge to try, or None where there is nothing left to look at.

    `first` in turn; then the two best methods so far are refined around their best weights, by coarse steps first: a
    pattern search (Hooke & Jeeves 1961) in which a better point is the centre at once, and two methods, since scores of a
    few hundred images part close ones by chance. The other methods follow where those have nothing new near them. `ranks`
    is in the order of trying, and of equals the first counts; `seed` shuffles directions.
    """
    for point in first:
        if point not in ranks:
            return point
    best: dict[Any, Point] = {}
    for point in sorted(ranks, key=ranks.__getitem__, reverse=True):
        if point.method in methods:
            best.setdefault(point.family, point)
    centres = list(best.values())
    for some in (centres[:REFINED], centres[REFINED:]):
        for step, centre in itertools.product(STEPS, some):
            for point in _around(centre, step * 2 / len(centre.weights), seed):
                if point not in ranks:
                    return point
    return None


def _around(centre: Point, step: float, seed: int) -> list[Point]:
    """Neighbours of a point: one weight more or less, all more or less, and one less where another is more."""
    count = len(centre.weights)
    singles = [tuple(step * (place == moved) for place in range(count)) for moved in range(count)]
    moves = [tuple(sign * part for part in single) for single in singles for sign in (1, -1)]
    moves += [tuple(sign * step * weight for weight in centre.weights) for sign in (1, -1)]
    moves += [
        tuple(step * ((place == more) - (place == less)) for place in range(count))
        for more, less in itertools.permutations(range(count), 2)
    ]
    random.Random(f"{seed} {centre} {step}").shuffle(moves)
    found = []
    for move in moves:
        weights = tuple(min(max(weight + by, 0.0), HEAVIEST) for weight, by in zip(centre.weights, move, strict=True))
        if any(weights):
            found.append(point_of(centre.method, weights, dict(centre.options)))
    return [point for point in found if point != centre]


def _even(adapters: int, total: float) -> tuple[float, ...]:
    return (total / adapters,) * adapters


def point_of(method: str, weights: tuple[float, ...], options: dict[str, Any] | None = None) -> Point:
    """Weights to three places: what a person would write, and equal points are found equal."""
    return Point(method, tuple(round(weight, 3) for weight in weights), tuple(sorted((options or {}).items())))
