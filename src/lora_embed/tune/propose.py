"""Choose the next merge to try: a pure function of the trials so far, so that a stopped search continues unchanged."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_embed.model.merge import METHODS

STEPS = (0.2, 0.1, 0.05)  # steps of a weight in a refinement, times 2 / adapters, coarse to fine
REFINED = 2  # number of methods that are refined at the same time
SCALES = (0.7, 1.0, 1.5)  # sums of weights in the first grid; a sum of 1 averages the adapters
HEAVIEST = 2.0  # largest weight
# First trials of each method: its options, and the sums of equal weights that suit it. For methods that add changes, the
# sum is 1, the mean; methods that average changes with an elected sign use each adapter at weight 1, as their authors do.
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

Rank = tuple[float, float]  # the objective, and a second value that decides between equal ones


@dataclass(frozen=True)
class Point:
    """One merge: method, weights in the recipe's order of adapters, options as sorted pairs."""

    method: str
    weights: tuple[float, ...]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def family(self) -> tuple[str, tuple[tuple[str, Any], ...]]:
        """Method and options, which a refinement does not change."""
        return self.method, self.options


def references(adapters: int) -> list[Point]:
    """Each adapter alone, then all at equal weights: the merges that others are compared with, so they are tried first."""
    alone = [point_of("weighted_sum", tuple(float(n == number) for n in range(adapters))) for number in range(adapters)]
    return [*alone, equal(adapters)]


def equal(adapters: int) -> Point:
    """The merge at equal weights: the mean of all adapters."""
    return point_of("weighted_sum", _even(adapters, 1.0))


def starts(adapters: int, methods: tuple[str, ...]) -> list[Point]:
    """The trials before any refinement: a coarse grid of weighted sums, and each method with its usual settings."""
    mixtures = [_even(adapters, 1.0)]
    for favoured in range(adapters):  # half of the weight is shared evenly, half goes to one adapter
        even = 0.5 / adapters
        mixtures.append(tuple(even + 0.5 * (place == favoured) for place in range(adapters)))
    grid = [point_of("weighted_sum", tuple(scale * weight for weight in mixture)) for scale in SCALES for mixture in mixtures]
    points = grid if "weighted_sum" in methods else []
    for method in methods:
        for options, sums in VARIANTS[method]:
            for kind in sums:
                weights = _even(adapters, 1.0 if kind == "mean" else float(adapters))
                points.append(point_of(method, weights, options))
    return list(dict.fromkeys(point for point in points if point not in references(adapters)))


def next_point(ranks: Mapping[Point, Rank], first: list[Point], methods: tuple[str, ...], seed: int) -> Point | None:
    """The next merge to try, or None if nothing is left to try.

    The points of `first` come first. Then the two best methods so far are refined around their best weights, with coarse
    steps first: a pattern search (Hooke & Jeeves 1961) that continues from a better point at once. Two methods, because
    with a few hundred images the order of close scores is chance. The other methods follow when these have no untried
    neighbour. `ranks` is in the order of the trials; of equal ones the earliest counts. `seed` shuffles directions.
    """
    for point in first:
        if point not in ranks:
            return point
    best: dict[Any, Point] = {}
    for point in sorted(ranks, key=ranks.__getitem__, reverse=True):
        if point.method in methods:
            best.setdefault(point.family, point)
    centres = list(best.values())
    for group in (centres[:REFINED], centres[REFINED:]):
        for step, centre in itertools.product(STEPS, group):
            for point in _around(centre, step * 2 / len(centre.weights), seed):
                if point not in ranks:
                    return point
    return None


def _around(centre: Point, step: float, seed: int) -> list[Point]:
    """Neighbours of a point: one weight raised or lowered, all scaled up or down, or one raised and another lowered."""
    count = len(centre.weights)
    singles = [tuple(step * (place == moved) for place in range(count)) for moved in range(count)]
    moves = [tuple(sign * part for part in single) for single in singles for sign in (1, -1)]
    moves += [tuple(sign * step * weight for weight in centre.weights) for sign in (1, -1)]
    moves += [
        tuple(step * ((place == raised) - (place == lowered)) for place in range(count))
        for raised, lowered in itertools.permutations(range(count), 2)
    ]
    random.Random(f"{seed} {centre} {step}").shuffle(moves)
    points = []
    for move in moves:
        weights = tuple(min(max(weight + change, 0.0), HEAVIEST) for weight, change in zip(centre.weights, move, strict=True))
        if any(weights):
            points.append(point_of(centre.method, weights, dict(centre.options)))
    return [point for point in points if point != centre]


def _even(adapters: int, total: float) -> tuple[float, ...]:
    return (total / adapters,) * adapters


def point_of(method: str, weights: tuple[float, ...], options: dict[str, Any] | None = None) -> Point:
    """A point with weights rounded to three places, so that equal merges are equal points."""
    return Point(method, tuple(round(weight, 3) for weight in weights), tuple(sorted((options or {}).items())))
