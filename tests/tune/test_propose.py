"""Which merge is tried next: references, a coarse grid, every method, then closer and closer to the best."""

import pytest

from lora_embed.model.merge import METHODS
from lora_embed.tune.propose import HEAVIEST, Point, Rank, equal, next_point, point_of, references, starts

ALL = tuple(METHODS)
BEST = (0.85, 0.3)


def distance(point: Point) -> float:
    """From a merge that is best at weights .85/.3, by a method that others stay behind."""
    return sum((weight - best) ** 2 for weight, best in zip(point.weights, BEST, strict=True)) + (
        point.method != "weighted_sum"
    )


def search(evaluations: int, seed: int = 0, known: dict[Point, Rank] | None = None) -> dict[Point, Rank]:
    ranks = dict(known or {})
    first = [*references(2), *starts(2, ALL)]
    while len(ranks) < evaluations and (point := next_point(ranks, first, ALL, seed)) is not None:
        assert point not in ranks
        ranks[point] = (-distance(point), 0.0)
    return ranks


def best_of(ranks: dict[Point, Rank]) -> Point:
    return max(ranks, key=ranks.__getitem__)


def test_each_adapter_alone_and_equal_weights_come_first() -> None:
    assert list(search(3)) == [
        Point("weighted_sum", (1.0, 0.0)), Point("weighted_sum", (0.0, 1.0)), Point("weighted_sum", (0.5, 0.5)),
    ]  # fmt: skip


@pytest.mark.parametrize("adapters", [2, 3, 5])
def test_starts_hold_every_method_once_and_no_reference(adapters: int) -> None:
    found = starts(adapters, ALL)
    assert {point.method for point in found} == set(METHODS)
    assert len(set(found)) == len(found)
    assert not set(found) & set(references(adapters))
    assert all(len(point.weights) == adapters for point in found)
    assert {point.method for point in starts(adapters, ("ties",))} == {"ties"}


def test_forty_trials_come_close_to_the_best_weights() -> None:
    ranks = search(40)
    assert len(ranks) == 40
    assert distance(best_of(ranks)) < 0.01 < distance(equal(2))


def test_a_search_goes_on_from_any_point_as_it_would_have() -> None:
    whole = search(60)
    for stopped in (1, 5, 25, 44):
        known = dict(list(whole.items())[:stopped])
        assert list(search(60, known=known)) == list(whole)


def test_the_seed_turns_directions_and_nothing_before_them() -> None:
    first = len(references(2)) + len(starts(2, ALL))
    one, other = list(search(60)), list(search(60, seed=1))
    assert one[:first] == other[:first]
    assert one != other


def test_weights_stay_within_bounds_and_never_all_at_zero() -> None:
    def rank(point: Point, sign: int) -> Rank:
        return sign * sum(point.weights), 0.0

    for sign in (1, -1):
        ranks: dict[Point, Rank] = {}
        first = references(2)
        for _ in range(80):
            point = next_point(ranks, first, ("weighted_sum",), 0)
            if point is None:
                break
            ranks[point] = rank(point, sign)
        assert all(0 <= weight <= HEAVIEST for point in ranks for weight in point.weights)
        assert all(any(point.weights) for point in ranks)
    assert min(sum(point.weights) for point in ranks) < 0.2


def test_the_two_best_methods_are_refined_side_by_side_and_others_when_those_have_nothing_new() -> None:
    methods = ("weighted_sum", "ties", "iso_c")
    ranks: dict[Point, Rank] = {
        point_of("iso_c", (1.0, 1.0)): (-0.3, 0.0),
        point_of("weighted_sum", (0.5, 0.5)): (-0.1, 0.0),
        point_of("ties", (1.0, 1.0)): (-0.2, 0.0),
    }
    tried = []
    while (found := next_point(ranks, [], methods, 0)) is not None:
        ranks[found] = (-1.0, 0.0)  # nothing is better
        tried.append(found.method)
    runs = [method for number, method in enumerate(tried) if number == 0 or tried[number - 1] != method]
    assert runs == ["weighted_sum", "ties"] * 3 + ["iso_c"]


def test_a_method_that_was_not_asked_for_is_never_refined() -> None:
    ranks: dict[Point, Rank] = {}
    first = [*references(2), *starts(2, ("ties",))]
    while len(ranks) < 30 and (point := next_point(ranks, first, ("ties",), 0)) is not None:
        ranks[point] = (-distance(point), 0.0)  # weighted sums are best
    assert [point for point in ranks if point.method != "ties"] == references(2)
