"""One run of the fault campaign for each kind of fault; `make faults` has 200."""

from collections.abc import Iterator

import pytest

from campaign import run_one
from faults import KINDS, draw
from scene import World, world_at

SEED = 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world_at(tmp_path_factory.mktemp("faults") / "world") as world:
        yield world


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(KINDS)), ids=lambda number: str(draw(SEED, number)))
def test_whatever_befalls_a_run_it_ends_whole_or_says_why_and_goes_on(world: World, number: int) -> None:
    result = run_one(world, SEED, number)
    print(f"\n{result.fault}: {result.outcome} after {result.seconds} s: {result.message}")
    assert not result.violations
