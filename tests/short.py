"""The short form of a long list of cases: `make test` runs some of each kind, `make test-slow` the others too."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], is_quick: Callable[[Any], bool]) -> list[Any]:
    """The cases for `parametrize`, all of them slow but those that are quick."""
    params = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        params.append(pytest.param(*values, marks=() if is_quick(case) else pytest.mark.slow))
    return params


def slow_but_every(number: int, cases: Iterable[Any]) -> list[Any]:
    """The same, with every so-manieth case quick."""
    listed = list(cases)
    quick = {id(case) for case in listed[::number]}
    return slow_but(listed, lambda case: id(case) in quick)
